// SPDX-License-Identifier: Apache-2.0

#include "moe/layer.h"

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "moe/finalize.h"
#include "moe/routing.h"
#include "moe/workspace.h"

namespace moe {
namespace {

void Check(cudaError_t status, const char* step) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // which the next launch of this thread would report once more
  throw std::runtime_error(std::string("cutlass_fused_moe: ") + step + " failed: " +
                           cudaGetErrorName(status) + " (" + cudaGetErrorString(status) + ")");
}

int32_t DeviceAttribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  Check(cudaDeviceGetAttribute(&value, attribute, device), "reading a device attribute");
  return value;
}

Device AskDevice(int device) {
  return {DeviceAttribute(cudaDevAttrMultiProcessorCount, device),
          DeviceAttribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          DeviceAttribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)};
}

// Limits of the kernels and, for callers that are not Python, what it has checked already.
void CheckSizes(const Problem& problem, size_t workspace_bytes, size_t workspace_needed) {
  if (problem.num_slots() > kMaxSlots) {
    throw std::invalid_argument(
        "input: num_tokens * top_k is " + std::to_string(problem.num_slots()) +
        ", must be at most " + std::to_string(kMaxSlots) + "; split the tokens into several calls");
  }
  if (problem.num_local_experts > kMaxLocalExperts) {
    throw std::invalid_argument("fc1_expert_weights: got " +
                                std::to_string(problem.num_local_experts) +
                                " experts, must be at most " + std::to_string(kMaxLocalExperts) +
                                " a rank; spread them over more expert-parallel ranks");
  }
  // Rows of the input and of the intermediate values, and an expert's gate rows from its up rows,
  // are found by a count of 16 bytes in 32 bits.
  constexpr int64_t kMaxValues = int64_t{1} << 35;
  const int64_t values = std::max(problem.num_tokens * problem.hidden_size,
                                  problem.num_slots() * problem.intermediate_size);
  if (values >= kMaxValues) {
    throw std::invalid_argument(
        "input: the input or the intermediate values are " + std::to_string(values) +
        " numbers, must be below 2^35 (64 GiB); split the tokens into several calls");
  }
  const int64_t weights_of_expert = int64_t{problem.hidden_size} * problem.intermediate_size;
  if (weights_of_expert >= kMaxValues) {
    throw std::invalid_argument("fc1_expert_weights: hidden_size * intermediate_size is " +
                                std::to_string(weights_of_expert) +
                                ", must be below 2^35; divide the experts by tensor parallelism");
  }
  if (problem.group_size > 0) {
    // Kernels count the scales of a tensor in 32 bits, and where few tokens are served its 16 bytes
    // of weights and the bytes of its scales too: 2^37 weights are 2^32 times 16 bytes, 2^32 groups
    // of 32 or, in groups of 128, 2^32 bytes of float32 scales.
    constexpr int64_t kMaxWeights = int64_t{1} << 37;
    const int64_t rows[] = {problem.fc1_rows(), problem.hidden_size};
    const int64_t depth[] = {problem.hidden_size, problem.intermediate_size};
    for (int i = 0; i < 2; ++i) {
      const int64_t weights = problem.num_local_experts * rows[i] * depth[i];
      if (weights > kMaxWeights) {
        throw std::invalid_argument("fc" + std::to_string(i + 1) + "_expert_weights: got " +
                                    std::to_string(weights) +
                                    " weights of 4 bits, must be at most 2^37 (64 GiB); spread the "
                                    "experts over more expert-parallel ranks");
      }
    }
  }
  if (workspace_bytes < workspace_needed) {
    throw std::invalid_argument("workspace_buffer: got " + std::to_string(workspace_bytes) +
                                " bytes, needs " + std::to_string(workspace_needed));
  }
}

void CheckTactic(const Backend& backend, int32_t tactic, const std::vector<Tactic>& tactics,
                 const Problem& problem, const Device& device) {
  if (tactic < 0 || tactic >= static_cast<int32_t>(tactics.size())) {
    throw std::invalid_argument("tactics: got " + std::to_string(tactic) + ", must be below " +
                                std::to_string(tactics.size()) + " for the " + backend.name() +
                                " backend");
  }
  if (!backend.Fits(tactic, problem, device)) {
    throw std::invalid_argument("tactics: " + tactics[tactic].name + " takes " +
                                std::to_string(tactics[tactic].shared_memory) +
                                " bytes of shared memory, of which the device gives a block " +
                                std::to_string(device.shared_memory_per_block) +
                                ", and is asked for " + std::to_string(problem.num_slots()) +
                                " slots; choose one that supported_tactics lists");
  }
}

void CheckTactics(const Backend& backend, const TacticPair& tactics, const Problem& problem,
                  const Device& device) {
  const std::vector<Tactic>& all = backend.Tactics(problem.weight_format);
  CheckTactic(backend, tactics.gemm1, all, problem, device);
  CheckTactic(backend, tactics.gemm2, all, problem, device);
  if (tactics.gemm1 != tactics.gemm2 &&
      (all[tactics.gemm1].whole_layer || all[tactics.gemm2].whole_layer)) {
    throw std::invalid_argument("tactics: got " + all[tactics.gemm1].name + " and " +
                                all[tactics.gemm2].name +
                                ", but a tactic of whole layers must be given for both GEMMs");
  }
}

}  // namespace

Device CurrentDevice() {
  int device = 0;
  Check(cudaGetDevice(&device), "finding the current device");
  // Asking the runtime takes longer than a tactic choice, and the answers never change.
  constexpr int kRemembered = 64;
  static std::once_flag asked[kRemembered];
  static Device remembered[kRemembered];
  if (device >= kRemembered) return AskDevice(device);
  std::call_once(asked[device], [&] { remembered[device] = AskDevice(device); });
  return remembered[device];
}

void RunLayer(const Backend& backend, const Problem& problem, const LayerArguments& arguments,
              const TacticPair& tactics, const Device& device, cudaStream_t stream) {
  if (problem.num_tokens == 0) return;
  const WorkspacePlan plan = PlanWorkspace(problem);
  CheckSizes(problem, arguments.workspace_bytes, plan.bytes);
  CheckTactics(backend, tactics, problem, device);
  const std::vector<Tactic>& all = backend.Tactics(problem.weight_format);

  auto at = [&](size_t offset) { return static_cast<char*>(arguments.workspace) + offset; };
  auto ints = [&](size_t offset) { return reinterpret_cast<int32_t*>(at(offset)); };

  GroupedGemm gemms[2];
  for (GroupedGemm& gemm : gemms) {
    gemm.top_k = problem.top_k;
    gemm.dtype = problem.dtype;
    gemm.bias_dtype = problem.output_dtype;
    gemm.weight_scale_dtype = arguments.weight_scale_dtype;
    gemm.weight_format = problem.weight_format;
    gemm.group_size = problem.group_size;
  }
  GroupedGemm& gemm1 = gemms[0];
  gemm1.a = arguments.input;
  gemm1.gather = true;
  gemm1.weights = arguments.fc1_weights;
  gemm1.weight_scales = arguments.fc1_scales;
  gemm1.bias = arguments.fc1_bias;
  gemm1.swiglu_alpha = arguments.swiglu_alpha;
  gemm1.swiglu_beta = arguments.swiglu_beta;
  gemm1.swiglu_limit = arguments.swiglu_limit;
  gemm1.out = at(plan.intermediate);
  gemm1.out_dtype = problem.dtype;
  gemm1.columns = problem.intermediate_size;
  gemm1.k = problem.hidden_size;
  gemm1.activation = problem.activation;

  GroupedGemm& gemm2 = gemms[1];
  gemm2.a = at(plan.intermediate);
  gemm2.weights = arguments.fc2_weights;
  gemm2.weight_scales = arguments.fc2_scales;
  gemm2.bias = arguments.fc2_bias;
  gemm2.slot_scales = arguments.scales;
  gemm2.out = at(plan.expert_output);
  gemm2.out_dtype = problem.output_dtype;  // not dtype: bf16 holds sums that fp16 cannot
  gemm2.columns = problem.hidden_size;
  gemm2.k = problem.intermediate_size;

  if (all[tactics.gemm1].whole_layer) {
    Check(backend.LaunchLayer(tactics.gemm1, problem, gemms, arguments.experts, arguments.output,
                              ints(plan.row_to_slot), device, stream),
          "the layer");
    return;
  }

  RoutingBuffers routing;
  routing.num_row_tiles = ints(plan.num_row_tiles);
  routing.expert_counts = ints(plan.expert_counts);
  routing.row_to_slot = ints(plan.row_to_slot);
  routing.slot_to_row = ints(plan.slot_to_row);
  for (int i = 0; i < 2; ++i) {
    routing.row_tiles[i] = reinterpret_cast<RowTile*>(at(plan.row_tiles[i]));
    routing.tile_rows[i] = all[i == 0 ? tactics.gemm1 : tactics.gemm2].tile_m;
    gemms[i].row_tiles = routing.row_tiles[i];
    gemms[i].num_row_tiles = routing.num_row_tiles + i;
    gemms[i].max_row_tiles =
        MaxRowTiles(problem.num_slots(), problem.num_local_experts, routing.tile_rows[i]);
    gemms[i].row_slot = routing.row_to_slot;
  }
  Check(LaunchRouting(problem, arguments.experts, routing, stream), "routing");
  Check(backend.Launch(tactics.gemm1, gemm1, device, stream), "GEMM 1");
  Check(backend.Launch(tactics.gemm2, gemm2, device, stream), "GEMM 2");
  Check(LaunchFinalize(problem, at(plan.expert_output), routing.slot_to_row, arguments.output,
                       stream),
        "finalize");
}

}  // namespace moe
