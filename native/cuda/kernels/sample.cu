// One next token a row, a block a row: the rules of native/cpu/kernels/sample.cpp, the same Philox draw.
//
// Nothing is sorted. Top-k and top-p look for the key (a logit's order-preserving bits) at which the count or
// the probability mass is reached, by histograms over 11, 11 and 10 bits of the keys; of equal logits at the
// cut the lowest ids are kept. Mass is added in fixed point, so that atomics in any order give the same sum.
// For sums along ids each thread owns one run of neighbouring ids. A row is a handful of passes over V floats
// that stay in the second-level cache.
#include "common.cuh"
#include "sample.h"

namespace mgm::cuda {
namespace {

constexpr float kInf = __builtin_huge_valf();
constexpr int kGroups = 256, kGroup = kSampleBins / kGroups;  // bins are searched group by group

struct Options {
  float temperature, top_p, min_p, repetition, presence, frequency;
};

// body(i) for the ids of this thread, neighbours in neighbouring threads.
template <class Body>
__device__ __forceinline__ void for_ids(int n, Body body) {
  for (int i = threadIdx.x; i < n; i += kSampleThreads) body(i);
}

__device__ __forceinline__ int run_of(int n) {
  return (n + kSampleThreads - 1) / kSampleThreads;
}

__device__ float largest(const float* x, int n) {
  float best = -kInf;
  for_ids(n, [&](int i) { best = x[i] > best ? x[i] : best; });
  return block_reduce<Max, kSampleThreads>(best);
}

// Larger floats have larger keys; -0 and +0 have the same.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// Keep everything above `value`, and of the `ties` elements equal to it the first `keep`.
struct Cut {
  float value;
  int keep, ties;
};

struct Shared {
  unsigned long long mass[kSampleBins];
  int count[kSampleBins];
  unsigned long long group_mass[kGroups];
  int group_count[kGroups];
  double run[kSampleThreads];
  int ties[kSampleThreads];
  Cut cut;
  uint32_t prefix;
  int taken, last_ties;
  unsigned long long weight, last_mass;
  double total;
  int id;
};

// Sum of w; shared.run[t] is that of the run of ids which thread t owns.
__device__ double sum_runs(Shared& s, const float* w, int n) {
  const int run = run_of(n), begin = threadIdx.x * run, end = min(begin + run, n);
  double sum = 0.0;
  for (int i = begin; i < end; ++i) sum += static_cast<double>(w[i]);
  s.run[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0.0;
    for (int t = 0; t < kSampleThreads; ++t) total += s.run[t];
    s.total = total;
  }
  __syncthreads();
  return s.total;
}

// Where the elements taken from the largest down reach `count` of them or (by_mass) the weight `mass`, in
// units of 1/unit. Elements with weight <= ignore do not take part by mass. Result in s.cut.
__device__ void find_cut(Shared& s, const float* x, const float* w, int n, bool by_mass, int count,
                         unsigned long long mass, double unit, float ignore) {
  if (threadIdx.x == 0) s.prefix = 0, s.taken = 0, s.weight = 0;
  for (int level = 0; level < 3; ++level) {
    const int shift = level == 0 ? 21 : level == 1 ? 10 : 0, above = level == 1 ? 21 : 10;
    const uint32_t mask = level == 2 ? 1023 : 2047;
    for (int bin = threadIdx.x; bin < kSampleBins; bin += kSampleThreads) s.count[bin] = 0, s.mass[bin] = 0;
    __syncthreads();
    const uint32_t prefix = s.prefix;
    for_ids(n, [&](int i) {
      if (by_mass && !(w[i] > ignore)) return;
      const uint32_t key = key_of(x[i]);
      if (level > 0 && key >> above != prefix) return;
      const uint32_t bin = key >> shift & mask;
      atomicAdd(&s.count[bin], 1);
      if (by_mass) atomicAdd(&s.mass[bin], static_cast<unsigned long long>(static_cast<double>(w[i]) * unit));
    });
    __syncthreads();
    for (int group = threadIdx.x; group < kGroups; group += kSampleThreads) {
      int in_group = 0;
      unsigned long long weight = 0;
      for (int bin = group * kGroup; bin < (group + 1) * kGroup; ++bin)
        in_group += s.count[bin], weight += s.mass[bin];
      s.group_count[group] = in_group;
      s.group_mass[group] = weight;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int taken = s.taken, chosen = -1, last = -1;
      unsigned long long weight = s.weight;
      for (int group = kGroups - 1; group >= 0 && chosen < 0; --group) {
        if (s.group_count[group] == 0) continue;
        last = group;
        if (by_mass ? weight + s.group_mass[group] < mass : taken + s.group_count[group] < count) {
          taken += s.group_count[group];
          weight += s.group_mass[group];
          continue;
        }
        for (int bin = (group + 1) * kGroup - 1; bin >= group * kGroup; --bin) {
          if (s.count[bin] == 0) continue;
          chosen = bin;
          if (by_mass ? weight + s.mass[bin] >= mass : taken + s.count[bin] >= count) break;
          taken += s.count[bin];
          weight += s.mass[bin];
        }
      }
      if (chosen < 0 && last >= 0) {
        // Rounding left the goal just out of reach: the lowest bin is the cut.
        for (int bin = last * kGroup; bin < (last + 1) * kGroup; ++bin)
          if (s.count[bin] != 0) {
            chosen = bin;
            break;
          }
        taken -= s.count[chosen];
        weight -= s.mass[chosen];
      }
      s.taken = taken;
      s.weight = weight;
      s.last_ties = chosen < 0 ? 0 : s.count[chosen];
      s.last_mass = chosen < 0 ? 0 : s.mass[chosen];
      s.prefix = s.prefix << (level == 2 ? 10 : 11) | static_cast<uint32_t>(chosen < 0 ? 0 : chosen);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    const int ties = s.last_ties;
    double need = count - s.taken;
    if (by_mass) {
      const double left = mass > s.weight ? static_cast<double>(mass - s.weight) : 0.0;
      need = s.last_mass > 0 ? ceil(left / (static_cast<double>(s.last_mass) / ties)) : 1.0;
    }
    s.cut = {value_of(s.prefix), need >= ties ? ties : need > 1.0 ? static_cast<int>(need) : 1, ties};
    if (ties == 0) s.cut = {-kInf, n, n};
  }
  __syncthreads();
}

__device__ void apply_cut(Shared& s, const float* x, int n, float* w) {
  const Cut cut = s.cut;
  for_ids(n, [&](int i) {
    if (x[i] < cut.value) w[i] = 0.0f;
  });
  __syncthreads();
  if (cut.keep >= cut.ties) return;
  const int run = run_of(n), begin = threadIdx.x * run, end = min(begin + run, n);
  int mine = 0;
  for (int i = begin; i < end; ++i) mine += x[i] == cut.value;
  s.ties[threadIdx.x] = mine;
  __syncthreads();
  int seen = 0;
  for (int t = 0; t < static_cast<int>(threadIdx.x); ++t) seen += s.ties[t];
  for (int i = begin; i < end; ++i)
    if (x[i] == cut.value && ++seen > cut.keep) w[i] = 0.0f;
  __syncthreads();
}

// Words 0 and 1 of Philox4x32-10 (Salmon et al. 2011) as a double in [0, 1).
__device__ double uniform(uint32_t counter, uint32_t k0, uint32_t k1) {
  uint32_t c0 = counter, c1 = 0, c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint32_t a_high = __umulhi(c0, 0xD2511F53u), a_low = c0 * 0xD2511F53u;
    const uint32_t b_high = __umulhi(c2, 0xCD9E8D57u), b_low = c2 * 0xCD9E8D57u;
    c0 = b_high ^ c1 ^ k0;
    c1 = b_low;
    c2 = a_high ^ c3 ^ k1;
    c3 = a_low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return static_cast<double>(static_cast<uint64_t>(c0) << 21 | c1 >> 11) * 0x1p-53;
}

// The first id whose cumulative weight exceeds u times the total.
__device__ int draw(Shared& s, const float* w, int n, double u) {
  const double target = u * sum_runs(s, w, n);
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
    // u < 1 leaves at least the last run; its own rounding may still leave its last element.
    if (found < 0 && last >= 0) found = last, before -= s.run[last];
    int id = -1;
    for (int i = found * run; found >= 0 && i < min((found + 1) * run, n); ++i) {
      if (!(w[i] > 0.0f)) continue;
      id = i;
      before += static_cast<double>(w[i]);
      if (before > target) break;
    }
    s.id = id;
  }
  __syncthreads();
  return s.id;
}

__device__ int first_equal(const float* x, int n, float value) {
  int at = n;
  for_ids(n, [&](int i) {
    if (x[i] == value && i < at) at = i;
  });
  return block_reduce<Min, kSampleThreads>(at);
}

// w = e^((x - top) * factor), w may be null; returns the sum. An infinite top is certain: weight 1, others 0.
__device__ double weigh(const float* x, int n, float top, float factor, float* w) {
  double sum = 0.0;
  for_ids(n, [&](int i) {
    const float e = top == kInf ? (x[i] < top ? 0.0f : 1.0f) : expf((x[i] - top) * factor);
    sum += static_cast<double>(e);
    if (w) w[i] = e;
  });
  return block_reduce<Sum, kSampleThreads>(sum);
}

// -1 when nothing may be chosen.
__device__ int choose(Shared& s, const float* z, int n, const Options& o, const int32_t* state, float* w) {
  const float top = largest(z, n);
  if (top == -kInf) return -1;
  if (!(o.temperature > 0.0f)) return first_equal(z, n, top);
  const float inverse = 1.0f / o.temperature;
  weigh(z, n, top, inverse < 3.402823466e38f ? inverse : 3.402823466e38f, w);
  __syncthreads();
  // Room for n weights of 1.
  const double unit = exp2(static_cast<double>(62 - (32 - __clz(n))));
  const int top_k = state[0];
  if (top_k > 0 && top_k < n) {
    find_cut(s, z, w, n, false, top_k, 0, unit, 0.0f);
    apply_cut(s, z, n, w);
  }
  if (o.top_p < 1.0f) {
    const double p = o.top_p > 0.0f ? static_cast<double>(o.top_p) : 0.0, total = sum_runs(s, w, n);
    // All weights this small together are less than what may be dropped, so none of them is in the set.
    const float ignore = static_cast<float>(0.5 * (1.0 - p) * total / n);
    find_cut(s, z, w, n, true, 0, static_cast<unsigned long long>(p * total * unit), unit, ignore);
    apply_cut(s, z, n, w);
  }
  if (o.min_p > 0.0f) {
    const float least = o.min_p < 1.0f ? o.min_p : 1.0f;
    for_ids(n, [&](int i) {
      if (w[i] < least) w[i] = 0.0f;
    });
    __syncthreads();
  }
  return draw(s, w, n,
              uniform(static_cast<uint32_t>(state[3]), static_cast<uint32_t>(state[1]),
                      static_cast<uint32_t>(state[2])));
}

// Repetition as Hugging Face (once for every distinct id), presence and frequency as OpenAI: whoever takes an
// id's count applies it.
__device__ void apply_penalties(const Options& o, const int32_t* history, int length, float* z,
                                int32_t* counts) {
  for_ids(length, [&](int i) {
    if (history[i] >= 0) counts[history[i]] = 0;
  });
  __syncthreads();
  for_ids(length, [&](int i) {
    if (history[i] >= 0) atomicAdd(&counts[history[i]], 1);
  });
  __syncthreads();
  for_ids(length, [&](int i) {
    const int id = history[i];
    const int count = id >= 0 ? atomicExch(&counts[id], 0) : 0;
    if (count == 0) return;
    const float x = z[id];
    if (x == kInf || x == -kInf) return;
    const float repeated = x > 0.0f ? x / o.repetition : x * o.repetition;
    z[id] = repeated - o.presence - o.frequency * static_cast<float>(count);
  });
  __syncthreads();
}

__device__ __forceinline__ float log_probability(float x, float top, double log_sum) {
  const double distance = x == top && top == kInf ? 0.0 : static_cast<double>(x) - static_cast<double>(top);
  return static_cast<float>(distance - log_sum);
}

// Keys of (value, id) in descending order of value, then ascending id; 0 is none.
__device__ __forceinline__ unsigned long long rank_of(float x, int id) {
  return static_cast<unsigned long long>(key_of(x)) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kSampleThreads) sample(const __grid_constant__ SampleParams p) {
  __shared__ Shared s;
  const int64_t b = blockIdx.x;
  const int n = p.vocab;
  const float* x = p.logits + b * p.logits_stride;
  const float* option = p.options + b * 6;
  const int32_t* state = p.state + b * 5;
  const Options o = {option[0], option[1], option[2], option[3], option[4], option[5]};
  float* logprobs = p.logprobs + b * (1 + p.listed);
  const float nan = __uint_as_float(0x7fc00000u);

  // What only the data shows.
  int bad = 0;
  for_ids(n, [&](int i) { bad |= x[i] != x[i]; });
  const int length = p.history ? state[4] : 0;
  const int32_t* history = p.history + b * p.history_room;
  if (length < 0 || length > p.history_room) {
    if (threadIdx.x == 0) report(p.fault, FaultKind::history_length, length, 0, p.history_room, b);
    bad = 1;
  } else {
    for_ids(length, [&](int i) {
      if (history[i] < n) return;
      report(p.fault, FaultKind::history_id, history[i], 0, n, b);
      bad = 1;
    });
  }
  if (block_reduce<Max, kSampleThreads>(bad)) {
    if (threadIdx.x == 0) p.ids[b] = -1;
    for_ids(1 + p.listed, [&](int i) {
      logprobs[i] = nan;
      if (i > 0) p.top_ids[b * p.listed + i - 1] = -1;
    });
    return;
  }

  // Mask and penalties.
  const float* z = x;
  const bool penalized = length > 0 && (o.repetition != 1.0f || o.presence != 0.0f || o.frequency != 0.0f);
  if (p.mask || penalized) {
    float* changed = p.changed + b * n;
    const uint8_t* mask = p.mask ? p.mask + b * ((n + 7) / 8) : nullptr;
    for_ids(n, [&](int i) { changed[i] = !mask || mask[i / 8] >> (i % 8) & 1 ? x[i] : -kInf; });
    __syncthreads();
    if (penalized) apply_penalties(o, history, length, changed, p.counts + b * n);
    z = changed;
  }

  const int chosen = choose(s, z, n, o, state, p.weights + b * n);

  // Log-probabilities of the raw logits.
  const float top = largest(x, n);
  const double log_sum = log(weigh(x, n, top, 1.0f, nullptr));
  if (threadIdx.x == 0) {
    p.ids[b] = chosen;
    logprobs[0] = chosen >= 0 ? log_probability(x[chosen], top, log_sum) : nan;
  }
  unsigned long long previous = ~0ull;
  for (int listed = 0; listed < p.listed; ++listed) {
    unsigned long long best = 0;
    for_ids(n, [&](int i) {
      const unsigned long long rank = rank_of(x[i], i);
      if (rank < previous && rank > best) best = rank;
    });
    best = block_reduce<Max, kSampleThreads>(best);
    previous = best;
    if (threadIdx.x == 0) {
      const int id = static_cast<int>(0xffffffffu - static_cast<uint32_t>(best));
      p.top_ids[b * p.listed + listed] = id;
      logprobs[1 + listed] = log_probability(x[id], top, log_sum);
    }
  }
}

}  // namespace mgm::cuda
