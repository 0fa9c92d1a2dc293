// SPDX-License-Identifier: Apache-2.0
//
// Conversions between 16-bit storage and float32 arithmetic, addresses, and words of vectors.

#ifndef MOE_NUMERIC_CUH_
#define MOE_NUMERIC_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "moe/problem.h"

namespace moe {

// base + a * b in one instruction. Written in C++ with 64-bit operands it takes three.
__device__ inline const char* WideOffset(const char* base, uint32_t a, uint32_t b) {
  uint64_t out;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(out) : "r"(a), "r"(b), "l"(base));
  return reinterpret_cast<const char*>(out);
}

// One of the four words of a vector. `i` must be a constant once loops are unrolled.
__device__ inline uint32_t Word(const uint4& v, int i) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  return words[i];
}

// The type of a 16-bit dtype.
template <DType kDType>
using ElementOf = std::conditional_t<kDType == DType::kFloat16, __half, __nv_bfloat16>;

// Two values rounded to a 16-bit dtype known at run time.
__device__ inline uint32_t PackPair(float lo, float hi, DType dtype) {
  if (dtype == DType::kFloat16) {
    const __half2 pair = __floats2half2_rn(lo, hi);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Two 16-bit floats in a register.
template <typename Element>
using PairOf = std::conditional_t<std::is_same_v<Element, __half>, __half2, __nv_bfloat162>;
template <typename Element>
__device__ inline const PairOf<Element>& AsPair(const uint32_t& bits) {
  return reinterpret_cast<const PairOf<Element>&>(bits);
}
__device__ inline float2 ToFloat2(__half2 v) { return __half22float2(v); }
__device__ inline float2 ToFloat2(__nv_bfloat162 v) { return __bfloat1622float2(v); }

// One value whose dtype is known only at run time.
__device__ inline float LoadAsFloat(const void* base, int64_t index, DType dtype) {
  if (dtype == DType::kFloat32) return __ldg(static_cast<const float*>(base) + index);
  const unsigned short bits = __ldg(static_cast<const unsigned short*>(base) + index);
  return dtype == DType::kFloat16 ? __half2float(__ushort_as_half(bits))
                                  : __bfloat162float(__ushort_as_bfloat16(bits));
}

// `Count` consecutive values at `base[index...]`, whose dtype is known only at run time (biases
// and scales: read once a tile, so a uniform branch costs less than another kernel would).
// base + index is aligned to Count values. kShared: base is in shared memory.
template <int Count, bool kShared = false>
__device__ inline void LoadAsFloat(const void* base, int64_t index, DType dtype,
                                   float (&out)[Count]) {
  static_assert(Count == 2 || Count == 4 || Count == 8, "one or two vector loads");
  if (dtype == DType::kFloat32) {
    const float2* p = reinterpret_cast<const float2*>(static_cast<const float*>(base) + index);
#pragma unroll
    for (int i = 0; i < Count / 2; ++i) {
      const float2 v = kShared ? p[i] : __ldg(p + i);
      out[2 * i] = v.x;
      out[2 * i + 1] = v.y;
    }
    return;
  }
  const uint32_t* p = reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(base) + index);
#pragma unroll
  for (int i = 0; i < Count / 2; ++i) {
    const uint32_t word = kShared ? p[i] : __ldg(p + i);
    const float2 v = dtype == DType::kFloat16
                         ? __half22float2(reinterpret_cast<const __half2&>(word))
                         : __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(word));
    out[2 * i] = v.x;
    out[2 * i + 1] = v.y;
  }
}

}  // namespace moe

#endif  // MOE_NUMERIC_CUH_
