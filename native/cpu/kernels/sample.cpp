// One next token a row, rows in parallel. A row is a handful of passes over V floats that stay in the
// second-level cache; nothing is sorted. Top-k and top-p look for the key (a logit's order-preserving bits)
// at which the count or the probability mass is reached, by histograms over 11, 11 and 10 bits of the keys;
// of equal logits at the cut the lowest ids are kept.
//
// The draw: Philox4x32-10 with counter (step, 0, 0, 0) and key (seed low, seed high) gives words x0, x1;
// u = (x0 * 2^21 + (x1 >> 11)) * 2^-53; the token is the first, by id, whose cumulative weight among the kept
// exceeds u times their total.
#include <cmath>

#include "../kernels.h"
#include "../simd/simd.h"

namespace mgm::cpu::MGM_ISA {
namespace {

constexpr float kInf = __builtin_inff();
constexpr int64_t kChunk = 256;  // weights whose sum is kept in f32 lanes before it goes to an f64 total
constexpr int kBins = 2048;

struct Histogram {
  double mass[kBins];
  int32_t count[kBins];
};

static inline int64_t chunks_of(int64_t n) {
  return (n + kChunk - 1) / kChunk;
}
static inline vf load_up_to(const float* p, int64_t left, float rest) {
  if (left >= kWidth) return load(p);
  alignas(64) float full[kWidth];
  for (int i = 0; i < kWidth; ++i) full[i] = i < left ? p[i] : rest;
  return load(full);
}

static bool has_nan(const float* x, int64_t n) {
  uint32_t found = 0;
  for (int64_t i = 0; i < n; ++i) found |= (f32_to_bits(x[i]) & 0x7fffffffu) > 0x7f800000u ? 1u : 0u;
  return found != 0;
}

// The largest of x (no NaN among them).
static float largest(const float* x, int64_t n) {
  vf top[4] = {set1(-kInf), set1(-kInf), set1(-kInf), set1(-kInf)};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int j = 0; j < 4; ++j) top[j] = max(top[j], load(x + i + j * kWidth));
  float best = max_lane(max(max(top[0], top[1]), max(top[2], top[3])));
  for (; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

static int64_t first_equal(const float* x, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i)
    if (x[i] == value) return i;
  return -1;
}

// The f64 sum of w, by f32 lanes within chunks of kChunk; sums [chunks] receives each chunk's if given.
static double total_of(const float* w, int64_t n, double* sums) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = begin + kChunk < n ? begin + kChunk : n;
    vf a = set1(0.0f), b = set1(0.0f);
    int64_t i = begin;
    for (; i + 2 * kWidth <= end; i += 2 * kWidth) {
      a = a + load(w + i);
      b = b + load(w + i + kWidth);
    }
    double chunk = sum(a + b);
    for (; i < end; ++i) chunk += w[i];
    if (sums) sums[begin / kChunk] = chunk;
    total += chunk;
  }
  return total;
}

// w = e^((x - top) * factor), w may be null; returns the sum. An infinite top is certain: weight 1, others 0.
static double weigh(const float* x, int64_t n, float top, float factor, float* w) {
  double total = 0.0;
  const vf t = set1(top), f = set1(factor);
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = begin + kChunk < n ? begin + kChunk : n;
    vf lanes = set1(0.0f);
    for (int64_t i = begin; i < end; i += kWidth) {
      const vf v = load_up_to(x + i, end - i, -kInf);
      const vf e = top == kInf ? select_lt(v, t, set1(0.0f), set1(1.0f)) : exp((v - t) * f);
      lanes = lanes + e;
      if (w) {
        if (end - i >= kWidth)
          store(w + i, e);
        else
          store_n(w + i, e, static_cast<int>(end - i));
      }
    }
    total += static_cast<double>(sum(lanes));
  }
  return total;
}

// Larger floats have larger keys; -0 and +0 have the same.
static inline uint32_t key_of(float x) {
  const uint32_t bits = f32_to_bits(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static inline float value_of(uint32_t key) {
  return bits_to_f32(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// Keep everything above `value`, and of the `ties` elements equal to it the first `keep`.
struct Cut {
  float value;
  int64_t keep, ties;
};

// Where the elements taken from the largest down reach `count` of them or (by_mass) the total weight `mass`.
// Elements with weight <= ignore do not take part by mass. At least one element must take part.
static Cut find_cut(const float* x, const float* w, int64_t n, bool by_mass, int64_t count, double mass,
                    float ignore, Histogram* h) {
  constexpr int kShift[3] = {21, 10, 0}, kSize[3] = {2048, 2048, 1024};
  uint32_t prefix = 0;
  int64_t taken = 0, ties = 0;
  double weight = 0.0, each = 1.0;
  for (int level = 0; level < 3; ++level) {
    const int shift = kShift[level], above = level == 0 ? 0 : kShift[level - 1];
    const uint32_t mask = static_cast<uint32_t>(kSize[level] - 1);
    std::memset(h, 0, sizeof *h);
    for (int64_t i = 0; i < n; ++i) {
      if (by_mass && !(w[i] > ignore)) continue;
      const uint32_t key = key_of(x[i]);
      if (level > 0 && key >> above != prefix) continue;
      const uint32_t bin = key >> shift & mask;
      ++h->count[bin];
      if (by_mass) h->mass[bin] += static_cast<double>(w[i]);
    }
    int chosen = -1;
    for (int bin = kSize[level] - 1; bin >= 0; --bin) {
      if (h->count[bin] == 0) continue;
      if (chosen >= 0) {
        taken += h->count[chosen];
        weight += h->mass[chosen];
      }
      chosen = bin;
      if (by_mass ? weight + h->mass[bin] >= mass : taken + h->count[bin] >= count) break;
    }
    if (chosen < 0) return {-kInf, n, n};
    ties = h->count[chosen];
    each = h->mass[chosen] / static_cast<double>(ties);
    prefix = prefix << (level == 2 ? 10 : 11) | static_cast<uint32_t>(chosen);
  }
  const double need = by_mass ? std::ceil((mass - weight) / each) : static_cast<double>(count - taken);
  const int64_t keep = need >= static_cast<double>(ties) ? ties : need > 1.0 ? static_cast<int64_t>(need) : 1;
  return {value_of(prefix), keep, ties};
}

static void apply_cut(const Cut& cut, const float* x, int64_t n, float* w) {
  const float value = cut.value;
  for (int64_t i = 0; i < n; ++i) w[i] = x[i] < value ? 0.0f : w[i];
  int64_t seen = 0;
  for (int64_t i = 0; cut.keep < cut.ties && i < n; ++i)
    if (x[i] == value && ++seen > cut.keep) w[i] = 0.0f;
}

// Words 0 and 1 of Philox4x32-10 (Salmon et al. 2011) as a double in [0, 1).
static double uniform(uint32_t counter, uint32_t k0, uint32_t k1) {
  uint32_t c[4] = {counter, 0, 0, 0};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(c[0]) * 0xD2511F53u,
                   b = static_cast<uint64_t>(c[2]) * 0xCD9E8D57u;
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    std::memcpy(c, next, sizeof c);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return static_cast<double>(static_cast<uint64_t>(c[0]) << 21 | c[1] >> 11) * 0x1p-53;
}

// The first id whose cumulative weight exceeds u times the total.
static int64_t draw(const float* w, int64_t n, double u, double* sums) {
  const double target = u * total_of(w, n, sums);
  double before = 0.0;
  int64_t last = -1;
  for (int64_t chunk = 0; chunk < chunks_of(n); ++chunk) {
    if (!(sums[chunk] > 0.0)) continue;
    const int64_t begin = chunk * kChunk, end = begin + kChunk < n ? begin + kChunk : n;
    const bool here = before + sums[chunk] > target;
    double sum = before;
    for (int64_t i = begin; i < end; ++i) {
      if (!(w[i] > 0.0f)) continue;
      last = i;
      sum += static_cast<double>(w[i]);
      if (here && sum > target) return i;
    }
    if (here) return last;  // the chunk's f32 sum was rounded up past what its elements reach
    before += sums[chunk];
  }
  return last;
}

static void apply_mask(const float* x, const uint8_t* mask, int64_t n, float* z) {
  for (int64_t i = 0; i < n; i += 8) {
    const uint8_t bits = mask[i / 8];
    const int64_t end = i + 8 < n ? i + 8 : n;
    for (int64_t j = i; j < end; ++j) z[j] = bits >> (j - i) & 1 ? x[j] : -kInf;
  }
}

struct Options {
  float temperature, top_p, min_p, repetition, presence, frequency;
};

// Repetition as Hugging Face (once for every distinct id), presence and frequency as OpenAI. seen: V bits.
static void apply_penalties(const Options& o, const int32_t* history, int64_t length, int64_t n, float* z,
                            uint8_t* seen, int32_t* counts) {
  std::memset(seen, 0, static_cast<size_t>((n + 7) / 8));
  for (int64_t i = 0; i < length; ++i) {
    const int32_t id = history[i];
    if (id < 0) continue;
    const uint8_t bit = static_cast<uint8_t>(1u << (id & 7));
    if (!(seen[id >> 3] & bit)) {
      seen[id >> 3] = static_cast<uint8_t>(seen[id >> 3] | bit);
      counts[id] = 0;
    }
    ++counts[id];
  }
  for (int64_t i = 0; i < length; ++i) {
    const int32_t id = history[i];
    if (id < 0 || !(seen[id >> 3] & (1u << (id & 7)))) continue;
    seen[id >> 3] = static_cast<uint8_t>(seen[id >> 3] & ~(1u << (id & 7)));
    const float x = z[id];
    if (x == kInf || x == -kInf) continue;
    const float repeated = x > 0.0f ? x / o.repetition : x * o.repetition;
    z[id] = repeated - o.presence - o.frequency * static_cast<float>(counts[id]);
  }
}

// The `n` largest, largest first, lowest id first on ties; unused places get id -1.
static void largest_n(const float* x, int64_t size, int64_t n, float* values, int32_t* ids) {
  int64_t held = 0;
  constexpr int64_t kBlock = 4 * kWidth;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = begin + kBlock < size ? begin + kBlock : size;
    if (held == n && end - begin == kBlock) {
      const vf a = max(load(x + begin), load(x + begin + kWidth)),
               b = max(load(x + begin + 2 * kWidth), load(x + begin + 3 * kWidth));
      if (!(max_lane(max(a, b)) > values[n - 1])) continue;
    }
    for (int64_t i = begin; i < end; ++i) {
      if (held == n && !(x[i] > values[n - 1])) continue;
      int64_t at = held < n ? held++ : n - 1;
      for (; at > 0 && x[i] > values[at - 1]; --at) {
        values[at] = values[at - 1];
        ids[at] = ids[at - 1];
      }
      values[at] = x[i];
      ids[at] = static_cast<int32_t>(i);
    }
  }
  for (; held < n; ++held) {
    values[held] = -kInf;
    ids[held] = -1;
  }
}

static inline float log_probability(float x, float top, double log_sum) {
  const double distance = x == top && top == kInf ? 0.0 : static_cast<double>(x) - static_cast<double>(top);
  return static_cast<float>(distance - log_sum);
}

// -1 when nothing may be chosen. z: processed logits; w: scratch.
static int64_t choose(const float* z, int64_t n, const Options& o, const int32_t* state, float* w,
                      double* sums, Histogram* histogram) {
  const float top = largest(z, n);
  if (top == -kInf) return -1;
  if (!(o.temperature > 0.0f) || top != top) return first_equal(z, n, top);
  const float inverse = 1.0f / o.temperature;
  double total = weigh(z, n, top, inverse < 3.402823466e38f ? inverse : 3.402823466e38f, w);
  const int64_t top_k = state[0];
  if (top_k > 0 && top_k < n) {
    apply_cut(find_cut(z, w, n, false, top_k, 0.0, 0.0f, histogram), z, n, w);
    total = total_of(w, n, nullptr);
  }
  if (o.top_p < 1.0f) {
    const double p = o.top_p > 0.0f ? static_cast<double>(o.top_p) : 0.0;
    // All weights this small together are less than what may be dropped, so none of them is in the set.
    const float ignore = static_cast<float>(0.5 * (1.0 - p) * total / static_cast<double>(n));
    apply_cut(find_cut(z, w, n, true, 0, p * total, ignore, histogram), z, n, w);
  }
  if (o.min_p > 0.0f) {
    const float least = o.min_p < 1.0f ? o.min_p : 1.0f;
    for (int64_t i = 0; i < n; ++i) w[i] = w[i] < least ? 0.0f : w[i];
  }
  return draw(w, n,
              uniform(static_cast<uint32_t>(state[3]), static_cast<uint32_t>(state[1]),
                      static_cast<uint32_t>(state[2])),
              sums);
}

}  // namespace

void sample(const SampleArgs& args, ThreadPool& pool) {
  const int64_t rows = args.logits.shape[0], n = args.logits.shape[1];
  const int64_t listed = args.logprobs ? args.logprobs.shape[1] - 1 : 0;
  for (int64_t b = 0; args.history && b < rows; ++b) {
    const int32_t* history = args.history.i32() + b * args.history.strides[0];
    const int64_t length = args.state.i32()[b * args.state.strides[0] + 4];
    if (length < 0 || length > args.history.shape[1])
      fail("expected a history length up to %lld for row %lld but received %lld",
           static_cast<long long>(args.history.shape[1]), static_cast<long long>(b),
           static_cast<long long>(length));
    for (int64_t i = 0; i < length; ++i)
      if (history[i] >= n)
        fail("expected an id below %lld for history entry %lld of row %lld but received %d",
             static_cast<long long>(n), static_cast<long long>(i), static_cast<long long>(b), history[i]);
  }

  pool.parallel_for(rows, 1, [&](int64_t begin, int64_t end) {
    const size_t floats = static_cast<size_t>(n + kWidth);
    for (int64_t b = begin; b < end; ++b) {
      const float* x = args.logits.f32() + b * args.logits.strides[0];
      const float* option = args.options.f32() + b * args.options.strides[0];
      const int32_t* state = args.state.i32() + b * args.state.strides[0];
      const Options o = {option[0], option[1], option[2], option[3], option[4], option[5]};
      int32_t* id = args.ids.i32() + b * args.ids.strides[0];
      float* logprobs = args.logprobs ? args.logprobs.f32() + b * args.logprobs.strides[0] : nullptr;
      int32_t* top_ids = listed > 0 ? args.top_ids.i32() + b * args.top_ids.strides[0] : nullptr;

      *id = -1;
      if (logprobs) logprobs[0] = __builtin_nanf("");
      if (n == 0 || has_nan(x, n)) {
        for (int64_t i = 0; i < listed; ++i) {
          logprobs[1 + i] = __builtin_nanf("");
          top_ids[i] = -1;
        }
        continue;
      }

      const float* z = x;
      const int64_t length = args.history ? state[4] : 0;
      const bool penalized =
          length > 0 && (o.repetition != 1.0f || o.presence != 0.0f || o.frequency != 0.0f);
      if (args.mask || penalized) {
        float* changed = static_cast<float*>(pool.scratch(0, sizeof(float) * floats));
        if (args.mask)
          apply_mask(x, args.mask.u8() + b * args.mask.strides[0], n, changed);
        else
          std::memcpy(changed, x, sizeof(float) * static_cast<size_t>(n));
        if (penalized) {
          int32_t* counts = static_cast<int32_t*>(pool.scratch(2, sizeof(int32_t) * floats + floats));
          apply_penalties(o, args.history.i32() + b * args.history.strides[0], length, n, changed,
                          reinterpret_cast<uint8_t*>(counts + n), counts);
        }
        z = changed;
      }
      float* w = static_cast<float*>(pool.scratch(1, sizeof(float) * floats));
      Histogram* histogram = static_cast<Histogram*>(
          pool.scratch(3, sizeof(Histogram) + sizeof(double) * static_cast<size_t>(chunks_of(n))));
      const int64_t chosen = choose(z, n, o, state, w, reinterpret_cast<double*>(histogram + 1), histogram);
      *id = static_cast<int32_t>(chosen);

      if (!logprobs) continue;
      const float top = largest(x, n);
      const double log_sum = std::log(weigh(x, n, top, 1.0f, nullptr));
      if (chosen >= 0) logprobs[0] = log_probability(x[chosen], top, log_sum);
      if (listed > 0) {
        largest_n(x, n, listed, logprobs + 1, top_ids);
        for (int64_t i = 0; i < listed && top_ids[i] >= 0; ++i)
          logprobs[1 + i] = log_probability(logprobs[1 + i], top, log_sum);
      }
    }
  });
}

}  // namespace mgm::cpu::MGM_ISA
