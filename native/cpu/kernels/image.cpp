// Images on their way out: bytes from numbers, tiles into a canvas.
#include "../kernels.h"
#include "../simd/simd.h"

namespace mgm::cpu::MGM_ISA {

void to_uint8(const ToUint8Args& args, ThreadPool& pool) {
  const int64_t n = args.x.numel();
  const vf scale = set1(args.scale), offset = set1(args.offset);
  // Of a NaN and a bound, max gives the second.
  const auto bytes = [&](vf x) { return to_int(min(max(fma(x, scale, offset), set1(0.0f)), set1(255.0f))); };
  pool.parallel_for(n, 1 << 14, [&](int64_t begin, int64_t end) {
    const float* x = args.x.f32();
    uint8_t* out = args.out.u8();
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) store_u8(out + i, bytes(load(x + i)));
    if (i == end) return;
    uint8_t rest[kWidth];
    store_u8(rest, bytes(load_up_to(x + i, end - i)));
    std::memcpy(out + i, rest, static_cast<size_t>(end - i));
  });
}

void add_tile(const AddTileArgs& args, ThreadPool& pool) {
  const View &tile = args.tile, &canvas = args.canvas;
  const int64_t lines = tile.shape[1], channels = tile.shape[3], width = tile.shape[2] * channels;
  float* columns = static_cast<float*>(pool.scratch(0, sizeof(float) * static_cast<size_t>(width)));
  for (int64_t i = 0; i < width; ++i) columns[i] = args.columns.f32()[i / channels];
  pool.parallel_for(tile.shape[0] * lines, 8, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t b = line / lines, i = line % lines;
      float* to = canvas.f32() + b * canvas.strides[0] + (args.y + i) * canvas.strides[1] + args.x * channels;
      const float* from = tile.f32() + line * width;
      const vf row = set1(args.rows.f32()[i]);
      for (int64_t c = 0; c < width; c += kWidth) {
        const int64_t left = width - c;
        const vf weight = row * load_up_to(columns + c, left);
        store_up_to(to + c, fma(weight, load_up_to(from + c, left), load_up_to(to + c, left)), left);
      }
    }
  });
}

}  // namespace mgm::cpu::MGM_ISA
