// Patch info mining (native/ops.h): a query attends to the 8 x 8 positions of its window of the concatenated,
// upsampled map, without projecting keys or values and without building that map (docs/architecture.md,
// "Patch mining"). Windows of 8 x 8 on maps of 1, 1/2, 1/4 and 1/8 of the size; patch_mining_any.cu does the
// rest.
//
// Stage maps [B, S >> s, S >> s, c_s] bf16 or f16, g [B * grid^2, C (+ 1)] f32, out [B * grid^2, C]. A block
// mines a window: 8x8, 6x6, 4x4 and 3x3 cells of the stages, halos included, cut into slices of 64 channels.
// A slice is copied by the warp that works on it, so nothing but g and the scalars between the two halves
// ever waits for the whole block.
//
// 1. Scalars of cells, on the tensor cores: the matrix [cells, channels] times the transpose of
//    [cells; g; ones] has every cell's square, its products with its neighbours, with g, and its sum. g is
//    split into three numbers of the maps' type, so that products are exact and sums f32.
// 2. Interpolation is linear: sum, g . x and |x|^2 of a position are small forms in those scalars. LayerNorm
//    statistics, scores, softmax. Weights of positions back onto the cells.
// 3. out = weights times [cells, channels], on the tensor cores again, weights split in three.
//
// |x|^2 - C mean^2 cancels where the map is nearly constant, or opposite in neighbouring cells. Each window
// knows how much did; where it is too much, the window is left to patch_mining_any, which centres cells
// first.
//
// At least 26.5 MB of maps, 6.6 MB of g and 3.3 MB of results a picture at MGM's size (24 x 24 queries of
// 2880 channels); halos make that 60 MB of map through L2. Two blocks share a multiprocessor, so that one
// computes while the other waits; what of a window does not fit then is read once more for step 3. 936 mma a
// window: 2.2 GFLOP a picture, where projecting keys and values would take 435.
#include <type_traits>

#include "patch_mining.cuh"

namespace mgm::cuda {
namespace {

constexpr int kPositions = kMiningWindow * kMiningWindow;
constexpr int kThreads = kMiningWindowThreads;
// Windows of which more than this much cancels are mined by patch_mining_any. f32 sums are good to 2^-20, so
// what is left is good to 2^-12 of itself, its root to 2^-13.
constexpr float kMiningCancelled = 256.0f;
constexpr int kRoom = 8;  // |g| and the weights of cells are brought near 2^8: f16 keeps 2^-33 of that

// x as three numbers of T whose sum it is, but for 2^-24 of its size.
template <class T>
__device__ __forceinline__ void split(float x, T (&piece)[kMiningPieces]) {
#pragma unroll
  for (int i = 0; i < kMiningPieces; ++i) {
    piece[i] = from_float<T>(x);
    x -= to_float(piece[i]);
  }
}

__device__ __forceinline__ void wait_copies_but(int pending) {
  switch (pending) {
    case 0:
      return wait_copies<0>();
    case 1:
      return wait_copies<1>();
    case 2:
      return wait_copies<2>();
    case 3:
      return wait_copies<3>();
    case 4:
      return wait_copies<4>();
    case 5:
      return wait_copies<5>();
    case 6:
      return wait_copies<6>();
    default:
      return wait_copies<kMiningMostSlots - 1>();
  }
}

// Where the products with neighbours lie among the scalars of a stage.
template <int s>
constexpr int kRight = 5 * kMiningCells<s>;
template <int s>
constexpr int kBelowLeft = kRight<s> + kMiningCells<s> - 1;
template <int s>
constexpr int kBelow = kBelowLeft<s> + kMiningCells<s> - kMiningSide<s> + 1;
template <int s>
constexpr int kBelowRight = kBelow<s> + kMiningCells<s> - kMiningSide<s>;

// The part of the window's stage that a warp works on: every kMiningStageWarps-th slice. Only the warp itself
// copies into its slots, waits for them and reads them.
template <class T, int kStage>
struct Part {
  static constexpr int kSide = kMiningSide<kStage>, kCells = kMiningCells<kStage>;

  const MiningWindowParams& a;
  const MiningStage& stage;
  const MiningShare& share;
  const T* map;  // of the picture
  int y0, x0;    // first cell; outside the map the border's cells repeat
  int lane, number;

  __device__ __forceinline__ Part(const MiningWindowParams& a, int64_t query, int warp)
      : a(a), stage(a.p.stages[kStage]), share(a.shares[warp]) {
    const int grid = a.p.grid;
    const int64_t row = query / grid;
    map = static_cast<const T*>(stage.data) + row / grid * stage.batch_stride;
    constexpr int kHalo = kStage > 0;
    y0 = static_cast<int>(row % grid) * (kMiningWindow >> kStage) - kHalo;
    x0 = static_cast<int>(query % grid) * (kMiningWindow >> kStage) - kHalo;
    lane = static_cast<int>(threadIdx.x) % 32;
    number = warp % kMiningStageWarps;
  }

  // Of the whole stage.
  __device__ __forceinline__ int slice_of(int i) const { return i * kMiningStageWarps + number; }
  __device__ __forceinline__ uint32_t slot_of(uint32_t shared, int i) const {
    return shared + static_cast<uint32_t>(share.at + i % share.slots * (kCells * kMiningRow));
  }

  __device__ __forceinline__ void load(uint32_t shared, int i) const {
    const int piece = lane % 8, c = slice_of(i) * kMiningSlice + piece * 8;
    const int valid = c < stage.channels ? 16 : 0;
    const T* from = map + (valid ? c : 0);
    const uint32_t to = slot_of(shared, i);
#pragma unroll 2
    for (int first = 0; first < kCells; first += 4) {
      const int cell = first + lane / 8;
      if (kCells % 4 != 0 && cell >= kCells) break;
      const int y = min(max(y0 + cell / kSide, 0), stage.height - 1);
      const int x = min(max(x0 + cell % kSide, 0), stage.width - 1);
      copy_async(to + swizzled<8>(cell, piece), from + y * stage.row_stride + x * stage.column_stride, valid);
    }
  }
  // The next slice, into the slot that is free now; a group in any case, so that groups count iterations.
  __device__ __forceinline__ void load_next(uint32_t shared, int i) const {
    __syncwarp();
    if (i >= 0 && i < share.slices) load(shared, i);
    commit_copies();
  }
  __device__ __forceinline__ void wait() const {
    wait_copies_but(share.slots - 1);
    __syncwarp();
  }

  __device__ __forceinline__ void start(uint32_t shared) const {
    for (int i = 0; i < share.slots; ++i) {
      load(shared, i);
      commit_copies();
    }
  }

  // All scalars of the warp's slices: cells as rows times cells, pieces of g and ones as columns. An 8x8
  // matrix of ldmatrix is the same fragment of a as of b, so every cell is read once.
  __device__ __forceinline__ void measure(uint32_t shared, float* scalars) const {
    constexpr int kTiles = kStage == 0 ? 8 : kStage == 1 ? 8 : kStage == 2 ? 3 : 2;
    constexpr int kTail = kCells / 8 * 8;  // first of the eight columns that end in the pieces of g
    float c[kTiles][4] = {};
    for (int i = 0; i < share.slices; ++i) {
      wait();
      const uint32_t slot = slot_of(shared, i);
      const uint32_t pieces =
          shared + static_cast<uint32_t>((a.first_slice[kStage] + slice_of(i)) * kMiningPieces * kMiningRow);
      // Row `row` of: cells, pieces of g, ones.
      const auto row_at = [&](int row, int piece) {
        const uint32_t base = row < kCells                   ? slot + row * kMiningRow
                              : row < kCells + kMiningPieces ? pieces + (row - kCells) * kMiningRow
                                                             : shared + a.ones_at;
        return base + static_cast<uint32_t>((piece ^ (row & 7)) * 16);
      };
      const uint32_t rows = row_at(lane % 16, lane / 16), tail = row_at(kTail + lane % 8, lane / 8);
      uint32_t b[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // 16 channels
        const uint32_t at = static_cast<uint32_t>(k * 32);
        uint32_t x[4];
        if (kStage < 3 && k % 2 == 0) load_matrices(b, tail ^ at);
        const uint32_t b0 = b[k % 2 * 2], b1 = b[k % 2 * 2 + 1];
        if constexpr (kStage == 0) {
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            load_matrices(x, (rows ^ at) + m * 16 * kMiningRow);
            // Squares are the diagonal: the upper rows times the upper cells, the lower times the lower.
            const uint32_t upper[4] = {x[0], 0, x[2], 0}, lower[4] = {0, x[1], 0, x[3]};
            multiply_add<T>(c[2 * m], upper, x[0], x[2]);
            multiply_add<T>(c[2 * m], lower, x[1], x[3]);
            multiply_add<T>(c[2 * m + 1], x, b0, b1);
          }
        } else if constexpr (kStage == 1) {
          uint32_t y[4];
          load_matrices(x, rows ^ at);
          load_matrices(y, (rows ^ at) + 16 * kMiningRow);
          const uint32_t z[4] = {b0, 0, b1, 0};
          multiply_add<T>(c[0], x, x[0], x[2]);
          multiply_add<T>(c[1], x, x[1], x[3]);
          multiply_add<T>(c[2], x, y[0], y[2]);
          multiply_add<T>(c[3], x, b0, b1);
          multiply_add<T>(c[4], y, y[0], y[2]);
          multiply_add<T>(c[5], y, y[1], y[3]);
          multiply_add<T>(c[6], y, b0, b1);
          multiply_add<T>(c[7], z, b0, b1);
        } else {
          load_matrices(x, rows ^ at);
          multiply_add<T>(c[0], x, x[0], x[2]);
          multiply_add<T>(c[1], x, x[1], x[3]);
          if constexpr (kStage == 2) multiply_add<T>(c[2], x, b0, b1);
        }
      }
      load_next(shared, i + share.slots);
    }
    // The pieces of g lie where the scalars go.
    __syncthreads();
    if constexpr (kStage == 0) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        put(c[2 * m][0], scalars, m * 16, 0, m * 16, 0);
        put(c[2 * m][1], scalars, m * 16, 0, m * 16, 1);
        put(c[2 * m][2], scalars, m * 16, 8, m * 16 + 8, 0);
        put(c[2 * m][3], scalars, m * 16, 8, m * 16 + 8, 1);
        put_tile(c[2 * m + 1], scalars, m * 16, kTail);
      }
    } else if constexpr (kStage == 1) {
      put_tile(c[0], scalars, 0, 0);
      put_tile(c[1], scalars, 0, 8);
      put_tile(c[2], scalars, 0, 16);
      put_tile(c[3], scalars, 0, kTail);
      put_tile(c[4], scalars, 16, 16);
      put_tile(c[5], scalars, 16, 24);
      put_tile(c[6], scalars, 16, kTail);
      put_tile(c[7], scalars, 32, kTail);
    } else {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) put_tile(c[n], scalars, 0, n * 8);
    }
  }

  __device__ __forceinline__ void put_tile(const float (&c)[4], float* scalars, int row, int column) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) put(c[e], scalars, row, e / 2 * 8, column, e % 2);
  }
  // Keeps the products that interpolation needs.
  __device__ __forceinline__ void put(float value, float* scalars, int first_row, int row, int first_column,
                                      int column) const {
    const int i = first_row + row + lane / 4, j = first_column + lane % 4 * 2 + column, d = j - i;
    if (i >= kCells || j > kCells + kMiningPieces) return;
    int first = -1;
    if (j >= kCells)
      first = (1 + j - kCells) * kCells;
    else if (d == 0)
      first = 0;
    else if (kStage > 0)
      first = d == 1           ? kRight<kStage>
              : d == kSide - 1 ? kBelowLeft<kStage>
              : d == kSide     ? kBelow<kStage>
              : d == kSide + 1 ? kBelowRight<kStage>
                               : -1;
    if (first >= 0) scalars[first + i] = value;
  }

  // out[c] = sum over cells of weight * cell[c] - constant: channels as rows, the three pieces of the weights
  // as columns. `row`: 128 bytes of the warp's own for the way out.
  __device__ __forceinline__ void combine(uint32_t shared, const float* weights, float constant, T* row,
                                          T* out) const {
    constexpr int kSteps = (kCells + 15) / 16;
    // Weights.
    float top = 0.0f;
    for (int i = lane; i < kCells; i += 32) top = fmaxf(top, weights[i]);
    const int exponent = exponent_of(__uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(top))));
    const float factor = power_of_two(kRoom - exponent), back = power_of_two(exponent - kRoom);
    uint32_t b[kSteps][2];
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float piece_of[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int cell = k * 16 + half * 8 + lane % 4 * 2 + i;
          T piece[kMiningPieces];
          split(cell < kCells ? weights[cell] * factor : 0.0f, piece);
          piece_of[i] = 0.0f;
#pragma unroll
          for (int j = 0; j < kMiningPieces; ++j)
            if (lane / 4 == j) piece_of[i] = to_float(piece[j]);
        }
        b[k][half] = pack_two<T>(piece_of[0], piece_of[1]);
      }

    // Slices, the last first: those are still there.
    wait_copies<0>();
    __syncwarp();
    for (int i = share.slices - 1; i >= 0; --i) {
      if (i < share.slices - share.slots) wait();
      __syncwarp();  // `row` is free again
      const uint32_t slot = slot_of(shared, i);
#pragma unroll
      for (int m = 0; m < kMiningSlice / 16; ++m) {
        float c[4] = {};
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          uint32_t x[4];
          const int cell = min(k * 16 + lane % 8 + lane / 16 * 8, kCells - 1);
          load_matrices_transposed(x, slot + swizzled<8>(cell, m * 2 + lane / 8 % 2));
          multiply_add<T>(c, x, b[k][0], b[k][1]);
        }
        // Lane 4 i has the first two pieces of channel i (and i + 8), the next lane has the third.
        const float low = __shfl_down_sync(kAllLanes, c[0], 1), low8 = __shfl_down_sync(kAllLanes, c[2], 1);
        if (lane % 4 == 0) {
          row[m * 16 + lane / 4] = from_float<T>(fmaf(c[0] + (c[1] + low), back, -constant));
          row[m * 16 + lane / 4 + 8] = from_float<T>(fmaf(c[2] + (c[3] + low8), back, -constant));
        }
      }
      load_next(shared, i - share.slots);
      const int channel = slice_of(i) * kMiningSlice + lane * 8;
      if (lane < 8 && channel < stage.channels)
        *reinterpret_cast<uint4*>(out + stage.first_channel + channel) =
            *reinterpret_cast<const uint4*>(row + lane * 8);
    }
  }
};

// The linear interpolation of a stage: weight of cell `cell` of the window's cells for position i, exact in
// f32.
template <int kStage>
__device__ __forceinline__ float hat(int i, int cell) {
  constexpr float kStep = 1.0f / (1 << kStage);
  return fmaxf(0.0f, 1.0f - fabsf((static_cast<float>(i) + 0.5f) * kStep + 0.5f - static_cast<float>(cell)));
}

// What the scalars of cells say of position (y, x).
struct Moments {
  float sum, dot, square, bound;
};

// x = sum of w[i] cell[i] over four neighbours. bound: the square of sum of w[i] |cell[i]|, which says how
// much may have cancelled in |x|^2.
template <int kStage>
__device__ __forceinline__ Moments interpolate(const float* scalars, int y, int x) {
  constexpr int kSide = kMiningSide<kStage>, kCells = kMiningCells<kStage>;
  if constexpr (kStage == 0) {
    const float* at = scalars + y * kSide + x;
    const float dot = at[kCells] + (at[2 * kCells] + at[3 * kCells]);
    return {at[4 * kCells], dot, at[0], at[0]};
  } else {
    const auto place = [](int i) { return ((2 * i + 1) + (1 << kStage)) >> (kStage + 1); };
    const int cy = place(y), cx = place(x);
    const float bottom = hat<kStage>(y, cy + 1), right = hat<kStage>(x, cx + 1);
    const float* first = scalars + cy * kSide + cx;
    const int offset[4] = {0, 1, kSide, kSide + 1};
    const float w[4] = {(1.0f - bottom) * (1.0f - right), (1.0f - bottom) * right, bottom * (1.0f - right),
                        bottom * right};
    Moments m = {};
    float length = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* at = first + offset[i];
      m.sum = fmaf(w[i], at[4 * kCells], m.sum);
      m.dot = fmaf(w[i], at[kCells] + (at[2 * kCells] + at[3 * kCells]), m.dot);
      m.square = fmaf(w[i] * w[i], at[0], m.square);
      length = fmaf(w[i], sqrtf(at[0]), length);
    }
    const float pairs = w[0] * w[1] * first[kRight<kStage>] + w[2] * w[3] * first[kRight<kStage> + kSide] +
                        w[1] * w[2] * first[kBelowLeft<kStage> + 1] + w[0] * w[2] * first[kBelow<kStage>] +
                        w[1] * w[3] * first[kBelow<kStage> + 1] + w[0] * w[3] * first[kBelowRight<kStage>];
    m.square = fmaf(2.0f, pairs, m.square);
    m.bound = length * length;
    return m;
  }
}

// One entry of the strip of a stage: weights of positions, summed along their row.
template <int kStage>
__device__ __forceinline__ void fill_strip(const float* of_position, float* strip, int at) {
  constexpr int kSide = kMiningSide<kStage>;
  const int y = at / kSide, cell = at % kSide;
  float sum = 0.0f;
#pragma unroll
  for (int x = 0; x < kMiningWindow; ++x)
    sum = fmaf(hat<kStage>(x, cell), of_position[y * kMiningWindow + x], sum);
  strip[at] = sum;
}
template <int kStage>
__device__ __forceinline__ void fill_weight(const float* strip, float* weight, int at) {
  constexpr int kSide = kMiningSide<kStage>;
  const int cell = at / kSide, column = at % kSide;
  float sum = 0.0f;
#pragma unroll
  for (int y = 0; y < kMiningWindow; ++y) sum = fmaf(hat<kStage>(y, cell), strip[y * kSide + column], sum);
  weight[at] = sum;
}

// body(stage as a constant) for the one of four.
template <class Body>
__device__ __forceinline__ void for_stage(int stage, Body body) {
  switch (stage) {
    case 0:
      return body(std::integral_constant<int, 0>());
    case 1:
      return body(std::integral_constant<int, 1>());
    case 2:
      return body(std::integral_constant<int, 2>());
    default:
      return body(std::integral_constant<int, 3>());
  }
}

// What the first warp needs for the softmax.
struct Query {
  float sum_g;  // of g over 2^exponent
  int exponent;
};

// Pieces of g, brought near 2^kRoom, and the row of ones.
template <class T>
__device__ __forceinline__ void prepare_g(const MiningWindowParams& a, const float* g, char* shared,
                                          Query* query) {
  const int padded = a.total_slices * kMiningSlice;
  // body(number of the value, where it is among the slices, its stage) for the values of this thread.
  const auto for_values = [&](auto body) {
#pragma unroll
    for (int i = 0; i < kMiningGPerThread; ++i) {
      const int at = static_cast<int>(threadIdx.x) + i * kThreads;
      if (at >= padded) break;
      int stage = 0;
#pragma unroll
      for (int s = 1; s < kMiningStages; ++s) stage += at / kMiningSlice >= a.first_slice[s];
      body(i, at, stage);
    }
  };
  float value[kMiningGPerThread], top = 0.0f, sum = 0.0f;
  for_values([&](int i, int at, int stage) {
    const int c = at - a.first_slice[stage] * kMiningSlice;
    value[i] = c < a.p.stages[stage].channels ? g[a.p.stages[stage].first_channel + c] : 0.0f;
    top = fmaxf(top, fabsf(value[i]));
  });
  const int exponent = exponent_of(block_reduce<Max, kThreads>(top)) - kRoom;
  const float factor = power_of_two(-exponent);
  for_values([&](int i, int at, int stage) {
    const float x = value[i] * factor;
    sum += x;
    T piece[kMiningPieces];
    split(x, piece);
    // Among the rows that `measure` sees, the pieces follow the cells.
    const int side = stage == 0   ? kMiningSide<0>
                     : stage == 1 ? kMiningSide<1>
                     : stage == 2 ? kMiningSide<2>
                                  : kMiningSide<3>;
    char* slice = shared + at / kMiningSlice * (kMiningPieces * kMiningRow) + at % 8 * 2;
#pragma unroll
    for (int j = 0; j < kMiningPieces; ++j)
      *reinterpret_cast<T*>(slice + j * kMiningRow + (at / 8 % 8 ^ (side * side + j & 7)) * 16) = piece[j];
  });
  if (threadIdx.x < kMiningSlice) reinterpret_cast<T*>(shared + a.ones_at)[threadIdx.x] = from_float<T>(1.0f);
  sum = block_reduce<Sum, kThreads>(sum);
  if (threadIdx.x == 0) *query = {sum, exponent};
}

template <class T>
__device__ void mine(const MiningWindowParams& a) {
  extern __shared__ __align__(128) char shared[];
  __shared__ float constant;
  __shared__ bool give_up;
  __shared__ Query of_g;
  const MiningParams& p = a.p;
  const int64_t query = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, stage = warp / kMiningStageWarps;
  float* scalars = reinterpret_cast<float*>(shared);
  float* moments = reinterpret_cast<float*>(shared + kMiningMomentsAt);  // [4][stage][position]
  float* weights = reinterpret_cast<float*>(shared + kMiningWeightsAt);
  float* strips = reinterpret_cast<float*>(shared + kMiningStripsAt);
  const uint32_t base = shared_address(shared);
  constexpr int kScalars = kFirstMiningScalar<kMiningStages>;

  // Scalars of the cells, a stage's channels divided among its warps.
  for_stage(stage, [&](auto s) { Part<T, s.value>(a, query, warp).start(base); });
  prepare_g<T>(a, p.g + query * p.g_stride, shared, &of_g);
  for_stage(stage, [&](auto s) {
    Part<T, s.value>(a, query, warp)
        .measure(base, scalars + warp % kMiningStageWarps * kScalars + kFirstMiningScalar<s.value>);
  });
  __syncthreads();
  for (int i = threadIdx.x; i < kScalars; i += kThreads) {
    float sum = scalars[i];
#pragma unroll
    for (int part = 1; part < kMiningStageWarps; ++part) sum += scalars[i + part * kScalars];
    scalars[i] = sum;
  }
  __syncthreads();

  // Positions of each stage.
  if (threadIdx.x < kMiningStages * kPositions) {
    const int position = threadIdx.x % kPositions;
    for_stage(threadIdx.x / kPositions, [&](auto s) {
      const Moments m = interpolate<s.value>(scalars + kFirstMiningScalar<s.value>, position / kMiningWindow,
                                             position % kMiningWindow);
      moments[threadIdx.x] = m.sum;
      moments[kMiningStages * kPositions + threadIdx.x] = m.dot;
      moments[2 * kMiningStages * kPositions + threadIdx.x] = m.square;
      moments[3 * kMiningStages * kPositions + threadIdx.x] = m.bound;
    });
  }
  __syncthreads();

  // Softmax over the positions, two a lane.
  if (warp == 0) {
    const float n = static_cast<float>(p.channels);
    const double power = static_cast<double>(power_of_two(of_g.exponent));
    const double bias = p.has_bias ? static_cast<double>(p.g[query * p.g_stride + p.channels]) : 0.0;
    float mean[2], r[2], e[2];
    double score[2];
    bool bad = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto total = [&](int quantity) {
        const float* at = moments + quantity * kMiningStages * kPositions + i * 32 + lane;
        return (at[0] + at[kPositions]) + (at[2 * kPositions] + at[3 * kPositions]);
      };
      mean[i] = total(0) / n;
      const float variance = total(2) / n - mean[i] * mean[i];
      bad = bad || !((variance + p.eps) * kMiningCancelled >= total(3) / n);
      r[i] = 1.0f / sqrtf(variance + p.eps);
      const double dot = static_cast<double>(total(1)) - static_cast<double>(mean[i]) * of_g.sum_g;
      score[i] = nan_to_num(static_cast<double>(p.scale) * (r[i] * (dot * power) + bias));
    }
    bad = __any_sync(kAllLanes, bad);
    double top = Max::of(score[0], score[1]);
#pragma unroll
    for (int distance = 16; distance > 0; distance >>= 1)
      top = Max::of(top, __shfl_xor_sync(kAllLanes, top, distance));
#pragma unroll
    for (int i = 0; i < 2; ++i) e[i] = expf(static_cast<float>(fmax(score[i] - top, -200.0)));
    const float total = warp_sum(e[0] + e[1]);
    float product = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float weight = e[i] / total * r[i];
      weights[i * 32 + lane] = weight;  // of stage 0: its cells are the positions
      product = fmaf(weight, mean[i], product);
    }
    product = warp_sum(product);
    if (lane == 0) {
      constant = product;
      give_up = bad;
      p.give_up[query] = bad;
    }
  }
  __syncthreads();
  if (give_up) return;

  // Weights of the cells.
  constexpr int kEnd1 = kMiningWindow * kMiningSide<1>, kEnd2 = kEnd1 + kMiningWindow * kMiningSide<2>,
                kEnd3 = kEnd2 + kMiningWindow * kMiningSide<3>;
  const int at = threadIdx.x;
  if (at < kEnd1)
    fill_strip<1>(weights, strips, at);
  else if (at < kEnd2)
    fill_strip<2>(weights, strips + kEnd1, at - kEnd1);
  else if (at < kEnd3)
    fill_strip<3>(weights, strips + kEnd2, at - kEnd2);
  __syncthreads();
  if (at < kMiningCells<1>)
    fill_weight<1>(strips, weights + kFirstMiningCell<1>, at);
  else if (at >= 64 && at < 64 + kMiningCells<2>)
    fill_weight<2>(strips + kEnd1, weights + kFirstMiningCell<2>, at - 64);
  else if (at >= 96 && at < 96 + kMiningCells<3>)
    fill_weight<3>(strips + kEnd2, weights + kFirstMiningCell<3>, at - 96);
  __syncthreads();

  // Write output.
  T* row = reinterpret_cast<T*>(shared + warp * kMiningRow);  // where the scalars were
  T* out = static_cast<T*>(p.out) + query * p.out_stride;
  for_stage(stage, [&](auto s) {
    Part<T, s.value>(a, query, warp).combine(base, weights + kFirstMiningCell<s.value>, constant, row, out);
  });
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kMiningWindowThreads, 2)
    patch_mining_bf16(const __grid_constant__ MiningWindowParams a) {
  mine<__nv_bfloat16>(a);
}
extern "C" __global__ void __launch_bounds__(kMiningWindowThreads, 2)
    patch_mining_f16(const __grid_constant__ MiningWindowParams a) {
  mine<__half>(a);
}

}  // namespace mgm::cuda
