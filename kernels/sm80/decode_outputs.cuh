// SPDX-License-Identifier: Apache-2.0
//
// The end of a unit of work of the few-token layer (decode_gemm.cuh): its slices' sums, in shared
// memory, become outputs.

#ifndef KERNELS_SM80_DECODE_OUTPUTS_CUH_
#define KERNELS_SM80_DECODE_OUTPUTS_CUH_

#include <cstdint>

#include "kernels/common/activation.cuh"
#include "kernels/common/dequantize.cuh"
#include "kernels/sm80/decode_route.cuh"
#include "moe/numeric.cuh"

namespace moe::sm80 {

template <typename Element, WeightKind kKind, int kTokenBlocks, bool kGated>
class DecodeOutputs {
  static constexpr int kTokens = 8 * kTokenBlocks;
  static constexpr int kWarpSums = DecodeWarpSums(kTokenBlocks);

 public:
  static constexpr int kColumns = kDecodeRows / (kGated ? 2 : 1);  // of a unit

  // Stores a warp's sums, [block of 16 rows][block of 8 tokens][as mma leaves them], to its place.
  __device__ __forceinline__ static void Keep(const float (&acc)[2][kTokenBlocks][4], float* sums) {
    const int quad = threadIdx.x % 4;
    float* own = sums + threadIdx.x % 32 / 4;
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int t = 0; t < kTokenBlocks; ++t) {
        float* p = own + (block * kTokens + t * 8 + 2 * quad) * kDecodePitch;
        p[0] = acc[block][t][0];
        p[kDecodePitch] = acc[block][t][1];
        p[8] = acc[block][t][2];
        p[kDecodePitch + 8] = acc[block][t][3];
      }
    }
  }

  // The scales of the channels of a thread's outputs, which are all of one column, where weights have
  // such scales. Of two, that of the up row comes first.
  struct ChannelScales {
    float scale[kGated ? 2 : 1];
  };
  // Loads them, before the barrier that Store() needs: they take as long as weights.
  __device__ __forceinline__ static ChannelScales LoadScales(const GroupedGemm& gemm,
                                                             const DecodePass& pass,
                                                             int first_column, int thread) {
    ChannelScales channel = {};
    if constexpr (kKind == WeightKind::k8Bit) {
      const int column = min(first_column + thread % kColumns, gemm.columns - 1);
      int64_t row = static_cast<int64_t>(pass.expert) * gemm.columns * (kGated ? 2 : 1) + column;
      if (thread < kColumns * pass.num_slots) {
#pragma unroll
        for (float& scale : channel.scale) {
          scale = LoadAsFloat(gemm.weight_scales, row, gemm.weight_scale_dtype);
          row += gemm.columns;
        }
      }
    }
    return channel;
  }

  // Adds the sums of the 2^slices_log2 warps from `sums` on and stores the unit's outputs, by that
  // many warps' threads. `slot_scale` is that of the first output of `thread`.
  __device__ __forceinline__ static void Store(const GroupedGemm& gemm, const DecodePass& pass,
                                               int first_column, int thread, int slices_log2,
                                               const float* sums, const ChannelScales& channel,
                                               float slot_scale) {
    const int64_t expert_row = static_cast<int64_t>(pass.expert) * gemm.columns * (kGated ? 2 : 1);
    DispatchActivation<kGated>(gemm.activation, [&](auto tag) {
      constexpr Activation kActivation = decltype(tag)::value;
#pragma unroll 1
      for (int i = thread; i < kColumns * pass.num_slots; i += 32 << slices_log2) {
        const int in_unit = i % kColumns;
        const int token = i / kColumns;
        const int column = first_column + in_unit;
        if (column >= gemm.columns) continue;
        const float* p = sums + token * kDecodePitch + in_unit % 16;
        const int64_t slot = DecodeShared<kTokenBlocks>::Slots()[pass.first_slot + token];
        float value;
        if constexpr (kGated) {
          const float up =
              Channel(gemm, expert_row + column, Add(p, slices_log2), channel.scale[0]);
          const float gate =
              Channel(gemm, expert_row + gemm.columns + column,
                      Add(p + kTokens * kDecodePitch, slices_log2), channel.scale[1]);
          value = ApplyGated<kActivation>(gate, up, LoadActivationScalars(gemm, pass.expert));
        } else {
          value = Apply<kActivation>(Channel(
              gemm, expert_row + column,
              Add(p + in_unit / 16 * kTokens * kDecodePitch, slices_log2), channel.scale[0]));
          if (gemm.slot_scales != nullptr) {
            value *= i == thread ? slot_scale : __ldg(gemm.slot_scales + slot);
          }
        }
        static_cast<uint16_t*>(gemm.out)[slot * gemm.columns + column] =
            static_cast<uint16_t>(PackPair(value, value, gemm.out_dtype));
      }
    });
  }

 private:
  // The slices' sums of one output, in order.
  __device__ static float Add(const float* sums, int slices_log2) {
    float sum = 0.0f;
#pragma unroll 4
    for (int s = 0; s < 1 << slices_log2; ++s) sum += sums[s * kWarpSums];
    return sum;
  }

  // A sum with its channel's scale and bias.
  __device__ static float Channel(const GroupedGemm& gemm, int64_t row, float sum, float scale) {
    sum *= kUnscale<Element, kKind>;
    if constexpr (kKind == WeightKind::k8Bit) sum *= scale;
    if (gemm.bias != nullptr) sum += LoadAsFloat(gemm.bias, row, gemm.bias_dtype);
    return sum;
  }
};

}  // namespace moe::sm80

#endif  // KERNELS_SM80_DECODE_OUTPUTS_CUH_
