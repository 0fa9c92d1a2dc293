// SPDX-License-Identifier: Apache-2.0
//
// Which tile is whose: in turn t, block b of a persistent grid takes work item
//
//   t * grid + (b + t) % grid
//
// They shift by one from turn to turn because an expert's row tiles follow each other and the last
// of them may be nearly empty: by strides of the grid (132 or 264 on an H200, 108 or 216 on an A100)
// a block would get the same one of 2, 3 or 4 each time, and some blocks only full ones.
//
// In the last turn there is not one for each block. Where a multiprocessor holds one block, it goes
// the other way around: experts are sorted by rows (moe/routing.cu), and who had the last items of
// the turn before, the least full, goes on. With two or more that share one, it gained as much in
// some layers as it lost in others.

#ifndef KERNELS_SM80_SCHEDULER_CUH_
#define KERNELS_SM80_SCHEDULER_CUH_

#include <cstdint>

#include "kernels/sm80/traits.cuh"
#include "moe/grouped_gemm.h"

namespace moe::sm80 {

struct alignas(16) WorkItem {
  int32_t expert;
  int32_t row_begin;  // first row of the tile
  int32_t rows;       // 1 .. tile height
  int32_t column;     // first output column of the tile
};

// Row tiles run innermost, in bands of at most kBandTiles: the blocks at work then cover a
// roughly square piece of an expert's output, and both operands of it come from L2.
template <int kTileM, int kTileColumns>
struct Scheduler {
  static constexpr int kBandTiles = 2048 / kTileM;

  const RowTile* row_tiles;
  int32_t column_tiles;
  int32_t work_items;

  __device__ explicit Scheduler(const GroupedGemm& gemm)
      : row_tiles(gemm.row_tiles),
        column_tiles((gemm.columns + kTileColumns - 1) / kTileColumns),
        work_items(*gemm.num_row_tiles * column_tiles) {}

  __device__ WorkItem Decode(int32_t work) const {
    // RowTile's expert, first_tile, row_begin and row_end, by one load.
    const int4 raw = reinterpret_cast<const int4*>(row_tiles)[work / column_tiles];
    const int32_t row_begin = raw.z;
    const int32_t row_end = raw.w;
    const int32_t tiles = (row_end - row_begin + kTileM - 1) / kTileM;
    int32_t local = work - raw.y * column_tiles;  // within the expert
    int32_t band = 0;
    int32_t band_tiles = tiles;
    if (tiles > kBandTiles) {
      band = local / (kBandTiles * column_tiles);
      local -= band * kBandTiles * column_tiles;
      band_tiles = min(kBandTiles, tiles - band * kBandTiles);
    }
    const int32_t column_tile = local / band_tiles;
    const int32_t row_tile = band * kBandTiles + local - column_tile * band_tiles;
    const int32_t first = row_begin + row_tile * kTileM;
    return {raw.x, first, min(kTileM, row_end - first), column_tile * kTileColumns};
  }
};

// A block's next tiles, in shared memory. One warp decodes a batch of them ahead of their use:
// decoding takes a load and two or three divisions, for which all warps would wait at each tile.
//
// What a tile needs of each of its rows, its word, is the row of the input where rows are gathered,
// else the scale of its output: one load, or two of which the second needs the first. Where a tile
// has many rows, a thread loads one row's over three turns, and words lie in shared memory too.
//
// How long entries live: copies are up to kStages tiles ahead of the mma (each has at least one
// step), words one more. Between Begin() of one turn and of the next there must be a barrier, at
// which what the former wrote becomes visible and after which what the latter overwrites is read
// no more. Where words last for three turns only, those of the output are there in the epilogue if a
// tile has kStages steps or more: then no tile but the next has begun. Else Renew() brings them.
template <typename T>
class TileQueue {
 public:
  static constexpr int kBatch = 8;
  static constexpr bool kHasWords = T::kTile.has_words();
  static constexpr int kWordTurns = T::kTile.word_turns(T::kKind);
  static_assert(kQueueItems >= 2 * kBatch + T::kStages, "read while a batch is decoded");
  static_assert(kWordTurns >= (T::kHasChannels ? 3 : T::kStages + 2),
                "read while those of later tiles are written");
  static_assert(!kHasWords || T::kThreads >= T::kTile.m, "a row each");

  // By all threads of the block.
  __device__ TileQueue(const GroupedGemm& gemm, char* shared)
      : gemm_(gemm),
        items_(reinterpret_cast<WorkItem*>(shared + T::kQueuePlace)),
        words_(reinterpret_cast<uint32_t*>(items_ + kQueueItems)) {
    const auto items = static_cast<uint32_t>(Schedule(gemm).work_items);
    const uint32_t whole = items / gridDim.x;  // turns of all blocks; some have one more
    turns_ = static_cast<int32_t>(whole + (Work(whole, items) < items ? 1 : 0));
    if (threadIdx.x < kBatch) Decode(threadIdx.x);
    __syncthreads();
    if constexpr (kHasWords) {
      if (OwnsRow()) {
        const uint32_t first = Slot(0);
        const uint32_t second = Slot(1);
        slot_ = Slot(2);
        words_[threadIdx.x] = LoadWord(first);
        word_ = LoadWord(second);
      }
      __syncthreads();
    }
  }

  __device__ int32_t turns() const { return turns_; }

  // Begins the turns one after another; by all threads of the block, before the tile's copies.
  __device__ void Begin(int32_t turn) {
    if (turn % kBatch == 0) {
      if (threadIdx.x < kBatch) Decode(turn + kBatch + threadIdx.x);
      __syncwarp();
    }
    if constexpr (kHasWords) {
      if (OwnsRow()) {
        words_[(turn + 1) % kWordTurns * T::kTile.m + threadIdx.x] = word_;
        word_ = LoadWord(slot_);
        slot_ = Slot(turn + 3);
      }
    }
  }

  // Brings the words of a turn that is being multiplied once more; by all threads, before a barrier.
  // Those of the input, which have been read, stay.
  __device__ void Renew(int32_t turn) {
    if constexpr (kHasWords) {
      if (OwnsRow() && !gemm_.gather) {
        words_[turn % kWordTurns * T::kTile.m + threadIdx.x] = LoadWord(Slot(turn));
      }
    }
  }

  // The tile of the turn begun last, of one that still is multiplied, or of the next three.
  __device__ const WorkItem& Item(int32_t turn) const { return items_[turn % kQueueItems]; }

  // The word of one of its rows.
  __device__ uint32_t Word(int32_t turn, const WorkItem& item, int row) const {
    if constexpr (kHasWords) return words_[turn % kWordTurns * T::kTile.m + row];
    return LoadWord(gemm_.row_slot[item.row_begin + row]);
  }

 private:
  using Schedule = Scheduler<T::kTile.m, T::kTileColumns>;

  __device__ static bool OwnsRow() { return T::kThreads == T::kTile.m || threadIdx.x < T::kTile.m; }

  // The number of a turn's item, of `items`. Not of the block where it passes the last one.
  __device__ static uint32_t Work(uint32_t turn, uint32_t items) {
    const uint32_t first = turn * gridDim.x;
    const bool whole = items - first >= gridDim.x;
    if (T::kBlocks > 1 || whole) return first + (blockIdx.x + turn) % gridDim.x;
    return first + gridDim.x - 1 - (blockIdx.x + turn + gridDim.x - 1) % gridDim.x;
  }

  __device__ void Decode(int32_t turn) {
    if (turn >= turns_) return;
    const Schedule schedule(gemm_);
    const uint32_t work = Work(turn, static_cast<uint32_t>(schedule.work_items));
    items_[turn % kQueueItems] = schedule.Decode(static_cast<int32_t>(work));
  }

  // Of the thread's row. Where it has none, any slot will do.
  __device__ uint32_t Slot(int32_t turn) const {
    if (turn >= turns_) return 0;
    const WorkItem& item = Item(turn);
    const auto row = static_cast<int32_t>(threadIdx.x);
    return row < item.rows ? gemm_.row_slot[item.row_begin + row] : 0;
  }

  __device__ uint32_t LoadWord(uint32_t slot) const {
    if (gemm_.gather) return slot / static_cast<uint32_t>(gemm_.top_k);
    return gemm_.slot_scales != nullptr ? __float_as_uint(__ldg(gemm_.slot_scales + slot)) : 0;
  }

  const GroupedGemm& gemm_;
  WorkItem* items_;
  uint32_t* words_;    // [kWordTurns][rows]
  int32_t turns_;      // of the block
  uint32_t word_ = 0;  // of the thread's row, one turn after the next
  uint32_t slot_ = 0;  // and two turns after it
};

}  // namespace moe::sm80

#endif  // KERNELS_SM80_SCHEDULER_CUH_
