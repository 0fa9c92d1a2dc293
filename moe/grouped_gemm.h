// SPDX-License-Identifier: Apache-2.0
//
// One grouped GEMM as a backend sees it: for every row r of expert e
//
//     h[n]      = sum_k a[source(r), k] * weights[e, n, k] * weight_scales[e, n]  + bias[e, n]
//                 (4-bit weights: weight_scales[e, n, k / group_size], inside the sum)
//     out[r, c] = row_scale(r) * activation(h)[c]
//
// GEMM 1 gathers its rows from the input, source(r) = row_slot[r] / top_k, the row's token, and
// applies the layer's activation. GEMM 2 reads the intermediate rows in place, source(r) = r,
// applies Identity and scales each row by the router's weight, slot_scales[row_slot[r]].
// Products and sums are float32.

#ifndef MOE_GROUPED_GEMM_H_
#define MOE_GROUPED_GEMM_H_

#include <cstdint>

#include "moe/problem.h"
#include "moe/row_tile.h"

namespace moe {

struct GroupedGemm {
  const void* a = nullptr;  // [*, k] dtype
  bool gather = false;      // rows of `a` are tokens
  int32_t top_k = 1;
  const void* weights = nullptr;  // [experts, fc rows, k]; with a gate [up rows; gate rows]
  // [experts, fc rows], for 4-bit weights [experts, fc rows, k / group_size]; null for 16-bit ones
  const void* weight_scales = nullptr;
  const void* bias = nullptr;              // [experts, fc rows]; may be null
  const float* swiglu_alpha = nullptr;     // [experts]; null: 1
  const float* swiglu_beta = nullptr;      // [experts]; null: 0
  const float* swiglu_limit = nullptr;     // [experts]; null: infinity, 7 for SwigluStep
  const int32_t* row_slot = nullptr;       // [rows]
  const float* slot_scales = nullptr;      // [slots]; null: 1, as where rows are gathered
  void* out = nullptr;                     // [rows, columns] out_dtype
  const RowTile* row_tiles = nullptr;      // device list
  const int32_t* num_row_tiles = nullptr;  // device scalar
  int64_t max_row_tiles = 0;               // host bound of it, for the grid
  int32_t columns = 0;                     // of out: I for GEMM 1, H for GEMM 2
  int32_t k = 0;                           // reduction length: H for GEMM 1, I for GEMM 2
  Activation activation = Activation::kIdentity;
  DType dtype = DType::kBFloat16;
  DType out_dtype = DType::kBFloat16;
  DType bias_dtype = DType::kBFloat16;
  DType weight_scale_dtype = DType::kFloat32;
  WeightFormat weight_format = WeightFormat::kSameAsInput;
  int32_t group_size = 0;
};

}  // namespace moe

#endif  // MOE_GROUPED_GEMM_H_
