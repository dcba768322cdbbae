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
constexpr float kCancelled = 256.0f;
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

// Of an element of a tile of products: columns are permuted by row, two by two, so that neither writing a
// tile nor reading a column of it meets bank conflicts.
__device__ __forceinline__ int place_of(int row, int column) {
  return row * 8 + (column ^ row / 4 * 2);
}

// Of a position among the weights of positions: rows of a window are nine apart, against bank conflicts.
__device__ __forceinline__ int skewed(int position) {
  return position + position / kMiningWindow;
}

// The part of the window's stage that a warp works on: every kMiningStageWarps-th slice. Only the warp itself
// copies into its slots, waits for them and reads them.
template <class T, int kStage>
struct Part {
  static constexpr int kCells = kMiningCells<kStage>;

  const MiningWindowParams& a;
  const MiningStage& stage;
  const MiningShare& share;
  char* shared;
  const T* map;  // of the picture
  int lane, number;

  __device__ __forceinline__ Part(const MiningWindowParams& a, char* shared, int64_t query, int warp)
      : a(a), stage(a.p.stages[kStage]), share(a.shares[warp]), shared(shared) {
    map = static_cast<const T*>(stage.data) + query / (a.p.grid * a.p.grid) * stage.batch_stride;
    lane = static_cast<int>(threadIdx.x) % 32;
    number = warp % kMiningStageWarps;
  }

  // Of the whole stage.
  __device__ __forceinline__ int slice_of(int i) const { return i * kMiningStageWarps + number; }
  __device__ __forceinline__ uint32_t slot_of(int i) const {
    return shared_address(shared) + static_cast<uint32_t>(share.at + i % share.slots * (kCells * kMiningRow));
  }

  // Four cells at a time, a piece of 16 bytes a lane.
  __device__ __forceinline__ void load(int i) const {
    const int piece = lane % 8, first = lane / 8, c = slice_of(i) * kMiningSlice + piece * 8;
    const int valid = c < stage.channels ? 16 : 0;
    const T* from = map + (valid ? c : 0);
    const int32_t* cells =
        reinterpret_cast<const int32_t*>(shared + a.ones_at + kMiningRow) + kFirstMiningCell<kStage> + first;
    const uint32_t even = slot_of(i) + swizzled<8>(first, piece), odd = even ^ 64;
#pragma unroll
    for (int cell = 0; cell < kCells; cell += 4)
      if (kCells % 4 == 0 || cell + 4 <= kCells || cell + first < kCells)
        copy_async((cell % 8 == 0 ? even : odd) + cell * kMiningRow, from + cells[cell], valid);
  }
  // The next slice, into the slot that is free now; a group in any case, so that groups count iterations.
  __device__ __forceinline__ void load_next(int i) const {
    __syncwarp();
    if (i >= 0 && i < share.slices) load(i);
    commit_copies();
  }
  __device__ __forceinline__ void wait() const {
    wait_copies_but(share.slots - 1);
    __syncwarp();
  }

  __device__ __forceinline__ void start() const {
    for (int i = 0; i < share.slots; ++i) {
      load(i);
      commit_copies();
    }
  }

  // The products of the warp's slices: cells as rows times cells, pieces of g and ones as columns. An 8x8
  // matrix of ldmatrix is the same fragment of a as of b, so every cell is read once. The warps of a stage
  // add up in their order.
  __device__ __forceinline__ void measure() const {
    constexpr int kTiles = kMiningTiles<kStage>;
    constexpr int kTail = kCells / 8 * 8;  // first of the eight columns that end in pieces of g and ones
    const uint32_t base = shared_address(shared);
    float c[kTiles][4] = {};
    for (int i = 0; i < share.slices; ++i) {
      wait();
      const uint32_t slot = slot_of(i);
      const uint32_t pieces =
          base + static_cast<uint32_t>((a.first_slice[kStage] + slice_of(i)) * kMiningPieces * kMiningRow);
      // Row `row` of: cells, pieces of g, ones. Those that share a matrix with cells are the last of eight.
      const auto row_at = [&](int row, int piece) {
        if (row < kCells) return slot + swizzled<8>(row, piece);
        const int extra = row - kCells;
        if (extra < kMiningPieces) return pieces + extra * kMiningRow + (piece ^ (4 + extra)) * 16;
        return base + a.ones_at + (piece ^ 7) * 16;
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
      load_next(i + share.slots);
    }
    float* tiles = reinterpret_cast<float*>(shared) + kFirstMiningTile<kStage> * 128;
    __syncthreads();  // the tiles lie where the pieces of g were
#pragma unroll 1
    for (int part = 0; part < kMiningStageWarps; ++part) {
      if (part == number) {
#pragma unroll
        for (int t = 0; t < 2 * kTiles; ++t) {
          float2* at =
              reinterpret_cast<float2*>(tiles + t / 2 * 128 + place_of(t % 2 * 8 + lane / 4, lane % 4 * 2));
          const float2 before = part == 0 ? make_float2(0.0f, 0.0f) : *at;
          *at = make_float2(before.x + c[t / 2][t % 2 * 2], before.y + c[t / 2][t % 2 * 2 + 1]);
        }
      }
      __syncthreads();
    }
  }

  // out[c] = `back` times the sum over cells of weight * cell[c], minus `constant`: channels as rows, the
  // three pieces of the weights as columns.
  __device__ __forceinline__ void combine(float back, float constant, T* out) const {
    constexpr int kSteps = kMiningPadded<kStage> / 16;
    // The warp's own 128 bytes for the way out.
    T* row =
        reinterpret_cast<T*>(shared + kMiningRowsAt + (kStage * kMiningStageWarps + number) * kMiningRow);
    uint32_t b[kSteps][2], cell_at[kSteps];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const T* weight = reinterpret_cast<const T*>(shared + kMiningWeightsAt) + lane / 4 * kMiningAllPadded +
                        kFirstMiningPadded<kStage> + k * 16 + lane % 4 * 2;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        b[k][half] = lane / 4 < kMiningPieces ? *reinterpret_cast<const uint32_t*>(weight + half * 8) : 0;
      cell_at[k] = swizzled<8>(min(k * 16 + lane % 8 + lane / 16 * 8, kCells - 1), lane / 8 % 2);
    }

    // Slices, the last first: those are still there.
    wait_copies<0>();
    for (int i = share.slices - 1; i >= 0; --i) {
      if (i < share.slices - share.slots) wait();
      __syncwarp();  // `row` is free again
      const uint32_t slot = slot_of(i);
#pragma unroll
      for (int m = 0; m < kMiningSlice / 16; ++m) {
        float c[4] = {};
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          uint32_t x[4];
          load_matrices_transposed(x, slot + (cell_at[k] ^ m * 32));
          multiply_add<T>(c, x, b[k][0], b[k][1]);
        }
        // Lane 4 i has the first two pieces of channel i (and i + 8), the next lane has the third.
        const float low = __shfl_down_sync(kAllLanes, c[0], 1), low8 = __shfl_down_sync(kAllLanes, c[2], 1);
        if (lane % 4 == 0) {
          row[m * 16 + lane / 4] = from_float<T>(fmaf(c[0] + (c[1] + low), back, -constant));
          row[m * 16 + lane / 4 + 8] = from_float<T>(fmaf(c[2] + (c[3] + low8), back, -constant));
        }
      }
      load_next(i - share.slots);
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

// The product of cell i with column j: a cell, a piece of g, or ones. Only for the tiles that `measure`
// fills: neighbours with i <= j.
template <int kStage>
__device__ __forceinline__ float product(const float* tiles, int i, int j) {
  const int m = i / 16, n = j / 8;
  const int tile = kStage == 0   ? 2 * m + (n == kMiningCells<0> / 8)
                   : kStage == 1 ? (m == 0 ? min(n, 3) : n + m + 1)
                                 : n;
  return tiles[(kFirstMiningTile<kStage> + tile) * 128 + place_of(i % 16, j % 8)];
}

// What the cells say of position (y, x): the sum over the channels of the stage, g . x and |x|^2, where x =
// sum of w[i] cell[i] over four neighbours. bound: the square of sum of w[i] |cell[i]|, which says how much
// may have cancelled in |x|^2.
struct Moments {
  float sum, dot, square, bound;
};

template <int kStage>
__device__ __forceinline__ Moments interpolate(const float* tiles, int y, int x) {
  constexpr int kSide = kMiningSide<kStage>, kCells = kMiningCells<kStage>;
  const auto sum_of = [&](int i) { return product<kStage>(tiles, i, kCells + 3); };
  const auto dot_of = [&](int i) {
    return product<kStage>(tiles, i, kCells) +
           (product<kStage>(tiles, i, kCells + 1) + product<kStage>(tiles, i, kCells + 2));
  };
  if constexpr (kStage == 0) {
    const int i = y * kSide + x;
    const float square = product<0>(tiles, i, i);
    return {sum_of(i), dot_of(i), square, square};
  } else {
    const auto place = [](int at) { return (2 * at + 1 + (1 << kStage)) >> (kStage + 1); };
    const int cy = place(y), cx = place(x);
    const float bottom = hat<kStage>(y, cy + 1), right = hat<kStage>(x, cx + 1);
    const int first = cy * kSide + cx, cell[4] = {first, first + 1, first + kSide, first + kSide + 1};
    const float w[4] = {(1.0f - bottom) * (1.0f - right), (1.0f - bottom) * right, bottom * (1.0f - right),
                        bottom * right};
    Moments m = {};
    float length = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float square = product<kStage>(tiles, cell[i], cell[i]);
      m.sum = fmaf(w[i], sum_of(cell[i]), m.sum);
      m.dot = fmaf(w[i], dot_of(cell[i]), m.dot);
      m.square = fmaf(w[i] * w[i], square, m.square);
      length = fmaf(w[i], sqrtf(square), length);
#pragma unroll
      for (int j = i + 1; j < 4; ++j)
        m.square = fmaf(2.0f * w[i] * w[j], product<kStage>(tiles, cell[i], cell[j]), m.square);
    }
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
    sum = fmaf(hat<kStage>(x, cell), of_position[skewed(y * kMiningWindow + x)], sum);
  strip[at] = sum;
}
// The weight of a cell of a padded stage.
template <int kStage>
__device__ __forceinline__ float weight_of(const float* strip, int cell) {
  constexpr int kSide = kMiningSide<kStage>;
  if (cell >= kMiningCells<kStage>) return 0.0f;
  float sum = 0.0f;
#pragma unroll
  for (int y = 0; y < kMiningWindow; ++y)
    sum = fmaf(hat<kStage>(y, cell / kSide), strip[y * kSide + cell % kSide], sum);
  return sum;
}

// Where the cells of the window are in the picture's maps. Past the border the border repeats, which is what
// interpolation clamped at the border amounts to.
__device__ __forceinline__ void find_cells(const MiningWindowParams& a, int64_t query, int32_t* cells) {
  const int at = threadIdx.x;
  if (at >= kMiningAllCells) return;
  const int s = (at >= kFirstMiningCell<1>)+(at >= kFirstMiningCell<2>)+(at >= kFirstMiningCell<3>);
  const int first = s == 0   ? 0
                    : s == 1 ? kFirstMiningCell<1>
                    : s == 2 ? kFirstMiningCell<2>
                             : kFirstMiningCell<3>;
  const int side = (kMiningWindow >> s) + (s > 0 ? 2 : 0), halo = s > 0;
  const MiningStage& stage = a.p.stages[s];
  const int gy = static_cast<int>(query / a.p.grid % a.p.grid), gx = static_cast<int>(query % a.p.grid);
  const int y = gy * (kMiningWindow >> s) - halo + (at - first) / side;
  const int x = gx * (kMiningWindow >> s) - halo + (at - first) % side;
  cells[at] = min(max(y, 0), stage.height - 1) * static_cast<int>(stage.row_stride) +
              min(max(x, 0), stage.width - 1) * static_cast<int>(stage.column_stride);
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

// What one warp finds for all.
struct Found {
  float sum_g;  // of g over 2^exponent
  int exponent;
  float constant;  // sum over positions of weight times mean
  int weight_exponent;
  bool give_up;
};

// Pieces of g, brought near 2^kRoom, and the row of ones.
template <class T>
__device__ __forceinline__ void prepare_g(const MiningWindowParams& a, const float* g, char* shared,
                                          Found* found) {
  constexpr int kSlices = kThreads / kMiningSlice;  // at a time
  static_assert(kThreads % kMiningSlice == 0, "a thread has the same place in every slice");
  const int place = static_cast<int>(threadIdx.x) % kMiningSlice;
  const int first = static_cast<int>(threadIdx.x) / kMiningSlice;
  float value[kMiningGPerThread], top = 0.0f, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kMiningGPerThread; ++i) {
    const int slice = first + i * kSlices;
    if (slice >= a.total_slices) break;
    int c = slice * kMiningSlice + place, end = a.p.stages[0].channels;
    int shift = 0;
#pragma unroll
    for (int s = 1; s < kMiningStages; ++s)
      if (slice >= a.first_slice[s]) {
        shift = a.p.stages[s].first_channel - a.first_slice[s] * kMiningSlice;
        end = a.p.stages[s].first_channel + a.p.stages[s].channels;
      }
    c += shift;
    value[i] = c < end ? g[c] : 0.0f;
    top = fmaxf(top, fabsf(value[i]));
  }
  const int exponent = exponent_of(block_reduce<Max, kThreads>(top)) - kRoom;
  const float factor = power_of_two(-exponent);
  T* to[kMiningPieces];
#pragma unroll
  for (int j = 0; j < kMiningPieces; ++j)
    to[j] =
        reinterpret_cast<T*>(shared + (first * kMiningPieces + j) * kMiningRow + (place / 8 ^ (4 + j)) * 16) +
        place % 8;
#pragma unroll
  for (int i = 0; i < kMiningGPerThread; ++i) {
    if (first + i * kSlices >= a.total_slices) break;
    const float x = value[i] * factor;
    sum += x;
    T piece[kMiningPieces];
    split(x, piece);
#pragma unroll
    for (int j = 0; j < kMiningPieces; ++j) to[j][i * kSlices * kMiningPieces * kMiningSlice] = piece[j];
  }
  if (threadIdx.x < kMiningSlice) reinterpret_cast<T*>(shared + a.ones_at)[threadIdx.x] = from_float<T>(1.0f);
  sum = block_reduce<Sum, kThreads>(sum);
  if (threadIdx.x == 0) {
    found->sum_g = sum;
    found->exponent = exponent;
  }
}

// Softmax over the positions, two a lane of one warp: their weights a r. `moments`: [4][stage][position].
__device__ __forceinline__ void weigh_positions(const MiningParams& p, int64_t query, const float* moments,
                                                float* weights, Found* found) {
  const int lane = threadIdx.x;
  const float n = static_cast<float>(p.channels);
  const double power = static_cast<double>(power_of_two(found->exponent));
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
    bad = bad || !((variance + p.eps) * kCancelled >= total(3) / n);
    r[i] = 1.0f / sqrtf(variance + p.eps);
    const double dot = static_cast<double>(total(1)) - static_cast<double>(mean[i]) * found->sum_g;
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
  float weight_sum = 0.0f, constant = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float weight = e[i] / total * r[i];
    weights[skewed(i * 32 + lane)] = weight;
    weight_sum += weight;
    constant = fmaf(weight, mean[i], constant);
  }
  weight_sum = warp_sum(weight_sum);
  constant = warp_sum(constant);
  if (lane == 0) {
    found->constant = constant;
    found->weight_exponent = exponent_of(weight_sum) - kRoom;
    found->give_up = bad;
    p.give_up[query] = bad;
  }
}

template <class T>
__device__ void mine(const MiningWindowParams& a) {
  extern __shared__ __align__(128) char shared[];
  __shared__ Found found;
  const int64_t query = blockIdx.x;
  const int at = threadIdx.x, warp = at / 32, stage = warp / kMiningStageWarps;
  const auto part = [&](auto s) { return Part<T, s.value>(a, shared, query, warp); };
  const float* tiles = reinterpret_cast<const float*>(shared);
  float* moments = reinterpret_cast<float*>(shared + kMiningMomentsAt);
  float* positions = reinterpret_cast<float*>(shared + kMiningPositionsAt);
  float* strips = reinterpret_cast<float*>(shared + kMiningStripsAt);
  T* weights = reinterpret_cast<T*>(shared + kMiningWeightsAt);

  // Products of the cells.
  find_cells(a, query, reinterpret_cast<int32_t*>(shared + a.ones_at + kMiningRow));
  __syncthreads();
  for_stage(stage, [&](auto s) { part(s).start(); });
  prepare_g<T>(a, a.p.g + query * a.p.g_stride, shared, &found);
  for_stage(stage, [&](auto s) { part(s).measure(); });

  // Positions, of each stage and then of all.
  if (at < kMiningStages * kPositions) {
    const int y = at % kPositions / kMiningWindow, x = at % kMiningWindow;
    for_stage(at / kPositions, [&](auto s) {
      const Moments m = interpolate<s.value>(tiles, y, x);
      moments[at] = m.sum;
      moments[kMiningStages * kPositions + at] = m.dot;
      moments[2 * kMiningStages * kPositions + at] = m.square;
      moments[3 * kMiningStages * kPositions + at] = m.bound;
    });
  }
  __syncthreads();
  if (warp == 0) weigh_positions(a.p, query, moments, positions, &found);
  __syncthreads();
  if (found.give_up) return;

  // Weights of the cells: along the rows, then down the columns.
  constexpr int kEnd1 = kMiningWindow * kMiningSide<1>, kEnd2 = kEnd1 + kMiningWindow * kMiningSide<2>,
                kEnd3 = kEnd2 + kMiningWindow * kMiningSide<3>;
  if (at < kEnd1)
    fill_strip<1>(positions, strips, at);
  else if (at < kEnd2)
    fill_strip<2>(positions, strips + kEnd1, at - kEnd1);
  else if (at < kEnd3)
    fill_strip<3>(positions, strips + kEnd2, at - kEnd2);
  __syncthreads();
  if (at < kMiningAllPadded) {
    const float weight = at < kFirstMiningPadded<1>   ? positions[skewed(at)]
                         : at < kFirstMiningPadded<2> ? weight_of<1>(strips, at - kFirstMiningPadded<1>)
                         : at < kFirstMiningPadded<3>
                             ? weight_of<2>(strips + kEnd1, at - kFirstMiningPadded<2>)
                             : weight_of<3>(strips + kEnd2, at - kFirstMiningPadded<3>);
    T piece[kMiningPieces];
    split(weight * power_of_two(-found.weight_exponent), piece);
#pragma unroll
    for (int j = 0; j < kMiningPieces; ++j) weights[j * kMiningAllPadded + at] = piece[j];
  }
  __syncthreads();

  // Write output.
  T* out = static_cast<T*>(a.p.out) + query * a.p.out_stride;
  for_stage(stage,
            [&](auto s) { part(s).combine(power_of_two(found.weight_exponent), found.constant, out); });
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
