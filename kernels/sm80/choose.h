// SPDX-License-Identifier: Apache-2.0
//
// The tactic choice of the sm80 backend: plain functions of sizes and chip.

#ifndef KERNELS_SM80_CHOOSE_H_
#define KERNELS_SM80_CHOOSE_H_

#include "moe/problem.h"

namespace moe::sm80 {

// Blocks of a tile that a multiprocessor holds at once; 0 where the tile does not fit the chip.
int ResidentBlocks(int tile, bool quantized, const Device& device);

// Index of the tile for a GEMM with `columns` output columns (I or H) and reduction length `k`.
int ChooseTile(const Problem& problem, bool gated, int columns, int k, const Device& device);

}  // namespace moe::sm80

#endif  // KERNELS_SM80_CHOOSE_H_
