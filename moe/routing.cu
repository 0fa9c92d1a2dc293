// SPDX-License-Identifier: Apache-2.0
//
// A counting sort of slots by expert.
//
//   up to kSlotsInOneLaunch slots   one launch of a few blocks. Every block counts all slots (they
//                                   are few, and in L2) and scatters its own share, so that no
//                                   block waits for another
//   beyond                          count (a histogram a block) -> plan (one block: scan, lists)
//                                   -> scatter (each block from its own starting rows)
//
// Nothing is zeroed beforehand and nothing is read that the same call did not write, so a
// poisoned workspace is fine. What bounds it: the latency of launches and shared-memory atomics;
// 4 bytes are read and 8 written for each slot, those of row_to_slot scattered, which is why one
// multiprocessor alone is slow at it.

#include "moe/local_expert.cuh"
#include "moe/routing.h"
#include "moe/workspace.h"

namespace moe {
namespace {

constexpr int kThreads = 1024;
constexpr int kSlotsPerBlock = kThreads;  // scattered by a block of the one-launch routing
constexpr int64_t kSlotsInOneLaunch = 16 * kSlotsPerBlock;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Bytes an expert in the shared memory of each kernel.
constexpr int kBytesInOneLaunch = 5 * sizeof(int32_t) + sizeof(uint16_t);
constexpr int kBytesToPlan = 4 * sizeof(int32_t) + sizeof(uint16_t);
static_assert(kMaxLocalExperts * kBytesInOneLaunch < 48 * 1024 - 1024,
              "what a kernel may have without asking, less its scan's");

// Experts are sorted by rows where a GEMM has tiles of so many. Lower ones are for few rows an
// expert, where the bytes of weights bound some experts and the multiplications others: sorted,
// these would not overlap.
constexpr int kSortedTileRows = 128;
// And where there are no more than this, since each is compared with all: for 256 that is 2048
// loads of a warp from shared memory, one a cycle.
constexpr int kMostSortedExperts = 256;

struct Params {
  const int32_t* experts;
  RoutingBuffers buffers;
  int32_t slots;
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
  return {
      __shfl_up_sync(kFullWarp, v.rows, delta),
      {__shfl_up_sync(kFullWarp, v.tiles[0], delta), __shfl_up_sync(kFullWarp, v.tiles[1], delta)}};
}

__device__ Extent WarpInclusiveScan(Extent v, int lane) {
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const Extent below = ShuffleUp(v, delta);
    if (lane >= delta) v = v + below;
  }
  return v;
}

// Of a slot, or -1.
__device__ int32_t ExpertOf(const Params& p, int32_t slot) {
  return LocalExpert(p.experts[slot], p.first_expert, p.num_experts);
}

__device__ void PlaceSlot(const Params& p, int32_t slot, int32_t row) {
  p.buffers.slot_to_row[slot] = row;
  if (row >= 0) p.buffers.row_to_slot[row] = slot;
}

// From counts[e], by the whole block: order[i], the expert whose rows and tiles are the i-th. Those
// with the most rows are first: neighbors then have as many tiles, and as full ones, so that
// blocks which walk the list in strides get alike shares, and the smallest are left for the end.
// `keys` has room for one an expert; the arrays are in shared memory.
__device__ void OrderExperts(const Params& p, const int32_t* counts, int32_t* keys,
                             uint16_t* order) {
  static_assert(kMaxLocalExperts <= 1 << 11, "a key has 11 bits for the expert");
  const bool sort = p.num_experts <= kMostSortedExperts &&
                    max(p.buffers.tile_rows[0], p.buffers.tile_rows[1]) >= kSortedTileRows;
  for (int e = threadIdx.x; e < p.num_experts; e += kThreads) {
    order[e] = static_cast<uint16_t>(e);
    // By rows (beyond 2^20 all alike), then by number: no two experts have the same.
    keys[e] = min(counts[e], (1 << 20) - 1) << 11 | ((1 << 11) - 1 - e);
  }
  __syncthreads();
  if (sort) {
    for (int e = threadIdx.x; e < p.num_experts; e += kThreads) {
      const int32_t own = keys[e];
      int before = 0;
#pragma unroll 8
      for (int other = 0; other < p.num_experts; ++other) before += keys[other] > own ? 1 : 0;
      order[before] = static_cast<uint16_t>(e);
    }
    __syncthreads();
  }
}

// By the whole block: row_begin[e], first_tile[2 * i + list] of the i-th expert, and their totals.
// The arrays are in shared memory.
__device__ void ScanExperts(const Params& p, const int32_t* counts, const uint16_t* order,
                            int32_t* row_begin, int32_t* first_tile, Extent& total) {
  __shared__ Extent warp_sums[kWarps];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;

  Extent carry = {};
  for (int i0 = 0; i0 < p.num_experts; i0 += kThreads) {
    const int i = i0 + threadIdx.x;
    const int e = i < p.num_experts ? order[i] : 0;
    const int32_t count = i < p.num_experts ? counts[e] : 0;
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
    if (i < p.num_experts) {
      row_begin[e] = inclusive.rows - own.rows;
      first_tile[2 * i] = inclusive.tiles[0] - own.tiles[0];
      first_tile[2 * i + 1] = inclusive.tiles[1] - own.tiles[1];
    }
    carry = carry + warp_sums[kWarps - 1];
    __syncthreads();  // before warp_sums is written again, and for row_begin's readers
  }
  total = carry;
}

// Writes both tile lists, each thread some entries: it finds the expert of an entry by bisection,
// which costs the same whether one expert has all tiles or each has one.
__device__ void WriteTileLists(const Params& p, const int32_t* counts, const uint16_t* order,
                               const int32_t* row_begin, const int32_t* first_tile,
                               const Extent& total) {
  if (threadIdx.x < 2) p.buffers.num_row_tiles[threadIdx.x] = total.tiles[threadIdx.x];
#pragma unroll
  for (int list = 0; list < 2; ++list) {
    for (int tile = threadIdx.x; tile < total.tiles[list]; tile += kThreads) {
      // The last place whose first tile is not beyond this one; experts without tiles share
      // their first tile with the next that has some, and come before it, or are the last.
      int low = 0;
      int high = p.num_experts;
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (first_tile[2 * middle + list] <= tile) {
          low = middle;
        } else {
          high = middle;
        }
      }
      const int e = order[low];
      p.buffers.row_tiles[list][tile] = {e, first_tile[2 * low + list], row_begin[e],
                                         row_begin[e] + counts[e]};
    }
  }
}

extern __shared__ int32_t shared_experts[];

__global__ void __launch_bounds__(kThreads) RouteInOneLaunchKernel(Params p) {
  int32_t* counts = shared_experts;
  int32_t* earlier = counts + p.num_experts;  // of the slots before this block's share
  int32_t* row_begin = earlier + p.num_experts;
  int32_t* first_tile = row_begin + p.num_experts;
  auto* order = reinterpret_cast<uint16_t*>(first_tile + 2 * p.num_experts);

  for (int e = threadIdx.x; e < p.num_experts; e += kThreads) {
    counts[e] = 0;
    earlier[e] = 0;
  }
  __syncthreads();
  const int32_t share_begin = blockIdx.x * kSlotsPerBlock;
  for (int32_t slot = threadIdx.x; slot < p.slots; slot += kThreads) {
    const int32_t expert = ExpertOf(p, slot);
    if (expert < 0) continue;
    atomicAdd(&counts[expert], 1);
    if (slot < share_begin) atomicAdd(&earlier[expert], 1);
  }
  __syncthreads();
  Extent total;
  OrderExperts(p, counts, first_tile, order);
  ScanExperts(p, counts, order, row_begin, first_tile, total);

  const int32_t own_slot = share_begin + threadIdx.x;
  if (own_slot < p.slots) {
    const int32_t expert = ExpertOf(p, own_slot);
    PlaceSlot(p, own_slot, expert >= 0 ? row_begin[expert] + atomicAdd(&earlier[expert], 1) : -1);
  }
  if (blockIdx.x == gridDim.x - 1) WriteTileLists(p, counts, order, row_begin, first_tile, total);
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
    const int32_t expert = ExpertOf(p, static_cast<int32_t>(slot));
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
  auto* order = reinterpret_cast<uint16_t*>(first_tile + 2 * p.num_experts);
  for (int e = threadIdx.x; e < p.num_experts; e += kThreads) {
    int32_t sum = 0;
#pragma unroll 8
    for (int b = 0; b < p.blocks; ++b) {
      sum += p.buffers.expert_counts[static_cast<int64_t>(b) * p.num_experts + e];
    }
    counts[e] = sum;
  }
  __syncthreads();
  Extent total;
  OrderExperts(p, counts, first_tile, order);
  ScanExperts(p, counts, order, row_begin, first_tile, total);
  WriteTileLists(p, counts, order, row_begin, first_tile, total);
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
    const int32_t expert = ExpertOf(p, static_cast<int32_t>(slot));
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
  p.first_expert = problem.first_local_expert;
  p.num_experts = problem.num_local_experts;
  const size_t num_experts = p.num_experts;
  if (p.slots <= kSlotsInOneLaunch) {
    const int blocks = (p.slots + kSlotsPerBlock - 1) / kSlotsPerBlock;
    RouteInOneLaunchKernel<<<blocks, kThreads, num_experts * kBytesInOneLaunch, stream>>>(p);
    return cudaGetLastError();
  }
  p.blocks = RoutingBlocks(problem);
  p.slots_per_block = (p.slots - 1) / p.blocks + 1;
  // Rounding up may leave the last blocks nothing: drop them.
  p.blocks = (p.slots - 1) / p.slots_per_block + 1;
  CountKernel<<<p.blocks, kThreads, num_experts * sizeof(int32_t), stream>>>(p);
  PlanKernel<<<1, kThreads, num_experts * kBytesToPlan, stream>>>(p);
  ScatterKernel<<<p.blocks, kThreads, num_experts * sizeof(int32_t), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace moe
