// SPDX-License-Identifier: Apache-2.0
//
// Bound by memory: reads k rows and writes one for each token. A thread owns 8 columns (16 bytes)
// of one token; loads of several experts' rows are issued together before they are added.

#include <cstdint>

#include "moe/finalize.h"
#include "moe/sum_rows.cuh"

namespace moe {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 8;       // of a thread: one 16-byte load of 16-bit values
constexpr int kRowsInFlight = 4;  // independent loads of a thread

template <DType kDType>
__global__ void __launch_bounds__(kThreads)
    FinalizeKernel(const uint4* __restrict__ rows, const int32_t* __restrict__ slot_to_row,
                   uint4* __restrict__ out, int top_k, int vectors) {
  const int vector = blockIdx.y * kThreads + threadIdx.x;
  if (vector >= vectors) return;
  const int64_t token = blockIdx.x;
  const int32_t* token_rows = slot_to_row + token * top_k;
  out[token * vectors + vector] = SumRows<kDType, kRowsInFlight>(
      top_k, [&](int j) { return token_rows[j]; },
      [&](int32_t row) { return __ldcs(rows + static_cast<int64_t>(row) * vectors + vector); });
}

template <DType kDType>
cudaError_t Launch(const Problem& problem, const void* rows, const int32_t* slot_to_row, void* out,
                   cudaStream_t stream) {
  const int vectors = problem.hidden_size / kColumns;
  // Tokens go along x: only that grid dimension reaches beyond 65535.
  const dim3 grid(static_cast<unsigned>(problem.num_tokens), (vectors + kThreads - 1) / kThreads);
  FinalizeKernel<kDType><<<grid, kThreads, 0, stream>>>(static_cast<const uint4*>(rows),
                                                        slot_to_row, static_cast<uint4*>(out),
                                                        problem.top_k, vectors);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchFinalize(const Problem& problem, const void* expert_output,
                           const int32_t* slot_to_row, void* output, cudaStream_t stream) {
  auto* launch =
      problem.output_dtype == DType::kFloat16 ? Launch<DType::kFloat16> : Launch<DType::kBFloat16>;
  return launch(problem, expert_output, slot_to_row, output, stream);
}

}  // namespace moe
