// SPDX-License-Identifier: Apache-2.0
//
// What one fused Mixture-of-Experts call computes, in plain numbers: no pointers, no device.
// Everything that can be decided without a GPU (workspace, tactics) is a function of `Problem`.

#ifndef MOE_PROBLEM_H_
#define MOE_PROBLEM_H_

#include <cstdint>

namespace moe {

// The numbers are part of the Python interface (fused_moe/_C.pyi).
enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kE8M0 = 3 };

enum class WeightFormat : int32_t {
  kSameAsInput = 0,  // fp16 or bf16, as the input
  kInt8 = 1,         // weight = q * scale[channel]
  kUint8 = 2,        // weight = (u - 128) * scale[channel]
  kInt4 = 3,         // two a byte, even k low: weight = (u - 8) * scale[channel, k / group]
  kMxfp4 = 4,        // two a byte, even k low: weight = e2m1 * 2^(scale[channel, k / 32] - 127)
};
inline constexpr int kNumWeightFormats = 5;

// FlashInfer's numbering, which Python's `ActivationType` repeats.
enum class Activation : int32_t {
  kGelu = 0,
  kRelu = 1,
  kSilu = 2,
  kSwiglu = 3,
  kGeglu = 4,
  kSwigluBias = 5,
  kRelu2 = 6,
  kSwigluStep = 7,
  kGegluTanh = 8,
  kIdentity = 9,
};
inline constexpr int kNumActivations = 10;

// Gated activations take two rows of fc1 for each intermediate value: row i of the first half
// ("up", the linear part) and row i of the second half (the gate).
constexpr bool IsGated(Activation a) {
  return a == Activation::kSwiglu || a == Activation::kGeglu || a == Activation::kSwigluBias ||
         a == Activation::kSwigluStep || a == Activation::kGegluTanh;
}

struct Problem {
  int64_t num_tokens = 0;          // M
  int32_t hidden_size = 0;         // H
  int32_t intermediate_size = 0;   // I, this rank's share under tensor parallelism
  int32_t num_local_experts = 0;   // E_l, experts whose weights are here
  int32_t num_experts = 0;         // E, experts over all ranks: what the ids range over
  int32_t first_local_expert = 0;  // ids [first, first + E_l) are computed here
  int32_t top_k = 0;               // k
  Activation activation = Activation::kSwiglu;
  DType dtype = DType::kBFloat16;         // of input, intermediate values and 16-bit weights
  DType output_dtype = DType::kBFloat16;  // of output and biases
  WeightFormat weight_format = WeightFormat::kSameAsInput;
  int32_t group_size = 0;  // weights along k that share a scale: 4-bit formats only

  // One (token, expert choice) pair is a slot; slots are numbered token * k + choice.
  int64_t num_slots() const { return num_tokens * top_k; }
  int32_t fc1_rows() const {
    return IsGated(activation) ? 2 * intermediate_size : intermediate_size;
  }
};

// Rows are counted in 32 bits, up to the end of a partly filled tile behind the last one.
inline constexpr int64_t kMaxSlots = (int64_t{1} << 31) - 1024;

// Routing keeps a few numbers for each expert in shared memory.
inline constexpr int32_t kMaxLocalExperts = 2048;

// What a tactic choice needs to know of a chip.
struct Device {
  int32_t multiprocessors = 0;
  int32_t shared_memory_per_block = 0;           // bytes, with the opt-in
  int32_t shared_memory_per_multiprocessor = 0;  // bytes
};

}  // namespace moe

#endif  // MOE_PROBLEM_H_
