// One next token a row: the rules of native/cpu/kernels/sample.cpp, the same Philox draw.
//
// A row of V logits is read by one block for each 4096 of them; the last block of a row to arrive goes on
// with what all have found. Nothing is sorted.
//   sample_begin  clears the row's scratch and counts the history's ids
//   sample_scan   reads the logits: largest and log-sum of the raw ones, mask and penalties, largest of what
//   is
//                 left. A greedy row is done here, with its logits read once.
//   sample_weigh  weights e^((z - top) / temperature). Without top-k and top-p: their sums, then the draw,
//   which
//                 reads one chunk again. Else a histogram by the upper 11 bits of the keys (a logit's
//                 order-preserving bits) of how many lie where, with what weight: the bin of the cut is
//                 known.
//   sample_cut    collects the candidates, at or above that bin, usually few; the last block finds the cut
//   among
//                 them by histograms of 11, 11 and 10 bits, and draws.
//   sample_list   the most likely of the raw logits, for log-probabilities: candidates by count, then one by
//   one.
// Of equal logits at a cut the lowest ids are kept. Mass is added in fixed point, so that atomics in any
// order give the same sum; other sums have an order that V alone decides. The least is V * 4 bytes; sampling
// reads them twice, with top-k or top-p three times, from the second-level cache.
#include "common.cuh"
#include "philox.cuh"
#include "sample.h"

namespace mgm::cuda {
namespace {

constexpr float kInf = __builtin_huge_valf();
constexpr int kGroups = 256, kGroup = kSampleBins / kGroups;  // bins are searched group by group
constexpr int kQuads = kSampleChunk / 4 / kSampleThreads;     // of a chunk, each thread's
constexpr int kLevelShift = 21;                               // of the first 11 bits of a key

struct Options {
  float temperature, top_p, min_p, repetition, presence, frequency;
};

__device__ __forceinline__ Options options_of(const SampleParams& p, int64_t b) {
  const float* o = p.options + b * 6;
  return {o[0], o[1], o[2], o[3], o[4], o[5]};
}

__device__ __forceinline__ bool cuts_by_count(const SampleParams& p, int64_t b) {
  const int top_k = p.state[b * 5];
  return top_k > 0 && top_k < p.vocab;
}

// Larger floats have larger keys; -0 and +0 have the same.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// (value, id) in descending order of value, then ascending id; 0 is none.
__device__ __forceinline__ unsigned long long rank_of(float x, int id) {
  return static_cast<unsigned long long>(key_of(x)) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}
__device__ __forceinline__ int id_of(unsigned long long rank) {
  return static_cast<int>(0xffffffffu - static_cast<uint32_t>(rank));
}

// An infinite top is certain: weight 1, others 0.
__device__ __forceinline__ float weight_of(float x, float top, float factor) {
  if (top == kInf) return x < top ? 0.0f : 1.0f;
  return x == -kInf ? 0.0f : expf((x - top) * factor);
}
__device__ __forceinline__ float factor_of(const Options& o) {
  const float inverse = 1.0f / o.temperature;
  return inverse < 3.402823466e38f ? inverse : 3.402823466e38f;
}

// -- chunks ----------------------------------------------------------------------------------------------

// The part of a row that a block reads: thread t has the quads t, t + kSampleThreads, ...
struct Chunk {
  int first, size;  // ids

  __device__ explicit Chunk(int vocab)
      : first(blockIdx.x * kSampleChunk), size(min(vocab - first, kSampleChunk)) {}

  // body(quad, place of its first id in the chunk), also for quads beyond the end.
  template <class Body>
  __device__ __forceinline__ void for_quads(Body body) const {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) body(q, (q * kSampleThreads + static_cast<int>(threadIdx.x)) * 4);
  }

  // Values of the ids of this thread, -inf beyond the end.
  __device__ __forceinline__ void load(const float* row, float (*x)[4]) const {
    const float* from = row + first;
    const bool aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0;
    for_quads([&](int q, int at) {
      if (aligned && at + 4 <= size) {
        const auto v = load_vector<4>(from + at);
#pragma unroll
        for (int j = 0; j < 4; ++j) x[q][j] = v.at[j];
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) x[q][j] = at + j < size ? from[at + j] : -kInf;
      }
    });
  }

  __device__ __forceinline__ void store(float* row, const float (*x)[4]) const {
    for_quads([&](int q, int at) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (at + j < size) row[first + at + j] = x[q][j];
    });
  }
};

__device__ __forceinline__ const float* allowed_logits(const SampleParams& p, int64_t b) {
  const bool changed = p.mask || p.rows[b].penalized > 0;
  return changed ? p.changed + b * p.vocab : p.logits + b * p.logits_stride;
}

// The sum over the block; each thread's terms are added by quads.
template <class Term>
__device__ __forceinline__ double sum_of(const Chunk& chunk, Term term) {
  double sum = 0.0;
  chunk.for_quads(
      [&](int q, int) { sum += static_cast<double>((term(q, 0) + term(q, 1)) + (term(q, 2) + term(q, 3))); });
  return block_reduce<Sum, kSampleThreads>(sum);
}

// True in the last of the row's blocks to arrive, which then sees what all of them wrote.
__device__ __forceinline__ bool arrives_last(int32_t* arrived) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(arrived, 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// The sum of the values of lower threads; `total` gets that of all.
__device__ __forceinline__ unsigned long long scan(unsigned long long value, unsigned long long* total) {
  constexpr int kWarps = kSampleThreads / 32;
  __shared__ unsigned long long warps[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned long long sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance <<= 1) {
    const unsigned long long other = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  unsigned long long before = 0, all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += warps[w];
    all += warps[w];
  }
  __syncthreads();
  *total = all;
  return before + sum - value;
}

// -- cuts ------------------------------------------------------------------------------------------------

// Keep everything above `value`, and of the `ties` elements equal to it the first `keep`.
struct Cut {
  float value;
  int keep, ties;
};

struct Histogram {
  unsigned long long mass[kSampleBins];
  int count[kSampleBins];

  __device__ void clear() {
    for (int bin = threadIdx.x; bin < kSampleBins; bin += kSampleThreads) mass[bin] = 0, count[bin] = 0;
    __syncthreads();
  }
};

struct Shared {
  Histogram bins;
  unsigned long long group_mass[kGroups];
  int group_count[kGroups];
  double run[kSampleThreads];
  Cut cut;
  // Of the search: what lies above the chosen bin, and in it. chosen is -1 where there is nothing.
  int chosen, taken, in_bin;
  unsigned long long weight, mass_in_bin;
  double before;
  int picked;
};

// body(i) for the elements of this thread, neighbours in neighbouring threads.
template <class Body>
__device__ __forceinline__ void for_each(int n, Body body) {
  for (int i = threadIdx.x; i < n; i += kSampleThreads) body(i);
}
__device__ __forceinline__ int run_of(int n) {
  return (n + kSampleThreads - 1) / kSampleThreads;
}

// The bin of s.bins in which the elements, taken from the uppermost down, reach `count` of them or (by_mass)
// the weight `mass`; s.taken and s.weight are what was taken before.
__device__ void choose_bin(Shared& s, bool by_mass, int count, unsigned long long mass) {
  for (int group = threadIdx.x; group < kGroups; group += kSampleThreads) {
    int in_group = 0;
    unsigned long long weight = 0;
    for (int bin = group * kGroup; bin < (group + 1) * kGroup; ++bin)
      in_group += s.bins.count[bin], weight += s.bins.mass[bin];
    s.group_count[group] = in_group;
    s.group_mass[group] = weight;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int taken = s.taken, chosen = -1, last = -1;
    unsigned long long weight = s.weight;
    const auto reached = [&](int more, unsigned long long heavier) {
      return by_mass ? weight + heavier >= mass : taken + more >= count;
    };
    for (int group = kGroups - 1; group >= 0 && chosen < 0; --group) {
      if (s.group_count[group] == 0) continue;
      last = group;
      if (!reached(s.group_count[group], s.group_mass[group])) {
        taken += s.group_count[group];
        weight += s.group_mass[group];
        continue;
      }
      for (int bin = (group + 1) * kGroup - 1; bin >= group * kGroup; --bin) {
        if (s.bins.count[bin] == 0) continue;
        chosen = bin;
        if (reached(s.bins.count[bin], s.bins.mass[bin])) break;
        taken += s.bins.count[bin];
        weight += s.bins.mass[bin];
      }
    }
    if (chosen < 0 && last >= 0) {
      // There are fewer, or rounding left the goal just out of reach: the lowest bin is the cut.
      chosen = last * kGroup;
      while (s.bins.count[chosen] == 0) ++chosen;
      taken -= s.bins.count[chosen];
      weight -= s.bins.mass[chosen];
    }
    s.chosen = chosen;
    s.taken = taken;
    s.weight = weight;
    s.in_bin = chosen < 0 ? 0 : s.bins.count[chosen];
    s.mass_in_bin = chosen < 0 ? 0 : s.bins.mass[chosen];
  }
  __syncthreads();
}

// Room for n weights of 1 in 64 bits.
__device__ __forceinline__ double unit_of(int n) {
  return exp2(static_cast<double>(62 - (32 - __clz(n))));
}
__device__ __forceinline__ unsigned long long fixed(double weight, double unit) {
  return static_cast<unsigned long long>(weight * unit);
}

// Where the elements taken from the largest down reach `count` of them or (by_mass) the weight `mass`, in
// units of 1/unit. Result in s.cut.
__device__ void find_cut(Shared& s, const float* x, const float* w, int n, bool by_mass, int count,
                         unsigned long long mass, double unit) {
  if (threadIdx.x == 0) s.taken = 0, s.weight = 0;
  uint32_t prefix = 0;
  for (int level = 0; level < 3; ++level) {
    const int shift = level == 0 ? kLevelShift : level == 1 ? 10 : 0, above = level == 1 ? kLevelShift : 10;
    const uint32_t mask = level == 2 ? 1023 : 2047;
    s.bins.clear();
    for_each(n, [&](int i) {
      if (!(w[i] > 0.0f)) return;
      const uint32_t key = key_of(x[i]);
      if (level > 0 && key >> above != prefix) return;
      const uint32_t bin = key >> shift & mask;
      atomicAdd(&s.bins.count[bin], 1);
      if (by_mass) atomicAdd(&s.bins.mass[bin], fixed(w[i], unit));
    });
    __syncthreads();
    choose_bin(s, by_mass, count, mass);
    prefix = prefix << (level == 2 ? 10 : 11) | static_cast<uint32_t>(s.chosen < 0 ? 0 : s.chosen);
  }
  if (threadIdx.x == 0) {
    const int ties = s.in_bin;
    double need = count - s.taken;
    if (by_mass) {
      const double left = mass > s.weight ? static_cast<double>(mass - s.weight) : 0.0;
      need = s.mass_in_bin > 0 ? ceil(left / (static_cast<double>(s.mass_in_bin) / ties)) : 1.0;
    }
    s.cut = {value_of(prefix), need >= ties ? ties : need > 1.0 ? static_cast<int>(need) : 1, ties};
    if (ties == 0) s.cut = {-kInf, n, n};
  }
  __syncthreads();
}

__device__ void apply_cut(Shared& s, const float* x, int n, float* w) {
  const Cut cut = s.cut;
  for_each(n, [&](int i) {
    if (x[i] < cut.value) w[i] = 0.0f;
  });
  __syncthreads();
  if (cut.keep >= cut.ties) return;
  const int run = run_of(n), begin = min(static_cast<int>(threadIdx.x) * run, n), end = min(begin + run, n);
  int mine = 0;
  for (int i = begin; i < end; ++i) mine += w[i] > 0.0f && x[i] == cut.value;
  unsigned long long total;
  auto seen = static_cast<int>(scan(static_cast<unsigned long long>(mine), &total));
  for (int i = begin; i < end; ++i)
    if (w[i] > 0.0f && x[i] == cut.value && ++seen > cut.keep) w[i] = 0.0f;
  __syncthreads();
}

// -- the draw --------------------------------------------------------------------------------------------

// Words 0 and 1 of Philox4x32-10 as a double in [0, 1).
__device__ double uniform(const int32_t* state) {
  const uint4 words = philox({static_cast<uint32_t>(state[3]), 0, 0, 0},
                             {static_cast<uint32_t>(state[1]), static_cast<uint32_t>(state[2])});
  return static_cast<double>(static_cast<uint64_t>(words.x) << 21 | words.y >> 11) * 0x1p-53;
}

// Sum of w; s.run[t] is that of the run of neighbours which thread t owns.
template <class W>
__device__ double sum_runs(Shared& s, const W* w, int n) {
  const int run = run_of(n), begin = min(static_cast<int>(threadIdx.x) * run, n), end = min(begin + run, n);
  double sum = 0.0;
  for (int i = begin; i < end; ++i) sum += static_cast<double>(w[i]);
  s.run[threadIdx.x] = sum;
  return block_reduce<Sum, kSampleThreads>(sum);
}

// The first element whose cumulative weight exceeds `target`, else the last with any; -1 without. After
// sum_runs. s.before gets the weight of what precedes it.
template <class W>
__device__ int pick(Shared& s, const W* w, int n, double target) {
  if (threadIdx.x == 0) {
    const int run = run_of(n);
    double before = 0.0;
    int found = -1, last = -1;
    for (int t = 0; t < kSampleThreads && found < 0; ++t) {
      if (!(s.run[t] > 0.0)) continue;
      last = t;
      if (before + s.run[t] > target)
        found = t;
      else
        before += s.run[t];
    }
    // A target just out of reach leaves the last run; a run's own rounding may still leave its last element.
    if (found < 0 && last >= 0) found = last, before -= s.run[last];
    s.picked = -1;
    for (int i = found * run; found >= 0 && i < min((found + 1) * run, n); ++i) {
      if (!(w[i] > static_cast<W>(0))) continue;
      if (s.picked >= 0) before += static_cast<double>(w[s.picked]);
      s.picked = i;
      if (before + static_cast<double>(w[i]) > target) break;
    }
    s.before = before;
  }
  __syncthreads();
  return s.picked;
}

__device__ __forceinline__ float log_probability(const SampleRow& row, float x) {
  const double distance =
      x == row.raw_top && x == kInf ? 0.0 : static_cast<double>(x) - static_cast<double>(row.raw_top);
  return static_cast<float>(distance - row.log_sum);
}

// One thread: the result of row b, id -1 where there is none.
__device__ void finish(const SampleParams& p, int64_t b, int id) {
  SampleRow& row = p.rows[b];
  row.mode = static_cast<int32_t>(SampleMode::done);
  p.ids[b] = id;
  p.logprobs[b * (1 + p.listed)] =
      id >= 0 ? log_probability(row, p.logits[b * p.logits_stride + id]) : __uint_as_float(0x7fc00000u);
}

// -- candidates ------------------------------------------------------------------------------------------

// Writes this chunk's ids for which keep(quad, j) holds to p.found, in their order.
template <class Keep>
__device__ __forceinline__ void collect(const SampleParams& p, int64_t b, const Chunk& chunk, Keep keep) {
  // A count of up to 1024 for each of the quads, in 16 bits.
  static_assert(kQuads == 4 && kSampleThreads * 4 < 65536, "four counts in 64 bits");
  unsigned long long mine = 0, total;
  chunk.for_quads([&](int q, int at) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (at + j < chunk.size && keep(q, j)) mine += 1ull << (16 * q);
  });
  const unsigned long long before = scan(mine, &total);
  int32_t* to = p.found + b * p.vocab + chunk.first;
  int base = 0;
  chunk.for_quads([&](int q, int at) {
    int place = base + static_cast<int>(before >> (16 * q) & 0xffff);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (at + j < chunk.size && keep(q, j)) to[place++] = chunk.first + at + j;
    base += static_cast<int>(total >> (16 * q) & 0xffff);
  });
  if (threadIdx.x == 0) p.chunks[b * gridDim.x + blockIdx.x].kept = base;
}

// All candidates of the row in order of their ids, with their values from `row`; how many there are.
__device__ __forceinline__ int gather(const SampleParams& p, int64_t b, const float* row) {
  __shared__ int offsets[kSampleThreads];
  const int chunks = gridDim.x;
  int32_t* ids = p.candidates + b * p.vocab;
  float* values = p.values + b * p.vocab;
  int n = 0;
  for (int first = 0; first < chunks; first += kSampleThreads) {
    const int mine = first + threadIdx.x;
    unsigned long long total;
    const int kept = mine < chunks ? p.chunks[b * chunks + mine].kept : 0;
    offsets[threadIdx.x] = n + static_cast<int>(scan(static_cast<unsigned long long>(kept), &total));
    __syncthreads();
    for (int c = first + threadIdx.x / 32; c < min(first + kSampleThreads, chunks);
         c += kSampleThreads / 32) {
      const int32_t* from = p.found + b * p.vocab + static_cast<int64_t>(c) * kSampleChunk;
      const int to = offsets[c - first], size = p.chunks[b * chunks + c].kept;
      for (int i = threadIdx.x % 32; i < size; i += 32) {
        ids[to + i] = from[i];
        values[to + i] = row[from[i]];
      }
    }
    __syncthreads();
    n += static_cast<int>(total);
  }
  return n;
}

}  // namespace

#define KERNEL(name) \
  extern "C" __global__ void __launch_bounds__(kSampleThreads, 1) name(const __grid_constant__ SampleParams p)

KERNEL(sample_begin) {
  const int64_t b = blockIdx.x;
  for_each(kSampleBins, [&](int bin) {
    p.masses[b * kSampleBins + bin] = 0;
    p.counts[b * kSampleBins + bin] = 0;
    if (p.listed > 0) p.list_counts[b * kSampleBins + bin] = 0;
  });
  if (threadIdx.x == 0) p.rows[b] = SampleRow{};
  __syncthreads();
  if (p.history == nullptr) return;

  // What only the data shows.
  SampleRow& row = p.rows[b];
  const int length = p.state[b * 5 + 4];
  const int32_t* history = p.history + b * p.history_room;
  if (length < 0 || length > p.history_room) {
    if (threadIdx.x == 0) report(p.fault, FaultKind::history_length, length, 0, p.history_room, b);
    if (threadIdx.x == 0) row.bad = 1;
    return;
  }
  int bad = 0;
  for_each(length, [&](int i) {
    if (history[i] < p.vocab) return;
    report(p.fault, FaultKind::history_id, history[i], 0, p.vocab, b);
    bad = 1;
  });
  bad = block_reduce<Max, kSampleThreads>(bad);
  if (bad && threadIdx.x == 0) row.bad = 1;
  const Options o = options_of(p, b);
  if (bad || (o.repetition == 1.0f && o.presence == 0.0f && o.frequency == 0.0f)) return;

  // How often each id occurs: whoever takes its count lists it.
  int32_t* occurrences = p.occurrences + b * p.vocab;
  for_each(length, [&](int i) {
    if (history[i] >= 0) occurrences[history[i]] = 0;
  });
  __syncthreads();
  for_each(length, [&](int i) {
    if (history[i] >= 0) atomicAdd(&occurrences[history[i]], 1);
  });
  __syncthreads();
  for_each(length, [&](int i) {
    const int count = history[i] >= 0 ? atomicExch(&occurrences[history[i]], 0) : 0;
    if (count > 0) p.penalties[b * p.history_room + atomicAdd(&row.penalized, 1)] = {history[i], count};
  });
}

KERNEL(sample_scan) {
  __shared__ float penalized[kSampleChunk];
  __shared__ Shared s;
  const int64_t b = blockIdx.y;
  const int chunks = gridDim.x;
  SampleRow& row = p.rows[b];
  const Chunk chunk(p.vocab);
  float x[kQuads][4];
  chunk.load(p.logits + b * p.logits_stride, x);

  // Raw logits.
  float top = -kInf;
  int bad = 0;
  chunk.for_quads([&](int q, int) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      bad |= x[q][j] != x[q][j];
      top = x[q][j] > top ? x[q][j] : top;
    }
  });
  if (block_reduce<Max, kSampleThreads>(bad) && threadIdx.x == 0) atomicOr(&row.bad, 1);
  top = block_reduce<Max, kSampleThreads>(top);
  const double raw_sum = sum_of(chunk, [&](int q, int j) { return weight_of(x[q][j], top, 1.0f); });
  if (p.listed > 0) {
    s.bins.clear();
    chunk.for_quads([&](int q, int at) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (at + j < chunk.size) atomicAdd(&s.bins.count[key_of(x[q][j]) >> kLevelShift], 1);
    });
    __syncthreads();
    for_each(kSampleBins, [&](int bin) {
      if (s.bins.count[bin] > 0) atomicAdd(&p.list_counts[b * kSampleBins + bin], s.bins.count[bin]);
    });
  }

  // Mask and penalties: repetition as Hugging Face (once for every distinct id), presence and frequency as
  // OpenAI.
  if (p.mask) {
    const uint8_t* mask = p.mask + b * ((p.vocab + 7) / 8) + chunk.first / 8;
    chunk.for_quads([&](int q, int at) {
      const int bits = at < chunk.size ? mask[at / 8] >> (at % 8) : 0;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (!(bits >> j & 1)) x[q][j] = -kInf;
    });
  }
  if (row.penalized > 0) {
    const Options o = options_of(p, b);
    chunk.for_quads([&](int q, int at) {
#pragma unroll
      for (int j = 0; j < 4; ++j) penalized[at + j] = x[q][j];
    });
    __syncthreads();
    for_each(row.penalized, [&](int i) {
      const SamplePenalty penalty = p.penalties[b * p.history_room + i];
      const int at = penalty.id - chunk.first;
      if (at < 0 || at >= chunk.size) return;
      const float z = penalized[at];
      if (z == kInf || z == -kInf) return;
      const float repeated = z > 0.0f ? z / o.repetition : z * o.repetition;
      penalized[at] = repeated - o.presence - o.frequency * static_cast<float>(penalty.count);
    });
    __syncthreads();
    chunk.for_quads([&](int q, int at) {
#pragma unroll
      for (int j = 0; j < 4; ++j) x[q][j] = penalized[at + j];
    });
  }
  if (p.mask || row.penalized > 0) chunk.store(p.changed + b * p.vocab, x);

  unsigned long long best = 0;
  chunk.for_quads([&](int q, int at) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const unsigned long long rank = rank_of(x[q][j], chunk.first + at + j);
      if (at + j < chunk.size && rank > best) best = rank;
    }
  });
  best = block_reduce<Max, kSampleThreads>(best);
  if (threadIdx.x == 0) {
    SampleChunk& mine = p.chunks[b * chunks + blockIdx.x];
    mine.best = best;
    mine.raw_sum = raw_sum;
    mine.raw_top = top;
  }
  if (!arrives_last(&row.arrived[0])) return;

  // The row.
  top = -kInf;
  best = 0;
  for_each(chunks, [&](int c) {
    const SampleChunk& one = p.chunks[b * chunks + c];
    top = one.raw_top > top ? one.raw_top : top;
    best = one.best > best ? one.best : best;
  });
  top = block_reduce<Max, kSampleThreads>(top);
  best = block_reduce<Max, kSampleThreads>(best);
  double sum = 0.0;
  for_each(chunks, [&](int c) {
    const SampleChunk& one = p.chunks[b * chunks + c];
    sum += one.raw_sum * static_cast<double>(weight_of(one.raw_top, top, 1.0f));
  });
  sum = block_reduce<Sum, kSampleThreads>(sum);
  if (p.listed > 0) {
    for_each(kSampleBins, [&](int bin) {
      s.bins.count[bin] = p.list_counts[b * kSampleBins + bin];
      s.bins.mass[bin] = 0;
    });
    if (threadIdx.x == 0) s.taken = 0, s.weight = 0;
    __syncthreads();
    choose_bin(s, false, p.listed, 0);
    if (threadIdx.x == 0) row.list_floor = static_cast<uint32_t>(s.chosen) << kLevelShift;
  }
  if (threadIdx.x != 0) return;
  row.raw_top = top;
  row.log_sum = log(sum);
  row.top = value_of(static_cast<uint32_t>(best >> 32));
  const Options o = options_of(p, b);
  if (row.bad || row.top == -kInf)
    finish(p, b, -1);
  else if (!(o.temperature > 0.0f))
    finish(p, b, id_of(best));
  else
    row.mode =
        static_cast<int32_t>(cuts_by_count(p, b) || o.top_p < 1.0f ? SampleMode::cut : SampleMode::draw);
}

KERNEL(sample_weigh) {
  __shared__ float chunk_weights[kSampleChunk];
  __shared__ Shared s;
  const int64_t b = blockIdx.y;
  const int chunks = gridDim.x;
  SampleRow& row = p.rows[b];
  const auto mode = static_cast<SampleMode>(row.mode);
  if (mode == SampleMode::done) return;
  const Options o = options_of(p, b);
  const float factor = factor_of(o), least = mode == SampleMode::cut ? 0.0f : o.min_p < 1.0f ? o.min_p : 1.0f;
  const float* logits = allowed_logits(p, b);
  double* weights = p.chunk_weights + b * chunks;
  const auto weight = [&](float z) {
    const float w = weight_of(z, row.top, factor);
    return w < least ? 0.0f : w;
  };
  Chunk chunk(p.vocab);
  float x[kQuads][4];
  chunk.load(logits, x);
  const double sum = sum_of(chunk, [&](int q, int j) { return weight(x[q][j]); });
  if (threadIdx.x == 0) weights[blockIdx.x] = sum;

  if (mode == SampleMode::draw) {
    if (!arrives_last(&row.arrived[1])) return;
    const double target = uniform(p.state + b * 5) * sum_runs(s, weights, chunks);
    const int chosen = pick(s, weights, chunks, target);
    const double left = target - s.before;
    const int first = chosen * kSampleChunk, size = min(p.vocab - first, kSampleChunk);
    for_each(size, [&](int i) { chunk_weights[i] = weight(logits[first + i]); });
    __syncthreads();
    sum_runs(s, chunk_weights, size);
    const int at = pick(s, chunk_weights, size, left);
    if (threadIdx.x == 0) finish(p, b, first + at);
    return;
  }

  // Those so light that all of them together weigh less than what top-p drops are not in its set.
  const bool by_mass = !cuts_by_count(p, b);
  const double unit = unit_of(p.vocab), top_p = o.top_p > 0.0f ? static_cast<double>(o.top_p) : 0.0;
  const float ignore = by_mass ? static_cast<float>(0.5 * (1.0 - top_p) / p.vocab) : 0.0f;
  s.bins.clear();
  chunk.for_quads([&](int q, int) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float w = weight(x[q][j]);
      if (!(w > ignore)) continue;
      const uint32_t bin = key_of(x[q][j]) >> kLevelShift;
      atomicAdd(&s.bins.count[bin], 1);
      if (by_mass) atomicAdd(&s.bins.mass[bin], fixed(w, unit));
    }
  });
  __syncthreads();
  for_each(kSampleBins, [&](int bin) {
    if (s.bins.count[bin] == 0) return;
    atomicAdd(&p.counts[b * kSampleBins + bin], s.bins.count[bin]);
    if (by_mass) atomicAdd(&p.masses[b * kSampleBins + bin], s.bins.mass[bin]);
  });
  if (!arrives_last(&row.arrived[1])) return;
  const double total = sum_runs(s, weights, chunks);
  for_each(kSampleBins, [&](int bin) {
    s.bins.count[bin] = p.counts[b * kSampleBins + bin];
    s.bins.mass[bin] = p.masses[b * kSampleBins + bin];
  });
  if (threadIdx.x == 0) s.taken = 0, s.weight = 0;
  __syncthreads();
  choose_bin(s, by_mass, p.state[b * 5], fixed(top_p * total, unit));
  if (threadIdx.x != 0) return;
  row.total = total;
  row.floor = static_cast<uint32_t>(s.chosen < 0 ? 0 : s.chosen) << kLevelShift;
}

KERNEL(sample_cut) {
  __shared__ Shared s;
  const int64_t b = blockIdx.y;
  SampleRow& row = p.rows[b];
  if (static_cast<SampleMode>(row.mode) != SampleMode::cut) return;
  const Options o = options_of(p, b);
  const float factor = factor_of(o);
  const float* logits = allowed_logits(p, b);
  const Chunk chunk(p.vocab);
  float x[kQuads][4];
  chunk.load(logits, x);
  collect(p, b, chunk, [&](int q, int j) {
    return key_of(x[q][j]) >= row.floor && weight_of(x[q][j], row.top, factor) > 0.0f;
  });
  if (!arrives_last(&row.arrived[2])) return;

  const int n = gather(p, b, logits);
  const float* z = p.values + b * p.vocab;
  float* w = p.weights + b * p.vocab;
  for_each(n, [&](int i) { w[i] = weight_of(z[i], row.top, factor); });
  __syncthreads();
  const double unit = unit_of(p.vocab);
  double total = row.total;
  if (cuts_by_count(p, b)) {
    find_cut(s, z, w, n, false, p.state[b * 5], 0, unit);
    apply_cut(s, z, n, w);
    total = sum_runs(s, w, n);
  }
  if (o.top_p < 1.0f) {
    const double top_p = o.top_p > 0.0f ? static_cast<double>(o.top_p) : 0.0;
    find_cut(s, z, w, n, true, 0, fixed(top_p * total, unit), unit);
    apply_cut(s, z, n, w);
  }
  if (o.min_p > 0.0f) {
    const float least = o.min_p < 1.0f ? o.min_p : 1.0f;
    for_each(n, [&](int i) {
      if (w[i] < least) w[i] = 0.0f;
    });
    __syncthreads();
  }
  const int at = pick(s, w, n, uniform(p.state + b * 5) * sum_runs(s, w, n));
  if (threadIdx.x == 0) finish(p, b, p.candidates[b * p.vocab + at]);
}

KERNEL(sample_list) {
  const int64_t b = blockIdx.y;
  SampleRow& row = p.rows[b];
  const float* logits = p.logits + b * p.logits_stride;
  float* logprobs = p.logprobs + b * (1 + p.listed) + 1;
  int32_t* top_ids = p.top_ids + b * p.listed;
  if (row.bad) {
    if (blockIdx.x > 0) return;
    for_each(p.listed, [&](int i) {
      logprobs[i] = __uint_as_float(0x7fc00000u);
      top_ids[i] = -1;
    });
    return;
  }
  const Chunk chunk(p.vocab);
  float x[kQuads][4];
  chunk.load(logits, x);
  collect(p, b, chunk, [&](int q, int j) { return key_of(x[q][j]) >= row.list_floor; });
  if (!arrives_last(&row.arrived[3])) return;

  const int n = gather(p, b, logits);
  const int32_t* ids = p.candidates + b * p.vocab;
  const float* values = p.values + b * p.vocab;
  unsigned long long previous = ~0ull;
  for (int listed = 0; listed < p.listed; ++listed) {
    unsigned long long best = 0;
    for_each(n, [&](int i) {
      const unsigned long long rank = rank_of(values[i], ids[i]);
      if (rank < previous && rank > best) best = rank;
    });
    best = block_reduce<Max, kSampleThreads>(best);
    previous = best;
    if (threadIdx.x == 0) {
      top_ids[listed] = id_of(best);
      logprobs[listed] = log_probability(row, logits[id_of(best)]);
    }
  }
}

}  // namespace mgm::cuda
