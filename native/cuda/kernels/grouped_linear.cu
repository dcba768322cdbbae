// Mixture of experts: each row of x times the experts that the router chose for it.
//   gather:   x [T, K],     out[t k + j] = act(x[t] W^T), gated or not, W = expert ids[t, j]
//   scatter:  x [T k, K],   out[t] = residual[t] + sum_j weights[t, j] x[t k + j] W^T, j in order
//
// The ids are known to the device only. One block sorts the assignments t k + j by expert (group_rows) and
// cuts each expert's into tiles; the product (gemm.cuh) is launched for as many tiles as there can be, and a
// block looks up its expert and rows. In what order an expert's rows are sorted is left to chance: a row's
// result is the same in every place. The scatter form leaves f32 products in scratch, which combine_* adds up
// row by row: sums kept by expert would depend on which experts a token happens to have.
//
// At least 2 T k K N FLOP, the weights of the experts in use once, 2 T K + 2 T k N bytes (gather) or 2 T k K
// + 2 T N (scatter; the products add 8 T k N). With few rows an expert, time is that of its weights; missing
// rows of a tile are not read.
#include "gemm.cuh"
#include "grouped_linear.h"

namespace mgm::cuda {
namespace {

extern __shared__ __align__(128) unsigned char shared[];

// A loader of x for multiply() (see StridedRows): the rows of one group; zeros past them.
template <TileName kTile>
class GroupRows {
 public:
  __device__ __forceinline__ GroupRows(const GroupedParams& p, const Group& group) {
    const int row = threadIdx.x / 4, piece = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool exists = row + i * kStep < group.rows;
      const int assignment = exists ? p.order[group.first + row + i * kStep] : 0;
      from_[i] = static_cast<const uint16_t*>(p.x) + assignment / p.sharing * p.x_stride + piece * 8;
      left_[i] = exists ? p.k - piece * 8 : 0;
    }
    to_ = swizzled<4>(row, piece);
  }
  static constexpr bool kOneRun = true;
  __device__ __forceinline__ void copy(uint32_t slice) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      copy_async(slice + to_ + i * kStep * kBlockK * 2, from_[i], left_[i] > 0 ? 16 : 0);
      from_[i] += kBlockK;
      left_[i] -= kBlockK;
    }
  }

 private:
  static constexpr int kStep = threads_of(kTile) / 4, kCopies = kTiles[kTile].m / kStep;
  const uint16_t* from_[kCopies];
  int left_[kCopies];
  uint32_t to_;
};

template <class T, WeightType kWeights, TileName kTile>
__device__ __forceinline__ void multiply_group(const GroupedParams& p) {
  const Group group = p.groups[blockIdx.x];
  if (group.rows == 0) return;
  const int first_panel = blockIdx.y * (kTiles[kTile].n / kPanelRows);
  GroupRows<kTile> x(p, group);
  PanelBlocks<kTile, kWeights> w(p.w[group.expert], first_panel, p.panels, p.blocks);
  Accumulators<kTile> sums;
  multiply<T, kWeights, kTile>(sums, x, w, p.blocks, shared_address(shared));
  finish<T, kTile>(p.epilogue, sums, reinterpret_cast<float*>(shared),
                   first_output<kTile>(p.epilogue, blockIdx.y),
                   [&](int row) { return row < group.rows ? p.order[group.first + row] : -1; });
}

// A block is a row of the result, N neighbouring columns a thread and turn.
template <class T, int N>
__device__ __forceinline__ void combine(const CombineParams& p) {
  const int64_t t = blockIdx.x;
  for (int column = threadIdx.x * N; column < p.n; column += kCombineThreads * N) {
    float sum[N] = {};
    if (p.residual) {
      const auto added = load_vector<N>(static_cast<const T*>(p.residual) + t * p.residual_stride + column);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] = to_float(added.at[i]);
    }
    for (int j = 0; j < p.k; ++j) {
      const auto product = load_vector<N>(p.products + (t * p.k + j) * p.n + column);
      const float weight = p.weights[t * p.k + j];
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] = fmaf(weight, product.at[i], sum[i]);
    }
    Vector<T, N> out;
#pragma unroll
    for (int i = 0; i < N; ++i) out.at[i] = from_float<T>(sum[i]);
    store_vector(static_cast<T*>(p.out) + t * p.n + column, out);
  }
}

}  // namespace

// Sorts assignments by expert. An id that names none gives a fault, and counts as 0.
extern "C" __global__ void __launch_bounds__(kGroupThreads)
    group_rows(const __grid_constant__ GroupParams p) {
  __shared__ int counts[kMostExperts], starts[kMostExperts], tiles[kMostExperts + 1];
  const int thread = threadIdx.x, lane = thread % 32;
  if (thread < p.experts) counts[thread] = 0;
  __syncthreads();

  // The assignment's place among those of its expert: counts grow once a warp and expert.
  const auto take = [&](int i, int& expert) {
    const bool exists = i < p.assignments;
    expert = exists ? p.ids[i] : -1;
    if (exists && (expert < 0 || expert >= p.experts)) expert = 0;
    const unsigned same = __match_any_sync(kAllLanes, expert);
    const int leader = __ffs(static_cast<int>(same)) - 1;
    int place = 0;
    if (exists && lane == leader) place = atomicAdd(&counts[expert], __popc(same));
    return __shfl_sync(kAllLanes, place, leader) + __popc(same & ((1u << lane) - 1));
  };
  int expert;
  for (int first = 0; first < p.assignments; first += kGroupThreads) {
    const int i = first + thread;
    if (i < p.assignments && (p.ids[i] < 0 || p.ids[i] >= p.experts))
      report(p.fault, FaultKind::expert_id, p.ids[i], 0, p.experts, i);
    take(i, expert);
  }
  __syncthreads();

  // Where each expert's rows and tiles begin.
  if (thread == 0) {
    int rows = 0, tile = 0;
    for (int e = 0; e < p.experts; ++e) {
      starts[e] = rows;
      tiles[e] = tile;
      rows += counts[e];
      tile += (counts[e] + p.tile_rows - 1) / p.tile_rows;
    }
    tiles[p.experts] = tile;
  }
  __syncthreads();
  for (int i = thread; i < p.most_groups; i += kGroupThreads) {
    Group group{};
    int e = 0;
    while (e < p.experts && tiles[e + 1] <= i) ++e;
    if (e < p.experts) {
      const int before = (i - tiles[e]) * p.tile_rows;
      group = {e, starts[e] + before, min(p.tile_rows, counts[e] - before), 0};
    }
    p.groups[i] = group;
  }
  __syncthreads();
  if (thread < p.experts) counts[thread] = 0;
  __syncthreads();
  for (int first = 0; first < p.assignments; first += kGroupThreads) {
    const int i = first + thread, place = take(i, expert);
    if (i < p.assignments) p.order[starts[expert] + place] = i;
  }
}

#define MULTIPLY_TILE(name, T, weights, tile, blocks)                    \
  extern "C" __global__ void __launch_bounds__(threads_of(tile), blocks) \
      name(const __grid_constant__ GroupedParams p) {                    \
    multiply_group<T, weights, tile>(p);                                 \
  }
#define MULTIPLY(name, T, weights)                                          \
  MULTIPLY_TILE(name##_large, T, weights, (shaped_for(weights, kLarge)), 2) \
  MULTIPLY_TILE(name##_small, T, weights, (shaped_for(weights, kSmall)), 4) \
  MULTIPLY_TILE(name##_thin, T, weights, (shaped_for(weights, kThin)), 4)
MULTIPLY(grouped_bf16, __nv_bfloat16, WeightType::half)
MULTIPLY(grouped_bf16_int8, __nv_bfloat16, WeightType::int8)
MULTIPLY(grouped_bf16_int4, __nv_bfloat16, WeightType::int4)
MULTIPLY(grouped_f16, __half, WeightType::half)
MULTIPLY(grouped_f16_int8, __half, WeightType::int8)
MULTIPLY(grouped_f16_int4, __half, WeightType::int4)

#define COMBINE(name, T, N)                                     \
  extern "C" __global__ void __launch_bounds__(kCombineThreads) \
      name(const __grid_constant__ CombineParams p) {           \
    combine<T, N>(p);                                           \
  }
COMBINE(combine_bf16, __nv_bfloat16, 4)
COMBINE(combine_bf16_1, __nv_bfloat16, 1)
COMBINE(combine_f16, __half, 4)
COMBINE(combine_f16_1, __half, 1)

}  // namespace mgm::cuda
