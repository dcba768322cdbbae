// Row gathers: token embeddings from a plain or a packed table, and the splice of image rows among text rows.
#include "../kernels.h"
#include "../packed.h"

namespace mgm::cpu::MGM_ISA {
namespace {

// Row `id` of a packed table: one column of its panel.
template <class Read>
void unpack_row(const View& table, int64_t id, float scale, float* out) {
  const int64_t k_total = table.shape[1];
  const uint8_t* panel = table.u8() + static_cast<size_t>(id / kPanel) * panel_bytes(table.dtype, k_total);
  const int column = static_cast<int>(id % kPanel);
  for (int64_t k = 0; k < k_total; k += kQuantBlock) {
    const Read read(panel, k);
    const int n = k_total - k < kQuantBlock ? static_cast<int>(k_total - k) : kQuantBlock;
    for (int i = 0; i < n; i += 2) {
      vf w[4];
      read.pair(i, w);
      float lanes[2 * kPanel];
      for (int j = 0; j < 4; ++j) store(lanes + j * kWidth, w[j]);
      out[k + i] = scale * lanes[column];
      if (i + 1 < n) out[k + i + 1] = scale * lanes[kPanel + column];
    }
  }
}

void plain_row(const View& table, int64_t id, float scale, float* out) {
  const int64_t n = table.shape[1], offset = id * table.strides[0];
  int64_t c = 0;
  for (; c + kWidth <= n; c += kWidth) {
    const vf x = table.dtype == DType::f32    ? load(table.f32() + offset + c)
                 : table.dtype == DType::bf16 ? load_bf16(table.u16() + offset + c)
                                              : load_f16(table.u16() + offset + c);
    store(out + c, x * set1(scale));
  }
  for (; c < n; ++c)
    out[c] = scale * (table.dtype == DType::f32    ? table.f32()[offset + c]
                      : table.dtype == DType::bf16 ? bf16_to_f32(table.u16()[offset + c])
                                                   : f16_to_f32(table.u16()[offset + c]));
}

}  // namespace

void embedding(const EmbeddingArgs& args, ThreadPool& pool) {
  const View& table = args.table;
  const int32_t* ids = args.ids.i32();
  for (int64_t t = 0; t < args.ids.shape[0]; ++t)
    if (ids[t] >= table.shape[0])
      fail("[embedding] expected an id below %lld but received %d", static_cast<long long>(table.shape[0]),
           ids[t]);
  const int64_t n = table.shape[1];
  pool.parallel_for(args.ids.shape[0], 8, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* out = args.out.f32() + t * args.out.strides[0];
      if (ids[t] < 0) {
        std::memset(out, 0, static_cast<size_t>(n) * sizeof(float));
        continue;
      }
      if (table.layout == Layout::strided) {
        plain_row(table, ids[t], args.scale, out);
        continue;
      }
      switch (table.dtype) {
        case DType::bf16:
          unpack_row<ReadBf16>(table, ids[t], args.scale, out);
          break;
        case DType::f16:
          unpack_row<ReadF16>(table, ids[t], args.scale, out);
          break;
        case DType::int8:
          unpack_row<ReadInt8>(table, ids[t], args.scale, out);
          break;
        case DType::int4:
          unpack_row<ReadInt4>(table, ids[t], args.scale, out);
          break;
        default:
          unpack_row<ReadF32>(table, ids[t], args.scale, out);
      }
    }
  });
}

void splice_embeddings(const SpliceEmbeddingsArgs& args, ThreadPool& pool) {
  const int64_t texts = args.text.shape[0], images = args.image.shape[0], n = args.out.shape[1];
  const int32_t* index = args.index.i32();
  for (int64_t p = 0; p < args.index.shape[0]; ++p)
    if (index[p] >= texts || -1 - static_cast<int64_t>(index[p]) >= images)
      fail("[splice_embeddings] expected an index from %lld to %lld but received %d",
           static_cast<long long>(-images), static_cast<long long>(texts - 1), index[p]);
  pool.parallel_for(args.index.shape[0], 16, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const View& from = index[p] >= 0 ? args.text : args.image;
      const int64_t row = index[p] >= 0 ? index[p] : -1 - static_cast<int64_t>(index[p]);
      std::memcpy(args.out.f32() + p * args.out.strides[0], from.f32() + row * from.strides[0],
                  static_cast<size_t>(n) * sizeof(float));
    }
  });
}

}  // namespace mgm::cpu::MGM_ISA
