#include "embedding.h"

#include <string>

#include "../../runtime/tensor.h"
#include "../launch.h"
#include "gemm_launch.h"

namespace mgm::cuda {
namespace {

// Whether address and distance of all rows are multiples of `bytes`.
bool rows_start_on(int64_t bytes, const void* data, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0 && stride_bytes % bytes == 0;
}

}  // namespace

void embedding(Queue& queue, const EmbeddingArgs& args) {
  const View &table = args.table, &out = args.out;
  if (table.layout != Layout::strided) return packed_rows(queue, args);
  const int64_t width = table.shape[1];
  const int64_t stride = table.strides[0];
  const auto bytes = [](const View& view, int64_t elements) {
    return elements * static_cast<int64_t>(dtype_size(view.dtype));
  };
  const bool aligned =
      rows_start_on(16, table.data, bytes(table, stride)) && rows_start_on(16, out.data, bytes(out, width));
  const std::string kernel =
      std::string("embedding_") + dtype_name(table.dtype) + "_" + dtype_name(out.dtype);
  queue.launch({"embedding", kernel.c_str()}, {args.ids.shape[0]}, kRowThreads,
               EmbeddingParams{table.data, args.ids.i32(), out.data, queue.fault(), table.shape[0], width,
                               stride, args.scale, aligned});
}

void splice_embeddings(Queue& queue, const SpliceEmbeddingsArgs& args) {
  const View &text = args.text, &image = args.image, &out = args.out;
  const auto size = static_cast<int64_t>(dtype_size(out.dtype));
  const int64_t width = out.shape[1] * size, text_stride = text.strides[0] * size,
                image_stride = image.strides[0] * size;
  const auto fits = [&](int64_t bytes) {
    return rows_start_on(bytes, out.data, width) && rows_start_on(bytes, text.data, text_stride) &&
           rows_start_on(bytes, image.data, image_stride);
  };
  const int64_t word = fits(16) ? 16 : fits(4) ? 4 : 2;
  const std::string kernel = "splice_embeddings_" + std::to_string(word);
  queue.launch({"embedding", kernel.c_str()}, {args.index.shape[0]}, kRowThreads,
               SpliceParams{text.data, image.data, args.index.i32(), out.data, queue.fault(), text.shape[0],
                            image.shape[0], width / word, text_stride / word, image_stride / word});
}

}  // namespace mgm::cuda
