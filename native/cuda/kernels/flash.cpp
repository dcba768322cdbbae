#include <algorithm>
#include <cfloat>
#include <cmath>

#include "../../runtime/error.h"
#include "../../runtime/tensor.h"
#include "attention.h"
#include "flash_launch.h"

namespace mgm::cuda {

Heads whole_pieces(Queue& queue, const View& x, bool negate) {
  const int64_t rows = x.shape[0], heads = x.shape[1], d = x.shape[2], padded = ceil_div(d, 8) * 8;
  const int64_t stride = rows > 1 ? x.strides[0] : heads * padded;
  if (std::max(rows * heads, 2 * stride) > INT32_MAX)
    throw Error("UNSUPPORTED",
                format("[attention] expected at most %d rows and elements between tokens", INT32_MAX));
  const bool whole = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && stride % 8 == 0 && d == padded;
  if ((whole && !negate) || rows == 0) return {x.u16(), static_cast<int32_t>(stride), nullptr};
  const int64_t elements = rows * heads * padded;
  auto copy = queue.scratch(static_cast<size_t>(elements) * 2);
  auto* to = reinterpret_cast<uint16_t*>(copy->data());
  queue.launch({"attention", "pack_heads"}, {ceil_div(elements, kPackHeadsThreads)}, kPackHeadsThreads,
               PackHeadsParams{x.u16(), to, stride, elements, static_cast<int32_t>(heads),
                               static_cast<int32_t>(d), static_cast<int32_t>(padded), negate});
  return {to, static_cast<int32_t>(heads * padded), std::move(copy)};
}

FlashParams flash_params(Queue& queue, const Heads& q, const View& queries, const View& cu_q,
                         int64_t kv_heads, float scale, const View& out) {
  const auto d = static_cast<int32_t>(queries.shape[2]), padded = (d + 7) / 8 * 8;
  // Zero would make NaN of what was not seen.
  const float base2 = std::max(std::fabs(scale) * 1.44269504088896341f, FLT_MIN);
  return {q.data,
          out.u16(),
          cu_q.i32(),
          queue.fault(),
          static_cast<int32_t>(queries.shape[0]),
          static_cast<int32_t>(cu_q.shape[0] - 1),
          static_cast<int32_t>(queries.shape[1] / kv_heads),
          padded,
          d,
          q.stride,
          padded,
          base2};
}

}  // namespace mgm::cuda
