#pragma once
#include "flash.h"

namespace mgm::cuda {

// Keys are taken in segments, each with sums of its own, which are then merged in order. A whole number of
// tiles.
constexpr int kSegment = 256;

constexpr int kPagedHeadDims[] = {32, 64, 128, 256, 512};

constexpr int paged_keys(int d) {
  return d <= 64 ? 64 : d <= 256 ? 32 : 16;
}
// For prefill. A warp has 16 rows, as their results lie in registers twice: of the segment and of those
// before.
constexpr FlashTile wide_tile(int d) {
  return d <= 128 ? FlashTile{d, paged_keys(d), 1, 4, 1} : FlashTile{d, paged_keys(d), 1, 6, 2};
}
constexpr int kMaxWide = 256;
// For decode: all warps work on the same 16 rows. They repeat each other's scores, but what takes time is
// memory.
constexpr FlashTile narrow_tile(int d) {
  return d == 32 ? FlashTile{d, paged_keys(d), 1, 2, 2} : FlashTile{d, paged_keys(d), 1, 4, 4};
}

// For 0 <= n < 2^31 and 1 <= d <= 2^16: n / d = n * (2^shift / d + 1) >> shift.
constexpr uint32_t division_shift(int64_t d) {
  uint32_t shift = 31;
  while (int64_t{1} << (shift - 31) < d) ++shift;
  return shift;
}

struct PagedAttentionParams {
  FlashParams queries;
  const char* k_pages;  // [pages, KV heads, page_size] rows of row_bytes
  const char* v_pages;
  const int32_t* block_table;   // [sequences, max_blocks]
  const int32_t* context_lens;  // [sequences]
  // Null: a block walks all segments. Else [segments, tokens, heads, partial_stride]: what a segment gives
  // for a row, d columns that are not divided yet, and behind them its maximum and its sum.
  float* partial;
  int32_t partial_stride;
  int32_t max_blocks, room;  // of a sequence, in pages and keys
  uint32_t row_bytes, kv_heads, pages, page_size;
  uint32_t page_multiplier, page_shift;  // n / page_size = n * page_multiplier >> page_shift
};

constexpr int kCombineThreads = 128;

}  // namespace mgm::cuda
