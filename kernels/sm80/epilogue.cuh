// SPDX-License-Identifier: Apache-2.0
//
// From float32 accumulators to the output: channel scales, bias, activation, row scale, one
// rounding to 16 bits, stores of up to 16 bytes straight from registers.

#ifndef KERNELS_SM80_EPILOGUE_CUH_
#define KERNELS_SM80_EPILOGUE_CUH_

#include <cstdint>

#include "kernels/common/activation.cuh"
#include "kernels/common/dequantize.cuh"
#include "kernels/sm80/scheduler.cuh"
#include "kernels/sm80/traits.cuh"
#include "moe/numeric.cuh"

namespace moe::sm80 {

// Scale and bias of kVector adjacent weight rows.
template <typename T>
struct Channels {
  static constexpr int kVector = T::Columns::kVector;
  float scale[kVector];
  float bias[kVector];

  // `first` is the first of them, at `place` of those that the loader brought, if it did.
  __device__ Channels(const GroupedGemm& gemm, int64_t first, const char* shared, int place) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      scale[v] = kUnscale<typename T::Element, T::kKind>;
      bias[v] = 0.0f;
    }
    if constexpr (T::kHasChannels) {
      LoadAsFloat<kVector, true>(shared + T::kChannelsPlace, place, gemm.weight_scale_dtype, scale);
    } else if constexpr (T::kKind == WeightKind::k8Bit) {
      LoadAsFloat(gemm.weight_scales, first, gemm.weight_scale_dtype, scale);
    }
    if (gemm.bias != nullptr) LoadAsFloat(gemm.bias, first, gemm.bias_dtype, bias);
  }

  __device__ float operator()(int v, float sum) const { return sum * scale[v] + bias[v]; }
};

template <int kVector>
__device__ inline void StoreRow(uint16_t* out, const float (&value)[kVector], DType dtype) {
  uint32_t words[kVector / 2];
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    words[i] = PackPair(value[2 * i], value[2 * i + 1], dtype);
  }
  if constexpr (kVector == 8) {
    *reinterpret_cast<uint4*>(out) = make_uint4(words[0], words[1], words[2], words[3]);
  } else if constexpr (kVector == 4) {
    *reinterpret_cast<uint2*>(out) = make_uint2(words[0], words[1]);
  } else {
    static_assert(kVector == 2, "a store is 4, 8 or 16 bytes");
    *reinterpret_cast<uint32_t*>(out) = words[0];
  }
}

// `Consumer` says which rows and columns a thread's accumulators belong to.
template <typename T, typename Consumer>
__device__ void Epilogue(const GroupedGemm& gemm, const TileQueue<T>& queue, int32_t turn,
                         const typename Consumer::Accumulators& acc, const char* shared) {
  using Columns = typename T::Columns;
  constexpr int kVector = Columns::kVector;
  const WarpPlace warp = GetWarpPlace<T>();
  const WorkItem item = queue.Item(turn);

  float row_scale[Consumer::kThreadRows];
  if constexpr (!T::kGated) {
#pragma unroll
    for (int i = 0; i < Consumer::kThreadRows; ++i) {
      row_scale[i] = 1.0f;
      const int row = Consumer::Row(warp, i);
      if (gemm.slot_scales != nullptr && row < item.rows) {
        row_scale[i] = __uint_as_float(queue.Word(turn, item, row));
      }
    }
  }

  DispatchActivation<T::kGated>(gemm.activation, [&](auto tag) {
    constexpr Activation kActivation = decltype(tag)::value;
    [[maybe_unused]] const ActivationScalars scalars =
        T::kGated ? LoadActivationScalars(gemm, item.expert) : ActivationScalars{};
#pragma unroll
    for (int group = 0; group < Columns::kGroups; ++group) {
      const int column = item.column + Consumer::Column(warp, group);
      // columns is a multiple of 8, so a vector is inside or outside as a whole.
      if (column >= gemm.columns) continue;
      const int64_t expert_row = static_cast<int64_t>(item.expert) * Columns::kHalves;
      const int place = column - item.column;
      const Channels<T> up(gemm, expert_row * gemm.columns + column, shared, place);
      // Without a gate the same again, and not used.
      constexpr int kGate = Columns::kHalves - 1;
      const Channels<T> gate(gemm, (expert_row + kGate) * gemm.columns + column, shared,
                             kGate * T::kTileColumns + place);
#pragma unroll
      for (int i = 0; i < Consumer::kThreadRows; ++i) {
        const int row = Consumer::Row(warp, i);
        if (row >= item.rows) continue;
        float value[kVector];
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const float sum = Consumer::Sum(acc, i, group, v, false);
          if constexpr (T::kGated) {
            value[v] = ApplyGated<kActivation>(gate(v, Consumer::Sum(acc, i, group, v, true)),
                                               up(v, sum), scalars);
          } else {
            value[v] = row_scale[i] * Apply<kActivation>(up(v, sum));
          }
        }
        StoreRow(static_cast<uint16_t*>(gemm.out) +
                     static_cast<int64_t>(item.row_begin + row) * gemm.columns + column,
                 value, gemm.out_dtype);
      }
    }
  });
}

}  // namespace moe::sm80

#endif  // KERNELS_SM80_EPILOGUE_CUH_
