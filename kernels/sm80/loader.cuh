// SPDX-License-Identifier: Apache-2.0
//
// The producer half of the pipeline: cp.async from global memory into the stages.
//
// It runs kStages - 1 steps ahead of the mma, across tile boundaries: when the tensor cores finish
// a tile, the first steps of the next are already in shared memory, so the flow of bytes never
// drains between tiles. Rows of A are gathered by index here, which costs one 4-byte load a row
// and tile, and no copy of the input.
//
// What is loaded where nothing is to be loaded: beyond the end of k both operands are filled
// with zeros (0 * 0 adds nothing); rows and columns beyond a tile's edge are left as they are,
// since they only reach accumulators that are never stored.

#ifndef KERNELS_SM80_LOADER_CUH_
#define KERNELS_SM80_LOADER_CUH_

#include <cstdint>

#include "kernels/sm80/scheduler.cuh"
#include "kernels/sm80/traits.cuh"

namespace moe::sm80 {

// 16 bytes past L1, or zeros where !fill, or nothing where !copy. The predicate is in the
// instruction: as a C++ condition it may become a branch around it.
__device__ inline void CopyAsync16(uint32_t shared, const void* global, bool copy, bool fill) {
  asm volatile(
      "{\n"
      "  .reg .pred copy;\n"
      "  setp.ne.b32 copy, %2, 0;\n"
      "  @copy cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %3;\n"
      "}\n" ::"r"(shared),
      "l"(global), "r"(static_cast<int>(copy)), "r"(fill ? 16 : 0));
}

template <typename T>
class Loader {
  using Columns = typename T::Columns;
  using Schedule = Scheduler<T::kTile.m, T::kTileColumns>;

 public:
  __device__ Loader(const GroupedGemm& gemm, const Schedule& schedule, uint32_t shared)
      : gemm_(gemm), schedule_(schedule), work_(blockIdx.x) {
    shared_a_ = shared + RowA() * T::kRowBytesA + (ChunkA() ^ SwizzleA<T>(RowA())) * 16;
    shared_b_ =
        shared + RowB() * T::kRowBytesB + (ChunkB() ^ LdmatrixSwizzle<T::kRowBytesB>(RowB())) * 16;
    BeginTile();
  }

  // Issues part `kPart` of `kParts` of the current step's copies into the stage at byte offset
  // `stage`, so that a caller can spread them between its mma instructions. Branch-free for the
  // same reason: a bit of copies_ predicates each copy, and after the last tile all are clear.
  template <int kPart, int kParts>
  __device__ void Issue(int stage) const {
    const uint64_t k = static_cast<uint32_t>(gemm_.k);  // for products of 32 by 32 bits
    const uint32_t to_a = shared_a_ + stage;
    const uint32_t to_b = (T::kQuantized ? shared_b_ : shared_a_) + stage + T::kBytesA;
#pragma unroll
    for (int i = kPart; i < T::kLoadsA; i += kParts) {
      CopyAsync16(to_a + i * T::kRowStepA * T::kRowBytesA, a_ + k * twice_row_a_[i],
                  (copies_ & BitA(i)) != 0, ChunkA() * 8 < k_left_);
    }
#pragma unroll
    for (int i = kPart; i < T::kLoadsB; i += kParts) {
      constexpr int kBytes = T::kQuantized ? 1 : 2;
      const int n = i * T::kRowStepB;
      const uint32_t row = Columns::Column(n) + (Columns::IsGate(n) ? gemm_.columns : 0);
      CopyAsync16(to_b + n * T::kRowBytesB, rows_ + k * (row * kBytes), (copies_ & BitB(i)) != 0,
                  ChunkB() * (16 / kBytes) < k_left_);
    }
  }

  // Moves on to the next step: the next part of k, or the next tile.
  __device__ void Advance() {
    a_ += T::kRowBytesA;
    rows_ += T::kRowBytesB;
    k_left_ -= T::kTile.k;
    if (k_left_ <= 0) {
      work_ += gridDim.x;
      BeginTile();
    }
  }

 private:
  static_assert(T::kLoadsA + T::kLoadsB <= 32, "a bit a copy");
  static constexpr uint32_t BitA(int i) { return 1u << i; }
  static constexpr uint32_t BitB(int i) { return 1u << (T::kLoadsA + i); }

  // The thread's chunk of a row, and its first row of each operand; its other rows follow in steps
  // of kRowStep. With 16-bit weights all is the same for both operands, and kept once: registers
  // are what the widest tile has fewest of.
  __device__ static int ChunkA() { return threadIdx.x % T::kChunksA; }
  __device__ static int ChunkB() { return threadIdx.x % T::kChunksB; }
  __device__ static int RowA() { return threadIdx.x / T::kChunksA; }
  __device__ static int RowB() { return threadIdx.x / T::kChunksB; }

  __device__ void BeginTile() {
    k_left_ = gemm_.k;
    copies_ = 0;
    if (work_ >= schedule_.work_items) return;
    const WorkItem item = schedule_.Decode(work_);

    a_ = static_cast<const char*>(gemm_.a) + ChunkA() * 16;
#pragma unroll
    for (int i = 0; i < T::kLoadsA; ++i) {
      const int row = RowA() + i * T::kRowStepA;
      twice_row_a_[i] = 0;
      if (row >= item.rows) continue;
      copies_ |= BitA(i);
      uint32_t source = item.row_begin + row;
      if (gemm_.gather) {
        source = static_cast<uint32_t>(gemm_.row_slot[source]) / static_cast<uint32_t>(gemm_.top_k);
      }
      twice_row_a_[i] = 2 * source;
    }

    const int32_t column = item.column + Columns::Column(RowB());
#pragma unroll
    for (int i = 0; i < T::kLoadsB; ++i) {
      if (column + Columns::Column(i * T::kRowStepB) < gemm_.columns) copies_ |= BitB(i);
    }
    const int64_t row_bytes = static_cast<int64_t>(gemm_.k) * (T::kQuantized ? 1 : 2);
    const int64_t expert_rows = static_cast<int64_t>(gemm_.columns) * Columns::kHalves;
    // Gate rows follow the up rows. The gate bit of a row's place in the tile is either in the
    // thread's own part of it, as here, or in the compile-time part, as in Issue().
    const int64_t row =
        item.expert * expert_rows + column + (Columns::IsGate(RowB()) ? gemm_.columns : 0);
    rows_ = static_cast<const char*>(gemm_.weights) + row * row_bytes + ChunkB() * 16;
  }

  const GroupedGemm& gemm_;
  const Schedule& schedule_;
  int32_t work_;
  int32_t k_left_;     // of the tile's k, from this step on: beyond it are zeros
  uint32_t shared_a_;  // where the thread's first chunk of each operand goes, in the first stage
  uint32_t shared_b_;
  uint32_t copies_;                   // which of the thread's copies the tile has
  const char* a_ = nullptr;           // of the input, at the thread's chunk of the step
  uint32_t twice_row_a_[T::kLoadsA];  // rows of the input; a row has 2 * k bytes
  const char* rows_ = nullptr;        // the thread's first weight row, at its chunk of the step
};

}  // namespace moe::sm80

#endif  // KERNELS_SM80_LOADER_CUH_
