// SPDX-License-Identifier: Apache-2.0
//
// The tiles of the sm80 backend: one table that the kernels are instantiated from, the launcher
// looks up and the tactic choice reasons about. A tactic is an index into it.

#ifndef KERNELS_SM80_TILES_H_
#define KERNELS_SM80_TILES_H_

#include "kernels/common/weight_kind.h"

namespace moe::sm80 {

inline constexpr int kQueueItems = 32;  // tiles in a block's queue (scheduler.cuh)

struct Tile {
  int m, n;                            // rows and weight rows of a tile
  int warps;                           // of a block
  int warps_along_m[kNumWeightKinds];  // how they divide it; see slices()
  int k[kNumWeightKinds];              // reduction length of a step
  int stages[kNumWeightKinds];         // of the cp.async pipeline
  int blocks[kNumWeightKinds];         // a multiprocessor is meant to hold; memory may allow fewer

  constexpr int threads() const { return 32 * warps; }
  constexpr int warps_m(WeightKind kind) const { return warps_along_m[static_cast<int>(kind)]; }
  constexpr int warps_n(WeightKind kind) const { return warps / warps_m(kind); }
  constexpr bool high() const { return m >= 128; }
  // Weights that are not stored in 16 bits become it in registers, where no two warps share any,
  // else in shared memory, once for all of them.
  constexpr bool unpacks(WeightKind kind) const {
    return kind != WeightKind::k16Bit && warps_m(kind) == 1;
  }
  constexpr bool widens(WeightKind kind) const {
    return kind != WeightKind::k16Bit && !unpacks(kind);
  }
  // A warp takes 32 weight rows or more where it unpacks them. Where there are fewer for it, two
  // warps share them and divide each step's k, and one adds the other's sums to its own.
  constexpr int slices(WeightKind kind) const {
    return unpacks(kind) && n / warps_n(kind) < 32 ? 32 * warps_n(kind) / n : 1;
  }
  // Whether unpacked weights may be scaled in sums over a step (traits.cuh). High tiles have no
  // registers for a second set of those.
  constexpr bool scales_sums(WeightKind kind) const {
    return kind == WeightKind::kInt4 && unpacks(kind) && !high();
  }
  constexpr int slice_bytes(WeightKind kind) const { return (slices(kind) - 1) * m * n * 4; }
  // A stage holds rows of the input, of the weights as they are stored, and for each of them the
  // scales of its groups where they are applied in registers.
  constexpr int scale_bytes(WeightKind kind) const {
    return unpacks(kind) && HasGroups(kind) ? n * step(kind) / 32 * 4 : 0;
  }
  constexpr int stage_bytes(WeightKind kind) const {
    return m * step(kind) * 2 + n * step(kind) * WeightBits(kind) / 8 + scale_bytes(kind);
  }
  // Of weights that are widened in shared memory, those of two steps lie there in 16 bits, too.
  constexpr int wide_bytes(WeightKind kind) const {
    return widens(kind) ? 2 * n * step(kind) * 2 : 0;
  }
  // Whether the kernel has no register to spare.
  constexpr bool lean(WeightKind kind) const { return high() && unpacks(kind); }
  // The queue of tiles: items of 16 bytes, and words of the rows of some of them. Low tiles have no
  // words: their time goes into weights, and memory for another block is worth more.
  constexpr bool has_words() const { return high(); }
  // With 8 bits weight rows have a scale each. In the same tiles they are brought to shared memory, as
  // they are stored, before the epilogue wants them: loaded there, they cost 0.6 to 1.2 us a tile.
  // They and words that last as long as any can be wanted would pass 163 KiB, so there words last
  // for three turns (scheduler.cuh).
  constexpr bool has_channels(WeightKind kind) const {
    return has_words() && kind == WeightKind::k8Bit;
  }
  constexpr int channel_bytes(WeightKind kind) const { return has_channels(kind) ? n * 4 : 0; }
  constexpr int word_turns(WeightKind kind) const {
    return has_channels(kind) ? 3 : stages[static_cast<int>(kind)] + 2;
  }
  constexpr int queue_bytes(WeightKind kind) const {
    return kQueueItems * 16 + (has_words() ? word_turns(kind) * m * 4 : 0);
  }
  constexpr int shared_memory(WeightKind kind) const {
    return stages[static_cast<int>(kind)] * stage_bytes(kind) + wide_bytes(kind) +
           slice_bytes(kind) + channel_bytes(kind) + queue_bytes(kind);
  }
  constexpr int step(WeightKind kind) const { return k[static_cast<int>(kind)]; }
};

// Few rows an expert: bytes in flight decide, so narrow tiles, deep pipelines and two or more
// blocks a multiprocessor. Many rows: a warp tile of 64x64 needs half the shared-memory
// bandwidth of the 64x32 one, and 128x256 reads each operand least often; 256x128 does where an
// expert has one to two hundred rows, which it takes in one tile, and widens each weight for the
// most rows. A warp that unpacks its weights has 128x32 instead: it reads as much of shared memory
// as 64x64 of 16 bits, and unpacks half as many weights.
// Each fits the 163 KiB that an A100 gives a block; those that pass 99 KiB are out of the choice on
// sm_86 and sm_89.
// clang-format off
inline constexpr Tile kTiles[] = {
    //  m    n  warps, along m   k: 16, 8, 4, 4 bits   stages        blocks
    { 16,  64,  4, {1, 1, 1, 1}, {128, 128, 128, 128}, {4, 4, 4, 4}, {3, 3, 4, 4}},
    { 16, 128,  4, {1, 1, 1, 1}, { 64, 128, 128, 128}, {4, 3, 3, 3}, {3, 3, 4, 4}},
    { 32,  64,  4, {1, 1, 1, 1}, {128, 128, 128, 128}, {3, 3, 3, 3}, {3, 3, 4, 4}},
    { 32, 128,  4, {1, 1, 1, 1}, { 64,  64, 128, 128}, {4, 4, 3, 3}, {3, 4, 4, 4}},
    { 64, 128,  4, {1, 1, 1, 1}, { 64,  64, 128, 128}, {3, 3, 3, 3}, {2, 2, 2, 2}},
    {128, 128,  4, {2, 1, 1, 1}, { 64,  64,  64,  64}, {3, 3, 3, 3}, {2, 2, 2, 2}},
    {128, 256,  8, {2, 1, 1, 1}, { 64,  64,  64,  64}, {3, 3, 3, 3}, {1, 1, 1, 1}},
    {256, 128,  8, {4, 4, 4, 4}, { 64,  64,  64,  64}, {3, 3, 3, 3}, {1, 1, 1, 1}},
};
// clang-format on
inline constexpr int kNumTiles = sizeof(kTiles) / sizeof(kTiles[0]);

}  // namespace moe::sm80

#endif  // KERNELS_SM80_TILES_H_
