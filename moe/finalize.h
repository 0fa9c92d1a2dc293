// SPDX-License-Identifier: Apache-2.0
//
// Step 4 of a call: out[t] = sum over j < k of expert_output[slot_to_row[t * k + j]], in float32
// and in this order, hence the same bits every run. Scales and biases are already in the rows.

#ifndef MOE_FINALIZE_H_
#define MOE_FINALIZE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "moe/problem.h"

namespace moe {

// expert_output: [rows, H] output_dtype; slot_to_row: [M, k]; output: [M, H] output_dtype.
// A token with no expert here gets zeros.
cudaError_t LaunchFinalize(const Problem& problem, const void* expert_output,
                           const int32_t* slot_to_row, void* output, cudaStream_t stream);

}  // namespace moe

#endif  // MOE_FINALIZE_H_
