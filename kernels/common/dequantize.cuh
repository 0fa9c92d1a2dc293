// SPDX-License-Identifier: Apache-2.0
//
// Stored weights to 16-bit floats in registers, without integer-to-float conversions (which
// issue at a quarter of the rate or less): bits are moved under a floating-point exponent and the
// excess is subtracted, exactly. All keep the order of k.
//
// Operations a weight, with what permutes the bytes: 8 bits: 1.25 (fp16), 2 (bf16); INT4 with its
// group's scale: 2 (fp16), 2.1 (bf16), without: 1.5 and 1.6; MXFP4: 2.6.

#ifndef KERNELS_COMMON_DEQUANTIZE_CUH_
#define KERNELS_COMMON_DEQUANTIZE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "kernels/common/weight_kind.h"
#include "moe/numeric.cuh"
#include "moe/problem.h"

namespace moe {

// What a kernel is given, from the host, to tell int8 (q) from uint8 (u = q + 128): bits to flip
// before (fp16) or after (bf16) the bytes are spread.
inline uint32_t WeightFlip(DType dtype, WeightFormat format) {
  const bool has_offset = format == WeightFormat::kUint8;
  if (dtype == DType::kFloat16) return has_offset ? 0 : 0x80808080u;
  return has_offset ? 0x00800080u : 0;
}

// (a & mask) ^ flip and (a & mask) | bits, each in one instruction, the mask part of it.
template <uint32_t kMask>
__device__ inline uint32_t MaskFlip(uint32_t a, uint32_t flip) {
  uint32_t out;
  constexpr int kTruth = (0xf0 & 0xcc) ^ 0xaa;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(out) : "r"(a), "n"(kMask), "r"(flip), "n"(kTruth));
  return out;
}
template <uint32_t kMask>
__device__ inline uint32_t MaskOr(uint32_t a, uint32_t bits) {
  uint32_t out;
  constexpr int kTruth = (0xf0 & 0xcc) | 0xaa;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(out) : "r"(a), "n"(kMask), "r"(bits), "n"(kTruth));
  return out;
}

// Arithmetic on two 16-bit floats in a register.
template <typename Pair>
__device__ inline uint32_t AsBits(const Pair& pair) {
  return reinterpret_cast<const uint32_t&>(pair);
}
template <typename Element>
__device__ inline uint32_t Subtract(uint32_t a, uint32_t b) {
  return AsBits(__hsub2(AsPair<Element>(a), AsPair<Element>(b)));
}
template <typename Element>
__device__ inline uint32_t Multiply(uint32_t a, uint32_t b) {
  return AsBits(__hmul2(AsPair<Element>(a), AsPair<Element>(b)));
}

// Four bytes to two pairs: pair[0] from bytes 0 and 1, pair[1] from bytes 2 and 3.

// What that takes besides the bytes.
struct ByteContext {
  uint32_t flip;
  uint32_t exponent;  // the upper byte of what they become, four times
};

template <typename Element>
inline constexpr uint32_t kByteExponent = std::is_same_v<Element, __half> ? 0x64646464 : 0x43434343;

// With the exponent in a register. As a constant, beside the constant that selects bytes, it is one
// more than byte_perm's instruction can hold: each was preceded by another that moved one of them.
template <typename Element>
__device__ inline ByteContext MakeByteContext(uint32_t flip) {
  uint32_t lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  const uint32_t zero = lane / 32;  // which the compiler does not know
  return {flip, kByteExponent<Element> + zero};
}

// 1024 + u is 0x6400 | u in fp16; int8 becomes u by flipping its sign bit.
__device__ inline void DequantizeBytes(uint32_t bytes, ByteContext context, __half,
                                       uint32_t (&pair)[2]) {
  const uint32_t u = bytes ^ context.flip;
  constexpr uint32_t kExcess = 0x64806480u;  // 1024 + 128
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t magic = __byte_perm(u, context.exponent, i == 0 ? 0x4140 : 0x4342);
    pair[i] = Subtract<__half>(magic, kExcess);
  }
}

// bf16 has 7 stored mantissa bits, one too few for 128 + u. Split q = low - 128 * sign:
// 0x4300 | low is 128 + low, and 0x4300 | (sign << 7) is 128 or 256; their difference is q. uint8
// has the sign the other way round.
__device__ inline void DequantizeBytes(uint32_t bytes, ByteContext context, __nv_bfloat16,
                                       uint32_t (&pair)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t spread = __byte_perm(bytes, context.exponent, i == 0 ? 0x4140 : 0x4342);
    const uint32_t low = spread & 0xff7fff7fu;
    const uint32_t sign = MaskFlip<0xff80ff80u>(spread, context.flip);
    pair[i] = Subtract<__nv_bfloat16>(low, sign);
  }
}

// Eight INT4 weights, u = q + 8, to four pairs of q.

// The odd weight of a byte stays where it is, 4 bits up: 1024 + 16 u, to be divided by 16.
__device__ inline void CenterInt4(uint32_t word, __half, uint32_t (&pair)[4]) {
  constexpr uint32_t kFactor = 0x2c003c00u;  // 1, 1/16
  constexpr uint32_t kExcess = 0xd480e408u;  // -(1024 + 8), -(64 + 8)
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t magic = __byte_perm(word, 0x64646464u, 0x4040 | i | i << 8) & 0xfff0ff0fu;
    pair[i] =
        AsBits(__hfma2(AsPair<__half>(magic), AsPair<__half>(kFactor), AsPair<__half>(kExcess)));
  }
}

__device__ inline void CenterInt4(uint32_t word, __nv_bfloat16, uint32_t (&pair)[4]) {
  const uint32_t odd = word >> 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t spread = __byte_perm(word, odd, i | i << 4 | (4 + i) << 8 | (4 + i) << 12);
    const uint32_t magic = MaskOr<0x000f000fu>(spread, 0x43004300u);  // 128 + u
    pair[i] = Subtract<__nv_bfloat16>(magic, 0x43084308u);
  }
}

// To four pairs of q * scale. `scale` is what GroupScales gives.
template <typename Element>
__device__ inline void DequantizeInt4(uint32_t word, uint32_t scale, Element element,
                                      uint32_t (&pair)[4]) {
  CenterInt4(word, element, pair);
#pragma unroll
  for (int i = 0; i < 4; ++i) pair[i] = Multiply<Element>(pair[i], scale);
}

// Eight MXFP4 weights to four pairs. The sign and the three other bits of an e2m1 number are moved
// under the sign and the lowest exponent bits of the 16-bit format, subnormals included: that
// is the number times 2^-14 (fp16) or 2^-126 (bf16), which `scale` makes up for.
template <typename Element>
__device__ inline void DequantizeMxfp4(uint32_t word, uint32_t scale, Element,
                                       uint32_t (&pair)[4]) {
  constexpr bool kHalf = std::is_same_v<Element, __half>;
  const uint32_t even = word << 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t spread = __byte_perm(even, word, i | i << 4 | (4 + i) << 8 | (4 + i) << 12);
    const uint32_t magnitude = kHalf ? spread >> 3 & 0x0e000e00u : spread >> 6 & 0x01c001c0u;
    pair[i] = Multiply<Element>(MaskOr<0x80008000u>(spread, magnitude), scale);
  }
}

// fp16 cannot hold every scale or every scaled weight, and an e2m1 number carries an exponent of
// its own. So 4-bit weights come out times a power of two, and sums are multiplied by this:
//   INT4   fp16: exact for scales from 2^-22 to 2^4
//   MXFP4  fp16: exact for scales from 2^-19 to 2^5; bf16: from 2^-93 to 2^33
// Smaller ones lose bits, as fp16 does, larger ones give infinities.
template <typename Element, WeightKind kKind>
inline constexpr float kUnscale =
    kKind == WeightKind::kInt4    ? (std::is_same_v<Element, __half> ? 1.0f / 256 : 1.0f)
    : kKind == WeightKind::kMxfp4 ? (std::is_same_v<Element, __half> ? 16.0f : 4294967296.0f)
                                  : 1.0f;

// The stored bits of several groups' scales. They are all of one dtype, on which one branch is
// taken.
template <WeightKind kKind, int kCount>
__device__ inline void LoadScaleBits(const void* scales, const uint32_t (&index)[kCount],
                                     DType dtype, uint32_t (&bits)[kCount]) {
  if constexpr (kKind == WeightKind::kMxfp4) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      bits[i] = __ldg(static_cast<const uint8_t*>(scales) + index[i]);
    }
  } else if (dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      bits[i] = __ldg(static_cast<const uint32_t*>(scales) + index[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      bits[i] = __ldg(static_cast<const uint16_t*>(scales) + index[i]);
    }
  }
}

// What the weights of each group are multiplied by, in both halves of a register.
template <typename Element, WeightKind kKind, int kCount>
__device__ inline void GroupScales(const uint32_t (&bits)[kCount], DType dtype,
                                   uint32_t (&factor)[kCount]) {
  static_assert(HasGroups(kKind), "other scales belong to channels");
  constexpr bool kHalf = std::is_same_v<Element, __half>;
  float scale[kCount];
  if constexpr (kKind == WeightKind::kMxfp4) {
    // 2^(bits - 127): an E8M0 number is the exponent field of a float32.
    constexpr float kShift = kHalf ? 1024.0f : 19807040628566084398385987584.0f;  // 2^10, 2^94
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      // Of which 255 is infinity, where E8M0 has its NaN.
      scale[i] = __uint_as_float(bits[i] == 255 ? 0x7fffffffu : bits[i] << 23) * kShift;
    }
  } else if (dtype == DType::kFloat16) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      scale[i] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits[i])));
    }
  } else {
    const int shift = dtype == DType::kFloat32 ? 0 : 16;
#pragma unroll
    for (int i = 0; i < kCount; ++i) scale[i] = __uint_as_float(bits[i] << shift);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (kHalf) {
      factor[i] =
          AsBits(__float2half2_rn(kKind == WeightKind::kInt4 ? scale[i] * 256.0f : scale[i]));
    } else {
      factor[i] = AsBits(__float2bfloat162_rn(scale[i]));
    }
  }
}

// One 32-bit word of stored weights to pairs of 16-bit floats, in a context: for 4 bits the scale of
// the group, as GroupScales gives it.
template <typename Element, WeightKind kKind>
struct Dequantizer {
  static constexpr int kPairs = 16 / WeightBits(kKind);
  using Context = std::conditional_t<kKind == WeightKind::k8Bit, ByteContext, uint32_t>;

  // The context of weights that have no groups, from what WeightFlip() gave.
  __device__ static Context Ungrouped(uint32_t flip) {
    if constexpr (kKind == WeightKind::k8Bit) {
      return MakeByteContext<Element>(flip);
    } else {
      return 0;
    }
  }

  __device__ static void Word(uint32_t word, Context context, uint32_t (&pair)[kPairs]) {
    if constexpr (kKind == WeightKind::k16Bit) {
      pair[0] = word;
    } else if constexpr (kKind == WeightKind::k8Bit) {
      DequantizeBytes(word, context, Element{}, pair);
    } else if constexpr (kKind == WeightKind::kInt4) {
      DequantizeInt4(word, context, Element{}, pair);
    } else {
      DequantizeMxfp4(word, context, Element{}, pair);
    }
  }
};
template <typename Element, WeightKind kKind>
using WeightContext = typename Dequantizer<Element, kKind>::Context;

}  // namespace moe

#endif  // KERNELS_COMMON_DEQUANTIZE_CUH_
