// SPDX-License-Identifier: Apache-2.0
//
// The one place where ids, which may hold anything, become indices: both routings ask here.

#ifndef MOE_LOCAL_EXPERT_CUH_
#define MOE_LOCAL_EXPERT_CUH_

#include <cstdint>

namespace moe {

// The index of a global id among the `count` experts from `first` on, or -1 where it is none of
// them. The subtraction is unsigned because an id may be any int32, and the unsigned comparison
// catches ids below the range too.
__device__ inline int32_t LocalExpert(int32_t id, int32_t first, int32_t count) {
  const uint32_t expert = static_cast<uint32_t>(id) - static_cast<uint32_t>(first);
  return expert < static_cast<uint32_t>(count) ? static_cast<int32_t>(expert) : -1;
}

}  // namespace moe

#endif  // MOE_LOCAL_EXPERT_CUH_
