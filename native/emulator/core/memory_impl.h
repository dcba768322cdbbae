// Device memory behind emulator.h's Memory: records by 256-byte granule, shadow bytes, quarantine.
#pragma once
#include <atomic>
#include <deque>
#include <map>
#include <mutex>

#include "../emulator.h"

namespace mgm::emulator {

struct Allocation {
  uint64_t base = 0;
  size_t bytes = 0;
  std::byte* data = nullptr;
  uint8_t* init = nullptr;  // one byte per byte: 1 = written; nullptr: all of it counts as written
  bool host = false;
  std::atomic<bool> live{true};
};

struct Memory::Impl {
  static constexpr size_t kGranule = 256;
  size_t limit = 0, in_use = 0;
  uint64_t base = 0;  // device addresses; a PROT_NONE reservation of this process
  size_t span = 0;
  std::byte* backing = nullptr;  // host storage, parallel to the addresses
  uint8_t* shadow = nullptr;
  Allocation** granules = nullptr;
  size_t cursor = 0;
  std::map<size_t, size_t> free_ranges;              // offset -> bytes; ready for reuse
  std::deque<std::pair<size_t, size_t>> quarantine;  // offset, bytes
  size_t quarantined = 0;
  std::vector<std::unique_ptr<Allocation>> records;
  mutable std::mutex mutex;

  // The record whose granules cover `address`, live or freed; nullptr outside of everything ever allocated.
  Allocation* record(uint64_t address) const {
    uint64_t offset = address - base;
    return offset < span ? __atomic_load_n(&granules[offset / kGranule], __ATOMIC_ACQUIRE) : nullptr;
  }
};

}  // namespace mgm::emulator
