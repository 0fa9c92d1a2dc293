// SPDX-License-Identifier: Apache-2.0
//
// The tactic choice of the sm80 backend: plain functions of sizes and chip.

#ifndef KERNELS_SM80_CHOOSE_H_
#define KERNELS_SM80_CHOOSE_H_

#include "kernels/common/weight_kind.h"
#include "moe/problem.h"

namespace moe::sm80 {

// Blocks of a tile that a multiprocessor holds at once; 0 where the tile does not fit the chip.
int ResidentBlocks(int tile, WeightKind kind, const Device& device);

// Whether a kernel for whole layers, an index into kDecodeTokenBlocks, can run the problem.
bool DecodeFits(int kernel, const Problem& problem, const Device& device);

struct Choice {
  int tiles[2];  // of GEMM 1 and GEMM 2
  int decode;    // the kernel for the whole layer where that is the better choice, else -1
};
Choice Choose(const Problem& problem, const Device& device);

}  // namespace moe::sm80

#endif  // KERNELS_SM80_CHOOSE_H_
