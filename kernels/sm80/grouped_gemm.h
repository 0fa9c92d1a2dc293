// SPDX-License-Identifier: Apache-2.0
//
// The launchers of the sm80 kernels, one for each (tile, dtype, kind of weights). Each is defined
// in an object file of its own, so that kernels compile in parallel and are cached apart.

#ifndef KERNELS_SM80_GROUPED_GEMM_H_
#define KERNELS_SM80_GROUPED_GEMM_H_

#include <cuda_runtime_api.h>

#include "kernels/common/weight_kind.h"
#include "moe/grouped_gemm.h"

namespace moe::sm80 {

// Launches at most `blocks` blocks.
template <int kTileIndex, DType kDType, WeightKind kKind>
cudaError_t LaunchGroupedGemm(const GroupedGemm& gemm, int blocks, cudaStream_t stream);

}  // namespace moe::sm80

#endif  // KERNELS_SM80_GROUPED_GEMM_H_
