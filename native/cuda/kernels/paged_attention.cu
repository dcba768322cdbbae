// Causal attention of each sequence's newest queries over its KV pages [pages, KV, page_size, D]: decode (one
// query a sequence) and chunked prefill are the same op. Types and sums as in attention.cu.
//
// Keys are taken in segments of 256 from key 0 on, each with an online softmax of its own over tiles of keys;
// segments are merged in order. A row's bits therefore depend on its query and keys alone: not on the chunk
// it came in, nor on which of these computes it:
//   wide    64 rows a block (48 for D = 256), which walks the segments and merges them in registers;
//   narrow  16 rows a block, their columns divided over its warps;
//   split   narrow, but a block for each segment; combine then merges what they left in memory.
// Pages are looked up once for a tile, one tile before cp.async fetches its keys and values.
//
// At least 4 D FLOP for each pair of a row and a key it sees, and 4 D bytes for each key and KV head, which
// bounds decode; split writes and reads 4 (D + 2) bytes more for each row and segment.
#include "paged_attention.h"

#include "flash.cuh"

namespace mgm::cuda {
namespace {

constexpr uint32_t kNowhere = 0xffffffffu;

template <int kD>
struct Wide {
  static constexpr FlashTile kTile = wide_tile(kD);
};
template <int kD>
struct Narrow {
  static constexpr FlashTile kTile = narrow_tile(kD);
};

// Context lengths must leave room for the queries and fit the pages; 0 is a sequence that is not there.
__device__ __forceinline__ bool is_context(const PagedAttentionParams& p, int keys, int queries) {
  return keys == 0 || (keys >= queries && keys <= p.room);
}

__device__ __forceinline__ float* partial_of(const PagedAttentionParams& p, int segment, int64_t row) {
  const int64_t rows = int64_t{p.queries.tokens} * p.kv_heads * p.queries.group;
  return p.partial + (segment * rows + row) * p.partial_stride;
}

template <class T, class Config>
__device__ __forceinline__ void attend(const PagedAttentionParams& params) {
  using Rows = FlashRows<T, Config>;
  constexpr int kKeys = Rows::kKeys, kSegmentTiles = kSegment / kKeys;
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ uint32_t places[2][kKeys];
  const FlashParams& p = params.queries;
  const int kv_head = blockIdx.y;
  const bool split = params.partial != nullptr;
  if (blockIdx.x == 0 && kv_head == 0 && blockIdx.z == 0) {
    check_offsets(p.cu_q, p.sequences, p.tokens, p.fault, FaultKind::query_offset);
    for (int s = threadIdx.x; s < p.sequences; s += Rows::kThreads) {
      const int queries = p.cu_q[s + 1] - p.cu_q[s], keys = params.context_lens[s];
      if (queries > 0 && !is_context(params, keys, queries))
        report(p.fault, FaultKind::context_length, keys, queries, params.room, s);
    }
  }

  const RowBlock block = find_rows<Rows::kRows>(p.cu_q, p.sequences, p.tokens, p.group,
                                                static_cast<int>(gridDim.x - 1 - blockIdx.x));
  const int keys = block.sequence < 0 ? 0 : params.context_lens[block.sequence];
  if (block.first >= block.queries * p.group || !is_within(block.q_begin, block.queries, p.tokens) ||
      !is_context(params, keys, block.queries))
    return;

  Rows rows(p, block, kv_head, keys, true, shared_address(memory));
  const int seen = rows.seen_by_any();
  const int first_tile = split ? static_cast<int>(blockIdx.z) * kSegmentTiles : 0;
  int last_tile = (seen + kKeys - 1) / kKeys;
  if (split) last_tile = min(last_tile, first_tile + kSegmentTiles);
  if (split && first_tile >= last_tile) return;
  const int32_t* table = params.block_table + int64_t{block.sequence} * params.max_blocks;

  // Rows of the pages that hold the keys of a tile.
  int bad_entry = -1;
  const auto look_up = [&](int tile) {
    const int key = tile * kKeys + static_cast<int>(threadIdx.x);
    if (threadIdx.x >= kKeys) return;
    uint32_t place = kNowhere;
    if (key < last_tile * kKeys && key < seen) {
      const auto entry =
          static_cast<uint32_t>(static_cast<uint64_t>(key) * params.page_multiplier >> params.page_shift);
      const auto page = static_cast<uint32_t>(table[entry]);
      if (page < params.pages)
        place = (page * params.kv_heads + kv_head) * params.page_size + key - entry * params.page_size;
      else
        bad_entry = static_cast<int>(entry);
    }
    places[tile % 2][threadIdx.x] = place;
  };
  const auto copy_tile = [&](int tile) {
    const uint32_t* place = places[tile % 2];
    const auto copy = [&](uint32_t half, const char* pages) {
      copy_rows<Rows::kD, kKeys, Rows::kThreads>(half, p.d, [&](int row) {
        return RowSource{pages + static_cast<uint64_t>(place[row]) * params.row_bytes,
                         place[row] != kNowhere};
      });
    };
    copy(rows.next_at, params.k_pages);
    copy(rows.next_at + Rows::kStageBytes / 2, params.v_pages);
    commit_copies();
  };

  const auto start = [&](int tile) {
    look_up(tile);
    look_up(tile + 1);
    __syncthreads();
    copy_tile(tile);
  };

  typename Rows::State total, part;
  total.reset();
  if (first_tile < last_tile) {
    rows.copy_queries(shared_address(memory));
    start(first_tile);
    wait_copies<0>();
    __syncthreads();
    rows.hold_queries();
    rows.next_at += Rows::kStageBytes;
  }
  for (int tile = first_tile; tile < last_tile; tile += kSegmentTiles) {
    const int segment_end = min(last_tile, tile + kSegmentTiles);
    rows.attend_all(
        part, tile, min(segment_end, rows.seen_by_all() / kKeys), segment_end,
        [&](int next) {
          copy_tile(next);
          look_up(next + 1);
        },
        start);
    part.sum_lanes();
    if (!split) total.merge(part, p.scale);
  }
  if (bad_entry >= 0)
    report(p.fault, FaultKind::page, table[bad_entry], bad_entry, params.pages, block.sequence);
  if (!split) {
    rows.store(total, memory);
    return;
  }
#pragma unroll
  for (int i = 0; i < Rows::kRowTiles; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = rows.row(i, h);
      if (row >= rows.rows) continue;
      float* to =
          partial_of(params, static_cast<int>(blockIdx.z), rows.offset(row, params.kv_heads * p.group, 1));
#pragma unroll
      for (int j = 0; j < Rows::kColumnTiles; ++j)
        if (rows.column(j) < p.d)
          *reinterpret_cast<float2*>(to + rows.column(j)) =
              make_float2(part.o[i][j][2 * h], part.o[i][j][2 * h + 1]);
      if (rows.column(0) == 0)
        *reinterpret_cast<float2*>(to + p.d) = make_float2(part.top[i][h], part.sum[i][h]);
    }
}

// A warp merges the segments of a row.
template <class T>
__device__ __forceinline__ void combine(const PagedAttentionParams& params) {
  const FlashParams& p = params.queries;
  const int heads = static_cast<int>(params.kv_heads) * p.group, lane = threadIdx.x % 32;
  const int row = static_cast<int>((int64_t{blockIdx.x} * kCombineThreads + threadIdx.x) / 32);
  const int token = row / heads;
  if (token >= p.tokens) return;

  // The sequence is the last that begins at the token or before.
  int sequence = -1, high = p.sequences;
  while (sequence < high) {
    const int middle = (sequence + high + 1) / 2;
    if (p.cu_q[middle] <= token)
      sequence = middle;
    else
      high = middle - 1;
  }
  int seen = 0;
  if (sequence >= 0 && sequence < p.sequences) {
    const int begin = p.cu_q[sequence], queries = p.cu_q[sequence + 1] - begin;
    const int keys = params.context_lens[sequence];
    if (is_within(begin, queries, p.tokens) && is_context(params, keys, queries))
      seen = max(0, keys - queries + token - begin + 1);
  }

  for (int column = lane * 4; column < p.d; column += 32 * 4) {
    float top = kNothingSeen, sum = 0.0f, o[4] = {};
    for (int segment = 0; segment * kSegment < seen; ++segment) {
      const float* from = partial_of(params, segment, row);
      const float4 part = *reinterpret_cast<const float4*>(from + column);
      const float2 state = *reinterpret_cast<const float2*>(from + p.d);
      const Merge both(top, state.x, p.scale);
      top = both.top;
      sum = both(sum, state.y);
      o[0] = both(o[0], part.x);
      o[1] = both(o[1], part.y);
      o[2] = both(o[2], part.z);
      o[3] = both(o[3], part.w);
    }
    const float r = normalizer(sum, seen > 0);
    *reinterpret_cast<uint2*>(p.out + int64_t{row} * p.d + column) =
        make_uint2(pack_two<T>(__fmul_rn(o[0], r), __fmul_rn(o[1], r)),
                   pack_two<T>(__fmul_rn(o[2], r), __fmul_rn(o[3], r)));
  }
}

}  // namespace

#define MGM_PAGED_ATTENTION(shape, Shape, d)                                     \
  extern "C" __global__ void __launch_bounds__(shape##_tile(d).threads(), 1)     \
      paged_##shape##_bf16_##d(const __grid_constant__ PagedAttentionParams p) { \
    attend<__nv_bfloat16, Shape<d>>(p);                                          \
  }                                                                              \
  extern "C" __global__ void __launch_bounds__(shape##_tile(d).threads(), 1)     \
      paged_##shape##_f16_##d(const __grid_constant__ PagedAttentionParams p) {  \
    attend<__half, Shape<d>>(p);                                                 \
  }
MGM_PAGED_ATTENTION(wide, Wide, 32)
MGM_PAGED_ATTENTION(wide, Wide, 64)
MGM_PAGED_ATTENTION(wide, Wide, 128)
MGM_PAGED_ATTENTION(wide, Wide, 256)
MGM_PAGED_ATTENTION(narrow, Narrow, 32)
MGM_PAGED_ATTENTION(narrow, Narrow, 64)
MGM_PAGED_ATTENTION(narrow, Narrow, 128)
MGM_PAGED_ATTENTION(narrow, Narrow, 256)
MGM_PAGED_ATTENTION(narrow, Narrow, 512)
#undef MGM_PAGED_ATTENTION

extern "C" __global__ void __launch_bounds__(kCombineThreads)
    paged_combine_bf16(const __grid_constant__ PagedAttentionParams p) {
  combine<__nv_bfloat16>(p);
}
extern "C" __global__ void __launch_bounds__(kCombineThreads)
    paged_combine_f16(const __grid_constant__ PagedAttentionParams p) {
  combine<__half>(p);
}

}  // namespace mgm::cuda
