#include "sample.h"

#include "../../runtime/tensor.h"
#include "../launch.h"

namespace mgm::cuda {
namespace {

// Arrays of one allocation: laid out first, then given their addresses.
class Arrays {
 public:
  template <class T>
  void add(T*& array, int64_t count) {
    parts_.push_back({reinterpret_cast<void**>(&array), bytes_});
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
  }
  size_t bytes() const { return bytes_; }
  void place(void* base) const {
    for (const auto& [array, offset] : parts_) *array = static_cast<char*>(base) + offset;
  }

 private:
  std::vector<std::pair<void**, size_t>> parts_;
  size_t bytes_ = 0;
};

}  // namespace

void sample(Queue& queue, const SampleArgs& args) {
  const int64_t rows = args.logits.shape[0], vocab = args.logits.shape[1],
                chunks = ceil_div(vocab, kSampleChunk), listed = args.logprobs.shape[1] - 1,
                room = args.history ? args.history.shape[1] : 0;
  SampleParams p{};
  p.logits = args.logits.f32();
  p.options = args.options.f32();
  p.state = args.state.i32();
  p.history = args.history.i32();
  p.mask = args.mask.u8();
  p.ids = args.ids.i32();
  p.logprobs = args.logprobs.f32();
  p.top_ids = args.top_ids.i32();
  p.fault = queue.fault();
  p.logits_stride = args.logits.strides[0];
  p.vocab = static_cast<int32_t>(vocab);
  p.history_room = static_cast<int32_t>(room);
  p.listed = static_cast<int32_t>(listed);

  Arrays arrays;
  arrays.add(p.rows, rows);
  arrays.add(p.chunks, rows * chunks);
  arrays.add(p.chunk_weights, rows * chunks);
  arrays.add(p.masses, rows * kSampleBins);
  arrays.add(p.counts, rows * kSampleBins);
  if (listed > 0) arrays.add(p.list_counts, rows * kSampleBins);
  arrays.add(p.found, rows * vocab);
  arrays.add(p.candidates, rows * vocab);
  arrays.add(p.values, rows * vocab);
  arrays.add(p.weights, rows * vocab);
  if (args.mask || args.history) arrays.add(p.changed, rows * vocab);
  if (args.history) {
    arrays.add(p.occurrences, rows * vocab);
    arrays.add(p.penalties, rows * room);
  }
  const auto scratch = queue.scratch(arrays.bytes());
  arrays.place(scratch->data());

  queue.launch({"sample", "sample_begin"}, {rows}, kSampleThreads, p);
  queue.launch({"sample", "sample_scan"}, {chunks, rows}, kSampleThreads, p);
  queue.launch({"sample", "sample_weigh"}, {chunks, rows}, kSampleThreads, p);
  queue.launch({"sample", "sample_cut"}, {chunks, rows}, kSampleThreads, p);
  if (listed > 0) queue.launch({"sample", "sample_list"}, {chunks, rows}, kSampleThreads, p);
}

}  // namespace mgm::cuda
