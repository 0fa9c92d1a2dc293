// SPDX-License-Identifier: Apache-2.0

#include "moe/workspace.h"

#include <algorithm>

namespace moe {
namespace {

class Arena {
 public:
  size_t Take(size_t bytes) {
    const size_t offset = used_;
    used_ += (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
    return offset;
  }
  size_t used() const { return used_; }

 private:
  size_t used_ = 0;
};

}  // namespace

int32_t RoutingBlocks(const Problem& problem) {
  // 4096 slots a block keep a launch of 131072 slots at 32 blocks. Their histograms are added by
  // one block, hence the cap on how many there are; the cap on their total size (256 KiB) keeps the
  // workspace bound for any number of experts.
  constexpr int64_t kSlotsPerBlock = 4096;
  constexpr int64_t kMaxBlocks = 128;
  constexpr int64_t kMaxCounters = 64 * 1024;
  const int64_t wanted = (problem.num_slots() + kSlotsPerBlock - 1) / kSlotsPerBlock;
  const int64_t affordable = kMaxCounters / std::max<int64_t>(problem.num_local_experts, 1);
  return static_cast<int32_t>(std::max<int64_t>(1, std::min({wanted, affordable, kMaxBlocks})));
}

WorkspacePlan PlanWorkspace(const Problem& problem) {
  const size_t slots = static_cast<size_t>(problem.num_slots());
  const size_t tiles = static_cast<size_t>(
      MaxRowTiles(problem.num_slots(), problem.num_local_experts, kMinTileRows));
  Arena arena;
  WorkspacePlan plan;
  plan.num_row_tiles = arena.Take(2 * sizeof(int32_t));
  plan.row_tiles[0] = arena.Take(tiles * sizeof(RowTile));
  plan.row_tiles[1] = arena.Take(tiles * sizeof(RowTile));
  plan.expert_counts = arena.Take(static_cast<size_t>(RoutingBlocks(problem)) *
                                  problem.num_local_experts * sizeof(int32_t));
  plan.row_to_slot = arena.Take((3 + slots) * sizeof(int32_t));
  plan.slot_to_row = arena.Take(slots * sizeof(int32_t));
  plan.intermediate = arena.Take(slots * problem.intermediate_size * 2);
  plan.expert_output = arena.Take(slots * problem.hidden_size * 2);
  plan.bytes = arena.used();
  return plan;
}

}  // namespace moe
