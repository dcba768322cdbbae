#include "image.h"

#include <string>

#include "../../runtime/tensor.h"
#include "../launch.h"

namespace mgm::cuda {

void to_uint8(Queue& queue, const ToUint8Args& args) {
  const int64_t count = args.x.numel(), width = 16 / static_cast<int64_t>(dtype_size(args.x.dtype));
  const std::string kernel = std::string("to_uint8_") + dtype_name(args.x.dtype);
  queue.launch({"image", kernel.c_str()}, {ceil_div(count, width * kImageThreads)}, kImageThreads,
               Uint8Params{args.x.data, args.out.u8(), count, args.scale, args.offset,
                           reinterpret_cast<uintptr_t>(args.x.data) % 16 == 0});
}

void add_tile(Queue& queue, const AddTileArgs& args) {
  const View &canvas = args.canvas, &tile = args.tile;
  const int64_t height = tile.shape[1], channels = tile.shape[3], line = tile.shape[2] * channels;
  const int64_t blocks = ceil_div(line, kImageThreads);
  AddTileParams p{};
  p.canvas = canvas.f32() + args.y * canvas.strides[1] + args.x * channels;
  p.tile = tile.data;
  p.rows = args.rows.f32();
  p.columns = args.columns.f32();
  p.image_stride = canvas.strides[0];
  p.line_stride = canvas.strides[1];
  p.height = static_cast<int32_t>(height);
  p.line = static_cast<int32_t>(line);
  p.channels = static_cast<int32_t>(channels);
  p.blocks = static_cast<int32_t>(blocks);
  const std::string kernel = std::string("add_tile_") + dtype_name(tile.dtype);
  queue.launch({"image", kernel.c_str()}, {tile.shape[0] * height * blocks}, kImageThreads, p);
}

}  // namespace mgm::cuda
