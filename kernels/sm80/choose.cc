// SPDX-License-Identifier: Apache-2.0
//
// A model of waves and bytes. In tiles, a GEMM takes a start and the longer of
//
//   bytes   touched weights and rows, each once, at the bandwidth that the tile can keep busy
//   waves   (tiles in a row for the busiest block) * (time of a tile), where a tile takes
//           steps * (step + block * blocks of rows that hold any) + tile
//
// joined smoothly, since near the crossing each slows the other. How many row tiles an expert
// needs is the expectation over random routing: the host does not know the ids.
//
// One launch for the whole layer takes a start and its weights at a bandwidth of its own.
//
// The costs were fitted to timings on an H200 (docs/measurements.md), up to 72 GEMMs an entry;
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
    {{0.278, 0.050, 1.05, 4.36}, {0.172, 0.206, 1.50, 4.23}, {0.020, 0.335, 1.11, 2.61}},  // 16x64
    {{0.279, 0.050, 0.30, 4.32}, {0.444, 0.048, 1.71, 3.92}, {0.460, 0.025, 0.64, 2.75}},  // 16x128
    {{0.028, 0.452, 1.40, 4.39}, {0.322, 0.136, 1.95, 3.90}, {0.391, 0.088, 1.33, 2.22}},  // 32x64
    {{0.020, 0.279, 1.59, 4.34}, {0.167, 0.077, 3.00, 3.77}, {0.209, 0.299, 1.29, 2.62}},  // 32x128
    {{0.386, 0.096, 1.69, 4.31}, {0.324, 0.059, 2.66, 3.52}, {0.402, 0.158, 2.08, 2.20}},  // 64x128
    {{0.498, 0.104, 0.33, 4.41},
     {0.252, 0.072, 1.05, 2.99},
     {0.546, 0.057, 1.00, 2.60}},  // 128x128
    {{0.672, 0.070, 0.30, 4.41},
     {0.533, 0.049, 0.76, 3.11},
     {0.703, 0.047, 0.91, 3.19}},  // 128x256
    {{0.364, 0.057, 0.64, 3.45},
     {0.596, 0.043, 1.48, 4.41},
     {0.638, 0.043, 1.44, 4.41}},  // 256x128
};
static_assert(sizeof(kCosts) / sizeof(kCosts[0]) == kNumTiles, "a row of costs for each tile");

constexpr double kLastResort = 1e12;  // us: beyond any time

// Microseconds of a GEMM in tiles before its first bytes arrive and after its last tile.
constexpr double kGemmStart = 3.8;

// Where unpacked 4-bit weights are scaled one by one, not in sums, that takes so long a k step: us a
// weight row of the blocks that a multiprocessor holds.
constexpr double kScaledRow = 0.0030;

// Microseconds of a layer in tiles beside its GEMMs: routing, finalize, what passes between four
// launches.
constexpr double kTilesOverhead = 8.5;

// One launch for the layer takes a start, routing included, and its weights, as often as they are
// passed over.
constexpr double kLayerStart = 11.0;  // us
// TB/s of the whole chip, by kernel, then bits of a weight.
constexpr double kDecodeBandwidths[][3] = {
    {4.45, 4.16, 3.06},
    {4.42, 3.77, 2.41},
};
static_assert(sizeof(kDecodeBandwidths) / sizeof(kDecodeBandwidths[0]) == kNumDecodeKernels,
              "one row each");
// How much longer its 4-bit weights take where they are scaled one by one.
constexpr double kScaledLayer = 1.16;

constexpr int CostColumn(WeightKind kind) {
  return kind == WeightKind::k16Bit ? 0 : kind == WeightKind::k8Bit ? 1 : 2;
}

// ceil() of what is a whole number but for rounding, or is none.
double Ceil(double x) { return std::ceil(x - 1e-9); }

// The rows of an expert, where each token chooses it with the same probability.
struct ExpertRows {
  double mean;
  double deviation;
  double touched;  // the probability that there are any
};

ExpertRows RowsPerExpert(const Problem& problem) {
  const double chosen =
      std::min(1.0, static_cast<double>(problem.top_k) / std::max(problem.num_experts, 1));
  const double tokens = std::max(static_cast<double>(problem.num_tokens), 1e-6);
  return {tokens * chosen, std::sqrt(tokens * chosen * (1.0 - chosen)),
          1.0 - std::pow(1.0 - chosen, tokens)};
}

// Expected ceil(rows / height): the sum over j of P(rows > j * height), by a logistic approximation
// of the normal distribution.
double RowTiles(const ExpertRows& rows, int height) {
  if (rows.mean > 4.0 * height) return rows.mean / height + 0.5;
  double tiles = rows.touched;
  for (int j = 1; j * height < rows.mean + 4.0 * rows.deviation; ++j) {
    tiles += 1.0 / (1.0 + std::exp(1.702 * (j * height + 0.5 - rows.mean) / rows.deviation));
  }
  return tiles;
}

// What a GEMM's cost depends on besides the tile.
struct Shape {
  double experts;
  ExpertRows rows;     // of each
  double weight_rows;  // of an expert
  double k;
  double bytes;
  int group_size;
};

double Microseconds(int index, WeightKind kind, const Shape& shape, const Device& device) {
  const Tile& tile = kTiles[index];
  const Cost& cost = kCosts[index][CostColumn(kind)];
  const double column_tiles = std::ceil(shape.weight_rows / tile.n);
  const double row_tiles = RowTiles(shape.rows, tile.m);
  const int block_height = tile.unpacks(kind) ? 8 : 16;
  const double row_blocks = RowTiles(shape.rows, block_height) / row_tiles;  // of a tile

  // Blocks of a multiprocessor share it: alone, each runs faster, down to the 8 warps that the
  // mainloop needs to hide its own latency.
  const double resident = ResidentBlocks(index, kind, device);
  const double fitted = ResidentBlocks(index, kind, kFittedOn);
  const double warps = resident * tile.threads() / 32;
  const double sharing = resident / fitted * std::max(1.0, 8.0 / warps);

  const double steps = std::ceil(shape.k / tile.step(kind));
  double step = cost.step + cost.block * row_blocks;
  if (HasGroups(kind) && !tile.high() && shape.group_size % tile.step(kind) != 0) {
    step = std::hypot(step, kScaledRow * fitted * tile.n);
  }
  const double tile_time = sharing * (steps * step + cost.tile);
  const double waves =
      shape.experts * row_tiles * column_tiles / (device.multiprocessors * resident);
  // Few waves end together; over many, the rest of the last one is as likely to be short as long.
  const double longest = std::max(1.0, waves < 4.0 ? Ceil(waves) : waves + 0.5);
  const double multiprocessors = static_cast<double>(device.multiprocessors);
  const double bandwidth = cost.bandwidth * 1e6 * multiprocessors / kFittedOn.multiprocessors;

  const double by_waves = longest * tile_time;
  const double by_bytes = shape.bytes / bandwidth;
  return kGemmStart + std::sqrt(std::sqrt(std::pow(by_waves, 4) + std::pow(by_bytes, 4)));
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
  shape.rows = RowsPerExpert(problem);
  shape.weight_rows = static_cast<double>(columns) * (gated ? 2 : 1);
  shape.k = k;
  shape.group_size = problem.group_size;
  const double touched = shape.experts * shape.rows.touched;
  const double rows = shape.experts * shape.rows.mean;
  shape.bytes = touched * shape.weight_rows * k * WeightBits(kind) / 8 + rows * 2.0 * (k + columns);

  // Where none fits, the launch refuses the first, naming it and the limit.
  TileChoice best = {0, INFINITY};
  for (int tile = 0; tile < kNumTiles; ++tile) {
    if (ResidentBlocks(tile, kind, device) == 0) continue;
    double time = Microseconds(tile, kind, shape, device);
    // Low tiles were the best where one takes nearly every expert's rows. Beyond, only if nothing else
    // fits: each reads the expert's weights from L2 again, which the model leaves out. Nor are high
    // ones considered where rows fill less than an eighth of one: the costs were not fitted there.
    const int height = kTiles[tile].m;
    if (height <= 32 && shape.rows.mean > 0.9 * height) time += kLastResort;
    if (height > 32 && shape.rows.mean < height / 8.0) time += kLastResort;
    if (time < best.microseconds) best = {tile, time};
  }
  return best;
}

// How much longer a GEMM of the whole-layer kernel takes for its units of work (decode_gemm.cuh),
// which its groups of warps do not share evenly. Where some have one more than others, those have
// the bandwidth to themselves in the end: of the time that all would take, about half shows. Where
// some have none, the others keep it busy.
double UnevenUnits(const DecodeSplit& split, int workers) {
  const double turns = static_cast<double>(split.units) * (1 << split.slices_log2) / workers;
  return turns <= 1.0 ? 1.0 : (turns + Ceil(turns)) / (2.0 * turns);
}

double DecodeMicroseconds(int kernel, const Problem& problem, const Device& device) {
  const WeightKind kind = KindOf(problem.weight_format);
  const double passes =
      problem.num_local_experts * RowTiles(RowsPerExpert(problem), 8 * kDecodeTokenBlocks[kernel]);
  const int hidden = problem.hidden_size;
  const int intermediate = problem.intermediate_size;
  const int workers = kDecodeWarps * device.multiprocessors;
  const int blocks = kDecodeTokenBlocks[kernel];
  const auto chunks = [&](int k) { return (k + DecodeChunk(kind) - 1) / DecodeChunk(kind); };
  const auto units = [&](int rows) {
    return static_cast<int>(passes * ((rows + kDecodeRows - 1) / kDecodeRows));
  };
  const DecodeSplit split1 =
      SplitGemm1(kind, blocks, chunks(hidden), units(problem.fc1_rows()), workers);
  const DecodeSplit split2 =
      SplitGemm2(kind, blocks, split1, chunks(intermediate), units(hidden), workers);
  // GEMM 2 that follows fills the time in which some have no more of GEMM 1.
  const double uneven1 = Follows(split1, split2) ? 1.0 : UnevenUnits(split1, workers);
  const double weights =
      static_cast<double>(hidden) *
      (problem.fc1_rows() * uneven1 + intermediate * UnevenUnits(split2, workers));
  const bool scales_weights = HasGroups(kind) && problem.group_size != DecodeChunk(kind);
  const double bandwidth = kDecodeBandwidths[kernel][CostColumn(kind)] * 1e6 *
                           device.multiprocessors / kFittedOn.multiprocessors;
  return kLayerStart + passes * weights * WeightBits(kind) / 8 / bandwidth *
                           (scales_weights ? kScaledLayer : 1.0);
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
