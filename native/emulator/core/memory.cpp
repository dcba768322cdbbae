#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <new>

#include "memory_impl.h"

namespace mgm::emulator {
namespace {

void* reserve(size_t bytes, int protection) {
  void* p = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return p;
}

std::string hex(uint64_t v) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(v));
  return text;
}

constexpr size_t kRedZone = 256, kPoisonLimit = size_t{64} << 20;

}  // namespace

Memory::Memory(const DeviceSpec& spec, int) : impl_(std::make_unique<Impl>()) {
  Impl& m = *impl_;
  m.limit = spec.memory_bytes;
  // Room for quarantine, red zones and host-mapped ranges.
  m.span = (spec.memory_bytes * 4 + (size_t{1} << 30)) / 4096 * 4096;
  m.base = reinterpret_cast<uint64_t>(reserve(m.span, PROT_NONE));
  m.backing = static_cast<std::byte*>(reserve(m.span, PROT_READ | PROT_WRITE));
  m.shadow = static_cast<uint8_t*>(reserve(m.span, PROT_READ | PROT_WRITE));
  m.granules = static_cast<Allocation**>(
      reserve(m.span / Impl::kGranule * sizeof(Allocation*), PROT_READ | PROT_WRITE));
}

Memory::~Memory() {
  Impl& m = *impl_;
  munmap(reinterpret_cast<void*>(m.base), m.span);
  munmap(m.backing, m.span);
  munmap(m.shadow, m.span);
  munmap(m.granules, m.span / Impl::kGranule * sizeof(Allocation*));
}

namespace {

size_t round_up(size_t bytes) {
  return (bytes + 255) / 256 * 256;
}

// Offset of a range of `bytes` (a multiple of the granule), or SIZE_MAX.
size_t take(Memory::Impl& m, size_t bytes) {
  if (m.cursor + bytes <= m.span) {
    size_t at = m.cursor;
    m.cursor += bytes;
    return at;
  }
  for (int attempt = 0; attempt < 2; ++attempt) {
    for (auto it = m.free_ranges.begin(); it != m.free_ranges.end(); ++it) {
      if (it->second < bytes) continue;
      auto [at, size] = *it;
      m.free_ranges.erase(it);
      if (size > bytes) m.free_ranges[at + bytes] = size - bytes;
      return at;
    }
    while (!m.quarantine.empty()) {
      auto [at, size] = m.quarantine.front();
      m.quarantine.pop_front();
      auto next = m.free_ranges.lower_bound(at);
      if (next != m.free_ranges.end() && next->first == at + size) {
        size += next->second;
        next = m.free_ranges.erase(next);
      }
      if (next != m.free_ranges.begin()) {
        auto before = std::prev(next);
        if (before->first + before->second == at) {
          before->second += size;
          continue;
        }
      }
      m.free_ranges[at] = size;
    }
  }
  return SIZE_MAX;
}

Allocation* place(Memory::Impl& m, size_t bytes) {
  size_t padded = round_up(bytes) + kRedZone;
  size_t at = take(m, padded);
  if (at == SIZE_MAX) return nullptr;
  m.records.push_back(std::make_unique<Allocation>());
  Allocation* a = m.records.back().get();
  a->base = m.base + at;
  a->bytes = bytes;
  // The red zone belongs to the record, so that an access there can name the allocation it missed.
  for (size_t g = 0; g < padded / 256; ++g) __atomic_store_n(&m.granules[at / 256 + g], a, __ATOMIC_RELEASE);
  return a;
}

}  // namespace

uint64_t Memory::allocate(size_t bytes) {
  Impl& m = *impl_;
  std::lock_guard lock(m.mutex);
  if (bytes == 0 || bytes > m.limit || m.in_use + round_up(bytes) > m.limit) return 0;
  Allocation* a = place(m, bytes);
  if (!a) return 0;
  m.in_use += round_up(bytes);
  size_t at = a->base - m.base;
  a->data = m.backing + at;
  a->init = m.shadow + at;
  std::memset(a->init, 0, bytes);
  std::memset(a->data, 0xff, std::min(bytes, kPoisonLimit));  // NaN in every float format, -1 as an index
  return a->base;
}

bool Memory::free(uint64_t address, std::vector<Report>* reports) {
  Impl& m = *impl_;
  std::lock_guard lock(m.mutex);
  Allocation* a = m.record(address);
  if (!a || a->base != address || !a->live || a->host) {
    if (reports) {
      Report r{};
      r.kind = ReportKind::invalid_free;
      r.address = address;
      r.message = "expected the start of a live allocation for free but received " + hex(address) +
                  (!a                   ? ", which was never allocated"
                   : a->host            ? ", which is host memory"
                   : a->base != address ? ", which lies inside the allocation at " + hex(a->base)
                                        : ", which was freed before");
      reports->push_back(r);
    }
    return false;
  }
  a->live = false;
  m.in_use -= round_up(a->bytes);
  size_t at = a->base - m.base, pages = (at + 4095) / 4096 * 4096, end = (at + a->bytes) / 4096 * 4096;
  if (end > pages) {
    madvise(m.backing + pages, end - pages, MADV_DONTNEED);
    madvise(m.shadow + pages, end - pages, MADV_DONTNEED);
  }
  m.quarantine.emplace_back(at, round_up(a->bytes) + kRedZone);
  return true;
}

size_t Memory::used() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->in_use;
}
size_t Memory::total() const {
  return impl_->limit;
}

std::byte* Memory::resolve(uint64_t address, size_t bytes) {
  Allocation* a = impl_->record(address);
  if (!a || !a->live) return nullptr;
  uint64_t offset = address - a->base;
  if (offset > a->bytes || bytes > a->bytes - offset) return nullptr;
  return a->data + offset;
}

bool Memory::find(uint64_t address, uint64_t* base, size_t* bytes) const {
  Allocation* a = impl_->record(address);
  if (!a || !a->live || address - a->base >= a->bytes) return false;
  if (base) *base = a->base;
  if (bytes) *bytes = a->bytes;
  return true;
}

void Memory::mark_initialized(uint64_t address, size_t bytes) {
  if (!resolve(address, bytes)) return;
  Allocation* a = impl_->record(address);
  if (a->init) std::memset(a->init + (address - a->base), 1, bytes);
}

int64_t Memory::first_uninitialized(uint64_t address, size_t bytes) const {
  Allocation* a = impl_->record(address);
  if (!a || !a->init || !a->live) return -1;
  uint64_t offset = address - a->base;
  for (size_t i = 0; i < bytes && offset + i < a->bytes; ++i)
    if (!a->init[offset + i]) return static_cast<int64_t>(i);
  return -1;
}

uint64_t Memory::map_host(void* host, size_t bytes) {
  Impl& m = *impl_;
  std::lock_guard lock(m.mutex);
  if (!host || bytes == 0) return 0;
  Allocation* a = place(m, bytes);
  if (!a) return 0;
  a->data = static_cast<std::byte*>(host);
  a->host = true;
  return a->base;
}

bool Memory::unmap_host(uint64_t address) {
  Impl& m = *impl_;
  std::lock_guard lock(m.mutex);
  Allocation* a = m.record(address);
  if (!a || a->base != address || !a->live || !a->host) return false;
  a->live = false;
  m.quarantine.emplace_back(a->base - m.base, round_up(a->bytes) + kRedZone);
  return true;
}

}  // namespace mgm::emulator
