#pragma once
#include <cstddef>
#include <span>

namespace mgm::cuda {

// Decodes a DEFLATE stream (RFC 1951, no zlib or gzip header) that fills `to` exactly. Throws
// Error("INTERNAL") for anything else; never reads or writes out of bounds.
void inflate(std::span<const unsigned char> from, std::span<unsigned char> to);

}  // namespace mgm::cuda
