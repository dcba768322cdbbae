// Activation functions on vectors. NaN stays NaN; the limits at infinity are those of the formulas.
#pragma once
#include "simd.h"

namespace mgm::cpu::MGM_ISA {

static inline vf sigmoid_times(vf x, vf u) {  // x / (1 + e^-u)
  return x / (set1(1.0f) + exp(set1(0.0f) - u));
}

// x/2 (1 + erf(x / sqrt 2)) = max(x, 0) - |x|/2 erfc(z), z = |x| / sqrt 2, with erfc(z) = e^(-z^2) t P(t) and
// t = 1 / (1 + 0.45 z): the form of Abramowitz and Stegun 7.1.26, P refitted (degree 6) for this use. It
// keeps the tail of the negative side, where 1 + erf would cancel. Absolute error below 2e-7 for |x| < 4.
static inline vf gelu(vf x) {
  const vf one = set1(1.0f);
  const vf size = min(set1(30.0f), abs(x));  // beyond, the tail is 0; infinities must not meet it
  const vf z = size * set1(0.70710678118654752f);
  const vf t = one / fma(set1(0.45f), z, one);
  vf p = set1(9.20726135373115540e-02f);
  p = fma(p, t, set1(-4.91859614849090576e-01f));
  p = fma(p, t, set1(8.52988958358764648e-01f));
  p = fma(p, t, set1(-3.71701210737228394e-01f));
  p = fma(p, t, set1(4.57933813333511353e-01f));
  p = fma(p, t, set1(2.01651424169540405e-01f));
  p = fma(p, t, set1(2.58913993835449219e-01f));
  const vf tail = exp(set1(0.0f) - z * z) * t * p;
  return fnma(size * set1(0.5f), tail, max(set1(0.0f), x));
}

// x/2 (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3)
static inline vf gelu_tanh(vf x) {
  const vf cubic = fma(x * x, set1(0.044715f * 1.5957691216057308f), set1(1.5957691216057308f));
  return sigmoid_times(x, x * cubic);
}

static inline vf quick_gelu(vf x) {
  return sigmoid_times(x, x * set1(1.702f));
}

static inline vf silu(vf x) {
  return sigmoid_times(x, x);
}

}  // namespace mgm::cpu::MGM_ISA
