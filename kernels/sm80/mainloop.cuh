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

// Byte offsets of the operands of a step.
struct StagePlace {
  int a;
  int b;
};

template <typename T>
class Mainloop {
  using Columns = typename T::Columns;
  static constexpr int kMmaM = T::kWarpM / 16;  // mma.m16n8k16 of a warp, in a part of a step
  static constexpr int kMmaN = T::kWarpN / 8;
  // The 16-row blocks of a tile go round among the warps along m, so that those of a partly filled
  // tile keep all of them busy: the rows of a warp's block m begin at this multiple of 16 rows, its
  // first block's at warp.m * 16.
  static constexpr int kRowBlockStep = T::kWarpsM * 16;

 public:
  using Accumulators = float[kMmaM][kMmaN][4];
  static constexpr int kParts = T::kStep / 16;  // of a step: the k of one mma each

  __device__ Mainloop(const char* shared, uint32_t) {
    const auto base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int lane = threadIdx.x % 32;
    const WarpPlace warp = GetWarpPlace<T>();
    // Matrices in the order (rows 0-7, k 0-7), (rows 8-15, k 0-7), (0-7, 8-15), (8-15, 8-15).
    const int row = lane % 16;
    first_a_ = base + (warp.m * 16 + row) * T::kRowBytes + (Swizzle(row) ^ lane / 16) * 16;
    // (block 0, k 0-7), (block 0, k 8-15), (block 1, k 0-7), (block 1, k 8-15).
    const int n = lane % 8 + lane / 16 * 8;
    first_b_ = base + (warp.n * T::kWarpN + n) * T::kRowBytes + (Swizzle(n) ^ lane / 8 % 2) * 16;
    // The empty asm keeps the compiler from putting them together anew at each step.
    if constexpr (!T::kWidens) asm volatile("" : "+r"(first_a_), "+r"(first_b_));
  }

  // How many 16-row blocks of the warp hold any of a tile's rows.
  __device__ static int Active(int rows) {
    if constexpr (kMmaM == 1 && T::kWarpsM == 1) return 1;
    return max(0, (rows - GetWarpPlace<T>().m * 16 + kRowBlockStep - 1) / kRowBlockStep);
  }

  // Where a thread's sums belong, for the epilogue: its first row, how far the i-th is from that, the
  // first of kVector columns of a group, and the sum in one of them.
  static constexpr int kThreadRows = 2 * kMmaM;
  __device__ static int FirstRow(const WarpPlace& warp) {
    return warp.m * 16 + threadIdx.x % 32 / 4;
  }
  __device__ static constexpr int RowOffset(int i) { return i / 2 * kRowBlockStep + i % 2 * 8; }
  __device__ static int Column(const WarpPlace& warp, int group) {
    return warp.n * Columns::kWarpColumns + threadIdx.x % 4 * Columns::kVector +
           group * 8 * Columns::kGroup;
  }
  __device__ static float Sum(const Accumulators& acc, int i, int group, int v, bool gate) {
    const int n = (group * Columns::kHalves + gate) * Columns::kGroup + v / 2;
    return acc[i / 2][n][i % 2 * 2 + v % 2];
  }

  // Whether the warp has the sums of its columns, which here it has alone.
  __device__ bool Reduce(Accumulators&, char*) const { return true; }

  // Loads the first fragments of the first stage, once it is there.
  __device__ void Prime(StagePlace first) { Load<kMmaM>(first, 0, fragments_[0]); }

  // Multiplies the stage at `stage`. `active` is how many of the warp's 16-row blocks hold rows.
  // Fragments are loaded one part ahead, across stages too:
  //   issue(part)  is called for every part but the last, to do other work between the mmas;
  //   publish()    before the last part's mmas: must return once the stage at `next` is there.
  // All reads of `stage` are then behind the barrier in publish(), which is what frees it.
  //
  // Partly filled tiles skip the empty 16-row blocks, by straight code for each number of them: a
  // condition at each ldmatrix and mma made a tile with few rows as slow as a full one.
  template <int kActive = kMmaM, typename Issue, typename Publish>
  __device__ void Run(StagePlace stage, StagePlace next, int active, Accumulators& acc,
                      Issue&& issue, Publish&& publish) {
    if constexpr (kActive > 0) {
      if (active < kActive) return Run<kActive - 1>(stage, next, active, acc, issue, publish);
    }
    Parts<kActive, 0>(stage, next, acc, issue, publish);
  }

 private:
  // Of one part, for a warp.
  struct Fragments {
    uint32_t a[kMmaM][4];
    uint32_t b[kMmaN][2];
  };

  template <int kActive, int kPart, typename Issue, typename Publish>
  __device__ void Parts(StagePlace stage, StagePlace next, Accumulators& acc, Issue& issue,
                        Publish& publish) {
    static_assert(kParts % 2 == 0, "each stage begins with the same one of two fragments");
    if constexpr (kPart < kParts) {
      Fragments& ahead = fragments_[(kPart + 1) % 2];
      if constexpr (kPart + 1 < kParts) {
        if constexpr (kActive > 0) Load<kActive>(stage, kPart + 1, ahead);
        issue(std::integral_constant<int, kPart>{});
      } else {
        publish();
        Load<kMmaM>(next, 0, ahead);  // of the next tile, perhaps: all its rows
      }
      if constexpr (kActive > 0) Multiply<kActive>(fragments_[kPart % 2], acc);
      Parts<kActive, kPart + 1>(stage, next, acc, issue, publish);
    }
  }

  template <int kActive>
  __device__ void Load(StagePlace stage, int part, Fragments& f) const {
    // Rows are kRowBytes long and begin at multiples of that, so only what the swizzle has set lies
    // where the part is exclusive-or'ed in.
    static_assert(T::kStageBytes % T::kRowBytes == 0 && T::kBytesA % T::kRowBytes == 0 &&
                  T::kWidePlace % T::kRowBytes == 0 && 1024 % T::kRowBytes == 0);
    const uint32_t a = (first_a_ + stage.a) ^ part * 32;
#pragma unroll
    for (int m = 0; m < kActive; ++m) {
      Ldmatrix(a + m * kRowBlockStep * T::kRowBytes, f.a[m]);
    }
    const uint32_t b = (first_b_ + stage.b) ^ part * 32;
#pragma unroll
    for (int n = 0; n < kMmaN; n += 2) {
      uint32_t r[4];
      Ldmatrix(b + n * 8 * T::kRowBytes, r);
      f.b[n][0] = r[0];
      f.b[n][1] = r[1];
      f.b[n + 1][0] = r[2];
      f.b[n + 1][1] = r[3];
    }
  }

  template <int kActive>
  __device__ void Multiply(const Fragments& f, Accumulators& acc) const {
#pragma unroll
    for (int m = 0; m < kActive; ++m) {
#pragma unroll
      for (int n = 0; n < kMmaN; ++n) {
        float(&c)[4] = acc[m][n];
        Mma<typename T::Element>::fma(c[0], c[1], c[2], c[3], f.a[m][0], f.a[m][1], f.a[m][2],
                                      f.a[m][3], f.b[n][0], f.b[n][1], c[0], c[1], c[2], c[3]);
      }
    }
  }

  Fragments fragments_[2];
  // Addresses in shared memory: where the lane's first row of each operand, at the first step of a
  // stage at 0, lies.
  uint32_t first_a_;
  uint32_t first_b_;
};

}  // namespace moe::sm80

#endif  // KERNELS_SM80_MAINLOOP_CUH_
