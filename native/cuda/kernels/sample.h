#pragma once
#include <cstdint>

#include "fault.h"

namespace mgm::cuda {

constexpr int kSampleThreads = 512, kSampleBins = 2048;

struct SampleParams {
  const float* logits;     // [B, V]
  const float* options;    // [B, 6]
  const int32_t* state;    // [B, 5]
  const int32_t* history;  // [B, H] or null
  const uint8_t* mask;     // [B, ceil(V/8)] or null
  int32_t* ids;            // [B]
  float* logprobs;         // [B, 1 + listed]
  int32_t* top_ids;        // [B, listed] or null
  float* weights;          // scratch [B, V]
  float* changed;          // scratch [B, V], with mask or history
  int32_t* counts;         // scratch [B, V], with history
  Fault* fault;
  int64_t logits_stride;
  int32_t vocab, history_room, listed, padding;
};

}  // namespace mgm::cuda
