// SPDX-License-Identifier: Apache-2.0

#include "kernels/sm80/backend.h"

#include <array>
#include <utility>

#include "kernels/sm80/choose.h"
#include "kernels/sm80/grouped_gemm.h"
#include "kernels/sm80/tiles.h"

namespace moe::sm80 {
namespace {

using Launcher = cudaError_t (*)(const GroupedGemm&, int, cudaStream_t);

// By tile, then dtype, then weight format.
struct TileLaunchers {
  Launcher half[2];
  Launcher bfloat16[2];
};

template <int... kTileIndices>
constexpr std::array<TileLaunchers, kNumTiles> AllLaunchers(
    std::integer_sequence<int, kTileIndices...>) {
  return {TileLaunchers{{LaunchGroupedGemm<kTileIndices, DType::kFloat16, false>,
                         LaunchGroupedGemm<kTileIndices, DType::kFloat16, true>},
                        {LaunchGroupedGemm<kTileIndices, DType::kBFloat16, false>,
                         LaunchGroupedGemm<kTileIndices, DType::kBFloat16, true>}}...};
}

constexpr auto kLaunchers = AllLaunchers(std::make_integer_sequence<int, kNumTiles>());

class Sm80Backend final : public Backend {
 public:
  const char* name() const override { return "sm80"; }

  const std::vector<Tactic>& Tactics(WeightFormat format) const override {
    return tactics_[format != WeightFormat::kSameAsInput];
  }

  bool Fits(int32_t tactic, WeightFormat format, const Device& device) const override {
    return ResidentBlocks(tactic, format != WeightFormat::kSameAsInput, device) > 0;
  }

  TacticPair Choose(const Problem& problem, const Device& device) const override {
    return {ChooseTile(problem, IsGated(problem.activation), problem.intermediate_size,
                       problem.hidden_size, device),
            ChooseTile(problem, false, problem.hidden_size, problem.intermediate_size, device)};
  }

  cudaError_t Launch(int32_t tactic, const GroupedGemm& gemm, const Device& device,
                     cudaStream_t stream) const override {
    const bool quantized = gemm.weight_format != WeightFormat::kSameAsInput;
    const TileLaunchers& tile = kLaunchers[tactic];
    const Launcher launch =
        gemm.dtype == DType::kFloat16 ? tile.half[quantized] : tile.bfloat16[quantized];
    const int blocks = device.multiprocessors * ResidentBlocks(tactic, quantized, device);
    return launch(gemm, blocks, stream);
  }

 private:
  static std::vector<Tactic> List(bool quantized) {
    std::vector<Tactic> tactics;
    for (const Tile& tile : kTiles) {
      tactics.push_back({tile.name, tile.m, tile.n, tile.k,
                         quantized ? tile.stages_int8 : tile.stages, tile.threads(),
                         tile.shared_memory(quantized)});
    }
    return tactics;
  }

  const std::vector<Tactic> tactics_[2] = {List(false), List(true)};
};

}  // namespace

const Backend* GetBackend() {
  static const Sm80Backend backend;
  return &backend;
}

}  // namespace moe::sm80
