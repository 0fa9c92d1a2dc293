// SPDX-License-Identifier: Apache-2.0
//
// The consumer half of low tiles where weights are not stored in 16 bits: they go from shared memory
// to registers as they are stored, and become 16-bit floats there. Each warp has its weight rows
// alone.
//
// Weights take the 16-row side of mma.m16n8k16, rows of A the 8 columns. Which k an mma step takes
// does not matter as long as both operands agree. ldmatrix, told that rows of 16 stored bytes are
// rows of 16-bit numbers, gives lane 4g + q the bytes 4q to 4q + 3 of weight row g: 4 or 8 weights
// that follow each other, of one or two mma steps. Of row g of A the lane reads the same k, 8 or
// 16 bytes at once, which are the registers of as many steps. (The other way round, with A's rows
// on the 16-row side, moving those into place took an instruction for each two weights and row
// block.)
//
// Widened in shared memory instead, a weight was stored and read again at 2 bytes: with 16 rows
// that made the banks the limit, 87% busy at half of DRAM's bandwidth.

#ifndef KERNELS_SM80_UNPACKING_MAINLOOP_CUH_
#define KERNELS_SM80_UNPACKING_MAINLOOP_CUH_

#include <cstdint>
#include <type_traits>

#include "kernels/common/dequantize.cuh"
#include "kernels/sm80/mainloop.cuh"
#include "kernels/sm80/mma.cuh"
#include "kernels/sm80/traits.cuh"

namespace moe::sm80 {

// Which sums are whose where weights take the 16-row side. All as in mainloop.cuh.
template <typename T>
class UnpackedSums {
  using Columns = typename T::Columns;

 protected:
  static constexpr int kBlocks = T::kWarpN / 8;      // of 8 weight rows; an mma takes two
  static constexpr int kRowBlocks = T::kTile.m / 8;  // of A
  // Code for 1 or 2, 3 or 4, ... active row blocks, or for each number of them.
  static constexpr int kGranule = kRowBlocks > 4 ? 2 : 1;

 public:
  using Accumulators = float[kBlocks / 2][kRowBlocks][4];

  __device__ static int Active(int rows) { return (rows + 7) / 8; }

  static constexpr int kThreadRows = 2 * kRowBlocks;
  __device__ static int FirstRow(const WarpPlace&) { return threadIdx.x % 4 * 2; }
  __device__ static constexpr int RowOffset(int i) { return i / 2 * 8 + i % 2; }
  __device__ static int Column(const WarpPlace& warp, int) {
    return warp.n * Columns::kWarpColumns + threadIdx.x % 32 / 4 * Columns::kVector;
  }
  __device__ static float Sum(const Accumulators& acc, int i, int, int v, bool gate) {
    const int block = v + (gate ? Columns::kVector : 0);
    return acc[block / 2][i / 2][block % 2 * 2 + i % 2];
  }
};

template <typename T>
class UnpackingMainloop : public UnpackedSums<T> {
  using Base = UnpackedSums<T>;
  using Base::kBlocks;
  using Base::kGranule;
  using Base::kRowBlocks;

 public:
  using Accumulators = typename Base::Accumulators;
  static constexpr int kParts = T::kStoredChunks / T::kSlices;  // of a step: a chunk of each row

  __device__ UnpackingMainloop(const char* shared, uint32_t weight_flip)
      : shared_(shared), context_(Words::Ungrouped(weight_flip)) {
    const int lane = threadIdx.x % 32;
    const int row = lane / 4;
    const WarpPlace warp = GetWarpPlace<T>();
    const int warp_row = warp.n * T::kWarpN;
    // Slices take the chunks in turn; the first is the slice's number.
    offset_a_ = row * T::kRowBytes + lane % 4 * (kReadBytes<T> / 4) +
                ((SwizzleA<T>(row) * 16) ^ warp.slice * kReadBytes<T>);
    // A matrix of ldmatrix: 8 weight rows at one chunk; all of the warp's rows at once.
    const int weight_row = warp_row + lane % T::kWarpN;
    offset_b_ = (weight_row * T::kStoredChunks + (SwizzleStored<T>(weight_row) ^ warp.slice)) * 16;
    scales_ = T::kScalesPlace + (warp_row + row * kBlocks) * 4;
    if constexpr (T::kSlices > 1) slice_ = warp.slice;
  }

  // As in mainloop.cuh.

  __device__ void Prime(StagePlace first) { LoadWeights(first, 0); }

  template <int kActive = kRowBlocks, typename Issue, typename Publish>
  __device__ void Run(StagePlace stage, StagePlace next, int active, Accumulators& acc,
                      Issue&& issue, Publish&& publish) {
    if constexpr (kActive > kGranule) {
      if (active <= kActive - kGranule) {
        return Run<kActive - kGranule>(stage, next, active, acc, issue, publish);
      }
    }
    if constexpr (T::kScaleSums) {
      Accumulators sums = {};
      Parts<kActive, 0>(stage, next, sums, issue, publish);
      // They stay in the stage for another step.
      uint32_t bits[kBlocks];
      LoadScales(stage, 0, bits);
#pragma unroll
      for (int block = 0; block < kBlocks / 2; ++block) {
#pragma unroll
        for (int m = 0; m < kActive; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            // In one rounding, in whatever code: a row's result must not depend on how many
            // others its tile has.
            acc[block][m][i] = __fmaf_rn(__uint_as_float(bits[2 * block + i / 2]),
                                         sums[block][m][i], acc[block][m][i]);
          }
        }
      }
    } else {
      Parts<kActive, 0>(stage, next, acc, issue, publish);
    }
  }

  // Adds the sums of slices. Returns whether the warp has them then. Each tile has a step, whose
  // barrier lies between one tile's reads here and the next one's writes.
  __device__ bool Reduce(Accumulators& acc, char* shared) const {
    if constexpr (T::kSlices == 1) return true;
    static_assert(T::kSlices <= 2, "one slice gives its sums to the other");
    constexpr int kSums = kBlocks / 2 * kRowBlocks * 4;
    float* sums = reinterpret_cast<float*>(shared + T::kSliceSumsPlace) +
                  GetWarpPlace<T>().n * 32 * kSums + threadIdx.x % 32;
    auto own = [&](int i) -> float& { return acc[i / 4 / kRowBlocks][i / 4 % kRowBlocks][i % 4]; };
    if (slice_ != 0) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i * 32] = own(i);
    }
    __syncthreads();
    if (slice_ != 0) return false;
#pragma unroll
    for (int i = 0; i < kSums; ++i) own(i) += sums[i * 32];
    return true;
  }

 private:
  using Words = Dequantizer<typename T::Element, T::kKind>;
  static constexpr int kRegisters = kReadBytes<T> / 16;  // of a row, for a lane and a part
  using Rows = uint32_t[kRowBlocks][kRegisters];
  using Fragments = uint32_t[kRegisters / 2][4];  // of 16 weight rows

  template <int kActive, int kPart, typename Issue, typename Publish>
  __device__ void Parts(StagePlace stage, StagePlace next, Accumulators& acc, Issue& issue,
                        Publish& publish) {
    if constexpr (kPart < kParts) {
      Rows rows;
      LoadRows<kActive>(stage, kPart, rows);
      uint32_t factors[kBlocks];
      if constexpr (HasGroups(T::kKind) && !T::kScaleSums) {
        LoadScales(stage, kPart * T::kSlices + slice_, factors);
      }
      uint32_t words[kBlocks];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) words[i] = words_[i];
      if constexpr (kPart + 1 < kParts) {
        issue(std::integral_constant<int, kPart>{});
        LoadWeights(stage, kPart + 1);
      } else {
        publish();
        // Where sums are scaled next, that hides the load, and registers are scarce here.
        if constexpr (!T::kScaleSums) LoadWeights(next, 0);
      }
#pragma unroll
      for (int block = 0; block < kBlocks; block += 2) {
        Fragments weights;
        Unpack(words[block], factors[block], weights, 0);
        Unpack(words[block + 1], factors[block + 1], weights, 1);
        Multiply<kActive>(weights, rows, acc[block / 2]);
      }
      if constexpr (kPart + 1 == kParts && T::kScaleSums) LoadWeights(next, 0);
      Parts<kActive, kPart + 1>(stage, next, acc, issue, publish);
    }
  }

  // The warp's weight rows at a chunk.
  __device__ void LoadWeights(StagePlace place, int chunk) {
    Ldmatrix(shared_ + place.b + (chunk * T::kSlices * 16 ^ offset_b_), words_);
  }

  // Factors of the weights of a chunk; chunk 0's are those of the sums.
  __device__ void LoadScales(StagePlace place, int chunk, uint32_t (&factors)[kBlocks]) const {
    LoadShared(shared_ + place.a + scales_ + chunk * T::kTile.n * 4, factors);
  }

  template <int kActive>
  __device__ void LoadRows(StagePlace place, int part, Rows& rows) const {
    const char* a = shared_ + place.a + (part * T::kSlices * kReadBytes<T> ^ offset_a_);
#pragma unroll
    for (int m = 0; m < kActive; ++m) LoadShared(a + m * 8 * T::kRowBytes, rows[m]);
  }

  template <int kCount>
  __device__ static void LoadShared(const char* from, uint32_t (&to)[kCount]) {
    static_assert(kCount == 2 || kCount == 4, "a vector load");
    if constexpr (kCount == 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      to[0] = v.x;
      to[1] = v.y;
      to[2] = v.z;
      to[3] = v.w;
    } else {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      to[0] = v.x;
      to[1] = v.y;
    }
  }

  // Of an mma's four registers, the first two have rows g and g + 8 at the first of the lane's k.
  __device__ void Unpack(uint32_t word, uint32_t factor, Fragments& weights, int half) const {
    uint32_t pairs[kRegisters];
    if constexpr (T::kScaleSums) {
      CenterInt4(word, typename T::Element{}, pairs);
    } else if constexpr (HasGroups(T::kKind)) {
      Words::Word(word, factor, pairs);
    } else {
      Words::Word(word, context_, pairs);
    }
#pragma unroll
    for (int p = 0; p < kRegisters; ++p) weights[p / 2][p % 2 * 2 + half] = pairs[p];
  }

  template <int kActive>
  __device__ static void Multiply(const Fragments& weights, const Rows& rows,
                                  float (&acc)[kRowBlocks][4]) {
#pragma unroll
    for (int p = 0; p < kRegisters / 2; ++p) {
      const uint32_t(&w)[4] = weights[p];
#pragma unroll
      for (int m = 0; m < kActive; ++m) {
        float(&c)[4] = acc[m];
        Mma<typename T::Element>::fma(c[0], c[1], c[2], c[3], w[0], w[1], w[2], w[3],
                                      rows[m][2 * p], rows[m][2 * p + 1], c[0], c[1], c[2], c[3]);
      }
    }
  }

  uint32_t words_[kBlocks];  // of the next part: of one row of each block
  const char* shared_;
  typename Words::Context context_;  // of weights that have no groups
  // Byte offsets at the first part, which others exclusive-or into a position in the row: of the
  // lane's first row of A, at its part of a chunk's k, and of the row that it names to ldmatrix.
  int offset_a_;
  int offset_b_;
  int scales_;
  int slice_ = 0;
};

}  // namespace moe::sm80

#endif  // KERNELS_SM80_UNPACKING_MAINLOOP_CUH_
