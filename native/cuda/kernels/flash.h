// The tiles of flash attention, for its kernels and their launchers.
#pragma once
#include <cstdint>

#include "fault.h"

namespace mgm::cuda {

// A block's work: rows() queries against tiles of keys, which go by in one or two stages of shared memory.
struct FlashTile {
  int d;          // head dimension; smaller ones are filled up with zeros
  int keys;       // in a tile
  int row_tiles;  // a warp has 16 * row_tiles rows
  int warps;
  int split;  // warps that share their rows: each computes all their scores and its part of their columns
  // 2: a tile comes while the one before it is worked on. 1, for twice the rows in the memory: its values
  // come while its keys are worked on, and the next one's keys while its values are.
  int stages = 2;

  constexpr int threads() const { return warps * 32; }
  constexpr int rows() const { return warps / split * row_tiles * 16; }
  // Padded by one 16-byte piece, so that a piece of each of eight neighbouring rows fills all banks once.
  constexpr int row_bytes() const { return (d + 8) * 2; }
  constexpr int stage_bytes() const { return 2 * keys * row_bytes(); }
  constexpr int shared_bytes() const { return rows() * row_bytes() + stages * stage_bytes(); }
};

// What attention and paged_attention have in common. Elements of q and out are bf16 or f16.
struct FlashParams {
  const uint16_t* q;    // [tokens, heads, d], q_stride elements a token, head_stride a head
  uint16_t* out;        // [tokens, heads, out_d]
  const int32_t* cu_q;  // [sequences + 1]
  Fault* fault;
  int32_t tokens, sequences;
  int32_t group;     // query heads of a KV head; the grid's y is the KV head
  int32_t d, out_d;  // d: a multiple of 8, the columns from out_d on zero
  int32_t q_stride, head_stride;
  float scale;  // of scores, to the base 2
};

// Rows (heads of a group by query) are worked on in blocks that do not cross sequences. With block
// (row / rows_per_block) + s the first of sequence s, which begins at `row`, every sequence has blocks
// enough, and no sums over those before it are needed. Queries before the first sequence and behind the last
// count as sequences of their own.
constexpr int64_t blocks_of_rows(int64_t rows, int64_t sequences, int64_t rows_per_block) {
  return rows / rows_per_block + sequences + 2;
}

}  // namespace mgm::cuda
