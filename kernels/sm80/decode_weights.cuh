// SPDX-License-Identifier: Apache-2.0
//
// 4-bit weights to 16-bit floats for the few-token layer, which may take k in any order: eight
// weights go to four pairs that are not neighbours. Weight i goes with i + 4, which lies 16 bits
// apart from it in the word, so shifts and masks are all that moves them, and the tokens are put
// into the same order, once for all rows. (dequantize.cuh keeps the order, for which each pair is
// put together by a permutation of bytes. These and shifts, masks and comparisons share a pipe of
// half the issue rate.)
//
// Operations a weight, and those on that pipe:
//   INT4   times its scale    fp16: 1.6, 0.6   bf16: 1.9, 0.9
//          as it is           fp16: 1.1, 0.6   bf16: 0.9, 0.9
//   MXFP4  times its scale    2.4, 1.3: a multiplier shifts to the left

#ifndef KERNELS_SM80_DECODE_WEIGHTS_CUH_
#define KERNELS_SM80_DECODE_WEIGHTS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "kernels/common/dequantize.cuh"
#include "kernels/common/weight_kind.h"

namespace moe::sm80 {

// 16 bytes that nobody will want again, past L1; what is there where they are not wanted now.
__device__ inline void LoadOnce(const uint4* p, bool wanted, uint4& v) {
  asm volatile(
      "{ .reg .pred wanted;\n"
      "  setp.ne.s32 wanted, %5, 0;\n"
      "  @wanted ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4]; }"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(p), "r"(static_cast<int>(wanted)));
}

// Eight values of a token, in the weights' order.
__device__ inline void SpreadToken(const uint4& v, uint32_t (&pair)[4]) {
  pair[0] = __byte_perm(v.x, v.z, 0x5410);
  pair[1] = __byte_perm(v.x, v.z, 0x7632);
  pair[2] = __byte_perm(v.y, v.w, 0x5410);
  pair[3] = __byte_perm(v.y, v.w, 0x7632);
}

// Eight INT4 weights u = q + 8, as q + kInt4Excess.
template <typename Element>
inline constexpr float kInt4Excess = std::is_same_v<Element, __half> ? 0 : 136;  // 128 + 8

// 1024 + u or, where the nibble stays 4 bits up, 64 + u, to q in one subtraction.
__device__ inline void SpreadInt4(uint32_t word, __half, uint32_t (&pair)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t spread = word >> 4 * i;
    pair[i] = Subtract<__half>(MaskOr<0x000f000fu>(spread, 0x64006400u), 0x64086408u);
    pair[i + 1] = Subtract<__half>(MaskOr<0x00f000f0u>(spread, 0x54005400u), 0x54805480u);
  }
}

// 128 + u: with 7 bits of mantissa, every nibble has to come down to the lowest bits.
__device__ inline void SpreadInt4(uint32_t word, __nv_bfloat16, uint32_t (&pair)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) pair[i] = MaskOr<0x000f000fu>(word >> 4 * i, 0x43004300u);
}

// Eight weights times `scale`, which is what GroupScales gives: the numbers of Dequantizer.
template <typename Element, WeightKind kKind>
__device__ inline void SpreadScaled(uint32_t word, uint32_t scale, uint32_t (&pair)[4]) {
  static_assert(HasGroups(kKind), "4-bit weights");
  if constexpr (kKind == WeightKind::kInt4) {
    SpreadInt4(word, Element{}, pair);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kInt4Excess<Element> != 0) {
        pair[i] = Subtract<Element>(pair[i], 0x43084308u);
      }
      pair[i] = Multiply<Element>(pair[i], scale);
    }
  } else {
    // The sign to the highest bit; the others, as in DequantizeMxfp4, to bit 9 (fp16) or 6 (bf16).
    constexpr bool kHalf = std::is_same_v<Element, __half>;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t sign = word << (12 - 4 * i);
      const int up = (kHalf ? 9 : 6) - 4 * i;
      const uint32_t magnitude =
          (up > 0 ? word << up : word >> -up) & (kHalf ? 0x0e000e00u : 0x01c001c0u);
      pair[i] = Multiply<Element>(MaskOr<0x80008000u>(sign, magnitude), scale);
    }
  }
}

}  // namespace moe::sm80

#endif  // KERNELS_SM80_DECODE_WEIGHTS_CUH_
