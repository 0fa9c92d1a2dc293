// SPDX-License-Identifier: Apache-2.0
//
// Grouped GEMM for Ampere: cp.async, ldmatrix, mma.sync. What it computes is in
// moe/grouped_gemm.h; this file is the kernel, and is compiled once for each
//
//     MOE_TILE     index into kTiles
//     MOE_DTYPE    kFloat16 or kBFloat16
//     MOE_WEIGHTS  a WeightKind
//
// A tile of one expert, m rows by n weight rows:
//
//                      weights[e] (K-major), n rows: for a gated activation
//                      half of them up rows, half the gate rows of the same outputs
//                      +--------------------+
//                      |    B [n][k]        |     a stage: A [m][k] and B [n][k] for 64 or
//     gathered         +--------------------+     128 values of k, swizzled; 3 or 4 stages
//     rows of A        +--------------------+
//     +--------+       | warp | warp | ...  |     each warp: kMmaM x kMmaN mma.m16n8k16
//     | [m][k] |       +------+------+      |     accumulators in registers, float32
//     +--------+       | warp |      |      |
//                      +--------------------+
//
// The loop is flat over steps, (tile, kStep of k). A step multiplies one stage and, between its
// mmas, starts the copies for the step kStages - 1 ahead, whichever tile that belongs to, into the
// stage that was multiplied before. Weights that are not stored in 16 bits are unpacked in
// registers, in low tiles (unpacking_mainloop.cuh) and in high ones (high_unpacking_mainloop.cuh);
// in tiles of 256 rows they are widened between the mmas, too, one step ahead (loader.cuh).
// A step's last mmas run while the warps meet at the barrier that publishes the next stage and
// while the first fragments of that one are loaded.
//
// What bounds it. Few rows an expert: DRAM; an SM must keep 32 KiB or more in flight, which
// (kStages - 1) stages of the resident blocks do. Many rows: the issue rate of mma.sync; a
// 64x64 warp tile reads 4 KiB of shared memory for 32 mmas, half of what the banks can give.

#include <cute/arch/copy_sm80.hpp>
#include <type_traits>

#include "kernels/sm80/epilogue.cuh"
#include "kernels/sm80/grouped_gemm.h"
#include "kernels/sm80/high_unpacking_mainloop.cuh"
#include "kernels/sm80/loader.cuh"
#include "kernels/sm80/mainloop.cuh"
#include "kernels/sm80/scheduler.cuh"
#include "kernels/sm80/shared_memory.h"
#include "kernels/sm80/traits.cuh"
#include "kernels/sm80/unpacking_mainloop.cuh"

namespace moe::sm80 {

template <typename T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    GroupedGemmKernel(const __grid_constant__ GroupedGemm gemm, const uint32_t weight_flip) {
  extern __shared__ __align__(1024) char shared[];  // which Mainloop::Load() counts on

  TileQueue<T> queue(gemm, shared);
  Loader<T> loader(gemm, queue, shared, weight_flip);
  using Unpacking =
      std::conditional_t<T::kTile.high(), HighUnpackingMainloop<T>, UnpackingMainloop<T>>;
  using Consumer = std::conditional_t<T::kUnpacks, Unpacking, Mainloop<T>>;
  Consumer mainloop(shared, weight_flip);

  // Scales wait here for a step before they are stored to their stage: of each step that begins
  // before the loop, then of the one that began last. (What a kind of weights does not need, scales
  // or widening, the loader's functions leave out.)
  typename Loader<T>::ScaleBits scales[T::kStages - 1];
#pragma unroll(T::kUnpacks ? T::kStages : 1)
  for (int s = 0; s < T::kStages - 2; ++s) {
    loader.template Issue<0, 1>(s * T::kStageBytes);
    cute::cp_async_fence();
    loader.LoadScales(scales[s]);
    loader.PushScales();
    __syncthreads();  // one between turns, for the queue
    loader.Advance();
  }
  loader.template Issue<0, 1>((T::kStages - 2) * T::kStageBytes);
  cute::cp_async_fence();
  loader.LoadScales(scales[T::kStages - 2]);
#pragma unroll
  for (int s = 0; s < T::kStages - 2; ++s) loader.StoreScales(scales[s], s * T::kStageBytes);
  // The thread's own copies of the next step: what it widens.
  auto wait_for_own_copies = [] { cute::cp_async_wait<T::kStages - 3>(); };
  // Warps with different numbers of active row blocks come to this barrier from different code. It
  // counts arrivals at barrier 0 whatever instruction they come from (PTX, bar.sync).
  auto publish = [] {
    if constexpr (!T::kWidens) cute::cp_async_wait<T::kStages - 2>();
    __syncthreads();
  };
  // Operand B of a step: part of its stage, or one of the buffers that weights are widened into.
  auto place = [](int stage, int wide) {
    return StagePlace{stage, T::kWidens ? T::kWidePlace + wide * T::kBytesB : stage + T::kBytesA};
  };
  if constexpr (T::kWidens) {
    cute::cp_async_wait<T::kStages - 2>();
    loader.template Widen<0, 1>(0, 0);
  }
  loader.PushScales();
  __syncthreads();
  loader.Advance();
  publish();
  mainloop.Prime(place(0, 0));

  constexpr int kLastStage = (T::kStages - 1) * T::kStageBytes;
  int stage = 0;  // byte offset of the stage to multiply
  int wide = 0;   // its buffer
  for (int32_t turn = 0; turn < queue.turns(); ++turn) {
    const int active = Consumer::Active(queue.Item(turn).rows);
    typename Consumer::Accumulators acc = {};
    for (int k_left = gemm.k; k_left > 0; k_left -= T::kStep) {
      const int next = stage == kLastStage ? 0 : stage + T::kStageBytes;
      const int previous = stage == 0 ? kLastStage : stage - T::kStageBytes;
      mainloop.Run(
          place(stage, wide), place(next, wide ^ 1), active, acc,
          [&](auto part) {
            constexpr int kPart = decltype(part)::value;
            constexpr int kParts = Consumer::kParts - 1;
            if constexpr (kPart == 0) {
              // Those of the step whose copies began last, before the ones that Issue() begins.
              const int last = previous == 0 ? kLastStage : previous - T::kStageBytes;
              loader.StoreScales(scales[T::kStages - 2], last);
            }
            if constexpr (T::kWidens && kPart == 0) wait_for_own_copies();
            loader.template Widen<kPart, kParts>(next, wide ^ 1);
            loader.template Issue<kPart, kParts>(previous);
            if constexpr (kPart == kParts - 1) cute::cp_async_fence();
          },
          publish);
      loader.template LoadScales<T::kTile.high()>(scales[T::kStages - 2]);
      loader.PushScales();
      loader.Advance();
      stage = next;
      wide ^= 1;
    }
    // The empty asm keeps the compiler from carrying the item's address through the loop over k, for
    // which there is no register where two sets of sums of 32 rows are held: the 32x64 tile spilled.
    int32_t same = turn;
    if constexpr (T::kScaleSums && T::kTile.m >= 32) asm volatile("" : "+r"(same));
    if (Loader<T>::IsLate(gemm)) {
      loader.BringLate(turn);
      cute::cp_async_fence();
      cute::cp_async_wait<0>();
      __syncthreads();
    }
    if (mainloop.Reduce(acc, shared)) Epilogue<T, Consumer>(gemm, queue, same, acc, shared);
  }
}

namespace {

template <typename T>
cudaError_t Launch(const GroupedGemm& gemm, int blocks, cudaStream_t stream) {
  const cudaError_t status = AllowSharedMemory<GroupedGemmKernel<T>>(T::kSharedMemory);
  if (status != cudaSuccess) return status;
  const int64_t column_tiles = (gemm.columns + T::kTileColumns - 1) / T::kTileColumns;
  const int64_t work_items = gemm.max_row_tiles * column_tiles;
  // The device counts them in 32 bits.
  if (work_items > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const unsigned grid = static_cast<unsigned>(work_items < blocks ? work_items : blocks);
  GroupedGemmKernel<T><<<grid, T::kThreads, T::kSharedMemory, stream>>>(
      gemm, WeightFlip(gemm.dtype, gemm.weight_format));
  return cudaGetLastError();
}

template <int kTileIndex, DType kDType, WeightKind kKind, bool kScaleSums>
cudaError_t LaunchWith(const GroupedGemm& gemm, int blocks, cudaStream_t stream) {
  using Element = ElementOf<kDType>;
  return IsGated(gemm.activation)
             ? Launch<Traits<kTileIndex, Element, kKind, true, kScaleSums>>(gemm, blocks, stream)
             : Launch<Traits<kTileIndex, Element, kKind, false, kScaleSums>>(gemm, blocks, stream);
}

}  // namespace

template <int kTileIndex, DType kDType, WeightKind kKind>
cudaError_t LaunchGroupedGemm(const GroupedGemm& gemm, int blocks, cudaStream_t stream) {
  constexpr Tile kTile = kTiles[kTileIndex];
  if constexpr (kTile.scales_sums(kKind)) {
    if (gemm.group_size % kTile.step(kKind) == 0) {
      return LaunchWith<kTileIndex, kDType, kKind, true>(gemm, blocks, stream);
    }
  }
  return LaunchWith<kTileIndex, kDType, kKind, false>(gemm, blocks, stream);
}

template cudaError_t LaunchGroupedGemm<MOE_TILE, DType::MOE_DTYPE, WeightKind::MOE_WEIGHTS>(
    const GroupedGemm&, int, cudaStream_t);

}  // namespace moe::sm80
