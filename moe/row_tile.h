// SPDX-License-Identifier: Apache-2.0
//
// The list of row tiles: what routing hands to the grouped GEMMs, made on the device so that
// the host never waits for the router.
//
// Rows (slots grouped by expert) are cut into tiles of a fixed height, each within one expert.
// A GEMM with `column_tiles` column tiles runs num_row_tiles * column_tiles work items. All work
// items of one expert are consecutive, so that a block of weight columns is read from DRAM once
// and then served from L2 to the other row tiles of its expert. Every entry therefore describes
// its whole expert, and entry [work / column_tiles] belongs to the expert of `work`: expert e
// owns list entries [first_tile, first_tile + tiles), and hence exactly the work items
// [first_tile * column_tiles, (first_tile + tiles) * column_tiles).

#ifndef MOE_ROW_TILE_H_
#define MOE_ROW_TILE_H_

#include <cstdint>

namespace moe {

struct alignas(16) RowTile {
  int32_t expert;      // local expert
  int32_t first_tile;  // list index of the expert's first tile
  int32_t row_begin;   // the expert's rows: [row_begin, row_end)
  int32_t row_end;
};
static_assert(sizeof(RowTile) == 16, "kernels read an entry with one 16-byte load");

// The lowest tile that a backend may ask a list for: what the workspace has room for.
inline constexpr int32_t kMinTileRows = 16;

// Entries needed for any routing of `slots` slots over `experts` experts: each non-empty expert
// adds at most one partly filled tile.
constexpr int64_t MaxRowTiles(int64_t slots, int64_t experts, int64_t tile_rows) {
  return slots / tile_rows + (experts < slots ? experts : slots);
}

}  // namespace moe

#endif  // MOE_ROW_TILE_H_
