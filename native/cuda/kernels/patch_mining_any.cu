// Patch info mining (native/ops.h) of any geometry: any window, map sizes, channels and downscale. Also mines
// again the windows that patch_mining.cu gives up, where f32 sums of uncentred products are not enough.
//
// As on the CPU (native/cpu/kernels/patch_mining.cpp): every cell is centred on its own mean before it is
// multiplied, the variance is a sum of squares of the interpolated x, and scalars are f64. So maps that are
// large, nearly constant, or opposite in neighbouring cells lose no digits. A block mines a window. Its cells
// are read once for means and products with g, once a position they take part in for the variance (that is
// the price of not cancelling), and once for the result; all but the first reads hit the caches.
#include "patch_mining.cuh"

namespace mgm::cuda {
namespace {

// PyTorch's source coordinate (align_corners=false) in f32; i + 0.5 is exact, the intrinsic forbids fusing.
__device__ __forceinline__ void source(float scale, int i, int size, int* index, float* lambda) {
  float at = __fmul_rn(scale, static_cast<float>(i) + 0.5f) - 0.5f;
  at = at < 0.0f ? 0.0f : at;
  const int cell = min(static_cast<int>(at), size - 1);
  *index = cell;
  *lambda = cell == size - 1 ? 0.0f : at - static_cast<float>(cell);
}

// Start and weights of position i of the mined axis on a stage of `size` cells: up to `full` cells, then down
// by `downscale`.
__device__ void fill_taps(int i, int size, int full, int downscale, int taps, int32_t* start, float* weight) {
  int at[2] = {i, i};
  float down[2] = {1.0f, 0.0f};
  if (downscale > 1) {
    float lambda;
    source(static_cast<float>(downscale), i, full, &at[0], &lambda);
    at[1] = min(at[0] + 1, full - 1);
    down[0] = 1.0f - lambda;
    down[1] = lambda;
  }
  int cell[4];
  float share[4];
  int low = size;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int index = at[half];
    float lambda = 0.0f;
    if (size != full)
      source(static_cast<float>(size) / static_cast<float>(full), at[half], size, &index, &lambda);
    cell[2 * half] = index;
    cell[2 * half + 1] = min(index + 1, size - 1);
    share[2 * half] = down[half] * (1.0f - lambda);
    share[2 * half + 1] = down[half] * lambda;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (share[k] != 0.0f) low = min(low, cell[k]);
  *start = min(low, size - taps);
  for (int k = 0; k < taps; ++k) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (share[j] != 0.0f && cell[j] - *start == k) sum += share[j];
    weight[k] = sum;
  }
}

// Eight neighbouring elements; past the first `left` of them: `fill`.
template <class T>
__device__ __forceinline__ void load_eight(const T* from, int left, bool aligned, float fill, float (&x)[8]) {
  if (aligned && left >= 8) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 both = unpack_two<T>(pairs[i]);
      x[2 * i] = both.x;
      x[2 * i + 1] = both.y;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = i < left ? to_float(from[i]) : fill;
}

__device__ __forceinline__ void load_eight(const float* from, int left, bool aligned, float (&x)[8]) {
  if (aligned && left >= 8) {
    const float4 low = *reinterpret_cast<const float4*>(from),
                 high = *reinterpret_cast<const float4*>(from + 4);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = i < left ? from[i] : 0.0f;
}

// A block's arrays.
struct Work {
  float* g;  // over channels, divided by a power of two
  // Over cells: the rest of the mean that `center` leaves; g . (cell - mean), later the weight of the cell.
  double *rest, *dot;
  // Over stages and positions: interpolated mean minus the mean over all stages.
  double* offset;
  // Over positions: sum of squares, then the reciprocal deviation; score, then a r.
  double *mean, *square, *score;
  float *center, *weight;  // over cells: the f32 mean that cells are centred on; the weight as f32
  int32_t* start;
  float* tap;
};

__device__ Work carve(const MiningAnyParams& a, char* base) {
  const int positions = a.window_y * a.window_x;
  Work w;
  w.g = reinterpret_cast<float*>(base);
  double* d = reinterpret_cast<double*>(w.g + (a.p.channels + 3) / 4 * 4);
  w.rest = d;
  w.dot = d += a.cells;
  w.offset = d += a.cells;
  w.mean = d += kMiningStages * positions;
  w.square = d += positions;
  w.score = d += positions;
  float* f = reinterpret_cast<float*>(d + positions);
  w.center = f;
  w.weight = f += a.cells;
  w.tap = f += a.cells;
  w.start = reinterpret_cast<int32_t*>(f + a.weights);
  return w;
}

// A stage as one window sees it.
struct Window {
  int y0, x0, rows, columns;
  const int32_t *y_start, *x_start;
  const float *y_tap, *x_tap;
  int y_taps, x_taps, first_cell;
};

__device__ __forceinline__ Window window_of(const MiningAnyParams& a, const Work& w, int s) {
  Window v;
  v.y_taps = a.y[s].taps;
  v.x_taps = a.x[s].taps;
  v.y_start = w.start + a.y[s].first_start;
  v.x_start = w.start + a.x[s].first_start;
  v.y_tap = w.tap + a.y[s].first_weight;
  v.x_tap = w.tap + a.x[s].first_weight;
  v.y0 = v.y_start[0];
  v.x0 = v.x_start[0];
  v.rows = v.y_start[a.window_y - 1] + v.y_taps - v.y0;
  v.columns = v.x_start[a.window_x - 1] + v.x_taps - v.x0;
  v.first_cell = a.first_cell[s];
  return v;
}

// body(index in the arrays over cells, weight) for the cells that position (y, x) takes part in.
template <class Body>
__device__ __forceinline__ void for_taps(const Window& v, int y, int x, Body body) {
  const int corner = v.first_cell + (v.y_start[y] - v.y0) * v.columns + v.x_start[x] - v.x0;
  for (int j = 0; j < v.y_taps; ++j)
    for (int k = 0; k < v.x_taps; ++k)
      body(corner + j * v.columns + k,
           static_cast<double>(v.y_tap[y * v.y_taps + j]) * static_cast<double>(v.x_tap[x * v.x_taps + k]));
}

// The first cell that a position takes part in.
template <class T>
struct Corner {
  const T* cell;
  const float *center, *y_tap, *x_tap;
  int columns;  // of `center`
};

// A warp's sum over the channels of a stage of (x - mean)^2 at one position, a part in each lane. delta: the
// interpolated centre minus the mean. kTaps: of both axes, or 0 for any.
template <class T, int kTaps>
__device__ __forceinline__ float squares(const MiningStage& stage, const Window& v, const Corner<T>& corner,
                                         float delta, bool aligned) {
  constexpr int kKept = kTaps > 0 ? kTaps * kTaps : 1;
  const int y_taps = kTaps > 0 ? kTaps : v.y_taps, x_taps = kTaps > 0 ? kTaps : v.x_taps;
  const auto weight_at = [&](int j, int i) { return corner.y_tap[j] * corner.x_tap[i]; };
  const auto center_at = [&](int j, int i) { return corner.center[j * corner.columns + i]; };
  float weight[kKept], center[kKept];
  if constexpr (kTaps > 0) {
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      weight[k] = weight_at(k / kTaps, k % kTaps);
      center[k] = center_at(k / kTaps, k % kTaps);
    }
  }
  float sum = 0.0f;
  for (int c = static_cast<int>(threadIdx.x) % 32 * 8; c < stage.channels; c += 256) {
    float value[8], cell[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) value[k] = delta;
    const auto add = [&](int j, int i, float w, float about) {
      load_eight(corner.cell + j * stage.row_stride + i * stage.column_stride + c, stage.channels - c,
                 aligned, about, cell);
#pragma unroll
      for (int k = 0; k < 8; ++k) value[k] = fmaf(w, cell[k] - about, value[k]);
    };
    if constexpr (kTaps > 0) {
#pragma unroll
      for (int k = 0; k < kKept; ++k) add(k / kTaps, k % kTaps, weight[k], center[k]);
    } else {
      for (int j = 0; j < y_taps; ++j)
        for (int i = 0; i < x_taps; ++i) add(j, i, weight_at(j, i), center_at(j, i));
    }
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (c + k < stage.channels) sum = fmaf(value[k], value[k], sum);
  }
  return sum;
}

template <class T>
__device__ void mine_any(const MiningAnyParams& a, char* base, int64_t query) {
  constexpr int kWarps = kMiningThreads / 32;
  __shared__ double dot_g[kMiningStages], constant[kMiningStages];
  const MiningParams& p = a.p;
  const Work w = carve(a, base);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int positions = a.window_y * a.window_x;
  const int64_t batch = query / (static_cast<int64_t>(p.grid) * p.grid);
  const int gy = static_cast<int>(query / p.grid % p.grid), gx = static_cast<int>(query % p.grid);
  const float* g = p.g + query * p.g_stride;
  const auto cells_of = [&](const MiningStage& stage, int y, int x) {
    return static_cast<const T*>(stage.data) + batch * stage.batch_stride + y * stage.row_stride +
           x * stage.column_stride;
  };

  // Geometry.
  for (int s = 0; s < kMiningStages; ++s) {
    for (int i = threadIdx.x; i < a.window_y; i += kMiningThreads)
      fill_taps(gy * a.window_y + i, p.stages[s].height, p.stages[0].height, a.downscale, a.y[s].taps,
                w.start + a.y[s].first_start + i, w.tap + a.y[s].first_weight + i * a.y[s].taps);
    for (int i = threadIdx.x; i < a.window_x; i += kMiningThreads)
      fill_taps(gx * a.window_x + i, p.stages[s].width, p.stages[0].width, a.downscale, a.x[s].taps,
                w.start + a.x[s].first_start + i, w.tap + a.x[s].first_weight + i * a.x[s].taps);
  }

  // Scale of g.
  float top = 0.0f;
  for (int c = threadIdx.x; c < p.channels; c += kMiningThreads) top = fmaxf(top, fabsf(g[c]));
  const int exponent = exponent_of(block_reduce<Max, kMiningThreads>(top));
  const float factor = power_of_two(-exponent);
  for (int c = threadIdx.x; c < p.channels; c += kMiningThreads) w.g[c] = g[c] * factor;
  __syncthreads();
  if (warp < kMiningStages) {
    double sum = 0.0;
    for (int c = lane; c < p.stages[warp].channels; c += 32)
      sum += static_cast<double>(w.g[p.stages[warp].first_channel + c]);
    sum = warp_sum(sum);
    if (lane == 0) dot_g[warp] = sum;
  }
  __syncthreads();

  // Cells: mean, and g . (cell - mean). A warp is a cell.
  for (int s = 0; s < kMiningStages; ++s) {
    const MiningStage& stage = p.stages[s];
    const Window v = window_of(a, w, s);
    for (int i = warp; i < v.rows * v.columns; i += kWarps) {
      const T* cell = cells_of(stage, v.y0 + i / v.columns, v.x0 + i % v.columns);
      float x[8], g_of[8], sum = 0.0f, dot = 0.0f;
      for (int c = lane * 8; c < stage.channels; c += 256) {
        load_eight(cell + c, stage.channels - c, a.aligned, 0.0f, x);
#pragma unroll
        for (int k = 0; k < 8; ++k) sum += x[k];
      }
      const float center = warp_sum(sum) / static_cast<float>(stage.channels);
      sum = 0.0f;
      for (int c = lane * 8; c < stage.channels; c += 256) {
        load_eight(cell + c, stage.channels - c, a.aligned, center, x);
        load_eight(w.g + stage.first_channel + c, stage.channels - c, a.aligned, g_of);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const float d = x[k] - center;
          sum += d;
          dot = fmaf(d, g_of[k], dot);
        }
      }
      const double rest = static_cast<double>(warp_sum(sum)) / stage.channels;
      const double centred = static_cast<double>(warp_sum(dot)) - rest * dot_g[s];
      if (lane == 0) {
        w.center[v.first_cell + i] = center;
        w.rest[v.first_cell + i] = rest;
        w.dot[v.first_cell + i] = centred;
      }
    }
  }
  __syncthreads();

  // Positions: means and scores. A thread is a position.
  for (int at = threadIdx.x; at < positions; at += kMiningThreads) {
    const int y = at / a.window_x, x = at % a.window_x;
    double mean = 0.0, score = 0.0;
    for (int s = 0; s < kMiningStages; ++s) {
      double sum = 0.0;
      for_taps(window_of(a, w, s), y, x, [&](int i, double weight) {
        sum += weight * (static_cast<double>(w.center[i]) + w.rest[i]);
        score += weight * w.dot[i];
      });
      w.offset[s * positions + at] = sum;
      mean += sum * p.stages[s].channels / p.channels;
    }
    for (int s = 0; s < kMiningStages; ++s) {
      const double offset = w.offset[s * positions + at] - mean;
      w.offset[s * positions + at] = offset;
      score += offset * dot_g[s];
    }
    w.mean[at] = mean;
    w.score[at] = score;
  }
  __syncthreads();

  // Variance of the interpolated x. A sum of squares cannot cancel, neither where the map has a large mean
  // nor where neighbouring cells are opposite. A warp is a position.
  for (int at = warp; at < positions; at += kWarps) {
    const int y = at / a.window_x, x = at % a.window_x;
    double square = 0.0;
    for (int s = 0; s < kMiningStages; ++s) {
      const MiningStage& stage = p.stages[s];
      const Window v = window_of(a, w, s);
      double middle = 0.0;
      for_taps(v, y, x, [&](int i, double weight) { middle += weight * static_cast<double>(w.center[i]); });
      const float delta = static_cast<float>(middle - w.mean[at]);
      const T* corner = cells_of(stage, v.y_start[y], v.x_start[x]);
      const float* center = w.center + v.first_cell + (v.y_start[y] - v.y0) * v.columns + v.x_start[x] - v.x0;
      const Corner<T> at_corner = {corner, center, v.y_tap + y * v.y_taps, v.x_tap + x * v.x_taps, v.columns};
      const int taps = v.y_taps == v.x_taps ? v.y_taps : 0;
      const float sum = taps == 1   ? squares<T, 1>(stage, v, at_corner, delta, a.aligned)
                        : taps == 2 ? squares<T, 2>(stage, v, at_corner, delta, a.aligned)
                        : taps == 3 ? squares<T, 3>(stage, v, at_corner, delta, a.aligned)
                                    : squares<T, 0>(stage, v, at_corner, delta, a.aligned);
      square += static_cast<double>(warp_sum(sum));
    }
    if (lane == 0) w.square[at] = square;
  }
  __syncthreads();

  // Softmax.
  const double power = static_cast<double>(power_of_two(exponent));
  const double bias = p.has_bias ? static_cast<double>(g[p.channels]) : 0.0;
  double highest = -kLargest;
  for (int at = threadIdx.x; at < positions; at += kMiningThreads) {
    const double r = 1.0 / sqrt(w.square[at] / p.channels + static_cast<double>(p.eps));
    const double score = nan_to_num(static_cast<double>(p.scale) * (r * (w.score[at] * power) + bias));
    w.square[at] = r;
    w.score[at] = score;
    highest = Max::of(score, highest);
  }
  highest = block_reduce<Max, kMiningThreads>(highest);
  double total = 0.0;
  for (int at = threadIdx.x; at < positions; at += kMiningThreads) {
    const float e = expf(static_cast<float>(fmax(w.score[at] - highest, -200.0)));
    w.score[at] = static_cast<double>(e);
    total += static_cast<double>(e);
  }
  total = block_reduce<Sum, kMiningThreads>(total);
  for (int at = threadIdx.x; at < positions; at += kMiningThreads)
    w.score[at] = w.score[at] / total * w.square[at];
  __syncthreads();

  // Weights back onto the cells. A thread is a cell and looks for the positions it takes part in.
  for (int s = 0; s < kMiningStages; ++s) {
    const Window v = window_of(a, w, s);
    for (int i = threadIdx.x; i < v.rows * v.columns; i += kMiningThreads) {
      const int row = v.y0 + i / v.columns, column = v.x0 + i % v.columns;
      double weight = 0.0;
      for (int y = 0; y < a.window_y; ++y) {
        const int j = row - v.y_start[y];
        if (j < 0 || j >= v.y_taps) continue;
        for (int x = 0; x < a.window_x; ++x) {
          const int k = column - v.x_start[x];
          if (k < 0 || k >= v.x_taps) continue;
          weight += w.score[y * a.window_x + x] * static_cast<double>(v.y_tap[y * v.y_taps + j]) *
                    static_cast<double>(v.x_tap[x * v.x_taps + k]);
        }
      }
      w.dot[v.first_cell + i] = weight;
      w.weight[v.first_cell + i] = static_cast<float>(weight);
    }
  }
  __syncthreads();
  if (warp < kMiningStages) {
    const Window v = window_of(a, w, warp);
    double sum = 0.0;
    for (int at = lane; at < positions; at += 32) sum += w.score[at] * w.offset[warp * positions + at];
    for (int i = lane; i < v.rows * v.columns; i += 32)
      sum -= w.dot[v.first_cell + i] * w.rest[v.first_cell + i];
    sum = warp_sum(sum);
    if (lane == 0) constant[warp] = sum;
  }
  __syncthreads();

  // Write output. A thread is eight channels.
  for (int s = 0; s < kMiningStages; ++s) {
    const MiningStage& stage = p.stages[s];
    const Window v = window_of(a, w, s);
    T* out = static_cast<T*>(p.out) + query * p.out_stride + stage.first_channel;
    for (int c = threadIdx.x * 8; c < stage.channels; c += kMiningThreads * 8) {
      float sum[8], cell[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) sum[k] = static_cast<float>(constant[s]);
      for (int y = 0, i = v.first_cell; y < v.rows; ++y) {
        const T* from = cells_of(stage, v.y0 + y, v.x0) + c;
        for (int x = 0; x < v.columns; ++x, ++i, from += stage.column_stride) {
          load_eight(from, stage.channels - c, a.aligned, 0.0f, cell);
          const float weight = w.weight[i], center = w.center[i];
#pragma unroll
          for (int k = 0; k < 8; ++k) sum[k] = fmaf(weight, cell[k] - center, sum[k]);
        }
      }
      if (a.aligned && c + 8 <= stage.channels) {
        *reinterpret_cast<uint4*>(out + c) =
            make_uint4(pack_two<T>(sum[0], sum[1]), pack_two<T>(sum[2], sum[3]), pack_two<T>(sum[4], sum[5]),
                       pack_two<T>(sum[6], sum[7]));
      } else {
#pragma unroll
        for (int k = 0; k < 8; ++k)
          if (c + k < stage.channels) out[c + k] = from_float<T>(sum[k]);
      }
    }
  }
}

template <class T>
__device__ void mine_all(const MiningAnyParams& a) {
  extern __shared__ __align__(128) char shared[];
  char* base = a.scratch ? a.scratch + blockIdx.x * a.work_bytes : shared;
  for (int64_t query = blockIdx.x; query < a.p.queries; query += gridDim.x) {
    if (a.p.give_up && a.p.give_up[query] != 1) continue;
    mine_any<T>(a, base, query);
    __syncthreads();
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kMiningThreads, 2)
    patch_mining_any_bf16(const __grid_constant__ MiningAnyParams a) {
  mine_all<__nv_bfloat16>(a);
}
extern "C" __global__ void __launch_bounds__(kMiningThreads, 2)
    patch_mining_any_f16(const __grid_constant__ MiningAnyParams a) {
  mine_all<__half>(a);
}

}  // namespace mgm::cuda
