// SPDX-License-Identifier: Apache-2.0
//
// Where everything lies in the one workspace buffer that a call uses.
//
// Bound, tested: at most 2 * (I + 2 * H) bytes a slot plus 1 MiB. The two large parts are the
// intermediate values [slots, I] and the expert outputs [slots, H], both in 16 bits.

#ifndef MOE_WORKSPACE_H_
#define MOE_WORKSPACE_H_

#include <cstddef>
#include <cstdint>

#include "moe/problem.h"
#include "moe/row_tile.h"

namespace moe {

inline constexpr size_t kWorkspaceAlignment = 128;

// Blocks of the large-input routing, each with a histogram of its own.
int32_t RoutingBlocks(const Problem& problem);

// Byte offsets from the start of the workspace.
struct WorkspacePlan {
  size_t num_row_tiles;  // int32 [2]: entries in each list
  size_t row_tiles[2];   // RowTile [MaxRowTiles]: for GEMM 1 and GEMM 2
  size_t expert_counts;  // int32 [RoutingBlocks, E_l]: large inputs only
  size_t row_to_slot;    // int32 [slots]: whose token GEMM 1 gathers, whose scale GEMM 2 applies;
                         // or [3 + slots]: the counters of a whole layer
  size_t slot_to_row;    // int32 [slots]: -1 where the slot's expert is not here
  size_t intermediate;   // [slots, I] dtype
  size_t expert_output;  // [slots, H] output_dtype, already scaled
  size_t bytes;          // in all
};

WorkspacePlan PlanWorkspace(const Problem& problem);

}  // namespace moe

#endif  // MOE_WORKSPACE_H_
