// SPDX-License-Identifier: Apache-2.0
//
// The kernels for whole layers, as numbers.

#ifndef KERNELS_SM80_DECODE_KERNELS_H_
#define KERNELS_SM80_DECODE_KERNELS_H_

#include "kernels/common/weight_kind.h"
#include "moe/problem.h"

namespace moe::sm80 {

inline constexpr int kDecodeThreads = 512;
inline constexpr int kDecodeWarps = kDecodeThreads / 32;
inline constexpr int kDecodeMaxSlots = 2048;

// Tokens that a pass over an expert's weights serves, in blocks of 8: an expert with more is
// passed over again. One kernel each.
inline constexpr int kDecodeTokenBlocks[] = {1, 2};
inline constexpr int kNumDecodeKernels = sizeof(kDecodeTokenBlocks) / sizeof(kDecodeTokenBlocks[0]);

// What a warp multiplies at a time: so many weight rows, and of each 64 bytes, so many of k.
inline constexpr int kDecodeRows = 32;
constexpr int DecodeChunk(WeightKind kind) { return 512 / WeightBits(kind); }

// Warps that share a unit of work (decode_gemm.cuh) of so many chunks, a power of two: as many as
// leave each 8 chunks or more; more where units are few. `workers` are the warps of all blocks.
// (Qwen3-30B, 8 tokens, 16-bit weights: 4, 8 and 16 chunks a warp take 139, 124 and 134 us.)
constexpr int DecodeSlices(int chunks, int units, int workers) {
  int slices = 1;
  while (slices < 16 && 16 * slices <= chunks) slices *= 2;
  while (slices < 16 && 2 * slices <= chunks && 2 * units < workers / slices) slices *= 2;
  // Where few groups would have a second unit, all get one.
  const int groups = workers / slices;
  return slices > 1 && units > groups && 2 * units <= 3 * groups ? slices / 2 : slices;
}

// The sums of a warp: [2 blocks of 16 rows][tokens][16 rows and 4 to spread them over the banks]
// of float32; of a block's warps, twice.
inline constexpr int kDecodePitch = 20;
constexpr int DecodeWarpSums(int token_blocks) { return 2 * 8 * token_blocks * kDecodePitch; }
constexpr int DecodeSumBytes(int token_blocks) {
  return 2 * kDecodeWarps * DecodeWarpSums(token_blocks) * 4;
}

// What a warp needs once a unit (a unit of work: see decode_gemm.cuh), in shared memory: registers
// are for what it needs once a chunk.
struct DecodePlan {
  int units;          // of the GEMM
  int stride;         // from a unit of the warp's group to its next one; 0: they are handed out
  int slice;          // the warp's, of its group
  int unit;           // that is multiplied
  int load_unit;      // that is loaded
  int next_unit;      // that is loaded next
  int buffer;         // for the unit's sums: 0 and 1 in turn
  int handed_out[2];  // of a group's first warp: the unit after the next one
};

// Of a block, in bytes: the sums; the lists of decode_route.cuh, of passes (one a slot at most, an
// end mark and a spare entry), of slots and of a bit a slot; the number of passes; the plans. The
// table of experts, which only routing uses, lies where the sums come later.
constexpr int DecodeSharedMemory(int token_blocks) {
  return DecodeSumBytes(token_blocks) + (kDecodeMaxSlots + 2) * 4 + kDecodeMaxSlots * 2 +
         kDecodeMaxSlots / 8 + 4 + kDecodeWarps * static_cast<int>(sizeof(DecodePlan));
}
// More than the kernels have that is not dynamic.
inline constexpr int kDecodeStaticSharedMemory = 1024;
static_assert(kMaxLocalExperts * 4 <= DecodeSumBytes(1), "the experts' table is within the sums");
static_assert(DecodeSharedMemory(kDecodeTokenBlocks[kNumDecodeKernels - 1]) +
                      kDecodeStaticSharedMemory <=
                  99 * 1024,
              "sm_86, sm_89 and sm_120 give a block 99 KiB");

}  // namespace moe::sm80

#endif  // KERNELS_SM80_DECODE_KERNELS_H_
