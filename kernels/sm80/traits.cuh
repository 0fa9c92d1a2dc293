// SPDX-License-Identifier: Apache-2.0
//
// Everything about a kernel that is known at compile time: shapes, the shared-memory picture and
// the order in which weight rows lie in a tile.

#ifndef KERNELS_SM80_TRAITS_CUH_
#define KERNELS_SM80_TRAITS_CUH_

#include <cstdint>

#include "kernels/sm80/tiles.h"

namespace moe::sm80 {

// Which weight row (as an output column) lies at row n of a tile's B operand.
//
// mma.m16n8k16 leaves a thread two adjacent columns of every 8-column block. Stored like that, a
// row would be written 4 bytes at a time. Since rows of B may lie in shared memory in any order,
// kGroup consecutive blocks share 8 * kGroup columns so that lane quad q holds kVector =
// 2 * kGroup adjacent ones: up to 16 bytes a store, with no trip through shared memory.
//
// For a gated activation, kGroup blocks of up rows are followed by the kGroup blocks of their
// gate rows: both accumulators of an output value are in the same thread.
template <int kWarpN, bool kGated>
struct ColumnMap {
  static constexpr int kBlocks = kWarpN / 8;
  static constexpr int kHalves = kGated ? 2 : 1;
  static constexpr int kGroup = kBlocks / kHalves < 4 ? kBlocks / kHalves : 4;
  static constexpr int kGroups = kBlocks / (kGroup * kHalves);
  static constexpr int kVector = 2 * kGroup;
  static constexpr int kWarpColumns = kWarpN / kHalves;
  static_assert(kBlocks % (kGroup * kHalves) == 0, "groups must tile the warp's columns");

  // Both are linear in the bits of n: Column(a | b) = Column(a) + Column(b) for disjoint a, b,
  // which lets a thread split the row it loads into its own part and a compile-time part.
  __host__ __device__ static constexpr int Column(int n) {
    const int block = n % kWarpN / 8;
    const int group = block / (kGroup * kHalves);
    const int in_group = block % kGroup;
    return n / kWarpN * kWarpColumns + group * 8 * kGroup + n % 8 / 2 * kVector + in_group * 2 +
           n % 2;
  }
  __host__ __device__ static constexpr bool IsGate(int n) {
    return kGated && n % kWarpN / 8 / kGroup % 2 == 1;
  }
};

template <int kTileIndex, typename Element_, WeightKind kKind_, bool kGated_>
struct Traits {
  using Element = Element_;  // __half or __nv_bfloat16
  static constexpr WeightKind kKind = kKind_;
  static constexpr bool kWidens = kKind != WeightKind::k16Bit;
  static constexpr bool kGated = kGated_;
  static constexpr Tile kTile = kTiles[kTileIndex];

  static constexpr int kThreads = kTile.threads();
  static constexpr int kStages = kTile.stages[static_cast<int>(kKind)];
  static constexpr int kBlocks = kTile.blocks[static_cast<int>(kKind)];
  static constexpr int kWarpM = kTile.m / kTile.warps_m;
  static constexpr int kWarpN = kTile.n / kTile.warps_n;
  static constexpr int kMmaM = kWarpM / 16;  // mma.m16n8k16 steps of a warp
  static constexpr int kMmaN = kWarpN / 8;
  static constexpr int kMmaK = kTile.k / 16;
  using Columns = ColumnMap<kWarpN, kGated>;
  static constexpr int kTileColumns = kTile.n / Columns::kHalves;  // of the output

  // Shared memory: the stages, each A [m][k] in rows of 16-byte chunks, swizzled, and then
  //   16-bit weights: B [n][k] likewise;
  //   others: the weights as they are stored, each chunk where the thread that loads and widens it
  //   finds it. Behind the stages, two buffers of B [n][k] in 16 bits.
  static constexpr int kRowBytes = kTile.k * 2;  // of A and B
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kBytesA = kTile.m * kRowBytes;
  static constexpr int kBytesB = kTile.n * kRowBytes;
  static constexpr int kStageBytes = kTile.stage_bytes(kKind);
  static constexpr int kWideB = kStages * kStageBytes;  // byte offset of the two buffers
  static constexpr int kSharedMemory = kTile.shared_memory(kKind);

  // Loads of a stage: a thread takes one chunk of every kRowStep-th row.
  static constexpr int kStoredChunks = kTile.k * WeightBits(kKind) / 128;  // of a weight row
  static constexpr int kRowStepA = kThreads / kChunks;
  static constexpr int kRowStepB = kThreads / kStoredChunks;
  static constexpr int kLoadsA = kTile.m / kRowStepA;
  static constexpr int kLoadsB = kTile.n / kRowStepB;

  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "warps take whole mma pairs");
  static_assert(kTile.k % 64 == 0, "the swizzle below is for rows of 128 bytes or more");
  static_assert(kTile.m % kRowStepA == 0 && kTile.n % kRowStepB == 0, "loads divide evenly");
  static_assert(kRowStepA % 8 == 0 && kRowStepB % 8 == 0,
                "a thread's rows differ in no bit that the swizzle uses");
  static_assert(kStages >= 3, "a step is widened and another loaded while one is multiplied");
  static_assert(kSharedMemory <= 163 * 1024, "A100 gives a block 163 KiB");
};

// The chunk of a row at which chunk c lies is c ^ Swizzle(row): ldmatrix reads 8 rows at one
// chunk, which must fall into 8 different groups of 4 banks.
__device__ constexpr int Swizzle(int row) { return row % 8; }

// The 16-row blocks of a tile go round among the warps along m, so that those of a partly filled
// tile keep all of them busy: the rows of a warp's block m begin at this multiple of 16 rows, its
// first block's at warp.m * 16.
template <typename T>
inline constexpr int kRowBlockStep = T::kTile.warps_m * 16;

// How many 16-row blocks of a warp hold any of a tile's rows.
template <typename T>
__device__ inline int ActiveRowBlocks(int rows, int warp_m) {
  return T::kMmaM == 1 && T::kTile.warps_m == 1
             ? 1
             : max(0, (rows - warp_m * 16 + kRowBlockStep<T> - 1) / kRowBlockStep<T>);
}

// The warp's place in the tile. The shuffle tells the compiler that all lanes agree on it.
struct WarpPlace {
  int m;
  int n;
};
template <typename T>
__device__ inline WarpPlace GetWarpPlace() {
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  return {warp / T::kTile.warps_n, warp % T::kTile.warps_n};
}

}  // namespace moe::sm80

#endif  // KERNELS_SM80_TRAITS_CUH_
