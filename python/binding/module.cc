// SPDX-License-Identifier: Apache-2.0
//
// fused_moe._C: sizes, dtypes and device pointers in, launches out. It holds no PyTorch code, so
// one binary serves every PyTorch version. User input is checked in Python, once; what is checked
// here is what Python cannot know.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "moe/problem.h"
#include "moe/workspace.h"

#if defined(MOE_WITH_CUDA)
#include "moe/layer.h"
#include "moe/routing.h"
#endif

#if !defined(MOE_BUILT_FOR)
#error "MOE_BUILT_FOR must hold the value of the architecture setting"
#endif

namespace py = pybind11;

namespace moe {
namespace {

Problem MakeProblem(int64_t num_tokens, int32_t hidden_size, int32_t intermediate_size,
                    int32_t num_local_experts, int32_t first_local_expert, int32_t top_k,
                    int activation, int dtype, int output_dtype, int weight_format,
                    int32_t num_experts, int32_t group_size) {
  if (activation < 0 || activation >= kNumActivations) {
    throw std::invalid_argument("activation: got " + std::to_string(activation) +
                                ", must be an ActivationType");
  }
  if (dtype < 1 || dtype > 2 || output_dtype < 1 || output_dtype > 2) {
    throw std::invalid_argument("dtype and output_dtype must be 1 (float16) or 2 (bfloat16)");
  }
  if (weight_format < 0 || weight_format >= kNumWeightFormats) {
    throw std::invalid_argument(
        "weight_format must be 0 (as input), 1 (int8), 2 (uint8), 3 (int4) or 4 (mxfp4)");
  }
  const bool grouped = weight_format >= static_cast<int>(WeightFormat::kInt4);
  const bool known = group_size == 32 || group_size == 64 || group_size == 128;
  if (grouped ? !known : group_size != 0) {
    throw std::invalid_argument("group_size: got " + std::to_string(group_size) +
                                ", must be 32, 64 or 128 for 4-bit weights and 0 for others");
  }
  Problem p;
  p.num_tokens = num_tokens;
  p.hidden_size = hidden_size;
  p.intermediate_size = intermediate_size;
  p.num_local_experts = num_local_experts;
  p.first_local_expert = first_local_expert;
  p.num_experts = num_experts > 0 ? num_experts : num_local_experts;
  p.top_k = top_k;
  p.activation = static_cast<Activation>(activation);
  p.dtype = static_cast<DType>(dtype);
  p.output_dtype = static_cast<DType>(output_dtype);
  p.weight_format = static_cast<WeightFormat>(weight_format);
  p.group_size = group_size;
  return p;
}

#if defined(MOE_WITH_CUDA)

const Backend& FindBackend(const std::string& name) {
  for (const Backend* backend : Backends()) {
    if (name == backend->name()) return *backend;
  }
  throw std::invalid_argument("backend: got '" + name + "', which this build for " + MOE_BUILT_FOR +
                              " does not hold");
}

std::vector<std::string> BackendNames() {
  std::vector<std::string> names;
  for (const Backend* backend : Backends()) names.push_back(backend->name());
  return names;
}

size_t WorkspaceSize(const std::string& backend, const Problem& problem) {
  FindBackend(backend);
  return PlanWorkspace(problem).bytes;
}

std::vector<int32_t> FittingTactics(const std::string& name, const Problem& problem,
                                    int32_t shared_memory_per_block, bool whole_layer) {
  const Backend& backend = FindBackend(name);
  const Device device = {1, shared_memory_per_block, shared_memory_per_block};
  std::vector<int32_t> fitting;
  const std::vector<Tactic>& tactics = backend.Tactics(problem.weight_format);
  for (int32_t i = 0; i < static_cast<int32_t>(tactics.size()); ++i) {
    if (tactics[i].whole_layer == whole_layer && backend.Fits(i, problem, device)) {
      fitting.push_back(i);
    }
  }
  return fitting;
}

std::vector<int32_t> SupportedTactics(const std::string& name, const Problem& problem,
                                      int32_t shared_memory_per_block) {
  return FittingTactics(name, problem, shared_memory_per_block, false);
}

std::vector<std::pair<int32_t, int32_t>> WholeLayerTactics(const std::string& name,
                                                           const Problem& problem,
                                                           int32_t shared_memory_per_block) {
  std::vector<std::pair<int32_t, int32_t>> pairs;
  for (const int32_t i : FittingTactics(name, problem, shared_memory_per_block, true)) {
    pairs.emplace_back(i, i);
  }
  return pairs;
}

std::pair<int32_t, int32_t> ChooseTactics(const std::string& backend, const Problem& problem,
                                          int32_t multiprocessors, int32_t shared_memory_per_block,
                                          int32_t shared_memory_per_multiprocessor) {
  const TacticPair pair = FindBackend(backend).Choose(
      problem, {multiprocessors, shared_memory_per_block, shared_memory_per_multiprocessor});
  return {pair.gemm1, pair.gemm2};
}

template <typename T>
T* Pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void Run(const std::string& name, const Problem& problem, uintptr_t stream, uintptr_t input,
         uintptr_t experts, uintptr_t scales, uintptr_t fc1_weights, uintptr_t fc2_weights,
         uintptr_t fc1_scales, uintptr_t fc2_scales, int weight_scale_dtype, uintptr_t fc1_bias,
         uintptr_t fc2_bias, uintptr_t swiglu_alpha, uintptr_t swiglu_beta, uintptr_t swiglu_limit,
         uintptr_t output, uintptr_t workspace, size_t workspace_bytes, bool add_fc2_bias,
         std::optional<std::pair<int32_t, int32_t>> tactics, int32_t shared_memory_per_block) {
  const Backend& backend = FindBackend(name);
  LayerArguments a;
  a.input = Pointer<const void>(input);
  a.experts = Pointer<const int32_t>(experts);
  a.scales = Pointer<const float>(scales);
  a.fc1_weights = Pointer<const void>(fc1_weights);
  a.fc2_weights = Pointer<const void>(fc2_weights);
  a.fc1_scales = Pointer<const void>(fc1_scales);
  a.fc2_scales = Pointer<const void>(fc2_scales);
  a.weight_scale_dtype = static_cast<DType>(weight_scale_dtype);
  a.fc1_bias = Pointer<const void>(fc1_bias);
  a.fc2_bias = add_fc2_bias ? Pointer<const void>(fc2_bias) : nullptr;
  a.swiglu_alpha = Pointer<const float>(swiglu_alpha);
  a.swiglu_beta = Pointer<const float>(swiglu_beta);
  a.swiglu_limit = Pointer<const float>(swiglu_limit);
  a.output = Pointer<void>(output);
  a.workspace = Pointer<void>(workspace);
  a.workspace_bytes = workspace_bytes;

  py::gil_scoped_release release;  // launches may wait for a full queue
  Device device = CurrentDevice();
  if (shared_memory_per_block > 0) device.shared_memory_per_block = shared_memory_per_block;
  const TacticPair pair =
      tactics ? TacticPair{tactics->first, tactics->second} : backend.Choose(problem, device);
  RunLayer(backend, problem, a, pair, device, reinterpret_cast<cudaStream_t>(stream));
}

#endif  // MOE_WITH_CUDA

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Launches of the fused MoE layer on raw device pointers; see _C.pyi.";
  m.attr("BUILT_FOR") = MOE_BUILT_FOR;

  py::class_<Problem>(m, "Problem")
      .def(py::init(&MakeProblem), py::kw_only(), py::arg("num_tokens"), py::arg("hidden_size"),
           py::arg("intermediate_size"), py::arg("num_local_experts"),
           py::arg("first_local_expert"), py::arg("top_k"), py::arg("activation"), py::arg("dtype"),
           py::arg("output_dtype"), py::arg("weight_format"), py::arg("num_experts") = 0,
           py::arg("group_size") = 0);

#if defined(MOE_WITH_CUDA)
  m.attr("BACKENDS") = py::tuple(py::cast(BackendNames()));
  m.attr("MAX_LOCAL_EXPERTS") = kMaxLocalExperts;

  py::class_<Tactic>(m, "Tactic")
      .def_readonly("name", &Tactic::name)
      .def_readonly("whole_layer", &Tactic::whole_layer)
      .def_readonly("tile_m", &Tactic::tile_m)
      .def_readonly("tile_n", &Tactic::tile_n)
      .def_readonly("tile_k", &Tactic::tile_k)
      .def_readonly("stages", &Tactic::stages)
      .def_readonly("threads", &Tactic::threads)
      .def_readonly("shared_memory", &Tactic::shared_memory);

  m.def("workspace_size", &WorkspaceSize, py::arg("backend"), py::arg("problem"));
  m.def(
      "tactics",
      [](const std::string& backend, int weight_format) {
        return FindBackend(backend).Tactics(static_cast<WeightFormat>(weight_format));
      },
      py::arg("backend"), py::arg("weight_format") = 0);
  m.def("supported_tactics", &SupportedTactics, py::arg("backend"), py::arg("problem"),
        py::arg("shared_memory_per_block"));
  m.def("whole_layer_tactics", &WholeLayerTactics, py::arg("backend"), py::arg("problem"),
        py::arg("shared_memory_per_block"));
  m.def("choose_tactics", &ChooseTactics, py::arg("backend"), py::arg("problem"), py::kw_only(),
        py::arg("multiprocessors"), py::arg("shared_memory_per_block"),
        py::arg("shared_memory_per_multiprocessor"));
  // No py::kw_only(): pybind11 takes five times as long to find this many arguments by name.
  m.def("run", &Run, py::arg("backend"), py::arg("problem"), py::arg("stream"), py::arg("input"),
        py::arg("experts"), py::arg("scales"), py::arg("fc1_weights"), py::arg("fc2_weights"),
        py::arg("fc1_scales"), py::arg("fc2_scales"), py::arg("weight_scale_dtype"),
        py::arg("fc1_bias"), py::arg("fc2_bias"), py::arg("swiglu_alpha"), py::arg("swiglu_beta"),
        py::arg("swiglu_limit"), py::arg("output"), py::arg("workspace"),
        py::arg("workspace_bytes"), py::arg("add_fc2_bias"), py::arg("tactics") = py::none(),
        py::arg("shared_memory_per_block") = 0);
#else
  m.attr("BACKENDS") = py::tuple();
#endif
}

}  // namespace moe
