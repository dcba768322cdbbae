#include "attention.h"

#include <algorithm>

#include "../../runtime/error.h"
#include "../../runtime/tensor.h"
#include "flash_launch.h"

namespace mgm::cuda {

void attention(Queue& queue, const AttentionArgs& args) {
  const int64_t tokens = args.q.shape[0], heads = args.q.shape[1], d = args.q.shape[2];
  const int64_t kv_heads = args.k.shape[1], group = heads / kv_heads;
  const Heads q = whole_pieces(queue, args.q, args.scale < 0.0f);
  const Heads k = whole_pieces(queue, args.k), v = whole_pieces(queue, args.v);
  const AttentionParams params{flash_params(queue, q, args.q, args.cu_q, kv_heads, args.scale, args.out),
                               reinterpret_cast<const char*>(k.data),
                               reinterpret_cast<const char*>(v.data),
                               args.cu_k.i32(),
                               k.stride * 2,
                               v.stride * 2,
                               static_cast<int32_t>(args.k.shape[0]),
                               args.causal};
  const FlashTile tile = attention_tile(
      *std::find_if(std::begin(kHeadDims), std::end(kHeadDims), [&](int most) { return d <= most; }));
  const std::string kernel = format("attention_%s_%d", dtype_name(args.q.dtype), tile.d);
  queue.launch({"attention", kernel.c_str()},
               {blocks_of_rows(tokens * group, params.queries.sequences, tile.rows()), kv_heads},
               tile.threads(), params, static_cast<size_t>(tile.shared_bytes()));
}

}  // namespace mgm::cuda
