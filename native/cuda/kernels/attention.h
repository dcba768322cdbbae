#pragma once
#include "flash.h"

namespace mgm::cuda {

constexpr int kHeadDims[] = {32, 64, 80, 96, 128, 256, 512};

// Two row tiles a warp use every fragment of K and V twice, as long as their results fit the registers. One
// stage instead of two lets eight warps share a multiprocessor that has 100 KiB of memory: two blocks, or
// with large heads one of 99 KiB.
constexpr FlashTile attention_tile(int d) {
  return d < 64     ? FlashTile{d, 64, 2, 4, 1}
         : d < 96   ? FlashTile{d, 64, 2, 4, 1, 1}
         : d <= 128 ? FlashTile{d, 32, 2, 4, 1}
         : d == 256 ? FlashTile{d, 32, 1, 8, 1, 1}
                    : FlashTile{d, 16, 1, 8, 2, 1};
}

struct AttentionParams {
  FlashParams queries;
  const char* k;  // [total keys, KV heads, head_stride], k_stride bytes a key
  const char* v;
  const int32_t* cu_k;  // [sequences + 1]
  int32_t k_stride, v_stride;
  int32_t total_keys;
  int32_t causal;
};

constexpr int kPackHeadsThreads = 256;
struct PackHeadsParams {
  const uint16_t* x;  // [rows, heads, d], rows `stride` elements apart
  uint16_t* out;      // [rows, heads, padded]
  int64_t stride, elements;
  int32_t heads, d, padded;
  int32_t negate;
};

}  // namespace mgm::cuda
