// SPDX-License-Identifier: Apache-2.0
//
// The consumer half of high tiles where weights are not stored in 16 bits and each warp has its
// weight rows alone. Operands lie as in unpacking_mainloop.cuh, but here the tensor cores are what
// the kernel waits for, with two warps for each of them, so nothing may come between two mmas that
// takes longer than the other warp can fill. While a part of a step is multiplied, 16 of k, the next
// one's
//
//   weights  are loaded, and unpacked once half of the mmas have begun;
//   rows     of A are loaded, each to the registers of the same row of this part, as soon as the
//            last mma with that has begun.
//
// 8-bit weights: a chunk of 16 bytes of a weight row is a part. Four lanes share it, each has 4
// weights and reads the 8 bytes beside them in each row of A.
//
// 4-bit ones: a chunk is two parts, and a lane's 4 bytes of it are 4 weights of either. Beside them
// lie 16 bytes of A, of which a part takes 8. If all lanes took the first 8 they would meet in half
// of the banks, so lanes with an odd place in their quad take the second 8 first, and swap the
// halves of their weights to match. Rows that lie 2 apart have their chunks exchanged in pairs
// (SwizzleA), which puts the halves that 16 lanes read into different banks.

#ifndef KERNELS_SM80_HIGH_UNPACKING_MAINLOOP_CUH_
#define KERNELS_SM80_HIGH_UNPACKING_MAINLOOP_CUH_

#include <cstdint>
#include <type_traits>

#include "kernels/common/dequantize.cuh"
#include "kernels/sm80/mainloop.cuh"
#include "kernels/sm80/mma.cuh"
#include "kernels/sm80/traits.cuh"
#include "kernels/sm80/unpacking_mainloop.cuh"

namespace moe::sm80 {

template <typename T>
class HighUnpackingMainloop : public UnpackedSums<T> {
  using Base = UnpackedSums<T>;
  using Base::kBlocks;
  using Base::kGranule;
  using Base::kRowBlocks;
  using Words = Dequantizer<typename T::Element, T::kKind>;
  static constexpr int kPartsOfChunk = 8 / WeightBits(T::kKind);
  static_assert(T::kSlices == 1 && !T::kScaleSums && kBlocks == 4);

 public:
  using Accumulators = typename Base::Accumulators;
  static constexpr int kParts = T::kStep / 16;  // of a step: the k of one mma each

  __device__ HighUnpackingMainloop(const char* shared, uint32_t weight_flip)
      : shared_(shared), context_(Words::Ungrouped(weight_flip)) {
    const int lane = threadIdx.x % 32;
    const int row = lane / 4;
    const int quad = lane % 4;
    const int warp_row = GetWarpPlace<T>().n * T::kWarpN;
    const int first = kPartsOfChunk == 1 ? quad * 8 : quad * 16 + quad % 2 * 8;
    offset_a_ = row * T::kRowBytes + (first ^ SwizzleA<T>(row) * 16);
    // Of ldmatrix: the chunk of one weight row that each lane names.
    const int weight_row = warp_row + lane;
    offset_b_ = (weight_row * T::kStoredChunks + SwizzleStored<T>(weight_row)) * 16;
    scales_ = T::kScalesPlace + (warp_row + row * kBlocks) * 4;
    halves_ = quad % 2 == 0 ? 0x3210 : 0x1032;
  }

  // All as in mainloop.cuh.

  __device__ bool Reduce(Accumulators&, char*) const { return true; }

  __device__ void Prime(StagePlace first) {
    LoadWeights<0>(first);
    Unpack<0>(weights_[0]);
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) LoadRow<0>(first, m);
  }

  template <int kActive = kRowBlocks, typename Issue, typename Publish>
  __device__ void Run(StagePlace stage, StagePlace next, int active, Accumulators& acc,
                      Issue&& issue, Publish&& publish) {
    if constexpr (kActive > kGranule) {
      if (active <= kActive - kGranule) {
        return Run<kActive - kGranule>(stage, next, active, acc, issue, publish);
      }
    }
    Parts<kActive, 0>(stage, next, acc, issue, publish);
  }

 private:
  using Fragments = uint32_t[kBlocks / 2][4];  // of 16 weight rows each

  template <int kActive, int kPart, typename Issue, typename Publish>
  __device__ void Parts(StagePlace stage, StagePlace next, Accumulators& acc, Issue& issue,
                        Publish& publish) {
    static_assert(kParts % 2 == 0, "each stage begins with the same one of two fragments");
    if constexpr (kPart < kParts) {
      constexpr bool kLast = kPart + 1 == kParts;
      constexpr int kNext = (kPart + 1) % kParts;
      if constexpr (kLast) {
        publish();
      } else {
        issue(std::integral_constant<int, kPart>{});
      }
      const StagePlace from = kLast ? next : stage;
      LoadWeights<kNext>(from);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t(&w)[4] = weights_[kPart % 2][half];
#pragma unroll
        for (int m = 0; m < kActive; ++m) {
          float(&c)[4] = acc[half][m];
          const uint32_t(&r)[2] = rows_[m];
          Mma<typename T::Element>::fma(c[0], c[1], c[2], c[3], w[0], w[1], w[2], w[3], r[0], r[1],
                                        c[0], c[1], c[2], c[3]);
          if (half == 1) LoadRow<kNext>(from, m);
        }
        if (half == 0) Unpack<kNext>(weights_[kNext % 2]);
      }
      if constexpr (kLast) {
        // The next stage may belong to a tile with more rows.
#pragma unroll
        for (int m = kActive; m < kRowBlocks; ++m) LoadRow<kNext>(from, m);
      }
      Parts<kActive, kPart + 1>(stage, next, acc, issue, publish);
    }
  }

  // Of a row block. (An address that its callers' loops share took registers in one that does not
  // run, and INT4 tiles 4% longer.)
  template <int kPart>
  __device__ void LoadRow(StagePlace place, int m) {
    constexpr int kPlace =
        kPartsOfChunk == 1 ? kPart * 32 : kPart / kPartsOfChunk * 64 + kPart % kPartsOfChunk * 8;
    const uint2 v = *reinterpret_cast<const uint2*>(shared_ + place.a + (kPlace ^ offset_a_) +
                                                    m * 8 * T::kRowBytes);
    rows_[m][0] = v.x;
    rows_[m][1] = v.y;
  }

  // The chunk that the part begins, of the warp's weight rows, and its factors.
  template <int kPart>
  __device__ void LoadWeights(StagePlace place) {
    if constexpr (kPart % kPartsOfChunk == 0) {
      constexpr int kChunk = kPart / kPartsOfChunk;
      Ldmatrix(shared_ + place.b + (kChunk * 16 ^ offset_b_), words_);
      if constexpr (HasGroups(T::kKind)) {
        const uint4 v =
            *reinterpret_cast<const uint4*>(shared_ + place.a + scales_ + kChunk * T::kTile.n * 4);
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          factors_[i] = Word(v, i);
          words_[i] = __byte_perm(words_[i], 0, halves_);
        }
      }
    }
  }

  // Of an mma's four registers, the first two have rows g and g + 8 at the first of the lane's k.
  template <int kPart>
  __device__ void Unpack(Fragments& weights) const {
    constexpr int kFirst = kPart % kPartsOfChunk * 2;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      uint32_t pairs[Words::kPairs];
      if constexpr (HasGroups(T::kKind)) {
        Words::Word(words_[block], factors_[block], pairs);
      } else {
        Words::Word(words_[block], context_, pairs);
      }
#pragma unroll
      for (int p = 0; p < 2; ++p) weights[block / 2][p * 2 + block % 2] = pairs[kFirst + p];
    }
  }

  uint32_t words_[kBlocks];       // of one row of each block
  uint32_t factors_[kBlocks];     // of their weights
  uint32_t rows_[kRowBlocks][2];  // of the part that is multiplied, then of the next
  Fragments weights_[2];          // of the same
  const char* shared_;
  typename Words::Context context_;  // of weights that have no groups
  uint32_t halves_;                  // the order of a word's halves
  // Byte offsets at the first part, which others exclusive-or into a position in the row: of the
  // lane's first row of A, at its part of a chunk's k, and of the row that it names to ldmatrix.
  int offset_a_;
  int offset_b_;
  int scales_;
};

}  // namespace moe::sm80

#endif  // KERNELS_SM80_HIGH_UNPACKING_MAINLOOP_CUH_
