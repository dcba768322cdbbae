// Inflates what stdin holds, for test/cuda/inflate.test.ts: records of two little-endian u32, the bytes of
// the stream and of its contents, then the stream. Answers each with a byte, 1 and the contents or 0.
#include "../inflate.h"

#include <cstdint>
#include <cstdio>
#include <vector>

#include "../../runtime/error.h"

int main() {
  uint32_t sizes[2];
  while (std::fread(sizes, sizeof sizes, 1, stdin) == 1) {
    // Exactly as large as they should be, so that a sanitizer sees the first byte too many.
    std::vector<unsigned char> from(sizes[0]), to(sizes[1]);
    if (std::fread(from.data(), 1, from.size(), stdin) != from.size()) return 1;
    try {
      mgm::cuda::inflate(from, to);
      std::putchar(1);
      if (!to.empty()) std::fwrite(to.data(), 1, to.size(), stdout);
    } catch (const mgm::Error&) {
      std::putchar(0);
    }
  }
  return 0;
}
