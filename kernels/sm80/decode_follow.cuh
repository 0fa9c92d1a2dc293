// SPDX-License-Identifier: Apache-2.0
//
// How GEMM 2 of the few-token layer follows GEMM 1 without a barrier of the grid. The last units of
// GEMM 1 end one by one, over as long as one takes, and nobody is to wait for the last: a group of
// warps that finds no more of them goes on to GEMM 2, whose first passes have long been ended.
//
// A global counter a pass: GEMM 1 adds 1 for each unit that has been stored. What a block has seen
// to be ended it notes in shared memory, 32 passes at a time, so that few warps poll. Nobody waits
// in a circle: GEMM 1 waits for nothing, and all blocks are on the chip.

#ifndef KERNELS_SM80_DECODE_FOLLOW_CUH_
#define KERNELS_SM80_DECODE_FOLLOW_CUH_

#include <cstdint>

#include "kernels/sm80/decode_route.cuh"

namespace moe::sm80 {

// By one thread, behind a barrier of those that have stored the unit.
__device__ __forceinline__ void AnnounceUnit(int32_t* ended_units, int pass) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(ended_units + pass) : "memory");
}

// By a warp: waits until `units` have been announced for the pass. What they stored may then be
// read by ordinary loads: acquiring at the scope of the GPU empties L1.
template <int kTokenBlocks>
__device__ __forceinline__ void AwaitPass(const int32_t* ended_units, int units, int pass) {
  using Shared = DecodeShared<kTokenBlocks>;
  const int lane = threadIdx.x % 32;
  uint32_t* const noted = Shared::Ended() + pass / 32;
  while ((__shfl_sync(0xffffffffu, *static_cast<volatile uint32_t*>(noted), 0) >> pass % 32 & 1) ==
         0) {
    const int own = pass / 32 * 32 + lane;
    int32_t count = 0;
    if (own < Shared::NumPasses()) {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                   : "=r"(count)
                   : "l"(ended_units + own)
                   : "memory");
    }
    const uint32_t ended = __ballot_sync(0xffffffffu, count == units);
    __threadfence_block();
    if (lane == 0 && ended != 0) atomicOr(noted, ended);
    __syncwarp();
  }
  __threadfence_block();
}

}  // namespace moe::sm80

#endif  // KERNELS_SM80_DECODE_FOLLOW_CUH_
