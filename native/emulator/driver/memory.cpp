// Device and pinned memory, pools, copies and fills, and what must be ordered before what on each allocation.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "driver.h"

namespace mgm::emulator::cuda {

void note_device_range(int device, uint64_t address, size_t bytes);

GraphAlloc::~GraphAlloc() {
  // May run anywhere, the lock held or not: only noted here.
  Driver& d = driver();
  std::lock_guard lock(d.garbage_mutex);
  d.garbage.emplace_back(device_index, address);
}

void Driver::collect_garbage() {
  std::vector<std::pair<int, uint64_t>> taken;
  {
    std::lock_guard lock(garbage_mutex);
    taken.swap(garbage);
  }
  for (auto& [device, address] : taken) {
    if (allocations.count(address)) release(address, false);
  }
}

Allocation* Driver::find_device(uint64_t address) {
  auto it = allocations.upper_bound(address);
  if (it == allocations.begin()) return nullptr;
  Allocation* found = std::prev(it)->second.get();
  return address - found->address < found->bytes ? found : nullptr;
}

Allocation* Driver::find_host(uint64_t address) {
  auto it = host.upper_bound(address);
  if (it == host.begin()) return nullptr;
  Allocation* found = std::prev(it)->second.get();
  return address - found->address < found->bytes ? found : nullptr;
}

void Driver::release(uint64_t address, bool report) {
  auto it = allocations.find(address);
  if (it == allocations.end()) return;
  auto allocation = it->second;
  if (auto pool = pools.live.find(allocation->pool); pool != pools.live.end())
    pool->second->used -= allocation->bytes;
  std::vector<Report> reports;
  devices[static_cast<size_t>(allocation->device_index)]->memory->free(address, &reports);
  if (report) {
    for (auto& item : reports) add_report(item);
  }
  freed[address] = allocation->bytes;
  freed_order.push_back(address);
  if (freed_order.size() > 4096) {
    freed.erase(freed_order.front());
    freed_order.pop_front();
  }
  allocations.erase(it);
}

// What is wrong with a range, for messages; empty where it lies inside one live allocation.
std::string Driver::describe(uint64_t address, size_t bytes) {
  if (Allocation* allocation = find_device(address)) {
    size_t left = allocation->address + allocation->bytes - address;
    if (bytes <= left) return "";
    return std::to_string(bytes - left) + " bytes past the end of the allocation of " +
           std::to_string(allocation->bytes) + " bytes at " + hex(allocation->address);
  }
  auto it = freed.upper_bound(address);
  if (it != freed.begin()) {
    --it;
    if (address - it->first < it->second)
      return "inside the freed allocation of " + std::to_string(it->second) + " bytes at " + hex(it->first);
  }
  // Globals of modules are the core's own.
  uint64_t base = 0;
  size_t size = 0;
  for (auto& device : devices) {
    if (!device->memory->find(address, &base, &size)) continue;
    return bytes <= base + size - address
               ? ""
               : "past the end of a module's variable of " + std::to_string(size) + " bytes";
  }
  return "in no allocation of any device";
}

namespace {

std::string at_stream(const OpPtr& op) {
  return op->work->label + " on stream " + std::to_string(op->stream_id);
}

void unordered(const OpPtr& op, const OpPtr& other, uint64_t address, const char* what) {
  add_report(ReportKind::api_misuse,
             "Unordered access: " + at_stream(op) + " and " + at_stream(other) + " both use memory at " +
                 hex(address) + " (" + what + "), and no event, stream or synchronisation orders the two",
             address);
}

}  // namespace

void Driver::check_order(const OpPtr& op) {
  auto check = [&](Allocation& allocation, const Access& access, bool kernel) {
    if (allocation.alloc_op && allocation.alloc_op != op && !before(allocation.alloc_op, op))
      add_report(ReportKind::api_misuse,
                 at_stream(op) + " uses memory at " + hex(access.address) +
                     " that cuMemAllocAsync on stream " + std::to_string(allocation.alloc_op->stream_id) +
                     " has not provided yet: nothing orders the use after the allocation",
                 access.address);
    if (allocation.free_op && allocation.free_op != op) {
      bool after = before(allocation.free_op, op);
      if (!after || !kernel)
        add_report(ReportKind::use_after_free,
                   at_stream(op) + " uses memory at " + hex(access.address) + " that " +
                       at_stream(allocation.free_op) +
                       (after ? " freed before it" : " frees, unordered with it"),
                   access.address);
    }
    uint64_t end = access.address + access.bytes;
    auto& users = allocation.users;
    std::erase_if(users, [&](Allocation::User& user) {
      // A later use in the same stream stands for an earlier one.
      return user.op->observed || (user.op->stream_id == op->stream_id && user.kernel == kernel &&
                                   user.access.address == access.address &&
                                   user.access.bytes == access.bytes && user.access.write <= access.write);
    });
    for (auto& user : users) {
      if (user.op == op) continue;
      uint64_t other_end = user.access.address + user.access.bytes;
      if (user.access.address >= end || access.address >= other_end || before(user.op, op)) continue;
      if (!kernel && !user.kernel) {
        if (access.exact && user.access.exact && (access.write || user.access.write))
          unordered(op, user.op, std::max(access.address, user.access.address), "one writes it");
      } else if (kernel && user.kernel) {
        // What they do there is not known before one of them has run.
        size_t bytes = std::min<size_t>(16, allocation.address + allocation.bytes - access.address);
        if (op->work->kind == WorkKind::kernel)
          op->watches.push_back({access.address, bytes, at_stream(user.op)});
        if (user.op->state == Op::pending) user.op->watches.push_back({access.address, bytes, at_stream(op)});
      } else {
        const Access& copy = kernel ? user.access : access;
        if (!copy.exact) continue;
        if (copy.write) {
          unordered(op, user.op, std::max(access.address, user.access.address), "the copy or fill writes it");
        } else if (const OpPtr& runs = kernel ? op : user.op; runs->state == Op::pending) {
          runs->watches.push_back({copy.address, copy.bytes, at_stream(kernel ? user.op : op)});
        }
      }
    }
    users.push_back({op, access, kernel});
  };
  const Work& work = *op->work;
  for (auto& access : work.accesses) {
    if (Allocation* allocation = access.host ? find_host(access.address) : find_device(access.address))
      check(*allocation, access, false);
  }
  for (uint64_t pointer : work.pointers) {
    if (Allocation* allocation = find_device(pointer))
      check(*allocation, {pointer, 1, false, false, false}, true);
  }
  if (work.kind == WorkKind::free) {
    auto it = allocations.find(work.alloc_address);
    if (it == allocations.end()) return;
    Allocation& allocation = *it->second;
    if (allocation.alloc_op && !before(allocation.alloc_op, op))
      add_report(ReportKind::api_misuse,
                 at_stream(op) + " frees memory at " + hex(allocation.address) +
                     " and is not ordered after its allocation",
                 allocation.address);
    for (auto& user : allocation.users) {
      if (user.op->observed || before(user.op, op)) continue;
      add_report(ReportKind::use_after_free,
                 at_stream(op) + " frees memory at " + hex(allocation.address) + " that " +
                     at_stream(user.op) + " uses, and is not ordered after it",
                 allocation.address);
    }
  }
}

namespace {

// One side of a copy.
struct Place {
  bool host = false, pinned = false;
  uint64_t address = 0;
  size_t pitch = 0;
  std::shared_ptr<std::vector<std::byte>> staged;  // taken at the call: pageable sources
};

struct Copy {
  std::string name;
  Place from, to;
  size_t width = 0, height = 1;
};

void fault(Context& context, ReportKind kind, const std::string& message, uint64_t address) {
  add_report(kind, message, address);
  int expected = 0;
  context.error.compare_exchange_strong(expected, CUDA_ERROR_ILLEGAL_ADDRESS);
}

Memory* memory_of(Driver& d, uint64_t address) {
  for (auto& device : d.devices) {
    if (device->memory->find(address, nullptr, nullptr)) return device->memory.get();
  }
  return nullptr;
}

// The bytes of one row, or nullptr where they are gone.
std::byte* row(Driver& d, const Place& place, size_t y, size_t width, Memory** memory) {
  uint64_t address = place.address + y * place.pitch;
  if (place.staged) return place.staged->data() + y * place.pitch;
  if (place.host) return reinterpret_cast<std::byte*>(address);
  *memory = memory_of(d, address);
  return *memory ? (*memory)->resolve(address, width) : nullptr;
}

void run_copy(Context& context, const Copy& copy) {
  Driver& d = driver();
  for (const Place* place : {&copy.from, &copy.to}) {
    if (!place->host || !place->pinned || place->staged) continue;
    Lock lock(d.mutex);
    if (!d.find_host(place->address)) {
      lock.unlock();
      fault(context, ReportKind::use_after_free,
            copy.name + " uses pinned memory at " + hex(place->address) + " that was freed", place->address);
      return;
    }
  }
  bool said = false;
  for (size_t y = 0; y < copy.height; ++y) {
    Memory *source = nullptr, *target = nullptr;
    const std::byte* from = row(d, copy.from, y, copy.width, &source);
    std::byte* to = row(d, copy.to, y, copy.width, &target);
    for (auto [data, place] :
         {std::pair{from, &copy.from}, std::pair<const std::byte*, const Place*>{to, &copy.to}}) {
      if (data) continue;
      uint64_t address = place->address + y * place->pitch;
      fault(context, ReportKind::use_after_free,
            copy.name + " of " + std::to_string(copy.width) + " bytes uses device memory at " + hex(address) +
                ", which was freed before the copy was carried out",
            address);
      return;
    }
    std::memmove(to, from, copy.width);
    uint64_t from_address = copy.from.address + y * copy.from.pitch,
             to_address = copy.to.address + y * copy.to.pitch;
    int64_t hole = source && d.options.checks ? source->first_uninitialized(from_address, copy.width) : -1;
    if (target && hole < 0) {
      target->mark_initialized(to_address, copy.width);
    } else if (target) {
      // What was never written stays so at its new place.
      for (size_t at = 0; at < copy.width;) {
        int64_t next = source->first_uninitialized(from_address + at, copy.width - at);
        size_t run = next < 0 ? copy.width - at : static_cast<size_t>(next);
        if (run) target->mark_initialized(to_address + at, run);
        at += std::max<size_t>(run, 1);
      }
    } else if (hole >= 0 && !said) {
      said = true;
      add_report(ReportKind::uninitialized_read,
                 copy.name + " to the host reads device memory at " +
                     hex(from_address + static_cast<uint64_t>(hole)) + " (byte " + std::to_string(hole) +
                     " of " + std::to_string(copy.width) + "), which nothing has written",
                 from_address + static_cast<uint64_t>(hole));
    }
  }
}

size_t extent(const Copy& copy, const Place& place) {
  return copy.height ? (copy.height - 1) * place.pitch + copy.width : 0;
}

CUresult check_place(Driver& d, const char* name, const Copy& copy, Place& place) {
  size_t bytes = extent(copy, place);
  if (place.host) {
    if (!place.address) return CUDA_ERROR_INVALID_VALUE;
    if (memory_of(d, place.address)) {
      add_report(
          ReportKind::host_access,
          std::string(name) + " received the device address " + hex(place.address) + " as a host pointer",
          place.address);
      return CUDA_ERROR_INVALID_VALUE;
    }
    Allocation* pinned = d.find_host(place.address);
    place.pinned = pinned != nullptr;
    if (pinned && place.address + bytes > pinned->address + pinned->bytes) {
      add_report(ReportKind::out_of_bounds,
                 std::string(name) + " of " + std::to_string(bytes) +
                     " bytes runs past the end of the pinned block of " + std::to_string(pinned->bytes) +
                     " bytes at " + hex(pinned->address),
                 place.address);
      return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
  }
  std::string wrong = d.describe(place.address, bytes);
  if (wrong.empty()) return CUDA_SUCCESS;
  ReportKind kind =
      wrong.find("freed") != std::string::npos ? ReportKind::use_after_free : ReportKind::out_of_bounds;
  add_report(kind,
             std::string(name) + " of " + std::to_string(bytes) + " bytes at " + hex(place.address) +
                 " lies " + wrong,
             place.address);
  return CUDA_ERROR_INVALID_VALUE;
}

// Enqueues a copy. Pageable memory behaves as CUDA says: sources are read at the call, targets are waited
// for.
CUresult copy(Driver& d, Lock& lock, Stream& stream, Copy copy, bool synchronous) {
  if (copy.width == 0 || copy.height == 0) return CUDA_SUCCESS;
  if (copy.height == 1) copy.from.pitch = copy.to.pitch = copy.width;
  if (copy.from.pitch < copy.width || copy.to.pitch < copy.width) return CUDA_ERROR_INVALID_VALUE;
  const char* name = copy.name.c_str();
  if (CUresult error = check_place(d, name, copy, copy.from)) return error;
  if (CUresult error = check_place(d, name, copy, copy.to)) return error;
  bool capturing = stream.capture != nullptr;
  auto work = std::make_shared<Work>();
  work->kind = WorkKind::copy;
  work->label = copy.name;
  for (auto [place, write] : {std::pair{&copy.from, false}, std::pair{&copy.to, true}}) {
    if (place->host && !place->pinned) continue;
    work->accesses.push_back({place->address, extent(copy, *place), write, place->host,
                              copy.height == 1 || place->pitch == copy.width});
  }
  if (!capturing && copy.from.host && !copy.from.pinned) {
    auto* data = reinterpret_cast<const std::byte*>(copy.from.address);
    copy.from.staged = std::make_shared<std::vector<std::byte>>(data, data + extent(copy, copy.from));
  }
  if (!capturing && copy.to.host && copy.to.pinned && d.options.checks && copy.height == 1) {
    // Nobody may look before the copy is known to have ended; whoever does sees this.
    Allocation* block = d.find_host(copy.to.address);
    bool idle =
        std::all_of(block->users.begin(), block->users.end(), [](auto& user) { return user.op->observed; });
    bool own = copy.from.host && copy.from.address < copy.to.address + copy.width &&
               copy.to.address < copy.from.address + copy.width;
    if (idle && !own) std::memset(reinterpret_cast<void*>(copy.to.address), 0xa5, copy.width);
  }
  bool wait = !capturing && copy.to.host && (synchronous || !copy.to.pinned);
  // A synchronous copy from pinned memory has read it when it returns.
  wait = wait || (!capturing && synchronous && copy.from.host && copy.from.pinned);
  work->run = [copy](Context& context) { run_copy(context, copy); };
  OpPtr op;
  if (CUresult error = d.enqueue(stream, work, &op)) return error;
  if (wait && op) d.wait(lock, op);
  return stream.context->error;
}

CUresult fill(Driver& d, Stream& stream, const char* name, uint64_t address, size_t pitch, uint32_t value,
              size_t unit, size_t width, size_t height) {
  if (width == 0 || height == 0) return CUDA_SUCCESS;
  Copy shape;
  shape.width = width * unit;
  shape.height = height;
  shape.to.address = address;
  shape.to.pitch = height == 1 ? shape.width : pitch;
  if (address % unit || shape.to.pitch < shape.width || width > SIZE_MAX / 4) return CUDA_ERROR_INVALID_VALUE;
  if (CUresult error = check_place(d, name, shape, shape.to)) return error;
  auto work = std::make_shared<Work>();
  work->kind = WorkKind::fill;
  work->label = name;
  work->accesses.push_back({address, extent(shape, shape.to), true, false, height == 1});
  work->run = [=, label = std::string(name)](Context& context) {
    Driver& own = driver();
    for (size_t y = 0; y < height; ++y) {
      Memory* memory = nullptr;
      std::byte* data = row(own, shape.to, y, shape.width, &memory);
      if (!data) {
        fault(
            context, ReportKind::use_after_free,
            label + " uses device memory at " + hex(address) + ", which was freed before it was carried out",
            address);
        return;
      }
      for (size_t i = 0; i < width; ++i) std::memcpy(data + i * unit, &value, unit);
      memory->mark_initialized(address + y * shape.to.pitch, shape.width);
    }
  };
  return d.enqueue(stream, work);
}

Place device_place(CUdeviceptr address) {
  Place place;
  place.address = address;
  return place;
}
Place host_place(const void* pointer) {
  Place place;
  place.host = true;
  place.address = reinterpret_cast<uint64_t>(pointer);
  return place;
}

// A plain copy, on a stream or on the legacy one and then with the rules of synchronous calls.
CUresult linear_copy(const char* name, Place to, Place from, size_t bytes, CUstream handle,
                     bool synchronous) {
  return call(name, kContext | (synchronous ? kCaptureUnsafe : kPlain),
              [&](Driver& d, Lock& lock, Context& context) -> CUresult {
                std::shared_ptr<Stream> stream;
                if (CUresult error = find_stream(d, context, handle, &stream)) return error;
                Copy item;
                item.name = name;
                item.to = to;
                item.from = from;
                item.width = bytes;
                return copy(d, lock, *stream, std::move(item), synchronous);
              });
}

Place any_place(Driver& d, CUdeviceptr address) {
  return memory_of(d, address) || d.find_device(address) ? device_place(address)
                                                         : host_place(reinterpret_cast<const void*>(address));
}

CUresult unified_copy(const char* name, CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream handle,
                      bool synchronous) {
  Place target, source;
  {
    Lock lock(driver().mutex);
    target = any_place(driver(), to);
    source = any_place(driver(), from);
  }
  return linear_copy(name, target, source, bytes, handle, synchronous);
}

CUresult rectangle_copy(const char* name, const CUDA_MEMCPY2D* p, CUstream handle, bool synchronous) {
  return call(name, kContext | (synchronous ? kCaptureUnsafe : kPlain),
              [&](Driver& d, Lock& lock, Context& context) -> CUresult {
                if (!p) return CUDA_ERROR_INVALID_VALUE;
                std::shared_ptr<Stream> stream;
                if (CUresult error = find_stream(d, context, handle, &stream)) return error;
                auto side = [&](int type, const void* host, CUdeviceptr device, size_t pitch, size_t x,
                                size_t y, Place* place) {
                  if (type == 1) {
                    *place = host_place(host);
                  } else if (type == 2) {
                    *place = device_place(device);
                  } else if (type == 4) {
                    *place = any_place(d, device);
                  } else {
                    return misuse(name, CUDA_ERROR_NOT_SUPPORTED, "only host and device memory, no arrays");
                  }
                  place->pitch = pitch ? pitch : p->WidthInBytes;
                  place->address += y * place->pitch + x;
                  return static_cast<CUresult>(CUDA_SUCCESS);
                };
                Copy item;
                item.name = name;
                item.width = p->WidthInBytes;
                item.height = p->Height;
                if (CUresult error = side(p->srcMemoryType, p->srcHost, p->srcDevice, p->srcPitch,
                                          p->srcXInBytes, p->srcY, &item.from))
                  return error;
                if (CUresult error = side(p->dstMemoryType, p->dstHost, p->dstDevice, p->dstPitch,
                                          p->dstXInBytes, p->dstY, &item.to))
                  return error;
                return copy(d, lock, *stream, std::move(item), synchronous);
              });
}

CUresult fill_call(const char* name, CUdeviceptr address, size_t pitch, uint32_t value, size_t unit,
                   size_t width, size_t height, CUstream handle, bool synchronous) {
  return call(name, kContext | (synchronous ? kCaptureUnsafe : kPlain),
              [&](Driver& d, Lock&, Context& context) -> CUresult {
                std::shared_ptr<Stream> stream;
                if (CUresult error = find_stream(d, context, handle, &stream)) return error;
                return fill(d, *stream, name, address, pitch, value, unit, width, height);
              });
}

// Memory of a device, after waiting for pending frees where it does not fit at once.
uint64_t allocate(Driver& d, Lock& lock, Device& device, size_t bytes) {
  uint64_t address = device.memory->allocate(bytes);
  if (!address) {
    std::vector<OpPtr> frees;
    for (auto& op : d.recent) {
      if (op->work->kind == WorkKind::free && op->state != Op::done && op->context->device == &device)
        frees.push_back(op);
    }
    for (auto& op : frees) d.wait(lock, op);
    if (!frees.empty()) address = device.memory->allocate(bytes);
  }
  if (address) note_device_range(device.index, address, bytes);
  return address;
}

std::shared_ptr<Allocation> add_allocation(Driver& d, Context& context, Allocation::Kind kind,
                                           uint64_t address, size_t bytes) {
  auto allocation = std::make_shared<Allocation>();
  allocation->kind = kind;
  allocation->address = address;
  allocation->bytes = bytes;
  allocation->device_index = context.device->index;
  allocation->context = &context;
  d.allocations[address] = allocation;
  return allocation;
}

CUresult allocate_async(const char* name, CUdeviceptr* out, size_t bytes, CUstream handle,
                        CUmemoryPool pool_handle) {
  return call(name, kContext, [&](Driver& d, Lock& lock, Context& context) -> CUresult {
    if (!out || !bytes) return CUDA_ERROR_INVALID_VALUE;
    std::shared_ptr<Stream> stream;
    if (CUresult error = find_stream(d, context, handle, &stream)) return error;
    std::shared_ptr<Pool> pool = context.device->pool;
    if (pool_handle) pool = d.pools.find(pool_handle);
    if (!pool || pool->device_index != context.device->index) return CUDA_ERROR_INVALID_VALUE;
    bool capturing = stream->capture != nullptr;
    if (capturing && stream->capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    uint64_t address = allocate(d, lock, *context.device, bytes);
    if (!address) return CUDA_ERROR_OUT_OF_MEMORY;
    auto allocation = add_allocation(d, context, capturing ? Allocation::graph : Allocation::stream_ordered,
                                     address, bytes);
    allocation->pool = pool->handle;
    pool->used += bytes;
    pool->used_high = std::max(pool->used_high, pool->used);
    auto work = std::make_shared<Work>();
    work->kind = WorkKind::alloc;
    work->label = name;
    work->alloc_address = address;
    if (capturing) {
      allocation->live = false;
      auto memory = std::make_shared<GraphAlloc>();
      memory->address = address;
      memory->bytes = bytes;
      memory->device_index = context.device->index;
      allocation->graph_alloc = memory;
      work->graph_alloc = memory;
      work->run = [address, bytes](Context& own) {
        if (std::byte* data = own.device->memory->resolve(address, bytes)) std::memset(data, 0xff, bytes);
      };
    }
    OpPtr op;
    if (CUresult error = d.enqueue(*stream, work, &op)) {
      d.release(address, false);
      return error;
    }
    allocation->alloc_op = op;
    *out = address;
    return CUDA_SUCCESS;
  });
}

CUresult free_invalid(Driver& d, const char* name, uint64_t address) {
  std::string wrong = d.describe(address, 1);
  if (wrong.empty()) {
    Allocation* allocation = d.find_device(address);
    wrong =
        allocation && allocation->address == address ? "already freed" : "not at the start of an allocation";
  }
  add_report(ReportKind::invalid_free, std::string(name) + " of " + hex(address) + ", which is " + wrong,
             address);
  return CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

}  // namespace mgm::emulator::cuda

using namespace mgm::emulator;
using namespace mgm::emulator::cuda;

MGM_CU cuMemGetInfo_v2(size_t* free, size_t* total) {
  return call("cuMemGetInfo_v2", kContext, [&](Driver&, Lock&, Context& context) -> CUresult {
    Memory& memory = *context.device->memory;
    if (total) *total = memory.total();
    if (free) *free = memory.total() - memory.used();
    return CUDA_SUCCESS;
  });
}

MGM_CU cuMemAlloc_v2(CUdeviceptr* out, size_t bytes) {
  return call("cuMemAlloc_v2", kContext | kCaptureUnsafe,
              [&](Driver& d, Lock& lock, Context& context) -> CUresult {
                if (!out || !bytes) return CUDA_ERROR_INVALID_VALUE;
                uint64_t address = allocate(d, lock, *context.device, bytes);
                if (!address) return CUDA_ERROR_OUT_OF_MEMORY;
                add_allocation(d, context, Allocation::device, address, bytes);
                *out = address;
                return CUDA_SUCCESS;
              });
}

MGM_CU cuMemAllocPitch_v2(CUdeviceptr* out, size_t* pitch, size_t width, size_t height, unsigned element) {
  if (!out || !pitch || !width || !height || (element != 4 && element != 8 && element != 16))
    return CUDA_ERROR_INVALID_VALUE;
  *pitch = (width + 511) / 512 * 512;
  if (height > SIZE_MAX / *pitch) return CUDA_ERROR_OUT_OF_MEMORY;
  return cuMemAlloc_v2(out, *pitch * height);
}

MGM_CU cuMemFree_v2(CUdeviceptr address) {
  return call("cuMemFree_v2", kContext | kCaptureUnsafe,
              [&](Driver& d, Lock& lock, Context& context) -> CUresult {
                if (!address) return CUDA_SUCCESS;
                auto it = d.allocations.find(address);
                if (it == d.allocations.end() || it->second->free_op || !it->second->live)
                  return free_invalid(d, "cuMemFree_v2", address);
                auto allocation = it->second;
                // As drivers do, the device's work ends first.
                d.wait_context(lock, context);
                if (allocation->kind == Allocation::graph) {
                  allocation->live = false;
                } else {
                  d.release(address, true);
                }
                return CUDA_SUCCESS;
              });
}

MGM_CU cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* bytes, CUdeviceptr address) {
  return call("cuMemGetAddressRange_v2", kContext, [&](Driver& d, Lock&, Context&) -> CUresult {
    Allocation* allocation = d.find_device(address);
    if (!allocation) return CUDA_ERROR_NOT_FOUND;
    if (base) *base = allocation->address;
    if (bytes) *bytes = allocation->bytes;
    return CUDA_SUCCESS;
  });
}

MGM_CU cuMemAllocAsync(CUdeviceptr* out, size_t bytes, CUstream stream) {
  return allocate_async("cuMemAllocAsync", out, bytes, stream, nullptr);
}

MGM_CU cuMemAllocFromPoolAsync(CUdeviceptr* out, size_t bytes, CUmemoryPool pool, CUstream stream) {
  return pool ? allocate_async("cuMemAllocFromPoolAsync", out, bytes, stream, pool)
              : CUDA_ERROR_INVALID_VALUE;
}

MGM_CU cuMemFreeAsync(CUdeviceptr address, CUstream handle) {
  return call("cuMemFreeAsync", kContext, [&](Driver& d, Lock&, Context& context) -> CUresult {
    std::shared_ptr<Stream> stream;
    if (CUresult error = find_stream(d, context, handle, &stream)) return error;
    if (!address) return CUDA_SUCCESS;
    auto it = d.allocations.find(address);
    bool capturing = stream->capture != nullptr;
    if (it == d.allocations.end() || it->second->free_op ||
        (!it->second->live && !(capturing && it->second->kind == Allocation::graph)))
      return free_invalid(d, "cuMemFreeAsync", address);
    auto allocation = it->second;
    auto work = std::make_shared<Work>();
    work->kind = WorkKind::free;
    work->label = "cuMemFreeAsync";
    work->alloc_address = address;
    if (allocation->kind == Allocation::graph) {
      work->graph_alloc = allocation->graph_alloc.lock();
      work->run = [address, bytes = allocation->bytes](Context& own) {
        if (std::byte* data = own.device->memory->resolve(address, bytes)) std::memset(data, 0xff, bytes);
      };
    } else {
      if (capturing)
        return misuse("cuMemFreeAsync", CUDA_ERROR_NOT_SUPPORTED,
                      "a capture may free only what it allocated; here it received memory from outside");
      work->run = [address](Context&) {
        Driver& own = driver();
        Lock lock(own.mutex);
        own.release(address, true);
      };
    }
    OpPtr op;
    if (CUresult error = d.enqueue(*stream, work, &op)) return error;
    if (allocation->kind == Allocation::graph) {
      if (!capturing) allocation->live = false;
    } else {
      allocation->free_op = op;
    }
    return CUDA_SUCCESS;
  });
}

MGM_CU cuDeviceGetDefaultMemPool(CUmemoryPool* pool, CUdevice index) {
  return call("cuDeviceGetDefaultMemPool", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    if (index < 0 || index >= static_cast<int>(d.devices.size())) return CUDA_ERROR_INVALID_DEVICE;
    if (!pool) return CUDA_ERROR_INVALID_VALUE;
    *pool = reinterpret_cast<CUmemoryPool>(d.devices[static_cast<size_t>(index)]->default_pool->handle);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuDeviceGetMemPool(CUmemoryPool* pool, CUdevice index) {
  return call("cuDeviceGetMemPool", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    if (index < 0 || index >= static_cast<int>(d.devices.size())) return CUDA_ERROR_INVALID_DEVICE;
    if (!pool) return CUDA_ERROR_INVALID_VALUE;
    *pool = reinterpret_cast<CUmemoryPool>(d.devices[static_cast<size_t>(index)]->pool->handle);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuDeviceSetMemPool(CUdevice index, CUmemoryPool handle) {
  return call("cuDeviceSetMemPool", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    if (index < 0 || index >= static_cast<int>(d.devices.size())) return CUDA_ERROR_INVALID_DEVICE;
    auto pool = d.pools.find(handle);
    if (!pool || pool->device_index != index) return CUDA_ERROR_INVALID_VALUE;
    d.devices[static_cast<size_t>(index)]->pool = pool;
    return CUDA_SUCCESS;
  });
}

MGM_CU cuMemPoolCreate(CUmemoryPool* out, const CUmemPoolProps* properties) {
  return call("cuMemPoolCreate", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    if (!out || !properties || properties->allocType != 1 || properties->location.type != 1)
      return CUDA_ERROR_INVALID_VALUE;
    int index = properties->location.id;
    if (index < 0 || index >= static_cast<int>(d.devices.size())) return CUDA_ERROR_INVALID_VALUE;
    if (properties->handleTypes)
      return misuse("cuMemPoolCreate", CUDA_ERROR_NOT_SUPPORTED, "no memory shared between processes here");
    auto pool = std::make_shared<Pool>();
    pool->handle = d.handle();
    pool->device_index = index;
    d.pools.live[pool->handle] = pool;
    *out = reinterpret_cast<CUmemoryPool>(pool->handle);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuMemPoolDestroy(CUmemoryPool handle) {
  return call("cuMemPoolDestroy", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    auto pool = d.pools.find(handle);
    if (!pool) return CUDA_ERROR_INVALID_VALUE;
    for (auto& device : d.devices) {
      if (device->default_pool == pool) return CUDA_ERROR_INVALID_VALUE;
      if (device->pool == pool) device->pool = device->default_pool;
    }
    d.pools.live.erase(pool->handle);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuMemPoolSetAttribute(CUmemoryPool handle, int attribute, void* value) {
  return call("cuMemPoolSetAttribute", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    auto pool = d.pools.find(handle);
    if (!pool || !value) return CUDA_ERROR_INVALID_VALUE;
    if (attribute >= 1 && attribute <= 3) {
      pool->attributes[attribute] = static_cast<uint64_t>(*static_cast<int*>(value));
    } else if (attribute == 4) {
      pool->attributes[attribute] = *static_cast<uint64_t*>(value);
    } else if ((attribute == 6 || attribute == 8) && *static_cast<uint64_t*>(value) == 0) {
      pool->used_high = pool->used;
    } else {
      return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
  });
}

MGM_CU cuMemPoolGetAttribute(CUmemoryPool handle, int attribute, void* value) {
  return call("cuMemPoolGetAttribute", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    auto pool = d.pools.find(handle);
    if (!pool || !value) return CUDA_ERROR_INVALID_VALUE;
    if (attribute >= 1 && attribute <= 3) {
      auto it = pool->attributes.find(attribute);
      *static_cast<int*>(value) = it == pool->attributes.end() ? 1 : static_cast<int>(it->second);
    } else if (attribute == 4) {
      *static_cast<uint64_t*>(value) = pool->attributes[4];
    } else if (attribute == 5 || attribute == 7) {
      *static_cast<uint64_t*>(value) = pool->used;
    } else if (attribute == 6 || attribute == 8) {
      *static_cast<uint64_t*>(value) = pool->used_high;
    } else {
      return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
  });
}

// Nothing is kept back: freed memory returns to the device at once, so there is nothing to trim.
MGM_CU cuMemPoolTrimTo(CUmemoryPool handle, size_t) {
  return call("cuMemPoolTrimTo", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    return d.pools.find(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
  });
}

MGM_CU cuMemPoolSetAccess(CUmemoryPool handle, const CUmemAccessDesc* map, size_t count) {
  return call("cuMemPoolSetAccess", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    auto pool = d.pools.find(handle);
    if (!pool || (count && !map)) return CUDA_ERROR_INVALID_VALUE;
    for (size_t i = 0; i < count; ++i) {
      const int reader = map[i].location.id;
      if (map[i].location.type != 1 || reader < 0 || reader >= static_cast<int>(d.devices.size()))
        return CUDA_ERROR_INVALID_VALUE;
      if (reader == pool->device_index) {
        if (map[i].flags != 3)
          return CUDA_ERROR_INVALID_VALUE;  // it cannot be taken from the pool's own device
      } else if (map[i].flags == 0) {
        pool->readers.erase(reader);
      } else if (!d.peers) {
        return CUDA_ERROR_INVALID_DEVICE;
      } else {
        pool->readers.insert(reader);
      }
    }
    return CUDA_SUCCESS;
  });
}

MGM_CU cuMemPoolGetAccess(int* flags, CUmemoryPool handle, CUmemLocation* location) {
  return call("cuMemPoolGetAccess", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    auto pool = d.pools.find(handle);
    if (!flags || !pool || !location || location->type != 1) return CUDA_ERROR_INVALID_VALUE;
    *flags = location->id == pool->device_index || pool->readers.count(location->id) ? 3 : 0;
    return CUDA_SUCCESS;
  });
}

MGM_CU cuMemHostAlloc(void** out, size_t bytes, unsigned flags) {
  return call(
      "cuMemHostAlloc", kContext | kCaptureUnsafe, [&](Driver& d, Lock&, Context& context) -> CUresult {
        if (!out || !bytes || (flags & ~7u)) return CUDA_ERROR_INVALID_VALUE;
        // Pages nobody may touch on both sides, and the block's end against the upper ones but for alignment.
        constexpr size_t page = 4096;
        if (bytes > SIZE_MAX / 2) return CUDA_ERROR_OUT_OF_MEMORY;
        size_t body = (bytes + page - 1) / page * page;
        void* base =
            mmap(nullptr, body + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
        auto* data = static_cast<std::byte*>(base) + page;
        if (mprotect(data, body, PROT_READ | PROT_WRITE)) {
          munmap(base, body + 2 * page);
          return CUDA_ERROR_OUT_OF_MEMORY;
        }
        data += (body - bytes) / 512 * 512;
        std::memset(data, 0xa5, std::min<size_t>(bytes, size_t{64} << 20));
        auto block = std::make_shared<Allocation>();
        block->kind = Allocation::host;
        block->address = reinterpret_cast<uint64_t>(data);
        block->bytes = bytes;
        block->context = &context;
        block->device_index = context.device->index;
        block->flags = flags;
        d.host[block->address] = block;
        *out = data;
        return CUDA_SUCCESS;
      });
}
MGM_CU cuMemAllocHost_v2(void** out, size_t bytes) {
  return cuMemHostAlloc(out, bytes, 0);
}

namespace mgm::emulator::cuda {
namespace {

CUresult forget_host(const char* name, void* pointer, Allocation::Kind kind, CUresult unknown) {
  return call(name, kContext | kCaptureUnsafe, [&](Driver& d, Lock& lock, Context&) -> CUresult {
    auto it = d.host.find(reinterpret_cast<uint64_t>(pointer));
    if (it == d.host.end() || it->second->kind != kind) return unknown;
    auto block = it->second;
    for (auto user : std::vector(block->users)) {
      if (user.op->observed) continue;
      if (user.op->state != Op::done)
        add_report(ReportKind::use_after_free,
                   std::string(name) + " of pinned memory at " + hex(block->address) + " that " +
                       at_stream(user.op) + " still uses",
                   block->address);
      d.wait(lock, user.op);
    }
    for (auto& [device, address] : block->mapped)
      d.devices[static_cast<size_t>(device)]->memory->unmap_host(address);
    d.host.erase(block->address);
    if (kind == Allocation::host) {
      uint64_t first = block->address / 4096 * 4096 - 4096;
      size_t body = (block->bytes + 4095) / 4096 * 4096;
      // `address` may lie in the block's first page only: see cuMemHostAlloc.
      munmap(reinterpret_cast<void*>(first), body + 2 * 4096);
    }
    return CUDA_SUCCESS;
  });
}

}  // namespace
}  // namespace mgm::emulator::cuda

MGM_CU cuMemFreeHost(void* pointer) {
  return forget_host("cuMemFreeHost", pointer, Allocation::host, CUDA_ERROR_INVALID_VALUE);
}

MGM_CU cuMemHostRegister_v2(void* pointer, size_t bytes, unsigned flags) {
  return call("cuMemHostRegister_v2", kContext | kCaptureUnsafe,
              [&](Driver& d, Lock&, Context& context) -> CUresult {
                if (!pointer || !bytes || (flags & ~15u)) return CUDA_ERROR_INVALID_VALUE;
                if (flags & 4)
                  return misuse("cuMemHostRegister_v2", CUDA_ERROR_NOT_SUPPORTED, "no I/O memory here");
                uint64_t address = reinterpret_cast<uint64_t>(pointer);
                auto next = d.host.lower_bound(address);
                if (d.find_host(address) || (next != d.host.end() && next->first < address + bytes))
                  return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
                auto block = std::make_shared<Allocation>();
                block->kind = Allocation::registered;
                block->address = address;
                block->bytes = bytes;
                block->context = &context;
                block->device_index = context.device->index;
                block->flags = flags;
                d.host[address] = block;
                return CUDA_SUCCESS;
              });
}

MGM_CU cuMemHostUnregister(void* pointer) {
  return forget_host("cuMemHostUnregister", pointer, Allocation::registered,
                     CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
}

MGM_CU cuMemHostGetDevicePointer_v2(CUdeviceptr* out, void* pointer, unsigned flags) {
  return call("cuMemHostGetDevicePointer_v2", kContext, [&](Driver& d, Lock&, Context& context) -> CUresult {
    if (!out || flags) return CUDA_ERROR_INVALID_VALUE;
    uint64_t address = reinterpret_cast<uint64_t>(pointer);
    Allocation* block = d.find_host(address);
    if (!block) return CUDA_ERROR_INVALID_VALUE;
    uint64_t& mapped = block->mapped[context.device->index];
    if (!mapped) {
      mapped = context.device->memory->map_host(reinterpret_cast<void*>(block->address), block->bytes);
      if (!mapped) return CUDA_ERROR_OUT_OF_MEMORY;
      note_device_range(context.device->index, mapped, block->bytes);
    }
    *out = mapped + (address - block->address);
    return CUDA_SUCCESS;
  });
}

MGM_CU cuMemHostGetFlags(unsigned* flags, void* pointer) {
  return call("cuMemHostGetFlags", kContext, [&](Driver& d, Lock&, Context&) -> CUresult {
    Allocation* block = d.find_host(reinterpret_cast<uint64_t>(pointer));
    if (!flags || !block) return CUDA_ERROR_INVALID_VALUE;
    *flags = block->flags;
    return CUDA_SUCCESS;
  });
}

MGM_CU cuPointerGetAttribute(void* data, int attribute, CUdeviceptr pointer) {
  return call("cuPointerGetAttribute", kPlain, [&](Driver& d, Lock&, Context&) -> CUresult {
    if (!data) return CUDA_ERROR_INVALID_VALUE;
    Allocation* allocation = d.find_device(pointer);
    bool on_device = allocation != nullptr;
    if (!allocation) allocation = d.find_host(pointer);
    if (!allocation) return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
      case 1:
        *static_cast<uint64_t*>(data) = allocation->context->handle;
        break;
      case 2:
        *static_cast<unsigned*>(data) = on_device ? 2 : 1;
        break;
      case 3:
        if (!on_device)
          return misuse("cuPointerGetAttribute", CUDA_ERROR_NOT_SUPPORTED,
                        "ask cuMemHostGetDevicePointer for a pinned block's device address");
        *static_cast<uint64_t*>(data) = pointer;
        break;
      case 4:
        if (on_device) return CUDA_ERROR_INVALID_VALUE;
        *static_cast<uint64_t*>(data) = pointer;
        break;
      case 7:
        *static_cast<uint64_t*>(data) = allocation->address;
        break;
      case 8:
        *static_cast<unsigned char*>(data) = 0;
        break;
      case 9:
        *static_cast<int*>(data) = allocation->device_index;
        break;
      case 11:
        *static_cast<uint64_t*>(data) = allocation->address;
        break;
      case 12:
        *static_cast<size_t*>(data) = allocation->bytes;
        break;
      case 13:
        *static_cast<unsigned char*>(data) = 1;
        break;
      case 17:
        *static_cast<uint64_t*>(data) = allocation->pool;
        break;
      default:
        return misuse("cuPointerGetAttribute", CUDA_ERROR_NOT_SUPPORTED,
                      "attribute " + std::to_string(attribute));
    }
    return CUDA_SUCCESS;
  });
}

MGM_CU cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
  return linear_copy("cuMemcpyHtoD_v2", device_place(to), host_place(from), bytes, nullptr, true);
}
MGM_CU cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
  return linear_copy("cuMemcpyDtoH_v2", host_place(to), device_place(from), bytes, nullptr, true);
}
MGM_CU cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  return linear_copy("cuMemcpyDtoD_v2", device_place(to), device_place(from), bytes, nullptr, true);
}
MGM_CU cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
  return linear_copy("cuMemcpyHtoDAsync_v2", device_place(to), host_place(from), bytes, stream, false);
}
MGM_CU cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return linear_copy("cuMemcpyDtoHAsync_v2", host_place(to), device_place(from), bytes, stream, false);
}
MGM_CU cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return linear_copy("cuMemcpyDtoDAsync_v2", device_place(to), device_place(from), bytes, stream, false);
}
MGM_CU cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  return unified_copy("cuMemcpy", to, from, bytes, nullptr, true);
}
MGM_CU cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return unified_copy("cuMemcpyAsync", to, from, bytes, stream, false);
}
MGM_CU cuMemcpyPeer(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t bytes) {
  return linear_copy("cuMemcpyPeer", device_place(to), device_place(from), bytes, nullptr, true);
}
MGM_CU cuMemcpyPeerAsync(CUdeviceptr to, CUcontext to_context, CUdeviceptr from, CUcontext from_context,
                         size_t bytes, CUstream stream) {
  {
    Driver& d = driver();
    Lock lock(d.mutex);
    for (auto [address, handle] : {std::pair{to, to_context}, std::pair{from, from_context}}) {
      auto context = d.contexts.find(handle);
      Allocation* allocation = d.find_device(address);
      if (!context) return CUDA_ERROR_INVALID_CONTEXT;
      if (allocation && allocation->device_index != context->device->index)
        return misuse("cuMemcpyPeerAsync", CUDA_ERROR_INVALID_VALUE,
                      "the address " + hex(address) + " is not of the device whose context is named with it");
    }
  }
  return linear_copy("cuMemcpyPeerAsync", device_place(to), device_place(from), bytes, stream, false);
}
MGM_CU cuMemcpy2D_v2(const CUDA_MEMCPY2D* p) {
  return rectangle_copy("cuMemcpy2D_v2", p, nullptr, true);
}
MGM_CU cuMemcpy2DUnaligned_v2(const CUDA_MEMCPY2D* p) {
  return rectangle_copy("cuMemcpy2DUnaligned_v2", p, nullptr, true);
}
MGM_CU cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D* p, CUstream stream) {
  return rectangle_copy("cuMemcpy2DAsync_v2", p, stream, false);
}

MGM_CU cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t n) {
  return fill_call("cuMemsetD8_v2", to, 0, value, 1, n, 1, nullptr, true);
}
MGM_CU cuMemsetD16_v2(CUdeviceptr to, unsigned short value, size_t n) {
  return fill_call("cuMemsetD16_v2", to, 0, value, 2, n, 1, nullptr, true);
}
MGM_CU cuMemsetD32_v2(CUdeviceptr to, unsigned value, size_t n) {
  return fill_call("cuMemsetD32_v2", to, 0, value, 4, n, 1, nullptr, true);
}
MGM_CU cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t n, CUstream stream) {
  return fill_call("cuMemsetD8Async", to, 0, value, 1, n, 1, stream, false);
}
MGM_CU cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t n, CUstream stream) {
  return fill_call("cuMemsetD16Async", to, 0, value, 2, n, 1, stream, false);
}
MGM_CU cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t n, CUstream stream) {
  return fill_call("cuMemsetD32Async", to, 0, value, 4, n, 1, stream, false);
}
MGM_CU cuMemsetD2D8_v2(CUdeviceptr to, size_t pitch, unsigned char value, size_t width, size_t height) {
  return fill_call("cuMemsetD2D8_v2", to, pitch, value, 1, width, height, nullptr, true);
}
MGM_CU cuMemsetD2D16_v2(CUdeviceptr to, size_t pitch, unsigned short value, size_t width, size_t height) {
  return fill_call("cuMemsetD2D16_v2", to, pitch, value, 2, width, height, nullptr, true);
}
MGM_CU cuMemsetD2D32_v2(CUdeviceptr to, size_t pitch, unsigned value, size_t width, size_t height) {
  return fill_call("cuMemsetD2D32_v2", to, pitch, value, 4, width, height, nullptr, true);
}
MGM_CU cuMemsetD2D8Async(CUdeviceptr to, size_t pitch, unsigned char value, size_t width, size_t height,
                         CUstream stream) {
  return fill_call("cuMemsetD2D8Async", to, pitch, value, 1, width, height, stream, false);
}
MGM_CU cuMemsetD2D16Async(CUdeviceptr to, size_t pitch, unsigned short value, size_t width, size_t height,
                          CUstream stream) {
  return fill_call("cuMemsetD2D16Async", to, pitch, value, 2, width, height, stream, false);
}
MGM_CU cuMemsetD2D32Async(CUdeviceptr to, size_t pitch, unsigned value, size_t width, size_t height,
                          CUstream stream) {
  return fill_call("cuMemsetD2D32Async", to, pitch, value, 4, width, height, stream, false);
}

// Virtual memory: cuDeviceGetAttribute says that it is not supported, and so do the calls.
#define MGM_NO_VIRTUAL_MEMORY(name, ...)                                                               \
  MGM_CU name(__VA_ARGS__) {                                                                           \
    return call(#name, kPlain, [](Driver&, Lock&, Context&) -> CUresult {                              \
      return misuse(#name, CUDA_ERROR_NOT_SUPPORTED, "the emulator has no virtual memory management"); \
    });                                                                                                \
  }
MGM_NO_VIRTUAL_MEMORY(cuMemAddressReserve, CUdeviceptr*, size_t, size_t, CUdeviceptr, unsigned long long)
MGM_NO_VIRTUAL_MEMORY(cuMemAddressFree, CUdeviceptr, size_t)
MGM_NO_VIRTUAL_MEMORY(cuMemCreate, uint64_t*, size_t, const void*, unsigned long long)
MGM_NO_VIRTUAL_MEMORY(cuMemRelease, uint64_t)
MGM_NO_VIRTUAL_MEMORY(cuMemMap, CUdeviceptr, size_t, size_t, uint64_t, unsigned long long)
MGM_NO_VIRTUAL_MEMORY(cuMemUnmap, CUdeviceptr, size_t)
MGM_NO_VIRTUAL_MEMORY(cuMemSetAccess, CUdeviceptr, size_t, const CUmemAccessDesc*, size_t)
MGM_NO_VIRTUAL_MEMORY(cuMemGetAllocationGranularity, size_t*, const void*, int)
MGM_NO_VIRTUAL_MEMORY(cuMemAllocManaged, CUdeviceptr*, size_t, unsigned)
