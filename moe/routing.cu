// SPDX-License-Identifier: Apache-2.0
//
// A counting sort of slots by expert.
//
//   up to kSlotsInOneBlock slots   one block counts, scans, writes the tile lists and scatters
//   beyond                         count (a histogram a block) -> plan (one block: scan, lists)
//                                  -> scatter (each block from its own starting rows)
//
// Nothing is zeroed beforehand and nothing is read that the same call did not write, so a
// poisoned workspace is fine. What bounds it: latency of the launches and of shared-memory
// atomics; 4 bytes are read and 12 written for each slot.

#include "moe/routing.h"
#include "moe/workspace.h"

namespace moe {
namespace {

constexpr int kThreads = 1024;
constexpr int kSlotsPerThread = 8;
constexpr int64_t kSlotsInOneBlock = kThreads * kSlotsPerThread;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kFullWarp = 0xffffffffu;

struct Params {
  const int32_t* experts;
  RoutingBuffers buffers;
  int32_t slots;
  int32_t top_k;
  int32_t first_expert;
  int32_t num_experts;      // local
  int32_t slots_per_block;  // large inputs
  int32_t blocks;           // large inputs
};

// Rows and tiles (for both lists) of an expert, or sums of them.
struct Extent {
  int32_t rows;
  int32_t tiles[2];
};

__device__ Extent operator+(const Extent& a, const Extent& b) {
  return {a.rows + b.rows, {a.tiles[0] + b.tiles[0], a.tiles[1] + b.tiles[1]}};
}

__device__ Extent ShuffleUp(const Extent& v, int delta) {
  return {__shfl_up_sync(kFullWarp, v.rows, delta),
          {__shfl_up_sync(kFullWarp, v.tiles[0], delta),
           __shfl_up_sync(kFullWarp, v.tiles[1], delta)}};
}

__device__ Extent WarpInclusiveScan(Extent v, int lane) {
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const Extent below = ShuffleUp(v, delta);
    if (lane >= delta) v = v + below;
  }
  return v;
}

// Local expert of a slot, or -1. The unsigned comparison catches ids below the range too; the
// subtraction is done unsigned because an id may be any int32.
__device__ int32_t LocalExpert(const Params& p, int32_t slot) {
  const uint32_t expert =
      static_cast<uint32_t>(p.experts[slot]) - static_cast<uint32_t>(p.first_expert);
  return expert < static_cast<uint32_t>(p.num_experts) ? static_cast<int32_t>(expert) : -1;
}

__device__ void PlaceSlot(const Params& p, int32_t slot, int32_t row) {
  p.buffers.slot_to_row[slot] = row;
  if (row < 0) return;
  p.buffers.row_to_slot[row] = slot;
  p.buffers.row_to_token[row] = slot / p.top_k;
}

// From counts[e], by the whole block: row_begin[e] and both tile lists. All three arrays are in
// shared memory; `first_tile` holds two numbers an expert.
__device__ void PlanTiles(const Params& p, const int32_t* counts, int32_t* row_begin,
                          int32_t* first_tile) {
  __shared__ Extent warp_sums[kWarps];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;

  Extent carry = {};
  for (int e0 = 0; e0 < p.num_experts; e0 += kThreads) {
    const int e = e0 + threadIdx.x;
    const int32_t count = e < p.num_experts ? counts[e] : 0;
    const Extent own = {count,
                        {(count + p.buffers.tile_rows[0] - 1) / p.buffers.tile_rows[0],
                         (count + p.buffers.tile_rows[1] - 1) / p.buffers.tile_rows[1]}};
    Extent inclusive = WarpInclusiveScan(own, lane);
    if (lane == 31) warp_sums[warp] = inclusive;
    __syncthreads();
    if (warp == 0) warp_sums[lane] = WarpInclusiveScan(warp_sums[lane], lane);
    __syncthreads();
    if (warp > 0) inclusive = inclusive + warp_sums[warp - 1];
    inclusive = inclusive + carry;
    if (e < p.num_experts) {
      row_begin[e] = inclusive.rows - own.rows;
      first_tile[2 * e] = inclusive.tiles[0] - own.tiles[0];
      first_tile[2 * e + 1] = inclusive.tiles[1] - own.tiles[1];
    }
    carry = carry + warp_sums[kWarps - 1];
    __syncthreads();  // before warp_sums is written again, and for row_begin's readers
  }
  if (threadIdx.x < 2) p.buffers.num_row_tiles[threadIdx.x] = carry.tiles[threadIdx.x];

  // A warp an expert: the lanes share the work of an expert with many tiles.
  for (int e = warp; e < p.num_experts; e += kWarps) {
#pragma unroll
    for (int list = 0; list < 2; ++list) {
      const int32_t height = p.buffers.tile_rows[list];
      const int32_t tiles = (counts[e] + height - 1) / height;
      const RowTile tile = {e, first_tile[2 * e + list], row_begin[e], row_begin[e] + counts[e]};
      for (int t = lane; t < tiles; t += 32) {
        p.buffers.row_tiles[list][tile.first_tile + t] = tile;
      }
    }
  }
}

extern __shared__ int32_t shared_experts[];  // 4 numbers an expert

__global__ void __launch_bounds__(kThreads) RouteInOneBlockKernel(Params p) {
  int32_t* counts = shared_experts;
  int32_t* row_begin = counts + p.num_experts;
  int32_t* first_tile = row_begin + p.num_experts;

  for (int e = threadIdx.x; e < p.num_experts; e += kThreads) counts[e] = 0;
  __syncthreads();

  int32_t expert[kSlotsPerThread];
  int32_t rank[kSlotsPerThread];
#pragma unroll
  for (int i = 0; i < kSlotsPerThread; ++i) {
    const int32_t slot = i * kThreads + threadIdx.x;
    expert[i] = slot < p.slots ? LocalExpert(p, slot) : -1;
  }
#pragma unroll
  for (int i = 0; i < kSlotsPerThread; ++i) {
    rank[i] = expert[i] >= 0 ? atomicAdd(&counts[expert[i]], 1) : 0;
  }
  __syncthreads();
  PlanTiles(p, counts, row_begin, first_tile);
#pragma unroll
  for (int i = 0; i < kSlotsPerThread; ++i) {
    const int32_t slot = i * kThreads + threadIdx.x;
    if (slot < p.slots) PlaceSlot(p, slot, expert[i] >= 0 ? row_begin[expert[i]] + rank[i] : -1);
  }
}

// The slots of a block: [begin, end).
__device__ int2 BlockSlots(const Params& p) {
  const int32_t begin = blockIdx.x * p.slots_per_block;
  // slots - begin first: begin + slots_per_block could pass 2^31.
  const int32_t remaining = p.slots - begin;
  return make_int2(begin, begin + min(remaining, p.slots_per_block));
}

__global__ void __launch_bounds__(kThreads) CountKernel(Params p) {
  int32_t* counts = shared_experts;
  for (int e = threadIdx.x; e < p.num_experts; e += kThreads) counts[e] = 0;
  __syncthreads();
  const int2 slots = BlockSlots(p);
  for (int64_t slot = slots.x + threadIdx.x; slot < slots.y; slot += kThreads) {
    const int32_t expert = LocalExpert(p, static_cast<int32_t>(slot));
    if (expert >= 0) atomicAdd(&counts[expert], 1);
  }
  __syncthreads();
  int32_t* own = p.buffers.expert_counts + static_cast<int64_t>(blockIdx.x) * p.num_experts;
  for (int e = threadIdx.x; e < p.num_experts; e += kThreads) own[e] = counts[e];
}

// Turns expert_counts[b][e] into the first row of expert e that block b places.
__global__ void __launch_bounds__(kThreads) PlanKernel(Params p) {
  int32_t* counts = shared_experts;
  int32_t* row_begin = counts + p.num_experts;
  int32_t* first_tile = row_begin + p.num_experts;
  for (int e = threadIdx.x; e < p.num_experts; e += kThreads) {
    int32_t sum = 0;
#pragma unroll 8
    for (int b = 0; b < p.blocks; ++b) {
      sum += p.buffers.expert_counts[static_cast<int64_t>(b) * p.num_experts + e];
    }
    counts[e] = sum;
  }
  __syncthreads();
  PlanTiles(p, counts, row_begin, first_tile);
  for (int e = threadIdx.x; e < p.num_experts; e += kThreads) {
    int32_t next = row_begin[e];
#pragma unroll 8
    for (int b = 0; b < p.blocks; ++b) {
      int32_t& entry = p.buffers.expert_counts[static_cast<int64_t>(b) * p.num_experts + e];
      const int32_t count = entry;
      entry = next;
      next += count;
    }
  }
}

__global__ void __launch_bounds__(kThreads) ScatterKernel(Params p) {
  int32_t* next_row = shared_experts;
  const int32_t* own = p.buffers.expert_counts + static_cast<int64_t>(blockIdx.x) * p.num_experts;
  for (int e = threadIdx.x; e < p.num_experts; e += kThreads) next_row[e] = own[e];
  __syncthreads();
  const int2 slots = BlockSlots(p);
  for (int64_t slot = slots.x + threadIdx.x; slot < slots.y; slot += kThreads) {
    const int32_t expert = LocalExpert(p, static_cast<int32_t>(slot));
    PlaceSlot(p, static_cast<int32_t>(slot), expert >= 0 ? atomicAdd(&next_row[expert], 1) : -1);
  }
}

}  // namespace

cudaError_t LaunchRouting(const Problem& problem, const int32_t* experts,
                          const RoutingBuffers& buffers, cudaStream_t stream) {
  Params p = {};
  p.experts = experts;
  p.buffers = buffers;
  p.slots = static_cast<int32_t>(problem.num_slots());
  p.top_k = problem.top_k;
  p.first_expert = problem.first_local_expert;
  p.num_experts = problem.num_local_experts;
  const size_t per_expert = p.num_experts * sizeof(int32_t);
  if (p.slots <= kSlotsInOneBlock) {
    RouteInOneBlockKernel<<<1, kThreads, 4 * per_expert, stream>>>(p);
    return cudaGetLastError();
  }
  p.blocks = RoutingBlocks(problem);
  p.slots_per_block = (p.slots - 1) / p.blocks + 1;
  // Rounding up may leave the last blocks nothing: drop them.
  p.blocks = (p.slots - 1) / p.slots_per_block + 1;
  CountKernel<<<p.blocks, kThreads, per_expert, stream>>>(p);
  PlanKernel<<<1, kThreads, 4 * per_expert, stream>>>(p);
  ScatterKernel<<<p.blocks, kThreads, per_expert, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace moe
