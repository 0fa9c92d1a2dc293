// SPDX-License-Identifier: Apache-2.0
//
// The instructions of the tensor cores and what feeds them.

#ifndef KERNELS_SM80_MMA_CUH_
#define KERNELS_SM80_MMA_CUH_

#include <cstdint>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <type_traits>

namespace moe::sm80 {

template <typename Element>
using Mma = std::conditional_t<std::is_same_v<Element, __half>, cute::SM80_16x8x16_F32F16F16F32_TN,
                               cute::SM80_16x8x16_F32BF16BF16F32_TN>;

// As many matrices as there are registers. An address in shared memory, or a pointer to it.
__device__ inline void Ldmatrix(uint32_t shared, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared));
}

__device__ inline void Ldmatrix(const char* shared, uint32_t (&r)[4]) {
  cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(shared), r[0], r[1], r[2],
                                r[3]);
}

__device__ inline void Ldmatrix(const char* shared, uint32_t (&r)[2]) {
  cute::SM75_U32x2_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(shared), r[0], r[1]);
}

}  // namespace moe::sm80

#endif  // KERNELS_SM80_MMA_CUH_
