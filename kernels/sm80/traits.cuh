// SPDX-License-Identifier: Apache-2.0
//
// Everything about a kernel that is known at compile time: shapes, the shared-memory picture and
// the order in which weight rows lie in a tile.

#ifndef KERNELS_SM80_TRAITS_CUH_
#define KERNELS_SM80_TRAITS_CUH_

#include <cstdint>
#include <type_traits>

#include "kernels/sm80/tiles.h"
#include "moe/problem.h"
#include "moe/row_tile.h"

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

// The same where weights take the 16-row side of the mma, as in unpacking_mainloop.cuh: lane 4g + q
// then has rows g of each 8-row block of its warp's weights, which become adjacent columns. For a
// gated activation the second half of the blocks are gate rows.
template <int kWarpN, bool kGated>
struct RowMap {
  static constexpr int kHalves = kGated ? 2 : 1;
  static constexpr int kGroups = 1;
  static constexpr int kVector = kWarpN / 8 / kHalves;
  static constexpr int kWarpColumns = kWarpN / kHalves;

  __host__ __device__ static constexpr int Column(int n) {
    return n / kWarpN * kWarpColumns + n % 8 * kVector + n % kWarpN / 8 % kVector;
  }
  __host__ __device__ static constexpr bool IsGate(int n) { return n % kWarpN / 8 >= kVector; }
};

// Where groups are no shorter than a step, a weight row's sum over the step is scaled, once,
// instead of its weights: kScaleSums.
template <int kTileIndex, typename Element_, WeightKind kKind_, bool kGated_, bool kScaleSums_>
struct Traits {
  using Element = Element_;  // __half or __nv_bfloat16
  static constexpr WeightKind kKind = kKind_;
  static constexpr bool kGated = kGated_;
  static constexpr bool kScaleSums = kScaleSums_;
  static constexpr Tile kTile = kTiles[kTileIndex];
  static constexpr int kStep = kTile.step(kKind);         // of the reduction
  static constexpr bool kUnpacks = kTile.unpacks(kKind);  // weights, in registers
  static constexpr bool kWidens = kTile.widens(kKind);    // in shared memory

  static constexpr int kThreads = kTile.threads();
  static constexpr int kStages = kTile.stages[static_cast<int>(kKind)];
  static constexpr bool kHasChannels = kTile.has_channels(kKind);
  static constexpr int kBlocks = kTile.blocks[static_cast<int>(kKind)];
  static constexpr int kWarpsM = kTile.warps_m(kKind);
  static constexpr int kWarpM = kTile.m / kWarpsM;
  static constexpr int kSlices = kTile.slices(kKind);  // of a step's k, each a warp's
  static constexpr int kWarpsN = kTile.warps_n(kKind) / kSlices;
  static constexpr int kWarpN = kTile.n / kWarpsN;
  using Columns = std::conditional_t<kUnpacks, RowMap<kWarpN, kGated>, ColumnMap<kWarpN, kGated>>;
  static constexpr int kTileColumns = kTile.n / Columns::kHalves;  // of the output

  // Shared memory: the stages, each A [m][k] in rows of 16-byte chunks, swizzled, and then
  //   16-bit weights: B [n][k] likewise;
  //   unpacked ones: B [n][k] as it is stored, likewise, and the scales of groups, [n][k / 32];
  //   widened ones: as they are stored, each chunk where the thread that loads and widens it finds
  //   it. Behind the stages, two buffers of B [n][k] in 16 bits.
  static constexpr int kRowBytes = kStep * 2;  // of A, and of B in 16 bits
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kStoredChunks = kStep * WeightBits(kKind) / 128;  // of a weight row
  static constexpr int kBytesA = kTile.m * kRowBytes;
  static constexpr int kBytesB = kTile.n * kRowBytes;  // in 16 bits
  static constexpr int kStageBytes = kTile.stage_bytes(kKind);
  static constexpr int kSharedMemory = kTile.shared_memory(kKind);
  // Byte offsets: of the scales in their stage; of the two buffers, behind the stages; of the sums
  // that slices give each other, behind those; of the scales of a tile's weight rows, [up, gate]
  // [columns]; of the queue of tiles, at the end.
  static constexpr int kScalesPlace = kBytesA + kTile.n * kStoredChunks * 16;
  static constexpr int kWidePlace = kStages * kStageBytes;
  static constexpr int kSliceSumsPlace = kWidePlace + kTile.wide_bytes(kKind);
  static constexpr int kChannelsPlace = kSliceSumsPlace + kTile.slice_bytes(kKind);
  static constexpr int kQueuePlace = kChannelsPlace + kTile.channel_bytes(kKind);
  static_assert(kQueuePlace % 16 == 0, "an item is stored and loaded as 16 bytes");
  static_assert(kQueuePlace + kTile.queue_bytes(kKind) == kSharedMemory);

  // Loads of a stage: a thread takes one chunk of every kRowStep-th row.
  static constexpr int kRowStepA = kThreads / kChunks;
  static constexpr int kRowStepB = kThreads / kStoredChunks;
  static constexpr int kLoadsA = kTile.m / kRowStepA;
  static constexpr int kLoadsB = kTile.n / kRowStepB;

  static_assert(kTile.m <= (int64_t{1} << 31) - kMaxSlots, "a tile's end is counted in 32 bits");
  static_assert(kTile.m >= kMinTileRows, "the workspace has no room for a list of lower tiles");
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "warps take whole mma pairs");
  static_assert(kStep % 64 == 0, "the swizzles below are for rows of 128 bytes or more");
  static_assert(kTile.m % kRowStepA == 0 && kTile.n % kRowStepB == 0, "loads divide evenly");
  static_assert(kRowStepA % 8 == 0 && kRowStepB % 8 == 0,
                "a thread's rows differ in no bit that the swizzles use");
  static_assert(kStages >= 3, "a step is widened and another loaded while one is multiplied");
  static_assert(kSharedMemory <= 163 * 1024, "A100 gives a block 163 KiB");
};

// The chunk of a row at which chunk c lies is c ^ Swizzle(row): ldmatrix reads 8 rows at one
// chunk, which must fall into 8 different groups of 4 banks.
__device__ constexpr int Swizzle(int row) { return row % 8; }

// Where weights are unpacked, the four lanes 4g + q together read what row g of A has beside a
// chunk of stored weights: kReadBytes. The rows that are read together, 128 bytes of them, must not
// meet in the banks. (Of 4-bit weights high tiles read halves of chunks, from twice as many rows:
// high_unpacking_mainloop.cuh.)
template <typename T>
inline constexpr int kReadBytes = 256 / WeightBits(T::kKind);
template <typename T>
__device__ constexpr int SwizzleA(int row) {
  if constexpr (!T::kUnpacks) return Swizzle(row);
  const int swizzle = row % (128 / kReadBytes<T>)*(kReadBytes<T> / 16);
  return T::kTile.high() && WeightBits(T::kKind) == 4 ? swizzle + row / 2 % 2 : swizzle;
}
// Rows of stored weights may be shorter than 128 bytes; then several share the banks.
template <typename T>
__device__ constexpr int SwizzleStored(int row) {
  return row * T::kStoredChunks / 8 % T::kStoredChunks;
}

// The warp's place in the tile. The shuffle tells the compiler that all lanes agree on it. All of
// them must be there: it waits for each.
struct WarpPlace {
  int m;
  int n;
  int slice;
};
template <typename T>
__device__ inline WarpPlace GetWarpPlace() {
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  constexpr int kWarpsOfRow = T::kWarpsN * T::kSlices;
  const int m = T::kWarpsM == 1 ? 0 : warp / kWarpsOfRow;
  return {m, warp % T::kWarpsN, warp % kWarpsOfRow / T::kWarpsN};
}

}  // namespace moe::sm80

#endif  // KERNELS_SM80_TRAITS_CUH_
