// SPDX-License-Identifier: Apache-2.0
//
// How a token's rows are added, whether the layer takes four launches or one.

#ifndef MOE_SUM_ROWS_CUH_
#define MOE_SUM_ROWS_CUH_

#include <cstdint>

#include "moe/numeric.cuh"
#include "moe/problem.h"

namespace moe {

// Eight columns of a token: the sum of its rows, in float32 and in the order of its choices,
// rounded once. row_of(j) is the row of choice j, or -1 where it has none; load(row) fetches the
// columns. The loads of kRowsInFlight rows are issued together before they are added.
template <DType kDType, int kRowsInFlight, typename RowOf, typename Load>
__device__ __forceinline__ uint4 SumRows(int top_k, RowOf&& row_of, Load&& load) {
  float2 sum[4] = {};
#pragma unroll 1
  for (int j0 = 0; j0 < top_k; j0 += kRowsInFlight) {
    uint4 loaded[kRowsInFlight];
    bool present[kRowsInFlight];
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      const int32_t row = j0 + j < top_k ? row_of(j0 + j) : -1;
      present[j] = row >= 0;
      if (present[j]) loaded[j] = load(row);
    }
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      if (!present[j]) continue;
      const uint32_t words[4] = {loaded[j].x, loaded[j].y, loaded[j].z, loaded[j].w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float2 v = ToFloat2(AsPair<ElementOf<kDType>>(words[c]));
        sum[c].x += v.x;
        sum[c].y += v.y;
      }
    }
  }
  uint32_t words[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) words[c] = PackPair(sum[c].x, sum[c].y, kDType);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace moe

#endif  // MOE_SUM_ROWS_CUH_
