// Varlen softmax attention, FlashAttention-2: out = softmax(scale q k^T) v with neither scores nor weights in
// memory. q [Tq, H, D], k and v [Tk, KV, D] in bf16 or f16, f32 inside; the weights are rounded to that type
// for their product with v, results once.
//
// A block computes the rows of attention_tile() for one KV head: 128 rows (64 of D = 512) against tiles of 16
// to 64 keys, which cp.async brings in ahead. A warp has its rows' queries, scores and results in
// registers; only the maximum is exchanged in the loop, between the four lanes that share a row. Blocks find
// their sequence in cu_q, so nothing waits for the host; the last rows, which see most, start first.
//
// At least 4 D FLOP for each pair of a row and a key it sees, and 2 bytes an element of q, k, v and out; k
// and v are read again by each block of a sequence, from L2.
#include "attention.h"

#include "flash.cuh"

namespace mgm::cuda {
namespace {

template <int kD>
struct AttentionConfig {
  static constexpr FlashTile kTile = attention_tile(kD);
};

template <class T, int kD>
__device__ __forceinline__ void attend(const AttentionParams& params) {
  using Rows = FlashRows<T, AttentionConfig<kD>>;
  extern __shared__ __align__(128) unsigned char memory[];
  const FlashParams& p = params.queries;
  const int kv_head = blockIdx.y;
  if (blockIdx.x == 0 && kv_head == 0) {
    check_offsets(p.cu_q, p.sequences, p.tokens, p.fault, FaultKind::query_offset);
    check_offsets(params.cu_k, p.sequences, params.total_keys, p.fault, FaultKind::key_offset);
  }

  const RowBlock block = find_rows<Rows::kRows>(p.cu_q, p.sequences, p.tokens, p.group,
                                                static_cast<int>(gridDim.x - 1 - blockIdx.x));
  const int k_begin = block.sequence < 0 ? 0 : params.cu_k[block.sequence];
  const int keys = block.sequence < 0 ? 0 : params.cu_k[block.sequence + 1] - k_begin;
  if (block.first >= block.queries * p.group || !is_within(block.q_begin, block.queries, p.tokens) ||
      !is_within(k_begin, keys, params.total_keys))
    return;

  Rows rows(p, block, kv_head, keys, params.causal, shared_address(memory));
  const int seen = rows.seen_by_any(), tiles = (seen + Rows::kKeys - 1) / Rows::kKeys;
  const int64_t head = int64_t{kv_head} * p.head_stride * 2;
  const char* k = params.k + int64_t{k_begin} * params.k_stride + head;
  const char* v = params.v + int64_t{k_begin} * params.v_stride + head;
  // Zeros behind the last.
  const auto copy = [&](int tile, uint32_t to, const char* from, int64_t stride) {
    const int key = tile * Rows::kKeys;
    copy_rows<Rows::kD, Rows::kKeys, Rows::kThreads>(to, p.d, [&](int row) {
      return RowSource{from + int64_t{key + row} * stride, key + row < seen};
    });
  };
  const auto copy_values = [&](int tile) {
    copy(tile, rows.next_at + Rows::kStageBytes / 2, v, params.v_stride);
    commit_copies();
  };
  const auto copy_tile = [&](int tile) {
    copy(tile, rows.next_at, k, params.k_stride);
    if constexpr (Rows::kByTurns)
      commit_copies();
    else
      copy_values(tile);
  };

  typename Rows::State state;
  if (tiles > 0) {
    rows.copy_queries(shared_address(memory));
    copy_tile(0);
    wait_copies<0>();
    __syncthreads();
    rows.hold_queries();
    rows.next_at += rows.forward;
  }
  rows.attend_all(state, 0, rows.seen_by_all() / Rows::kKeys, tiles, copy_tile, copy_tile, copy_values);
  state.sum_lanes();
  rows.store(state, memory);
}

// Head h of row r, d elements, at out[r][h], filled up with zeros.
__device__ __forceinline__ void pack(const PackHeadsParams& p) {
  const int64_t i = int64_t{blockIdx.x} * kPackHeadsThreads + threadIdx.x;
  if (i >= p.elements) return;
  const int64_t head = i / p.padded, row = head / p.heads;
  const int column = static_cast<int>(i - head * p.padded);
  const uint16_t x = column < p.d ? p.x[row * p.stride + (head - row * p.heads) * p.d + column] : 0;
  p.out[i] = p.negate ? x ^ 0x8000 : x;
}

}  // namespace

#define MGM_ATTENTION(d)                                                       \
  extern "C" __global__ void __launch_bounds__(attention_tile(d).threads(), 1) \
      attention_bf16_##d(const __grid_constant__ AttentionParams p) {          \
    attend<__nv_bfloat16, d>(p);                                               \
  }                                                                            \
  extern "C" __global__ void __launch_bounds__(attention_tile(d).threads(), 1) \
      attention_f16_##d(const __grid_constant__ AttentionParams p) {           \
    attend<__half, d>(p);                                                      \
  }
MGM_ATTENTION(32)
MGM_ATTENTION(64)
MGM_ATTENTION(80)
MGM_ATTENTION(96)
MGM_ATTENTION(128)
MGM_ATTENTION(256)
MGM_ATTENTION(512)
#undef MGM_ATTENTION

extern "C" __global__ void __launch_bounds__(kPackHeadsThreads)
    pack_heads(const __grid_constant__ PackHeadsParams p) {
  pack(p);
}

}  // namespace mgm::cuda
