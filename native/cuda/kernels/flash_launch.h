// What the launchers of flash attention share.
#pragma once
#include "../launch.h"
#include "flash.h"

namespace mgm::cuda {

// Heads [tokens, heads, d] whose 16-byte pieces can be copied whole: the tensor's own or a packed copy.
struct Heads {
  const uint16_t* data;
  int32_t stride;                 // elements a token
  std::shared_ptr<Storage> copy;  // to be kept until the launch that reads it
};
Heads whole_pieces(Queue& queue, const View& x, bool negate = false);

// `q`: whole_pieces() of the queries, negated if `scale` is negative.
FlashParams flash_params(Queue& queue, const Heads& q, const View& queries, const View& cu_q,
                         int64_t kv_heads, float scale, const View& out);

}  // namespace mgm::cuda
