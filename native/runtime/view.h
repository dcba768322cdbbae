// Plain descriptions of tensors that kernels read and write. No ownership, no allocation, no framework.
#pragma once
#include <cstddef>
#include <cstdint>

// Kernel files are compiled for several instruction sets: a shared inline function must never become a symbol
// that the linker picks one copy of.
#define MGM_INLINE __attribute__((always_inline)) inline

namespace mgm {

// int8 and int4 are storage only: blocks of quantized weights inside a packed matrix (native/cpu/packed.h).
enum class DType : uint8_t { f32, bf16, f16, i32, u8, int8, int4 };

// How the bytes of a tensor are arranged.
// strided: element (i, j, ...) at data + i*strides[0] + j*strides[1] + ...
// panels: a weight matrix [out, in] in the backend's own order, made by packLinear; opaque to everything
// else. gated_panels: the same for two matrices [2*out, in] (gate rows, then up rows) interleaved for a gated
// epilogue.
enum class Layout : uint8_t { strided, panels, gated_panels };

inline constexpr int kMaxRank = 5;

struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  Layout layout = Layout::strided;
  int rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t strides[kMaxRank] = {};  // in elements; meaningless when packed

  MGM_INLINE explicit operator bool() const {
    return data != nullptr;
  }  // false: the optional argument was not given
  MGM_INLINE float* f32() const { return static_cast<float*>(data); }
  MGM_INLINE int32_t* i32() const { return static_cast<int32_t*>(data); }
  MGM_INLINE uint16_t* u16() const { return static_cast<uint16_t*>(data); }  // bf16 or f16 bits
  MGM_INLINE uint8_t* u8() const { return static_cast<uint8_t*>(data); }
  MGM_INLINE int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
};

}  // namespace mgm
