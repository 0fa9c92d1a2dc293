// SPDX-License-Identifier: Apache-2.0
//
// A warp's product of a chunk of weights (DecodeChunk of k) and the tokens of its unit, in the
// few-token layer (decode_gemm.cuh). `rows` is what a lane holds of the weights, [block of 16
// rows][upper, lower half]; tokens[t] has, or points to, its values, of token lane / 4 of a block of 8, in
// the same order.

#ifndef KERNELS_SM80_DECODE_MULTIPLY_CUH_
#define KERNELS_SM80_DECODE_MULTIPLY_CUH_

#include <cstdint>

#include "kernels/common/dequantize.cuh"
#include "kernels/common/weight_kind.h"
#include "kernels/sm80/decode_weights.cuh"
#include "kernels/sm80/mma.cuh"
#include "moe/numeric.cuh"

namespace moe::sm80 {

// acc += weights * tokens, for 16 rows of weights, a[upper, lower half][pair], and 8 of k a lane.
template <typename Element, int kTokenBlocks>
__device__ __forceinline__ void MultiplyStep(const uint32_t (&a)[2][4],
                                             const uint32_t (&b)[kTokenBlocks][4],
                                             float (&acc)[kTokenBlocks][4]) {
#pragma unroll
  for (int t = 0; t < kTokenBlocks; ++t) {
    float(&c)[4] = acc[t];
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      Mma<Element>::fma(c[0], c[1], c[2], c[3], a[0][i], a[1][i], a[0][i + 1], a[1][i + 1], b[t][i],
                        b[t][i + 1], c[0], c[1], c[2], c[3]);
    }
  }
}

// acc += weights * tokens. The scales of groups multiply each weight. `context` is what Dequantizer
// takes, for each row. Where a lane's part of k is not `inside`, its tokens count as 0.
template <typename Element, WeightKind kKind, typename Tokens, int kTokenBlocks>
__device__ __forceinline__ void MultiplyScaleWeights(
    const uint4 (&rows)[2][2], const Tokens& tokens, bool inside,
    const WeightContext<Element, kKind> (&context)[4], float (&acc)[2][kTokenBlocks][4]) {
  constexpr int kPairs = 16 / WeightBits(kKind);
  // Stored words for 16 bytes of each token's activations: 8 weights, two mma steps.
  constexpr int kWords = 4 / kPairs;
#pragma unroll
  for (int step = 0; step < 4 / kWords; ++step) {
    uint32_t b[kTokenBlocks][4];
#pragma unroll
    for (int t = 0; t < kTokenBlocks; ++t) {
      uint4 v = make_uint4(0, 0, 0, 0);
      if (inside) v = tokens[t][step];
      if constexpr (HasGroups(kKind)) {
        SpreadToken(v, b[t]);
      } else {
        b[t][0] = v.x;
        b[t][1] = v.y;
        b[t][2] = v.z;
        b[t][3] = v.w;
      }
    }
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      uint32_t a[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4& row = rows[block][half];
        const auto own = context[2 * block + half];
        if constexpr (HasGroups(kKind)) {
          SpreadScaled<Element, kKind>(Word(row, step), own, a[half]);
        } else {
#pragma unroll
          for (int w = 0; w < kWords; ++w) {
            uint32_t pairs[kPairs];
            Dequantizer<Element, kKind>::Word(Word(row, step * kWords + w), own, pairs);
#pragma unroll
            for (int i = 0; i < kPairs; ++i) a[half][w * kPairs + i] = pairs[i];
          }
        }
      }
      MultiplyStep<Element>(a, b, acc[block]);
    }
  }
}

// The same for INT4 where a chunk is one group: the scale multiplies the chunk's sums, in float32,
// instead of its weights: 8 multiplications a block of tokens for 64, and products that are exact.
// `scale_bits` is the scale of one of the lane's four rows: the one that is its place in the quad.
//
// Where weights come with an excess, so do the sums: the excess times the sum of the token's
// values, which one more mma for 32 of k adds up. Values are then up to 143 / 8 times as large as
// without it, and do not cancel: float32 sums are off by 2^-19 of the result for activations around
// 0, by 2^-15 for positive ones, in the root mean square. bf16 rounds to 2^-9. (An infinite
// activation gives NaN, which it does anyway where a weight is 0.)
template <typename Element, int kTokenBlocks>
__device__ __forceinline__ void MultiplyScaleSums(const uint4 (&rows)[2][2],
                                                  const uint4* const (&tokens)[kTokenBlocks],
                                                  uint32_t scale_bits, DType scale_dtype,
                                                  float (&acc)[2][kTokenBlocks][4]) {
  constexpr bool kExcess = kInt4Excess<Element> != 0;
  float sum[2][kTokenBlocks][4] = {};
  float excess[kTokenBlocks][4] = {};  // of the sums of each token, times -1
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    uint32_t b[kTokenBlocks][4];
#pragma unroll
    for (int t = 0; t < kTokenBlocks; ++t) {
      const uint4 v = tokens[t][step];
      if constexpr (kExcess) {
        // Tokens in the place of weights: 32 of k in one mma, from the registers they are loaded
        // to. The upper and the lower 8 rows of the product get two halves of k.
        constexpr uint32_t kMinus = 0xc308c308u;
        static_assert(kInt4Excess<Element> == 136, "kMinus is -136, twice");
        float(&c)[4] = excess[t];
        Mma<Element>::fma(c[0], c[1], c[2], c[3], v.x, v.y, v.z, v.w, kMinus, kMinus, c[0], c[1],
                          c[2], c[3]);
      }
      SpreadToken(v, b[t]);
    }
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      uint32_t a[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        SpreadInt4(Word(rows[block][half], step), Element{}, a[half]);
      }
      MultiplyStep<Element>(a, b, sum[block]);
    }
  }
  if constexpr (kExcess) {
    // From the lanes that hold tokens as rows to where the sums of tokens 2q and 2q + 1 are.
    const int lane = threadIdx.x % 4 * 8;
#pragma unroll
    for (int t = 0; t < kTokenBlocks; ++t) {
      const float own = excess[t][0] + excess[t][2];
      const float even = __shfl_sync(0xffffffffu, own, lane);
      const float odd = __shfl_sync(0xffffffffu, own, lane + 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[0][t][i] += i % 2 == 0 ? even : odd;
        sum[1][t][i] += i % 2 == 0 ? even : odd;
      }
    }
  }
  // Not what follows from the dtype, computed once and for all, in registers.
  int dtype = static_cast<int>(scale_dtype);
  asm volatile("" : "+r"(dtype));
  const uint32_t bits[1] = {scale_bits};
  uint32_t factor[1];
  GroupScales<Element, WeightKind::kInt4>(bits, static_cast<DType>(dtype), factor);
  const float own = ToFloat2(AsPair<Element>(factor[0])).x;
#pragma unroll
  for (int row = 0; row < 4; ++row) {
    const float scale = __shfl_sync(0xffffffffu, own, row, 4);
#pragma unroll
    for (int t = 0; t < kTokenBlocks; ++t) {
      const int i = row % 2 * 2;
      // In one rounding, whatever the token's place: its result must not depend on that.
      float(&c)[4] = acc[row / 2][t];
      c[i] = __fmaf_rn(scale, sum[row / 2][t][i], c[i]);
      c[i + 1] = __fmaf_rn(scale, sum[row / 2][t][i + 1], c[i + 1]);
    }
  }
}

}  // namespace moe::sm80

#endif  // KERNELS_SM80_DECODE_MULTIPLY_CUH_
