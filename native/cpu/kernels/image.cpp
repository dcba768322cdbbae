// Images on their way out: bytes from numbers, tiles into a canvas.
#include "../kernels.h"

namespace mgm::cpu::MGM_ISA {

void to_uint8(const ToUint8Args& args, ThreadPool& pool) {
  pool.parallel_for(args.x.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float y = args.x.f32()[i] * args.scale + args.offset;
      args.out.u8()[i] = static_cast<uint8_t>(!(y > 0.0f)   ? 0.0f
                                              : y >= 255.0f ? 255.0f
                                                            : __builtin_nearbyintf(y));
    }
  });
}

void add_tile(const AddTileArgs& args, ThreadPool& pool) {
  const View &tile = args.tile, &canvas = args.canvas;
  const int64_t channels = tile.shape[3];
  pool.parallel_for(tile.shape[0] * tile.shape[1], 8, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t b = line / tile.shape[1], i = line % tile.shape[1];
      float* to = canvas.f32() + b * canvas.strides[0] + (args.y + i) * canvas.strides[1] + args.x * channels;
      const float* from = tile.f32() + line * tile.shape[2] * channels;
      for (int64_t j = 0; j < tile.shape[2]; ++j)
        for (int64_t c = 0; c < channels; ++c)
          to[j * channels + c] += args.rows.f32()[i] * args.columns.f32()[j] * from[j * channels + c];
    }
  });
}

}  // namespace mgm::cpu::MGM_ISA
