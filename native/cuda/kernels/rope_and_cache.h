#pragma once
#include <cstdint>

#include "fault.h"

namespace mgm::cuda {

constexpr int kRopeThreads = 256, kRopeMaxHalf = kRopeThreads;

struct RopeParams {
  const void* qkv;  // [T, (H + 2*KV) * D]
  const int32_t *positions, *slots;
  const float* inv_freq;    // [D/2]
  void *k_pages, *v_pages;  // [pages, KV, page_size, D]
  void* out;                // [T, H, D]
  Fault* fault;
  int64_t tokens, qkv_stride, slot_count;
  int32_t heads, kv_heads, half, page_size;
};

}  // namespace mgm::cuda
