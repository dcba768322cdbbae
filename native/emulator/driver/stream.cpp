// Streams, events, host functions, and the capture of streams into graphs.
#include <algorithm>
#include <cstring>

#include "driver.h"

namespace mgm::emulator::cuda {

void Driver::invalidate(const std::shared_ptr<Capture>& capture) {
  capture->invalid = true;
}

// What comes before the next operation of a stream, with the rules of the legacy default stream.
std::vector<OpPtr> Driver::stream_deps(Stream& stream) {
  Context& context = *stream.context;
  std::vector<OpPtr> deps;
  if (stream.tail) deps.push_back(stream.tail);
  if (stream.legacy) {
    for (Stream* other : context.blocking) {
      if (other->tail) deps.push_back(other->tail);
    }
    std::erase_if(context.orphan_tails, [](const OpPtr& op) { return op->observed; });
    deps.insert(deps.end(), context.orphan_tails.begin(), context.orphan_tails.end());
  } else if (stream.blocking() && context.legacy && context.legacy->tail) {
    deps.push_back(context.legacy->tail);
  }
  return deps;
}

CUresult Driver::enqueue(Stream& stream, WorkPtr work, OpPtr* out) {
  if (int error = stream.context->error) return error;
  if (stream.capture) {
    Capture& capture = *stream.capture;
    if (capture.invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    auto node = std::make_unique<Node>();
    node->work = std::move(work);
    node->deps = stream.capture_deps;
    node->graph = capture.graph.get();
    node->handle = handle();
    nodes[node->handle] = node.get();
    stream.capture_deps = {node.get()};
    capture.graph->nodes.push_back(std::move(node));
    return CUDA_SUCCESS;
  }
  if (stream.legacy) {
    // The legacy stream would have to wait for work that is not being done.
    for (auto& capture : captures) {
      for (Stream* other : capture->streams) {
        if (!other->blocking() || other->context != stream.context) continue;
        invalidate(capture);
        return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
      }
    }
  }
  OpPtr op = submit(stream.context, stream.id, std::move(work), stream_deps(stream));
  stream.tail = op;
  if (out) *out = op;
  return CUDA_SUCCESS;
}

CUresult any_stream(Driver& d, CUstream handle, std::shared_ptr<Stream>* out) {
  auto value = reinterpret_cast<uint64_t>(handle);
  if (value <= 2) {
    auto& stack = thread_state().stack;
    if (stack.empty() || !stack.back()) return CUDA_ERROR_INVALID_CONTEXT;
    auto context = stack.back();
    if (!context->active) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    if (int error = context->error) return error;
    if (value < 2) {
      *out = context->legacy;
      return CUDA_SUCCESS;
    }
    auto& stream = context->per_thread[std::this_thread::get_id()];
    if (!stream) {
      stream = std::make_shared<Stream>();
      stream->context = context;
      stream->id = d.next_stream++;
      context->blocking.insert(stream.get());
    }
    *out = stream;
    return CUDA_SUCCESS;
  }
  *out = d.streams.find(handle);
  if (!*out)
    return misuse("stream", CUDA_ERROR_INVALID_HANDLE,
                  "a call received a stream that does not exist (any more)");
  return (*out)->context->error;
}

CUresult find_stream(Driver& d, Context& context, CUstream handle, std::shared_ptr<Stream>* out) {
  if (CUresult error = any_stream(d, handle, out)) return error;
  if ((*out)->context.get() != &context)
    return misuse("stream", CUDA_ERROR_INVALID_HANDLE,
                  "a call received a stream of another context than the current one");
  return CUDA_SUCCESS;
}

namespace {

CUresult create_stream(const char* name, CUstream* out, unsigned flags, int priority) {
  return call(name, kContext, [&](Driver& d, Lock&, Context& context) -> CUresult {
    if (!out || flags > 1) return CUDA_ERROR_INVALID_VALUE;
    auto stream = std::make_shared<Stream>();
    stream->handle = d.handle();
    stream->id = d.next_stream++;
    stream->context = thread_state().stack.back();
    stream->flags = flags;
    stream->priority = std::clamp(priority, -5, 0);
    d.streams.live[stream->handle] = stream;
    if (stream->blocking()) context.blocking.insert(stream.get());
    *out = reinterpret_cast<CUstream>(stream->handle);
    return CUDA_SUCCESS;
  });
}

CUresult find_event(Driver& d, CUevent handle, std::shared_ptr<Event>* out) {
  *out = d.events.find(handle);
  if (!*out)
    return misuse("event", CUDA_ERROR_INVALID_HANDLE,
                  "a call received an event that does not exist (any more)");
  return (*out)->context->error;
}

// A call that may not be made on a capturing stream ends the capture.
CUresult refuse_capturing(Driver& d, Stream& stream) {
  if (stream.capture) {
    bool invalid = stream.capture->invalid;
    d.invalidate(stream.capture);
    return invalid ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  if (!stream.legacy) return CUDA_SUCCESS;
  for (auto& capture : d.captures) {
    for (Stream* other : capture->streams) {
      if (!other->blocking() || other->context != stream.context) continue;
      d.invalidate(capture);
      return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    }
  }
  return CUDA_SUCCESS;
}

bool ended(const OpPtr& op) {
  return !op || op->state == Op::done;
}

}  // namespace
}  // namespace mgm::emulator::cuda

using namespace mgm::emulator;
using namespace mgm::emulator::cuda;

MGM_CU cuStreamCreate(CUstream* out, unsigned flags) {
  return create_stream("cuStreamCreate", out, flags, 0);
}
MGM_CU cuStreamCreateWithPriority(CUstream* out, unsigned flags, int priority) {
  return create_stream("cuStreamCreateWithPriority", out, flags, priority);
}

MGM_CU cuStreamDestroy_v2(CUstream handle) {
  return call("cuStreamDestroy_v2", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    auto stream = d.streams.find(handle);
    if (!stream) return misuse("cuStreamDestroy_v2", CUDA_ERROR_INVALID_HANDLE, "no such stream (any more)");
    if (auto capture = stream->capture) {
      d.invalidate(capture);
      capture->streams.erase(stream.get());
      if (capture->origin == stream.get()) {
        for (Stream* other : capture->streams) other->capture.reset();
        d.captures.erase(capture);
      }
    }
    Context& context = *stream->context;
    context.blocking.erase(stream.get());
    // Its work goes on without it.
    if (stream->blocking() && stream->tail && !stream->tail->observed)
      context.orphan_tails.push_back(stream->tail);
    d.streams.live.erase(stream->handle);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuStreamSynchronize(CUstream handle) {
  return call("cuStreamSynchronize", kPlain, [&](Driver& d, Lock& lock, Context&) -> CUresult {
    std::shared_ptr<Stream> stream;
    if (CUresult error = any_stream(d, handle, &stream)) return error;
    if (CUresult error = refuse_capturing(d, *stream)) return error;
    for (auto& op : d.stream_deps(*stream)) {
      if (stream->legacy || op == stream->tail) d.wait(lock, op);
    }
    return stream->context->error;
  });
}

MGM_CU cuStreamQuery(CUstream handle) {
  return call("cuStreamQuery", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    std::shared_ptr<Stream> stream;
    if (CUresult error = any_stream(d, handle, &stream)) return error;
    if (CUresult error = refuse_capturing(d, *stream)) return error;
    for (auto& op : d.stream_deps(*stream)) {
      if (!stream->legacy && op != stream->tail) continue;
      if (!ended(op)) {
        d.demand(op);
        return CUDA_ERROR_NOT_READY;
      }
      d.observe(op);
    }
    return CUDA_SUCCESS;
  });
}

MGM_CU cuStreamGetFlags(CUstream handle, unsigned* flags) {
  return call("cuStreamGetFlags", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    std::shared_ptr<Stream> stream;
    if (CUresult error = any_stream(d, handle, &stream)) return error;
    if (!flags) return CUDA_ERROR_INVALID_VALUE;
    *flags = stream->flags;
    return CUDA_SUCCESS;
  });
}

MGM_CU cuStreamGetPriority(CUstream handle, int* priority) {
  return call("cuStreamGetPriority", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    std::shared_ptr<Stream> stream;
    if (CUresult error = any_stream(d, handle, &stream)) return error;
    if (!priority) return CUDA_ERROR_INVALID_VALUE;
    *priority = stream->priority;
    return CUDA_SUCCESS;
  });
}

MGM_CU cuStreamGetCtx(CUstream handle, CUcontext* out) {
  return call("cuStreamGetCtx", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    std::shared_ptr<Stream> stream;
    if (CUresult error = any_stream(d, handle, &stream)) return error;
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    *out = reinterpret_cast<CUcontext>(stream->context->handle);
    return CUDA_SUCCESS;
  });
}

// CUDA 12.5: green contexts, of which there are none here.
MGM_CU cuStreamGetCtx_v2(CUstream handle, CUcontext* out, void** green) {
  if (green) *green = nullptr;
  return cuStreamGetCtx(handle, out);
}

MGM_CU cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned flags) {
  return call("cuStreamWaitEvent", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    std::shared_ptr<Stream> stream;
    std::shared_ptr<Event> event;
    if (CUresult error = any_stream(d, handle, &stream)) return error;
    if (CUresult error = find_event(d, event_handle, &event)) return error;
    if (flags) return misuse("cuStreamWaitEvent", CUDA_ERROR_NOT_SUPPORTED, "external waits of a capture");
    if (stream->capture && stream->capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (event->capture) {
      auto capture = event->capture;
      if (!d.captures.count(capture) || capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
      if (stream->legacy) {
        d.invalidate(capture);
        return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
      }
      if (stream->capture && stream->capture != capture) {
        d.invalidate(capture);
        d.invalidate(stream->capture);
        return CUDA_ERROR_STREAM_CAPTURE_MERGE;
      }
      if (!stream->capture) {  // joins the capture
        stream->capture = capture;
        stream->capture_deps.clear();
        capture->streams.insert(stream.get());
      }
      for (Node* node : event->capture_deps) {
        auto& deps = stream->capture_deps;
        if (std::find(deps.begin(), deps.end(), node) == deps.end()) deps.push_back(node);
      }
      return CUDA_SUCCESS;
    }
    if (stream->capture) {
      if (!event->op) return CUDA_SUCCESS;  // never recorded: no dependency
      d.invalidate(stream->capture);
      return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    }
    if (!event->op || event->op->observed) return CUDA_SUCCESS;
    static const auto marker = [] {
      auto work = std::make_shared<Work>();
      work->kind = WorkKind::event;
      work->label = "cuStreamWaitEvent";
      return work;
    }();
    auto deps = d.stream_deps(*stream);
    deps.push_back(event->op);
    stream->tail = d.submit(stream->context, stream->id, marker, std::move(deps));
    return CUDA_SUCCESS;
  });
}

MGM_CU cuLaunchHostFunc(CUstream handle, CUhostFn fn, void* user_data) {
  return call("cuLaunchHostFunc", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    std::shared_ptr<Stream> stream;
    if (CUresult error = any_stream(d, handle, &stream)) return error;
    if (!fn) return CUDA_ERROR_INVALID_VALUE;
    auto work = std::make_shared<Work>();
    work->kind = WorkKind::host;
    work->label = "cuLaunchHostFunc";
    work->host_fn = fn;
    work->user_data = user_data;
    return d.enqueue(*stream, work);
  });
}

MGM_CU cuStreamAddCallback(CUstream, CUstreamCallback, void*, unsigned) {
  return misuse("cuStreamAddCallback", CUDA_ERROR_NOT_SUPPORTED, "deprecated; use cuLaunchHostFunc");
}

MGM_CU cuEventCreate(CUevent* out, unsigned flags) {
  return call("cuEventCreate", kContext, [&](Driver& d, Lock&, Context&) -> CUresult {
    if (!out || (flags & ~7u) || ((flags & 4) && !(flags & 2))) return CUDA_ERROR_INVALID_VALUE;
    if (flags & 4)
      return misuse("cuEventCreate", CUDA_ERROR_NOT_SUPPORTED, "no events shared between processes here");
    auto event = std::make_shared<Event>();
    event->handle = d.handle();
    event->context = thread_state().stack.back();
    event->flags = flags;
    d.events.live[event->handle] = event;
    *out = reinterpret_cast<CUevent>(event->handle);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuEventDestroy_v2(CUevent handle) {
  return call("cuEventDestroy_v2", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    auto event = d.events.find(handle);
    if (!event) return misuse("cuEventDestroy_v2", CUDA_ERROR_INVALID_HANDLE, "no such event (any more)");
    d.events.live.erase(event->handle);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuEventRecordWithFlags(CUevent event_handle, CUstream handle, unsigned flags) {
  return call("cuEventRecord", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    std::shared_ptr<Stream> stream;
    std::shared_ptr<Event> event;
    if (CUresult error = any_stream(d, handle, &stream)) return error;
    if (CUresult error = find_event(d, event_handle, &event)) return error;
    if (flags)
      return misuse("cuEventRecordWithFlags", CUDA_ERROR_NOT_SUPPORTED, "external records of a capture");
    if (event->context != stream->context)
      return misuse("cuEventRecord", CUDA_ERROR_INVALID_HANDLE,
                    "the event and the stream are of different contexts");
    if (stream->capture) {
      if (stream->capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
      event->capture = stream->capture;
      event->capture_deps = stream->capture_deps;
      event->op.reset();
      return CUDA_SUCCESS;
    }
    auto work = std::make_shared<Work>();
    work->kind = WorkKind::event;
    work->label = "cuEventRecord";
    OpPtr op;
    if (CUresult error = d.enqueue(*stream, work, &op)) return error;
    event->capture.reset();
    event->capture_deps.clear();
    event->op = op;
    return CUDA_SUCCESS;
  });
}
MGM_CU cuEventRecord(CUevent event, CUstream stream) {
  return cuEventRecordWithFlags(event, stream, 0);
}

MGM_CU cuEventQuery(CUevent handle) {
  return call("cuEventQuery", kCaptureUnsafe, [&](Driver& d, Lock&, Context&) -> CUresult {
    std::shared_ptr<Event> event;
    if (CUresult error = find_event(d, handle, &event)) return error;
    if (event->capture) {
      d.invalidate(event->capture);
      return CUDA_ERROR_CAPTURED_EVENT;
    }
    if (!ended(event->op)) {
      d.demand(event->op);
      return CUDA_ERROR_NOT_READY;
    }
    d.observe(event->op);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuEventSynchronize(CUevent handle) {
  return call("cuEventSynchronize", kCaptureUnsafe, [&](Driver& d, Lock& lock, Context&) -> CUresult {
    std::shared_ptr<Event> event;
    if (CUresult error = find_event(d, handle, &event)) return error;
    if (event->capture) {
      d.invalidate(event->capture);
      return CUDA_ERROR_CAPTURED_EVENT;
    }
    d.wait(lock, event->op);
    return event->context->error;
  });
}

MGM_CU cuEventElapsedTime_v2(float* milliseconds, CUevent start_handle, CUevent end_handle) {
  return call("cuEventElapsedTime_v2", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    std::shared_ptr<Event> start, end;
    if (CUresult error = find_event(d, start_handle, &start)) return error;
    if (CUresult error = find_event(d, end_handle, &end)) return error;
    if (!milliseconds) return CUDA_ERROR_INVALID_VALUE;
    if (((start->flags | end->flags) & 2) || !start->op || !end->op) return CUDA_ERROR_INVALID_HANDLE;
    if (!ended(start->op) || !ended(end->op)) {
      d.demand(start->op);
      d.demand(end->op);
      return CUDA_ERROR_NOT_READY;
    }
    *milliseconds = std::chrono::duration<float, std::milli>(end->op->finished - start->op->finished).count();
    return CUDA_SUCCESS;
  });
}
MGM_CU cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
  return cuEventElapsedTime_v2(milliseconds, start, end);
}

MGM_CU cuStreamBeginCapture_v2(CUstream handle, int mode) {
  return call("cuStreamBeginCapture_v2", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    std::shared_ptr<Stream> stream;
    if (CUresult error = any_stream(d, handle, &stream)) return error;
    if (mode < 0 || mode > 2) return CUDA_ERROR_INVALID_VALUE;
    if (stream->legacy) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (stream->capture) return CUDA_ERROR_ILLEGAL_STATE;
    auto capture = std::make_shared<Capture>();
    capture->id = d.next_capture++;
    capture->mode = mode;
    capture->owner = std::this_thread::get_id();
    capture->origin = stream.get();
    capture->streams.insert(stream.get());
    capture->graph = std::make_shared<Graph>();
    capture->graph->context = stream->context;
    capture->graph->handle = d.handle();
    stream->capture = capture;
    stream->capture_deps.clear();
    d.captures.insert(capture);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuStreamEndCapture(CUstream handle, CUgraph* out) {
  return call("cuStreamEndCapture", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    std::shared_ptr<Stream> stream;
    if (CUresult error = any_stream(d, handle, &stream)) return error;
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    *out = nullptr;
    auto capture = stream->capture;
    if (!capture) return CUDA_ERROR_ILLEGAL_STATE;
    if (capture->origin != stream.get()) {
      d.invalidate(capture);
      return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
    }
    if (capture->mode != 2 && capture->owner != std::this_thread::get_id())
      return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    // Everything that other streams enqueued must lead to what this one ends with.
    std::set<Node*> reached;
    std::vector<Node*> stack = stream->capture_deps;
    while (!stack.empty()) {
      Node* node = stack.back();
      stack.pop_back();
      if (reached.insert(node).second) stack.insert(stack.end(), node->deps.begin(), node->deps.end());
    }
    bool joined = reached.size() == capture->graph->nodes.size();
    for (Stream* other : capture->streams) {
      other->capture.reset();
      other->capture_deps.clear();
    }
    d.captures.erase(capture);
    for (auto& item : d.events.live) {
      Event& event = *item.second;
      if (event.capture != capture) continue;
      event.capture_deps.clear();
    }
    if (capture->invalid || !joined) d.graphs.live.erase(capture->graph->handle);
    if (capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (!joined) return CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
    d.graphs.live[capture->graph->handle] = capture->graph;
    *out = reinterpret_cast<CUgraph>(capture->graph->handle);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuStreamIsCapturing(CUstream handle, int* status) {
  return call("cuStreamIsCapturing", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    std::shared_ptr<Stream> stream;
    if (CUresult error = any_stream(d, handle, &stream)) return error;
    if (!status) return CUDA_ERROR_INVALID_VALUE;
    *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
    return CUDA_SUCCESS;
  });
}

namespace mgm::emulator::cuda {
namespace {

CUresult capture_info(const char* name, CUstream handle, int* status, uint64_t* id, CUgraph* graph,
                      const CUgraphNode** dependencies, const void** edges, size_t* count) {
  return call(name, kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    std::shared_ptr<Stream> stream;
    if (CUresult error = any_stream(d, handle, &stream)) return error;
    if (!status) return CUDA_ERROR_INVALID_VALUE;
    auto& capture = stream->capture;
    *status = !capture ? 0 : capture->invalid ? 2 : 1;
    if (edges) *edges = nullptr;
    if (!capture || capture->invalid) return CUDA_SUCCESS;
    if (id) *id = capture->id;
    if (graph) {
      d.graphs.live[capture->graph->handle] = capture->graph;
      *graph = reinterpret_cast<CUgraph>(capture->graph->handle);
    }
    stream->capture_handles.clear();
    for (Node* node : stream->capture_deps) stream->capture_handles.push_back(node->handle);
    if (dependencies) *dependencies = reinterpret_cast<const CUgraphNode*>(stream->capture_handles.data());
    if (count) *count = stream->capture_handles.size();
    return CUDA_SUCCESS;
  });
}

}  // namespace
}  // namespace mgm::emulator::cuda

MGM_CU cuStreamGetCaptureInfo(CUstream stream, int* status, uint64_t* id) {
  return capture_info("cuStreamGetCaptureInfo", stream, status, id, nullptr, nullptr, nullptr, nullptr);
}
MGM_CU cuStreamGetCaptureInfo_v2(CUstream stream, int* status, uint64_t* id, CUgraph* graph,
                                 const CUgraphNode** dependencies, size_t* count) {
  return capture_info("cuStreamGetCaptureInfo_v2", stream, status, id, graph, dependencies, nullptr, count);
}
MGM_CU cuStreamGetCaptureInfo_v3(CUstream stream, int* status, uint64_t* id, CUgraph* graph,
                                 const CUgraphNode** dependencies, const void** edges, size_t* count) {
  return capture_info("cuStreamGetCaptureInfo_v3", stream, status, id, graph, dependencies, edges, count);
}

MGM_CU cuThreadExchangeStreamCaptureMode(int* mode) {
  return call("cuThreadExchangeStreamCaptureMode", kPlain, [&](Driver&, Lock&, Context&) -> CUresult {
    if (!mode || *mode < 0 || *mode > 2) return CUDA_ERROR_INVALID_VALUE;
    std::swap(*mode, thread_state().capture_mode);
    return CUDA_SUCCESS;
  });
}
