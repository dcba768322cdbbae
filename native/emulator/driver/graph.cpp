// Graphs: made by capture or node by node, instantiated into copies, launched as operations, updated.
#include <algorithm>

#include "driver.h"

namespace mgm::emulator::cuda {

Graph::~Graph() {
  // Nodes are dropped under the driver's lock: graphs live in its tables and in captures.
  for (auto& node : nodes) driver().nodes.erase(node->handle);
}

namespace {

int node_type(WorkKind kind) {
  switch (kind) {
    case WorkKind::kernel:
      return 0;
    case WorkKind::copy:
      return 1;
    case WorkKind::fill:
      return 2;
    case WorkKind::host:
      return 3;
    case WorkKind::alloc:
      return 10;
    case WorkKind::free:
      return 11;
    default:
      return 5;
  }
}

// The nodes in an order that respects their edges (nodes are appended after what they depend on).
std::vector<GraphExec::Item> items_of(const Graph& graph) {
  std::map<const Node*, size_t> index;
  std::vector<GraphExec::Item> items;
  for (auto& node : graph.nodes) {
    GraphExec::Item item;
    item.work = node->work;
    item.source = node->handle;
    for (Node* dep : node->deps) item.deps.push_back(index.at(dep));
    std::sort(item.deps.begin(), item.deps.end());
    index[node.get()] = items.size();
    items.push_back(std::move(item));
  }
  return items;
}

CUresult instantiate(const char* name, CUgraphExec* out, CUgraph handle, uint64_t flags) {
  return call(name, kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    auto graph = d.graphs.find(handle);
    if (!graph || !out) return CUDA_ERROR_INVALID_VALUE;
    if (int error = graph->context->error) return error;
    if (flags & ~uint64_t{11})
      return misuse(name, CUDA_ERROR_NOT_SUPPORTED, "flags " + std::to_string(flags));
    for (auto& capture : d.captures) {
      if (capture->graph == graph) return CUDA_ERROR_INVALID_VALUE;
    }
    auto exec = std::make_shared<GraphExec>();
    exec->handle = d.handle();
    exec->context = graph->context;
    exec->items = items_of(*graph);
    exec->flags = flags;
    d.execs.live[exec->handle] = exec;
    *out = reinterpret_cast<CUgraphExec>(exec->handle);
    return CUDA_SUCCESS;
  });
}

CUresult update(const char* name, CUgraphExec exec_handle, CUgraph handle,
                CUgraphExecUpdateResultInfo* info) {
  return call(name, kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    auto exec = d.execs.find(exec_handle);
    auto graph = d.graphs.find(handle);
    if (!exec || !graph || !info) return CUDA_ERROR_INVALID_VALUE;
    *info = {};
    auto fail = [&](int result, uint64_t node, uint64_t from) -> CUresult {
      info->result = result;
      info->errorNode = reinterpret_cast<CUgraphNode>(node);
      info->errorFromNode = reinterpret_cast<CUgraphNode>(from);
      return CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE;
    };
    auto items = items_of(*graph);
    if (items.size() != exec->items.size()) return fail(2, 0, 0);
    for (size_t i = 0; i < items.size(); ++i) {
      const Work &now = *items[i].work, &was = *exec->items[i].work;
      if (now.kind != was.kind) return fail(3, items[i].source, 0);
      if (items[i].deps != exec->items[i].deps) return fail(2, items[i].source, 0);
      if (now.kind == WorkKind::alloc || now.kind == WorkKind::free) {
        if (now.graph_alloc != was.graph_alloc) return fail(6, items[i].source, 0);
      }
      if (now.kind == WorkKind::kernel && now.function->module->context != was.function->module->context)
        return fail(4, items[i].source, 0);
    }
    exec->items = std::move(items);
    return CUDA_SUCCESS;
  });
}

CUresult find_graph(Driver& d, CUgraph handle, std::shared_ptr<Graph>* out) {
  *out = d.graphs.find(handle);
  return *out ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult add_node(const char* name, CUgraphNode* out, CUgraph handle, const CUgraphNode* deps, size_t count,
                  const std::function<CUresult(Driver&, Lock&, Graph&, std::shared_ptr<Work>*)>& make) {
  return call(name, kPlain, [&](Driver& d, Lock& lock, Context&) -> CUresult {
    std::shared_ptr<Graph> graph;
    if (CUresult error = find_graph(d, handle, &graph)) return error;
    if (!out || (count && !deps)) return CUDA_ERROR_INVALID_VALUE;
    auto node = std::make_unique<Node>();
    node->graph = graph.get();
    for (size_t i = 0; i < count; ++i) {
      auto it = d.nodes.find(reinterpret_cast<uint64_t>(deps[i]));
      if (it == d.nodes.end() || it->second->graph != graph.get()) return CUDA_ERROR_INVALID_VALUE;
      node->deps.push_back(it->second);
    }
    std::shared_ptr<Work> work;
    if (CUresult error = make(d, lock, *graph, &work)) return error;
    node->work = work;
    node->handle = d.handle();
    d.nodes[node->handle] = node.get();
    *out = reinterpret_cast<CUgraphNode>(node->handle);
    graph->nodes.push_back(std::move(node));
    return CUDA_SUCCESS;
  });
}

CUresult kernel_node_work(Driver& d, Lock& lock, const char* name, const std::shared_ptr<Context>& context,
                          const CUDA_KERNEL_NODE_PARAMS_v2& p, std::shared_ptr<Work>* out) {
  std::shared_ptr<Function> function;
  CUfunction handle = p.func ? p.func : reinterpret_cast<CUfunction>(p.kern);
  if (CUresult error = find_function(d, lock, *context, handle, &function)) return error;
  LaunchConfig config;
  const unsigned grid[3] = {p.gridDimX, p.gridDimY, p.gridDimZ},
                 block[3] = {p.blockDimX, p.blockDimY, p.blockDimZ};
  std::copy(grid, grid + 3, config.grid);
  std::copy(block, block + 3, config.block);
  config.dynamic_shared = p.sharedMemBytes;
  return kernel_work(d, name, function, config, p.kernelParams, p.extra, out);
}

}  // namespace
}  // namespace mgm::emulator::cuda

using namespace mgm::emulator;
using namespace mgm::emulator::cuda;

MGM_CU cuGraphCreate(CUgraph* out, unsigned flags) {
  return call("cuGraphCreate", kContext, [&](Driver& d, Lock&, Context&) -> CUresult {
    if (!out || flags) return CUDA_ERROR_INVALID_VALUE;
    auto graph = std::make_shared<Graph>();
    graph->handle = d.handle();
    graph->context = thread_state().stack.back();
    d.graphs.live[graph->handle] = graph;
    *out = reinterpret_cast<CUgraph>(graph->handle);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuGraphAddKernelNode_v2(CUgraphNode* out, CUgraph graph, const CUgraphNode* deps, size_t count,
                               const CUDA_KERNEL_NODE_PARAMS_v2* params) {
  return add_node("cuGraphAddKernelNode_v2", out, graph, deps, count,
                  [&](Driver& d, Lock& lock, Graph& own, std::shared_ptr<Work>* work) -> CUresult {
                    if (!params) return CUDA_ERROR_INVALID_VALUE;
                    return kernel_node_work(d, lock, "cuGraphAddKernelNode_v2", own.context, *params, work);
                  });
}

MGM_CU cuGraphAddEmptyNode(CUgraphNode* out, CUgraph graph, const CUgraphNode* deps, size_t count) {
  return add_node("cuGraphAddEmptyNode", out, graph, deps, count,
                  [&](Driver&, Lock&, Graph&, std::shared_ptr<Work>* work) -> CUresult {
                    *work = std::make_shared<Work>();
                    (*work)->label = "empty node";
                    return CUDA_SUCCESS;
                  });
}

MGM_CU cuGraphInstantiateWithFlags(CUgraphExec* out, CUgraph graph, unsigned long long flags) {
  return instantiate("cuGraphInstantiateWithFlags", out, graph, flags);
}
// Until CUDA 11.x: an error node and a log instead of flags.
MGM_CU cuGraphInstantiate_v2(CUgraphExec* out, CUgraph graph, CUgraphNode* error_node, char* log,
                             size_t size) {
  if (error_node) *error_node = nullptr;
  if (log && size) *log = 0;
  return instantiate("cuGraphInstantiate_v2", out, graph, 0);
}
MGM_CU cuGraphInstantiate(CUgraphExec* out, CUgraph graph, CUgraphNode* error_node, char* log, size_t size) {
  return cuGraphInstantiate_v2(out, graph, error_node, log, size);
}

MGM_CU cuGraphUpload(CUgraphExec handle, CUstream stream_handle) {
  return call("cuGraphUpload", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    std::shared_ptr<Stream> stream;
    if (CUresult error = any_stream(d, stream_handle, &stream)) return error;
    return d.execs.find(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
  });
}

MGM_CU cuGraphLaunch(CUgraphExec handle, CUstream stream_handle) {
  return call("cuGraphLaunch", kPlain, [&](Driver& d, Lock& lock, Context&) -> CUresult {
    std::shared_ptr<Stream> stream;
    if (CUresult error = any_stream(d, stream_handle, &stream)) return error;
    auto exec = d.execs.find(handle);
    if (!exec)
      return misuse("cuGraphLaunch", CUDA_ERROR_INVALID_VALUE, "no such executable graph (any more)");
    if (exec->context != stream->context)
      return misuse("cuGraphLaunch", CUDA_ERROR_INVALID_VALUE,
                    "the graph and the stream are of different contexts");
    if (stream->capture) {
      if (stream->capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
      d.invalidate(stream->capture);
      return misuse("cuGraphLaunch", CUDA_ERROR_NOT_SUPPORTED,
                    "child graphs, which a launch while capturing would make");
    }
    // A graph's own memory of the last launch must be free again.
    for (auto& item : exec->items) {
      if (item.work->kind != WorkKind::alloc) continue;
      auto it = d.allocations.find(item.work->alloc_address);
      if (it == d.allocations.end() || !it->second->live) continue;
      if (!(exec->flags & 1))
        return misuse("cuGraphLaunch", CUDA_ERROR_INVALID_VALUE,
                      "memory that the last launch allocated is not freed yet");
      it->second->live = false;
    }
    (void)lock;
    // The stream's order, and never beside itself. Enqueued as an empty operation so that every root sees
    // both.
    auto marker = [](const char* label) {
      auto work = std::make_shared<Work>();
      work->label = label;
      return work;
    };
    // The legacy stream's rules and refusals are those of any other work.
    OpPtr begin;
    if (CUresult error = d.enqueue(*stream, marker("cuGraphLaunch"), &begin)) return error;
    if (exec->last && !exec->last->observed) {
      begin = d.submit(stream->context, stream->id, marker("cuGraphLaunch"), {begin, exec->last});
      stream->tail = begin;
    }
    bool chain = true;
    for (size_t i = 0; i < exec->items.size(); ++i)
      chain =
          chain && (i == 0 ? exec->items[i].deps.empty() : exec->items[i].deps == std::vector<size_t>{i - 1});
    std::vector<OpPtr> ops;
    std::vector<bool> has_next(exec->items.size());
    for (auto& item : exec->items) {
      std::vector<OpPtr> deps;
      for (size_t dep : item.deps) {
        deps.push_back(ops[dep]);
        has_next[dep] = true;
      }
      if (deps.empty()) deps.push_back(begin);
      OpPtr op = d.submit(stream->context, chain ? stream->id : d.next_stream++, item.work, std::move(deps));
      if (auto it = d.allocations.find(item.work->alloc_address); it != d.allocations.end()) {
        it->second->live = item.work->kind == WorkKind::alloc;
        if (item.work->kind == WorkKind::alloc) it->second->alloc_op = op;
      }
      ops.push_back(std::move(op));
    }
    std::vector<OpPtr> ends;
    for (size_t i = 0; i < ops.size(); ++i) {
      if (!has_next[i]) ends.push_back(ops[i]);
    }
    if (ends.empty()) ends.push_back(begin);
    stream->tail = d.submit(stream->context, stream->id, marker("end of cuGraphLaunch"), std::move(ends));
    exec->last = stream->tail;
    return CUDA_SUCCESS;
  });
}

MGM_CU cuGraphExecUpdate_v2(CUgraphExec exec, CUgraph graph, CUgraphExecUpdateResultInfo* info) {
  return update("cuGraphExecUpdate_v2", exec, graph, info);
}
MGM_CU cuGraphExecUpdate(CUgraphExec exec, CUgraph graph, CUgraphNode* error_node, int* result) {
  CUgraphExecUpdateResultInfo info{};
  CUresult error = update("cuGraphExecUpdate", exec, graph, &info);
  if (error_node) *error_node = info.errorNode;
  if (result) *result = info.result;
  return error;
}

MGM_CU cuGraphExecKernelNodeSetParams_v2(CUgraphExec handle, CUgraphNode node,
                                         const CUDA_KERNEL_NODE_PARAMS_v2* params) {
  return call("cuGraphExecKernelNodeSetParams_v2", kPlain, [&](Driver& d, Lock& lock, Context&) -> CUresult {
    auto exec = d.execs.find(handle);
    if (!exec || !params) return CUDA_ERROR_INVALID_VALUE;
    for (auto& item : exec->items) {
      if (item.source != reinterpret_cast<uint64_t>(node) || item.work->kind != WorkKind::kernel) continue;
      std::shared_ptr<Work> work;
      if (CUresult error =
              kernel_node_work(d, lock, "cuGraphExecKernelNodeSetParams_v2", exec->context, *params, &work))
        return error;
      item.work = work;
      return CUDA_SUCCESS;
    }
    return CUDA_ERROR_INVALID_VALUE;
  });
}

MGM_CU cuGraphExecDestroy(CUgraphExec handle) {
  return call("cuGraphExecDestroy", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    // What was launched goes on: operations share the nodes' work.
    return d.execs.live.erase(reinterpret_cast<uint64_t>(handle)) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
  });
}

MGM_CU cuGraphDestroy(CUgraph handle) {
  return call("cuGraphDestroy", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    return d.graphs.live.erase(reinterpret_cast<uint64_t>(handle)) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
  });
}

MGM_CU cuGraphGetNodes(CUgraph handle, CUgraphNode* nodes, size_t* count) {
  return call("cuGraphGetNodes", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    std::shared_ptr<Graph> graph;
    if (CUresult error = find_graph(d, handle, &graph)) return error;
    if (!count) return CUDA_ERROR_INVALID_VALUE;
    size_t total = graph->nodes.size();
    if (nodes) {
      for (size_t i = 0; i < *count; ++i)
        nodes[i] = i < total ? reinterpret_cast<CUgraphNode>(graph->nodes[i]->handle) : nullptr;
      *count = std::min(*count, total);
    } else {
      *count = total;
    }
    return CUDA_SUCCESS;
  });
}

MGM_CU cuGraphNodeGetType(CUgraphNode handle, int* type) {
  return call("cuGraphNodeGetType", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    auto it = d.nodes.find(reinterpret_cast<uint64_t>(handle));
    if (it == d.nodes.end() || !type) return CUDA_ERROR_INVALID_VALUE;
    *type = node_type(it->second->work->kind);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuGraphNodeGetDependencies(CUgraphNode handle, CUgraphNode* deps, size_t* count) {
  return call("cuGraphNodeGetDependencies", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    auto it = d.nodes.find(reinterpret_cast<uint64_t>(handle));
    if (it == d.nodes.end() || !count) return CUDA_ERROR_INVALID_VALUE;
    auto& own = it->second->deps;
    if (deps) {
      for (size_t i = 0; i < *count; ++i)
        deps[i] = i < own.size() ? reinterpret_cast<CUgraphNode>(own[i]->handle) : nullptr;
      *count = std::min(*count, own.size());
    } else {
      *count = own.size();
    }
    return CUDA_SUCCESS;
  });
}

// CUDA 12.3: data of edges, of which none here has any.
MGM_CU cuGraphNodeGetDependencies_v2(CUgraphNode handle, CUgraphNode* deps, void* edges, size_t* count) {
  if (edges) return misuse("cuGraphNodeGetDependencies_v2", CUDA_ERROR_NOT_SUPPORTED, "the data of edges");
  return cuGraphNodeGetDependencies(handle, deps, count);
}
