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
  const float* g;    // [B * grid * grid, channels (+ 1)]
  void* out;         // [B * grid * grid, channels]
  uint8_t* give_up;  // [B * grid * grid]: patch_mining leaves this query to patch_mining_any, or null
  MiningStage stages[kMiningStages];
  int64_t g_stride, out_stride, queries;
  int32_t grid, channels;
  int32_t has_bias;
  float eps, scale;
  int32_t padding;
};

// -- patch_mining: windows of 8 x 8 positions on maps of 1, 1/2, 1/4 and 1/8 of their size

constexpr int kMiningWindow = 8;      // positions a side
constexpr int kMiningStageWarps = 3;  // share the slices of a stage: 3, 6, 12 and 24 of MGM's tower
constexpr int kMiningWindowThreads = 32 * kMiningStages * kMiningStageWarps;
constexpr int kMiningSlice = 64;       // channels of a slice: a cell's row of 128 bytes
constexpr int kMiningMostSlots = 8;    // that a warp keeps in shared memory
constexpr int kMiningGPerThread = 16;  // values of g in registers: at most 16 * 384 channels

// Cells a side that a window of stage s takes part in, the halo of the interpolation included.
template <int s>
inline constexpr int kMiningSide = (kMiningWindow >> s) + (s > 0 ? 2 : 0);
template <int s>
inline constexpr int kMiningCells = kMiningSide<s> * kMiningSide<s>;
// Tiles of 16 x 8 products of cells with cells, g and ones that the scalars of a stage are taken from.
template <int s>
inline constexpr int kMiningTiles = s < 2 ? 8 : 5 - s;
// Cells as mma counts them.
template <int s>
inline constexpr int kMiningPadded = (kMiningCells<s> + 15) / 16 * 16;
// Of the stages before s.
template <int s>
inline constexpr int kFirstMiningCell = kFirstMiningCell<s - 1> + kMiningCells<s - 1>;
template <>
inline constexpr int kFirstMiningCell<0> = 0;
template <int s>
inline constexpr int kFirstMiningTile = kFirstMiningTile<s - 1> + kMiningTiles<s - 1>;
template <>
inline constexpr int kFirstMiningTile<0> = 0;
template <int s>
inline constexpr int kFirstMiningPadded = kFirstMiningPadded<s - 1> + kMiningPadded<s - 1>;
template <>
inline constexpr int kFirstMiningPadded<0> = 0;

constexpr int kMiningRow = kMiningSlice * 2;  // bytes
constexpr int kMiningPieces = 3;              // that f32 numbers are split into
constexpr int kMiningAllCells = kFirstMiningCell<kMiningStages>;
constexpr int kMiningAllPadded = kFirstMiningPadded<kMiningStages>;

// A block's shared memory, in bytes: the pieces of g for the first half of the work, and in their place what
// the second half computes (tiles, moments, weights of positions, strips, weights of cells, rows on their way
// out); a row of ones; where the cells are; the slots.
constexpr int kMiningMomentsAt = kFirstMiningTile<kMiningStages> * 16 * 8 * 4;
constexpr int kMiningPositionsAt = kMiningMomentsAt + 4 * kMiningStages * kMiningWindow * kMiningWindow * 4;
constexpr int kMiningStripsAt = kMiningPositionsAt + kMiningWindow * (kMiningWindow + 1) * 4;
constexpr int kMiningWeightsAt =
    kMiningStripsAt + kMiningWindow * (kMiningSide<1> + kMiningSide<2> + kMiningSide<3>)*4;
constexpr int kMiningRowsAt = (kMiningWeightsAt + kMiningPieces * kMiningAllPadded * 2 + 127) / 128 * 128;
constexpr int kMiningScalarsEnd = kMiningRowsAt + kMiningStages * kMiningStageWarps * kMiningRow;
constexpr int kMiningCellsBytes = (kMiningAllCells * 4 + 127) / 128 * 128;

// What warp w of a stage's kMiningStageWarps works on: its slices w, w + 3, ... of which it keeps up to
// `slots` in shared memory. What does not stay is read again for the result.
struct MiningShare {
  int32_t slices, slots, at;  // at: byte offset of the first slot
};

struct MiningWindowParams {
  MiningParams p;
  MiningShare shares[kMiningStages * kMiningStageWarps];
  int32_t first_slice[kMiningStages];
  int32_t total_slices;
  int32_t ones_at;  // byte offset of the row of ones; where the cells are follows
};

// -- patch_mining_any: every geometry

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
