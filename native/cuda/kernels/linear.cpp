#include "linear.h"

#include <cstdlib>
#include <string_view>

#include "../../runtime/error.h"
#include "../../runtime/tensor.h"
#include "../launch.h"

namespace mgm::cuda {
namespace {

void pack(Queue& queue, const View& x, void* out, int64_t first, int64_t gates) {
  const char* kernel = x.dtype == DType::f32 ? "pack_f32" : x.dtype == DType::bf16 ? "pack_bf16" : "pack_f16";
  queue.launch({"linear", kernel}, {x.shape[0]}, kPackThreads,
               PackParams{x.data, static_cast<uint16_t*>(out), x.shape[0], x.shape[1], x.strides[0],
                          packed_stride(x.shape[1]), first, gates});
}

// Large tiles reuse each byte more often; small ones give more blocks and waste less on few rows.
// MGM_CUDA_TILE
// ("large", "small") decides for tests and measurements; the results are the same.
Tile tile_for(int64_t m, int64_t n, int multiprocessors) {
  const char* asked = std::getenv("MGM_CUDA_TILE");
  if (asked && std::string_view(asked) == "large") return kLargeTile;
  if (asked && std::string_view(asked) == "small") return kSmallTile;
  const int64_t large = ceil_div(m, kLargeTile.m) * ceil_div(n, kLargeTile.n);
  return m > kSmallTile.m && large >= multiprocessors ? kLargeTile : kSmallTile;
}

}  // namespace

size_t packed_bytes(DType dtype, Layout, int64_t n, int64_t k) {
  if (dtype != DType::bf16)
    throw Error("UNSUPPORTED", format("[packLinear] %s weights have no CUDA kernel yet; pack them as bf16",
                                      dtype_name(dtype)));
  return static_cast<size_t>(n * packed_stride(k)) * 2;
}

void pack_linear(Queue& queue, const PackLinearArgs& args) {
  int64_t first = 0;
  for (int i = 0; i < args.count; ++i) {
    const View& w = args.weights[i];
    pack(queue, w, args.out.data, first, args.out.layout == Layout::gated_panels ? args.out.shape[0] / 2 : 0);
    first += w.shape[0];
  }
}

void linear(Queue& queue, const LinearArgs& args) {
  const int64_t m = args.x.shape[0], n = args.w.shape[0], k = packed_stride(args.w.shape[1]);
  const auto x = queue.scratch(static_cast<size_t>(m * k) * 2);
  pack(queue, args.x, x->data(), 0, 0);
  const Tile tile = tile_for(m, n, queue.info().multiprocessors);
  const char* kernel = tile.m == kLargeTile.m ? "linear_large" : "linear_small";
  View residual = args.residual, out = args.out;
  std::shared_ptr<Storage> residual_f32, out_f32;
  if (residual && residual.dtype != DType::f32) {
    residual_f32 = queue.scratch(static_cast<size_t>(residual.numel()) * 4);
    residual = contiguous_view(residual_f32->data(), DType::f32, {residual.shape[0], residual.shape[1]});
    cast(queue, {args.residual, residual});
  }
  if (out.dtype != DType::f32) {
    out_f32 = queue.scratch(static_cast<size_t>(out.numel()) * 4);
    out = contiguous_view(out_f32->data(), DType::f32, {out.shape[0], out.shape[1]});
  }
  queue.launch(
      {"linear", kernel}, {ceil_div(m, tile.m), ceil_div(n, tile.n)}, threads_of(tile),
      LinearParams{reinterpret_cast<uint16_t*>(x->data()), args.w.u16(), args.bias.f32(), args.scale.f32(),
                   residual.f32(), out.f32(), m, n, k, residual ? residual.shape[0] : 1, residual.strides[0],
                   static_cast<int32_t>(args.activation), args.w.layout == Layout::gated_panels},
      static_cast<size_t>(shared_bytes(tile)));
  if (out_f32) cast(queue, {out, args.out});
}

}  // namespace mgm::cuda
