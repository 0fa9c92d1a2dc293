// SPDX-License-Identifier: Apache-2.0
//
// From float32 accumulators to the output: channel scales, bias, activation, row scale, one
// rounding to 16 bits, stores of up to 16 bytes straight from registers.

#ifndef KERNELS_SM80_EPILOGUE_CUH_
#define KERNELS_SM80_EPILOGUE_CUH_

#include <cstdint>
#include <type_traits>

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

// Stores 4, 8 or 16 bytes, or nothing. The predicate is in the instruction, as in CopyAsync16: a
// branch around each row's arithmetic and store took as many instructions as those.
__device__ inline void StoreIf(bool store, const char* out, const uint32_t (&w)[4]) {
  asm volatile(
      "{\n"
      "  .reg .pred store;\n"
      "  setp.ne.b32 store, %0, 0;\n"
      "  @store st.global.v4.b32 [%1], {%2, %3, %4, %5};\n"
      "}\n" ::"r"(static_cast<int>(store)),
      "l"(out), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
      : "memory");
}
__device__ inline void StoreIf(bool store, const char* out, const uint32_t (&w)[2]) {
  asm volatile(
      "{\n"
      "  .reg .pred store;\n"
      "  setp.ne.b32 store, %0, 0;\n"
      "  @store st.global.v2.b32 [%1], {%2, %3};\n"
      "}\n" ::"r"(static_cast<int>(store)),
      "l"(out), "r"(w[0]), "r"(w[1])
      : "memory");
}
__device__ inline void StoreIf(bool store, const char* out, const uint32_t (&w)[1]) {
  asm volatile(
      "{\n"
      "  .reg .pred store;\n"
      "  setp.ne.b32 store, %0, 0;\n"
      "  @store st.global.b32 [%1], %2;\n"
      "}\n" ::"r"(static_cast<int>(store)),
      "l"(out), "r"(w[0])
      : "memory");
}

// `Consumer` says which rows and columns a thread's accumulators belong to.
template <typename T, typename Consumer>
__device__ void Epilogue(const GroupedGemm& gemm, const TileQueue<T>& queue, int32_t turn,
                         const typename Consumer::Accumulators& acc, const char* shared) {
  using Columns = typename T::Columns;
  constexpr int kVector = Columns::kVector;
  const WarpPlace warp = GetWarpPlace<T>();
  const WorkItem item = queue.Item(turn);

  const int first_row = Consumer::FirstRow(warp);
  float row_scale[Consumer::kThreadRows];
#pragma unroll
  for (float& scale : row_scale) scale = 1.0f;
  if (!T::kGated && gemm.slot_scales != nullptr) {
#pragma unroll
    for (int i = 0; i < Consumer::kThreadRows; ++i) {
      const int row = first_row + Consumer::RowOffset(i);
      if (TileQueue<T>::kHasWords || row < item.rows) {
        row_scale[i] = __uint_as_float(queue.Word(turn, item, row));
      }
    }
  }
  // A GEMM with a gate is followed by one that reads its output. That may have the other dtype: bf16
  // holds sums that fp16 cannot.
  const DType dtype = !T::kGated                                    ? gemm.out_dtype
                      : std::is_same_v<typename T::Element, __half> ? DType::kFloat16
                                                                    : DType::kBFloat16;

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
      const char* out =
          static_cast<const char*>(gemm.out) +
          (static_cast<int64_t>(item.row_begin + first_row) * gemm.columns + column) * 2;
#pragma unroll
      for (int i = 0; i < Consumer::kThreadRows; ++i) {
        const int offset = Consumer::RowOffset(i);
        if constexpr (T::kWidens) {
          // Those have no registers for what follows of several rows at once.
          if (first_row + offset >= item.rows) continue;
        } else if (i % 2 == 0 && offset >= item.rows) {
          break;  // no lane has that row or a later one
        }
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
        uint32_t words[kVector / 2];
#pragma unroll
        for (int v = 0; v < kVector / 2; ++v) {
          words[v] = PackPair(value[2 * v], value[2 * v + 1], dtype);
        }
        StoreIf(first_row + offset < item.rows, WideOffset(out, gemm.columns * 2, offset), words);
      }
    }
  });
}

}  // namespace moe::sm80

#endif  // KERNELS_SM80_EPILOGUE_CUH_
