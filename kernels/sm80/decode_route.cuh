// SPDX-License-Identifier: Apache-2.0
//
// Routing inside a block: every block sorts the few slots for itself, in shared memory, and so
// waits for no other. What blocks share has slots for its rows; all that they must agree on is
// which slots of an expert belong to which of its passes.

#ifndef KERNELS_SM80_DECODE_ROUTE_CUH_
#define KERNELS_SM80_DECODE_ROUTE_CUH_

#include <cstdint>

#include "kernels/sm80/decode.h"
#include "moe/local_expert.cuh"

namespace moe::sm80 {

extern __shared__ __align__(16) char decode_shared[];

// A pass over an expert's weights: `num_slots` of its slots, from `first_slot` on in Slots().
struct DecodePass {
  int expert;
  int first_slot;
  int num_slots;
};

// Where everything lies in it: at addresses known to the compiler, which take no registers.
template <int kTokenBlocks>
struct DecodeShared {
  static constexpr int kPassSlots = 8 * kTokenBlocks;  // at most
  // Sums of all warps, twice.
  __device__ static float* Sums() { return reinterpret_cast<float*>(decode_shared); }
  // The passes: each has the slots from its first to the next one's; one entry more marks the end.
  struct Pass {
    uint16_t expert;
    uint16_t first_slot;  // in Slots()
  };
  static_assert(sizeof(Pass) == 4, "as DecodeSharedMemory counts them");
  __device__ static Pass* Passes() {
    return reinterpret_cast<Pass*>(decode_shared + DecodeSumBytes(kTokenBlocks));
  }
  __device__ static DecodePass GetPass(int index) {
    const Pass pass = Passes()[index];
    return {pass.expert, pass.first_slot, Passes()[index + 1].first_slot - pass.first_slot};
  }
  // [slots] by expert.
  __device__ static uint16_t* Slots() {
    return reinterpret_cast<uint16_t*>(Passes() + kDecodeMaxSlots + 2);
  }
  // [slots], a bit each: whether the slot's expert is here.
  __device__ static uint32_t* Present() {
    return reinterpret_cast<uint32_t*>(Slots() + kDecodeMaxSlots);
  }
  // [passes], a bit each: whether the block knows that GEMM 1 has ended for it (decode_follow.cuh).
  __device__ static uint32_t* Ended() { return Present() + kDecodeMaxSlots / 32; }
  // [warps], at the end.
  __device__ static DecodePlan* Plans() {
    return reinterpret_cast<DecodePlan*>(decode_shared + DecodeSharedMemory(kTokenBlocks)) -
           kDecodeWarps;
  }
  __device__ static int& NumPasses() { return reinterpret_cast<int*>(Plans())[-1]; }
  // [experts], while routing, in the place of the sums: first slot and, in the lower half, number
  // of slots.
  __device__ static uint32_t* Experts() { return reinterpret_cast<uint32_t*>(decode_shared); }
};

__device__ inline int32_t ExpertOf(const DecodeLayer& layer, int slot) {
  return LocalExpert(layer.experts[slot], layer.first_expert, layer.num_experts);
}

// Up to 32 slots, by one warp: each lane has one and compares it with all.
template <int kTokenBlocks>
__device__ void RouteWarp(const DecodeLayer& layer, int num_slots) {
  using Shared = DecodeShared<kTokenBlocks>;
  const int lane = threadIdx.x % 32;
  const int expert = lane < num_slots ? ExpertOf(layer, lane) : -1;
  int place = 0;      // among all slots, by expert
  int of_expert = 0;  // among its expert's
#pragma unroll 4
  for (int j = 0; j < num_slots; ++j) {
    const int other = __shfl_sync(0xffffffffu, expert, j);
    const int before = other == expert && j < lane ? 1 : 0;
    of_expert += before;
    place += other >= 0 && other < expert ? 1 : before;
  }
  const uint32_t present = __ballot_sync(0xffffffffu, expert >= 0);
  const bool begins = expert >= 0 && of_expert % Shared::kPassSlots == 0;  // a pass
  const uint32_t all_begin = __ballot_sync(0xffffffffu, begins);
  int pass = 0;
#pragma unroll 4
  for (int j = 0; j < num_slots; ++j) {
    const int other = __shfl_sync(0xffffffffu, place, j);
    pass += (all_begin >> j & 1) != 0 && other < place ? 1 : 0;
  }
  if (expert >= 0) Shared::Slots()[place] = static_cast<uint16_t>(lane);
  if (begins) {
    Shared::Passes()[pass] = {static_cast<uint16_t>(expert), static_cast<uint16_t>(place)};
  }
  if (lane == 0) {
    Shared::Passes()[__popc(all_begin)] = {0, static_cast<uint16_t>(__popc(present))};
    Shared::NumPasses() = __popc(all_begin);
    Shared::Present()[0] = present;
  }
}

// By the whole block. Leaves the lists, and the number of passes, in shared memory.
template <int kTokenBlocks>
__device__ void Route(const DecodeLayer& layer) {
  using Shared = DecodeShared<kTokenBlocks>;
  constexpr uint32_t kPassSlots = Shared::kPassSlots;
  constexpr int kSlotsPerThread = kDecodeMaxSlots / kDecodeThreads;
  __shared__ uint32_t warp_sums[kDecodeWarps];
  const int num_slots = layer.num_tokens * layer.gemm[0].top_k;
  if (num_slots <= 32) {
    if (threadIdx.x < 32) RouteWarp<kTokenBlocks>(layer, num_slots);
    __syncthreads();
    return;
  }

  for (int e = threadIdx.x; e < layer.num_experts; e += kDecodeThreads) Shared::Experts()[e] = 0;
  int32_t expert[kSlotsPerThread];
#pragma unroll
  for (int i = 0; i < kSlotsPerThread; ++i) {
    const int slot = threadIdx.x + i * kDecodeThreads;
    expert[i] = slot < num_slots ? ExpertOf(layer, slot) : -1;
    const uint32_t present = __ballot_sync(0xffffffffu, expert[i] >= 0);
    if (slot % 32 == 0) Shared::Present()[slot / 32] = present;
  }
  __syncthreads();
  // Counts an expert's slots; each gets its place among them, in any order.
  uint32_t place[kSlotsPerThread];
#pragma unroll
  for (int i = 0; i < kSlotsPerThread; ++i) {
    if (expert[i] >= 0) place[i] = atomicAdd(&Shared::Experts()[expert[i]], 1u);
  }
  __syncthreads();

  // Exclusive sums over the experts of (slots, passes), packed: neither passes 2^16.
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  uint32_t carry = 0;
#pragma unroll 1
  for (int e0 = 0; e0 < layer.num_experts; e0 += kDecodeThreads) {
    const int e = e0 + threadIdx.x;
    const uint32_t count = e < layer.num_experts ? Shared::Experts()[e] : 0;
    const uint32_t passes = (count + kPassSlots - 1) / kPassSlots;
    const uint32_t own = count << 16 | passes;
    uint32_t sum = own;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const uint32_t below = __shfl_up_sync(0xffffffffu, sum, delta);
      if (lane >= delta) sum += below;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    uint32_t before = carry + sum - own;
#pragma unroll 4
    for (int w = 0; w < kDecodeWarps; ++w) {
      if (w < warp) before += warp_sums[w];
      carry += warp_sums[w];
    }
    const uint32_t first = before >> 16;
#pragma unroll 1
    for (uint32_t p = 0; p < passes; ++p) {
      Shared::Passes()[(before & 0xffff) + p] = {static_cast<uint16_t>(e),
                                                 static_cast<uint16_t>(first + p * kPassSlots)};
    }
    if (e < layer.num_experts) Shared::Experts()[e] = first << 16 | count;
    __syncthreads();  // before warp_sums is written again, and for the readers of Experts()
  }
  const int num_passes = static_cast<int>(carry & 0xffff);
  if (threadIdx.x == 0) {
    Shared::Passes()[num_passes] = {0, static_cast<uint16_t>(carry >> 16)};
    Shared::NumPasses() = num_passes;
  }
  // Slots by expert.
#pragma unroll
  for (int i = 0; i < kSlotsPerThread; ++i) {
    if (expert[i] < 0) continue;
    Shared::Slots()[(Shared::Experts()[expert[i]] >> 16) + place[i]] =
        static_cast<uint16_t>(threadIdx.x + i * kDecodeThreads);
  }
  __syncthreads();
  // The atomics have put an expert's slots into any order. Where they take several passes, they are
  // put into theirs.
#pragma unroll
  for (int i = 0; i < kSlotsPerThread; ++i) {
    if (expert[i] < 0) continue;
    const uint32_t first = Shared::Experts()[expert[i]] >> 16;
    const uint32_t count = Shared::Experts()[expert[i]] & 0xffff;
    if (count <= kPassSlots) continue;
    place[i] = 0;
#pragma unroll 1
    for (uint32_t j = 0; j < count; ++j) {
      place[i] += Shared::Slots()[first + j] < threadIdx.x + i * kDecodeThreads ? 1 : 0;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSlotsPerThread; ++i) {
    if (expert[i] < 0) continue;
    Shared::Slots()[(Shared::Experts()[expert[i]] >> 16) + place[i]] =
        static_cast<uint16_t>(threadIdx.x + i * kDecodeThreads);
  }
  __syncthreads();
}

}  // namespace moe::sm80

#endif  // KERNELS_SM80_DECODE_ROUTE_CUH_
