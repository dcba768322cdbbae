#include "group_norm.h"

#include <algorithm>
#include <string>

#include "../../runtime/tensor.h"
#include "../launch.h"

namespace mgm::cuda {
namespace {

// A block of group_norm_small has at most so many bytes; of the other kernels, a 128th of an image within
// these limits, so that one image is enough work for a GPU and moments stay few.
constexpr int64_t kSmall = 64 << 10, kLeastChunk = 32 << 10, kMostChunk = 256 << 10;

bool aligned(const View& x) {
  return !x || reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// Groups of a slice that begins and ends on a sector of 32 bytes, in x, `more` and out alike; all groups
// where there is no such slice.
int64_t groups_of_slice(int64_t groups, int64_t group_bytes, int64_t bytes_x, int64_t bytes_more) {
  for (int64_t count = 1; count < groups; ++count)
    if (groups % count == 0 && count * group_bytes % 32 == 0 && bytes_x % 16 == 0 && bytes_more % 16 == 0)
      return count;
  return groups;
}

}  // namespace

void group_norm(Queue& queue, const GroupNormArgs& args) {
  const View &x = args.x, &more = args.more;
  const auto size = static_cast<int64_t>(dtype_size(x.dtype));
  const int64_t width = 16 / size;
  const int64_t batch = x.shape[0], pixels = x.shape[1] * x.shape[2];
  const int64_t channels_x = x.shape[3], channels_more = more ? more.shape[3] : 0;
  const int64_t channels = channels_x + channels_more, group_width = channels / args.groups;
  const int64_t vectors_x = ceil_div(channels_x, width), vectors = vectors_x + ceil_div(channels_more, width);

  GroupNormParams p{};
  p.x = x.data;
  p.more = more.data;
  p.weight = args.weight.f32();
  p.bias = args.bias.f32();
  p.out = args.out.data;
  p.pixels = pixels;
  p.channels_x = static_cast<int32_t>(channels_x);
  p.channels_more = static_cast<int32_t>(channels_more);
  p.group_width = static_cast<int32_t>(group_width);
  p.groups = args.groups;
  p.vector_width = static_cast<int32_t>(width);
  p.vectors_x = static_cast<int32_t>(vectors_x);
  p.vectors = static_cast<int32_t>(vectors);
  p.aligned = channels_x % width == 0 && channels_more % width == 0 && aligned(x) && aligned(more) &&
              aligned(args.out);
  p.silu = args.activation == Activation::silu;
  p.eps = args.eps;

  const auto run = [&](const char* step, int64_t blocks, int64_t floats) {
    const std::string kernel = std::string("group_norm_") + step + dtype_name(x.dtype);
    const int64_t threads = ceil_div(p.columns * p.rows, 32) * 32;
    queue.launch({"group_norm", kernel.c_str()}, {blocks}, static_cast<int>(threads), p,
                 static_cast<size_t>(floats * p.columns * 16 / size) * sizeof(float));
  };
  const auto set_columns = [&](int64_t columns) {
    p.columns = static_cast<int32_t>(columns);
    p.rows = static_cast<int32_t>(kGroupNormThreads / columns);
    p.slices = static_cast<int32_t>(ceil_div(vectors, columns));
  };

  const int64_t together =
      groups_of_slice(args.groups, group_width * size, channels_x * size, channels_more * size);
  const int64_t columns = together == args.groups ? vectors : together * group_width / width;
  if (columns <= kGroupNormThreads && pixels * columns * 16 <= kSmall) {
    set_columns(columns);
    p.chunk = static_cast<int32_t>(pixels);
    p.chunks = 1;
    run("small_", batch * p.slices, kGroupNormAffine + group_norm_sums(p.rows));
    return;
  }

  // Slices alike, of whole sectors: a block reads the weights of its own only.
  const int64_t slices = ceil_div(vectors, kGroupNormColumns);
  set_columns(ceil_div(vectors, 2 * slices) * 2);
  const int64_t bytes = std::clamp(pixels * channels * size / 128, kLeastChunk, kMostChunk);
  const int64_t turn = kGroupNormBatch * p.rows;
  const int64_t chunk = ceil_div(bytes, p.columns * 16 * turn) * turn;
  p.chunk = static_cast<int32_t>(chunk);
  p.chunks = static_cast<int32_t>(ceil_div(pixels, chunk));
  const int64_t parts = p.chunks * p.slices, groups = batch * args.groups;
  const auto scratch = queue.scratch(static_cast<size_t>(groups * (parts * 3 + 2)) * sizeof(float));
  p.stats = reinterpret_cast<float*>(scratch->data());
  p.partials = p.stats + groups * 2;
  run("moments_", batch * parts, group_norm_sums(p.rows));
  queue.launch({"group_norm", "group_norm_combine"}, {groups}, 32, p);
  run("apply_", batch * parts, kGroupNormAffine);
}

}  // namespace mgm::cuda
