#include "rope_and_cache.h"

#include "../../runtime/error.h"
#include "../launch.h"

namespace mgm::cuda {

void rope_and_cache(Queue& queue, const RopeAndCacheArgs& args) {
  const View& pages = args.k_pages;
  const int64_t half = args.out.shape[2] / 2;
  if (half > kRopeMaxHalf)
    throw Error("INVALID_ARGUMENT", format("expected at most %d for the head dimension but received %lld",
                                           2 * kRopeMaxHalf, static_cast<long long>(2 * half)));
  const char* kernel = pages.dtype == DType::f32    ? "rope_and_cache_f32"
                       : pages.dtype == DType::bf16 ? "rope_and_cache_bf16"
                                                    : "rope_and_cache_f16";
  queue.launch({"rope_and_cache", kernel}, {args.out.shape[0]}, kRopeThreads,
               RopeParams{args.qkv.f32(), args.positions.i32(), args.slots.i32(), args.inv_freq.f32(),
                          args.k_pages.data, args.v_pages.data, args.out.f32(), queue.fault(),
                          args.qkv.strides[0], pages.shape[0] * pages.shape[2],
                          static_cast<int32_t>(args.out.shape[1]), static_cast<int32_t>(pages.shape[1]),
                          static_cast<int32_t>(half), static_cast<int32_t>(pages.shape[2])});
}

}  // namespace mgm::cuda
