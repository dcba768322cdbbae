#include "grouped_linear.h"

#include <algorithm>
#include <string>

#include "../../runtime/error.h"
#include "../../runtime/tensor.h"
#include "gemm_launch.h"

namespace mgm::cuda {
namespace {

// Tokens are taken in chunks that bound the products between the two steps of the scatter form.
constexpr int64_t kProductBytes = int64_t{128} << 20;

// Assignments [0, count) with these ids: assignment a multiplies row a / sharing of x.
void multiply(Queue& queue, const GroupedLinearArgs& args, const View& x, const int32_t* ids, int64_t count,
              int64_t sharing, const View& out) {
  static constexpr const char* kTileNamesOf[] = {"_large", "_small", "_thin"};
  static_assert(kLarge == 0 && kSmall == 1 && kThin == 2, "the order of the names");
  const int64_t experts = args.experts, n = args.w[0].shape[0];
  // Tiles of all experts together keep the multiprocessors busy.
  const int64_t used = std::min(experts, count);
  const TileName tile = tile_for(ceil_div(count, used), n,
                                 static_cast<int>(ceil_div(queue.info().multiprocessors, used)), false);
  const int64_t most = most_groups(count, experts, kTiles[tile].m);
  const auto order = queue.scratch(static_cast<size_t>(count) * sizeof(int32_t));
  const auto groups = queue.scratch(static_cast<size_t>(most) * sizeof(Group));
  queue.launch(
      {"grouped_linear", "group_rows"}, {1}, kGroupThreads,
      GroupParams{ids, reinterpret_cast<int32_t*>(order->data()), reinterpret_cast<Group*>(groups->data()),
                  queue.fault(), static_cast<int32_t>(count), static_cast<int32_t>(experts),
                  static_cast<int32_t>(most), kTiles[tile].m});

  GroupedParams p{};
  for (int e = 0; e < args.experts; ++e) p.w[e] = args.w[e].u8();
  p.x = x.data;
  p.groups = reinterpret_cast<const Group*>(groups->data());
  p.order = reinterpret_cast<const int32_t*>(order->data());
  p.x_stride = x.strides[0];
  p.sharing = static_cast<int32_t>(sharing);
  p.k = static_cast<int32_t>(x.shape[1]);
  p.panels = static_cast<int32_t>(panels_of(n, args.w[0].layout == Layout::gated_panels));
  p.blocks = static_cast<int32_t>(blocks_of(x.shape[1]));
  p.epilogue = epilogue_of(args.w[0], {}, {}, {}, args.activation, out);
  const WeightType type = weight_type_of(args.w[0]);
  const std::string kernel = std::string("grouped_") + dtype_name(x.dtype) +
                             (type == WeightType::half   ? ""
                              : type == WeightType::int8 ? "_int8"
                                                         : "_int4") +
                             kTileNamesOf[tile];
  queue.launch({"grouped_linear", kernel.c_str()}, {most, ceil_div(p.panels, kTiles[tile].n / kPanelRows)},
               threads_of(tile), p, static_cast<size_t>(tile_shared_bytes(tile, type)));
}

// Rows [first, first + count) of a matrix.
View rows_of(View x, int64_t first, int64_t count) {
  x.data = static_cast<std::byte*>(x.data) + first * x.strides[0] * static_cast<int64_t>(dtype_size(x.dtype));
  x.shape[0] = count;
  return x;
}

}  // namespace

void grouped_linear(Queue& queue, const GroupedLinearArgs& args) {
  if (args.experts > kMostExperts)
    throw Error("UNSUPPORTED", format("[grouped_linear] expected at most %d experts on CUDA but received %d",
                                      kMostExperts, args.experts));
  const int64_t tokens = args.ids.shape[0], k = args.ids.shape[1], n = args.out.shape[1];
  std::shared_ptr<Storage> copy;
  const View x = aligned_rows(queue, args.x, copy);
  if (!args.weights) {
    multiply(queue, args, x, args.ids.i32(), tokens * k, k, args.out);
    return;
  }

  const int64_t chunk = std::min(tokens, std::max<int64_t>(kProductBytes / (k * n * 4), 64));
  const auto products = queue.scratch(static_cast<size_t>(chunk * k * n) * sizeof(float));
  for (int64_t first = 0; first < tokens; first += chunk) {
    const int64_t count = std::min(chunk, tokens - first);
    multiply(queue, args, rows_of(x, first * k, count * k), args.ids.i32() + first * k, count * k, 1,
             contiguous_view(products->data(), DType::f32, {count * k, n}));
    const View out = rows_of(args.out, first, count),
               residual = args.residual ? rows_of(args.residual, first, count) : View{};
    const auto on_vectors = [&](const View& view) {
      return reinterpret_cast<uintptr_t>(view.data) % 8 == 0 && view.strides[0] % 4 == 0;
    };
    const std::string kernel = std::string("combine_") + dtype_name(out.dtype) +
                               (n % 4 == 0 && on_vectors(out) && on_vectors(residual) ? "" : "_1");
    queue.launch({"grouped_linear", kernel.c_str()}, {count}, kCombineThreads,
                 CombineParams{reinterpret_cast<const float*>(products->data()),
                               args.weights.f32() + first * k, residual.data, out.data, residual.strides[0],
                               static_cast<int32_t>(k), static_cast<int32_t>(n)});
  }
}

}  // namespace mgm::cuda
