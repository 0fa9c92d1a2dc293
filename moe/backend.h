// SPDX-License-Identifier: Apache-2.0
//
// What an architecture implements: its tactics, the choice among them, and the launch of one
// grouped GEMM or of a whole layer. Everything else of a call is in layer.h and common to all.

#ifndef MOE_BACKEND_H_
#define MOE_BACKEND_H_

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "moe/grouped_gemm.h"
#include "moe/problem.h"

namespace moe {

// One way to run a grouped GEMM, or a whole layer, as data. Indices into Backend::Tactics() name
// tactics.
struct Tactic {
  std::string name;
  bool whole_layer = false;  // runs the layer in one launch: both GEMMs of a pair have it
  int32_t tile_m = 0;        // rows of a tile: what the row-tile list is cut into
  int32_t tile_n = 0;        // weight rows of a tile
  int32_t tile_k = 0;        // reduction length of a step
  int32_t stages = 0;
  int32_t threads = 0;
  int32_t shared_memory = 0;  // bytes a block
};

struct TacticPair {
  int32_t gemm1 = 0;
  int32_t gemm2 = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual const char* name() const = 0;

  // The tactics for a weight format (stages and shared memory depend on it).
  virtual const std::vector<Tactic>& Tactics(WeightFormat format) const = 0;

  // Whether the tactic can run the problem, or a GEMM of it, on the chip.
  virtual bool Fits(int32_t tactic, const Problem& problem, const Device& device) const = 0;

  // The choice without tuning: a function of sizes and chip, never of device data.
  virtual TacticPair Choose(const Problem& problem, const Device& device) const = 0;

  // A tactic of one GEMM.
  virtual cudaError_t Launch(int32_t tactic, const GroupedGemm& gemm, const Device& device,
                             cudaStream_t stream) const = 0;

  // A tactic of a whole layer. The GEMMs come without row lists; their outputs have a row a slot.
  // `counters` is room for 3 + slots numbers on the device.
  virtual cudaError_t LaunchLayer(int32_t tactic, const Problem& problem,
                                  const GroupedGemm (&gemms)[2], const int32_t* experts,
                                  void* output, int32_t* counters, const Device& device,
                                  cudaStream_t stream) const = 0;
};

// The backends linked into this binary, in order of preference.
const std::vector<const Backend*>& Backends();

}  // namespace moe

#endif  // MOE_BACKEND_H_
