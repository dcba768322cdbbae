// RMSNorm and LayerNorm over the last dimension, with an optional residual added first. A task is a few rows;
// a row is read from memory once and its further passes hit the cache, so the op runs at memory speed.
//
// Means and variances are two-pass: the variance is taken of values shifted by a first mean, whose own
// rounding error is then corrected. Rows for which f32 is not enough (sums that overflow, a deviation below
// 1e-4 of the mean) are done again in f64, so huge rows and constant rows come out right.
#include "../kernels.h"
#include "../simd/simd.h"

namespace mgm::cpu::MGM_ISA {
namespace {

// to = x + residual (or a copy).
static void add_rows(const float* x, const float* residual, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const vf a = load_up_to(x + i, n - i);
    store_up_to(to + i, residual ? a + load_up_to(residual + i, n - i) : a, n - i);
  }
}

static float sum_of_squares(const float* x, int64_t n) {
  vf acc[4] = {set1(0), set1(0), set1(0), set1(0)};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const vf v = load(x + i + j * kWidth);
      acc[j] = fma(v, v, acc[j]);
    }
  }
  for (; i < n; i += kWidth) {
    const vf v = load_up_to(x + i, n - i);
    acc[0] = fma(v, v, acc[0]);
  }
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

static float sum_of(const float* x, int64_t n) {
  vf acc[4] = {set1(0), set1(0), set1(0), set1(0)};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[j] = acc[j] + load(x + i + j * kWidth);
  }
  for (; i < n; i += kWidth) acc[0] = acc[0] + load_up_to(x + i, n - i);
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// Sums of d and d^2 for d = x - shift.
static void shifted_sums(const float* x, int64_t n, float shift, float* first, float* second) {
  vf a[2] = {set1(0), set1(0)}, b[2] = {set1(0), set1(0)};
  const vf m = set1(shift);
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const vf v = load(x + i + j * kWidth) - m;
      a[j] = a[j] + v;
      b[j] = fma(v, v, b[j]);
    }
  }
  float one = sum(a[0] + a[1]), two = sum(b[0] + b[1]);
  for (; i < n; ++i) {
    const float v = x[i] - shift;
    one += v;
    two += v * v;
  }
  *first = one;
  *second = two;
}

static inline bool finite(float x) {
  return (f32_to_bits(x) & 0x7f800000u) != 0x7f800000u;
}

// out = (x - mean) / sqrt(mean((x - mean)^2) + eps) in f64; about zero instead of the mean if !centered.
static void normalize_f64(const float* x, int64_t n, double eps, bool centered, float* out) {
  double mean = 0.0, square = 0.0;
  if (centered)
    for (int64_t i = 0; i < n; ++i) mean += x[i];
  mean /= static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) square += (x[i] - mean) * (x[i] - mean);
  const double r = 1.0 / __builtin_sqrt(square / static_cast<double>(n) + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>((x[i] - mean) * r);
}

struct Rows {
  int64_t count, width;
};
static inline int64_t row_stride(const View& v) {
  return v.rank >= 2 ? v.strides[v.rank - 2] : 0;
}
static inline Rows rows_of(const View& x) {
  const int64_t width = x.shape[x.rank - 1];
  return {width > 0 ? x.numel() / width : 0, width};
}
static inline int64_t row_grain(int64_t width) {
  return width >= 8192 ? 1 : 8192 / width;
}

// The row to normalize: x itself, or x + residual, written to `sum` or else to where the result will be.
static const float* prepare(const View& x, const View& residual, const View& sum, const View& out, int64_t t,
                            int64_t width) {
  const float* row = x.f32() + t * row_stride(x);
  if (!residual && !sum) return row;
  float* to = sum ? sum.f32() + t * row_stride(sum) : out.f32() + t * row_stride(out);
  add_rows(row, residual ? residual.f32() + t * row_stride(residual) : nullptr, width, to);
  return to;
}

}  // namespace

void rms_norm(const RmsNormArgs& args, ThreadPool& pool) {
  const auto [count, width] = rows_of(args.x);
  const int64_t c = width;
  const float inverse = 1.0f / static_cast<float>(c > 0 ? c : 1);
  const float* weight = args.weight ? args.weight.f32() : nullptr;
  pool.parallel_for(count, row_grain(c > 0 ? c : 1), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* row = prepare(args.x, args.residual, args.sum, args.out, t, c);
      float* out = args.out.f32() + t * row_stride(args.out);
      const float mean = sum_of_squares(row, c) * inverse;
      vf r = set1(1.0f / __builtin_sqrtf(mean + args.eps));
      if (!finite(mean)) {
        normalize_f64(row, c, args.eps, false, out);
        row = out;
        r = set1(1.0f);
      }
      const vf offset = set1(args.weight_offset);
      for (int64_t i = 0; i < c; i += kWidth) {
        vf y = load_up_to(row + i, c - i) * r;
        if (weight) y = y * (load_up_to(weight + i, c - i) + offset);
        store_up_to(out + i, y, c - i);
      }
    }
  });
}

void layer_norm(const LayerNormArgs& args, ThreadPool& pool) {
  const auto [count, width] = rows_of(args.x);
  const int64_t c = width;
  const float inverse = 1.0f / static_cast<float>(c > 0 ? c : 1);
  const float* weight = args.weight ? args.weight.f32() : nullptr;
  const float* bias = args.bias ? args.bias.f32() : nullptr;
  pool.parallel_for(count, row_grain(c > 0 ? c : 1), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* row = prepare(args.x, args.residual, args.sum, args.out, t, c);
      float* out = args.out.f32() + t * row_stride(args.out);
      float shift = sum_of(row, c) * inverse, first, second;
      shifted_sums(row, c, shift, &first, &second);
      float correction = first * inverse;
      const float variance = second * inverse - correction * correction;
      float deviation = 1.0f / __builtin_sqrtf(variance + args.eps);
      if (!(variance >= 1e-8f * shift * shift) || !finite(variance)) {
        normalize_f64(row, c, args.eps, true, out);
        row = out;
        shift = correction = 0.0f;
        deviation = 1.0f;
      }
      const vf m = set1(shift), d = set1(correction), r = set1(deviation);
      for (int64_t i = 0; i < c; i += kWidth) {
        vf y = ((load_up_to(row + i, c - i) - m) - d) * r;
        if (weight) y = y * load_up_to(weight + i, c - i);
        if (bias) y = y + load_up_to(bias + i, c - i);
        store_up_to(out + i, y, c - i);
      }
    }
  });
}

}  // namespace mgm::cpu::MGM_ISA
