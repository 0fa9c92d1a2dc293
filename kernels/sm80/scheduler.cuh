// SPDX-License-Identifier: Apache-2.0
//
// Which tile is whose: block b of a persistent grid takes work items b, b + grid, ...

#ifndef KERNELS_SM80_SCHEDULER_CUH_
#define KERNELS_SM80_SCHEDULER_CUH_

#include <cstdint>

#include "moe/grouped_gemm.h"

namespace moe::sm80 {

struct WorkItem {
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

}  // namespace moe::sm80

#endif  // KERNELS_SM80_SCHEDULER_CUH_
