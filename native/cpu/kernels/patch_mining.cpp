// Patch info mining: one query a window of the concatenated ConvNeXt map, without projecting keys or values
// and without building the map (docs/architecture.md, section 4; MGM's unified_resampler).
//
// Bilinear interpolation is linear, so everything linear in x(p) happens on the cells of each stage's own
// grid and only scalars are interpolated. A query's window has at real geometry 8x8, 6x6, 4x4 and 3x3 cells
// (209 KB, L2 sized), read in three sweeps:
//   1. per cell: channel mean, and g . (cell - mean);
//   2. the variance of x(p): the only quadratic term. Rows are interpolated vertically into a strip of two
//      vectors a column, then horizontally in registers. Inner products of neighbouring cells would need
//      fewer operations but cancel where neighbours are opposite; this sum of squares cannot.
//   3. out = sum of cells, each with the weights a(p) r(p) of the positions it takes part in.
// Every cell is centred on its own mean before it is multiplied, and the means are combined in f64: maps that
// are large, or constant over channels (variance 0, r = 1/sqrt(eps) = 316), lose no digits.
#include "../kernels.h"
#include "../simd/simd.h"

namespace mgm::cpu::MGM_ISA {
namespace {

constexpr int kStages = 4;
constexpr int kPositions = 8;  // positions of a row whose sums of squares share registers
constexpr double kLargest = 3.4028234663852886e38;

// One axis of one stage: position i of the mined map = sum over k of weight[i*taps + k] * cell[start[i] + k].
struct Axis {
  int taps;
  int32_t* start;
  float* weight;
  int cells;  // most cells that a window spans
};

struct Stage {
  const float* data;  // of the batch item
  int64_t batch_stride, row_stride, column_stride;
  int64_t channels, first_channel;
  Axis y, x;
};

// A stage's cells of one window, and what was computed for each.
struct Window {
  const float* cells;  // the top left one
  int y0, x0, rows, columns;
  double *mean, *dot, *weight;  // [rows * columns]; weight: of sweep 3
  float *center, *scale;        // the f32 rounding of the mean that cells are centred on; weight as f32
  double* offset;               // [positions] interpolated mean minus the mean over all stages
  double dot_g;                 // sum of g over the stage's channels
};

inline int64_t min64(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t max64(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// PyTorch's source coordinate (align_corners=false) in f32. The product goes through f64, where it is exact,
// so that no compiler fuses it with the subtraction.
inline void source(float scale, int64_t i, int64_t size, int64_t* index, float* lambda) {
  const float product = static_cast<float>(static_cast<double>(scale) * (static_cast<double>(i) + 0.5));
  float at = product - 0.5f;
  if (at < 0.0f) at = 0.0f;
  const int64_t cell = min64(static_cast<int64_t>(at), size - 1);
  *index = cell;
  *lambda = cell == size - 1 ? 0.0f : at - static_cast<float>(cell);
}

struct Taps {
  int64_t cell[4];
  float weight[4];
};

// Position i of the mined axis on a stage of `size` cells: up to `full` cells, then down by `downscale`.
inline Taps taps_of(int64_t i, int64_t size, int64_t full, int downscale) {
  int64_t at[2] = {i, i};
  float down[2] = {1.0f, 0.0f};
  if (downscale > 1) {
    float lambda;
    source(static_cast<float>(downscale), i, full, &at[0], &lambda);
    at[1] = min64(at[0] + 1, full - 1);
    down[0] = 1.0f - lambda;
    down[1] = lambda;
  }
  Taps taps;
  for (int half = 0; half < 2; ++half) {
    int64_t cell = at[half];
    float lambda = 0.0f;
    if (size != full)
      source(static_cast<float>(size) / static_cast<float>(full), at[half], size, &cell, &lambda);
    taps.cell[2 * half] = cell;
    taps.cell[2 * half + 1] = min64(cell + 1, size - 1);
    taps.weight[2 * half] = down[half] * (1.0f - lambda);
    taps.weight[2 * half + 1] = down[half] * lambda;
  }
  return taps;
}

// First and last cell with a weight.
inline void span(const Taps& taps, int64_t* low, int64_t* high) {
  *low = taps.cell[0];
  *high = taps.cell[0];
  for (int k = 0; k < 4; ++k) {
    if (taps.weight[k] == 0.0f) continue;
    *low = min64(*low, taps.cell[k]);
    *high = max64(*high, taps.cell[k]);
  }
}

inline int axis_taps(int64_t positions, int64_t size, int64_t full, int downscale) {
  int64_t most = 1;
  for (int64_t i = 0; i < positions; ++i) {
    int64_t low, high;
    span(taps_of(i, size, full, downscale), &low, &high);
    most = max64(most, high - low + 1);
  }
  return static_cast<int>(most);
}

inline void fill_axis(Axis& axis, int64_t positions, int64_t window, int64_t size, int64_t full,
                      int downscale) {
  for (int64_t i = 0; i < positions; ++i) {
    const Taps taps = taps_of(i, size, full, downscale);
    int64_t low, high;
    span(taps, &low, &high);
    const int64_t start = min64(low, size - axis.taps);
    float* weight = axis.weight + i * axis.taps;
    for (int k = 0; k < axis.taps; ++k) weight[k] = 0.0f;
    for (int k = 0; k < 4; ++k)
      if (taps.weight[k] != 0.0f) weight[taps.cell[k] - start] += taps.weight[k];
    axis.start[i] = static_cast<int32_t>(start);
  }
  axis.cells = 0;
  for (int64_t i = 0; i < positions; i += window) {
    const int cells = axis.start[i + window - 1] + axis.taps - axis.start[i];
    if (cells > axis.cells) axis.cells = cells;
  }
}

// Hands out pieces of one scratch block; with a null block it only measures.
struct Arena {
  char* base;
  size_t used;
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base + used);
    used += (static_cast<size_t>(count) * sizeof(T) + 63) & ~size_t{63};
    return p;
  }
};

// Sweep 1 for one cell of n channels: mean, and g . (cell - mean).
inline void cell_moments(const float* cell, const float* g, int64_t n, double dot_g, float* center,
                         double* mean, double* dot) {
  vf s0 = set1(0.0f), s1 = s0, s2 = s0, s3 = s0;
  int64_t c = 0;
  for (; c + 4 * kWidth <= n; c += 4 * kWidth) {
    s0 = s0 + load(cell + c);
    s1 = s1 + load(cell + c + kWidth);
    s2 = s2 + load(cell + c + 2 * kWidth);
    s3 = s3 + load(cell + c + 3 * kWidth);
  }
  for (; c + kWidth <= n; c += kWidth) s0 = s0 + load(cell + c);
  const int tail = static_cast<int>(n - c);
  if (tail > 0) s1 = s1 + load_n(cell + c, tail);
  const float about = sum((s0 + s1) + (s2 + s3)) / static_cast<float>(n);

  const vf m = set1(about);
  s0 = s1 = set1(0.0f);
  vf d0 = s0, d1 = s0;
  c = 0;
  for (; c + 2 * kWidth <= n; c += 2 * kWidth) {
    const vf a = load(cell + c) - m, b = load(cell + c + kWidth) - m;
    s0 = s0 + a;
    s1 = s1 + b;
    d0 = fma(a, load(g + c), d0);
    d1 = fma(b, load(g + c + kWidth), d1);
  }
  for (; c + kWidth <= n; c += kWidth) {
    const vf a = load(cell + c) - m;
    s0 = s0 + a;
    d0 = fma(a, load(g + c), d0);
  }
  if (tail > 0) {
    float centers[kWidth];
    store(centers, m);
    const vf a = load_n(cell + c, tail) - load_n(centers, tail);
    s1 = s1 + a;
    d1 = fma(a, load_n(g + c, tail), d1);
  }
  const double rest = static_cast<double>(sum(s0 + s1)) / static_cast<double>(n);
  *center = about;
  *mean = static_cast<double>(about) + rest;
  *dot = static_cast<double>(sum(d0 + d1)) - rest * dot_g;
}

// One vector of a column, interpolated vertically from cells centred on their means.
inline vf column_value(const float* cell, int64_t row_stride, const float* center, int center_stride,
                       const float* weight, int taps) {
  vf v = set1(weight[0]) * (load(cell) - set1(center[0]));
  for (int k = 1; k < taps; ++k)
    v = fma(set1(weight[k]), load(cell + k * row_stride) - set1(center[k * center_stride]), v);
  return v;
}

// Sweep 2 for up to kPositions positions of one row: squares[i] += sum over channels of (x(p) - mean)^2.
// strip: scratch, 2 vectors a column. delta[i]: interpolated centre minus the mean over all stages.
template <int Taps>
inline void squares_of_row(const Stage& stage, const Window& window, const float* top, const float* center,
                           const float* y_weight, const int32_t* x_start, const float* x_weight,
                           const float* delta, int count, float* strip, double* squares) {
  const int taps = Taps ? Taps : stage.x.taps;
  const int first = x_start[0], columns = x_start[count - 1] + taps - first;
  const float* left = top + (first - window.x0) * stage.column_stride;
  const float* left_center = center + (first - window.x0);
  int column_of[kPositions];
  float weight_of[kPositions][Taps ? Taps : 1], delta_of[kPositions];
  for (int i = 0; i < kPositions; ++i) {  // positions past the end repeat the last one and are dropped
    const int j = i < count ? i : count - 1;
    column_of[i] = (x_start[j] - first) * 2 * kWidth;
    delta_of[i] = delta[j];
    if (Taps)
      for (int k = 0; k < Taps; ++k) weight_of[i][k] = x_weight[j * Taps + k];
  }
  vf acc[kPositions];
  for (int i = 0; i < kPositions; ++i) acc[i] = set1(0.0f);
  const auto value = [&](int i, const float* at) {
    vf x = set1(delta_of[i]);
    if (Taps) {
      for (int k = 0; k < Taps; ++k) x = fma(set1(weight_of[i][k]), load(at + k * 2 * kWidth), x);
    } else {
      const float* w = x_weight + (i < count ? i : count - 1) * taps;
      for (int k = 0; k < taps; ++k) x = fma(set1(w[k]), load(at + k * 2 * kWidth), x);
    }
    return x;
  };
  int64_t c = 0;
  for (; c + 2 * kWidth <= stage.channels; c += 2 * kWidth) {
    for (int column = 0; column < columns; ++column) {
      const float* cell = left + column * stage.column_stride + c;
      float* to = strip + column * 2 * kWidth;
      store(to, column_value(cell, stage.row_stride, left_center + column, window.columns, y_weight,
                             stage.y.taps));
      store(to + kWidth, column_value(cell + kWidth, stage.row_stride, left_center + column, window.columns,
                                      y_weight, stage.y.taps));
    }
    for (int i = 0; i < kPositions; ++i) {
      const float* at = strip + column_of[i];
      const vf a = value(i, at), b = value(i, at + kWidth);
      acc[i] = fma(b, b, fma(a, a, acc[i]));
    }
  }
  for (; c < stage.channels; c += kWidth) {
    const int n = static_cast<int>(min64(kWidth, stage.channels - c));
    float ones[kWidth];
    store(ones, set1(1.0f));
    const vf mask = load_n(ones, n);
    for (int column = 0; column < columns; ++column) {
      const float* cell = left + column * stage.column_stride + c;
      vf v = set1(0.0f);
      for (int k = 0; k < stage.y.taps; ++k)
        v = fma(set1(y_weight[k]),
                load_n(cell + k * stage.row_stride, n) - set1(left_center[column + k * window.columns]), v);
      store(strip + column * 2 * kWidth, v);
    }
    for (int i = 0; i < kPositions; ++i) {
      const vf x = value(i, strip + column_of[i]) * mask;
      acc[i] = fma(x, x, acc[i]);
    }
  }
  for (int i = 0; i < count; ++i) squares[i] += static_cast<double>(sum(acc[i]));
}

// Sweep 3 for `U` vectors of channels.
template <int U>
inline void weigh_cells(const float* cells, int64_t row_stride, int64_t column_stride, const Window& window,
                        vf start, float* out) {
  vf acc[U];
  for (int u = 0; u < U; ++u) acc[u] = start;
  int i = 0;
  for (int row = 0; row < window.rows; ++row) {
    const float* cell = cells + row * row_stride;
    for (int column = 0; column < window.columns; ++column, ++i, cell += column_stride) {
      const vf w = set1(window.scale[i]), m = set1(window.center[i]);
      for (int u = 0; u < U; ++u) acc[u] = fma(w, load(cell + u * kWidth) - m, acc[u]);
    }
  }
  for (int u = 0; u < U; ++u) store(out + u * kWidth, acc[u]);
}

struct Plan {
  Stage stages[kStages];
  int64_t channels, positions;  // positions of a window
  int64_t my, mx;
  double eps, scale;
};

// What one worker needs for one query.
struct Work {
  Window windows[kStages];
  float *g, *delta, *strip, *weights;
  double *mean, *squares, *logit, *reciprocal;
};

inline Work carve(const Plan& plan, Arena& arena) {
  Work work = {};
  int most_columns = 0;
  for (int s = 0; s < kStages; ++s) {
    const int64_t cells = static_cast<int64_t>(plan.stages[s].y.cells) * plan.stages[s].x.cells;
    Window& w = work.windows[s];
    w.mean = arena.take<double>(cells);
    w.dot = arena.take<double>(cells);
    w.weight = arena.take<double>(cells);
    w.center = arena.take<float>(cells);
    w.scale = arena.take<float>(cells);
    w.offset = arena.take<double>(plan.positions);
    if (plan.stages[s].x.cells > most_columns) most_columns = plan.stages[s].x.cells;
  }
  work.g = arena.take<float>(plan.channels);
  work.delta = arena.take<float>(plan.positions);
  work.strip = arena.take<float>(static_cast<int64_t>(most_columns) * 2 * kWidth);
  work.weights = arena.take<float>(plan.positions + kWidth);
  work.mean = arena.take<double>(plan.positions);
  work.squares = arena.take<double>(plan.positions);
  work.logit = arena.take<double>(plan.positions);
  work.reciprocal = arena.take<double>(plan.positions);
  return work;
}

// A power of two that brings the largest |g| near 1: products with g must not leave f32's range before their
// signs are known (nan_to_num turns an overflowing score into the largest float of its sign).
inline double normalize(const float* g, int64_t n, float* to) {
  vf largest = set1(0.0f);
  int64_t c = 0;
  for (; c + kWidth <= n; c += kWidth) largest = max(abs(load(g + c)), largest);
  if (c < n) largest = max(abs(load_n(g + c, static_cast<int>(n - c))), largest);
  const float top = max_lane(largest);
  int exponent = 0;
  if (top > 0.0f && top <= 3.4028234e38f) exponent = static_cast<int>((f32_to_bits(top) >> 23) & 255u) - 127;
  if (exponent > -40 && exponent < 40) exponent = 0;
  if (exponent < -126) exponent = -126;
  const vf factor = set1(bits_to_f32(static_cast<uint32_t>(127 - exponent) << 23));
  const vf whole = exponent == 127 ? set1(0x1p-127f) : factor;  // the exponent field above would be 0
  for (c = 0; c + kWidth <= n; c += kWidth) store(to + c, load(g + c) * whole);
  if (c < n) {
    const int tail = static_cast<int>(n - c);
    store_n(to + c, load_n(g + c, tail) * whole, tail);
  }
  double power = 1.0;
  for (int e = exponent; e > 0; --e) power *= 2.0;
  for (int e = exponent; e < 0; ++e) power *= 0.5;
  return power;
}

inline double sum_of(const float* x, int64_t n) {
  double total = 0.0;
  for (int64_t c = 0; c < n; ++c) total += static_cast<double>(x[c]);
  return total;
}

inline void mine(const Plan& plan, const Work& work, int64_t batch, int64_t gy, int64_t gx, const float* g,
                 double bias, float* out) {
  const int64_t my = plan.my, mx = plan.mx, positions = plan.positions;
  Window windows[kStages];
  const double power = normalize(g, plan.channels, work.g);

  // Sweep 1.
  for (int s = 0; s < kStages; ++s) {
    const Stage& stage = plan.stages[s];
    Window& w = windows[s];
    w = work.windows[s];
    w.y0 = stage.y.start[gy * my];
    w.x0 = stage.x.start[gx * mx];
    w.rows = stage.y.start[gy * my + my - 1] + stage.y.taps - w.y0;
    w.columns = stage.x.start[gx * mx + mx - 1] + stage.x.taps - w.x0;
    w.cells = stage.data + batch * stage.batch_stride + w.y0 * stage.row_stride + w.x0 * stage.column_stride;
    w.dot_g = sum_of(work.g + stage.first_channel, stage.channels);
    for (int row = 0, i = 0; row < w.rows; ++row)
      for (int column = 0; column < w.columns; ++column, ++i)
        cell_moments(w.cells + row * stage.row_stride + column * stage.column_stride,
                     work.g + stage.first_channel, stage.channels, w.dot_g, &w.center[i], &w.mean[i],
                     &w.dot[i]);
  }

  // Interpolated means (offset) and dot products (logit), then the mean over all stages.
  for (int64_t p = 0; p < positions; ++p) work.mean[p] = work.squares[p] = work.logit[p] = 0.0;
  for (int s = 0; s < kStages; ++s) {
    const Stage& stage = plan.stages[s];
    const Window& w = windows[s];
    const double share = static_cast<double>(stage.channels) / static_cast<double>(plan.channels);
    for (int64_t y = 0, p = 0; y < my; ++y) {
      const float* wy = stage.y.weight + (gy * my + y) * stage.y.taps;
      const int first = (stage.y.start[gy * my + y] - w.y0) * w.columns;
      for (int64_t x = 0; x < mx; ++x, ++p) {
        const float* wx = stage.x.weight + (gx * mx + x) * stage.x.taps;
        const int corner = first + stage.x.start[gx * mx + x] - w.x0;
        double mean = 0.0, dot = 0.0;
        for (int j = 0; j < stage.y.taps; ++j)
          for (int k = 0; k < stage.x.taps; ++k) {
            const double weight = static_cast<double>(wy[j]) * static_cast<double>(wx[k]);
            mean += weight * w.mean[corner + j * w.columns + k];
            dot += weight * w.dot[corner + j * w.columns + k];
          }
        w.offset[p] = mean;
        work.logit[p] += dot;
        work.mean[p] += share * mean;
      }
    }
  }

  // Sweep 2.
  for (int s = 0; s < kStages; ++s) {
    const Stage& stage = plan.stages[s];
    const Window& w = windows[s];
    for (int64_t y = 0, p = 0; y < my; ++y) {
      const float* wy = stage.y.weight + (gy * my + y) * stage.y.taps;
      const int row = stage.y.start[gy * my + y] - w.y0;
      const float* top = w.cells + row * stage.row_stride;
      const float* center = w.center + row * w.columns;
      for (int64_t x = 0; x < mx; x += kPositions) {
        const int count = static_cast<int>(min64(kPositions, mx - x));
        const int32_t* x_start = stage.x.start + gx * mx + x;
        const float* wx = stage.x.weight + (gx * mx + x) * stage.x.taps;
        for (int i = 0; i < count; ++i) {
          double middle = 0.0;
          for (int j = 0; j < stage.y.taps; ++j)
            for (int k = 0; k < stage.x.taps; ++k)
              middle += static_cast<double>(wy[j]) * static_cast<double>(wx[i * stage.x.taps + k]) *
                        static_cast<double>(center[j * w.columns + x_start[i] - w.x0 + k]);
          work.delta[i] = static_cast<float>(middle - work.mean[p + i]);
        }
        double* squares = work.squares + p;
        if (stage.x.taps == 1)
          squares_of_row<1>(stage, w, top, center, wy, x_start, wx, work.delta, count, work.strip, squares);
        else if (stage.x.taps == 2)
          squares_of_row<2>(stage, w, top, center, wy, x_start, wx, work.delta, count, work.strip, squares);
        else
          squares_of_row<0>(stage, w, top, center, wy, x_start, wx, work.delta, count, work.strip, squares);
        p += count;
      }
    }
    for (int64_t p = 0; p < positions; ++p) {
      w.offset[p] -= work.mean[p];
      work.logit[p] += w.offset[p] * w.dot_g;
    }
  }

  // Softmax.
  double top = -kLargest;
  for (int64_t p = 0; p < positions; ++p) {
    const double variance = work.squares[p] / static_cast<double>(plan.channels);
    work.reciprocal[p] = 1.0 / __builtin_sqrt(variance + plan.eps);
    double logit = plan.scale * (work.reciprocal[p] * (work.logit[p] * power) + bias);
    if (logit != logit) logit = 0.0;
    if (logit > kLargest) logit = kLargest;
    if (logit < -kLargest) logit = -kLargest;
    work.logit[p] = logit;
    if (logit > top) top = logit;
  }
  double total = 0.0;
  for (int64_t p = 0; p < positions; ++p) {
    const double below = work.logit[p] - top;
    work.weights[p] = below < -200.0 ? -200.0f : static_cast<float>(below);
  }
  for (int64_t p = 0; p < positions; p += kWidth) store(work.weights + p, exp(load(work.weights + p)));
  for (int64_t p = 0; p < positions; ++p) total += static_cast<double>(work.weights[p]);
  for (int64_t p = 0; p < positions; ++p)
    work.logit[p] = static_cast<double>(work.weights[p]) / total * work.reciprocal[p];

  // Sweep 3: weights back onto the cells.
  for (int s = 0; s < kStages; ++s) {
    const Stage& stage = plan.stages[s];
    const Window& w = windows[s];
    const int cells = w.rows * w.columns;
    double constant = 0.0;
    for (int i = 0; i < cells; ++i) w.weight[i] = 0.0;
    for (int64_t y = 0, p = 0; y < my; ++y) {
      const float* wy = stage.y.weight + (gy * my + y) * stage.y.taps;
      const int first = (stage.y.start[gy * my + y] - w.y0) * w.columns;
      for (int64_t x = 0; x < mx; ++x, ++p) {
        const float* wx = stage.x.weight + (gx * mx + x) * stage.x.taps;
        const int corner = first + stage.x.start[gx * mx + x] - w.x0;
        const double a = work.logit[p];
        constant += a * w.offset[p];
        for (int j = 0; j < stage.y.taps; ++j)
          for (int k = 0; k < stage.x.taps; ++k)
            w.weight[corner + j * w.columns + k] +=
                a * static_cast<double>(wy[j]) * static_cast<double>(wx[k]);
      }
    }
    for (int i = 0; i < cells; ++i) {
      w.scale[i] = static_cast<float>(w.weight[i]);
      constant -= w.weight[i] * (w.mean[i] - static_cast<double>(w.center[i]));
    }
    const vf start = set1(static_cast<float>(constant));
    float* to = out + stage.first_channel;
    int64_t c = 0;
    for (; c + 6 * kWidth <= stage.channels; c += 6 * kWidth)
      weigh_cells<6>(w.cells + c, stage.row_stride, stage.column_stride, w, start, to + c);
    for (; c + kWidth <= stage.channels; c += kWidth)
      weigh_cells<1>(w.cells + c, stage.row_stride, stage.column_stride, w, start, to + c);
    if (c < stage.channels) {
      const int tail = static_cast<int>(stage.channels - c);
      vf acc = start;
      for (int i = 0; i < cells; ++i) {
        const float* cell =
            w.cells + (i / w.columns) * stage.row_stride + (i % w.columns) * stage.column_stride + c;
        acc = fma(set1(w.scale[i]), load_n(cell, tail) - set1(w.center[i]), acc);
      }
      store_n(to + c, acc, tail);
    }
  }
}

}  // namespace

void patch_mining(const PatchMiningArgs& args, ThreadPool& pool) {
  const int64_t grid = args.grid;
  const int downscale = args.downscale < 1 ? 1 : args.downscale;
  const int64_t full_h = args.stages[0].shape[1], full_w = args.stages[0].shape[2];
  Plan plan;
  plan.my = full_h / downscale / grid;
  plan.mx = full_w / downscale / grid;
  plan.positions = plan.my * plan.mx;
  plan.eps = static_cast<double>(args.eps);
  plan.scale = static_cast<double>(args.scale);
  if (plan.positions < 1)
    fail("patchMining: expected at least %lld x %lld positions for stages[0] but received %lld x %lld",
         static_cast<long long>(grid * downscale), static_cast<long long>(grid * downscale),
         static_cast<long long>(full_h), static_cast<long long>(full_w));
  const int64_t rows = plan.my * grid, columns = plan.mx * grid;

  plan.channels = 0;
  for (int s = 0; s < kStages; ++s) {
    const View& view = args.stages[s];
    Stage& stage = plan.stages[s];
    stage.data = view.f32();
    stage.batch_stride = view.strides[0];
    stage.row_stride = view.strides[1];
    stage.column_stride = view.strides[2];
    stage.channels = view.shape[3];
    stage.first_channel = plan.channels;
    plan.channels += stage.channels;
    stage.y.taps = axis_taps(rows, view.shape[1], full_h, downscale);
    stage.x.taps = axis_taps(columns, view.shape[2], full_w, downscale);
  }
  const auto carve_tables = [&](Arena& arena) {
    for (Stage& stage : plan.stages) {
      stage.y.start = arena.take<int32_t>(rows);
      stage.y.weight = arena.take<float>(rows * stage.y.taps);
      stage.x.start = arena.take<int32_t>(columns);
      stage.x.weight = arena.take<float>(columns * stage.x.taps);
    }
  };
  Arena measure = {nullptr, 0};
  carve_tables(measure);
  Arena tables = {static_cast<char*>(pool.scratch(0, measure.used)), 0};
  carve_tables(tables);
  for (int s = 0; s < kStages; ++s) {
    const View& view = args.stages[s];
    fill_axis(plan.stages[s].y, rows, plan.my, view.shape[1], full_h, downscale);
    fill_axis(plan.stages[s].x, columns, plan.mx, view.shape[2], full_w, downscale);
  }
  measure.used = 0;
  carve(plan, measure);

  // An optional last column of g: a term equal for all positions. Softmax ignores it, but it decides the sign
  // of a score that overflows.
  const bool has_bias = args.g.shape[1] > plan.channels;
  const int64_t queries = args.stages[0].shape[0] * grid * grid;
  pool.parallel_for(queries, 4, [&](int64_t begin, int64_t end) {
    Arena arena = {static_cast<char*>(pool.scratch(1, measure.used)), 0};
    const Work work = carve(plan, arena);
    for (int64_t i = begin; i < end; ++i) {
      const float* g = args.g.f32() + i * args.g.strides[0];
      mine(plan, work, i / (grid * grid), i / grid % grid, i % grid, g,
           has_bias ? static_cast<double>(g[plan.channels]) : 0.0, args.out.f32() + i * args.out.strides[0]);
    }
  });
}

}  // namespace mgm::cpu::MGM_ISA
