// Varlen flash attention. Work is split over (sequence, KV head, block of up to 256 query rows of all heads
// of the group); a task walks its keys in tiles of 64 (attention_tile.h). At CLIP's shape (577 tokens, D =
// 64) a task of 204 rows packs each tile once and reuses it 17 times, so packing costs about 3 % and the
// products run at the speed of the register-blocked kernel.
#include "../kernels.h"
#include "../simd/simd.h"
#include "attention_tile.h"

namespace mgm::cpu::MGM_ISA {
void attention(const AttentionArgs& args, ThreadPool& pool) {
  const int64_t heads = args.q.shape[1], d = args.q.shape[2], kv_heads = args.k.shape[1];
  const int64_t sequences = args.cu_q.shape[0] - 1, total = args.q.shape[0], group = heads / kv_heads;
  check_offsets(args.cu_q, total, "cu_q");
  check_offsets(args.cu_k, args.k.shape[0], "cu_k");
  const int32_t *cu_q = args.cu_q.i32(), *cu_k = args.cu_k.i32();
  const int64_t q_step = args.cu_q.strides[0], k_step = args.cu_k.strides[0];

  zero_padding(args.out, args.cu_q);
  if (sequences <= 0) return;

  const int64_t limit = rows_per_task(total * heads, d, pool.size());
  Span* spans = static_cast<Span*>(pool.scratch(1, sizeof(Span) * static_cast<size_t>(sequences)));
  int64_t tasks = 0, most_rows = 0;
  for (int64_t b = 0; b < sequences; ++b) {
    Span& s = spans[b];
    s.tasks_before = tasks;
    s.q_begin = cu_q[b * q_step];
    s.queries = cu_q[(b + 1) * q_step] - s.q_begin;
    s.k_begin = cu_k[b * k_step];
    s.keys = cu_k[(b + 1) * k_step] - s.k_begin;
    const int64_t rows = s.queries * group;
    s.rows_per_block = even_rows(rows, limit);
    most_rows = max64(most_rows, min64(rows, s.rows_per_block));
    if (rows > 0) tasks += kv_heads * ceil_div(rows, s.rows_per_block);
  }

  const size_t floats = static_cast<size_t>(tile_floats(d) + state_floats(most_rows, d) + most_rows * d);
  pool.parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
    float* tile = static_cast<float*>(pool.scratch(0, sizeof(float) * floats));
    float* memory = tile + tile_floats(d);
    for (int64_t task = begin; task < end; ++task) {
      const Span& s = find_span(spans, sequences, task);
      const int64_t head = (task - s.tasks_before) % kv_heads, block = (task - s.tasks_before) / kv_heads;
      const int64_t first = block * s.rows_per_block;
      const int64_t rows = min64(s.rows_per_block, s.queries * group - first);

      const Queries qs = queries_of(args.q, s, group, head, args.scale, args.causal);
      Keys keys;
      keys.k = reinterpret_cast<const char*>(args.k.f32() + s.k_begin * args.k.strides[0] + head * d);
      keys.v = reinterpret_cast<const char*>(args.v.f32() + s.k_begin * args.v.strides[0] + head * d);
      keys.k_stride = args.k.strides[0] * static_cast<int64_t>(sizeof(float));
      keys.v_stride = args.v.strides[0] * static_cast<int64_t>(sizeof(float));

      const State state = state_at(memory, rows, d);
      float* packed = memory + state_floats(rows, d);
      reset(state, rows, d);
      pack_queries(qs, first, rows, packed);
      attend(keys, qs, first, rows, packed, 0, s.keys, s.keys, state, tile);
      finish(state, qs, first, rows, results_of(args.out, s, group, head), args.out.strides[0]);
    }
  });
}

}  // namespace mgm::cpu::MGM_ISA
