#include "processing/image.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "runtime/error.h"
#if defined(__SSE4_1__)
#include <smmintrin.h>
#endif

namespace mgm::processing {
namespace {

constexpr int kPrecisionBits = 32 - 8 - 2;
constexpr int32_t kHalf = 1 << (kPrecisionBits - 1);

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * a;
  return 0.0;
}

uint8_t clip8(int32_t x) {
  return static_cast<uint8_t>(std::clamp(x >> kPrecisionBits, 0, 255));
}

// The taps of one output position: fixed-point weights of inputs first .. first + count - 1.
struct Taps {
  int64_t first = 0, count = 0;
  const int32_t* weight = nullptr;
};

// Taps of outputs begin .. begin + count - 1 of an axis resized from `in` to `out` positions: Pillow's
// precompute_coeffs and normalize_coeffs_8bpc (src/libImaging/Resample.c). An axis of unchanged size is not
// filtered at all there.
struct Axis {
  Axis(int64_t in, int64_t out, int64_t begin, int64_t count) : taps(static_cast<size_t>(count)) {
    const double scale = static_cast<double>(in) / static_cast<double>(out);
    const double filter_scale = std::max(scale, 1.0), support = 2.0 * filter_scale;
    std::vector<double> row(static_cast<size_t>(std::ceil(support)) * 2 + 1);
    std::vector<size_t> offsets;
    for (int64_t i = 0; i < count; ++i) {
      Taps& tap = taps[static_cast<size_t>(i)];
      offsets.push_back(weights.size());
      if (in == out) {
        tap.first = begin + i;
        tap.count = 1;
        weights.push_back(1 << kPrecisionBits);
        continue;
      }
      const double center = (static_cast<double>(begin + i) + 0.5) * scale;
      const int64_t low = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
      const int64_t high = std::min(static_cast<int64_t>(center + support + 0.5), in);
      double sum = 0.0;
      for (int64_t j = low; j < high; ++j) {
        const double w = bicubic((static_cast<double>(j) - center + 0.5) * (1.0 / filter_scale));
        row[static_cast<size_t>(j - low)] = w;
        sum += w;
      }
      for (int64_t j = low; j < high; ++j) {
        double w = row[static_cast<size_t>(j - low)];
        if (sum != 0.0) w /= sum;
        const double fixed = w * (1 << kPrecisionBits);
        weights.push_back(static_cast<int32_t>(w < 0 ? -0.5 + fixed : 0.5 + fixed));
      }
      tap.first = low;
      tap.count = high - low;
    }
    for (size_t i = 0; i < taps.size(); ++i) {
      taps[i].weight = weights.data() + offsets[i];
      longest = std::max(longest, taps[i].count);
    }
  }

  std::vector<Taps> taps;
  std::vector<int32_t> weights;
  int64_t longest = 0;
};

// A column of the horizontal pass: what the padding contributes (rounding included) and the taps inside the
// picture. Integer sums do not care about order, so this is exact.
struct Column {
  int32_t padding[3];  // of a row of the picture
  uint8_t blank[3];    // the result in a row of padding
  int64_t first, count;
  const int32_t* weight;
};

void filter_row(const uint8_t* row, const std::vector<Column>& columns, uint8_t* out) {
  for (const Column& column : columns) {
    const uint8_t* pixel = row + column.first * 3;
    int64_t k = 0;
    int32_t sum[4] = {column.padding[0], column.padding[1], column.padding[2], 0};
#if defined(__SSE4_1__)
    __m128i acc = _mm_loadu_si128(reinterpret_cast<const __m128i*>(sum));
    for (; k + 1 < column.count; ++k, pixel += 3) {  // 4 bytes at a time: not for the last pixel
      int32_t four;
      std::copy_n(pixel, 4, reinterpret_cast<uint8_t*>(&four));
      acc = _mm_add_epi32(
          acc, _mm_mullo_epi32(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(four)), _mm_set1_epi32(column.weight[k])));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sum), acc);
#endif
    for (; k < column.count; ++k, pixel += 3)
      for (int c = 0; c < 3; ++c) sum[c] += pixel[c] * column.weight[k];
    for (int c = 0; c < 3; ++c) *out++ = clip8(sum[c]);
  }
}

}  // namespace

void resize_bicubic(const uint8_t* data, int64_t width, int64_t height, const Resize& resize, uint8_t* out) {
  if (width < 1 || height < 1 || width > kMaxSide || height > kMaxSide)
    throw Error("INVALID_ARGUMENT",
                format("expected sides of 1 to %lld for an image but received %lld x %lld",
                       static_cast<long long>(kMaxSide), static_cast<long long>(width),
                       static_cast<long long>(height)));
  // Far above any crop, far below where positions lose precision.
  constexpr int64_t kMaxResized = int64_t{1} << 40;
  const auto fits = [](int64_t start, int64_t length, int64_t whole) {
    return whole >= 1 && whole <= kMaxResized && start >= 0 && length >= 1 && length <= kMaxSide &&
           start <= whole - length;
  };
  if (!fits(resize.crop_x, resize.crop_width, resize.width) ||
      !fits(resize.crop_y, resize.crop_height, resize.height))
    throw Error("INVALID_ARGUMENT", "expected a crop inside the resized picture for an image");

  const int64_t side = std::max(width, height);
  const int64_t padded_w = resize.pad ? side : width, padded_h = resize.pad ? side : height;
  const int64_t left = (padded_w - width) / 2, top = (padded_h - height) / 2;
  const Axis horizontal(padded_w, resize.width, resize.crop_x, resize.crop_width);
  const Axis vertical(padded_h, resize.height, resize.crop_y, resize.crop_height);

  std::vector<Column> columns;
  columns.reserve(horizontal.taps.size());
  for (const Taps& taps : horizontal.taps) {
    const int64_t low = std::clamp(taps.first, left, left + width);
    const int64_t high = std::clamp(taps.first + taps.count, left, left + width);
    Column column = {{kHalf, kHalf, kHalf}, {}, low - left, high - low, taps.weight + (low - taps.first)};
    // A column wholly in the padding keeps no taps and no pointer past its weights.
    if (high == low) column.first = 0, column.weight = taps.weight;
    int32_t outside = 0, all = 0;
    for (int64_t k = 0; k < taps.count; ++k) {
      all += taps.weight[k];
      if (taps.first + k < low || taps.first + k >= high) outside += taps.weight[k];
    }
    for (int c = 0; c < 3; ++c) {
      column.padding[c] += outside * resize.color[c];
      column.blank[c] = clip8(kHalf + all * resize.color[c]);
    }
    columns.push_back(column);
  }

  const size_t row_bytes = static_cast<size_t>(resize.crop_width) * 3;
  std::vector<uint8_t> blank;
  for (const Column& column : columns) blank.insert(blank.end(), column.blank, column.blank + 3);
  // Horizontally filtered rows that the vertical filter still looks at; row y lies in slot y % longest.
  std::vector<uint8_t> ring(row_bytes * static_cast<size_t>(vertical.longest));
  std::vector<int32_t> sums(row_bytes);
  int64_t filtered = 0;  // rows below this one have been filtered, or are not needed
  for (const Taps& taps : vertical.taps) {
    std::fill(sums.begin(), sums.end(), kHalf);
    for (int64_t y = std::max(filtered, taps.first); y < taps.first + taps.count; ++y)
      if (y >= top && y < top + height)
        filter_row(data + (y - top) * width * 3, columns,
                   ring.data() + static_cast<size_t>(y % vertical.longest) * row_bytes);
    filtered = std::max(filtered, taps.first + taps.count);
    for (int64_t k = 0; k < taps.count; ++k) {
      const int64_t y = taps.first + k;
      const uint8_t* row = y >= top && y < top + height
                               ? ring.data() + static_cast<size_t>(y % vertical.longest) * row_bytes
                               : blank.data();
      const int32_t weight = taps.weight[k];
      for (size_t i = 0; i < row_bytes; ++i) sums[i] += row[i] * weight;
    }
    for (size_t i = 0; i < row_bytes; ++i) out[i] = clip8(sums[i]);
    out += row_bytes;
  }
}

void normalize(const uint8_t* x, int64_t pixels, const float* mean, const float* std, float* out) {
  float table[3][256];
  for (int c = 0; c < 3; ++c)
    for (int v = 0; v < 256; ++v) table[c][v] = (static_cast<float>(v * (1.0 / 255.0)) - mean[c]) / std[c];
  for (int64_t i = 0; i < pixels; ++i)
    for (int c = 0; c < 3; ++c) out[3 * i + c] = table[c][x[3 * i + c]];
}

void cmyk_to_rgb(const uint8_t* x, int64_t pixels, uint8_t* out) {
  for (int64_t i = 0; i < pixels; ++i) {
    const int white = 255 - x[4 * i + 3];
    for (int c = 0; c < 3; ++c) {
      const int t = x[4 * i + c] * white + 128;  // Pillow's MULDIV255
      out[3 * i + c] = static_cast<uint8_t>(std::max(white - (((t >> 8) + t) >> 8), 0));
    }
  }
}

}  // namespace mgm::processing
