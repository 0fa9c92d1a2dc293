// SPDX-License-Identifier: Apache-2.0
//
// The consumer half: one stage of shared memory times mma.m16n8k16 into float32 accumulators.
//
// 16-bit weights: ldmatrix gives the fragments of both operands as the instruction wants them.
//
// 8-bit weights: ldmatrix moves bytes in units of 16 bits, so lane quad q receives bytes
// 4q .. 4q+3 of a row's 16, where mma wants k = 2q, 2q+1, 2q+8, 2q+9. The order of k inside a
// block of 16 is free as long as both operands agree, so A is read in the order of the bytes: an
// 8-byte load gives quad q its elements 4q .. 4q+3. No prepacked weights, no shuffles.

#ifndef KERNELS_SM80_MAINLOOP_CUH_
#define KERNELS_SM80_MAINLOOP_CUH_

#include <cstdint>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <type_traits>

#include "kernels/common/dequantize.cuh"
#include "kernels/sm80/traits.cuh"

namespace moe::sm80 {

template <typename Element>
using Mma = std::conditional_t<std::is_same_v<Element, __half>, cute::SM80_16x8x16_F32F16F16F32_TN,
                               cute::SM80_16x8x16_F32BF16BF16F32_TN>;

__device__ inline void Ldmatrix4(const char* shared, uint32_t (&r)[4]) {
  cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(shared), r[0], r[1], r[2],
                                r[3]);
}

// Fragments of one k16 step of a warp.
template <typename T>
struct Fragments {
  uint32_t a[T::kMmaM][4];
  // 16-bit weights: the two registers of each 8-column block. 8-bit: four bytes of each.
  uint32_t b[T::kMmaN][T::kQuantized ? 1 : 2];
};

template <typename T>
class Mainloop {
 public:
  using Accumulators = float[T::kMmaM][T::kMmaN][4];

  // weight_flip: what WeightFlip gives.
  __device__ Mainloop(const char* shared, uint32_t weight_flip)
      : shared_(shared), weight_flip_(weight_flip) {
    const int lane = threadIdx.x % 32;
    const WarpPlace warp = GetWarpPlace<T>();
    const int first_row = warp.m * 16;
    const int first_column = warp.n * T::kWarpN;
    if constexpr (T::kQuantized) {
      // 8-byte loads: lane = 4 * row + quad.
      const int row = lane / 4;
      offset_a_ = (first_row + row) * T::kRowBytesA + lane % 4 * 8;
      swizzle_a_ = PairSwizzle(row) * 16;
      // Lanes 8j .. 8j+7 address the rows of 8-column block j (of 4, or 2 for narrow warps).
      const int n = T::kMmaN >= 4 ? lane : lane % 16;
      offset_b_ = T::kBytesA + (first_column + n) * T::kRowBytesB;
      swizzle_b_ = LdmatrixSwizzle<T::kRowBytesB>(n) * 16;
    } else {
      // Matrices in the order (rows 0-7, k 0-7), (rows 8-15, k 0-7), (0-7, 8-15), (8-15, 8-15).
      const int row = lane % 16;
      offset_a_ = (first_row + row) * T::kRowBytesA;
      swizzle_a_ = (LdmatrixSwizzle<T::kRowBytesA>(row) ^ lane / 16) * 16;
      // (block 0, k 0-7), (block 0, k 8-15), (block 1, k 0-7), (block 1, k 8-15).
      const int n = lane % 8 + lane / 16 * 8;
      offset_b_ = T::kBytesA + (first_column + n) * T::kRowBytesB;
      swizzle_b_ = (LdmatrixSwizzle<T::kRowBytesB>(n) ^ lane / 8 % 2) * 16;
    }
  }

  // Loads the first fragments of the first stage, once it is there.
  __device__ void Prime() { Load<T::kMmaM>(shared_, 0, fragments_[0]); }

  // Multiplies the stage at byte offset `stage`. `active` is how many of the warp's 16-row blocks
  // hold rows. Fragments are loaded one k16 step ahead, across stages too:
  //   issue(step)  is called for every step but the last, to start copies between the mmas;
  //   publish()    before the last step's mmas: must return once the stage at `next` is there.
  // All reads of `stage` are then behind the barrier in publish(), which is what frees it.
  //
  // Partly filled tiles skip the empty 16-row blocks, by straight code for each number of them: a
  // condition at each ldmatrix and mma made a tile with few rows as slow as a full one.
  template <int kActive = T::kMmaM, typename Issue, typename Publish>
  __device__ void Run(int stage, int next, int active, Accumulators& acc, Issue&& issue,
                      Publish&& publish) {
    if constexpr (kActive > 0) {
      if (active < kActive) return Run<kActive - 1>(stage, next, active, acc, issue, publish);
    }
    Steps<kActive, 0>(shared_ + stage, shared_ + next, acc, issue, publish);
  }

 private:
  template <int kActive, int kStep, typename Issue, typename Publish>
  __device__ void Steps(const char* stage, const char* next, Accumulators& acc, Issue& issue,
                        Publish& publish) {
    static_assert(T::kMmaK % 2 == 0, "each stage begins with the same one of two fragments");
    if constexpr (kStep < T::kMmaK) {
      Fragments<T>& ahead = fragments_[(kStep + 1) % 2];
      if constexpr (kStep + 1 < T::kMmaK) {
        if constexpr (kActive > 0) Load<kActive>(stage, kStep + 1, ahead);
        issue(std::integral_constant<int, kStep>{});
      } else {
        publish();
        Load<T::kMmaM>(next, 0, ahead);  // of the next tile, perhaps: all its rows
      }
      if constexpr (kActive > 0) Multiply<kActive>(fragments_[kStep % 2], acc);
      Steps<kActive, kStep + 1>(stage, next, acc, issue, publish);
    }
  }

  template <int kActive>
  __device__ void Load(const char* base, int step, Fragments<T>& f) const {
#pragma unroll
    for (int m = 0; m < kActive; ++m) {
      const char* block = base + offset_a_ + m * kRowBlockStep<T> * T::kRowBytesA;
      if constexpr (T::kQuantized) {
        const char* p = block + (step * 32 ^ swizzle_a_);
        const uint2 upper = *reinterpret_cast<const uint2*>(p);
        const uint2 lower = *reinterpret_cast<const uint2*>(p + 8 * T::kRowBytesA);
        f.a[m][0] = upper.x;
        f.a[m][1] = lower.x;
        f.a[m][2] = upper.y;
        f.a[m][3] = lower.y;
      } else {
        Ldmatrix4(block + (step * 32 ^ swizzle_a_), f.a[m]);
      }
    }
    if constexpr (T::kQuantized && T::kMmaN >= 4) {
      static_assert(T::kMmaN % 4 == 0, "four 8-column blocks a load");
#pragma unroll
      for (int n = 0; n < T::kMmaN; n += 4) {
        uint32_t r[4];
        Ldmatrix4(base + offset_b_ + n * 8 * T::kRowBytesB + (step * 16 ^ swizzle_b_), r);
#pragma unroll
        for (int j = 0; j < 4; ++j) f.b[n + j][0] = r[j];
      }
    } else if constexpr (T::kQuantized) {
      static_assert(T::kMmaN == 2, "two 8-column blocks");
      const char* p = base + offset_b_ + (step * 16 ^ swizzle_b_);
      cute::SM75_U32x2_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(p), f.b[0][0],
                                    f.b[1][0]);
    } else {
#pragma unroll
      for (int n = 0; n < T::kMmaN; n += 2) {
        uint32_t r[4];
        Ldmatrix4(base + offset_b_ + n * 8 * T::kRowBytesB + (step * 32 ^ swizzle_b_), r);
        f.b[n][0] = r[0];
        f.b[n][1] = r[1];
        f.b[n + 1][0] = r[2];
        f.b[n + 1][1] = r[3];
      }
    }
  }

  template <int kActive>
  __device__ void Multiply(const Fragments<T>& f, Accumulators& acc) const {
#pragma unroll
    for (int n = 0; n < T::kMmaN; ++n) {
      uint32_t b[2];
      if constexpr (T::kQuantized) {
        DequantizeBytes(f.b[n][0], weight_flip_, typename T::Element{}, b);
      } else {
        b[0] = f.b[n][0];
        b[1] = f.b[n][1];
      }
#pragma unroll
      for (int m = 0; m < kActive; ++m) {
        float(&c)[4] = acc[m][n];
        Mma<typename T::Element>::fma(c[0], c[1], c[2], c[3], f.a[m][0], f.a[m][1], f.a[m][2],
                                      f.a[m][3], b[0], b[1], c[0], c[1], c[2], c[3]);
      }
    }
  }

  Fragments<T> fragments_[2];
  const char* shared_;
  uint32_t weight_flip_;
  int offset_a_;   // of the lane's first row in a stage
  int swizzle_a_;  // bytes to exclusive-or into the position within that row
  int offset_b_;
  int swizzle_b_;
};

}  // namespace moe::sm80

#endif  // KERNELS_SM80_MAINLOOP_CUH_
