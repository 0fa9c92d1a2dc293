// SPDX-License-Identifier: Apache-2.0
//
// The finalize step as the tail of GEMM 2 (FusedFinalize in moe/grouped_gemm.h).

#ifndef KERNELS_COMMON_FUSED_FINALIZE_CUH_
#define KERNELS_COMMON_FUSED_FINALIZE_CUH_

#include <cstdint>

#include "kernels/common/numeric.cuh"
#include "moe/grouped_gemm.h"

namespace moe {

// Called by a whole block once it has stored its rows of a tile. Counts them in, and sums those
// tokens that are complete in this column tile: each is complete for exactly one block.
template <int kTileM, int kTileColumns>
__device__ void FinalizeTile(const GroupedGemm& gemm, int row_begin, int rows, int column,
                             int column_tiles) {
  const FusedFinalize& finalize = gemm.finalize;
  const int top_k = gemm.top_k;
  __shared__ int32_t complete[kTileM];  // token of a row, or -1
  // Every thread's part of the rows is visible to all before the first of them is counted.
  __threadfence();
  __syncthreads();
  if (threadIdx.x < kTileM) {
    int32_t token = -1;
    if (threadIdx.x < rows) {
      const int32_t candidate = gemm.row_slot[row_begin + threadIdx.x] / top_k;
      int32_t expected = 0;
      for (int j = 0; j < top_k; ++j) {
        expected += finalize.slot_to_row[candidate * top_k + j] >= 0 ? 1 : 0;
      }
      int32_t* arrivals = finalize.arrivals + candidate * column_tiles + column / kTileColumns;
      if (atomicAdd(arrivals, 1) + 1 == expected) token = candidate;
    }
    complete[threadIdx.x] = token;
  }
  __syncthreads();
  __threadfence();

  constexpr int kVectors = kTileColumns / 8;
  for (int i = threadIdx.x; i < rows * kVectors; i += blockDim.x) {
    const int64_t token = complete[i / kVectors];
    const int first = column + i % kVectors * 8;
    if (token < 0 || first >= gemm.columns) continue;
    float sum[8] = {};
    for (int j = 0; j < top_k; ++j) {
      const int64_t row = finalize.slot_to_row[token * top_k + j];
      if (row < 0) continue;
      // Past L1, which may hold what was there before other blocks wrote.
      const uint4 loaded = __ldcg(reinterpret_cast<const uint4*>(
          static_cast<const uint16_t*>(gemm.out) + row * gemm.columns + first));
      const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float2 value = UnpackPair(words[c], gemm.out_dtype);
        sum[2 * c] += value.x;
        sum[2 * c + 1] += value.y;
      }
    }
    StoreVector(static_cast<uint16_t*>(finalize.output) + token * gemm.columns + first, sum,
                gemm.out_dtype);
  }
}

}  // namespace moe

#endif  // KERNELS_COMMON_FUSED_FINALIZE_CUH_
