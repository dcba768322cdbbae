// Normal numbers from Philox4x32-10 (Salmon et al. 2011) and Box-Muller; the formula is in native/ops.h.
// Loops over kLanes counters are plain arithmetic on arrays, which the compiler turns into vectors.
#include "../kernels.h"
#include "../simd/simd.h"

namespace mgm::cpu::MGM_ISA {
namespace {

constexpr int kLanes = 64;  // counters at a time

using Words = uint32_t[4][kLanes];

// words[w][i]: word w of the counter (first + i, 0, stream, 0).
static void philox(const int32_t* seed, int64_t first, Words& words) {
  uint32_t k0 = static_cast<uint32_t>(seed[0]), k1 = static_cast<uint32_t>(seed[1]);
  for (int i = 0; i < kLanes; ++i) {
    words[0][i] = static_cast<uint32_t>(first + i);
    words[1][i] = words[3][i] = 0;
    words[2][i] = static_cast<uint32_t>(seed[2]);
  }
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t a = static_cast<uint64_t>(words[0][i]) * 0xD2511F53u,
                     b = static_cast<uint64_t>(words[2][i]) * 0xCD9E8D57u;
      words[0][i] = static_cast<uint32_t>(b >> 32) ^ words[1][i] ^ k0;
      words[1][i] = static_cast<uint32_t>(b);
      words[2][i] = static_cast<uint32_t>(a >> 32) ^ words[3][i] ^ k1;
      words[3][i] = static_cast<uint32_t>(a);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// (word + 0.5) * 2^-32, in (0, 1]
static inline float uniform(uint32_t word) {
  return (static_cast<float>(word) + 0.5f) * 0x1p-32f;
}

// ln x for 2^-33 <= x <= 1, to 1 ulp: x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), ln(1 + f) as in
// Cephes' logf.
static inline float log_of(float x) {
  const uint32_t bits = f32_to_bits(x) - 0x3f3504f3u;  // sqrt(1/2)
  const float e = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  const float f = bits_to_f32((bits & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float z = f * f;
  const float low = f * z * p - 2.12194440e-4f * e - 0.5f * z;
  return (f + low) + 0.693359375f * e;
}

// cos(2 pi u) and sin(2 pi u) for 0 <= u <= 1. The nearest quarter turn is taken off exactly; Cephes' sinf
// and cosf do the rest, at most an eighth.
static inline void circle(float u, float& cosine, float& sine) {
  const uint32_t quarter = static_cast<uint32_t>(static_cast<int32_t>(4.0f * u + 0.5f));
  const float t = (u - 0.25f * static_cast<float>(static_cast<int32_t>(quarter))) * 6.28318530717958648f;
  const float z = t * t;
  float s = -1.9515295891e-4f;
  s = s * z + 8.3321608736e-3f;
  s = s * z - 1.6666654611e-1f;
  s = s * z * t + t;
  float c = 2.443315711809948e-5f;
  c = c * z - 1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  c = c * z * z - 0.5f * z + 1.0f;
  // A quarter turn takes (c, s) to (-s, c).
  const uint32_t odd = 0u - (quarter & 1u), half = (quarter & 2u) << 30;
  const uint32_t cos_bits = f32_to_bits(c), sin_bits = f32_to_bits(s);
  cosine = bits_to_f32(((cos_bits & ~odd) | ((sin_bits ^ 0x80000000u) & odd)) ^ half);
  sine = bits_to_f32(((sin_bits & ~odd) | (cos_bits & odd)) ^ half);
}

// out[i] = radius * cosine and radius * sine of word pairs.
static void box_muller(const uint32_t* radii, const uint32_t* angles, float* cosines, float* sines) {
  float radius[kLanes];
  for (int i = 0; i < kLanes; ++i) radius[i] = -2.0f * log_of(uniform(radii[i]));
  for (int i = 0; i < kLanes; i += kWidth) store(radius + i, sqrt(load(radius + i)));
  for (int i = 0; i < kLanes; ++i) {
    float cosine, sine;
    circle(uniform(angles[i]), cosine, sine);
    cosines[i] = radius[i] * cosine;
    sines[i] = radius[i] * sine;
  }
}

}  // namespace

void random_normal(const RandomNormalArgs& args, ThreadPool& pool) {
  const int64_t n = args.out.shape[1], blocks = (n + 4 * kLanes - 1) / (4 * kLanes);
  pool.parallel_for(args.out.shape[0] * blocks, 16, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / blocks, first = task % blocks * 4 * kLanes;
      Words words;
      float results[4][kLanes];
      philox(args.seeds.i32() + row * args.seeds.strides[0], first / 4, words);
      box_muller(words[0], words[1], results[0], results[1]);
      box_muller(words[2], words[3], results[2], results[3]);
      float* out = args.out.f32() + row * n + first;
      const int64_t count = n - first < 4 * kLanes ? n - first : 4 * kLanes;
      for (int64_t i = 0; i < count; ++i) out[i] = results[i % 4][i / 4];
    }
  });
}

}  // namespace mgm::cpu::MGM_ISA
