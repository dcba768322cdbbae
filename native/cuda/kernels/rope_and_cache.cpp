#include "rope_and_cache.h"

#include <algorithm>
#include <string>

#include "../../runtime/error.h"
#include "../../runtime/tensor.h"
#include "../launch.h"

namespace mgm::cuda {

void rope_and_cache(Queue& queue, const RopeAndCacheArgs& args) {
  const View &qkv = args.qkv, &pages = args.k_pages;
  const int64_t half = args.out.shape[2] / 2;
  if (half > kRopeMaxHalf)
    throw Error("INVALID_ARGUMENT", format("expected at most %d for the head dimension but received %lld",
                                           2 * kRopeMaxHalf, static_cast<long long>(2 * half)));
  std::string kernel = std::string("rope_and_cache_") + dtype_name(qkv.dtype) + "_" + dtype_name(pages.dtype);
  // Whole heads make the distances within qkv, pages and out multiples of half a head.
  const auto width = 16 / static_cast<int64_t>(std::max(dtype_size(qkv.dtype), dtype_size(pages.dtype)));
  const auto start = [](const View& view) { return reinterpret_cast<uintptr_t>(view.data) % 16; };
  if (half % width != 0 || qkv.strides[0] % width != 0 || start(qkv) != 0 || start(args.k_pages) != 0 ||
      start(args.v_pages) != 0)
    kernel += "_1";
  // Enough blocks to fill the GPU; those of a long prompt take several tokens each, evenly.
  const int64_t tokens = args.out.shape[0], room = 4 * queue.info().multiprocessors;
  queue.launch({"rope_and_cache", kernel.c_str()}, {ceil_div(tokens, ceil_div(tokens, room))}, kRopeThreads,
               RopeParams{qkv.data, args.positions.i32(), args.slots.i32(), args.inv_freq.f32(),
                          args.k_pages.data, args.v_pages.data, args.out.data, queue.fault(), tokens,
                          qkv.strides[0], pages.shape[0] * pages.shape[2],
                          static_cast<int32_t>(args.out.shape[1]), static_cast<int32_t>(pages.shape[1]),
                          static_cast<int32_t>(half), static_cast<int32_t>(pages.shape[2])});
}

}  // namespace mgm::cuda
