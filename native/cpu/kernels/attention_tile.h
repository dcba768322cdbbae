// Softmax attention of a block of query rows over tiles of 64 keys, shared by attention.cpp and
// paged_attention.cpp. A row is one (query, head); all heads of a KV head's group are rows of the same block,
// so K and V are read once for the whole group.
//
// A tile's keys are transposed to kt [D, 64] and its values copied to v [64, D], both f32 and in cache. For
// every kRows rows: scores = Q kt and the weighted values = P v run through one register-blocked product
// (kRows x 2 vectors of accumulators), the online softmax (base 2, log2(e) folded into Q) between them stays
// in L1. Tiles start at multiples of 64 from key 0 and every sum runs over keys (or d) one by one, so a row's
// bits depend neither on the rows beside it nor on how many keys lie beyond the ones it may see.
#pragma once
#include "../kernels.h"
#include "../simd/simd.h"

namespace mgm::cpu::MGM_ISA {
namespace {

constexpr int kKeys = 64;
#if defined(__AVX512F__)
constexpr int kRows = 12, kAccumulators = 24;
#else
constexpr int kRows = 6, kAccumulators = 12;
#endif
constexpr int64_t kMaxRows = 256;

static inline int64_t min64(int64_t a, int64_t b) {
  return a < b ? a : b;
}
static inline int64_t max64(int64_t a, int64_t b) {
  return a > b ? a : b;
}
static inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// 2^t for t <= 0 to about 1 ulp; 0 below -126 (no subnormals); NaN stays NaN.
static inline vf exp2_nonpositive(vf t) {
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask(t.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const vf n = {_mm512_roundscale_ps(t.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
#else
  t = max(set1(-127.0f), t);
  const vi e = to_int(t);
  const vf n = to_float(e);
#endif
  const vf r = t - n;
  vf p = set1(1.5353361590e-4f);
  p = fma(p, r, set1(1.3398874519e-3f));
  p = fma(p, r, set1(9.6184373598e-3f));
  p = fma(p, r, set1(5.5503324708e-2f));
  p = fma(p, r, set1(2.4022647914e-1f));
  p = fma(p, r, set1(6.9314720286e-1f));
  p = fma(p, r, set1(1.0f));
#if defined(__AVX512F__)
  return {_mm512_maskz_scalef_ps(normal, p.v, n.v)};
#else
  return p * pow2(e);
#endif
}

// -inf (nothing seen yet) becomes 0, so that score - maximum is -inf rather than NaN.
static inline vf finite_max(vf m) {
  return select_lt(m, set1(-3.402823466e38f), set1(0.0f), m);
}

// acc[r][i] += sum over j of a[j * AK + r * AR] * b[j * ldb + i * kWidth ...], j in order.
template <int R, int N, int AK, int AR>
static inline __attribute__((always_inline)) void multiply(const float* a, const float* b, int64_t ldb,
                                                           int64_t k, vf (&acc)[R][N]) {
  for (int64_t j = 0; j < k; ++j, a += AK, b += ldb) {
    vf bv[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) bv[i] = load(b + i * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf av = set1(a[r * AR]);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) acc[r][i] = fma(av, bv[i], acc[r][i]);
    }
  }
}

template <int R, int N>
static inline __attribute__((always_inline)) void clear(vf (&acc)[R][N]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) acc[r][i] = set1(0.0f);
  }
}

// s [R, kKeys]: N vectors of scores.
template <int R, int N>
static inline __attribute__((always_inline)) void scores(const float* q, const float* kt, int64_t d,
                                                         float* s) {
  vf acc[R][N];
  clear(acc);
  multiply<R, N, R, 1>(q, kt, kKeys, d, acc);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) store(s + r * kKeys + i * kWidth, acc[r][i]);
  }
}

// o [R, ldo] = o * alpha[r] + P v for N vectors of the head dimension.
template <int R, int N>
static inline __attribute__((always_inline)) void weigh(const float* p, const float* v, int64_t ldo,
                                                        int64_t n, const float* alpha, float* o) {
  vf acc[R][N];
  clear(acc);
  multiply<R, N, 1, kKeys>(p, v, ldo, n, acc);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const vf a = set1(alpha[r]);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      float* to = o + r * ldo + i * kWidth;
      store(to, fma(load(to), a, acc[r][i]));
    }
  }
}

// s becomes the weights 2^(s - m); the running maximum m [R] and sums l [R, kWidth] (still one partial sum a
// lane) are brought up to date; alpha [R] is what the older sums must be scaled by. Not inlined: every row
// count must run the same instructions.
__attribute__((noinline)) static void softmax_step(int rows, int vectors, float* s, float* m, float* l,
                                                   float* alpha) {
  constexpr int kPadded = (kRows + kWidth - 1) / kWidth * kWidth;
  alignas(64) float fresh[kPadded], used[kPadded];
  for (int r = 0; r < rows; ++r) {
    vf top = load(s + r * kKeys);
    for (int i = 1; i < vectors; ++i) top = max(top, load(s + r * kKeys + i * kWidth));
    fresh[r] = max_lane(top);
  }
  for (int r = 0; r < rows; r += kWidth) {
    const int n = rows - r < kWidth ? rows - r : kWidth;
    // A full vector may only be moved when all its lanes are rows.
    const vf before = n == kWidth ? load(m + r) : load_n(m + r, n);
    const vf now = max(n == kWidth ? load(fresh + r) : load_n(fresh + r, n), before);
    const vf safe = finite_max(now);
    store(used + r, safe);
    const vf a = exp2_nonpositive(before - safe);
    if (n == kWidth) {
      store(m + r, now);
      store(alpha + r, a);
    } else {
      store_n(m + r, now, n);
      store_n(alpha + r, a, n);
    }
  }
  for (int r = 0; r < rows; ++r) {
    const vf top = set1(used[r]);
    vf sum = load(l + r * kWidth) * set1(alpha[r]);
    for (int i = 0; i < vectors; ++i) {
      float* at = s + r * kKeys + i * kWidth;
      const vf p = exp2_nonpositive(load(at) - top);
      store(at, p);
      sum = sum + p;
    }
    store(l + r * kWidth, sum);
  }
}

// One tile for R rows. q [d, R]; visible[r]: how many of the tile's keys row r sees, at most n.
template <int R>
static void tile_rows(const float* q, const float* kt, const float* v, int64_t d, int64_t ldo, int n,
                      const int* visible, float* m, float* l, float* o) {
  constexpr int kFit = kAccumulators / R >= 4 ? 4 : kAccumulators / R >= 2 ? 2 : 1;
  constexpr int N = kFit * kWidth > kKeys ? kKeys / kWidth : kFit;
  alignas(64) float s[R * kKeys];
  alignas(64) float alpha[R];
  const int vectors = (n + kWidth - 1) / kWidth;
  int i = 0;
  for (; i + N <= vectors; i += N) scores<R, N>(q, kt + i * kWidth, d, s + i * kWidth);
  for (; i < vectors; ++i) scores<R, 1>(q, kt + i * kWidth, d, s + i * kWidth);
  for (int r = 0; r < R; ++r)
    for (int j = visible[r] > 0 ? visible[r] : 0; j < vectors * kWidth; ++j)
      s[r * kKeys + j] = -__builtin_inff();
  softmax_step(R, vectors, s, m, l, alpha);
  const int64_t wide = ldo / kWidth;
  int64_t c = 0;
  for (; c + N <= wide; c += N) weigh<R, N>(s, v + c * kWidth, ldo, n, alpha, o + c * kWidth);
  for (; c < wide; ++c) weigh<R, 1>(s, v + c * kWidth, ldo, n, alpha, o + c * kWidth);
}

using TileRows = void (*)(const float*, const float*, const float*, int64_t, int64_t, int, const int*, float*,
                          float*, float*);
constexpr TileRows kTileRows[] = {
    nullptr,      tile_rows<1>, tile_rows<2>, tile_rows<3>,  tile_rows<4>,  tile_rows<5>,  tile_rows<6>,
#if defined(__AVX512F__)
    tile_rows<7>, tile_rows<8>, tile_rows<9>, tile_rows<10>, tile_rows<11>, tile_rows<12>,
#endif
};

static inline vf load_as(DType dtype, const void* row, int64_t i) {
  if (dtype == DType::f32) return load(static_cast<const float*>(row) + i);
  const uint16_t* p = static_cast<const uint16_t*>(row) + i;
  return dtype == DType::bf16 ? load_bf16(p) : load_f16(p);
}

// The first n elements from i on, the other lanes 0.
static inline vf load_n_as(DType dtype, const void* row, int64_t i, int n) {
  if (dtype == DType::f32) return load_n(static_cast<const float*>(row) + i, n);
  uint16_t tail[kWidth] = {};
  std::memcpy(tail, static_cast<const uint16_t*>(row) + i, sizeof(uint16_t) * static_cast<size_t>(n));
  return dtype == DType::bf16 ? load_bf16(tail) : load_f16(tail);
}

#if defined(__AVX512F__)
static inline void transpose(vf (&x)[16]) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 16
    for (int h = 0; h < 2; ++h) {
      const __m512d lo = _mm512_castps_pd(a[i + h]), hi = _mm512_castps_pd(a[i + 2 + h]);
      b[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
      b[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    const __m512 e0 = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88),
                 e1 = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    const __m512 f0 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88),
                 f1 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
    x[i].v = _mm512_shuffle_f32x4(e0, f0, 0x88);
    x[i + 8].v = _mm512_shuffle_f32x4(e0, f0, 0xdd);
    x[i + 4].v = _mm512_shuffle_f32x4(e1, f1, 0x88);
    x[i + 12].v = _mm512_shuffle_f32x4(e1, f1, 0xdd);
  }
}
#elif defined(__AVX2__)
static inline void transpose(vf (&x)[8]) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(x[i].v, x[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(x[i].v, x[i + 1].v);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 8
    for (int h = 0; h < 2; ++h) {
      b[i + 2 * h] = _mm256_shuffle_ps(a[i + h], a[i + 2 + h], 0x44);
      b[i + 2 * h + 1] = _mm256_shuffle_ps(a[i + h], a[i + 2 + h], 0xee);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    x[i].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    x[i + 4].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}
#else
static inline void transpose(vf (&x)[4]) {
  const vf_raw a = __builtin_shufflevector(x[0].v, x[1].v, 0, 4, 2, 6);
  const vf_raw b = __builtin_shufflevector(x[0].v, x[1].v, 1, 5, 3, 7);
  const vf_raw c = __builtin_shufflevector(x[2].v, x[3].v, 0, 4, 2, 6);
  const vf_raw d = __builtin_shufflevector(x[2].v, x[3].v, 1, 5, 3, 7);
  x[0].v = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  x[1].v = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  x[2].v = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  x[3].v = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}
#endif

// How many rows ahead of the one being packed are brought towards the cache: enough to cover the latency of
// memory, few enough that rows a power of two apart do not push each other out.
constexpr int kAhead = 32;

// Asks for the cache line of element c of row i < n if c begins one; rows of pages are too scattered for the
// processor to foresee. (Always inlined: GCC drops calls of a function that does nothing but prefetch.)
template <DType T>
static inline __attribute__((always_inline)) void fetch(const void* const* rows, int i, int n, int64_t c) {
  constexpr int64_t kBytes = T == DType::f32 ? 4 : 2;
  if (i < n && c * kBytes % 64 < kWidth * kBytes)
    __builtin_prefetch(static_cast<const char*>(rows[i]) + c * kBytes, 0, 3);
}

// kt [d, kKeys] = n rows transposed, columns past n (to a whole vector) zero. `rows` goes on to n_known rows.
template <DType T>
static void pack_keys(const void* const* rows, int n, int n_known, int64_t d, float* kt) {
  for (int j = 0; j < n; j += kWidth) {
    const void* const* group = rows + j;
    int64_t c = 0;
    for (; j + kWidth <= n && c + kWidth <= d; c += kWidth) {
      vf x[kWidth];
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) {
        fetch<T>(rows, j + kAhead + r, n_known, c);
        x[r] = load_as(T, group[r], c);
      }
      transpose(x);
      float* to = kt + c * kKeys + j;
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) store(to + r * kKeys, x[r]);
    }
    for (; c < d; c += kWidth) {
      const int width = static_cast<int>(min64(kWidth, d - c));
      vf x[kWidth];
      for (int r = 0; r < kWidth; ++r)
        x[r] = j + r >= n        ? set1(0.0f)
               : width == kWidth ? load_as(T, group[r], c)
                                 : load_n_as(T, group[r], c, width);
      transpose(x);
      for (int r = 0; r < width; ++r) store(kt + (c + r) * kKeys + j, x[r]);
    }
  }
}

// v [n, ldo] = the rows, columns past d zero.
template <DType T>
static void pack_values(const void* const* rows, int n, int n_known, int64_t d, int64_t ldo, float* v) {
  for (int j = 0; j < n; ++j) {
    const void* row = rows[j];
    float* to = v + j * ldo;
    int64_t c = 0;
    for (; c + kWidth <= d; c += kWidth) {
      fetch<T>(rows, j + kAhead, n_known, c);
      store(to + c, load_as(T, row, c));
    }
    if (c < d) store(to + c, load_n_as(T, row, c, static_cast<int>(d - c)));
  }
}

// Where the keys and values of one KV head of one sequence are. Strides in bytes.
struct Keys {
  const char *k, *v;  // of page 0, or of key 0 when there is no table
  int64_t k_stride, v_stride;
  const int32_t* table = nullptr;  // page of every page_size keys
  int64_t page_size = 0, k_page_stride = 0, v_page_stride = 0;
  DType dtype = DType::f32;
};

// Packs n keys and values from `first` on; those that follow, up to key `fetch_end`, are known to be next.
static void pack_tile(const Keys& keys, int64_t first, int n, int64_t fetch_end, int64_t d, int64_t ldo,
                      float* kt, float* v) {
  const void *k_rows[kKeys + kAhead], *v_rows[kKeys + kAhead];
  const int known = static_cast<int>(max64(n, min64(kKeys + kAhead, fetch_end - first)));
  if (keys.table) {
    int64_t page = first / keys.page_size, offset = first % keys.page_size;
    for (int j = 0; j < known; ++j) {
      k_rows[j] = keys.k + keys.table[page] * keys.k_page_stride + offset * keys.k_stride;
      v_rows[j] = keys.v + keys.table[page] * keys.v_page_stride + offset * keys.v_stride;
      if (++offset == keys.page_size) ++page, offset = 0;
    }
  } else {
    for (int j = 0; j < known; ++j) {
      k_rows[j] = keys.k + (first + j) * keys.k_stride;
      v_rows[j] = keys.v + (first + j) * keys.v_stride;
    }
  }
  if (keys.dtype == DType::f32) {
    pack_keys<DType::f32>(k_rows, n, known, d, kt);
    pack_values<DType::f32>(v_rows, n, known, d, ldo, v);
  } else if (keys.dtype == DType::bf16) {
    pack_keys<DType::bf16>(k_rows, n, known, d, kt);
    pack_values<DType::bf16>(v_rows, n, known, d, ldo, v);
  } else {
    pack_keys<DType::f16>(k_rows, n, known, d, kt);
    pack_values<DType::f16>(v_rows, n, known, d, ldo, v);
  }
}

// The rows of one KV head of one sequence: row r is query r / group, head r % group of the group.
struct Queries {
  const float* q;      // query 0, the group's first head
  int64_t stride;      // of a query, in floats
  int64_t group, d;    // heads a KV head; head dimension
  int64_t first_seen;  // how many keys query 0 sees; query i sees i more (causal)
  int64_t keys;        // how many there are
  bool causal;
  float scale;

  int64_t seen(int64_t row) const { return causal ? max64(0, min64(keys, first_seen + row / group)) : keys; }
};

static inline int64_t padded_head(int64_t d) {
  return ceil_div(d, kWidth) * kWidth;
}

// Running state of rows: maximum, sums by lane, unnormalized output.
struct State {
  float *m, *l, *o;  // [rows], [rows, kWidth], [rows, padded d]
};

static inline int64_t state_floats(int64_t rows, int64_t d) {
  return ceil_div(rows, 16) * 16 + rows * kWidth + rows * padded_head(d);
}
static inline State state_at(float* p, int64_t rows, int64_t d) {
  State s;
  s.o = p;
  s.l = s.o + rows * padded_head(d);
  s.m = s.l + rows * kWidth;
  return s;
}
static void reset(const State& s, int64_t rows, int64_t d) {
  for (int64_t r = 0; r < rows; ++r) s.m[r] = -__builtin_inff();
  std::memset(s.l, 0, sizeof(float) * static_cast<size_t>(rows * kWidth));
  std::memset(s.o, 0, sizeof(float) * static_cast<size_t>(rows * padded_head(d)));
}

// Rows [first, first + rows) of a head, blocks of kRows after each other, each [d, rows of the block].
static void pack_queries(const Queries& qs, int64_t first, int64_t rows, float* packed) {
  const vf scale = set1(qs.scale * 1.44269504088896341f);
  for (int64_t begin = 0; begin < rows; begin += kRows) {
    const int64_t n = min64(kRows, rows - begin);
    for (int64_t r0 = 0; r0 < n; r0 += kWidth) {
      const float* from[kWidth];
      for (int64_t r = 0; r < kWidth; ++r) {
        const int64_t row = first + begin + min64(r0 + r, n - 1);  // what is past the last is not stored
        from[r] = qs.q + row / qs.group * qs.stride + row % qs.group * qs.d;
      }
      for (int64_t c = 0; c < qs.d; c += kWidth) {
        vf x[kWidth];
#pragma GCC unroll 16
        for (int r = 0; r < kWidth; ++r) x[r] = load_up_to(from[r] + c, qs.d - c);
        transpose(x);
        float* to = packed + begin * qs.d + c * n + r0;
        const int64_t width = min64(kWidth, qs.d - c);
        for (int64_t i = 0; i < width; ++i) store_up_to(to + i * n, x[i] * scale, n - r0);
      }
    }
  }
}

static inline int64_t tile_floats(int64_t d) {
  return kKeys * d + kKeys * padded_head(d);
}

// Brings `state` up to date with keys [key_begin, key_end), key_begin a multiple of kKeys. Keys up to
// fetch_end are about to be needed by this thread.
static void attend(const Keys& keys, const Queries& qs, int64_t first, int64_t rows, const float* packed,
                   int64_t key_begin, int64_t key_end, int64_t fetch_end, const State& state, float* tile) {
  const int64_t ldo = padded_head(qs.d);
  float *kt = tile, *v = tile + kKeys * qs.d;
  const int64_t most_seen = qs.seen(first + rows - 1);
  key_end = min64(key_end, most_seen);
  fetch_end = min64(fetch_end, most_seen);
  for (int64_t key = key_begin; key < key_end; key += kKeys) {
    const int n = static_cast<int>(min64(kKeys, key_end - key));
    pack_tile(keys, key, n, fetch_end, qs.d, ldo, kt, v);
    for (int64_t begin = 0; begin < rows; begin += kRows) {
      const int64_t count = min64(kRows, rows - begin);
      const int64_t most = qs.seen(first + begin + count - 1) - key;
      if (most <= 0) continue;
      int visible[kRows];
      const bool all = qs.seen(first + begin) >= key + n;
      for (int64_t r = 0; r < count; ++r)
        visible[r] = all ? n : static_cast<int>(max64(0, min64(n, qs.seen(first + begin + r) - key)));
      kTileRows[count](packed + begin * qs.d, kt, v, qs.d, ldo, static_cast<int>(min64(n, most)), visible,
                       state.m + begin, state.l + begin * kWidth, state.o + begin * ldo);
    }
  }
}

// out = o / sum of l; zeros for a row that sees no key. out is [query, head, d] as in the contract.
static void finish(const State& state, const Queries& qs, int64_t first, int64_t rows, float* out,
                   int64_t out_stride) {
  const int64_t ldo = padded_head(qs.d);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first + r;
    float* to = out + row / qs.group * out_stride + row % qs.group * qs.d;
    if (qs.seen(row) <= 0) {
      std::memset(to, 0, sizeof(float) * static_cast<size_t>(qs.d));
      continue;
    }
    const float* o = state.o + r * ldo;
    const vf l = set1(sum(load(state.l + r * kWidth)));
    int64_t c = 0;
    for (; c + kWidth <= qs.d; c += kWidth) store(to + c, load(o + c) / l);
    if (c < qs.d) store_n(to + c, load(o + c) / l, static_cast<int>(qs.d - c));
  }
}

// How many rows share a packed tile: enough to make packing cheap, few enough that queries and outputs stay
// in the second-level cache and that every thread gets work. No result depends on it.
static int64_t rows_per_task(int64_t total_rows, int64_t d, int threads) {
  const int64_t cached = max64(4 * kRows, min64(kMaxRows, 65536 / d));
  const int64_t shared = ceil_div(total_rows, 4 * static_cast<int64_t>(threads));
  return max64(4 * kRows, min64(cached, shared));
}

// Splits n rows evenly into blocks of at most about `limit`, whole register blocks but for the last.
static int64_t even_rows(int64_t n, int64_t limit) {
  const int64_t blocks = max64(1, ceil_div(n, limit));
  return ceil_div(ceil_div(n, blocks), kRows) * kRows;
}

// One sequence's share of a flat task list.
struct Span {
  int64_t tasks_before, q_begin, queries, k_begin, keys, rows_per_block;
};

// The sequence that task t belongs to; of Spans or what extends them.
template <class S>
static const S& find_span(const S* spans, int64_t n, int64_t task) {
  int64_t lo = 0, hi = n - 1;
  while (lo < hi) {
    const int64_t mid = (lo + hi + 1) / 2;
    if (spans[mid].tasks_before <= task)
      lo = mid;
    else
      hi = mid - 1;
  }
  return spans[lo];
}

// Queries of a KV head's group of heads in q [Tq, H, D].
static Queries queries_of(const View& q, const Span& s, int64_t group, int64_t kv_head, float scale,
                          bool causal) {
  const int64_t d = q.shape[2];
  Queries qs;
  qs.q = q.f32() + s.q_begin * q.strides[0] + kv_head * group * d;
  qs.stride = q.strides[0];
  qs.group = group;
  qs.d = d;
  qs.first_seen = s.keys - s.queries + 1;
  qs.keys = s.keys;
  qs.causal = causal;
  qs.scale = scale;
  return qs;
}

// Where their results go in out [Tq, H, D].
static float* results_of(const View& out, const Span& s, int64_t group, int64_t kv_head) {
  return out.f32() + s.q_begin * out.strides[0] + kv_head * group * out.shape[2];
}

// cu [B+1]: not decreasing and within [0, total].
static void check_offsets(const View& cu, int64_t total, const char* name) {
  int64_t before = 0;
  for (int64_t b = 0; b < cu.shape[0]; ++b) {
    const int64_t at = cu.i32()[b * cu.strides[0]];
    if (at < before || at > total)
      fail("expected non-decreasing offsets from 0 to %lld for %s but received %lld after %lld at index %lld",
           static_cast<long long>(total), name, static_cast<long long>(at), static_cast<long long>(before),
           static_cast<long long>(b));
    before = at;
  }
}

// Padding queries, which belong to no sequence of cu_q [B+1], become zeros in out [Tq, H, D].
static void zero_padding(const View& out, const View& cu_q) {
  const int64_t sequences = cu_q.shape[0] - 1, total = out.shape[0];
  const int64_t begin = sequences > 0 ? cu_q.i32()[0] : total;
  const int64_t end = sequences > 0 ? cu_q.i32()[sequences * cu_q.strides[0]] : total;
  for (int64_t t = 0; t < total; ++t)
    if (t < begin || t >= end)
      std::memset(out.f32() + t * out.strides[0], 0,
                  sizeof(float) * static_cast<size_t>(out.shape[1] * out.shape[2]));
}

}  // namespace
}  // namespace mgm::cpu::MGM_ISA
