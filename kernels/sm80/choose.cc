// SPDX-License-Identifier: Apache-2.0
//
// A model of waves and bytes. A GEMM takes the longer of
//
//   bytes   touched weights and rows, each once, at the bandwidth that the tile can keep busy
//   waves   (tiles in a row for the busiest block) * (time of a tile), where a tile takes
//           steps * (step + block * 16-row blocks that hold rows) + tile
//
// joined smoothly, since near the crossing each slows the other. How many row tiles an expert
// needs is the expectation over Poisson-distributed rows: the host does not know the routing.
//
// The costs were fitted to up to 168 timed GEMMs an entry on an H200 (docs/measurements.md): they are
// microseconds of that chip's multiprocessors. Other chips enter by multiprocessors, resident
// blocks and shared memory. That an A100 has about 0.6 of both the matrix rate and the bandwidth a
// multiprocessor scales all times alike and leaves the choice where it is.

#include "kernels/sm80/choose.h"

#include <algorithm>
#include <cmath>

#include "kernels/sm80/tiles.h"

namespace moe::sm80 {
namespace {

constexpr Device kFittedOn = {132, 232448, 233472};

struct Cost {
  double step;       // us a k step
  double block;      // us a k step and 16-row block that holds rows
  double tile;       // us a tile: epilogue and what of the prologue shows
  double bandwidth;  // TB/s of the whole chip
};

// By tile, then 16-bit and 8-bit weights.
constexpr Cost kCosts[][2] = {
    {{0.327, 0.102, 1.42, 4.25}, {0.542, 0.153, 1.89, 3.77}},  // 16x64x128
    {{0.302, 0.106, 2.01, 4.16}, {0.402, 0.110, 2.43, 3.91}},  // 16x128x64
    {{0.387, 0.028, 2.07, 4.24}, {0.001, 0.465, 3.13, 3.34}},  // 32x128x64
    {{0.561, 0.053, 2.49, 4.27}, {0.406, 0.145, 3.00, 3.60}},  // 64x128x64
    {{0.682, 0.022, 3.43, 4.25}, {0.546, 0.114, 3.94, 3.50}},  // 64x256x64
    {{0.549, 0.101, 2.92, 4.00}, {0.817, 0.128, 3.36, 3.00}},  // 128x128x64
    {{0.637, 0.084, 3.10, 3.90}, {0.693, 0.142, 3.35, 3.00}},  // 128x256x64
    {{0.500, 0.057, 2.84, 3.30}, {0.680, 0.083, 3.14, 2.40}},  // 256x128x64
};
static_assert(sizeof(kCosts) / sizeof(kCosts[0]) == kNumTiles, "a row of costs for each tile");

// Expected ceil(X / height) for a Poisson X of the given mean: the sum over j of P(X > j * height),
// by a logistic approximation of the normal distribution.
double RowTiles(double mean, int height) {
  if (mean > 4.0 * height) return mean / height + 0.5;
  const double deviation = std::sqrt(mean);
  double tiles = 1.0 - std::exp(-mean);
  for (int j = 1; j * height < mean + 4.0 * deviation; ++j) {
    tiles += 1.0 / (1.0 + std::exp(1.702 * (j * height + 0.5 - mean) / deviation));
  }
  return tiles;
}

// What a GEMM's cost depends on besides the tile.
struct Shape {
  double experts;
  double rows_per_expert;
  double weight_rows;  // of an expert
  double k;
  double bytes;
};

double Microseconds(int index, bool quantized, const Shape& shape, const Device& device) {
  const Tile& tile = kTiles[index];
  const Cost& cost = kCosts[index][quantized];
  const double column_tiles = std::ceil(shape.weight_rows / tile.n);
  const double row_tiles = RowTiles(shape.rows_per_expert, tile.m);
  const double row_blocks = RowTiles(shape.rows_per_expert, 16);

  // Blocks of a multiprocessor share it: alone, each runs faster, down to the 8 warps that the
  // mainloop needs to hide its own latency.
  const double resident = ResidentBlocks(index, quantized, device);
  const double fitted = ResidentBlocks(index, quantized, kFittedOn);
  const double warps = resident * tile.threads() / 32;
  const double sharing = resident / fitted * std::max(1.0, 8.0 / warps);

  const double steps = std::ceil(shape.k / tile.k);
  const double tile_time =
      sharing * (steps * (cost.step + cost.block * row_blocks / row_tiles) + cost.tile);
  const double waves =
      shape.experts * row_tiles * column_tiles / (device.multiprocessors * resident);
  // Few waves end together; over many, blocks that finish early take what is left.
  const double longest = std::max(1.0, waves < 4.0 ? std::ceil(waves) : waves + 0.5);
  const double multiprocessors = static_cast<double>(device.multiprocessors);
  const double bandwidth = cost.bandwidth * 1e6 * multiprocessors / kFittedOn.multiprocessors;

  const double by_waves = longest * tile_time;
  const double by_bytes = shape.bytes / bandwidth;
  return std::sqrt(std::sqrt(std::pow(by_waves, 4) + std::pow(by_bytes, 4)));
}

}  // namespace

int ResidentBlocks(int tile, bool quantized, const Device& device) {
  constexpr int kReserved = 1024;  // the driver takes 1 KiB of shared memory a block
  const int bytes = kTiles[tile].shared_memory(quantized);
  if (bytes > device.shared_memory_per_block) return 0;
  return std::clamp(device.shared_memory_per_multiprocessor / (bytes + kReserved), 1,
                    kTiles[tile].blocks);
}

int ChooseTile(const Problem& problem, bool gated, int columns, int k, const Device& device) {
  Shape shape;
  shape.experts = problem.num_local_experts;
  shape.rows_per_expert = std::max(problem.expected_local_slots() / shape.experts, 1e-6);
  shape.weight_rows = static_cast<double>(columns) * (gated ? 2 : 1);
  shape.k = k;
  const double touched = shape.experts * (1.0 - std::exp(-shape.rows_per_expert));
  const double rows = shape.experts * shape.rows_per_expert;
  shape.bytes =
      touched * shape.weight_rows * k * (problem.quantized() ? 1 : 2) + rows * 2.0 * (k + columns);

  int best = 0;
  double best_time = INFINITY;
  for (int tile = 0; tile < kNumTiles; ++tile) {
    if (ResidentBlocks(tile, problem.quantized(), device) == 0) continue;
    const double time = Microseconds(tile, problem.quantized(), shape, device);
    if (time < best_time) {
      best = tile;
      best_time = time;
    }
  }
  return best;  // where none fits the launch refuses, naming the tile and the limit
}

}  // namespace moe::sm80
