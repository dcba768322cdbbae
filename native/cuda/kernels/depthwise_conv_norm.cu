// LayerNorm over C of bias + depthwise convolution (stride 1, zero padding): the head of a ConvNeXt block.
// x, out A [B, H, W, C]; w [kh, kw, C] f32. At least 49 multiply-adds and 4 bytes an element at 7x7: on every
// GPU the arithmetic is the longer of the two.
//
// LayerNorm needs all channels of a pixel at once and f32 values of a useful tile fit only one place, the
// registers. So a block makes 2 rows of `strips` times 8 columns for all channels, and a thread 2 x 8 outputs
// of two neighbouring channels. The 8 input rows stream through shared memory, one ahead of the arithmetic; a
// thread reads each value it needs once for both output rows and keeps two rows of the kernel's weights (112
// products for 7 loads of weights and 14 of inputs, twice). Lanes are neighbouring channel pairs: no bank
// conflicts. Above 1536 channels a thread does two pairs of channels one after the other, for one output row;
// where two rows a block would leave multiprocessors idle, it makes one.
//
// Bytes from L2, an output: inputs 8 (8 s + 6) / (8 s) and weights 196 / (16 s), with s strips a block: 10
// bytes at C = 192 (s = 8), 17 at 768 (s = 2), 26 at 1536 (s = 1). The strips of a block read the same
// weights, all but the first from L1: counted as warps ask for them, outputs and norms included, it is 24, 26
// and 29. More rows a block would halve the inputs where channels are few, but the wide stages, where
// ConvNeXt spends its time, have no registers for them.
//
// Means and variances are two-pass over the values in registers. Sums run over the channel pairs of a lane,
// then lanes, then warps in order; depthwise_any, the plain kernel for the sizes that the tiles do not cover,
// sums in the same order, so a pixel's bits depend on nothing but its inputs.
#include "depthwise_conv_norm.h"
#include "mma.cuh"

namespace mgm::cuda {
namespace {

// Sums v[i] over the lanes of a warp, in the order of a butterfly. Lane l receives the sum for i = l / (32 /
// kN).
template <int kN, int kDistance = 16>
__device__ __forceinline__ float sum_lanes(const float (&v)[kN]) {
  if constexpr (kN == 1) {
    float sum = v[0];
#pragma unroll
    for (int distance = kDistance; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(kAllLanes, sum, distance);
    return sum;
  } else {
    const bool upper = threadIdx.x & kDistance;
    float half[kN / 2];
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, upper ? v[i] : v[i + kN / 2], kDistance);
      half[i] = (upper ? v[i + kN / 2] : v[i]) + other;
    }
    return sum_lanes<kN / 2, kDistance / 2>(half);
  }
}

// The share that one input row has of two output rows (or of one of them): upper += row * w, lower += row *
// w_lower.
template <class T, bool kUpper, bool kLower>
__device__ __forceinline__ void convolve(float2 (&upper)[kStrip], const float2 (&w)[kDepthwiseTaps],
                                         float2 (&lower)[kStrip], const float2 (&w_lower)[kDepthwiseTaps],
                                         const unsigned char* row) {
#pragma unroll
  for (int j = 0; j < kStrip + kDepthwiseTaps - 1; ++j) {
    const float2 x = unpack_two<T>(*reinterpret_cast<const uint32_t*>(row + j * kWarpChannels * 2));
#pragma unroll
    for (int k = 0; k < kDepthwiseTaps; ++k) {
      const int i = j - k;
      if (i < 0 || i >= kStrip) continue;
      if (kUpper) upper[i] = make_float2(fmaf(x.x, w[k].x, upper[i].x), fmaf(x.y, w[k].y, upper[i].y));
      if (kLower)
        lower[i] = make_float2(fmaf(x.x, w_lower[k].x, lower[i].x), fmaf(x.y, w_lower[k].y, lower[i].y));
    }
  }
}

template <class T, int kRows, int kChunks>
__device__ void tile(const DepthwiseParams& p) {
  static_assert(kRows == 1 || kRows == 2, "rows of weights in registers");
  constexpr int kPixels = kRows * kStrip, kPad = kDepthwiseTaps / 2, kSteps = kRows + kDepthwiseTaps - 1;
  constexpr int kLanesPerPixel = 32 / kPixels;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float partial[2][kDepthwiseThreads / 32][kPixels];

  // Worked out again after the convolution, which needs every register: volatile keeps the results from being
  // one.
  const auto place = [&](int& strip, int& channel) {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    strip = thread / (p.chunk / 2);
    channel = (thread - strip * (p.chunk / 2)) * 2;
  };
  int strip, channel;
  place(strip, channel);
  const int tile_x = static_cast<int>(blockIdx.x % p.tiles_x),
            tile_row = static_cast<int>(blockIdx.x / p.tiles_x);
  const int x0 = tile_x * p.strips * kStrip, y0 = tile_row % p.tiles_y * kRows;
  const int64_t image = static_cast<int64_t>(tile_row / p.tiles_y) * p.height * p.width;

  // A stage holds the columns of an input row as [channels / 64][columns][64]: what a warp reads lies at
  // fixed distances.
  const int columns = p.strips * kStrip + kDepthwiseTaps - 1, stage = columns * p.chunk * 2;
  const auto at = [&](int column, int channel) {
    return (channel / kWarpChannels * columns + column) * (kWarpChannels * 2) + channel % kWarpChannels * 2;
  };

  // The rows of the tile's input, in the order of their use, with zeros outside the image. A block has four
  // threads a 16-byte piece of a column and strip.
  const int pieces = p.chunk / 8, piece = static_cast<int>(threadIdx.x) % pieces;
  const int column = static_cast<int>(threadIdx.x) / pieces;
  const char* from =
      static_cast<const char*>(p.x) +
      ((image + static_cast<int64_t>(y0 - kPad) * p.width + x0 - kPad + column) * p.channels + piece * 8) * 2;
  const uint32_t to = shared_address(shared) + at(column, piece * 8);
  // Copy i of a thread exists if bit i is set, and reads 16 bytes instead of none if bit i + 4 is.
  unsigned copies = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int x = x0 - kPad + column + i * 4 * p.strips;
    if (column + i * 4 * p.strips < columns) copies |= 1u << i;
    if (x >= 0 && x < p.width && piece * 8 < p.channels) copies |= 16u << i;
  }
  int y = y0 - kPad;
  const auto load = [&](uint32_t stage) {
    const unsigned bytes = y >= 0 && y < p.height ? copies : 0;
    uint32_t target = to + stage;
#pragma unroll
    for (int i = 0; i < 4; ++i, from += p.copy_step, target += p.strips * 4 * kWarpChannels * 2)
      if (copies >> i & 1) copy_async(target, from, bytes >> i & 16);
    commit_copies();
    from += p.row_step;
    ++y;
    if (kChunks > 1 && y == y0 - kPad + kSteps) {
      from += p.chunk_step;
      y -= kSteps;
      if (p.chunk + piece * 8 >= p.channels) copies &= 15;
    }
  };

  float2 acc[kChunks][kRows][kStrip];
  const unsigned char* row = shared + at(strip * kStrip, channel);
  load(0);
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    // Lanes past the last channel compute on zeros what nobody reads.
    const uint32_t offset = static_cast<uint32_t>(min(chunk * p.chunk + channel, p.channels - 2)) * 4;
    const auto load_weights = [&](float2(&w)[kDepthwiseTaps], int ky) {
      const char* weights = reinterpret_cast<const char*>(p.w + ky * kDepthwiseTaps * p.channels);
#pragma unroll
      for (int k = 0; k < kDepthwiseTaps; ++k, weights += p.channels * 4)
        w[k] = __ldg(reinterpret_cast<const float2*>(weights + offset));
    };
    const float2 bias =
        __ldg(reinterpret_cast<const float2*>(reinterpret_cast<const char*>(p.bias) + offset));
#pragma unroll
    for (int i = 0; i < kPixels; ++i) acc[chunk][i / kStrip][i % kStrip] = bias;

    // Waits for input row s; the next one is under way while this one is used.
    const auto arrive = [&](int s) {
      const int odd = (chunk * kSteps + s) % 2;
      wait_copies<0>();
      __syncthreads();
      if (chunk + 1 < kChunks || s + 1 < kSteps) load(odd ? 0 : stage);
      return row + (odd ? stage : 0);
    };
    // Rows 0, 2, ... of the weights, and rows 1, 3, ...
    float2 even[kDepthwiseTaps], odd[kDepthwiseTaps];
    load_weights(even, 0);
    float2(&upper)[kStrip] = acc[chunk][0], (&lower)[kStrip] = acc[chunk][kRows - 1];
    if (kRows == 1) {
#pragma unroll 1
      for (int s = 0; s < kSteps; ++s) {
        convolve<T, true, false>(upper, even, lower, even, arrive(s));
        if (s + 1 < kSteps) load_weights(even, s + 1);
      }
    } else {
      convolve<T, true, false>(upper, even, lower, even, arrive(0));
      load_weights(odd, 1);
#pragma unroll 1
      for (int s = 1; s < kSteps - 1; s += 2) {
        convolve<T, true, true>(upper, odd, lower, even, arrive(1));
        load_weights(even, s + 1);
        convolve<T, true, true>(upper, even, lower, odd, arrive(0));
        if (s + 2 < kSteps - 1) load_weights(odd, s + 2);
      }
      convolve<T, false, true>(upper, even, lower, even, arrive(kSteps - 1));
    }
  }

  place(strip, channel);
  // The sum of v over the channels of the strip; lane l receives that of pixel l / kLanesPerPixel.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, strip_warps = p.chunk / kWarpChannels;
  const auto sum_channels = [&](float(&v)[kPixels], float(&buffer)[kDepthwiseThreads / 32][kPixels]) {
    const float sum = sum_lanes(v);
    if (lane % kLanesPerPixel == 0) buffer[warp][lane / kLanesPerPixel] = sum;
    __syncthreads();
    float total = 0.0f;
    for (int i = 0; i < strip_warps; ++i) total += buffer[strip * strip_warps + i][lane / kLanesPerPixel];
    return total;
  };
  const auto of_pixel = [&](float value, int i) { return __shfl_sync(kAllLanes, value, i * kLanesPerPixel); };

  // Mean.
  float v[kPixels] = {};
#pragma unroll
  for (int i = 0; i < kPixels; ++i)
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const float2 a = acc[chunk][i / kStrip][i % kStrip];
      if (chunk * p.chunk + channel < p.channels) v[i] += a.x + a.y;
    }
  const float mean = sum_channels(v, partial[0]) / static_cast<float>(p.channels);

  // Deviation.
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    const float m = of_pixel(mean, i);
    v[i] = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float2& a = acc[chunk][i / kStrip][i % kStrip];
      a = make_float2(a.x - m, a.y - m);
      if (chunk * p.chunk + channel < p.channels) v[i] += fmaf(a.x, a.x, a.y * a.y);
    }
  }
  const float variance = sum_channels(v, partial[1]) / static_cast<float>(p.channels);
  const float reciprocal = 1.0f / sqrtf(variance + p.eps);

  // Write output.
  float2 norm_weight[kChunks], norm_bias[kChunks];
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int c = min(chunk * p.chunk + channel, p.channels - 2);
    norm_weight[chunk] = __ldg(reinterpret_cast<const float2*>(p.norm_weight + c));
    norm_bias[chunk] = __ldg(reinterpret_cast<const float2*>(p.norm_bias + c));
  }
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    const float r = of_pixel(reciprocal, i);
    const int x = x0 + strip * kStrip + i % kStrip, y = y0 + i / kStrip;
    if (x >= p.width || y >= p.height) continue;
    T* out = static_cast<T*>(p.out) + (image + static_cast<int64_t>(y) * p.width + x) * p.channels + channel;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const float2 a = acc[chunk][i / kStrip][i % kStrip];
      if (chunk * p.chunk + channel < p.channels)
        *reinterpret_cast<uint32_t*>(out + chunk * p.chunk) =
            pack_two<T>(fmaf(a.x * r, norm_weight[chunk].x, norm_bias[chunk].x),
                        fmaf(a.y * r, norm_weight[chunk].y, norm_bias[chunk].y));
    }
  }
}

// Any kernel and number of channels: a warp is a pixel, whose row of f32 values waits in memory.
template <class T>
__device__ void any(const DepthwiseParams& p) {
  const int lane = threadIdx.x % 32, warps = kDepthwiseAnyThreads / 32;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / 32;
  const int64_t pixels = p.batch * p.height * p.width;
  const T* image = static_cast<const T*>(p.x);
  float* row = p.rows + warp * p.channels;
  // body(channel) for this lane's channels, as the tiles spread them: pairs, one of each chunk, then the next
  // warp's.
  const auto sum_channels = [&](auto body) {
    float total = 0.0f;
    for (int first = lane * 2; first < p.chunk; first += kWarpChannels) {
      float sum = 0.0f;
      for (int c = first; c < p.channels; c += p.chunk) sum += body(c);
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
      total += sum;
    }
    return total / static_cast<float>(p.channels);
  };
  for (int64_t pixel = warp; pixel < pixels; pixel += gridDim.x * warps) {
    const int x0 = static_cast<int>(pixel % p.width), y0 = static_cast<int>(pixel / p.width % p.height);
    const T* first =
        image + (pixel - static_cast<int64_t>(p.kernel_h / 2) * p.width - p.kernel_w / 2) * p.channels;
    const auto convolve = [&](int c) {
      float sum = p.bias[c];
      for (int ky = 0; ky < p.kernel_h; ++ky)
        for (int kx = 0; kx < p.kernel_w; ++kx) {
          const int x = x0 + kx - p.kernel_w / 2, y = y0 + ky - p.kernel_h / 2;
          const bool inside = x >= 0 && x < p.width && y >= 0 && y < p.height;
          const int64_t at = (static_cast<int64_t>(ky) * p.width + kx) * p.channels + c;
          sum = fmaf(inside ? to_float(first[at]) : 0.0f, p.w[(ky * p.kernel_w + kx) * p.channels + c], sum);
        }
      return row[c] = sum;
    };
    const float mean = sum_channels([&](int c) {
      const float a = convolve(c);
      return c + 1 < p.channels ? a + convolve(c + 1) : a;
    });
    const float variance = sum_channels([&](int c) {
      const float a = row[c] - mean, b = c + 1 < p.channels ? row[c + 1] - mean : 0.0f;
      return fmaf(a, a, b * b);
    });
    const float r = 1.0f / sqrtf(variance + p.eps);
    T* out = static_cast<T*>(p.out) + pixel * p.channels;
    for (int c0 = lane * 2; c0 < p.channels; c0 += 64)
      for (int c = c0; c < c0 + 2 && c < p.channels; ++c)
        out[c] = from_float<T>(fmaf((row[c] - mean) * r, p.norm_weight[c], p.norm_bias[c]));
  }
}

}  // namespace

#define DEPTHWISE(name, function, threads)                                                                \
  extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ DepthwiseParams p) { \
    function(p);                                                                                          \
  }
#define DEPTHWISE_OF(type, T)                                                \
  DEPTHWISE(depthwise_two_rows_##type, (tile<T, 2, 1>), kDepthwiseThreads)   \
  DEPTHWISE(depthwise_one_row_##type, (tile<T, 1, 1>), kDepthwiseThreads)    \
  DEPTHWISE(depthwise_two_chunks_##type, (tile<T, 1, 2>), kDepthwiseThreads) \
  DEPTHWISE(depthwise_any_##type, any<T>, kDepthwiseAnyThreads)
DEPTHWISE_OF(bf16, __nv_bfloat16)
DEPTHWISE_OF(f16, __half)

}  // namespace mgm::cuda
