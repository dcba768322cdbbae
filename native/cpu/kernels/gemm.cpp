// Two regimes share one order of summation (gemm.h), so a row's bits do not depend on which one ran:
//
// - Streaming, up to kStreamRows rows (decode): bound by reading the weights once. A task walks whole panels
//   along K, several at a time so that enough multiply-add chains are in flight; weights are converted in
//   registers, rows of A are broadcast from where they lie.
// - Tiles: a task owns MC rows x NC panels and all of K. Per K block it copies its rows of A (row by row: the
//   copy is what lets convolutions and gathers supply rows, and keeps power-of-two strides out of the caches)
//   into L2, and for every panel keeps the block's kPanel x 256 weights as f32 in L1 (in place if stored so)
//   while register tiles of kRows x kPanel sweep over the rows. Partial sums wait in a tile in L2; the
//   epilogue runs on each register tile while it is still in L1.
#include "gemm.h"

#include "../simd/math.h"

namespace mgm::cpu::MGM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 14, kStreamRows = 8;  // 28 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kRows = 6, kStreamRows = 6;  // 12 of 16
#else
constexpr int kRows = 4, kStreamRows = 4;  // 8 of 16
#endif
constexpr int kDepth = 256;                // longest K block: 32 KB of f32 weights with AVX-512
constexpr int kDepthStride = kDepth + 16;  // floats between rows of the A block; odd in cache lines
constexpr int kTileRows = 12;              // register tiles per task, vertically
constexpr int kTilePanels = 16;

MGM_INLINE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Equal blocks, multiples of the quantization block.
MGM_INLINE int64_t depth_of(int64_t k) {
  const int64_t blocks = ceil_div(k, kDepth);
  return ceil_div(ceil_div(k, blocks), kQuantBlock) * kQuantBlock;
}

MGM_INLINE vf load_upto(const float* p, int n) {
  return n == kWidth ? load(p) : load_n(p, n);
}

template <Activation A>
MGM_INLINE vf activate(vf x) {
  if constexpr (A == Activation::gelu) return gelu(x);
  if constexpr (A == Activation::gelu_tanh) return gelu_tanh(x);
  if constexpr (A == Activation::quick_gelu) return quick_gelu(x);
  if constexpr (A == Activation::silu) return silu(x);
  return x;
}

// c, up: [rows, kPanel] sums of one panel (gated: of the gate and the up panel) whose first output is
// `column`.
template <Activation A>
void finish(const Gemm& g, const float* c, const float* up, int64_t row, int rows, int64_t column) {
  for (int r = 0; r < rows; ++r, ++row) {
    float* out = g.out + (g.out_rows ? g.out_rows[row] : row) * g.out_stride + column;
    const float* residual =
        g.residual ? g.residual + row % g.residual_rows * g.residual_stride + column : nullptr;
    const float* bias = g.bias_rows ? g.bias + row / g.bias_rows * g.bias_stride : g.bias;
    for (int j = 0; j < kPanel; j += kWidth) {
      const int64_t left = g.n - column - j;
      if (left <= 0) break;
      const int n = left < kWidth ? static_cast<int>(left) : kWidth;
      vf y = load(c + r * kPanel + j);
      if (bias) y = y + load_upto(bias + column + j, n);
      y = activate<A>(y);
      if (up) {
        vf u = load(up + r * kPanel + j);
        if (bias) u = u + load_upto(bias + g.n + column + j, n);
        y = y * u;
      }
      if (g.scale && residual)
        y = fma(y, load_upto(g.scale + column + j, n), load_upto(residual + j, n));
      else if (g.scale)
        y = y * load_upto(g.scale + column + j, n);
      else if (residual)
        y = y + load_upto(residual + j, n);
      if (n == kWidth)
        store(out + j, y);
      else
        store_n(out + j, y, n);
    }
  }
}

}  // namespace

void epilogue(const Gemm& g, const float* c, const float* up, int64_t row, int rows, int64_t column) {
  switch (g.activation) {
    case Activation::none:
      return finish<Activation::none>(g, c, up, row, rows, column);
    case Activation::gelu:
      return finish<Activation::gelu>(g, c, up, row, rows, column);
    case Activation::gelu_tanh:
      return finish<Activation::gelu_tanh>(g, c, up, row, rows, column);
    case Activation::quick_gelu:
      return finish<Activation::quick_gelu>(g, c, up, row, rows, column);
    case Activation::silu:
      return finish<Activation::silu>(g, c, up, row, rows, column);
  }
}

namespace {

// Streaming.

// c[P][R][kPanel] = x[R] times P panels that lie `stride` bytes apart.
template <class Read, int R, int P>
void stream(const float* const* rows, int64_t k_total, const uint8_t* panel, size_t stride, float* c) {
  constexpr int kAhead = 8192 / P;  // enough in flight for one core to reach the memory's bandwidth
  const float* x[R];
  for (int r = 0; r < R; ++r) x[r] = rows[r];
  const int64_t depth = depth_of(k_total);
  for (int64_t k0 = 0; k0 < k_total; k0 += depth) {
    const int64_t end = k0 + depth < k_total ? k0 + depth : k_total;
    vf acc[P][R][2];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[p][r][0] = acc[p][r][1] = set1(0.0f);
    for (int64_t k = k0; k < end; k += kQuantBlock) {
      const int n = end - k < kQuantBlock ? static_cast<int>(end - k) : kQuantBlock;
      const auto step = [&](const Read& read, int p, int i, int steps) __attribute__((always_inline)) {
        vf w[4];
        read.pair(i, w);
        const char* ahead = static_cast<const char*>(read.at(i)) + kAhead;
        for (int b = 0; b < Read::kPairBytes; b += 64) __builtin_prefetch(ahead + b, 0, 2);
#pragma GCC unroll 2
        for (int s = 0; s < steps; ++s)
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            const vf a = set1(x[r][k + i + s]);
            acc[p][r][0] = fma(a, w[2 * s], acc[p][r][0]);
            acc[p][r][1] = fma(a, w[2 * s + 1], acc[p][r][1]);
          }
      };
      const auto steps = [&](const auto&... read) __attribute__((always_inline)) {
        const auto all = [&](int i, int count) __attribute__((always_inline)) {
          int p = 0;
          (step(read, p++, i, count), ...);
        };
        int i = 0;
        for (; i + 8 <= n; i += 8)  // by eights, so that the shifts of int4 are constants
#pragma GCC unroll 4
          for (int j = 0; j < 8; j += 2) all(i + j, 2);
        for (; i + 2 <= n; i += 2) all(i, 2);
        if (i < n) all(i, 1);
      };
      if constexpr (P == 1)
        steps(Read(panel, k));
      else if constexpr (P == 2)
        steps(Read(panel, k), Read(panel + stride, k));
      else
        steps(Read(panel, k), Read(panel + stride, k), Read(panel + 2 * stride, k),
              Read(panel + 3 * stride, k));
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        for (int j = 0; j < 2; ++j) {
          float* to = c + (p * R + r) * kPanel + j * kWidth;
          store(to, k0 == 0 ? acc[p][r][j] : load(to) + acc[p][r][j]);
        }
  }
}

using Stream = void (*)(const float* const*, int64_t, const uint8_t*, size_t, float*);

// Panels at once: enough chains to cover the latency of multiply-adds, as far as registers go.
constexpr int wide_panels(int rows) {
  return rows == 1 ? 4 : rows <= (kWidth == 16 ? 4 : kWidth == 8 ? 3 : 2) ? 2 : 1;
}

template <class Read, int R = 1>
Stream stream_kernel(int rows, int panels) {
  if (rows == R) {
    if constexpr (wide_panels(R) == 4)
      if (panels == 4) return stream<Read, R, 4>;
    if constexpr (wide_panels(R) >= 2)
      if (panels == 2) return stream<Read, R, 2>;
    return stream<Read, R, 1>;
  }
  if constexpr (R < kStreamRows) return stream_kernel<Read, R + 1>(rows, panels);
  return nullptr;
}

Stream stream_kernel(DType dtype, int rows, int panels) {
  switch (dtype) {
    case DType::bf16:
      return stream_kernel<ReadBf16>(rows, panels);
    case DType::f16:
      return stream_kernel<ReadF16>(rows, panels);
    case DType::int8:
      return stream_kernel<ReadInt8>(rows, panels);
    case DType::int4:
      return stream_kernel<ReadInt4>(rows, panels);
    default:
      return stream_kernel<ReadF32>(rows, panels);
  }
}

MGM_INLINE bool is_streamed(const Gemm& g) {
  return g.rows <= kStreamRows && !g.fill;
}

void run_stream(const Gemm& g, int64_t task) {
  const size_t stride = panel_bytes(g.dtype, g.k);
  const int64_t panels = ceil_div(g.n, kPanel) * (g.gated ? 2 : 1);
  const int64_t begin = task * g.panels_per_task;
  const int64_t end = begin + g.panels_per_task < panels ? begin + g.panels_per_task : panels;
  const int rows = static_cast<int>(g.rows);
  const float* x[kStreamRows];
  for (int r = 0; r < rows; ++r) x[r] = g.x + (g.x_rows ? g.x_rows[r] : r) * g.x_stride;
  alignas(64) float c[4 * kStreamRows * kPanel];
  const int wide = wide_panels(rows), group = g.gated && wide < 2 ? 2 : wide;
  for (int64_t panel = begin; panel < end;) {
    const int left = end - panel < group ? static_cast<int>(end - panel) : group;
    int done = 0;
    while (done < left) {
      const int take = left - done >= wide ? wide : left - done >= 2 && wide >= 2 ? 2 : 1;
      stream_kernel(g.dtype, rows, take)(x, g.k, g.w + static_cast<size_t>(panel + done) * stride, stride,
                                         c + done * rows * kPanel);
      done += take;
    }
    const int step = g.gated ? 2 : 1;
    for (int p = 0; p < left; p += step)
      epilogue(g, c + p * rows * kPanel, g.gated ? c + (p + 1) * rows * kPanel : nullptr, 0, rows,
               (panel + p) / step * kPanel);
    panel += left;
  }
}

// Tiles.

// Weights that the next panel needs, fetched into L2 a little in every step: they come from memory once a
// task and would otherwise stall the first register tile.
struct Ahead {
  const char* at;
  int64_t step;    // bytes per step of k
  int64_t second;  // distance of a second line, or 0
};

// c[R][kPanel] (+)= a[R][kDepthStride] b[kc][kPanel]
template <int R>
void micro(const float* a, const float* b, int kc, float* c, bool first, const Ahead& ahead) {
  const char* next = ahead.at;
  const int64_t next_step = ahead.step, second = ahead.second;
  vf acc[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = set1(0.0f);
  for (int k = 0; k < kc; ++k) {
    const vf w0 = load(b), w1 = load(b + kWidth);
    b += kPanel;
    __builtin_prefetch(next, 0, 2);
    __builtin_prefetch(next + second, 0, 2);
    next += next_step;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf x = set1(a[r * kDepthStride + k]);
      acc[r][0] = fma(x, w0, acc[r][0]);
      acc[r][1] = fma(x, w1, acc[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < 2; ++j) {
      float* to = c + r * kPanel + j * kWidth;
      store(to, first ? acc[r][j] : load(to) + acc[r][j]);
    }
}

using Micro = void (*)(const float*, const float*, int, float*, bool, const Ahead&);

template <int R = 1>
Micro micro_kernel(int rows) {
  if (rows == R) return micro<R>;
  if constexpr (R < kRows) return micro_kernel<R + 1>(rows);
  return nullptr;
}

template <class Read>
void convert(const uint8_t* panel, int64_t k0, int kc, float* dst) {
  for (int k = 0; k < kc; k += kQuantBlock) {
    const Read read(panel, k0 + k);
    const int n = kc - k < kQuantBlock ? kc - k : kQuantBlock;
    for (int i = 0; i < n; i += 8)
#pragma GCC unroll 4
      for (int s = 0; s < 8; s += 2) {
        if (i + s >= n) break;
        vf w[4];
        read.pair(i + s, w);
        for (int j = 0; j < 4; ++j) store(dst + (k + i + s) * kPanel + j * kWidth, w[j]);
      }
  }
}

}  // namespace

const float* weights_of(const Gemm& g, const uint8_t* panel, int64_t k0, int kc, float* buffer) {
  switch (g.dtype) {
    case DType::bf16:
      convert<ReadBf16>(panel, k0, kc, buffer);
      break;
    case DType::f16:
      convert<ReadF16>(panel, k0, kc, buffer);
      break;
    case DType::int8:
      convert<ReadInt8>(panel, k0, kc, buffer);
      break;
    case DType::int4:
      convert<ReadInt4>(panel, k0, kc, buffer);
      break;
    default:
      return reinterpret_cast<const float*>(panel) + k0 * kPanel;
  }
  return buffer;
}

namespace {

// Where step k (a multiple of 32) starts in a panel.
MGM_INLINE int64_t panel_offset(DType dtype, int64_t k) {
  if (is_quantized(dtype)) return k / kQuantBlock * static_cast<int64_t>(quant_block_bytes(dtype));
  return k * kPanel * (dtype == DType::f32 ? 4 : 2);
}

void run_tile(const Gemm& g, int64_t task, ThreadPool& pool) {
  const int64_t micro_rows = ceil_div(g.rows, kRows);
  const int64_t row_task = task % g.row_tasks, column_task = task / g.row_tasks;
  const int64_t first_tile = row_task * micro_rows / g.row_tasks,
                last_tile = (row_task + 1) * micro_rows / g.row_tasks;
  // Register tiles of nearly equal height: a lone short one would waste most of its time.
  const auto row_of = [&](int64_t tile) { return tile * g.rows / micro_rows; };
  const int64_t row0 = row_of(first_tile), rows = row_of(last_tile) - row0;
  const int64_t panels = ceil_div(g.n, kPanel) * (g.gated ? 2 : 1);
  const int64_t panel0 = column_task * g.panels_per_task;
  const int64_t panel_end = panel0 + g.panels_per_task < panels ? panel0 + g.panels_per_task : panels;
  const size_t stride = panel_bytes(g.dtype, g.k);
  const int64_t depth = depth_of(g.k);
  const bool one_block = depth >= g.k;

  const int64_t c_panels = one_block ? 2 : panel_end - panel0;
  const size_t a_floats = static_cast<size_t>(rows) * kDepthStride, b_floats = kDepth * kPanel,
               c_floats = static_cast<size_t>(c_panels * rows) * kPanel;
  float* a = static_cast<float*>(pool.scratch(0, (a_floats + b_floats + c_floats) * sizeof(float)));
  float* b_buffer = a + a_floats;
  float* c = b_buffer + b_floats;

  for (int64_t k0 = 0; k0 < g.k; k0 += depth) {
    const int kc = static_cast<int>(k0 + depth < g.k ? depth : g.k - k0);
    const bool last = k0 + kc == g.k;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = row0 + r;
      float* to = a + r * kDepthStride;
      if (g.fill)
        g.fill(g.context, row, k0, kc, to);
      else
        std::memcpy(to, g.x + (g.x_rows ? g.x_rows[row] : row) * g.x_stride + k0,
                    static_cast<size_t>(kc) * sizeof(float));
    }
    for (int64_t panel = panel0; panel < panel_end; ++panel) {
      const float* b = weights_of(g, g.w + static_cast<size_t>(panel) * stride, k0, kc, b_buffer);
      // What comes next: the next panel's block, then the first panel's next one.
      const bool wraps = panel + 1 == panel_end;
      const uint8_t* next = g.w + static_cast<size_t>(wraps ? panel0 : panel + 1) * stride +
                            panel_offset(g.dtype, wraps ? k0 + kc : k0);
      const int64_t steps = kc * (last_tile - first_tile), bytes = panel_offset(g.dtype, depth);
      Ahead ahead = {reinterpret_cast<const char*>(wraps && last ? g.w : next), 0, 0};
      if (!(wraps && last))
        for (ahead.step = 8; ahead.step < 128 && ahead.step * steps < bytes;) ahead.step *= 2;
      if (ahead.step > 64) ahead.second = 64;

      float* c_panel = c + (one_block ? panel & 1 : panel - panel0) * rows * kPanel;
      for (int64_t tile = first_tile; tile < last_tile; ++tile) {
        const int64_t row = row_of(tile) - row0;
        const int height = static_cast<int>(row_of(tile + 1) - row0 - row);
        float* ct = c_panel + row * kPanel;
        micro_kernel(height)(a + row * kDepthStride, b, kc, ct, k0 == 0, ahead);
        ahead.at += ahead.step * kc;
        if (!last) continue;
        if (!g.gated)
          epilogue(g, ct, nullptr, row0 + row, height, panel * kPanel);
        else if (panel & 1)
          epilogue(g, one_block ? c + row * kPanel : ct - rows * kPanel, ct, row0 + row, height,
                   panel / 2 * kPanel);
      }
    }
  }
}

// Cuts one problem: enough tasks for `wanted`, but as large as that allows.
void plan(Gemm& g, int64_t wanted) {
  const int64_t panels = ceil_div(g.n, kPanel) * (g.gated ? 2 : 1), least = g.gated ? 2 : 1;
  if (is_streamed(g)) {
    const int64_t unit =
        wide_panels(static_cast<int>(g.rows)) > least ? wide_panels(static_cast<int>(g.rows)) : least;
    int64_t per_task = panels / (2 * wanted) / unit * unit;
    if (per_task < unit) per_task = panels / wanted >= unit ? unit : panels / wanted >= 2 ? 2 : least;
    g.panels_per_task = per_task;
    g.row_tasks = 1;
  } else {
    const int64_t micro_rows = ceil_div(g.rows, kRows);
    int64_t tile_rows = kTileRows, tile_panels = kTilePanels;
    const auto tasks = [&] { return ceil_div(micro_rows, tile_rows) * ceil_div(panels, tile_panels); };
    while (tasks() < wanted && tile_panels > 4) tile_panels /= 2;
    while (tasks() < wanted && tile_rows > 3) tile_rows /= 2;
    while (tasks() < wanted && tile_panels > least) tile_panels /= 2;
    g.row_tasks = ceil_div(micro_rows, tile_rows);
    // Equal widths, whole gated pairs.
    const int64_t column_tasks = ceil_div(panels, tile_panels);
    g.panels_per_task = ceil_div(ceil_div(panels, column_tasks), least) * least;
  }
  g.column_tasks = ceil_div(panels, g.panels_per_task);
}

}  // namespace

void gemm(Gemm* problems, int count, ThreadPool& pool) {
  int64_t tasks = 0;
  const int64_t wanted = pool.size() == 1 ? 1 : ceil_div(4 * pool.size(), count);
  for (int i = 0; i < count; ++i) {
    Gemm& g = problems[i];
    g.first_task = tasks;
    if (g.rows <= 0 || g.n <= 0) continue;
    plan(g, wanted);
    tasks += g.row_tasks * g.column_tasks;
  }
  pool.parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
    int i = count - 1;
    for (int64_t task = end - 1; task >= begin; --task) {
      while (problems[i].first_task > task || problems[i].rows <= 0) --i;
      if (is_streamed(problems[i]))
        run_stream(problems[i], task - problems[i].first_task);
      else
        run_tile(problems[i], task - problems[i].first_task, pool);
    }
  });
}

}  // namespace mgm::cpu::MGM_ISA
