// SPDX-License-Identifier: Apache-2.0
//
// 8-bit integers to 16-bit floats in registers, exactly, without integer-to-float conversions
// (which issue at a quarter of the rate or less): bytes are moved under a floating-point
// exponent and the excess is subtracted.

#ifndef KERNELS_COMMON_DEQUANTIZE_CUH_
#define KERNELS_COMMON_DEQUANTIZE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "moe/problem.h"

namespace moe {

// (a & mask) ^ flip in one instruction.
__device__ inline uint32_t MaskFlip(uint32_t a, uint32_t mask, uint32_t flip) {
  uint32_t out;
  constexpr int kTruth = (0xf0 & 0xcc) ^ 0xaa;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(out) : "r"(a), "r"(mask), "r"(flip), "n"(kTruth));
  return out;
}

// What a kernel is given, from the host, to tell int8 (q) from uint8 (u = q + 128): bits to flip
// before (fp16) or after (bf16) the bytes are spread.
inline uint32_t WeightFlip(DType dtype, WeightFormat format) {
  const bool has_offset = format == WeightFormat::kUint8;
  if (dtype == DType::kFloat16) return has_offset ? 0 : 0x80808080u;
  return has_offset ? 0x00800080u : 0;
}

// Four bytes to two pairs: pair[0] from bytes 0 and 1, pair[1] from bytes 2 and 3.

// 1024 + u is 0x6400 | u in fp16; int8 becomes u by flipping its sign bit.
__device__ inline void DequantizeBytes(uint32_t bytes, uint32_t flip, __half, uint32_t (&pair)[2]) {
  const uint32_t u = bytes ^ flip;
  const __half2 excess = __half2half2(__ushort_as_half(0x6480));  // 1024 + 128
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t magic = __byte_perm(u, 0x64646464u, i == 0 ? 0x4140 : 0x4342);
    const __half2 value = __hsub2(reinterpret_cast<const __half2&>(magic), excess);
    pair[i] = reinterpret_cast<const uint32_t&>(value);
  }
}

// bf16 has 7 stored mantissa bits, one too few for 128 + u. Split q = low - 128 * sign:
// 0x4300 | low is 128 + low, and 0x4300 | (sign << 7) is 128 or 256; their difference is q. uint8
// has the sign the other way round.
__device__ inline void DequantizeBytes(uint32_t bytes, uint32_t flip, __nv_bfloat16,
                                       uint32_t (&pair)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t spread = __byte_perm(bytes, 0x43434343u, i == 0 ? 0x4140 : 0x4342);
    const uint32_t low = spread & 0xff7fff7fu;
    const uint32_t sign = MaskFlip(spread, 0xff80ff80u, flip);
    const __nv_bfloat162 value = __hsub2(reinterpret_cast<const __nv_bfloat162&>(low),
                                         reinterpret_cast<const __nv_bfloat162&>(sign));
    pair[i] = reinterpret_cast<const uint32_t&>(value);
  }
}

}  // namespace moe

#endif  // KERNELS_COMMON_DEQUANTIZE_CUH_
