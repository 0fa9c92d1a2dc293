// SPDX-License-Identifier: Apache-2.0
//
// The whole layer in one cooperative launch, for few tokens: each step of the usual four would
// take about as long to start and to drain as to run. Compiled once for each
//
//     MOE_DTYPE    kFloat16 or kBFloat16
//     MOE_WEIGHTS  a WeightKind
//
//   route      every block for itself                       (decode_route.cuh)
//   -- grid barrier, if units are handed out; GEMM 1's first weights are loaded before it --
//   GEMM 1     all blocks, units of 32 weight rows          (decode_gemm.cuh)
//   -- grid barrier; GEMM 2's first weights are loaded before it. None if units are handed out, where
//      GEMM 2 follows GEMM 1 pass by pass                   (decode_follow.cuh) --
//   GEMM 2     likewise; the rows of its output are slots
//   finalize   each token's slots, added in order, when all blocks have told that they have ended
//
// One block a multiprocessor, so that the launch may be cooperative wherever the chip is free.

#include <cooperative_groups.h>

#include <utility>

#include "kernels/sm80/decode.h"
#include "kernels/sm80/decode_gemm.cuh"
#include "kernels/sm80/decode_route.cuh"
#include "kernels/sm80/shared_memory.h"
#include "moe/problem.h"
#include "moe/sum_rows.cuh"

namespace moe::sm80 {
namespace {

// Once all blocks have ended their share of GEMM 2. A thread takes eight columns of a token.
template <DType kDType, int kTokenBlocks>
__device__ void Finalize(const DecodeLayer& layer) {
  constexpr int kRowsInFlight = 8;  // independent loads of a thread
  const GroupedGemm& gemm = layer.gemm[1];
  const int vectors = gemm.columns / 8;
  const int top_k = layer.gemm[0].top_k;
  // The empty asm keeps the compiler from computing what follows before the GEMMs, which have no
  // registers for it where a pass serves 16 tokens.
  int thread = threadIdx.x;
  if constexpr (kTokenBlocks > 1) asm volatile("" : "+r"(thread));
  const int lane = thread % 32;
  // Warps are numbered so that few go to as many multiprocessors.
  int i = (thread / 32 * gridDim.x + blockIdx.x) * 32 + lane;
  if (i - lane < layer.num_tokens * vectors) AwaitBlocks(layer.counters);
#pragma unroll 1
  for (; i < layer.num_tokens * vectors; i += gridDim.x * kDecodeThreads) {
    const int token = i / vectors;
    static_cast<uint4*>(layer.output)[i] = SumRows<kDType, kRowsInFlight>(
        top_k,
        [&](int j) {
          const int slot = token * top_k + j;
          const uint32_t present = DecodeShared<kTokenBlocks>::Present()[slot / 32];
          return (present >> slot % 32 & 1) != 0 ? slot : -1;
        },
        // Written by other multiprocessors: from L2.
        [&](int slot) {
          return __ldcg(static_cast<const uint4*>(gemm.out) + static_cast<int64_t>(slot) * vectors +
                        (i - token * vectors));
        });
  }
}

// kScaleSums: scales of groups multiply sums (decode_multiply.cuh); a chunk is a group then.
template <typename Element, WeightKind kKind, int kTokenBlocks, bool kGated, bool kScaleSums>
__global__ void __launch_bounds__(kDecodeThreads, 1)
    DecodeLayerKernel(const __grid_constant__ DecodeLayer layer, const uint32_t weight_flip) {
  using Gemm1 = DecodeGemm<Element, kKind, kTokenBlocks, kGated, kScaleSums, true>;
  using Gemm2 = DecodeGemm<Element, kKind, kTokenBlocks, false, kScaleSums, false>;
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();

  if (blockIdx.x == 0) {
    const int counters = DecodeCounters(layer.num_tokens * layer.gemm[0].top_k);
    for (int i = threadIdx.x; i < counters; i += kDecodeThreads) layer.counters[i] = 0;
  }
  if (threadIdx.x < kDecodeMaxSlots / 32) DecodeShared<kTokenBlocks>::Ended()[threadIdx.x] = 0;
  Route<kTokenBlocks>(layer);
  const int workers = kDecodeWarps * static_cast<int>(gridDim.x);
  const DecodeSplit split1 = SplitGemm1(kKind, kTokenBlocks, Gemm1::Chunks(layer.gemm[0]),
                                        Gemm1::Units(layer.gemm[0]), workers);
  const DecodeSplit split2 = SplitGemm2(kKind, kTokenBlocks, split1, Gemm2::Chunks(layer.gemm[1]),
                                        Gemm2::Units(layer.gemm[1]), workers);
  const bool follows = Follows(split1, split2);
  {
    Gemm1 gemm(layer.gemm[0], split1, follows, layer.counters, weight_flip);
    gemm.Prime();
    if (split1.hands_out) grid.sync();  // the counters are 0 behind it
    gemm.PrimeTokens();
    gemm.Run();
  }
  {
    Gemm2 gemm(layer.gemm[1], split2, follows, layer.counters, weight_flip);
    // The first warp tells of the block's arrival, and is to wait for no loads before it does.
    const bool tells = threadIdx.x < 32;
    if (!tells || follows) gemm.Prime();
    if (!follows) {
      auto arrived = grid.barrier_arrive();
      if (tells) gemm.Prime();
      grid.barrier_wait(std::move(arrived));
    }
    gemm.PrimeTokens();
    gemm.Run();
  }
  AnnounceBlock(layer.counters);
  if (layer.gemm[1].out_dtype == DType::kFloat16) {
    Finalize<DType::kFloat16, kTokenBlocks>(layer);
  } else {
    Finalize<DType::kBFloat16, kTokenBlocks>(layer);
  }
}

template <typename Element, WeightKind kKind, int kTokenBlocks, bool kGated, bool kScaleSums>
cudaError_t Launch(const DecodeLayer& layer, int blocks, cudaStream_t stream) {
  constexpr auto* kKernel = DecodeLayerKernel<Element, kKind, kTokenBlocks, kGated, kScaleSums>;
  constexpr int kSharedMemory = DecodeSharedMemory(kTokenBlocks);
  const cudaError_t status = AllowSharedMemory<kKernel>(kSharedMemory);
  if (status != cudaSuccess) return status;
  uint32_t weight_flip = WeightFlip(layer.gemm[0].dtype, layer.gemm[0].weight_format);
  void* arguments[] = {const_cast<DecodeLayer*>(&layer), &weight_flip};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kKernel), dim3(blocks),
                                     dim3(kDecodeThreads), arguments, kSharedMemory, stream);
}

template <DType kDType, WeightKind kKind, int kTokenBlocks>
cudaError_t Launch(const DecodeLayer& layer, int blocks, cudaStream_t stream) {
  using Element = ElementOf<kDType>;
  const bool gated = IsGated(layer.gemm[0].activation);
  if constexpr (kKind == WeightKind::kInt4) {
    if (layer.gemm[0].group_size == DecodeChunk(kKind)) {
      return gated ? Launch<Element, kKind, kTokenBlocks, true, true>(layer, blocks, stream)
                   : Launch<Element, kKind, kTokenBlocks, false, true>(layer, blocks, stream);
    }
  }
  return gated ? Launch<Element, kKind, kTokenBlocks, true, false>(layer, blocks, stream)
               : Launch<Element, kKind, kTokenBlocks, false, false>(layer, blocks, stream);
}

}  // namespace

template <DType kDType, WeightKind kKind>
cudaError_t LaunchDecodeLayer(int kernel, const DecodeLayer& layer, int blocks,
                              cudaStream_t stream) {
  static_assert(kNumDecodeKernels == 2, "one line for each");
  return kernel == 0 ? Launch<kDType, kKind, kDecodeTokenBlocks[0]>(layer, blocks, stream)
                     : Launch<kDType, kKind, kDecodeTokenBlocks[1]>(layer, blocks, stream);
}

template cudaError_t LaunchDecodeLayer<DType::MOE_DTYPE, WeightKind::MOE_WEIGHTS>(
    int, const DecodeLayer&, int, cudaStream_t);

}  // namespace moe::sm80
