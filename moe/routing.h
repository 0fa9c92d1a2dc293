// SPDX-License-Identifier: Apache-2.0
//
// Step 1 of a call: from expert ids to rows grouped by expert and to the lists of row tiles.

#ifndef MOE_ROUTING_H_
#define MOE_ROUTING_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "moe/problem.h"
#include "moe/row_tile.h"

namespace moe {

// Device pointers into the workspace, as in WorkspacePlan.
struct RoutingBuffers {
  int32_t* num_row_tiles;  // [2]
  RowTile* row_tiles[2];
  int32_t tile_rows[2];    // tile heights of GEMM 1 and GEMM 2
  int32_t* expert_counts;  // [RoutingBlocks, E_l]
  int32_t* row_to_slot;    // [slots]
  int32_t* slot_to_row;    // [slots]
};

// One launch up to 16384 slots, three beyond. Any id value is safe: ids outside
// [first_local_expert, first_local_expert + E_l) get row -1. The order of rows within an expert
// is unspecified; no result depends on it.
cudaError_t LaunchRouting(const Problem& problem, const int32_t* experts,
                          const RoutingBuffers& buffers, cudaStream_t stream);

}  // namespace moe

#endif  // MOE_ROUTING_H_
