// SPDX-License-Identifier: Apache-2.0
//
// The consumer half: one stage of shared memory times mma.m16n8k16 into float32 accumulators.
// ldmatrix gives the fragments of both operands as the instruction wants them.

#ifndef KERNELS_SM80_MAINLOOP_CUH_
#define KERNELS_SM80_MAINLOOP_CUH_

#include <cstdint>
#include <type_traits>

#include "kernels/sm80/mma.cuh"
#include "kernels/sm80/traits.cuh"

namespace moe::sm80 {

// Fragments of one k16 step of a warp.
template <typename T>
struct Fragments {
  uint32_t a[T::kMmaM][4];
  uint32_t b[T::kMmaN][2];
};

// Byte offsets of the operands of a step.
struct StagePlace {
  int a;
  int b;
};

template <typename T>
class Mainloop {
 public:
  using Accumulators = float[T::kMmaM][T::kMmaN][4];

  __device__ explicit Mainloop(const char* shared) : shared_(shared) {
    const int lane = threadIdx.x % 32;
    const WarpPlace warp = GetWarpPlace<T>();
    // Matrices in the order (rows 0-7, k 0-7), (rows 8-15, k 0-7), (0-7, 8-15), (8-15, 8-15).
    const int row = lane % 16;
    offset_a_ = (warp.m * 16 + row) * T::kRowBytes;
    swizzle_a_ = (Swizzle(row) ^ lane / 16) * 16;
    // (block 0, k 0-7), (block 0, k 8-15), (block 1, k 0-7), (block 1, k 8-15).
    const int n = lane % 8 + lane / 16 * 8;
    offset_b_ = (warp.n * T::kWarpN + n) * T::kRowBytes;
    swizzle_b_ = (Swizzle(n) ^ lane / 8 % 2) * 16;
  }

  // Loads the first fragments of the first stage, once it is there.
  __device__ void Prime(StagePlace first) { Load<T::kMmaM>(first, 0, fragments_[0]); }

  // Multiplies the stage at `stage`. `active` is how many of the warp's 16-row blocks hold rows.
  // Fragments are loaded one k16 step ahead, across stages too:
  //   issue(step)  is called for every step but the last, to do other work between the mmas;
  //   publish()    before the last step's mmas: must return once the stage at `next` is there.
  // All reads of `stage` are then behind the barrier in publish(), which is what frees it.
  //
  // Partly filled tiles skip the empty 16-row blocks, by straight code for each number of them: a
  // condition at each ldmatrix and mma made a tile with few rows as slow as a full one.
  template <int kActive = T::kMmaM, typename Issue, typename Publish>
  __device__ void Run(StagePlace stage, StagePlace next, int active, Accumulators& acc,
                      Issue&& issue, Publish&& publish) {
    if constexpr (kActive > 0) {
      if (active < kActive) return Run<kActive - 1>(stage, next, active, acc, issue, publish);
    }
    Steps<kActive, 0>(stage, next, acc, issue, publish);
  }

 private:
  template <int kActive, int kStep, typename Issue, typename Publish>
  __device__ void Steps(StagePlace stage, StagePlace next, Accumulators& acc, Issue& issue,
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
  __device__ void Load(StagePlace stage, int step, Fragments<T>& f) const {
    const char* a = shared_ + stage.a + offset_a_ + (step * 32 ^ swizzle_a_);
#pragma unroll
    for (int m = 0; m < kActive; ++m) {
      Ldmatrix4(a + m * kRowBlockStep<T> * T::kRowBytes, f.a[m]);
    }
    const char* b = shared_ + stage.b + offset_b_ + (step * 32 ^ swizzle_b_);
#pragma unroll
    for (int n = 0; n < T::kMmaN; n += 2) {
      uint32_t r[4];
      Ldmatrix4(b + n * 8 * T::kRowBytes, r);
      f.b[n][0] = r[0];
      f.b[n][1] = r[1];
      f.b[n + 1][0] = r[2];
      f.b[n + 1][1] = r[3];
    }
  }

  template <int kActive>
  __device__ void Multiply(const Fragments<T>& f, Accumulators& acc) const {
#pragma unroll
    for (int m = 0; m < kActive; ++m) {
#pragma unroll
      for (int n = 0; n < T::kMmaN; ++n) {
        float(&c)[4] = acc[m][n];
        Mma<typename T::Element>::fma(c[0], c[1], c[2], c[3], f.a[m][0], f.a[m][1], f.a[m][2],
                                      f.a[m][3], f.b[n][0], f.b[n][1], c[0], c[1], c[2], c[3]);
      }
    }
  }

  Fragments<T> fragments_[2];
  const char* shared_;
  int offset_a_;  // of the lane's first row of each operand
  int offset_b_;
  int swizzle_a_;  // bytes to exclusive-or into the position within that row
  int swizzle_b_;
};

}  // namespace moe::sm80

#endif  // KERNELS_SM80_MAINLOOP_CUH_
