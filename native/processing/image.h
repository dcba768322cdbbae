// Resizing of 8-bit RGB pictures as Pillow does it, bit for bit (Image.resize with BICUBIC, antialiased),
// with the padding before and the cropping after it folded in: neither the padded square nor the part that
// the crop drops is ever made. No framework; memory is a few rows, whatever the picture's size.
#pragma once
#include <cstdint>

namespace mgm::processing {

// Filter tables grow with a side; nothing real is longer.
inline constexpr int64_t kMaxSide = 65536;

struct Resize {
  bool pad;               // first paste the picture centred on a square of its longer side
  uint8_t color[3];       // of that square
  int64_t width, height;  // of the whole resized picture
  int64_t crop_x, crop_y, crop_width, crop_height;  // the part of it that is made
};

// data [height, width, 3] -> out [crop_height, crop_width, 3]. Throws Error(INVALID_ARGUMENT) for sizes that
// are not positive, sides over kMaxSide, and crops outside the resized picture.
void resize_bicubic(const uint8_t* data, int64_t width, int64_t height, const Resize& resize, uint8_t* out);

// out = (x / 255 - mean[c]) / std[c], as transformers' CLIPImageProcessor rounds it. [pixels, 3]
void normalize(const uint8_t* x, int64_t pixels, const float* mean, const float* std, float* out);

// Pillow's convert('RGB') of CMYK: [pixels, 4] -> [pixels, 3].
void cmyk_to_rgb(const uint8_t* x, int64_t pixels, uint8_t* out);

}  // namespace mgm::processing
