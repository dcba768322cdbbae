// Launchers' side of gemm.h.
#pragma once
#include "../launch.h"
#include "gemm.h"

namespace mgm::cuda {

// The one place where tiles are chosen, from the result's size alone: m rows, n rows of W. Large tiles reuse
// each byte more often, small ones keep more multiprocessors busy and waste less on few columns; the results
// are the same. MGM_CUDA_TILE ("large", "small", "thin", "few") decides for tests and measurements; few is
// taken where m allows it.
TileName tile_for(int64_t m, int64_t n, int multiprocessors, bool few_possible);

WeightType weight_type_of(const View& w);

// The arguments as the ops have them; `outputs` columns of results.
Epilogue epilogue_of(const View& w, const View& bias, const View& scale, const View& residual,
                     Activation activation, const View& out);

// True if every row of x, its length included, is whole 16-byte pieces.
bool rows_aligned(const View& x);
// x, or a copy of it, kept in `copy`, whose rows are; zeros past their length.
View aligned_rows(Queue& queue, const View& x, std::shared_ptr<Storage>& copy);

// embedding of a packed table.
void packed_rows(Queue& queue, const EmbeddingArgs& args);

}  // namespace mgm::cuda
