#include <cstdlib>
#include <limits>
#include <string_view>

#include "../../runtime/error.h"
#include "../../runtime/tensor.h"
#include "gemm_launch.h"

namespace mgm::cuda {
namespace {

bool on_16_bytes(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

}  // namespace

TileName tile_for(int64_t m, int64_t n, int multiprocessors, bool few_possible) {
  const bool few = few_possible && m <= kTiles[kFew].m;
  const char* asked = std::getenv("MGM_CUDA_TILE");
  if (asked) {
    const std::string_view name = asked;
    if (name == "large") return kLarge;
    if (name == "small") return kSmall;
    if (name == "thin") return kThin;
  }
  if (few) return kFew;
  const auto fills = [&](TileName name) {
    return ceil_div(m, kTiles[name].m) * ceil_div(n, kTiles[name].n) >= multiprocessors;
  };
  if (m > kTiles[kSmall].m && n > kTiles[kSmall].n && fills(kLarge)) return kLarge;
  return n > kTiles[kThin].n && fills(kSmall) ? kSmall : kThin;
}

WeightType weight_type_of(const View& w) {
  switch (w.dtype) {
    case DType::bf16:
    case DType::f16:
      return WeightType::half;
    case DType::int8:
      return WeightType::int8;
    case DType::int4:
      return WeightType::int4;
    default:
      throw Error("UNSUPPORTED",
                  format("expected bf16, f16, int8 or int4 packed weights on CUDA but received %s",
                         dtype_name(w.dtype)));
  }
}

Epilogue epilogue_of(const View& w, const View& bias, const View& scale, const View& residual,
                     Activation activation, const View& out) {
  Epilogue e{};
  e.bias = bias.f32();
  e.scale = scale.f32();
  e.residual = residual.data;
  e.out = out.data;
  e.gated = w.layout == Layout::gated_panels;
  e.outputs = static_cast<int32_t>(e.gated ? w.shape[0] / 2 : w.shape[0]);
  const bool rows_of_bias = bias.rank == 2 && bias.shape[0] > 1;
  e.bias_rows = rows_of_bias ? static_cast<int32_t>(out.numel() / e.outputs / bias.shape[0])
                             : std::numeric_limits<int32_t>::max();
  e.bias_stride = rows_of_bias ? bias.strides[0] : 0;
  e.residual_rows = residual ? static_cast<int32_t>(residual.shape[0]) : 1;
  e.residual_stride = residual ? residual.strides[0] : 0;
  e.activation = static_cast<int32_t>(activation);
  e.out_f32 = out.dtype == DType::f32;
  e.aligned = e.outputs % 8 == 0 && e.bias_stride % 4 == 0 && e.residual_stride % 8 == 0 &&
              on_16_bytes(e.bias) && on_16_bytes(e.scale) && on_16_bytes(e.residual) && on_16_bytes(e.out);
  return e;
}

bool rows_aligned(const View& x) {
  return on_16_bytes(x.data) && x.strides[0] % 8 == 0 && x.shape[1] % 8 == 0;
}

}  // namespace mgm::cuda
