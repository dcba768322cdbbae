#include "patch_mining.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "../../runtime/tensor.h"
#include "../launch.h"

namespace mgm::cuda {
namespace {

constexpr int64_t kMostShared = 40 << 10;  // of patch_mining_any, so that two blocks fit everywhere
constexpr int64_t kMostBlocks = 1024;      // of patch_mining_any with its arrays in global memory

// Cells that PyTorch's align_corners=false rule gives position i of the mined axis on a stage of `size`
// cells: the first and the last with a weight. The rule of the kernel's fill_taps.
struct Span {
  int64_t low, high;
};

struct Source {
  int64_t index;
  float lambda;
};

Source source(float scale, int64_t i, int64_t size) {
  // Through f64, where the product is exact, so that no compiler fuses it with the subtraction.
  const float product = static_cast<float>(static_cast<double>(scale) * (static_cast<double>(i) + 0.5));
  const float at = std::max(product - 0.5f, 0.0f);
  const int64_t cell = std::min(static_cast<int64_t>(at), size - 1);
  return {cell, cell == size - 1 ? 0.0f : at - static_cast<float>(cell)};
}

Span span(int64_t i, int64_t size, int64_t full, int downscale) {
  Span found{size, 0};
  const auto add = [&](int64_t at) {
    const Source from = size == full ? Source{at, 0.0f}
                                     : source(static_cast<float>(size) / static_cast<float>(full), at, size);
    found.low = std::min(found.low, from.index);
    found.high = std::max(found.high, from.index + (from.lambda > 0.0f ? 1 : 0));
  };
  const Source down = downscale > 1 ? source(static_cast<float>(downscale), i, full) : Source{i, 0.0f};
  add(down.index);
  if (down.lambda > 0.0f) add(down.index + 1);
  return found;
}

MiningAxis axis_of(int64_t positions, int64_t window, int64_t size, int64_t full, int downscale) {
  int64_t taps = 1, cells = 1;
  for (int64_t i = 0; i < positions; ++i) {
    const Span at = span(i, size, full, downscale);
    taps = std::max(taps, at.high - at.low + 1);
  }
  for (int64_t i = 0; i < positions; i += window) {
    const auto start = [&](int64_t at) { return std::min(span(at, size, full, downscale).low, size - taps); };
    cells = std::max(cells, start(i + window - 1) + taps - start(i));
  }
  return {static_cast<int32_t>(taps), static_cast<int32_t>(cells), 0, 0};
}

bool aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

MiningParams params_of(const PatchMiningArgs& args) {
  MiningParams p{};
  p.g = args.g.f32();
  p.out = args.out.data;
  p.g_stride = args.g.strides[0];
  p.out_stride = args.out.strides[0];
  p.queries = args.g.shape[0];
  p.grid = args.grid;
  p.eps = args.eps;
  p.scale = args.scale;
  for (int s = 0; s < kMiningStages; ++s) {
    const View& x = args.stages[s];
    const auto side = [&](int i) { return static_cast<int32_t>(x.shape[i]); };
    p.stages[s] = {x.data, x.strides[0], x.strides[1], x.strides[2], side(1), side(2), side(3), p.channels};
    p.channels += side(3);
  }
  p.has_bias = args.g.shape[1] > p.channels;
  return p;
}

// Every cell of every stage, and every row of the result, starts on 16 bytes.
bool aligned(const MiningParams& p) {
  bool all = aligned(p.out) && p.out_stride % 8 == 0;
  for (const MiningStage& stage : p.stages)
    all = all && aligned(stage.data) && stage.batch_stride % 8 == 0 && stage.row_stride % 8 == 0 &&
          stage.column_stride % 8 == 0 && stage.first_channel % 8 == 0;
  return all;
}

constexpr int kCells[] = {kMiningCells<0>, kMiningCells<1>, kMiningCells<2>, kMiningCells<3>};

// Whole windows of 8 x 8 on maps that halve from stage to stage: what patch_mining is made for.
bool windows(const MiningParams& p, int downscale) {
  const MiningStage& full = p.stages[0];
  bool all = downscale == 1 && aligned(p) && full.height / p.grid == kMiningWindow &&
             full.width / p.grid == kMiningWindow;
  int64_t padded = 0;
  for (int s = 0; s < kMiningStages; ++s) {
    all = all && p.stages[s].height << s == full.height && p.stages[s].width << s == full.width;
    all = all && p.stages[s].height * p.stages[s].row_stride < int64_t{1} << 31;
    padded += ceil_div(p.stages[s].channels, kMiningSlice) * kMiningSlice;
  }
  return all && padded <= kMiningGPerThread * kMiningWindowThreads;
}

// Shares out the slices of all stages, `slots[s]` of them to a warp, and lays out shared memory. Returns its
// size.
int64_t lay_out(MiningWindowParams& a, const int (&slots)[kMiningStages]) {
  a.total_slices = 0;
  for (int s = 0; s < kMiningStages; ++s) {
    a.first_slice[s] = a.total_slices;
    a.total_slices += static_cast<int32_t>(ceil_div(a.p.stages[s].channels, kMiningSlice));
  }
  a.ones_at = std::max(a.total_slices * kMiningPieces * kMiningRow, kMiningScalarsEnd);
  int32_t end = a.ones_at + kMiningRow + kMiningCellsBytes;
  for (int s = 0; s < kMiningStages; ++s) {
    const int count = (s + 1 < kMiningStages ? a.first_slice[s + 1] : a.total_slices) - a.first_slice[s];
    for (int w = 0; w < kMiningStageWarps; ++w) {
      MiningShare& share = a.shares[s * kMiningStageWarps + w];
      share.slices = (count + kMiningStageWarps - 1 - w) / kMiningStageWarps;
      share.slots = std::min(share.slices, slots[s]);
      share.at = end;
      end += share.slots * kCells[s] * kMiningRow;
    }
  }
  return end;
}

// As much of the window as possible stays in shared memory, but two blocks share a multiprocessor where they
// can: one computes while the other waits for its cells. Returns the bytes of shared memory, or 0 where the
// least does not fit.
int64_t plan(MiningWindowParams& a, int64_t shared) {
  constexpr int64_t kReserved = 1 << 10;  // by the driver, of each block
  int slots[kMiningStages] = {1, 1, 1, 1};
  int64_t bytes = lay_out(a, slots);
  if (bytes > shared) return 0;
  const int64_t half = (shared - kReserved) / 2, budget = bytes <= half ? half : shared;
  // Small slices first: a slot of the last stage holds eight times fewer cells than one of the first.
  for (int s = kMiningStages - 1; s >= 0; --s) {
    const MiningShare& most = a.shares[s * kMiningStageWarps];
    for (int more = 2; more <= std::min(most.slices, kMiningMostSlots); ++more) {
      slots[s] = more;
      const int64_t with = lay_out(a, slots);
      if (with <= budget) {
        bytes = with;
        continue;
      }
      slots[s] = more - 1;
      break;
    }
  }
  lay_out(a, slots);
  return bytes;
}

// p.give_up: only the queries it marks.
void mine_any(Queue& queue, const MiningParams& p, DType dtype, int downscale) {
  MiningAnyParams a{};
  a.p = p;
  a.downscale = downscale;
  a.aligned = aligned(p);
  a.window_y = p.stages[0].height / downscale / p.grid;
  a.window_x = p.stages[0].width / downscale / p.grid;
  const auto add = [&](MiningAxis& axis, int window, int size, int full) {
    axis = axis_of(static_cast<int64_t>(window) * p.grid, window, size, full, downscale);
    axis.first_start = a.starts;
    axis.first_weight = a.weights;
    a.starts += window;
    a.weights += window * axis.taps;
  };
  for (int s = 0; s < kMiningStages; ++s) {
    add(a.y[s], a.window_y, p.stages[s].height, p.stages[0].height);
    add(a.x[s], a.window_x, p.stages[s].width, p.stages[0].width);
    a.first_cell[s] = a.cells;
    a.cells += a.y[s].cells * a.x[s].cells;
  }
  const int64_t positions = static_cast<int64_t>(a.window_y) * a.window_x;
  a.work_bytes = 16 * ceil_div(p.channels, 4) + 8 * (2 * a.cells + (kMiningStages + 3) * positions) +
                 4 * (2 * static_cast<int64_t>(a.cells) + a.weights + a.starts);
  a.work_bytes = ceil_div(a.work_bytes, 128) * 128;
  const bool in_shared = a.work_bytes <= kMostShared;
  const int64_t most = p.give_up ? 2 * queue.info().multiprocessors : in_shared ? p.queries : kMostBlocks;
  const int64_t blocks = std::min(p.queries, most);
  const auto scratch = in_shared ? nullptr : queue.scratch(static_cast<size_t>(blocks * a.work_bytes));
  if (scratch) a.scratch = reinterpret_cast<char*>(scratch->data());
  queue.launch({"patch_mining_any", dtype == DType::bf16 ? "patch_mining_any_bf16" : "patch_mining_any_f16"},
               {blocks}, kMiningThreads, a, in_shared ? static_cast<size_t>(a.work_bytes) : 0);
}

}  // namespace

void patch_mining(Queue& queue, const PatchMiningArgs& args) {
  MiningWindowParams a{};
  a.p = params_of(args);
  if (a.p.queries == 0) return;
  const DType dtype = args.out.dtype;
  const int downscale = std::max(args.downscale, 1);
  const char* asked = std::getenv("MGM_CUDA_MINING");
  const bool any = !windows(a.p, downscale) || (asked && std::string_view(asked) == "any");
  const int64_t bytes = any ? 0 : plan(a, static_cast<int64_t>(queue.info().shared_optin));
  if (bytes == 0) return mine_any(queue, a.p, dtype, downscale);
  const auto give_up = queue.scratch(static_cast<size_t>(a.p.queries));
  a.p.give_up = reinterpret_cast<uint8_t*>(give_up->data());
  queue.launch({"patch_mining", dtype == DType::bf16 ? "patch_mining_bf16" : "patch_mining_f16"},
               {a.p.queries}, kMiningWindowThreads, a, static_cast<size_t>(bytes));
  mine_any(queue, a.p, dtype, downscale);
}

}  // namespace mgm::cuda
