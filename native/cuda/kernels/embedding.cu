// Row gathers: token embeddings from a plain table or bf16 panels (whose rows lie in order), and the splice
// of image rows among text rows. A block is a row; each element is read and written once. An index out of
// range gives zeros and a fault.
#include "common.cuh"
#include "embedding.h"

namespace mgm::cuda {

template <class T>
__device__ void gather(const EmbeddingParams& p) {
  const int64_t t = blockIdx.x;
  const int64_t id = p.ids[t];
  if (id >= p.rows && threadIdx.x == 0) report(p.fault, FaultKind::embedding_id, id, 0, p.rows, t);
  const bool valid = id >= 0 && id < p.rows;
  const T* row = static_cast<const T*>(p.table) + (valid ? id : 0) * p.table_stride;
  for (int64_t i = threadIdx.x; i < p.width; i += kRowThreads)
    p.out[t * p.width + i] = valid ? p.scale * to_float(row[i]) : 0.0f;
}

#define EMBEDDING(name, T)                                  \
  extern "C" __global__ void __launch_bounds__(kRowThreads) \
      name(const __grid_constant__ EmbeddingParams p) {     \
    gather<T>(p);                                           \
  }
EMBEDDING(embedding_f32, float)
EMBEDDING(embedding_bf16, __nv_bfloat16)
EMBEDDING(embedding_f16, __half)

extern "C" __global__ void __launch_bounds__(kRowThreads)
    splice_embeddings(const __grid_constant__ SpliceParams p) {
  const int64_t at = blockIdx.x;
  const int64_t index = p.index[at];
  const int64_t row = index >= 0 ? index : -1 - index;
  const bool valid = row < (index >= 0 ? p.texts : p.images);
  if (!valid && threadIdx.x == 0) report(p.fault, FaultKind::splice_index, index, -p.images, p.texts, at);
  const float* from = index >= 0 ? p.text + row * p.text_stride : p.image + row * p.image_stride;
  for (int64_t i = threadIdx.x; i < p.width; i += kRowThreads)
    p.out[at * p.width + i] = valid ? from[i] : 0.0f;
}

}  // namespace mgm::cuda
