// Copies that change type or order: cast, permute, scale_columns. All results are contiguous.
#include "../kernels.h"
#include "../simd/simd.h"

namespace mgm::cpu::MGM_ISA {
namespace {

// A strided source seen in the order of its contiguous result; neighbouring dimensions that step alike are
// one.
struct Walk {
  int rank = 0;
  int64_t shape[kMaxRank], strides[kMaxRank];

  MGM_INLINE void push(int64_t size, int64_t stride) {
    if (size == 1) return;
    if (rank > 0 && strides[rank - 1] == stride * size) {
      shape[rank - 1] *= size;
      strides[rank - 1] = stride;
      return;
    }
    shape[rank] = size;
    strides[rank++] = stride;
  }
  MGM_INLINE void finish() {
    if (rank == 0) {
      rank = 1;
      shape[0] = strides[0] = 1;
    }
  }
  // Rows (all dimensions but the last) and where a row starts.
  MGM_INLINE int64_t rows() const {
    int64_t n = 1;
    for (int i = 0; i + 1 < rank; ++i) n *= shape[i];
    return n;
  }
  MGM_INLINE int64_t offset(int64_t row) const {
    int64_t at = 0;
    for (int i = rank - 2; i >= 0; --i) {
      at += row % shape[i] * strides[i];
      row /= shape[i];
    }
    return at;
  }
};

MGM_INLINE int bytes_of(DType dtype) {
  return dtype == DType::f32 || dtype == DType::i32 ? 4 : dtype == DType::u8 || dtype == DType::int8 ? 1 : 2;
}

// Splits rows of `columns` elements into pieces of about 16k elements and calls body(row, begin, end).
template <class Body>
void for_pieces(int64_t rows, int64_t columns, ThreadPool& pool, const Body& body) {
  constexpr int64_t kPiece = 16384;
  const int64_t pieces = columns > kPiece ? (columns + kPiece - 1) / kPiece : 1;
  const int64_t grain = columns * 4 < kPiece ? kPiece / (columns > 0 ? columns : 1) : 1;
  pool.parallel_for(rows * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / pieces, from = i % pieces * kPiece;
      body(row, from, from + kPiece < columns ? from + kPiece : columns);
    }
  });
}

struct F32 {
  using T = float;
  static MGM_INLINE vf load_v(const T* p) { return load(p); }
  static MGM_INLINE float get(T x) { return x; }
  static MGM_INLINE T make(float x) { return x; }
  static MGM_INLINE void store_v(T* p, vf x) { store(p, x); }
};
struct Bf16 {
  using T = uint16_t;
  static MGM_INLINE vf load_v(const T* p) { return load_bf16(p); }
  static MGM_INLINE float get(T x) { return bf16_to_f32(x); }
  static MGM_INLINE T make(float x) { return f32_to_bf16(x); }
  static MGM_INLINE void store_v(T* p, vf x) {
    float lanes[kWidth];
    store(lanes, x);
    for (int i = 0; i < kWidth; ++i) p[i] = f32_to_bf16(lanes[i]);
  }
};
struct F16 {
  using T = uint16_t;
  static MGM_INLINE vf load_v(const T* p) { return load_f16(p); }
  static MGM_INLINE float get(T x) { return f16_to_f32(x); }
  static MGM_INLINE T make(float x) { return f32_to_f16(x); }
  static MGM_INLINE void store_v(T* p, vf x) { store_f16(p, x); }
};

template <class From, class To>
void convert(const CastArgs& args, const Walk& walk, ThreadPool& pool) {
  const auto* x = static_cast<const typename From::T*>(args.x.data);
  auto* out = static_cast<typename To::T*>(args.out.data);
  const int64_t columns = walk.shape[walk.rank - 1], step = walk.strides[walk.rank - 1];
  for_pieces(walk.rows(), columns, pool, [&](int64_t row, int64_t begin, int64_t end) {
    const auto* from = x + walk.offset(row);
    auto* to = out + row * columns;
    int64_t i = begin;
    if (step == 1)
      for (; i + kWidth <= end; i += kWidth) To::store_v(to + i, From::load_v(from + i));
    for (; i < end; ++i) to[i] = To::make(From::get(from[i * step]));
  });
}

template <class T>
void copy_walk(const void* source, void* target, const Walk& walk, ThreadPool& pool) {
  const T* x = static_cast<const T*>(source);
  T* out = static_cast<T*>(target);
  const int64_t columns = walk.shape[walk.rank - 1], step = walk.strides[walk.rank - 1];
  if (step == 1 || columns < 8) {
    for_pieces(walk.rows(), columns, pool, [&](int64_t row, int64_t begin, int64_t end) {
      const T* from = x + walk.offset(row);
      T* to = out + row * columns;
      if (step == 1)
        std::memcpy(to + begin, from + begin, static_cast<size_t>(end - begin) * sizeof(T));
      else
        for (int64_t i = begin; i < end; ++i) to[i] = from[i * step];
    });
    return;
  }
  // The last dimension jumps in memory. Transpose in blocks with the dimension that steps least, so that
  // every cache line read is used whole.
  int fast = walk.rank - 1;
  for (int i = 0; i + 1 < walk.rank; ++i)
    if (walk.strides[i] != 0 && (walk.strides[fast] == 0 || walk.strides[i] < walk.strides[fast])) fast = i;
  if (fast == walk.rank - 1) {
    for_pieces(walk.rows(), columns, pool, [&](int64_t row, int64_t begin, int64_t end) {
      const T* from = x + walk.offset(row);
      for (int64_t i = begin; i < end; ++i) out[row * columns + i] = from[i * step];
    });
    return;
  }
  constexpr int64_t kBlock = 64 / static_cast<int64_t>(sizeof(T));
  int64_t fast_out = 1;  // distance in the result between neighbours along `fast`
  for (int i = fast + 1; i < walk.rank; ++i) fast_out *= walk.shape[i];
  const int64_t fast_size = walk.shape[fast], fast_step = walk.strides[fast];
  const int64_t blocks = (fast_size + kBlock - 1) / kBlock;
  const int64_t others = walk.rows() / fast_size;
  pool.parallel_for(others * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t f0 = job % blocks * kBlock, f1 = f0 + kBlock < fast_size ? f0 + kBlock : fast_size;
      int64_t rest = job / blocks, from_at = 0, to_at = 0, pitch = columns;
      for (int i = walk.rank - 2; i >= 0; --i) {
        if (i != fast) {
          const int64_t index = rest % walk.shape[i];
          rest /= walk.shape[i];
          from_at += index * walk.strides[i];
          to_at += index * pitch;
        }
        pitch *= walk.shape[i];
      }
      for (int64_t c0 = 0; c0 < columns; c0 += kBlock) {
        const int64_t c1 = c0 + kBlock < columns ? c0 + kBlock : columns;
        for (int64_t f = f0; f < f1; ++f)
          for (int64_t c = c0; c < c1; ++c)
            out[to_at + f * fast_out + c] = x[from_at + f * fast_step + c * step];
      }
    }
  });
}

void copy_any(const View& x, void* out, const Walk& walk, ThreadPool& pool) {
  switch (bytes_of(x.dtype)) {
    case 4:
      return copy_walk<uint32_t>(x.data, out, walk, pool);
    case 2:
      return copy_walk<uint16_t>(x.data, out, walk, pool);
    default:
      return copy_walk<uint8_t>(x.data, out, walk, pool);
  }
}

template <class From>
void convert_from(const CastArgs& args, const Walk& walk, ThreadPool& pool) {
  switch (args.out.dtype) {
    case DType::bf16:
      return convert<From, Bf16>(args, walk, pool);
    case DType::f16:
      return convert<From, F16>(args, walk, pool);
    default:
      return convert<From, F32>(args, walk, pool);
  }
}

template <class From>
void scale_rows(const ScaleColumnsArgs& args, ThreadPool& pool) {
  const auto* w = static_cast<const typename From::T*>(args.w.data);
  const float* scale = args.scale.f32();
  const int64_t columns = args.w.shape[1];
  for_pieces(args.w.shape[0], columns, pool, [&](int64_t row, int64_t begin, int64_t end) {
    const auto* from = w + row * args.w.strides[0];
    float* to = args.out.f32() + row * columns;
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) store(to + i, From::load_v(from + i) * load(scale + i));
    for (; i < end; ++i) to[i] = From::get(from[i]) * scale[i];
  });
}

}  // namespace

void cast(const CastArgs& args, ThreadPool& pool) {
  if (args.x.numel() == 0) return;
  Walk walk;
  for (int i = 0; i < args.x.rank; ++i) walk.push(args.x.shape[i], args.x.strides[i]);
  walk.finish();
  if (args.x.dtype == args.out.dtype) return copy_any(args.x, args.out.data, walk, pool);
  switch (args.x.dtype) {
    case DType::bf16:
      return convert_from<Bf16>(args, walk, pool);
    case DType::f16:
      return convert_from<F16>(args, walk, pool);
    default:
      return convert_from<F32>(args, walk, pool);
  }
}

void permute(const PermuteArgs& args, ThreadPool& pool) {
  if (args.x.numel() == 0) return;
  Walk walk;
  for (int i = 0; i < args.x.rank; ++i) walk.push(args.x.shape[args.dims[i]], args.x.strides[args.dims[i]]);
  walk.finish();
  copy_any(args.x, args.out.data, walk, pool);
}

void scale_columns(const ScaleColumnsArgs& args, ThreadPool& pool) {
  switch (args.w.dtype) {
    case DType::bf16:
      return scale_rows<Bf16>(args, pool);
    case DType::f16:
      return scale_rows<F16>(args, pool);
    default:
      return scale_rows<F32>(args, pool);
  }
}

}  // namespace mgm::cpu::MGM_ISA
