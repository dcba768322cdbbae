#pragma once
#include <cstdint>

#include "fault.h"

namespace mgm::cuda {

// A row's logits are shared out in chunks, a block each, whatever else is in the batch.
constexpr int kSampleThreads = 256, kSampleChunk = 4096, kSampleBins = 2048;

// What the kernels of a launch tell each other about a row.
struct SampleRow {
  int32_t arrived[4];   // blocks done, of each kernel that counts them
  int32_t bad;          // NaN logits, or a history that cannot be
  int32_t penalized;    // entries of `penalties`
  int32_t mode;         // SampleMode
  float top;            // the largest allowed logit
  float raw_top;        // the largest logit
  uint32_t floor;       // key at or above which logits may be kept by top-k and top-p
  uint32_t list_floor;  // key at or above which all of the most likely lie
  int32_t padding;
  double log_sum;  // log of the sum of e^(logit - raw_top)
  double total;    // the weight of all
};
enum class SampleMode : int32_t { done, draw, cut };

struct SampleChunk {
  unsigned long long best;  // rank of its largest allowed logit
  double raw_sum;           // of e^(logit - raw_top), with the chunk's own raw_top
  float raw_top;
  int32_t kept;  // candidates in it
};

struct SamplePenalty {
  int32_t id, count;  // an id of the history and how often it occurs there
};

struct SampleParams {
  const float* logits;     // [B, V]
  const float* options;    // [B, 6]
  const int32_t* state;    // [B, 5]
  const int32_t* history;  // [B, H] or null
  const uint8_t* mask;     // [B, ceil(V/8)] or null
  int32_t* ids;            // [B]
  float* logprobs;         // [B, 1 + listed]
  int32_t* top_ids;        // [B, listed] or null
  // Scratch.
  SampleRow* rows;             // [B]
  SampleChunk* chunks;         // [B, chunks]
  double* chunk_weights;       // [B, chunks]
  unsigned long long* masses;  // [B, bins]
  int32_t* counts;             // [B, bins]
  int32_t* list_counts;        // [B, bins], with listed
  int32_t* found;              // [B, V]: candidates, those of a chunk from its first id on
  int32_t* candidates;         // [B, V]: the same without gaps
  float* values;               // [B, V]: their logits
  float* weights;              // [B, V]: their weights
  float* changed;              // [B, V], with mask or history: logits after both
  int32_t* occurrences;        // [B, V], with history
  SamplePenalty* penalties;    // [B, H], with history
  Fault* fault;
  int64_t logits_stride;
  int32_t vocab, history_room, listed, padding;
};

}  // namespace mgm::cuda
