// Flash attention for the rows of a warp: scores, online softmax and weighted values in registers.
//
// A row is a query of one head; the heads of a KV head's group are rows of the same block, so that K and V
// are read once for all of them. Row r of a sequence is query r / group, head r % group of the group.
//
// What a row's bits depend on is its query and the keys it sees, in tiles from key 0 on: a tile that it sees
// nothing of changes nothing, and neither the rows beside it nor the division of columns over warps take
// part.
#pragma once
#include "flash.h"
#include "mma.cuh"

namespace mgm::cuda {

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float kNothingSeen = -INFINITY;

// Scores are taken relative to the row's greatest times `scale`, rounded: one fused multiply-add each. Above
// this its rounding would show; then, and before anything was seen, careful code subtracts before it scales.
// Other code leaves that out of its loop: it takes rows to have seen a score of -kExactReference / scale
// already, and has the work done again where the greatest is that in the end, or too great.
constexpr float kExactReference = 16777216.0f;

__device__ __forceinline__ bool is_exact_reference(float scaled_top) {
  return fabsf(scaled_top) <= kExactReference;
}
__device__ __forceinline__ float safe_top(float top) {
  return top == kNothingSeen ? 0.0f : top;
}

// What sums relative to maximum `before` are worth relative to `now`.
__device__ __forceinline__ float rescaling(float before, float now, float scale) {
  const float reference = __fmul_rn(now, scale);
  return exp2_approx(is_exact_reference(reference) ? __fsub_rn(__fmul_rn(before, scale), reference)
                                                   : __fmul_rn(__fsub_rn(before, safe_top(now)), scale));
}

// Brings a sum relative to one maximum and one relative to another together.
struct Merge {
  float top, of_total, of_part;

  __device__ __forceinline__ Merge(float total_top, float part_top, float scale)
      : top(fmaxf(total_top, part_top)),
        of_total(rescaling(total_top, top, scale)),
        of_part(rescaling(part_top, top, scale)) {}
  __device__ __forceinline__ float operator()(float total, float part) const {
    return fmaf(total, of_total, __fmul_rn(part, of_part));
  }
};

// A row that sees no key is zero.
__device__ __forceinline__ float normalizer(float sum, bool sees) {
  return sees ? 1.0f / sum : 0.0f;
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// Unnormalized results of a warp's rows. In [i][h], lane l has row 16 i + 8 h + l / 4; its columns of column
// tile j are 8 j + 2 (l % 4) and the next, in o[i][j][2 h] and [2 h + 1].
template <int kRowTiles, int kColumnTiles>
struct FlashState {
  float o[kRowTiles][kColumnTiles][4];
  float top[kRowTiles][2];  // greatest score
  float sum[kRowTiles][2];  // of the weights; until sum_lanes() only those of the lane's keys

  __device__ __forceinline__ void reset(float seen_before = kNothingSeen) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[i][j][e] = 0.0f;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[i][h] = seen_before;
        sum[i][h] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void sum_lanes() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) sum[i][h] = quad_sum(sum[i][h]);
  }

  // Both with their lanes summed.
  __device__ __forceinline__ void merge(const FlashState& part, float scale) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Merge both(top[i][h], part.top[i][h], scale);
        top[i][h] = both.top;
        sum[i][h] = both(sum[i][h], part.sum[i][h]);
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) o[i][j][e] = both(o[i][j][e], part.o[i][j][e]);
      }
  }

  __device__ __forceinline__ bool is_exact(float seen_before, float scale) const {
    bool exact = true;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        exact = exact && top[i][h] > seen_before && is_exact_reference(__fmul_rn(top[i][h], scale));
    return exact;
  }

  // What scores are to be taken relative to for their weights, and sums so far brought to it.
  template <bool kCareful, int kKeyTiles>
  __device__ __forceinline__ void rescale(float (&s)[kRowTiles][kKeyTiles][4], float scale,
                                          float (&reference)[kRowTiles][2]) {
    float now[kRowTiles][2], change[kRowTiles][2];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float most = fmaxf(s[i][0][2 * h], s[i][0][2 * h + 1]);
#pragma unroll
        for (int j = 1; j < kKeyTiles; ++j) most = fmaxf(most, fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
        now[i][h] = fmaxf(top[i][h], quad_max(most));
        reference[i][h] = __fmul_rn(now[i][h], scale);
        change[i][h] = __fsub_rn(__fmul_rn(top[i][h], scale), reference[i][h]);
      }
    if constexpr (kCareful) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (is_exact_reference(reference[i][h])) continue;
          const float base = safe_top(now[i][h]);
          reference[i][h] = 0.0f;
          change[i][h] = __fmul_rn(__fsub_rn(top[i][h], base), scale);
#pragma unroll
          for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
            for (int e = 2 * h; e < 2 * h + 2; ++e) s[i][j][e] = __fsub_rn(s[i][j][e], base);
        }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float alpha = exp2_approx(change[i][h]);
        top[i][h] = now[i][h];
        sum[i][h] = __fmul_rn(sum[i][h], alpha);
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) o[i][j][e] = __fmul_rn(o[i][j][e], alpha);
      }
  }

  // The weight of a score, added to the row's sum.
  __device__ __forceinline__ float weigh(int i, int h, float s, float scale, float reference) {
    const float weight = exp2_approx(fmaf(s, scale, -reference));
    sum[i][h] = __fadd_rn(sum[i][h], weight);
    return weight;
  }
};

// The rows of a block: `rows` rows of a sequence of `queries` queries from row `first` on.
struct RowBlock {
  int sequence;  // -1: belongs to none
  int q_begin, queries, first;
};

// The rows that block `index` of blocks_of_rows() is for. cu_q [sequences + 1].
template <int kRows>
__device__ RowBlock find_rows(const int32_t* cu_q, int sequences, int tokens, int group, int index) {
  const auto begin = [&](int s) { return s == 0 ? 0 : s == sequences + 2 ? tokens : cu_q[s - 1]; };
  const auto first_block = [&](int s) { return begin(s) * group / kRows + s; };
  int low = 0, high = sequences + 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first_block(middle) <= index)
      low = middle;
    else
      high = middle - 1;
  }
  const int at = begin(low);
  return {low <= sequences ? low - 1 : -1, at, begin(low + 1) - at, (index - first_block(low)) * kRows};
}

// Offsets of sequences must not decrease and stay within [0, total]. For the threads of a block.
__device__ inline void check_offsets(const int32_t* cu, int sequences, int total, Fault* fault,
                                     FaultKind kind) {
  for (int i = threadIdx.x; i <= sequences; i += blockDim.x) {
    const int before = i > 0 ? cu[i - 1] : 0;
    if (cu[i] < before || cu[i] > total) report(fault, kind, cu[i], before, total, i);
  }
}

__device__ __forceinline__ bool is_within(int begin, int count, int total) {
  return begin >= 0 && count >= 0 && begin <= total - count;
}

// Copies kRows rows to shared memory, rows of kD elements with the padding of FlashTile. source(row) says
// where the row is and whether; columns from `width` (a multiple of 8) on and rows that are nowhere become
// zeros.
struct RowSource {
  const char* at;
  bool valid;
};
template <int kD, int kRows, int kThreads, class Source>
__device__ __forceinline__ void copy_rows(uint32_t to, int width, Source source) {
  constexpr int kPieces = kD / 8, kPass = kThreads / kPieces, kRowBytes = (kD + 8) * 2;
  const int first = static_cast<int>(threadIdx.x) / kPieces, piece = static_cast<int>(threadIdx.x) % kPieces;
  if (kThreads % kPieces != 0 && first >= kPass) return;
#pragma unroll
  for (int i = 0; i < (kRows + kPass - 1) / kPass; ++i) {
    const int row = first + i * kPass;
    if (kRows % kPass != 0 && row >= kRows) break;
    const RowSource from = source(row);
    copy_async(to + row * kRowBytes + piece * 16, from.at + piece * 16,
               from.valid && piece * 8 < width ? 16 : 0);
  }
}

struct Nothing {
  __device__ __forceinline__ void operator()(int) const {}
};

// The rows of a block: its queries, what they see, and a warp's work on a tile of keys. Config::kTile is the
// tile.
template <class T, class Config>
struct FlashRows {
  static constexpr FlashTile kTile = Config::kTile;
  static constexpr int kD = kTile.d, kThreads = kTile.threads(), kRows = kTile.rows();
  static constexpr int kRowTiles = kTile.row_tiles, kKeyTiles = kTile.keys / 8, kSteps = kD / 16;
  static constexpr int kColumnTiles = kD / kTile.split / 8;
  static constexpr int kKeys = kTile.keys, kRowBytes = kTile.row_bytes(), kStageBytes = kTile.stage_bytes();
  // Queries stay in registers where there is room.
  static constexpr bool kHeld = kRowTiles * kSteps <= 4;
  // Copies are begun in the gaps that products leave, where their addresses still fit the registers.
  static constexpr bool kCopiesFirst = kD >= 256;
  static constexpr bool kByTurns = kTile.stages == 1;
  // A product waits for the one that it is added to: where the tile has few scores, even and odd steps are
  // summed apart.
  static constexpr int kChains = kRowTiles * kKeyTiles < 4 ? 2 : 1;
  static_assert(kD % 16 == 0 && kTile.keys % 16 == 0 && kColumnTiles % 2 == 0, "whole pairs of mma tiles");
  using State = FlashState<kRowTiles, kColumnTiles>;

  const FlashParams& p;
  const RowBlock block;
  const int kv_head, keys;
  const bool causal;
  const int rows;  // of kRows, that are there
  const int lane = threadIdx.x % 32;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 / kTile.split * kRowTiles * 16;
  const int warp_column = static_cast<int>(threadIdx.x) / 32 % kTile.split * kColumnTiles * 8;
  // Where the lane begins to read the rows' queries and the stage of the tile at hand, and where copies of
  // the next one go to.
  uint32_t q_at, k_at, v_at, next_at;
  int forward = kByTurns ? 0 : kStageBytes;  // from the stage at hand to the other
  uint32_t sees = 0;                         // bit 2 i + h: row (i, h) sees a key
  uint32_t held[kHeld ? kSteps : 1][kRowTiles][4];

  __device__ __forceinline__ FlashRows(const FlashParams& params, const RowBlock& at, int head, int n_keys,
                                       bool is_causal, uint32_t shared_queries)
      : p(params),
        block(at),
        kv_head(head),
        keys(n_keys),
        causal(is_causal),
        rows(min(kRows, at.queries * params.group - at.first)) {
    const uint32_t stages = shared_queries + kRows * kRowBytes;
    q_at = shared_queries + (warp_row + lane % 16) * kRowBytes + lane / 16 * 16;
    k_at = stages + (lane % 8 + lane / 16 * 8) * kRowBytes + lane / 8 % 2 * 16;
    v_at = stages + kStageBytes / 2 + lane % 16 * kRowBytes + lane / 16 * 16 + warp_column * 2;
    next_at = stages;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) sees |= static_cast<uint32_t>(seen_by(row(i, h)) > 0) << (2 * i + h);
  }

  // The row in the block of FlashState's [i][h], and the column of o[i][j][2 h].
  __device__ __forceinline__ int row(int i, int h) const {
    return warp_row + i * 16 + h * 8 + lane / 4;
  }
  __device__ __forceinline__ int column(int j) const {
    return warp_column + j * 8 + lane % 4 * 2;
  }

  // Rows of the block beyond its last are taken for more queries.
  __device__ __forceinline__ int seen_by(int row) const {
    if (!causal) return keys;
    return max(0, min(keys, keys - block.queries + (block.first + row) / p.group + 1));
  }
  __device__ __forceinline__ int seen_by_all() const {
    return seen_by(0);
  }
  __device__ __forceinline__ int seen_by_any() const {
    return seen_by(rows - 1);
  }

  // Element 0 of a row in a tensor of `stride` elements a query and `head_stride` a head.
  __device__ __forceinline__ int64_t offset(int row, int64_t stride, int head_stride) const {
    const int at = block.first + row, query = at / p.group;
    return (block.q_begin + query) * stride + (kv_head * p.group + at - query * p.group) * head_stride;
  }

  __device__ __forceinline__ void copy_queries(uint32_t to) const {
    copy_rows<kD, kRows, kThreads>(to, p.d, [&](int row) {
      const uint16_t* at = p.q + (row < rows ? offset(row, p.q_stride, p.head_stride) : 0);
      return RowSource{reinterpret_cast<const char*>(at), row < rows};
    });
  }

  __device__ __forceinline__ void load_queries(uint32_t (&a)[kRowTiles][4], int step) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) load_matrices(a[i], q_at + i * 16 * kRowBytes + step * 32);
  }

  // When the queries have arrived for everyone.
  __device__ __forceinline__ void hold_queries() {
    if constexpr (kHeld) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) load_queries(held[step], step);
    }
  }

  // The tile of keys from `key` on. Not kCareful: all rows see all of them, and FlashState::is_exact() is to
  // be asked in the end. copy() begins to bring the next tile, or by turns its keys when these are done with,
  // and copy_values() the values of this one.
  template <bool kCareful, class Copy, class CopyValues>
  __device__ __forceinline__ void attend(State& state, int key, const int (&seen)[kRowTiles][2], Copy copy,
                                         CopyValues copy_values) const {
    if constexpr (kByTurns)
      copy_values();
    else if constexpr (kCopiesFirst)
      copy();
    // Scores.
    float sums[kChains][kRowTiles][kKeyTiles][4] = {};
    const auto multiply = [&](const uint32_t(&a)[kRowTiles][4], int j, int step) {
      auto& s = sums[step % kChains];
      uint32_t b[4];
      load_matrices(b, k_at + j * 8 * kRowBytes + step * 32);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        multiply_add<T>(s[i][j], a[i], b[0], b[1]);
        multiply_add<T>(s[i][j + 1], a[i], b[2], b[3]);
      }
    };
    if constexpr (kHeld) {
      // Keys first: the maximum of the first ones is looked for while the others are multiplied.
#pragma unroll
      for (int j = 0; j < kKeyTiles; j += 2)
#pragma unroll
        for (int step = 0; step < kSteps; ++step) multiply(held[step], j, step);
    } else {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a[kRowTiles][4];
        load_queries(a, step);
#pragma unroll
        for (int j = 0; j < kKeyTiles; j += 2) multiply(a, j, step);
      }
    }
    auto& s = sums[0];
    if constexpr (kChains == 2) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[i][j][e] += sums[1][i][j][e];
    }
    if constexpr (kByTurns) begin();
    if constexpr (kByTurns || !kCopiesFirst) copy();

    // Mask.
    if (kCareful) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int left = seen[i][h] - key - lane % 4 * 2;
#pragma unroll
          for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (j * 8 + e >= left) s[i][j][2 * h + e] = kNothingSeen;
        }
    }
    float reference[kRowTiles][2];
    state.template rescale<kCareful>(s, p.scale, reference);

    // Weighted values.
#pragma unroll
    for (int j = 0; j < kKeyTiles; j += 2) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int h = e % 2;
          const auto weight = [&](float score) { return state.weigh(i, h, score, p.scale, reference[i][h]); };
          const float first = weight(s[i][j + e / 2][2 * h]), second = weight(s[i][j + e / 2][2 * h + 1]);
          a[i][e] = pack_two<T>(first, second);
        }
#pragma unroll
      for (int c = 0; c < kColumnTiles; c += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, v_at + j * 8 * kRowBytes + c * 16);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          multiply_add<T>(state.o[i][c], a[i], b[0], b[1]);
          multiply_add<T>(state.o[i][c + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  // The state of tiles [first, end), of which every row sees those before `full_end` whole. copy(tile) begins
  // to bring a tile to next_at, by turns its keys and copy_values(tile) its values; restart(tile) does what
  // copy does when it is not the next one. The first is under way, and at the end tile `end` is.
  template <class Copy, class Restart, class CopyValues = Nothing>
  __device__ __forceinline__ void attend_all(State& state, int first, int full_end, int end, Copy copy,
                                             Restart restart, CopyValues copy_values = {}) {
    int tile = first, seen[kRowTiles][2];
    if (tile < full_end) {
      const float seen_before = -kExactReference / p.scale;
      state.reset(seen_before);
      for (; tile < full_end; ++tile) {
        begin();
        attend<false>(
            state, tile * kKeys, seen, [&] { copy(tile + 1); }, [&] { copy_values(tile); });
        turn();
      }
      if (__syncthreads_or(!state.is_exact(seen_before, p.scale))) {
        tile = first;
        wait_copies<0>();
        restart(tile);
        turn();
      }
    }
    if (tile == first) state.reset();
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) seen[i][h] = seen_by(row(i, h));
    const int most_seen = warp_row < rows ? seen_by(min(warp_row + kRowTiles * 16, rows) - 1) : 0;
    for (; tile < end; ++tile) {
      begin();
      if constexpr (kByTurns) {
        // All warps, for they wait for one another in it.
        attend<true>(
            state, tile * kKeys, seen, [&] { copy(tile + 1); }, [&] { copy_values(tile); });
      } else {
        copy(tile + 1);
        if (tile * kKeys < most_seen)
          attend<true>(
              state, tile * kKeys, seen, [] {}, [] {});
      }
      turn();
    }
  }

  // What was copied has arrived, and everyone is done with what was before it.
  __device__ __forceinline__ void begin() const {
    wait_copies<0>();
    __syncthreads();
  }
  // To the other stage.
  __device__ __forceinline__ void turn() {
    k_at += forward;
    v_at += forward;
    next_at -= forward;
    forward = -forward;
  }

  // Results over the sums of their weights, by way of the queries' memory: for all threads of the block,
  // `state` with its lanes summed.
  __device__ __forceinline__ void store(const State& state, unsigned char* queries) const {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float r = normalizer(state.sum[i][h], sees >> (2 * i + h) & 1);
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j)
          *reinterpret_cast<uint32_t*>(queries + row(i, h) * kRowBytes + column(j) * 2) =
              pack_two<T>(__fmul_rn(state.o[i][j][2 * h], r), __fmul_rn(state.o[i][j][2 * h + 1], r));
      }
    __syncthreads();
    const int64_t stride = static_cast<int64_t>(gridDim.y) * p.group * p.out_d;
    if (p.out_d % 8 == 0) {
      const int pieces = p.out_d / 8;
      for (int i = threadIdx.x; i < rows * pieces; i += kThreads) {
        const int from = i / pieces, piece = i - from * pieces;
        *reinterpret_cast<uint4*>(p.out + offset(from, stride, p.out_d) + piece * 8) =
            *reinterpret_cast<const uint4*>(queries + from * kRowBytes + piece * 16);
      }
    } else {
      for (int i = threadIdx.x; i < rows * p.out_d; i += kThreads) {
        const int from = i / p.out_d, at = i - from * p.out_d;
        p.out[offset(from, stride, p.out_d) + at] =
            *reinterpret_cast<const uint16_t*>(queries + from * kRowBytes + at * 2);
      }
    }
  }
};

}  // namespace mgm::cuda
