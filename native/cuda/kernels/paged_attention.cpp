#include "paged_attention.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "../../runtime/error.h"
#include "../../runtime/tensor.h"
#include "flash_launch.h"

namespace mgm::cuda {
namespace {

enum class Shape { wide, narrow, split };

// How much the partial results of split blocks may take.
constexpr int64_t kMaxPartialBytes = int64_t{64} << 20;

// Wide where sequences fill its rows; split where narrow blocks alone leave multiprocessors idle.
// MGM_CUDA_PAGED ("wide", "narrow", "split") decides for tests and measurements; the results are the same.
Shape shape_for(int64_t sequence_rows, int64_t narrow_blocks, int64_t segments, int64_t partial_bytes,
                int multiprocessors) {
  const char* asked = std::getenv("MGM_CUDA_PAGED");
  const std::string_view choice = asked ? asked : "";
  if (choice == "wide") return Shape::wide;
  if (choice == "narrow") return Shape::narrow;
  if (choice == "split") return Shape::split;
  if (sequence_rows > narrow_tile(128).rows()) return Shape::wide;
  return segments > 1 && narrow_blocks < 4 * multiprocessors && partial_bytes <= kMaxPartialBytes
             ? Shape::split
             : Shape::narrow;
}

}  // namespace

void paged_attention(Queue& queue, const PagedAttentionArgs& args) {
  const int64_t tokens = args.q.shape[0], heads = args.q.shape[1], d = args.q.shape[2];
  const int64_t pages = args.k_pages.shape[0], kv_heads = args.k_pages.shape[1],
                page_size = args.k_pages.shape[2];
  const int64_t sequences = args.context_lens.shape[0], max_blocks = args.block_table.shape[1];
  const int64_t room = max_blocks * page_size, group = heads / kv_heads;
  if (room > INT32_MAX || pages * kv_heads * page_size >= UINT32_MAX)
    throw Error("UNSUPPORTED",
                format("[pagedAttention] expected a cache of less than 2^32 rows and contexts of "
                       "less than 2^31 but received %lld and %lld",
                       static_cast<long long>(pages * kv_heads * page_size), static_cast<long long>(room)));

  if (d % 8 != 0)
    throw Error("UNSUPPORTED",
                format("[pagedAttention] expected a multiple of 8 for the head dimension on CUDA "
                       "but received %lld",
                       static_cast<long long>(d)));

  const Heads q = whole_pieces(queue, args.q, args.scale < 0.0f);
  const uint32_t shift = division_shift(page_size);
  PagedAttentionParams params{flash_params(queue, q, args.q, args.cu_q, kv_heads, args.scale, args.out),
                              static_cast<const char*>(args.k_pages.data),
                              static_cast<const char*>(args.v_pages.data),
                              args.block_table.i32(),
                              args.context_lens.i32(),
                              nullptr,
                              static_cast<int32_t>(d + 4),  // rows begin on 16 bytes
                              static_cast<int32_t>(max_blocks),
                              static_cast<int32_t>(room),
                              static_cast<uint32_t>(d * 2),
                              static_cast<uint32_t>(kv_heads),
                              static_cast<uint32_t>(pages),
                              static_cast<uint32_t>(page_size),
                              static_cast<uint32_t>((uint64_t{1} << shift) / page_size + 1),
                              shift};

  const int most = *std::find_if(std::begin(kPagedHeadDims), std::end(kPagedHeadDims),
                                 [&](int most) { return d <= most; });
  const int64_t segments = ceil_div(room, kSegment);
  const int64_t partial_bytes = segments * tokens * heads * params.partial_stride * 4;
  const int64_t narrow_blocks = (tokens * group / narrow_tile(most).rows() + sequences) * kv_heads;
  Shape shape = shape_for(tokens * group / std::max<int64_t>(sequences, 1), narrow_blocks, segments,
                          partial_bytes, queue.info().multiprocessors);
  if (shape == Shape::wide && most > kMaxWide) shape = Shape::narrow;
  if (room == 0) shape = Shape::narrow;

  const FlashTile tile = shape == Shape::wide ? wide_tile(most) : narrow_tile(most);
  const char* type = dtype_name(args.q.dtype);
  const std::string kernel = format("paged_%s_%s_%d", shape == Shape::wide ? "wide" : "narrow", type, most);
  Grid grid{blocks_of_rows(tokens * group, sequences, tile.rows()), kv_heads};
  std::shared_ptr<Storage> partial;
  if (shape == Shape::split) {
    partial = queue.scratch(static_cast<size_t>(partial_bytes));
    params.partial = reinterpret_cast<float*>(partial->data());
    grid.z = segments;
  }
  queue.launch({"paged_attention", kernel.c_str()}, grid, tile.threads(), params,
               static_cast<size_t>(tile.shared_bytes()));
  if (shape == Shape::split)
    queue.launch({"paged_attention", format("paged_combine_%s", type).c_str()},
                 {ceil_div(tokens * heads, kCombineThreads / 32)}, kCombineThreads, params);
}

}  // namespace mgm::cuda
