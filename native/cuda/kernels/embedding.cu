// Row gathers: token embeddings from a plain table (packed ones: pack.cu), and the splice of image rows among
// text rows. A block is a row; each byte is read and written once, in vectors of 16 bytes of the wider type.
// An index out of range gives zeros and a fault.
#include "common.cuh"
#include "embedding.h"

namespace mgm::cuda {
namespace {

template <int N, class Table, class Out>
__device__ __forceinline__ void gather_vector(const Table* from, Out* to, bool valid, float scale) {
  Vector<Table, N> x;
  if (valid) x = load_vector<N>(from);
  float scaled[N];
#pragma unroll
  for (int j = 0; j < N; ++j) scaled[j] = valid ? scale * to_float(x.at[j]) : 0.0f;
  store_vector(to, rounded<Out>(scaled));
}

template <class Table, class Out>
__device__ __forceinline__ void gather(const EmbeddingParams& p) {
  constexpr int kWidth = 16 / (sizeof(Table) > sizeof(Out) ? sizeof(Table) : sizeof(Out));
  const int64_t t = blockIdx.x;
  const int64_t id = p.ids[t];
  if (id >= p.rows && threadIdx.x == 0) report(p.fault, FaultKind::embedding_id, id, 0, p.rows, t);
  const bool valid = id >= 0 && id < p.rows;
  const Table* row = static_cast<const Table*>(p.table) + (valid ? id : 0) * p.table_stride;
  Out* out = static_cast<Out*>(p.out) + t * p.width;
  const int64_t vectors = p.aligned ? p.width / kWidth : 0;
  for (int64_t i = threadIdx.x; i < vectors; i += kRowThreads)
    gather_vector<kWidth>(row + i * kWidth, out + i * kWidth, valid, p.scale);
  for (int64_t i = vectors * kWidth + threadIdx.x; i < p.width; i += kRowThreads)
    gather_vector<1>(row + i, out + i, valid, p.scale);
}

template <class Word>
__device__ __forceinline__ void splice(const SpliceParams& p) {
  const int64_t at = blockIdx.x;
  const int64_t index = p.index[at];
  const int64_t row = index >= 0 ? index : -1 - index;
  const bool valid = row < (index >= 0 ? p.texts : p.images);
  if (!valid && threadIdx.x == 0) report(p.fault, FaultKind::splice_index, index, -p.images, p.texts, at);
  const Word* from = index >= 0 ? static_cast<const Word*>(p.text) + row * p.text_stride
                                : static_cast<const Word*>(p.image) + row * p.image_stride;
  Word* out = static_cast<Word*>(p.out) + at * p.width;
  for (int64_t i = threadIdx.x; i < p.width; i += kRowThreads) out[i] = valid ? from[i] : Word{};
}

}  // namespace

#define KERNEL(name, Params, function)                                                               \
  extern "C" __global__ void __launch_bounds__(kRowThreads) name(const __grid_constant__ Params p) { \
    function(p);                                                                                     \
  }
#define EMBEDDING(name, Table)                                         \
  KERNEL(name##_f32, EmbeddingParams, (gather<Table, float>))          \
  KERNEL(name##_bf16, EmbeddingParams, (gather<Table, __nv_bfloat16>)) \
  KERNEL(name##_f16, EmbeddingParams, (gather<Table, __half>))
EMBEDDING(embedding_f32, float)
EMBEDDING(embedding_bf16, __nv_bfloat16)
EMBEDDING(embedding_f16, __half)
KERNEL(splice_embeddings_2, SpliceParams, splice<uint16_t>)
KERNEL(splice_embeddings_4, SpliceParams, splice<uint32_t>)
KERNEL(splice_embeddings_16, SpliceParams, splice<uint4>)

}  // namespace mgm::cuda
