// SPDX-License-Identifier: Apache-2.0
//
// A model of waves and bytes. In tiles, a GEMM takes the longer of
//
//   bytes   touched weights and rows, each once, at the bandwidth that the tile can keep busy
//   waves   (tiles in a row for the busiest block) * (time of a tile), where a tile takes
//           steps * (step + block * blocks of rows that hold any) + tile
//
// joined smoothly, since near the crossing each slows the other. How many row tiles an expert
// needs is the expectation over Poisson-distributed rows: the host does not know the routing.
//
// One launch for the whole layer takes a start and its weights at a bandwidth of its own.
//
// The costs were fitted to timings on an H200 (docs/measurements.md), up to 168 GEMMs an entry;
// they are microseconds of that chip's multiprocessors. Other chips enter by multiprocessors,
// resident blocks and shared memory. That an A100 has about 0.6 of both the matrix rate and the
// bandwidth a multiprocessor scales all times alike and leaves the choice where it is.

#include "kernels/sm80/choose.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/sm80/decode_kernels.h"
#include "kernels/sm80/tiles.h"

namespace moe::sm80 {
namespace {

constexpr Device kFittedOn = {132, 232448, 233472};

// Shared memory that the driver takes for each block that a multiprocessor holds. The limit of one
// block leaves it out.
constexpr int kReserved = 1024;

struct Cost {
  double step;       // us a k step
  double block;      // us a k step and block of rows that holds any: of 8 in unpacking tiles, or 16
  double tile;       // us a tile: epilogue and what of the prologue shows
  double bandwidth;  // TB/s of the whole chip
};

// By tile, then bits of a weight: 16, 8, 4.
constexpr Cost kCosts[][3] = {
    {{0.410, 0.053, 2.14, 3.44}, {0.447, 0.056, 3.32, 4.40}, {0.141, 0.299, 3.48, 3.17}},  // 16x64
    {{0.397, 0.009, 2.87, 3.24}, {0.370, 0.332, 3.35, 3.67}, {0.050, 0.570, 2.52, 2.50}},  // 16x128
    {{0.845, 0.002, 1.91, 4.37}, {0.442, 0.090, 5.34, 4.04}, {0.660, 0.105, 2.97, 3.00}},  // 32x64
    {{0.437, 0.002, 3.37, 4.13}, {0.209, 0.217, 4.78, 3.60}, {0.985, 0.224, 2.91, 3.00}},  // 32x128
    {{0.853, 0.004, 2.85, 4.29}, {0.428, 0.039, 2.96, 4.10}, {0.749, 0.103, 2.39, 4.40}},  // 64x128
    {{0.594, 0.088, 3.38, 4.40},
     {0.850, 0.063, 4.85, 4.40},
     {0.787, 0.082, 4.18, 4.40}},  // 128x128
    {{0.646, 0.070, 4.58, 4.10},
     {0.884, 0.056, 4.92, 4.28},
     {0.891, 0.065, 4.49, 3.00}},  // 128x256
    {{0.471, 0.048, 3.93, 4.40},
     {0.607, 0.042, 4.73, 4.40},
     {0.730, 0.040, 4.06, 3.00}},  // 256x128
};
static_assert(sizeof(kCosts) / sizeof(kCosts[0]) == kNumTiles, "a row of costs for each tile");

constexpr double kLastResort = 1e12;  // us: beyond any time

// How much longer a step takes where unpacked 4-bit weights are scaled one by one, not in sums.
constexpr double kScalingWeights = 1.25;

// Microseconds of a layer in tiles beside those of its GEMMs: routing, finalize, four launches.
constexpr double kTilesOverhead = 11.0;

// One launch for the layer takes `start` and its weights, as often as they are passed over.
struct DecodeCost {
  double start;      // us
  double bandwidth;  // TB/s of the whole chip
};

// By kernel, then bits of a weight.
constexpr DecodeCost kDecodeCosts[][3] = {
    {{15.2, 4.20}, {15.5, 3.64}, {14.3, 2.90}},
    {{14.9, 4.07}, {14.8, 3.32}, {14.4, 2.33}},
};
static_assert(sizeof(kDecodeCosts) / sizeof(kDecodeCosts[0]) == kNumDecodeKernels, "one row each");

constexpr int CostColumn(WeightKind kind) {
  return kind == WeightKind::k16Bit ? 0 : kind == WeightKind::k8Bit ? 1 : 2;
}

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

double RowsPerExpert(const Problem& problem) {
  return std::max(problem.expected_local_slots() / problem.num_local_experts, 1e-6);
}

// What a GEMM's cost depends on besides the tile.
struct Shape {
  double experts;
  double rows_per_expert;
  double weight_rows;  // of an expert
  double k;
  double bytes;
  int group_size;
};

double Microseconds(int index, WeightKind kind, const Shape& shape, const Device& device) {
  const Tile& tile = kTiles[index];
  const Cost& cost = kCosts[index][CostColumn(kind)];
  const double column_tiles = std::ceil(shape.weight_rows / tile.n);
  const double row_tiles = RowTiles(shape.rows_per_expert, tile.m);
  const double row_blocks = RowTiles(shape.rows_per_expert, tile.unpacks(kind) ? 8 : 16);

  // Blocks of a multiprocessor share it: alone, each runs faster, down to the 8 warps that the
  // mainloop needs to hide its own latency.
  const double resident = ResidentBlocks(index, kind, device);
  const double fitted = ResidentBlocks(index, kind, kFittedOn);
  const double warps = resident * tile.threads() / 32;
  const double sharing = resident / fitted * std::max(1.0, 8.0 / warps);

  const double steps = std::ceil(shape.k / tile.step(kind));
  const bool scales_weights =
      HasGroups(kind) && tile.unpacks(kind) && shape.group_size % tile.step(kind) != 0;
  const double step =
      (scales_weights ? kScalingWeights : 1.0) * (cost.step + cost.block * row_blocks / row_tiles);
  const double tile_time = sharing * (steps * step + cost.tile);
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

struct TileChoice {
  int tile;
  double microseconds;
};

// The best tile for a GEMM with `columns` output columns (I or H) and reduction length `k`.
TileChoice BestTile(const Problem& problem, bool gated, int columns, int k, const Device& device) {
  const WeightKind kind = KindOf(problem.weight_format);
  Shape shape;
  shape.experts = problem.num_local_experts;
  shape.rows_per_expert = RowsPerExpert(problem);
  shape.weight_rows = static_cast<double>(columns) * (gated ? 2 : 1);
  shape.k = k;
  shape.group_size = problem.group_size;
  const double touched = shape.experts * (1.0 - std::exp(-shape.rows_per_expert));
  const double rows = shape.experts * shape.rows_per_expert;
  shape.bytes = touched * shape.weight_rows * k * WeightBits(kind) / 8 + rows * 2.0 * (k + columns);

  // Where none fits, the launch refuses the first, naming it and the limit.
  TileChoice best = {0, INFINITY};
  for (int tile = 0; tile < kNumTiles; ++tile) {
    if (ResidentBlocks(tile, kind, device) == 0) continue;
    double time = Microseconds(tile, kind, shape, device);
    // Low tiles were timed where an expert takes up to 8 of them. With more, only if nothing else
    // fits: each reads the expert's weights from L2 again, which the model leaves out.
    if (kTiles[tile].m <= 32 && shape.rows_per_expert > 8 * kTiles[tile].m) time += kLastResort;
    if (time < best.microseconds) best = {tile, time};
  }
  return best;
}

double DecodeMicroseconds(int kernel, const Problem& problem, const Device& device) {
  const WeightKind kind = KindOf(problem.weight_format);
  const DecodeCost& cost = kDecodeCosts[kernel][CostColumn(kind)];
  const double passes =
      problem.num_local_experts * RowTiles(RowsPerExpert(problem), 8 * kDecodeTokenBlocks[kernel]);
  const double weights =
      static_cast<double>(problem.fc1_rows() + problem.intermediate_size) * problem.hidden_size;
  const double bandwidth =
      cost.bandwidth * 1e6 * device.multiprocessors / kFittedOn.multiprocessors;
  return cost.start + passes * weights * WeightBits(kind) / 8 / bandwidth;
}

}  // namespace

int ResidentBlocks(int tile, WeightKind kind, const Device& device) {
  const int bytes = kTiles[tile].shared_memory(kind);
  if (bytes > device.shared_memory_per_block) return 0;
  return std::clamp(device.shared_memory_per_multiprocessor / (bytes + kReserved), 1,
                    kTiles[tile].blocks[static_cast<int>(kind)]);
}

bool DecodeFits(int kernel, const Problem& problem, const Device& device) {
  // The kernel counts the 8-value vectors of its rows in 32 bits, and a grid's stride beyond them.
  const int64_t vectors =
      problem.num_slots() * std::max(problem.hidden_size, problem.intermediate_size) / 8;
  return problem.num_slots() <= kDecodeMaxSlots && vectors < (int64_t{1} << 30) &&
         DecodeSharedMemory(kDecodeTokenBlocks[kernel]) + kDecodeStaticSharedMemory <=
             device.shared_memory_per_block;
}

Choice Choose(const Problem& problem, const Device& device) {
  const TileChoice first = BestTile(problem, IsGated(problem.activation), problem.intermediate_size,
                                    problem.hidden_size, device);
  const TileChoice second =
      BestTile(problem, false, problem.hidden_size, problem.intermediate_size, device);
  Choice choice = {{first.tile, second.tile}, -1};
  double best = first.microseconds + second.microseconds + kTilesOverhead;
  for (int kernel = 0; kernel < kNumDecodeKernels; ++kernel) {
    if (!DecodeFits(kernel, problem, device)) continue;
    const double time = DecodeMicroseconds(kernel, problem, device);
    if (time < best) {
      best = time;
      choice.decode = kernel;
    }
  }
  return choice;
}

}  // namespace moe::sm80
