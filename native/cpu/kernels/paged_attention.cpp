// Causal attention over KV pages: decode and chunked prefill. Keys are taken in segments of 256 from key 0;
// every segment has its own online softmax over tiles of 64 (attention_tile.h), and segments are merged in
// order. That definition holds for every call, so a token gets the same bits from a decode step, from any
// chunk of a prefill and from a whole one.
//
// With many rows, a task is (sequence, KV head, block of rows) and walks all segments. With few (decode),
// segments are tasks of their own, whose partial states a second pass merges: the pages, read once for all
// heads of a group, are what bounds that case.
#include "../kernels.h"
#include "../simd/simd.h"
#include "attention_tile.h"

namespace mgm::cpu::MGM_ISA {
namespace {

constexpr int64_t kSegment = 256;
static_assert(kSegment % kKeys == 0);
constexpr int64_t kMaxSplitRows = 64;

// total = total and part together. Not inlined: both paths must run the same instructions.
__attribute__((noinline)) static void merge(const State& total, const State& part, int64_t rows, int64_t d) {
  const int64_t ldo = padded_head(d);
  for (int64_t r = 0; r < rows; ++r) {
    const vf before = set1(total.m[r]), fresh = set1(part.m[r]);
    const vf now = max(fresh, before), safe = finite_max(now);
    const vf a = exp2_nonpositive(before - safe), b = exp2_nonpositive(fresh - safe);
    total.m[r] = max_lane(now);
    float *l = total.l + r * kWidth, *o = total.o + r * ldo;
    store(l, fma(load(l), a, load(part.l + r * kWidth) * b));
    for (int64_t c = 0; c < ldo; c += kWidth)
      store(o + c, fma(load(o + c), a, load(part.o + r * ldo + c) * b));
  }
}

struct Sequence : Span {
  int64_t segments, partial;  // partial: offset of the sequence's partial states, in floats
};

}  // namespace

void paged_attention(const PagedAttentionArgs& args, ThreadPool& pool) {
  const int64_t total = args.q.shape[0], heads = args.q.shape[1], d = args.q.shape[2];
  const int64_t pages = args.k_pages.shape[0], kv_heads = args.k_pages.shape[1],
                page_size = args.k_pages.shape[2];
  const int64_t sequences = args.context_lens.shape[0], max_blocks = args.block_table.shape[1];
  const int64_t group = heads / kv_heads;
  const int32_t *cu_q = args.cu_q.i32(), *lens = args.context_lens.i32(), *table = args.block_table.i32();
  const int64_t q_step = args.cu_q.strides[0], len_step = args.context_lens.strides[0],
                table_step = args.block_table.strides[0];

  // One block table entry follows the other: the kernel walks a row as a plain array.
  if (max_blocks > 1 && args.block_table.strides[1] != 1)
    fail("expected contiguous rows for block_table but received a stride of %lld",
         static_cast<long long>(args.block_table.strides[1]));
  check_offsets(args.cu_q, total, "cu_q");
  Sequence* all =
      static_cast<Sequence*>(pool.scratch(1, sizeof(Sequence) * static_cast<size_t>(max64(1, sequences))));
  const int64_t limit = rows_per_task(total * heads, d, pool.size());
  int64_t tasks = 0, most_rows = 0, most_segments = 0, most_sequence_rows = 0;
  for (int64_t b = 0; b < sequences; ++b) {
    Sequence& s = all[b];
    s.tasks_before = tasks;
    s.q_begin = cu_q[b * q_step];
    s.queries = cu_q[(b + 1) * q_step] - s.q_begin;
    s.keys = lens[b * len_step];
    s.k_begin = b;
    if (s.queries == 0) s.keys = 0;
    if (s.keys < s.queries || s.keys > max_blocks * page_size)
      fail(
          "expected %lld (its queries) to %lld (its pages) for context_lens of sequence %lld but received "
          "%lld",
          static_cast<long long>(s.queries), static_cast<long long>(max_blocks * page_size),
          static_cast<long long>(b), static_cast<long long>(s.keys));
    for (int64_t i = 0; i < ceil_div(s.keys, page_size); ++i)
      if (table[b * table_step + i] < 0 || table[b * table_step + i] >= pages)
        fail("expected a page below %lld for block_table entry %lld of sequence %lld but received %d",
             static_cast<long long>(pages), static_cast<long long>(i), static_cast<long long>(b),
             table[b * table_step + i]);
    const int64_t rows = s.queries * group;
    s.rows_per_block = even_rows(rows, limit);
    s.segments = ceil_div(s.keys, kSegment);
    most_rows = max64(most_rows, min64(rows, s.rows_per_block));
    most_sequence_rows = max64(most_sequence_rows, rows);
    most_segments = max64(most_segments, s.segments);
    if (rows > 0) tasks += kv_heads * ceil_div(rows, s.rows_per_block);
  }
  zero_padding(args.out, args.cu_q);
  if (tasks == 0) return;

  const auto keys_of = [&](const Span& s, int64_t head) {
    const View &k = args.k_pages, &v = args.v_pages;
    const int64_t bytes = k.dtype == DType::f32 ? 4 : 2;
    Keys keys;
    keys.k = static_cast<const char*>(k.data) + head * k.strides[1] * bytes;
    keys.v = static_cast<const char*>(v.data) + head * v.strides[1] * bytes;
    keys.k_stride = k.strides[2] * bytes;
    keys.v_stride = v.strides[2] * bytes;
    keys.table = table + s.k_begin * table_step;
    keys.page_size = page_size;
    keys.k_page_stride = k.strides[0] * bytes;
    keys.v_page_stride = v.strides[0] * bytes;
    keys.dtype = k.dtype;
    return keys;
  };

  const bool split = most_segments > 1 && most_sequence_rows <= kMaxSplitRows &&
                     tasks < 4 * static_cast<int64_t>(pool.size());
  if (!split) {
    const size_t floats =
        static_cast<size_t>(tile_floats(d) + 2 * state_floats(most_rows, d) + most_rows * d);
    pool.parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
      float* tile = static_cast<float*>(pool.scratch(0, sizeof(float) * floats));
      float* memory = tile + tile_floats(d);
      for (int64_t task = begin; task < end; ++task) {
        const Sequence& s = find_span(all, sequences, task);
        const int64_t head = (task - s.tasks_before) % kv_heads, block = (task - s.tasks_before) / kv_heads;
        const int64_t first = block * s.rows_per_block;
        const int64_t rows = min64(s.rows_per_block, s.queries * group - first);
        const Queries qs = queries_of(args.q, s, group, head, args.scale, true);
        const State sum = state_at(memory, rows, d), part = state_at(memory + state_floats(rows, d), rows, d);
        float* packed = memory + 2 * state_floats(rows, d);
        pack_queries(qs, first, rows, packed);
        reset(sum, rows, d);
        const int64_t seen = qs.seen(first + rows - 1);
        for (int64_t key = 0; key < seen; key += kSegment) {
          reset(part, rows, d);
          attend(keys_of(s, head), qs, first, rows, packed, key, min64(key + kSegment, s.keys), s.keys, part,
                 tile);
          merge(sum, part, rows, d);
        }
        finish(sum, qs, first, rows, results_of(args.out, s, group, head), args.out.strides[0]);
      }
    });
    return;
  }

  int64_t pieces = 0, partial = 0;
  for (int64_t b = 0; b < sequences; ++b) {
    Sequence& s = all[b];
    s.tasks_before = pieces;
    s.partial = partial;
    const int64_t rows = s.queries * group;
    if (rows == 0) continue;
    pieces += kv_heads * s.segments;
    partial += kv_heads * s.segments * state_floats(rows, d);
  }
  float* partials = static_cast<float*>(pool.scratch(2, sizeof(float) * static_cast<size_t>(partial)));
  const size_t floats = static_cast<size_t>(tile_floats(d) + most_sequence_rows * d);
  // Neighbouring segments go to the same thread while there are plenty, so that it can fetch ahead.
  const int64_t grain = max64(1, min64(8, pieces / (8 * static_cast<int64_t>(pool.size()))));
  pool.parallel_for(pieces, grain, [&](int64_t begin, int64_t end) {
    float* tile = static_cast<float*>(pool.scratch(0, sizeof(float) * floats));
    for (int64_t piece = begin; piece < end; ++piece) {
      const Sequence& s = find_span(all, sequences, piece);
      const int64_t index = piece - s.tasks_before;
      const int64_t head = index / s.segments, key = index % s.segments * kSegment;
      const int64_t rows = s.queries * group;
      const Queries qs = queries_of(args.q, s, group, head, args.scale, true);
      float* packed = tile + tile_floats(d);
      pack_queries(qs, 0, rows, packed);
      const State part = state_at(partials + s.partial + index * state_floats(rows, d), rows, d);
      reset(part, rows, d);
      const int64_t key_end = min64(key + kSegment, s.keys);
      attend(keys_of(s, head), qs, 0, rows, packed, key, key_end, piece + 1 < end ? s.keys : key_end, part,
             tile);
    }
  });
  pool.parallel_for(sequences * kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Sequence& s = all[i / kv_heads];
      const int64_t rows = s.queries * group, head = i % kv_heads;
      if (rows == 0) continue;
      const Queries qs = queries_of(args.q, s, group, head, args.scale, true);
      const State sum = state_at(
          static_cast<float*>(pool.scratch(0, sizeof(float) * static_cast<size_t>(state_floats(rows, d)))),
          rows, d);
      reset(sum, rows, d);
      for (int64_t segment = 0; segment < s.segments; ++segment)
        merge(sum,
              state_at(partials + s.partial + (head * s.segments + segment) * state_floats(rows, d), rows, d),
              rows, d);
      finish(sum, qs, 0, rows, results_of(args.out, s, group, head), args.out.strides[0]);
    }
  });
}

}  // namespace mgm::cpu::MGM_ISA
