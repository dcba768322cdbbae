// The matrix engine behind linear, grouped_linear and conv2d: out = epilogue(A W^T) with packed W.
#pragma once
#include "../kernels.h"
#include "../packed.h"

namespace mgm::cpu::MGM_ISA {

struct Gemm {
  int64_t rows = 0, k = 0, n = 0;  // n counts outputs (gated: half of the packed rows)

  // Row r of A: x + (x_rows ? x_rows[r] : r) * x_stride, or, if `fill` is set, what fill writes as entries
  // [k0, k0 + kc) of row r.
  const float* x = nullptr;
  int64_t x_stride = 0;
  const int32_t* x_rows = nullptr;
  void (*fill)(const void* context, int64_t row, int64_t k0, int kc, float* dst) = nullptr;
  const void* context = nullptr;

  const uint8_t* w = nullptr;
  DType dtype = DType::f32;
  bool gated = false;

  // [n] (gated: [2n]); if bias_rows is set, a row of them for every bias_rows rows of A.
  const float* bias = nullptr;
  int64_t bias_stride = 0, bias_rows = 0;
  const float* scale = nullptr;     // [n]
  const float* residual = nullptr;  // [residual_rows, n], added to row r % residual_rows
  int64_t residual_stride = 0, residual_rows = 1;
  Activation activation = Activation::none;

  // Row r goes to out + (out_rows ? out_rows[r] : r) * out_stride.
  float* out = nullptr;
  int64_t out_stride = 0;
  const int32_t* out_rows = nullptr;

  // Filled by gemm(): how the problem is cut into tasks.
  int64_t first_task = 0, row_tasks = 0, column_tasks = 0;
  int64_t panels_per_task = 0;
};

// Runs all problems as one parallel loop. Uses scratch slot 0 of the workers. Every output element has one
// order of summation, fixed by k: blocks of at most 256 steps, each a chain of multiply-adds in order of k,
// the blocks' sums added in order.
void gemm(Gemm* problems, int count, ThreadPool& pool);

// For those who sum by themselves: out = epilogue(c), where c is [rows, kPanel] sums of one panel, whose
// first output is `column`. With `up`, c belongs to a gate panel and `up` to the panel that it gates.
void epilogue(const Gemm& g, const float* c, const float* up, int64_t row, int rows, int64_t column);

// Steps [k0, k0 + kc) of a panel as f32 [kc][kPanel]: where they lie, or converted into `buffer`. k0 is a
// multiple of 32.
const float* weights_of(const Gemm& g, const uint8_t* panel, int64_t k0, int kc, float* buffer);

// Sets what linear, conv2d and grouped_linear have in common.
static inline void set_weights(Gemm& g, const View& w) {
  g.w = w.u8();
  g.dtype = w.dtype;
  g.gated = w.layout == Layout::gated_panels;
  g.n = g.gated ? w.shape[0] / 2 : w.shape[0];
  g.k = w.shape[1];
}
static inline void set_epilogue(Gemm& g, const View& bias, const View& scale, const View& residual,
                                Activation activation) {
  g.bias = bias.f32();
  g.scale = scale.f32();
  g.residual = residual.f32();
  if (residual) {
    g.residual_stride = residual.strides[0];
    g.residual_rows = residual.shape[0];
  }
  g.activation = activation;
}

}  // namespace mgm::cpu::MGM_ISA
