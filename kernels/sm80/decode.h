// SPDX-License-Identifier: Apache-2.0
//
// The whole layer in one launch, for few tokens: what the kernel is told, and its launchers.

#ifndef KERNELS_SM80_DECODE_H_
#define KERNELS_SM80_DECODE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/weight_kind.h"
#include "kernels/sm80/decode_kernels.h"
#include "moe/grouped_gemm.h"

namespace moe::sm80 {

// The row lists of the two products are not used: blocks route for themselves, and the rows of
// the intermediate values and of the experts' outputs are slots.
struct DecodeLayer {
  GroupedGemm gemm[2];
  const int32_t* experts = nullptr;  // [tokens, top_k] global ids, any value
  int32_t num_tokens = 0;
  int32_t first_expert = 0;  // ids [first, first + num_experts) are computed
  int32_t num_experts = 0;
  void* output = nullptr;       // [tokens, columns of GEMM 2]
  int32_t* counters = nullptr;  // [DecodeCounters(slots)], of anything
};

// Launches `blocks` blocks, all of which must fit the chip at once. `kernel` is an index into
// kDecodeTokenBlocks.
template <DType kDType, WeightKind kKind>
cudaError_t LaunchDecodeLayer(int kernel, const DecodeLayer& layer, int blocks,
                              cudaStream_t stream);

}  // namespace moe::sm80

#endif  // KERNELS_SM80_DECODE_H_
