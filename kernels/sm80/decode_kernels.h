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
// Chunks of a batch, which it loads ahead.
constexpr int DecodeBatch(WeightKind kind, int token_blocks) {
  return kind == WeightKind::k16Bit  ? 4 - token_blocks
         : kind == WeightKind::k8Bit ? 2
                                     : 3 - token_blocks;
}

// Warps that share a unit of work (decode_gemm.cuh) of so many chunks, as the power of two that they
// are: as many as leave each at most `most` chunks; more where units are few. `workers` are the
// warps of all blocks. (What a loop would look for is counted: the kernel would wait for each turn.)
constexpr int DecodeSlicesLog2(int most, int chunks, int units, int workers) {
  int by_chunks = 0, by_units = 0;
  for (int log2 = 0; log2 < 4; ++log2) {
    by_chunks += most << log2 < chunks ? 1 : 0;
    by_units += 2 << log2 <= chunks && 2 * units < workers >> log2 ? 1 : 0;
  }
  const int log2 = by_chunks > by_units ? by_chunks : by_units;
  // Where few groups would have a second unit, all get one.
  const int groups = workers >> log2;
  return log2 > 0 && units > groups && 2 * units <= 3 * groups ? log2 - 1 : log2;
}

// The units of a GEMM, and how warps take them.
struct DecodeSplit {
  int chunks;  // of a unit
  int units;
  int slices_log2;
  // Whether a counter hands units out to groups as they come for them. Multiprocessors with the
  // same work end 5 to 10% apart, which we put down to the ports of the crossbar that they share.
  bool hands_out;
};
// Whether units may be handed out: the loads of one that takes few batches are too far ahead.
constexpr bool IsLongUnit(const DecodeSplit& split, int batch) {
  return split.chunks > (batch + 1) << split.slices_log2;
}

// The slices of GEMM 1, which is to read in long runs. (Qwen3-30B, 8 tokens, 16-bit weights: 4, 8 and
// 16 chunks a warp took 139, 124 and 134 us.) What departs from DecodeSlicesLog2 comes from timing all
// numbers of slices, six models and 1 to 8 tokens (docs/measurements.md).
constexpr int Gemm1SlicesLog2(WeightKind kind, int chunks, int units, int workers) {
  const int log2 = DecodeSlicesLog2(15, chunks, units, workers);
  // Two warps may take up to 32 chunks where groups have enough units all the same: INT4, Mixtral, 1
  // token 63.9 us instead of 71.6; INT8, Qwen3-Next, 8 tokens 68.1 instead of 69.1.
  const int half_turns = HasGroups(kind) ? 3 : 4;
  if (WeightBits(kind) < 16 && log2 == 2 && chunks <= 32 &&
      2 * units > half_turns * (workers / 2)) {
    return 1;
  }
  // One long turn of all units takes less than three short ones, of which the last is not full: 16-bit
  // weights, Qwen3-Next, 2 tokens 40.4 us instead of 43.0.
  const int groups = workers >> log2;
  if (units > 2 * groups && units <= 3 * groups) {
    int fewer = 0;
    for (int i = 1; i < 4; ++i) fewer += units <= workers >> i ? 1 : 0;
    if (units <= workers && chunks <= 32 << fewer) return fewer;
  }
  return log2;
}

constexpr DecodeSplit SplitGemm1(WeightKind kind, int token_blocks, int chunks, int units,
                                 int workers) {
  DecodeSplit split{chunks, units, Gemm1SlicesLog2(kind, chunks, units, workers), false};
  split.hands_out = units > 2 * (workers >> split.slices_log2) &&
                    IsLongUnit(split, DecodeBatch(kind, token_blocks));
  return split;
}

// Whether GEMM 2 follows GEMM 1 pass by pass, without a barrier of the grid: a group that finds no
// more units of GEMM 1 goes on to those of GEMM 2, alone or in parts.
constexpr bool Follows(const DecodeSplit& gemm1, const DecodeSplit& gemm2) {
  return gemm1.hands_out && gemm2.slices_log2 <= gemm1.slices_log2;
}

// GEMM 2, whose units are the last ones: where there are many, they are to be short.
constexpr DecodeSplit SplitGemm2(WeightKind kind, int token_blocks, const DecodeSplit& gemm1,
                                 int chunks, int units, int workers) {
  DecodeSplit split{chunks, units, DecodeSlicesLog2(15, chunks, units, workers), false};
  int more = DecodeSlicesLog2(7, chunks, units, workers);
  if (Follows(gemm1, split) && more > gemm1.slices_log2) more = gemm1.slices_log2;
  const bool many = Follows(gemm1, split) || units > 2 * (workers >> more);
  if (more > split.slices_log2 && many) split.slices_log2 = more;
  split.hands_out = (units > 2 * (workers >> split.slices_log2) || Follows(gemm1, split)) &&
                    IsLongUnit(split, DecodeBatch(kind, token_blocks));
  return split;
}

// What a layer counts in global memory: units that are handed out of GEMM 1 and of GEMM 2, blocks that
// have ended theirs, units of GEMM 1 that have been stored, of each pass.
inline constexpr int kDecodeHandedOut = 0;
inline constexpr int kDecodeEndedBlocks = 2;
inline constexpr int kDecodeEndedUnits = 3;
constexpr int DecodeCounters(int slots) { return kDecodeEndedUnits + slots; }

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
  int slices_log2;    // of its group
  int unit;           // that is multiplied
  int load_unit;      // that is loaded
  int next_unit;      // that is loaded next
  int asks_k;         // where in a unit the group's first warp asks for one more; -1: nowhere
  int buffer;         // for the unit's sums: 0 and 1 in turn
  int handed_out[2];  // of a group's first warp: the unit after the next one
  int awaited;        // units of GEMM 1 that GEMM 2 waits for, of each pass; 0: all, at a barrier
};

// Of a block, in bytes: the sums; the lists of decode_route.cuh, of passes (one a slot at most, an
// end mark and a spare entry), of slots and of two bits a slot; the number of passes; the plans. The
// table of experts, which only routing uses, lies where the sums come later.
constexpr int DecodeSharedMemory(int token_blocks) {
  return DecodeSumBytes(token_blocks) + (kDecodeMaxSlots + 2) * 4 + kDecodeMaxSlots * 2 +
         kDecodeMaxSlots / 4 + 4 + kDecodeWarps * static_cast<int>(sizeof(DecodePlan));
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
