// SPDX-License-Identifier: Apache-2.0
//
// The tiles of the sm80 backend: one table that the kernels are instantiated from, the launcher
// looks up and the tactic choice reasons about. A tactic is an index into it.

#ifndef KERNELS_SM80_TILES_H_
#define KERNELS_SM80_TILES_H_

namespace moe::sm80 {

struct Tile {
  const char* name;
  int m, n, k;           // rows, weight rows and reduction length of a tile
  int warps_m, warps_n;  // how the warps of a block divide it
  int stages;            // of the cp.async pipeline, 16-bit weights
  int stages_int8;       // the same for 8-bit weights, whose stages are smaller
  int blocks;            // a multiprocessor is meant to hold; shared memory may allow fewer

  constexpr int threads() const { return 32 * warps_m * warps_n; }
  constexpr int stage_bytes(bool quantized) const {
    return m * k * 2 + n * k * (quantized ? 1 : 2);
  }
  constexpr int shared_memory(bool quantized) const {
    return stage_bytes(quantized) * (quantized ? stages_int8 : stages);
  }
};

// Few rows an expert: bytes in flight decide, so narrow tiles, deep pipelines and two or more
// blocks a multiprocessor. Many rows: a warp tile of 64x64 needs half the shared-memory
// bandwidth of the 64x32 one, and 128x256 reads each operand least often; 256x128 does where an
// expert has one to two hundred rows, which it takes in one tile.
// What each must fit: 163 KiB a block on A100, 99 KiB on sm_86 and sm_89.
inline constexpr Tile kTiles[] = {
    // name          m    n    k  warps  stages  blocks
    {"16x64x128", 16, 64, 128, 1, 4, 4, 4, 3},    //
    {"16x128x64", 16, 128, 64, 1, 4, 4, 4, 3},    //
    {"32x128x64", 32, 128, 64, 1, 4, 4, 4, 3},    //
    {"64x128x64", 64, 128, 64, 1, 4, 3, 4, 2},    //
    {"64x256x64", 64, 256, 64, 1, 4, 3, 4, 1},    //
    {"128x128x64", 128, 128, 64, 2, 2, 3, 4, 2},  //
    {"128x256x64", 128, 256, 64, 2, 4, 3, 4, 1},  //
    {"256x128x64", 256, 128, 64, 4, 2, 3, 4, 1},  //
};
inline constexpr int kNumTiles = sizeof(kTiles) / sizeof(kTiles[0]);

}  // namespace moe::sm80

#endif  // KERNELS_SM80_TILES_H_
