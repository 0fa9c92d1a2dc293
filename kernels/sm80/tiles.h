// SPDX-License-Identifier: Apache-2.0
//
// The tiles of the sm80 backend: one table that the kernels are instantiated from, the launcher
// looks up and the tactic choice reasons about. A tactic is an index into it.

#ifndef KERNELS_SM80_TILES_H_
#define KERNELS_SM80_TILES_H_

#include "kernels/common/weight_kind.h"

namespace moe::sm80 {

struct Tile {
  const char* name;
  int m, n, k;                  // rows, weight rows and reduction length of a tile
  int warps_m, warps_n;         // how the warps of a block divide it
  int stages[kNumWeightKinds];  // of the cp.async pipeline
  int blocks[kNumWeightKinds];  // a multiprocessor is meant to hold; memory may allow fewer

  constexpr int threads() const { return 32 * warps_m * warps_n; }
  // A stage holds rows of the input and of the weights as they are stored.
  constexpr int stage_bytes(WeightKind kind) const {
    return m * k * 2 + n * k * WeightBits(kind) / 8;
  }
  // Where weights are not stored in 16 bits, those of two steps lie there in 16 bits too.
  constexpr int wide_bytes(WeightKind kind) const {
    return kind == WeightKind::k16Bit ? 0 : 2 * n * k * 2;
  }
  constexpr int shared_memory(WeightKind kind) const {
    return stages[static_cast<int>(kind)] * stage_bytes(kind) + wide_bytes(kind);
  }
};

// Few rows an expert: bytes in flight decide, so narrow tiles, deep pipelines and two or more
// blocks a multiprocessor. Many rows: a warp tile of 64x64 needs half the shared-memory
// bandwidth of the 64x32 one, and 128x256 reads each operand least often; 256x128 does where an
// expert has one to two hundred rows, which it takes in one tile, and widens each weight for the
// most rows.
// What each must fit: 163 KiB a block on A100, 99 KiB on sm_86 and sm_89.
inline constexpr Tile kTiles[] = {
    // name          m    n    k  warps  stages: 16, 8, 4, 4  blocks
    {"16x64x128", 16, 64, 128, 1, 4, {4, 4, 4, 4}, {3, 2, 2, 2}},    //
    {"16x128x64", 16, 128, 64, 1, 4, {4, 4, 5, 5}, {3, 3, 3, 3}},    //
    {"32x128x64", 32, 128, 64, 1, 4, {4, 4, 5, 5}, {3, 2, 2, 2}},    //
    {"64x128x64", 64, 128, 64, 1, 4, {3, 4, 4, 4}, {2, 2, 2, 2}},    //
    {"128x128x64", 128, 128, 64, 2, 2, {3, 3, 3, 3}, {2, 2, 2, 2}},  //
    {"128x256x64", 128, 256, 64, 2, 4, {3, 3, 3, 3}, {1, 1, 1, 1}},  //
    {"256x128x64", 256, 128, 64, 4, 2, {3, 3, 3, 3}, {1, 1, 1, 1}},  //
};
inline constexpr int kNumTiles = sizeof(kTiles) / sizeof(kTiles[0]);

}  // namespace moe::sm80

#endif  // KERNELS_SM80_TILES_H_
