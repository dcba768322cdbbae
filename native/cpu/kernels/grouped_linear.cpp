// Mixture of experts: the router, and one Gemm per expert over the rows routed to it.
//
// A counting sort lists the rows of each expert; the engine gathers them and all experts run as one parallel
// loop. The scatter form first writes every row's product to scratch, in row order, and then adds each
// token's k rows in order of j: an expert-by-expert sum would depend on which experts a token happens to
// have. Tokens are taken in chunks that bound that scratch.
#include "../simd/math.h"
#include "gemm.h"

namespace mgm::cpu::MGM_ISA {

void moe_route(const MoeRouteArgs& args, ThreadPool& pool) {
  const int64_t experts = args.logits.shape[1], k = args.ids.shape[1];
  pool.parallel_for(args.logits.shape[0], 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* logits = args.logits.f32() + t * args.logits.strides[0];
      int32_t* ids = args.ids.i32() + t * k;
      float* weights = args.weights.f32() + t * k;
      // The k largest in order; NaN ranks below everything, so that ids stay distinct and in range. `weights`
      // holds the logits meanwhile.
      bool has_nan = false;
      int64_t chosen = 0;
      const auto before = [](float a, float b) { return a > b || (b != b && a == a); };
      for (int64_t e = 0; e < experts; ++e) {
        const float x = logits[e];
        has_nan |= x != x;
        int64_t at = chosen;
        while (at > 0 && before(x, weights[at - 1])) --at;
        if (at == k) continue;
        for (int64_t i = (chosen < k ? chosen++ : k - 1); i > at; --i) {
          weights[i] = weights[i - 1];
          ids[i] = ids[i - 1];
        }
        weights[at] = x;
        ids[at] = static_cast<int32_t>(e);
      }
      // Renormalized softmax over the chosen: the sum over all experts cancels.
      const float largest = has_nan ? __builtin_nanf("") : weights[0];
      float total = 0.0f;
      for (int64_t i = 0; i < k; i += kWidth) {
        const int n = k - i < kWidth ? static_cast<int>(k - i) : kWidth;
        float lanes[kWidth];
        store(lanes, exp((n == kWidth ? load(weights + i) : load_n(weights + i, n)) - set1(largest)));
        for (int j = 0; j < n; ++j) weights[i + j] = lanes[j];
      }
      for (int64_t i = k; i-- > 0;) total += weights[i];  // the smallest first loses least
      for (int64_t i = 0; i < k; ++i) weights[i] /= total;
    }
  });
}

namespace {

constexpr int64_t kProductBytes = int64_t{64} << 20;

// Runs the experts over assignments [begin, end) (t * k + j). Assignment i reads row i / per_row of x and
// writes row i - begin of out.
void run_experts(const GroupedLinearArgs& args, int64_t begin, int64_t end, int64_t per_row, float* out,
                 int64_t out_stride, ThreadPool& pool) {
  const int64_t count = end - begin;
  const auto experts = static_cast<size_t>(args.experts);
  // Gemm[experts], then counts, x rows and out rows.
  const size_t gemm_bytes = (experts * sizeof(Gemm) + 63) & ~size_t{63};
  uint8_t* memory = static_cast<uint8_t*>(
      pool.scratch(2, gemm_bytes + (experts + 1 + 2 * static_cast<size_t>(count)) * sizeof(int32_t)));
  Gemm* problems = reinterpret_cast<Gemm*>(memory);
  int32_t* starts = reinterpret_cast<int32_t*>(memory + gemm_bytes);
  int32_t* x_rows = starts + experts + 1;
  int32_t* out_rows = x_rows + count;

  const int32_t* ids = args.ids.i32() + begin;
  std::memset(starts, 0, (experts + 1) * sizeof(int32_t));
  for (int64_t i = 0; i < count; ++i) ++starts[ids[i] + 1];
  for (size_t e = 0; e < experts; ++e) starts[e + 1] += starts[e];
  for (int64_t i = 0; i < count; ++i) {
    const int32_t at = starts[ids[i]]++;
    x_rows[at] = static_cast<int32_t>((begin + i) / per_row);
    out_rows[at] = static_cast<int32_t>(i);
  }
  // starts[e] now holds the end of expert e.
  int used = 0;
  for (size_t e = 0; e < experts; ++e) {
    const int32_t first = e == 0 ? 0 : starts[e - 1];
    if (starts[e] == first) continue;
    Gemm g;
    set_weights(g, args.w[e]);
    g.rows = starts[e] - first;
    g.x = args.x.f32();
    g.x_stride = args.x.strides[0];
    g.x_rows = x_rows + first;
    g.activation = args.activation;
    g.out = out;
    g.out_stride = out_stride;
    g.out_rows = out_rows + first;
    problems[used++] = g;
  }
  if (used > 0) gemm(problems, used, pool);
}

}  // namespace

void grouped_linear(const GroupedLinearArgs& args, ThreadPool& pool) {
  const int64_t tokens = args.ids.shape[0], k = args.ids.shape[1];
  for (int64_t i = 0; i < tokens * k; ++i) {
    const int32_t id = args.ids.i32()[i];
    if (id < 0 || id >= args.experts)
      fail("[grouped_linear] expected an expert from 0 to %d but received %d", args.experts - 1, id);
  }
  if (!args.weights) {
    run_experts(args, 0, tokens * k, k, args.out.f32(), args.out.strides[0], pool);
    return;
  }

  const int64_t n = args.out.shape[1];
  const int64_t token_bytes = k * n * static_cast<int64_t>(sizeof(float));
  int64_t chunk = kProductBytes / (token_bytes > 0 ? token_bytes : 1);
  if (chunk < 64) chunk = 64;
  if (chunk > tokens) chunk = tokens;
  float* products = static_cast<float*>(pool.scratch(3, static_cast<size_t>(chunk * k * n) * sizeof(float)));
  for (int64_t t0 = 0; t0 < tokens; t0 += chunk) {
    const int64_t t1 = t0 + chunk < tokens ? t0 + chunk : tokens;
    run_experts(args, t0 * k, t1 * k, 1, products, n, pool);
    pool.parallel_for(t1 - t0, 4, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const float* rows = products + t * k * n;
        const float* weights = args.weights.f32() + (t0 + t) * k;
        const float* residual =
            args.residual ? args.residual.f32() + (t0 + t) * args.residual.strides[0] : nullptr;
        float* out = args.out.f32() + (t0 + t) * args.out.strides[0];
        for (int64_t c = 0; c < n; c += kWidth) {
          const int lanes = n - c < kWidth ? static_cast<int>(n - c) : kWidth;
          const auto at = [&](const float* p) {
            return lanes == kWidth ? load(p + c) : load_n(p + c, lanes);
          };
          vf sum = residual ? at(residual) : set1(0.0f);
          for (int64_t j = 0; j < k; ++j) sum = fma(set1(weights[j]), at(rows + j * n), sum);
          if (lanes == kWidth)
            store(out + c, sum);
          else
            store_n(out + c, sum, lanes);
        }
      }
    });
  }
}

}  // namespace mgm::cpu::MGM_ISA
