// RMSNorm and LayerNorm over the last dimension, with an optional residual added first. A block is a row; it
// is read from memory once and its further passes hit the cache. A thread owns the same four neighbours in
// every pass, whatever the alignment, so a row's bits never depend on where it lies.
//
// As on the CPU: means and variances are two-pass, the variance of values shifted by a first mean whose own
// rounding is then corrected; rows for which f32 is not enough (sums that overflow, a deviation below 1e-4 of
// the mean) are done again in f64.
#include "common.cuh"
#include "norm.h"

namespace mgm::cuda {
namespace {

__device__ __forceinline__ float4 load_quad(const float* p, int left, bool aligned) {
  if (aligned && left >= 4) return *reinterpret_cast<const float4*>(p);
  return make_float4(p[0], left > 1 ? p[1] : 0.0f, left > 2 ? p[2] : 0.0f, left > 3 ? p[3] : 0.0f);
}

__device__ __forceinline__ void store_quad(float* p, float4 v, int left, bool aligned) {
  if (aligned && left >= 4) {
    *reinterpret_cast<float4*>(p) = v;
    return;
  }
  p[0] = v.x;
  if (left > 1) p[1] = v.y;
  if (left > 2) p[2] = v.z;
  if (left > 3) p[3] = v.w;
}

// body(first element, elements left) for the quads of this thread.
template <class Body>
__device__ __forceinline__ void for_quads(int width, Body body) {
  for (int i = threadIdx.x * 4; i < width; i += kNormThreads * 4) body(i, width - i);
}

// body(value) for the elements of this thread.
template <class Body>
__device__ __forceinline__ void for_values(const float* row, int width, bool aligned, Body body) {
  for_quads(width, [&](int i, int left) {
    const float4 v = load_quad(row + i, left, aligned);
    body(v.x);
    if (left > 1) body(v.y);
    if (left > 2) body(v.z);
    if (left > 3) body(v.w);
  });
}

// The row to normalize: x itself, or x + residual, written to `sum`.
__device__ const float* prepare(const NormParams& p, int64_t t) {
  const float* row = p.x + t * p.x_stride;
  if (p.residual == nullptr) return row;
  const float* residual = p.residual + t * p.residual_stride;
  float* to = p.sum + t * p.sum_stride;
  for_quads(p.width, [&](int i, int left) {
    const float4 a = load_quad(row + i, left, p.aligned), b = load_quad(residual + i, left, p.aligned);
    store_quad(to + i, make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w), left, p.aligned);
  });
  return to;
}

// (x - mean) / sqrt(mean((x - mean)^2) + eps) in f64, about zero instead of the mean if !kCentered; `finish`
// makes the result of it.
template <bool kCentered, class Finish>
__device__ __forceinline__ void normalize_f64(const float* row, float* out, int width, float eps,
                                              Finish finish) {
  double mean = 0.0, square = 0.0;
  if (kCentered) {
    for (int i = threadIdx.x; i < width; i += kNormThreads) mean += row[i];
    mean = block_reduce<Sum, kNormThreads>(mean) / width;
  }
  for (int i = threadIdx.x; i < width; i += kNormThreads) square += (row[i] - mean) * (row[i] - mean);
  square = block_reduce<Sum, kNormThreads>(square);
  const double r = 1.0 / sqrt(square / width + eps);
  for (int i = threadIdx.x; i < width; i += kNormThreads)
    out[i] = finish(i, static_cast<float>((row[i] - mean) * r));
}

template <class Finish>
__device__ __forceinline__ void write_row(const NormParams& p, const float* row, float* out, Finish finish) {
  for_quads(p.width, [&](int i, int left) {
    float4 v = load_quad(row + i, left, p.aligned);
    v.x = finish(i, v.x);
    if (left > 1) v.y = finish(i + 1, v.y);
    if (left > 2) v.z = finish(i + 2, v.z);
    if (left > 3) v.w = finish(i + 3, v.w);
    store_quad(out + i, v, left, p.aligned);
  });
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kNormThreads) rms_norm(const __grid_constant__ NormParams p) {
  const int64_t t = blockIdx.x;
  const float* row = prepare(p, t);
  float* out = p.out + t * p.out_stride;

  // Normalizer.
  float square = 0.0f;
  for_values(row, p.width, p.aligned, [&](float v) { square = fmaf(v, v, square); });
  const float mean = block_reduce<Sum, kNormThreads>(square) / p.width;

  // Write output.
  const auto weighted = [&](int i, float v) { return v * (p.weight[i] + p.weight_offset); };
  if (!isfinite(mean)) {
    normalize_f64<false>(row, out, p.width, p.eps, weighted);
    return;
  }
  const float r = 1.0f / sqrtf(mean + p.eps);
  write_row(p, row, out, [&](int i, float v) { return weighted(i, v * r); });
}

extern "C" __global__ void __launch_bounds__(kNormThreads) layer_norm(const __grid_constant__ NormParams p) {
  const int64_t t = blockIdx.x;
  const float* row = prepare(p, t);
  float* out = p.out + t * p.out_stride;

  // First mean.
  float total = 0.0f;
  for_values(row, p.width, p.aligned, [&](float v) { total += v; });
  const float shift = block_reduce<Sum, kNormThreads>(total) / p.width;

  // Shifted moments.
  float first = 0.0f, second = 0.0f;
  for_values(row, p.width, p.aligned, [&](float v) {
    const float d = v - shift;
    first += d;
    second = fmaf(d, d, second);
  });
  const float correction = block_reduce<Sum, kNormThreads>(first) / p.width;
  const float variance = block_reduce<Sum, kNormThreads>(second) / p.width - correction * correction;

  // Write output.
  const auto affine = [&](int i, float v) { return fmaf(v, p.weight[i], p.bias[i]); };
  if (!(variance >= 1e-8f * shift * shift) || !isfinite(variance)) {
    normalize_f64<true>(row, out, p.width, p.eps, affine);
    return;
  }
  const float r = 1.0f / sqrtf(variance + p.eps);
  write_row(p, row, out, [&](int i, float v) { return affine(i, ((v - shift) - correction) * r); });
}

}  // namespace mgm::cuda
