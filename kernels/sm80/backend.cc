// SPDX-License-Identifier: Apache-2.0

#include "kernels/sm80/backend.h"

#include <array>
#include <string>
#include <utility>

#include "kernels/sm80/choose.h"
#include "kernels/sm80/decode.h"
#include "kernels/sm80/decode_kernels.h"
#include "kernels/sm80/grouped_gemm.h"
#include "kernels/sm80/tiles.h"

namespace moe::sm80 {
namespace {

// One of several launchers: by dtype, then by kind of weights.
template <typename Launcher>
struct ByFormat {
  Launcher half[kNumWeightKinds];
  Launcher bfloat16[kNumWeightKinds];

  Launcher operator()(DType dtype, WeightKind kind) const {
    return (dtype == DType::kFloat16 ? half : bfloat16)[static_cast<int>(kind)];
  }
};

using GemmLauncher = cudaError_t (*)(const GroupedGemm&, int, cudaStream_t);
using LayerLauncher = cudaError_t (*)(int, const DecodeLayer&, int, cudaStream_t);

template <int kTile, int... kKinds>
constexpr ByFormat<GemmLauncher> GemmLaunchers(std::integer_sequence<int, kKinds...>) {
  return {{LaunchGroupedGemm<kTile, DType::kFloat16, static_cast<WeightKind>(kKinds)>...},
          {LaunchGroupedGemm<kTile, DType::kBFloat16, static_cast<WeightKind>(kKinds)>...}};
}

template <int... kTileIndices>
constexpr std::array<ByFormat<GemmLauncher>, kNumTiles> AllGemmLaunchers(
    std::integer_sequence<int, kTileIndices...>) {
  constexpr auto kKinds = std::make_integer_sequence<int, kNumWeightKinds>();
  return {GemmLaunchers<kTileIndices>(kKinds)...};
}

template <int... kKinds>
constexpr ByFormat<LayerLauncher> LayerLaunchers(std::integer_sequence<int, kKinds...>) {
  return {{LaunchDecodeLayer<DType::kFloat16, static_cast<WeightKind>(kKinds)>...},
          {LaunchDecodeLayer<DType::kBFloat16, static_cast<WeightKind>(kKinds)>...}};
}

constexpr auto kGemms = AllGemmLaunchers(std::make_integer_sequence<int, kNumTiles>());
constexpr auto kLayers = LayerLaunchers(std::make_integer_sequence<int, kNumWeightKinds>());

// Tactics are numbered: the tiles, then the kernels of whole layers.
class Sm80Backend final : public Backend {
 public:
  Sm80Backend() {
    for (int kind = 0; kind < kNumWeightKinds; ++kind) {
      tactics_[kind] = List(static_cast<WeightKind>(kind));
    }
  }

  const char* name() const override { return "sm80"; }

  const std::vector<Tactic>& Tactics(WeightFormat format) const override {
    return tactics_[static_cast<int>(KindOf(format))];
  }

  bool Fits(int32_t tactic, const Problem& problem, const Device& device) const override {
    if (tactic < kNumTiles) {
      return ResidentBlocks(tactic, KindOf(problem.weight_format), device) > 0;
    }
    return DecodeFits(tactic - kNumTiles, problem, device);
  }

  TacticPair Choose(const Problem& problem, const Device& device) const override {
    const sm80::Choice choice = sm80::Choose(problem, device);
    if (choice.decode >= 0) return {kNumTiles + choice.decode, kNumTiles + choice.decode};
    return {choice.tiles[0], choice.tiles[1]};
  }

  cudaError_t Launch(int32_t tactic, const GroupedGemm& gemm, const Device& device,
                     cudaStream_t stream) const override {
    const WeightKind kind = KindOf(gemm.weight_format);
    const int blocks = device.multiprocessors * ResidentBlocks(tactic, kind, device);
    return kGemms[tactic](gemm.dtype, kind)(gemm, blocks, stream);
  }

  cudaError_t LaunchLayer(int32_t tactic, const Problem& problem, const GroupedGemm (&gemms)[2],
                          const int32_t* experts, void* output, int32_t* counters,
                          const Device& device, cudaStream_t stream) const override {
    DecodeLayer layer;
    layer.gemm[0] = gemms[0];
    layer.gemm[1] = gemms[1];
    layer.experts = experts;
    layer.num_tokens = static_cast<int32_t>(problem.num_tokens);
    layer.first_expert = problem.first_local_expert;
    layer.num_experts = problem.num_local_experts;
    layer.output = output;
    layer.counters = counters;
    return kLayers(problem.dtype, KindOf(problem.weight_format))(tactic - kNumTiles, layer,
                                                                 device.multiprocessors, stream);
  }

 private:
  static std::vector<Tactic> List(WeightKind kind) {
    std::vector<Tactic> tactics;
    for (const Tile& tile : kTiles) {
      Tactic tactic;
      tactic.name = std::to_string(tile.m) + "x" + std::to_string(tile.n) + "x" +
                    std::to_string(tile.step(kind));
      tactic.tile_m = tile.m;
      tactic.tile_n = tile.n;
      tactic.tile_k = tile.step(kind);
      tactic.stages = tile.stages[static_cast<int>(kind)];
      tactic.threads = tile.threads();
      tactic.shared_memory = tile.shared_memory(kind);
      tactics.push_back(tactic);
    }
    for (const int token_blocks : kDecodeTokenBlocks) {
      Tactic tactic;
      tactic.name = "decode" + std::to_string(8 * token_blocks);
      tactic.whole_layer = true;
      tactic.tile_m = 8 * token_blocks;
      tactic.tile_n = kDecodeRows;
      tactic.tile_k = DecodeChunk(kind);
      tactic.threads = kDecodeThreads;
      tactic.shared_memory = DecodeSharedMemory(token_blocks);
      tactics.push_back(tactic);
    }
    return tactics;
  }

  std::vector<Tactic> tactics_[kNumWeightKinds];
};

}  // namespace

const Backend* GetBackend() {
  static const Sm80Backend backend;
  return &backend;
}

}  // namespace moe::sm80
