#include "embedding.h"

#include "../launch.h"
#include "linear.h"

namespace mgm::cuda {

void embedding(Queue& queue, const EmbeddingArgs& args) {
  const View& table = args.table;
  // Packed tables are bf16 by now: packed_bytes refuses the rest.
  const int64_t stride = table.layout == Layout::strided ? table.strides[0] : packed_stride(table.shape[1]);
  const char* kernel = table.dtype == DType::f32    ? "embedding_f32"
                       : table.dtype == DType::bf16 ? "embedding_bf16"
                                                    : "embedding_f16";
  queue.launch({"embedding", kernel}, {args.ids.shape[0]}, kRowThreads,
               EmbeddingParams{table.data, args.ids.i32(), args.out.f32(), queue.fault(), table.shape[0],
                               table.shape[1], stride, args.scale, 0});
}

void splice_embeddings(Queue& queue, const SpliceEmbeddingsArgs& args) {
  queue.launch({"embedding", "splice_embeddings"}, {args.index.shape[0]}, kRowThreads,
               SpliceParams{args.text.f32(), args.image.f32(), args.index.i32(), args.out.f32(),
                            queue.fault(), args.text.shape[0], args.image.shape[0], args.out.shape[1],
                            args.text.strides[0], args.image.strides[0]});
}

}  // namespace mgm::cuda
