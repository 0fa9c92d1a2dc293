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
        k_tiles_((gemm.k + T::kTile.k - 1) / T::kTile.k),
        chunk_a_(threadIdx.x % T::kChunksA),
        chunk_b_(threadIdx.x % T::kChunksB) {
    const int row_a = threadIdx.x / T::kChunksA;
    const int row_b = threadIdx.x / T::kChunksB;
    shared_a_ = shared + row_a * T::kRowBytesA + (chunk_a_ ^ SwizzleA<T>(row_a)) * 16;
    shared_b_ = shared + T::kBytesA + row_b * T::kRowBytesB +
                (chunk_b_ ^ LdmatrixSwizzle<T::kRowBytesB>(row_b)) * 16;
    BeginTile();
  }

  // Issues part `kPart` of `kParts` of the current step's copies, so that a caller can spread
  // them between its mma instructions.
  template <int kPart, int kParts>
  __device__ void Issue() const {
    if (work_ >= schedule_.work_items) return;
    const uint32_t stage = stage_ * T::kStageBytes;
    const int32_t chunks_a = gemm_.k / 8;
    const int32_t chunk_a = k_tile_ * T::kChunksA + chunk_a_;
#pragma unroll
    for (int i = kPart; i < T::kLoadsA; i += kParts) {
      if (row_a_[i] == kNoRow) continue;
      const char* from = static_cast<const char*>(gemm_.a) +
                         (static_cast<int64_t>(row_a_[i]) * chunks_a + chunk_a) * 16;
      CopyAsync16(shared_a_ + stage + i * T::kRowStepA * T::kRowBytesA, from, chunk_a < chunks_a);
    }
    const uint32_t row_bytes = gemm_.k * (T::kQuantized ? 1 : 2);
    const int32_t k_byte = (k_tile_ * T::kChunksB + chunk_b_) * 16;
    const bool fill = k_byte < row_bytes;
#pragma unroll
    for (int i = kPart; i < T::kLoadsB; i += kParts) {
      constexpr int kStep = T::kRowStepB;
      if (column_ + Columns::Column(i * kStep) >= gemm_.columns) continue;
      const char* row = Columns::IsGate(i * kStep) ? gate_rows_ : rows_;
      const char* from = row + static_cast<uint64_t>(row_bytes) * Columns::Column(i * kStep);
      CopyAsync16(shared_b_ + stage + i * kStep * T::kRowBytesB, from + k_byte, fill);
    }
  }

  // Moves on to the next step: the next stage, the next part of k, or the next tile.
  __device__ void Advance() {
    stage_ = stage_ + 1 == T::kStages ? 0 : stage_ + 1;
    if (++k_tile_ < k_tiles_) return;
    k_tile_ = 0;
    work_ += gridDim.x;
    BeginTile();
  }

 private:
  static constexpr int32_t kNoRow = -1;

  __device__ void BeginTile() {
    if (work_ >= schedule_.work_items) return;
    const WorkItem item = schedule_.Decode(work_);
    const int row_a = threadIdx.x / T::kChunksA;
#pragma unroll
    for (int i = 0; i < T::kLoadsA; ++i) {
      const int row = row_a + i * T::kRowStepA;
      row_a_[i] = kNoRow;
      if (row >= item.rows) continue;
      const int32_t sorted = item.row_begin + row;
      row_a_[i] = gemm_.row_source != nullptr ? __ldg(gemm_.row_source + sorted) : sorted;
    }
    const int row_b = threadIdx.x / T::kChunksB;
    column_ = item.column + Columns::Column(row_b);
    const int64_t row_bytes = static_cast<int64_t>(gemm_.k) * (T::kQuantized ? 1 : 2);
    const int64_t rows = static_cast<int64_t>(gemm_.columns) * Columns::kHalves;
    const char* up =
        static_cast<const char*>(gemm_.weights) + (item.expert * rows + column_) * row_bytes;
    const char* gate = up + gemm_.columns * row_bytes;
    // The gate bit of a row is either in the thread's own part of it or in the compile-time part.
    rows_ = Columns::IsGate(row_b) ? gate : up;
    gate_rows_ = gate;
  }

  const GroupedGemm& gemm_;
  const Schedule& schedule_;
  int32_t work_;
  int32_t k_tile_ = 0;
  int32_t k_tiles_;
  int32_t stage_ = 0;
  int32_t chunk_a_;
  int32_t chunk_b_;
  uint32_t shared_a_;
  uint32_t shared_b_;
  int32_t row_a_[T::kLoadsA];  // rows of A, kNoRow beyond the tile
  int32_t column_;             // of the thread's first weight row
  const char* rows_;           // that weight row
  const char* gate_rows_;
};

}  // namespace moe::sm80

#endif  // KERNELS_SM80_LOADER_CUH_
