// RMSNorm and LayerNorm over the last dimension, with an optional residual added first.
//
// Bytes are what bounds them. A row is read once, in vectors of 16 bytes, and stays in registers for its
// passes; a block keeps the weights in shared memory and goes through rows in steps of the grid. Who owns
// which element depends on the width alone, whatever the alignment, so a row's bits never depend on where it
// lies or on what else is normalized. Rows too wide for registers, which no model has, take plain loops in
// f64.
//
// As on the CPU: means and variances are two-pass, the variance of values shifted by a first mean whose own
// rounding is then corrected; rows for which f32 is not enough (sums that overflow, a deviation below 1e-4 of
// the mean) are done again in f64.
#include "common.cuh"
#include "norm.h"

namespace mgm::cuda {
namespace {

extern __shared__ float4 affine[];  // weights, then biases

// The threads of one row: a warp, or several with a barrier of their own.
template <int kThreads>
struct Group {
  static constexpr int kPerBlock = kNormThreads / kThreads, kWarps = kThreads / 32;
  __device__ static int index() { return threadIdx.x / kThreads; }
  __device__ static int thread() { return threadIdx.x % kThreads; }
  __device__ static void sync() {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + index()), "n"(kThreads) : "memory");
  }

  // Replaces values by their sums over the group, in an order of its own alone.
  template <class Number, int kCount>
  __device__ static void sum(Number (&values)[kCount]) {
#pragma unroll
    for (Number& value : values)
#pragma unroll
      for (int distance = 16; distance > 0; distance >>= 1)
        value += __shfl_xor_sync(kAllLanes, value, distance);
    if constexpr (kWarps > 1) {
      __shared__ Number partial[kPerBlock][kWarps][kCount];
      const auto& parts = partial[index()];
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (threadIdx.x % 32 == 0) partial[index()][thread() / 32][i] = values[i];
      sync();
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        values[i] = parts[0][i];
#pragma unroll
        for (int warp = 1; warp < kWarps; ++warp) values[i] += parts[warp][i];
      }
      sync();
    }
  }
  template <class Number>
  __device__ static Number sum(Number value) {
    Number values[] = {value};
    sum(values);
    return values[0];
  }
};

// A row in the registers of its threads: vector v of it is in thread v % kThreads, at v / kThreads.
template <class T, int kThreads, int kHeld>
struct Row {
  using Threads = Group<kThreads>;
  static constexpr int kWidth = 16 / sizeof(T), kVectors = kHeld / kWidth, kQuads = kWidth / 4;
  float held[kHeld];

  // body(where the vector is held, its first column, columns from there on) for the vectors of this thread.
  template <class Body>
  __device__ __forceinline__ static void for_vectors(int width, Body body) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int first = (Threads::thread() + v * kThreads) * kWidth;
      if (first < width) body(v * kWidth, first, width - first);
    }
  }

  // body(value) for the elements of this thread.
  template <class Body>
  __device__ __forceinline__ void for_values(int width, Body body) {
    for_vectors(width, [&](int at, int, int left) {
      if (left >= kWidth) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) body(held[at + j]);
      } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j)
          if (j < left) body(held[at + j]);
      }
    });
  }
  // The same, and for the zeros that fill the last vector.
  template <class Body>
  __device__ __forceinline__ void for_padded(int width, Body body) {
    for_vectors(width, [&](int at, int, int) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) body(held[at + j]);
    });
  }

  __device__ __forceinline__ static Vector<T, kWidth> read(const void* rows, int64_t offset, int left,
                                                           bool aligned) {
    const T* from = static_cast<const T*>(rows) + offset;
    if (aligned && left >= kWidth) return load_vector<kWidth>(from);
    Vector<T, kWidth> v;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) v.at[j] = j < left ? from[j] : from_float<T>(0.0f);
    return v;
  }

  // The floats, rounded.
  __device__ __forceinline__ static void write(void* rows, int64_t offset, int left, bool aligned,
                                               const float (&x)[kWidth]) {
    T* to = static_cast<T*>(rows) + offset;
    const auto v = rounded<T>(x);
    if (aligned && left >= kWidth) return store_vector(to, v);
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      if (j < left) to[j] = v.at[j];
  }

  // Row t of x, or of x + residual, which is written to `sum`.
  __device__ __forceinline__ void load(const NormParams& p, int64_t t) {
    for_vectors(p.width, [&](int at, int first, int left) {
      const auto x = read(p.x, t * p.x_stride + first, left, p.aligned);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) held[at + j] = to_float(x.at[j]);
    });
    if (p.residual == nullptr) return;
    for_vectors(p.width, [&](int at, int first, int left) {
      const auto x = read(p.residual, t * p.residual_stride + first, left, p.aligned);
      float sum[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum[j] = held[at + j] += to_float(x.at[j]);
      write(p.sum, t * p.sum_stride + first, left, p.aligned, sum);
    });
  }

  __device__ __forceinline__ void standardize_rms(int width, float eps) {
    float square = 0.0f;
    for_padded(width, [&](float v) { square = fmaf(v, v, square); });
    const float mean = Threads::sum(square) / width;
    if (!isfinite(mean)) return standardize_f64<false>(width, eps);
    const float r = 1.0f / sqrtf(mean + eps);
    for_padded(width, [&](float& v) { v *= r; });
  }

  __device__ __forceinline__ void standardize_layer(int width, float eps) {
    // First mean.
    float total = 0.0f;
    for_padded(width, [&](float v) { total += v; });
    const float shift = Threads::sum(total) / width;

    // Shifted moments.
    float moments[2] = {};
    for_values(width, [&](float v) {
      const float d = v - shift;
      moments[0] += d;
      moments[1] = fmaf(d, d, moments[1]);
    });
    Threads::sum(moments);
    const float correction = moments[0] / width, variance = moments[1] / width - correction * correction;
    if (!(variance >= 1e-8f * shift * shift) || !isfinite(variance)) return standardize_f64<true>(width, eps);
    const float r = 1.0f / sqrtf(variance + eps);
    for_padded(width, [&](float& v) { v = ((v - shift) - correction) * r; });
  }

  // (x - mean) / sqrt(mean((x - mean)^2) + eps), about zero instead of the mean if !kCentered.
  template <bool kCentered>
  __device__ __forceinline__ void standardize_f64(int width, float eps) {
    double mean = 0.0, square = 0.0;
    if (kCentered) {
      for_values(width, [&](float v) { mean += v; });
      mean = Threads::sum(mean) / width;
    }
    for_values(width, [&](float v) { square += (v - mean) * (v - mean); });
    const double r = rsqrt(Threads::sum(square) / width + eps);
    for_values(width, [&](float& v) { v = static_cast<float>((v - mean) * r); });
  }

  // The quads of a vector lie apart, so that threads read neighbouring quads: no bank conflicts.
  __device__ static int vectors_of(int width) {
    return (width + kWidth - 1) / kWidth;
  }
  __device__ static void load_affine(const NormParams& p) {
    const int vectors = vectors_of(p.width), size = vectors * kWidth;
    float* to = reinterpret_cast<float*>(affine);
    for (int i = threadIdx.x; i < size; i += kNormThreads) {
      const int at = (i % kWidth / 4 * vectors + i / kWidth) * 4 + i % 4;
      to[at] = i < p.width ? p.weight[i] + p.weight_offset : 0.0f;
      if (p.bias) to[size + at] = i < p.width ? p.bias[i] : 0.0f;
    }
    __syncthreads();
  }

  template <bool kBias>
  __device__ __forceinline__ void store(const NormParams& p, int64_t t) const {
    const int vectors = vectors_of(p.width);
    for_vectors(p.width, [&](int at, int first, int left) {
      float y[kWidth];
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const float* v = held + at + q * 4;
        const int quad = q * vectors + first / kWidth;
        const float4 w = affine[quad], b = kBias ? affine[kQuads * vectors + quad] : float4{};
        y[q * 4] = kBias ? fmaf(v[0], w.x, b.x) : v[0] * w.x;
        y[q * 4 + 1] = kBias ? fmaf(v[1], w.y, b.y) : v[1] * w.y;
        y[q * 4 + 2] = kBias ? fmaf(v[2], w.z, b.z) : v[2] * w.z;
        y[q * 4 + 3] = kBias ? fmaf(v[3], w.w, b.w) : v[3] * w.w;
      }
      write(p.out, t * p.out_stride + first, left, p.aligned, y);
    });
  }
};

template <class T, int kThreads, int kHeld, bool kCentered>
__device__ __forceinline__ void normalize(const NormParams& p) {
  using Threads = Group<kThreads>;
  Row<T, kThreads, kHeld> row;
  row.load_affine(p);
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * Threads::kPerBlock + Threads::index(); t < p.rows;
       t += static_cast<int64_t>(gridDim.x) * Threads::kPerBlock) {
    row.load(p, t);
    if constexpr (kCentered)
      row.standardize_layer(p.width, p.eps);
    else
      row.standardize_rms(p.width, p.eps);
    row.template store<kCentered>(p, t);
  }
}

template <class T, bool kCentered>
__device__ __forceinline__ void normalize_long(const NormParams& p) {
  for (int64_t t = blockIdx.x; t < p.rows; t += gridDim.x) {
    const T* x = static_cast<const T*>(p.x) + t * p.x_stride;
    const T* residual = p.residual ? static_cast<const T*>(p.residual) + t * p.residual_stride : nullptr;
    T* sum = static_cast<T*>(p.sum) + t * p.sum_stride;
    T* out = static_cast<T*>(p.out) + t * p.out_stride;
    const auto value = [&](int i) { return to_float(x[i]) + (residual ? to_float(residual[i]) : 0.0f); };
    double mean = 0.0, square = 0.0;
    if (kCentered) {
      for (int i = threadIdx.x; i < p.width; i += kNormThreads) mean += value(i);
      mean = block_reduce<Sum, kNormThreads>(mean) / p.width;
    }
    for (int i = threadIdx.x; i < p.width; i += kNormThreads) {
      const double d = value(i) - mean;
      square += d * d;
    }
    const double r = rsqrt(block_reduce<Sum, kNormThreads>(square) / p.width + p.eps);
    for (int i = threadIdx.x; i < p.width; i += kNormThreads) {
      const float v = value(i);
      if (residual) sum[i] = from_float<T>(v);
      const float y = static_cast<float>((v - mean) * r), w = p.weight[i] + p.weight_offset;
      out[i] = from_float<T>(kCentered ? fmaf(y, w, p.bias[i]) : y * w);
    }
  }
}

}  // namespace

#define KERNEL(name, ...)                                                                                    \
  extern "C" __global__ void __launch_bounds__(kNormThreads, 1) name(const __grid_constant__ NormParams p) { \
    __VA_ARGS__(p);                                                                                          \
  }
#define NORM(name, T, kCentered)                                                       \
  KERNEL(name##_narrow, normalize<T, 32, kNormNarrow / 32, kCentered>)                 \
  KERNEL(name##_middle, normalize<T, kNormGroup, kNormMiddle / kNormGroup, kCentered>) \
  KERNEL(name##_wide, normalize<T, kNormGroup, kNormWide / kNormGroup, kCentered>)     \
  KERNEL(name##_long, normalize_long<T, kCentered>)
NORM(rms_norm_f32, float, false)
NORM(rms_norm_bf16, __nv_bfloat16, false)
NORM(rms_norm_f16, __half, false)
NORM(layer_norm_f32, float, true)
NORM(layer_norm_bf16, __nv_bfloat16, true)
NORM(layer_norm_f16, __half, true)

}  // namespace mgm::cuda
