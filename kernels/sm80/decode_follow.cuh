// SPDX-License-Identifier: Apache-2.0
//
// How steps of the few-token layer follow each other without a barrier of the grid.
//
// GEMM 2 follows GEMM 1 pass by pass: the last units of GEMM 1 end one by one, over as long as one
// takes, and nobody is to wait for the last. A group of warps that finds no more of them goes on to
// GEMM 2, whose first passes have long been ended.
//
// A global counter a pass: GEMM 1 adds 1 for each unit that has been stored. What a block has seen
// to be ended it notes in shared memory, 32 passes at a time, so that few warps poll. Nobody waits
// in a circle: GEMM 1 waits for nothing, and all blocks are on the chip.

#ifndef KERNELS_SM80_DECODE_FOLLOW_CUH_
#define KERNELS_SM80_DECODE_FOLLOW_CUH_

#include <cstdint>

#include "kernels/sm80/decode_route.cuh"

namespace moe::sm80 {

// Adds 1. Who acquires the sum sees what the thread has stored, and others before a barrier with it.
__device__ __forceinline__ void Announce(int32_t* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

// What had been stored when the counter came to this value may then be read by ordinary loads:
// acquiring at the scope of the GPU empties L1.
__device__ __forceinline__ int32_t Acquire(const int32_t* counter) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// By one thread, behind a barrier of those that have stored the unit.
__device__ __forceinline__ void AnnounceUnit(int32_t* counters, int pass) {
  Announce(counters + kDecodeEndedUnits + pass);
}

// By a warp: waits until `units` have been announced for the pass.
template <int kTokenBlocks>
__device__ __forceinline__ void AwaitPass(const int32_t* counters, int units, int pass) {
  using Shared = DecodeShared<kTokenBlocks>;
  const int lane = threadIdx.x % 32;
  uint32_t* const noted = Shared::Ended() + pass / 32;
  while ((__shfl_sync(0xffffffffu, *static_cast<volatile uint32_t*>(noted), 0) >> pass % 32 & 1) ==
         0) {
    const int own = pass / 32 * 32 + lane;
    int32_t count = 0;
    if (own < Shared::NumPasses()) count = Acquire(counters + kDecodeEndedUnits + own);
    const uint32_t ended = __ballot_sync(0xffffffffu, count == units);
    __threadfence_block();
    if (lane == 0 && ended != 0) atomicOr(noted, ended);
    __syncwarp();
  }
  __threadfence_block();
}

// By all threads of a block that has ended GEMM 2. Unlike a barrier of the grid it holds up only those
// that have something to finalize, and nobody waits for an atomic's answer before polling.
__device__ __forceinline__ void AnnounceBlock(int32_t* counters) {
  __syncthreads();
  if (threadIdx.x == 0) Announce(counters + kDecodeEndedBlocks);
}

__device__ __forceinline__ void AwaitBlocks(const int32_t* counters) {
  while (Acquire(counters + kDecodeEndedBlocks) != gridDim.x) {
  }
}

}  // namespace moe::sm80

#endif  // KERNELS_SM80_DECODE_FOLLOW_CUH_
