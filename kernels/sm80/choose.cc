// SPDX-License-Identifier: Apache-2.0

#include "kernels/sm80/choose.h"

#include <algorithm>
#include <cmath>

#include "kernels/sm80/tiles.h"

namespace moe::sm80 {

int ResidentBlocks(int tile, bool quantized, const Device& device) {
  constexpr int kReserved = 1024;  // the driver takes 1 KiB of shared memory a block
  const int bytes = kTiles[tile].shared_memory(quantized);
  if (bytes > device.shared_memory_per_block) return 0;
  return std::clamp(device.shared_memory_per_multiprocessor / (bytes + kReserved), 1,
                    kTiles[tile].blocks);
}

int ChooseTile(const Problem& problem, bool gated, int columns, int k, const Device& device) {
  const double experts = problem.num_local_experts;
  const double slots = std::max(problem.expected_local_slots(), 1.0);
  const double active = experts * (1.0 - std::pow(1.0 - 1.0 / experts, slots));
  const double rows = slots / std::max(active, 1.0);
  int best = rows <= 8 ? 1 : rows <= 22 ? 2 : rows <= 60 ? 3 : 6;
  while (ResidentBlocks(best, problem.quantized(), device) == 0) --best;
  return best;
}

}  // namespace moe::sm80
