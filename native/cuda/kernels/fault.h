// What a kernel found wrong with data: the first finding of all work since the last read stays in the record.
#pragma once
#include <cstdint>

namespace mgm::cuda {

enum class FaultKind : int32_t {
  none,
  embedding_id,    // value: the id; limit: the table's rows
  splice_index,    // value: the index; low, limit: the range
  cache_slot,      // value: the slot; limit: slots; where: the token
  history_length,  // value: the length; limit: the row's room; where: the row
  history_id,      // value: the id; limit: the vocabulary; where: the row
  query_offset,    // value: the offset; low: the one before; limit: the tokens; where: the index
  key_offset,      // the same of cu_k
  context_length,  // value: the length; low: its queries; limit: its pages' room; where: the sequence
  expert_id,       // value: the id; limit: experts; where: the row and choice t * k + j
  page,            // value: the page; limit: pages; low: the block; where: the sequence
};

struct Fault {
  int32_t kind;
  int32_t padding;
  int64_t value, low, limit, where;
};

}  // namespace mgm::cuda
