#include "moe_route.h"

#include "../launch.h"

namespace mgm::cuda {

void moe_route(Queue& queue, const MoeRouteArgs& args) {
  const int64_t tokens = args.logits.shape[0];
  queue.launch(
      {"moe_route", "moe_route"}, {ceil_div(tokens, kRouteThreads / 32)}, kRouteThreads,
      RouteParams{args.logits.f32(), args.weights.f32(), args.ids.i32(), tokens, args.logits.strides[0],
                  static_cast<int32_t>(args.logits.shape[1]), static_cast<int32_t>(args.ids.shape[1])});
}

}  // namespace mgm::cuda
