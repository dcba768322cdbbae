// Words of the tensor-core kernels: asynchronous copies to shared memory, ldmatrix, mma, and the swizzle that
// keeps ldmatrix free of bank conflicts. T is __nv_bfloat16 or __half throughout; two neighbouring elements
// share a 32-bit register, the first in its low half.
#pragma once
#include "common.cuh"

namespace mgm::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes past L1. Of them the first `valid` are read; the rest become zeros.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
}
// The same through L1, for what other warps of the multiprocessor read too.
__device__ __forceinline__ void copy_async_cached(uint32_t to, const void* from, int valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
}
// The same for 4 or 8 bytes, through L1.
template <int kBytes>
__device__ __forceinline__ void copy_async_small(uint32_t to, const void* from, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8, "cp.async.ca copies 4, 8 or 16 bytes");
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes), "r"(valid)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices; lane 8 i + j gives the address of row j of matrix i. Lane l receives elements 2 (l % 4)
// and the next of row l / 4; transposed, of column l / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Where 16-byte piece `piece` of row `row` lies when rows of kPieces pieces are stored one after the other:
// pieces are permuted by the row's number, so that one piece of each of eight neighbouring rows fills all
// banks once.
template <int kPieces>
__device__ __forceinline__ uint32_t swizzled(int row, int piece) {
  static_assert(kPieces >= 2 && (kPieces & (kPieces - 1)) == 0, "a power of two");
  constexpr int kMask = kPieces < 8 ? kPieces - 1 : 7;
  constexpr int kShift = kPieces >= 8 ? 0 : kPieces == 4 ? 1 : 2;
  return static_cast<uint32_t>((row * kPieces + (piece ^ (row >> kShift & kMask))) * 16);
}

// c += a b for a 16x16 tile of a and a 16x8 tile of b. Lane l holds, with g = l / 4 and t = l % 4:
//   a[0..3]  row g, g + 8, g, g + 8; columns 2t, 2t + 1 (a[2], a[3]: 8 further)
//   b0, b1   column g; rows 2t, 2t + 1 (b1: 8 further)
//   c[0..3]  row g (c[2], c[3]: g + 8), columns 2t, 2t + 1
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                            uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                     uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two values rounded to T in one register, and back.
template <class T>
__device__ __forceinline__ uint32_t pack_two(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack_two<__nv_bfloat16>(float first, float second) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}
template <>
__device__ __forceinline__ uint32_t pack_two<__half>(float first, float second) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}
template <class T>
__device__ __forceinline__ float2 unpack_two(uint32_t both);
template <>
__device__ __forceinline__ float2 unpack_two<__nv_bfloat16>(uint32_t both) {
  return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack_two<__half>(uint32_t both) {
  const __half2_raw raw{static_cast<unsigned short>(both), static_cast<unsigned short>(both >> 16)};
  return __half22float2(__half2(raw));
}

}  // namespace mgm::cuda
