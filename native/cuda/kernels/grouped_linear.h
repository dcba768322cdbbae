#pragma once
#include <cstdint>

#include "fault.h"
#include "gemm.h"

namespace mgm::cuda {

constexpr int kMostExperts = 64;  // their addresses travel with the launch

// Rows of the result are named by their assignment t * k + j.
struct Group {
  int32_t expert, first,
      rows;  // rows [first, first + rows) of `order`, at most a tile's; rows 0: nothing to do
  int32_t padding;
};

constexpr int kGroupThreads = 1024;
struct GroupParams {
  const int32_t* ids;  // [assignments]
  int32_t* order;      // [assignments], by expert
  Group* groups;       // [most_groups]
  Fault* fault;
  int32_t assignments, experts, most_groups;
  int32_t tile_rows;
};
// Experts share no tile, so each may leave one unfilled.
constexpr int64_t most_groups(int64_t assignments, int64_t experts, int64_t tile_rows) {
  return assignments / tile_rows + (experts < assignments ? experts : assignments);
}

struct GroupedParams {
  const uint8_t* w[kMostExperts];
  const void* x;  // rows x_stride elements apart and on 16 bytes; assignment a multiplies row a / sharing
  const Group* groups;
  const int32_t* order;
  int64_t x_stride;
  int32_t sharing;
  int32_t k;  // a multiple of 8
  int32_t panels, blocks;
  Epilogue epilogue;
};

constexpr int kCombineThreads = 256;
struct CombineParams {
  const float* products;  // [T * k, n]
  const float* weights;   // [T, k]
  const void* residual;   // A [T, n] or null
  void* out;              // A [T, n]
  int64_t residual_stride;
  int32_t k, n;
};

}  // namespace mgm::cuda
