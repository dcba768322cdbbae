#include "inflate.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "../runtime/error.h"

namespace mgm::cuda {
namespace {

[[noreturn]] void corrupt(const char* what) {
  throw Error("INTERNAL", format("expected deflated data but found %s", what));
}

// The stream as bits, those of a byte from the lowest on; zeros after its end.
class Bits {
 public:
  explicit Bits(std::span<const unsigned char> bytes) : bytes_(bytes) {}

  // The next `count` <= 32 bits, the first in the lowest.
  uint32_t peek(int count) {
    for (; held_ < count; held_ += 8)
      bits_ |= (next_ < bytes_.size() ? uint64_t{bytes_[next_]} : 0) << held_, ++next_;
    return static_cast<uint32_t>(bits_ & ((uint64_t{1} << count) - 1));
  }
  void skip(int count) {
    bits_ >>= count;
    held_ -= count;
    // Whole bytes may be held that are not used yet.
    if (next_ - static_cast<size_t>(held_ / 8) > bytes_.size()) corrupt("its end");
  }
  uint32_t take(int count) {
    const uint32_t value = peek(count);
    skip(count);
    return value;
  }
  void skip_to_byte() { skip(held_ % 8); }

 private:
  std::span<const unsigned char> bytes_;
  size_t next_ = 0;
  uint64_t bits_ = 0;
  int held_ = 0;
};

// A canonical Huffman code as a table over the bits of its longest word.
class Code {
 public:
  explicit Code(std::span<const uint8_t> lengths) {
    std::array<uint32_t, kMost + 2> first{};  // word of each length
    for (uint8_t length : lengths)
      if (length > 0) ++first[length + 1];
    for (int length = 1; length <= kMost; ++length) {
      const uint32_t count = first[length + 1];
      if (first[length] + count > 1u << length) corrupt("a code with too many words");
      if (count > 0) longest_ = length;
      first[length + 1] = (first[length] + count) * 2;
    }
    table_.resize(size_t{1} << longest_);
    for (size_t symbol = 0; symbol < lengths.size(); ++symbol) {
      const int length = lengths[symbol];
      if (length == 0) continue;
      // Words come with their first bit lowest.
      const uint32_t word = first[length]++;
      uint32_t reversed = 0;
      for (int bit = 0; bit < length; ++bit) reversed |= (word >> bit & 1) << (length - 1 - bit);
      for (size_t at = reversed; at < table_.size(); at += size_t{1} << length)
        table_[at] = {static_cast<uint16_t>(symbol), static_cast<uint16_t>(length)};
    }
  }
  int read(Bits& bits) const {
    const Word word = table_[bits.peek(longest_)];
    if (word.length == 0) corrupt("a word of no code");
    bits.skip(word.length);
    return word.symbol;
  }

 private:
  static constexpr int kMost = 15;
  struct Word {
    uint16_t symbol, length;
  };
  int longest_ = 0;
  std::vector<Word> table_;
};

struct Codes {
  Code literals, distances;
};

Codes fixed_codes() {
  std::array<uint8_t, 288> literals;
  std::fill_n(literals.begin(), 144, 8);
  std::fill(literals.begin() + 144, literals.begin() + 256, 9);
  std::fill(literals.begin() + 256, literals.begin() + 280, 7);
  std::fill(literals.begin() + 280, literals.end(), 8);
  std::array<uint8_t, 30> distances;
  distances.fill(5);
  return {Code(literals), Code(distances)};
}

Codes read_codes(Bits& bits) {
  const size_t literals = bits.take(5) + 257, distances = bits.take(5) + 1, count = bits.take(4) + 4;
  static constexpr uint8_t kOrder[] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
  std::array<uint8_t, 19> of_lengths{};
  for (size_t i = 0; i < count; ++i) of_lengths[kOrder[i]] = static_cast<uint8_t>(bits.take(3));
  const Code code(of_lengths);
  std::vector<uint8_t> lengths;
  while (lengths.size() < literals + distances) {
    const int symbol = code.read(bits);
    if (symbol < 16) {
      lengths.push_back(static_cast<uint8_t>(symbol));
      continue;
    }
    if (symbol == 16 && lengths.empty()) corrupt("a repetition of nothing");
    const uint8_t repeated = symbol == 16 ? lengths.back() : 0;
    const uint32_t times = symbol == 16   ? 3 + bits.take(2)
                           : symbol == 17 ? 3 + bits.take(3)
                                          : 11 + bits.take(7);
    lengths.insert(lengths.end(), times, repeated);
  }
  if (lengths.size() > literals + distances) corrupt("too many lengths");
  const std::span<const uint8_t> all(lengths);
  return {Code(all.first(literals)), Code(all.subspan(literals))};
}

}  // namespace

void inflate(std::span<const unsigned char> from, std::span<unsigned char> to) {
  static constexpr uint16_t kLengths[] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                          31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
  static constexpr uint8_t kLengthBits[] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                            2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
  static constexpr uint16_t kDistances[] = {1,    2,    3,    4,    5,    7,    9,    13,    17,    25,
                                            33,   49,   65,   97,   129,  193,  257,  385,   513,   769,
                                            1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
  Bits bits(from);
  size_t at = 0;
  const auto room = [&](size_t count) {
    if (count > to.size() - at) corrupt("more than its size");
  };
  for (bool last = false; !last;) {
    last = bits.take(1) == 1;
    const uint32_t type = bits.take(2);
    if (type == 0) {
      bits.skip_to_byte();
      const uint32_t count = bits.take(16);
      if (bits.take(16) != (count ^ 0xffff)) corrupt("a length that is not its own check");
      room(count);
      for (uint32_t i = 0; i < count; ++i) to[at++] = static_cast<unsigned char>(bits.take(8));
      continue;
    }
    if (type == 3) corrupt("a block of no type");
    const Codes codes = type == 1 ? fixed_codes() : read_codes(bits);
    for (;;) {
      const int symbol = codes.literals.read(bits);
      if (symbol == 256) break;
      if (symbol < 256) {
        room(1);
        to[at++] = static_cast<unsigned char>(symbol);
        continue;
      }
      const auto length_code = static_cast<size_t>(symbol - 257);
      if (length_code >= std::size(kLengths)) corrupt("a length of no code");
      const size_t length = kLengths[length_code] + bits.take(kLengthBits[length_code]);
      const auto distance_code = static_cast<size_t>(codes.distances.read(bits));
      if (distance_code >= std::size(kDistances)) corrupt("a distance of no code");
      const int more = distance_code < 2 ? 0 : static_cast<int>(distance_code) / 2 - 1;
      const size_t distance = kDistances[distance_code] + bits.take(more);
      if (distance > at) corrupt("a distance to before its start");
      room(length);
      // Forward, a byte at a time: a match may repeat what it writes.
      for (size_t i = 0; i < length; ++i, ++at) to[at] = to[at - distance];
    }
  }
  if (at != to.size()) corrupt("less than its size");
}

}  // namespace mgm::cuda
