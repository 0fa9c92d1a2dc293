// SPDX-License-Identifier: Apache-2.0
//
// One call: route, GEMM 1, GEMM 2, finalize, all on the caller's stream, without waiting for
// the device and without allocating.

#ifndef MOE_LAYER_H_
#define MOE_LAYER_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "moe/backend.h"
#include "moe/problem.h"

namespace moe {

// Device pointers. Shapes are those of `Problem`; null where optional and absent.
struct LayerArguments {
  const void* input = nullptr;        // [M, H] dtype
  const int32_t* experts = nullptr;   // [M, k] global ids, any value
  const float* scales = nullptr;      // [M, k]; null: 1
  const void* fc1_weights = nullptr;  // [E_l, 2I or I, H]
  const void* fc2_weights = nullptr;  // [E_l, H, I]
  const void* fc1_scales = nullptr;   // [E_l, 2I or I], of 4-bit weights [E_l, 2I or I, H / group]
  const void* fc2_scales = nullptr;   // [E_l, H], of 4-bit weights [E_l, H, I / group]
  DType weight_scale_dtype = DType::kFloat32;
  const void* fc1_bias = nullptr;       // [E_l, 2I or I] output_dtype
  const void* fc2_bias = nullptr;       // [E_l, H] output_dtype
  const float* swiglu_alpha = nullptr;  // [E_l]
  const float* swiglu_beta = nullptr;   // [E_l]
  const float* swiglu_limit = nullptr;  // [E_l]
  void* output = nullptr;               // [M, H] output_dtype
  void* workspace = nullptr;            // PlanWorkspace(problem).bytes
  size_t workspace_bytes = 0;
};

// The current device's numbers. Throws std::runtime_error if there is none.
Device CurrentDevice();

// Launches the layer. Throws std::invalid_argument on what no caller may pass (a workspace too
// small, a tactic that does not fit) and std::runtime_error, naming the step, on a CUDA error.
void RunLayer(const Backend& backend, const Problem& problem, const LayerArguments& arguments,
              const TacticPair& tactics, const Device& device, cudaStream_t stream);

}  // namespace moe

#endif  // MOE_LAYER_H_
