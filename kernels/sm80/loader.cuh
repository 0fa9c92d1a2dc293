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

// 16 bytes past L1, or zeros where !fill.
__device__ inline void CopyAsync16(uint32_t shared, const void* global, bool fill) {
  const int bytes = fill ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared),
               "l"(global), "r"(bytes));
}

template <typename T>
class Loader {
  using Columns = typename T::Columns;
  using Schedule = Scheduler<T::kTile.m, T::kTileColumns>;

 public:
  __device__ Loader(const GroupedGemm& gemm, const Schedule& schedule, uint32_t shared)
      : gemm_(gemm),
        schedule_(schedule),
        work_(blockIdx.x),
        k_tiles_((gemm.k + T::kTile.k - 1) / T::kTile.k) {
    const int chunk_a = threadIdx.x % T::kChunksA;
    const int chunk_b = threadIdx.x % T::kChunksB;
    shared_a_ = shared + RowA() * T::kRowBytesA + (chunk_a ^ SwizzleA<T>(RowA())) * 16;
    shared_b_ = shared + T::kBytesA + RowB() * T::kRowBytesB +
                (chunk_b ^ LdmatrixSwizzle<T::kRowBytesB>(RowB())) * 16;
    BeginTile();
  }

  // Issues part `kPart` of `kParts` of the current step's copies, so that a caller can spread
  // them between its mma instructions. Branch-free for the same reason: each copy is predicated,
  // and after the last tile all predicates are false.
  template <int kPart, int kParts>
  __device__ void Issue() const {
    const uint32_t row_bytes_a = gemm_.k * 2;
#pragma unroll
    for (int i = kPart; i < T::kLoadsA; i += kParts) {
      if (row_a_[i] < 0) continue;
      CopyAsync16(shared_a_ + stage_ + i * T::kRowStepA * T::kRowBytesA,
                  a_ + static_cast<uint64_t>(row_bytes_a) * row_a_[i], chunks_left_a_ > 0);
    }
    const uint32_t row_bytes_b = gemm_.k * (T::kQuantized ? 1 : 2);
#pragma unroll
    for (int i = kPart; i < T::kLoadsB; i += kParts) {
      constexpr int kStep = T::kRowStepB;
      if (column_ + Columns::Column(i * kStep) >= gemm_.columns) continue;
      const char* rows = Columns::IsGate(i * kStep) ? gate_rows_ : rows_;
      CopyAsync16(shared_b_ + stage_ + i * kStep * T::kRowBytesB,
                  rows + static_cast<uint64_t>(row_bytes_b) * Columns::Column(i * kStep),
                  chunks_left_b_ > 0);
    }
  }

  // Moves on to the next step: the next stage, the next part of k, or the next tile.
  __device__ void Advance() {
    stage_ = stage_ == (T::kStages - 1) * T::kStageBytes ? 0 : stage_ + T::kStageBytes;
    a_ += T::kRowBytesA;
    rows_ += T::kRowBytesB;
    gate_rows_ += T::kRowBytesB;
    chunks_left_a_ -= T::kChunksA;
    chunks_left_b_ -= T::kChunksB;
    if (++k_tile_ == k_tiles_) {
      work_ += gridDim.x;
      BeginTile();
    }
  }

 private:
  static constexpr int32_t kNoRow = -1;

  // The thread's first row of each operand; the others follow in steps of kRowStep.
  __device__ static int RowA() { return threadIdx.x / T::kChunksA; }
  __device__ static int RowB() { return threadIdx.x / T::kChunksB; }

  __device__ void BeginTile() {
    k_tile_ = 0;
    if (work_ >= schedule_.work_items) {
      column_ = 1 << 30;
#pragma unroll
      for (int i = 0; i < T::kLoadsA; ++i) row_a_[i] = kNoRow;
      return;
    }
    const WorkItem item = schedule_.Decode(work_);
    const int chunk_a = threadIdx.x % T::kChunksA;
    a_ = static_cast<const char*>(gemm_.a) + chunk_a * 16;
    chunks_left_a_ = gemm_.k / 8 - chunk_a;
#pragma unroll
    for (int i = 0; i < T::kLoadsA; ++i) {
      const int row = RowA() + i * T::kRowStepA;
      row_a_[i] = kNoRow;
      if (row >= item.rows) continue;
      row_a_[i] = item.row_begin + row;
      if (gemm_.gather) {
        row_a_[i] = static_cast<uint32_t>(gemm_.row_slot[row_a_[i]]) /
                    static_cast<uint32_t>(gemm_.top_k);
      }
    }
    column_ = item.column + Columns::Column(RowB());
    const int chunk_b = threadIdx.x % T::kChunksB;
    const int64_t row_bytes = static_cast<int64_t>(gemm_.k) * (T::kQuantized ? 1 : 2);
    chunks_left_b_ = static_cast<int32_t>(row_bytes / 16) - chunk_b;
    const int64_t expert_rows = static_cast<int64_t>(gemm_.columns) * Columns::kHalves;
    const char* up = static_cast<const char*>(gemm_.weights) +
                     (item.expert * expert_rows + column_) * row_bytes + chunk_b * 16;
    const char* gate = up + gemm_.columns * row_bytes;
    // The gate bit of a row is either in the thread's own part of it or in the compile-time part.
    rows_ = Columns::IsGate(RowB()) ? gate : up;
    gate_rows_ = gate;
  }

  const GroupedGemm& gemm_;
  const Schedule& schedule_;
  int32_t work_;
  int32_t k_tile_ = 0;
  int32_t k_tiles_;
  uint32_t stage_ = 0;  // byte offset
  uint32_t shared_a_;
  uint32_t shared_b_;
  const char* a_ = nullptr;  // input at the thread's chunk of the step
  int32_t row_a_[T::kLoadsA];      // rows of the input, kNoRow beyond the tile
  int32_t chunks_left_a_ = 0;      // of k, from the thread's chunk on: none means zeros
  int32_t chunks_left_b_ = 0;
  int32_t column_;                   // of the thread's first weight row
  const char* rows_ = nullptr;       // that weight row, at the thread's chunk of the step
  const char* gate_rows_ = nullptr;  // its gate row
};

}  // namespace moe::sm80

#endif  // KERNELS_SM80_LOADER_CUH_
