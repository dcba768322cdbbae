#pragma once
#include <cstdint>

namespace mgm::cuda {

constexpr int kMiningStages = 4;

struct MiningStage {
  const void* data;  // [B, height, width, channels], strides in elements
  int64_t batch_stride, row_stride, column_stride;
  int32_t height, width, channels, first_channel;
};

struct MiningParams {
  const float* g;  // [B * grid * grid, channels (+ 1)]
  void* out;       // [B * grid * grid, channels]
  MiningStage stages[kMiningStages];
  int64_t g_stride, out_stride, queries;
  int32_t grid, channels;
  int32_t has_bias;
  float eps, scale;
  int32_t padding;
};

// patch_mining_any: every geometry.
constexpr int kMiningThreads = 256;

// Position i of an axis of the window = sum over k < taps of weight[i * taps + k] * cell[start[i] + k].
struct MiningAxis {
  int32_t taps;
  int32_t cells;         // that a window spans at most
  int32_t first_start;   // of this axis in the block's array of starts
  int32_t first_weight;  // and of weights
};

struct MiningAnyParams {
  MiningParams p;
  MiningAxis y[kMiningStages], x[kMiningStages];
  int32_t first_cell[kMiningStages];  // of each stage in the block's arrays over cells
  int32_t window_y, window_x, downscale;
  int32_t cells, starts, weights;  // lengths of those arrays
  int32_t aligned;                 // 16-byte loads and stores are possible
  int32_t padding;
  char* scratch;  // work_bytes a block, or null: shared memory
  int64_t work_bytes;
};

}  // namespace mgm::cuda
