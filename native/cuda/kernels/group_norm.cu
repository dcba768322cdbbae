// GroupNorm, then SiLU, over images [B, pixels, C] whose channels may come from two tensors.
//
// Bytes are what bounds it: x is read for the moments, read again to be normalized, and out is written. An
// image is cut into chunks of pixels, so that one image occupies the GPU:
//   group_norm_moments  count, mean and squared deviations of each group in each chunk
//   group_norm_combine  of each group in the image
//   group_norm_apply    normalizes
//   group_norm_small    all of it, where the pixels of a few groups are one block's work
// How an image is cut, and so the order of every sum, follows from its own sizes alone.
//
// A thread's sums are of differences to its first pixel, so that a mean far from zero costs no digits; they
// become moments, which merge around their common mean. Mean and deviation are f32: a mean m times the
// deviation costs about m * 2^-23 of a result. Differences above 1e18 overflow in their squares.
#include "common.cuh"
#include "group_norm.h"

namespace mgm::cuda {
namespace {

extern __shared__ __align__(16) float shared[];

// Of `count` numbers: their mean, and the sum of the squares of their deviations from it.
struct Moments {
  float count, mean, squares;
};

// Chan, Golub & LeVeque 1979. A count of zero changes nothing.
__device__ __forceinline__ Moments merged(const Moments& a, const Moments& b) {
  const float count = a.count + b.count;
  if (count == 0.0f) return a;
  const float share = b.count / count, distance = b.mean - a.mean;
  return {count, fmaf(distance, share, a.mean),
          a.squares + b.squares + distance * distance * share * a.count};
}

// Of all lanes, in every lane.
__device__ __forceinline__ Moments merged_warp(Moments m) {
#pragma unroll
  for (int distance = 16; distance > 0; distance >>= 1)
    m = merged(m,
               {__shfl_down_sync(kAllLanes, m.count, distance), __shfl_down_sync(kAllLanes, m.mean, distance),
                __shfl_down_sync(kAllLanes, m.squares, distance)});
  return {__shfl_sync(kAllLanes, m.count, 0), __shfl_sync(kAllLanes, m.mean, 0),
          __shfl_sync(kAllLanes, m.squares, 0)};
}

// y / (1 + e^-y) to some 2^-21 of it; 0 instead of what is below 1e-37.
__device__ __forceinline__ float silu(float y) {
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(y * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
  return y * inverse;
}

__device__ __forceinline__ float inverse_deviation(const Moments& m, float eps) {
  return 1.0f / sqrtf(m.squares / m.count + eps);
}

// What a block has of an image, and what its threads have of that. A slot is a channel's place among the
// vectors of the block's slice.
template <class T, bool kAligned>
struct Part {
  static constexpr int kWidth = 16 / sizeof(T);
  // Loads of a thread under way at once.
  static constexpr int kBatch = kAligned ? kGroupNormBatch : 1;
  using Batch = Vector<T, kWidth>[kBatch];

  const GroupNormParams& p;
  int pixels, first_vector, slots, first_channel, end_channel;
  // Of this thread: its pixels, the slots of its vector, how many elements of it are channels, where it reads
  // and writes, and how many elements on it does so next.
  int row, mine, slot, left, from_step, to_step;
  const T* from;
  T* to;

  __device__ Part(const GroupNormParams& p, int64_t image, int slice, int chunk) : p(p) {
    const int64_t begin = static_cast<int64_t>(chunk) * p.chunk;
    pixels = static_cast<int>(min(static_cast<int64_t>(p.chunk), p.pixels - begin));
    first_vector = slice * p.columns;
    const int vectors = min(p.columns, p.vectors - first_vector);
    slots = vectors * kWidth;
    first_channel = channels_before(first_vector);
    end_channel = channels_before(first_vector + vectors);

    row = threadIdx.x / p.columns;
    const int column = threadIdx.x - row * p.columns, vector = first_vector + column;
    const bool idle = row >= p.rows || column >= vectors, in_x = vector < p.vectors_x;
    mine = idle || row >= pixels ? 0 : (pixels - 1 - row) / p.rows + 1;
    slot = idle ? -1 : column * kWidth;
    const int channel = (in_x ? vector : vector - p.vectors_x) * kWidth;
    const int from_stride = in_x ? p.channels_x : p.channels_more, to_stride = p.channels_x + p.channels_more;
    const int64_t pixel = image * p.pixels + begin + row;
    left = from_stride - channel;
    from = static_cast<const T*>(in_x ? p.x : p.more) + pixel * from_stride + channel;
    to = static_cast<T*>(p.out) + pixel * to_stride + channel + (in_x ? 0 : p.channels_x);
    from_step = p.rows * from_stride;
    to_step = p.rows * to_stride;
  }

  __device__ int channels_before(int vector) const {
    return vector <= p.vectors_x ? min(vector * kWidth, p.channels_x)
                                 : p.channels_x + min((vector - p.vectors_x) * kWidth, p.channels_more);
  }
  __device__ int slot_of(int channel) const {
    const int place = channel < p.channels_x ? channel : channel - p.channels_x + p.vectors_x * kWidth;
    return place - first_vector * kWidth;
  }

  // The pixels of this thread from number `first` on.
  __device__ __forceinline__ void load(int first, Batch& batch) const {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= mine) break;
      const T* at = from + (first + i) * from_step;
      if (kAligned) {
        batch[i] = load_vector<kWidth>(at);
      } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) batch[i].at[j] = j < left ? at[j] : from_float<T>(0.0f);
      }
    }
  }
  __device__ __forceinline__ void store(int number, const float (&y)[kWidth]) const {
    T* at = to + number * to_step;
    const auto v = rounded<T>(y);
    if (kAligned) {
      store_vector(at, v);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        if (j < left) at[j] = v.at[j];
    }
  }

  // body(group, its moments in this part) by a warp for each group that has channels here; `sums` is shared
  // memory for kGroupNormSums of them.
  template <class Body>
  __device__ __forceinline__ void for_moments(float* sums, Body body) const {
    // Sums of this thread, of differences to its first pixel.
    float shift[kWidth] = {}, sum[kWidth] = {}, square[kWidth] = {};
    Batch batch;
    load(0, batch);
    if (mine > 0) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) shift[j] = to_float(batch[0].at[j]);
    }
    for (int first = 0; first < mine; load(first += kBatch, batch)) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i >= mine) break;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const float d = to_float(batch[i].at[j]) - shift[j];
          sum[j] += d;
          square[j] = fmaf(d, d, square[j]);
        }
      }
    }

    // Mean and squares of each thread's.
    float* squares = sums + p.rows * slots;
    if (slot >= 0) {
      const float n = max(mine, 1);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float offset = sum[j] / n;
        const float deviation = square[j] - sum[j] * offset;
        square[j] = deviation < 0.0f ? 0.0f : deviation;  // not max(), which would hide NaN
        shift[j] += offset;
      }
      store_floats(sums + row * slots + slot, shift);
      store_floats(squares + row * slots + slot, square);
    }
    __syncthreads();

    // And of each channel, in place of those of row 0: the mean of the rows, then what lies around it.
    const float n = pixels;
    const int each = pixels / p.rows, longer = pixels % p.rows;
    for (int i = threadIdx.x; i < slots; i += blockDim.x) {
      const auto count = [&](int r) { return static_cast<float>(each + (r < longer ? 1 : 0)); };
      const int rows = min(p.rows, pixels);
      const float first = sums[i];
      float s = 0.0f;
      for (int r = 1; r < rows; ++r) s = fmaf(count(r), sums[r * slots + i] - first, s);
      const float mean = first + s / n;
      float q = 0.0f;
      for (int r = 0; r < rows; ++r) {
        const float distance = sums[r * slots + i] - mean;
        q += fmaf(count(r) * distance, distance, squares[r * slots + i]);
      }
      sums[i] = mean;
      squares[i] = q;
    }
    __syncthreads();

    // Groups.
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (int group = first_channel / p.group_width + warp; group * p.group_width < end_channel;
         group += warps) {
      const int begin = max(group * p.group_width, first_channel),
                end = min((group + 1) * p.group_width, end_channel);
      Moments m{};
      for (int channel = begin + lane; channel < end; channel += 32) {
        const int slot = slot_of(channel);
        m = merged(m, {n, sums[slot], squares[slot]});
      }
      body(group, merged_warp(m));
    }
  }

  // Of a channel, for normalize(): y = (x - mean) * factor + bias.
  __device__ __forceinline__ void set_affine(float* affine, int channel, float mean, float r) const {
    const int slot = slot_of(channel);
    affine[slot] = mean;
    affine[slots + slot] = r * p.weight[channel];
    affine[2 * slots + slot] = p.bias[channel];
  }
  __device__ __forceinline__ void normalize(const float* affine) const {
    if (mine == 0) return;
    float mean[kWidth], factor[kWidth], bias[kWidth];
    load_floats(affine + slot, mean);
    load_floats(affine + slots + slot, factor);
    load_floats(affine + 2 * slots + slot, bias);
    Batch batch;
    for (int first = 0; first < mine; first += kBatch) {
      load(first, batch);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i >= mine) break;
        float y[kWidth];
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          y[j] = fmaf(to_float(batch[i].at[j]) - mean[j], factor[j], bias[j]);
          if (p.silu) y[j] = silu(y[j]);
        }
        store(first + i, y);
      }
    }
  }

  // Of this thread's slots in shared memory. Those past the last channel are never set.
  __device__ __forceinline__ void load_floats(const float* from, float (&x)[kWidth]) const {
#pragma unroll
    for (int j = 0; j < kWidth; j += 4) {
      if (kAligned) {
        const float4 v = *reinterpret_cast<const float4*>(from + j);
        x[j] = v.x, x[j + 1] = v.y, x[j + 2] = v.z, x[j + 3] = v.w;
      } else {
#pragma unroll
        for (int i = j; i < j + 4; ++i) x[i] = i < left ? from[i] : 0.0f;
      }
    }
  }
  __device__ __forceinline__ static void store_floats(float* to, const float (&x)[kWidth]) {
#pragma unroll
    for (int j = 0; j < kWidth; j += 4)
      *reinterpret_cast<float4*>(to + j) = {x[j], x[j + 1], x[j + 2], x[j + 3]};
  }
};

struct Place {
  int64_t image;
  int slice, chunk;
  __device__ explicit Place(const GroupNormParams& p) {
    const int part = static_cast<int>(blockIdx.x) % (p.slices * p.chunks);
    image = blockIdx.x / (p.slices * p.chunks);
    slice = part % p.slices;
    chunk = part / p.slices;
  }
};

template <class T, bool kAligned>
__device__ __forceinline__ void moments(const GroupNormParams& p) {
  const Place place(p);
  const int parts = p.slices * p.chunks;
  const Part<T, kAligned> part(p, place.image, place.slice, place.chunk);
  part.for_moments(shared, [&](int group, const Moments& m) {
    float* to =
        p.partials + ((place.image * p.groups + group) * parts + place.chunk * p.slices + place.slice) * 3;
    if (threadIdx.x % 32 == 0) {
      to[0] = m.count;
      to[1] = m.mean;
      to[2] = m.squares;
    }
  });
}

template <class T, bool kAligned>
__device__ __forceinline__ void apply(const GroupNormParams& p) {
  const Place place(p);
  const Part<T, kAligned> part(p, place.image, place.slice, place.chunk);
  for (int channel = part.first_channel + threadIdx.x; channel < part.end_channel; channel += blockDim.x) {
    const float* stats = p.stats + (place.image * p.groups + channel / p.group_width) * 2;
    part.set_affine(shared, channel, stats[0], stats[1]);
  }
  __syncthreads();
  part.normalize(shared);
}

// A slice of whole groups, all pixels.
template <class T, bool kAligned>
__device__ __forceinline__ void small(const GroupNormParams& p) {
  const Place place(p);
  const Part<T, kAligned> part(p, place.image, place.slice, 0);
  part.for_moments(shared + kGroupNormAffine * part.slots, [&](int group, const Moments& m) {
    const float r = inverse_deviation(m, p.eps);
    for (int i = threadIdx.x % 32; i < p.group_width; i += 32)
      part.set_affine(shared, group * p.group_width + i, m.mean, r);
  });
  __syncthreads();
  part.normalize(shared);
}

}  // namespace

#define KERNEL(name, step, T)                                        \
  extern "C" __global__ void __launch_bounds__(kGroupNormThreads, 2) \
      group_norm_##name(const __grid_constant__ GroupNormParams p) { \
    p.aligned ? step<T, true>(p) : step<T, false>(p);                \
  }
#define GROUP_NORM(type, T)          \
  KERNEL(moments_##type, moments, T) \
  KERNEL(apply_##type, apply, T)     \
  KERNEL(small_##type, small, T)
GROUP_NORM(f32, float)
GROUP_NORM(bf16, __nv_bfloat16)
GROUP_NORM(f16, __half)

// A warp for each group of each image.
extern "C" __global__ void __launch_bounds__(32)
    group_norm_combine(const __grid_constant__ GroupNormParams p) {
  const int first_channel = static_cast<int>(blockIdx.x) % p.groups * p.group_width;
  const auto slice_of = [&](int channel) {
    return (channel < p.channels_x ? channel / p.vector_width
                                   : p.vectors_x + (channel - p.channels_x) / p.vector_width) /
           p.columns;
  };
  const int first_slice = slice_of(first_channel),
            slices = slice_of(first_channel + p.group_width - 1) - first_slice + 1;
  const float* partials = p.partials + static_cast<int64_t>(blockIdx.x) * p.chunks * p.slices * 3;
  Moments m{};
  for (int i = threadIdx.x; i < p.chunks * slices; i += 32) {
    const float* part = partials + (i / slices * p.slices + first_slice + i % slices) * 3;
    m = merged(m, {part[0], part[1], part[2]});
  }
  m = merged_warp(m);
  if (threadIdx.x > 0) return;
  p.stats[blockIdx.x * 2] = m.mean;
  p.stats[blockIdx.x * 2 + 1] = inverse_deviation(m, p.eps);
}

}  // namespace mgm::cuda
