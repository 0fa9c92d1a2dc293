// SPDX-License-Identifier: Apache-2.0
//
// One grouped GEMM of the few-token layer: weights stream from global memory straight into the
// registers of mma.m16n8k16, whose 16-row side they take; the 8 columns are tokens.
//
// A unit of work is kColumns output columns of one pass (an expert and up to 8 * kTokenBlocks of
// its slots). It belongs to a group of warps, its slices, that divide k among themselves, chunk by
// chunk in turn, and whose sums are added in shared memory in a fixed order. Few slices make long
// runs of loads, many make enough work for every multiprocessor: the number of units decides.
//
//   weights of a warp              a chunk: 64 bytes of each of 32 rows. Lane 4g + q holds 16
//       k ->                       bytes of rows g, g+8, g+16, g+24: as many mma steps as these
//   +--------+--------+            hold weights for, 4 a step. Which k a step takes does not
//   | slice0 | slice1 | ...        matter as long as both operands agree, so the activations are
//   +--------+--------+            read in the same order, 16 bytes of a token at a time.
//   16 up rows, 16 gate rows
//   (or 32 rows without a gate)
//
// What bounds it: DRAM. A multiprocessor has kDepth chunks of each of 16 warps in flight, 2 KiB
// each; no shared memory lies between DRAM and the mma, and the next unit's loads are on their way
// while this one's sums are added. Chunks come in batches of kDepth, each in registers of its own:
// a register cannot be moved before its load has ended, so a ring that shifts waited at each step.
//
// Activations are loaded with their weights, a batch ahead. Loaded when wanted, they took as long
// as weights, though they are in L1 or L2: a multiprocessor's loads seem to end in the order in
// which they began. And what shared memory a block takes is missing in L1, which all loads pass.

#ifndef KERNELS_SM80_DECODE_GEMM_CUH_
#define KERNELS_SM80_DECODE_GEMM_CUH_

#include <cstdint>

#include "kernels/common/dequantize.cuh"
#include "kernels/sm80/decode.h"
#include "kernels/sm80/decode_follow.cuh"
#include "kernels/sm80/decode_multiply.cuh"
#include "kernels/sm80/decode_outputs.cuh"
#include "kernels/sm80/decode_route.cuh"
#include "moe/numeric.cuh"

namespace moe::sm80 {

// kScaleSums: the weights of a chunk in a row are one group. kGemm1: the first of the layer's two.
template <typename Element, WeightKind kKind, int kTokenBlocks, bool kGated, bool kScaleSums,
          bool kGemm1>
class DecodeGemm {
  using Shared = DecodeShared<kTokenBlocks>;
  using Outputs = DecodeOutputs<Element, kKind, kTokenBlocks, kGated>;

 public:
  static constexpr int kColumns = Outputs::kColumns;       // of a unit
  static constexpr int kVector = 128 / WeightBits(kKind);  // weights of a 16-byte load
  static constexpr int kChunk = DecodeChunk(kKind);        // of k
  // Whether activations are loaded ahead: those of a chunk of 4-bit weights are too many registers.
  static constexpr bool kTokensAhead = !HasGroups(kKind);
  static constexpr int kTokenVectors = kTokensAhead ? kVector / 8 : 1;  // a lane's, of a chunk
  static constexpr int kDepth = DecodeBatch(kKind, kTokenBlocks);
  static constexpr int kTokens = 8 * kTokenBlocks;
  static constexpr int kWarpSums = DecodeWarpSums(kTokenBlocks);

  __device__ static int Chunks(const GroupedGemm& gemm) { return (gemm.k + kChunk - 1) / kChunk; }
  __device__ static int Units(const GroupedGemm& gemm) {  // of all passes
    return Shared::NumPasses() * ColumnUnits(gemm);
  }

  // `counters` are the layer's; they must be 0 when Run() begins. `follows`: the layer's GEMM 2
  // follows its GEMM 1 (decode_follow.cuh).
  __device__ DecodeGemm(const GroupedGemm& gemm, const DecodeSplit& split, bool follows,
                        int32_t* counters, uint32_t weight_flip)
      : gemm_(gemm),
        counters_(counters),
        context_(Dequantizer<Element, kKind>::Ungrouped(weight_flip)) {
    slices_ = 1 << split.slices_log2;
    // Groups are numbered so that a few units go to as many multiprocessors.
    int first = (Warp() >> split.slices_log2) * gridDim.x + blockIdx.x;
    int second = first + Workers();
    if (!kGemm1 && follows && split.hands_out) {
      // Each group was handed out two numbers beyond GEMM 1's last unit, the first to end the
      // lowest. It may be several groups now.
      const DecodePlan& gemm1 = Plan();
      const int groups_log2 = gemm1.slices_log2 - split.slices_log2;
      const int own = gemm1.slice >> split.slices_log2;
      first = ((gemm1.load_unit - gemm1.units) << groups_log2) + own;
      second = ((gemm1.next_unit - gemm1.units) << groups_log2) + own;
    }
    __syncwarp();  // all lanes have done with the plan of the GEMM before
    if (FirstLane()) {
      Plan().units = split.units;
      Plan().stride = split.hands_out ? 0 : Workers();
      Plan().unit = first;
      Plan().load_unit = first;
      Plan().next_unit = second;
      Plan().buffer = 0;
      Plan().slice = Slice();
      Plan().slices_log2 = split.slices_log2;
      if constexpr (kGemm1) Plan().awaited = follows ? ColumnUnits() : 0;
      // As late as the answer allows, in the last batch but one: those who are slow get less.
      const int batch = kDepth * Slices() * kChunk;  // of the group
      const bool asks = split.hands_out && Slice() == 0;
      Plan().asks_k = asks ? (gemm_.k - 1) / batch * batch - batch : -1;
    }
    __syncwarp();
    BeginLoads<false>(first);
  }

  // Starts the first loads, before the barrier that Run() needs: weights depend on nothing here.
  __device__ __forceinline__ void Prime() { LoadBatch<0>(); }

  // And those of the activations with them, behind it.
  __device__ __forceinline__ void PrimeTokens() {
    if constexpr (kTokensAhead) {
      const int unit = Plan().unit;
      if (unit >= Plan().units) return;
      uint32_t token[kTokenBlocks];
      const int pass = unit / ColumnUnits();
      Await(pass);
      BeginTokens(Shared::GetPass(pass), token);
      int k = Plan().slice * kChunk;
#pragma unroll
      for (int i = 0; i < kDepth; ++i) {
        LoadTokens(batch_[i], k, token);
        MoveTokens(token);
        k += Slices() * kChunk;
      }
    }
  }

  __device__ __forceinline__ void Run() {
    int unit = Plan().unit;
#pragma unroll 1
    while (unit < Plan().units) {
      const DecodePass pass = Shared::GetPass(unit / ColumnUnits());
      if constexpr (!kTokensAhead) {
        Await(unit / ColumnUnits());
        BeginTokens(pass, token_);
      }
      LoadSlotScale(pass);
      float acc[2][kTokenBlocks][4] = {};
      int handed_out = 0;
#pragma unroll 1
      for (int k = Plan().slice * kChunk; k < gemm_.k; k += kDepth * Slices() * kChunk) {
        if (k == Plan().asks_k && FirstLane()) {
          handed_out = atomicAdd(counters_ + kDecodeHandedOut + (kGemm1 ? 0 : 1), 1);
        }
        MultiplyBatch<0>(k, acc);
      }
      if (Asks()) HandedOut() = 2 * Workers() + handed_out;
      Finish(acc);
      int next_unit = Plan().next_unit;
      if (HandsOut()) {
        unit = Plan().load_unit;  // which the last batch has moved to
        next_unit = HandedOut();
      } else {
        unit = Plan().unit + Plan().stride;
      }
      if (kGemm1 && Plan().awaited != 0) {
        // Behind this barrier nobody needs what the group's warps share, either.
        Barrier();
        if (Asks()) AnnounceUnit(counters_, Plan().unit / ColumnUnits());
      }
      __syncwarp();
      if (FirstLane()) {
        Plan().unit = unit;
        Plan().next_unit = next_unit;
        Plan().buffer ^= 1;
      }
      __syncwarp();
    }
  }

 private:
  // Scales that a lane loads for a chunk: of its four rows. Where they are those of all of it, the
  // lanes of a quad, whose rows are the same, load one each.
  static constexpr int kScales = HasGroups(kKind) && !kScaleSums ? 4 : 1;

  static constexpr int kNoLoads = 1 << 30;  // a load_k_ beyond any k

  // What a lane holds of a chunk: rows [block of 16][upper, lower half].
  struct Raw {
    uint4 row[2][2];
    uint4 token[kTokenBlocks][kTokenVectors];  // if kTokensAhead
    uint32_t scale[kScales];
  };

  __device__ static DecodePlan& Plan() { return Shared::Plans()[threadIdx.x / 32]; }
  // The unit after the next one of the warp's group, if it is handed out.
  __device__ int& HandedOut() const {
    return Shared::Plans()[Warp() - Slice()].handed_out[Plan().buffer];
  }
  // Whether it is the thread of its group that asks for it.
  __device__ static bool Asks() { return Plan().asks_k >= 0 && FirstLane(); }
  // Whether units are handed out as groups come for them.
  __device__ bool HandsOut() const { return Plan().stride == 0; }
  __device__ static bool FirstLane() { return threadIdx.x % 32 == 0; }

  __device__ static int Warp() { return threadIdx.x / 32; }
  __device__ int Slices() const { return slices_; }
  __device__ int SlicesLog2() const { return 31 - __clz(slices_); }
  __device__ int Slice() const { return Warp() & (Slices() - 1); }
  // The groups of all multiprocessors.
  __device__ int Workers() const { return (kDecodeWarps >> SlicesLog2()) * gridDim.x; }
  __device__ static int ColumnUnits(const GroupedGemm& gemm) {  // of a pass
    return (gemm.columns + kColumns - 1) / kColumns;
  }
  __device__ int ColumnUnits() const { return ColumnUnits(gemm_); }
  __device__ static int Quad() { return threadIdx.x % 4; }
  __device__ static int Row() { return threadIdx.x % 32 / 4; }

  // Waits until the activations of a pass are there, in GEMM 2.
  __device__ __forceinline__ void Await(int pass) const {
    if constexpr (!kGemm1) {
      const int awaited = Plan().awaited;
      if (awaited != 0) AwaitPass<kTokenBlocks>(counters_, awaited, pass);
    }
  }

  // Of the group, named after its first warp: groups of GEMM 1 may still use theirs.
  __device__ __forceinline__ void Barrier() const {
    if (slices_ == 1) {
      __syncwarp();
    } else {
      asm volatile("bar.sync %0, %1;" ::"r"(1 + Warp() - Slice()), "r"(32 * Slices()) : "memory");
    }
  }

  // kAwaits: for the unit's activations, before which even weights are not loaded then.
  template <bool kAwaits>
  __device__ __forceinline__ void BeginLoads(int unit) {
    if (unit >= Plan().units) {
      load_k_ = kNoLoads;
      scale_ = load_k_ / kVector + Quad();  // but some scale
      return;
    }
    // The empty asm keeps the compiler from computing what follows once and for all, in registers.
    int columns = gemm_.columns, depth = gemm_.k, thread = threadIdx.x % 32;
    asm volatile("" : "+r"(columns), "+r"(depth), "+r"(thread));
    const int quad = thread % 4;
    const int column_units = (columns + kColumns - 1) / kColumns;
    load_k_ = Plan().slice * kChunk;
    const int pass = unit / column_units;
    if constexpr (kAwaits) Await(pass);
    const int column = (unit - pass * column_units) * kColumns + thread / 4;
    // Beyond the last column it is read once more; what comes of it is not stored.
    const int last = columns - 1;
    const int first = min(column, last);
    const int64_t row =
        static_cast<int64_t>(Shared::Passes()[pass].expert) * columns * (kGated ? 2 : 1) + first;
    const int lower = min(column + 8, last) - first;
    const int to_row[3] = {lower, kGated ? columns : min(column + 16, last) - first,
                           kGated ? columns + lower : min(column + 24, last) - first};
    const uint32_t vectors = depth / kVector;  // of a row
#pragma unroll
    for (int i = 0; i < 3; ++i) to_vector_[i] = to_row[i] * vectors;
    const int64_t vector = row * vectors + load_k_ / kVector + quad;
    vector_ = static_cast<const uint4*>(gemm_.weights) + vector;
    if constexpr (kScaleSums) {
      const int own = quad == 0 ? 0 : quad == 1 ? to_row[0] : quad == 2 ? to_row[1] : to_row[2];
      scale_ = (static_cast<uint32_t>(row + own) * (depth / kChunk) + Plan().slice) * ScaleBytes();
    } else if constexpr (HasGroups(kKind)) {
      scale_ = static_cast<uint32_t>(vector);
    }
    if constexpr (kTokensAhead) BeginTokens(Shared::GetPass(pass), token_);
  }

  __device__ uint32_t ScaleBytes() const {
    return gemm_.weight_scale_dtype == DType::kFloat32 ? 4 : 2;
  }

  // Loads the weights of chunks kFirst .. kDepth - 1 of a batch, and moves on to the next one.
  template <int kFirst>
  __device__ __forceinline__ void LoadBatch() {
    if constexpr (kFirst < kDepth) {
      Load<false>(batch_[kFirst]);
      LoadBatch<kFirst + 1>();
    } else {
      EndLoads();
    }
  }

  // Multiplies a batch from its chunk kFirst on; each is followed by the load of the same chunk of
  // the next batch. A unit's last batch may be cut short.
  template <int kFirst>
  __device__ __forceinline__ void MultiplyBatch(int k, float (&acc)[2][kTokenBlocks][4]) {
    if constexpr (kFirst < kDepth) {
      if (k < gemm_.k) Multiply(batch_[kFirst], k, acc);
      Load<true>(batch_[kFirst]);
      MultiplyBatch<kFirst + 1>(k + Slices() * kChunk, acc);
    } else {
      EndLoads();
    }
  }

  template <bool kActivationsToo>
  __device__ __forceinline__ void Load(Raw& raw) {
    const int k = load_k_ + (kScaleSums ? 0 : Quad() * kVector);
    const bool inside = k < gemm_.k;
    const uint4* vectors[4] = {vector_};
#pragma unroll
    for (int i = 1; i < 4; ++i) vectors[i] = vector_ + to_vector_[i - 1];
    // vector_ += Slices() * 4, whose product would be kept in two registers.
    vector_ = reinterpret_cast<const uint4*>(
        WideOffset(reinterpret_cast<const char*>(vector_), Slices(), 64));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint4& v = raw.row[i / 2][i % 2];
      // Beyond the end of k, where tokens count as 0, any finite weights will do. Those loaded
      // before are, unless they are floats.
      if constexpr (kKind == WeightKind::k16Bit) v = make_uint4(0, 0, 0, 0);
      LoadOnce(vectors[i], inside, v);
    }
    if constexpr (kScaleSums) {
      const char* scale = static_cast<const char*>(gemm_.weight_scales) + scale_;
      scale_ += Slices() * ScaleBytes();
      if (inside && gemm_.weight_scale_dtype == DType::kFloat32) {
        raw.scale[0] = __ldg(reinterpret_cast<const uint32_t*>(scale));
      }
      if (inside && gemm_.weight_scale_dtype != DType::kFloat32) {
        raw.scale[0] = __ldg(reinterpret_cast<const uint16_t*>(scale));
      }
    } else if constexpr (HasGroups(kKind)) {
      // Where no weights are loaded, some other scale of the rows is read: it is multiplied by 0.
      const uint32_t vector = scale_ - (inside ? 0 : k / kVector);
      const int vectors_log2 = 31 - __clz(gemm_.group_size / kVector);  // of a group
      uint32_t index[4];
      index[0] = vector >> vectors_log2;
#pragma unroll
      for (int i = 1; i < 4; ++i) index[i] = (vector + to_vector_[i - 1]) >> vectors_log2;
      LoadScaleBits<kKind>(gemm_.weight_scales, index, gemm_.weight_scale_dtype, raw.scale);
      scale_ += Slices() * 4;
    }
    if constexpr (kTokensAhead) {
      if constexpr (kActivationsToo) LoadTokens(raw, load_k_, token_);
      MoveTokens(token_);
    }
    load_k_ += Slices() * kChunk;
  }

  // At the end of a batch.
  __device__ __forceinline__ void EndLoads() {
    if (load_k_ >= gemm_.k && load_k_ < kNoLoads) {
      const int unit = Plan().next_unit;
      __syncwarp();
      if (FirstLane()) {
        Plan().load_unit = unit;
        Plan().next_unit = unit + Plan().stride;
      }
      __syncwarp();
      BeginLoads<kTokensAhead>(unit);
    }
  }

  // The lane's first 16 bytes of each of its tokens of a pass.
  __device__ __forceinline__ void BeginTokens(const DecodePass& pass,
                                              uint32_t (&token)[kTokenBlocks]) const {
#pragma unroll
    for (int t = 0; t < kTokenBlocks; ++t) {
      // Columns beyond the pass's slots repeat the last; what comes of them is not stored.
      const int slot = Shared::Slots()[pass.first_slot + min(t * 8 + Row(), pass.num_slots - 1)];
      const int source = gemm_.gather ? slot / gemm_.top_k : slot;
      token[t] = source * (gemm_.k / 8) + (Plan().slice * kChunk + Quad() * kVector) / 8;
    }
  }

  __device__ __forceinline__ void MoveTokens(uint32_t (&token)[kTokenBlocks]) const {
#pragma unroll
    for (int t = 0; t < kTokenBlocks; ++t) token[t] += Slices() * (kChunk / 8);
  }

  // The lane's values of a chunk; beyond the end of k they count as 0. By ordinary loads, not by
  // __ldg: those of GEMM 2 were written in this launch.
  __device__ __forceinline__ void LoadTokens(Raw& raw, int k,
                                             const uint32_t (&token)[kTokenBlocks]) const {
    const bool inside = k + Quad() * kVector < gemm_.k;
#pragma unroll
    for (int t = 0; t < kTokenBlocks; ++t) {
#pragma unroll
      for (int i = 0; i < kTokenVectors; ++i) {
        raw.token[t][i] = make_uint4(0, 0, 0, 0);
        if (inside) raw.token[t][i] = static_cast<const uint4*>(gemm_.a)[token[t] + i];
      }
    }
  }

  __device__ __forceinline__ void Multiply(const Raw& raw, int k,
                                           float (&acc)[2][kTokenBlocks][4]) {
    if constexpr (kTokensAhead) {
      const WeightContext<Element, kKind> context[4] = {context_, context_, context_, context_};
      MultiplyScaleWeights<Element, kKind>(raw.row, raw.token, true, context, acc);
    } else {
      const uint4* tokens[kTokenBlocks];
#pragma unroll
      for (int t = 0; t < kTokenBlocks; ++t) {
        tokens[t] = static_cast<const uint4*>(gemm_.a) + token_[t];
      }
      MoveTokens(token_);
      if constexpr (kScaleSums) {
        MultiplyScaleSums<Element>(raw.row, tokens, raw.scale[0], gemm_.weight_scale_dtype, acc);
      } else {
        uint32_t context[4];
        GroupScales<Element, kKind>(raw.scale, gemm_.weight_scale_dtype, context);
        const bool inside = k + Quad() * kVector < gemm_.k;
        MultiplyScaleWeights<Element, kKind>(raw.row, tokens, inside, context, acc);
      }
    }
  }

  // Adds the slices' sums and stores the unit's outputs. Its one barrier is enough: the next unit's
  // sums go to the other buffer, and the one's after it come behind the next barrier.
  __device__ __forceinline__ void Finish(const float (&acc)[2][kTokenBlocks][4]) {
    float* sums = Shared::Sums() + Plan().buffer * kDecodeWarps * kWarpSums;
    Outputs::Keep(acc, sums + Warp() * kWarpSums);
    const DecodePass pass = Shared::GetPass(Plan().unit / ColumnUnits());
    const int first_column = Plan().unit % ColumnUnits() * kColumns;
    const int thread = Slice() * 32 + threadIdx.x % 32;
    const auto channel = Outputs::LoadScales(gemm_, pass, first_column, thread);
    Barrier();
    Outputs::Store(gemm_, pass, first_column, thread, SlicesLog2(),
                   sums + (Warp() - Slice()) * kWarpSums, channel, slot_scale_);
  }

  // What scales the thread's first output: asked for in time, for it may take as long as weights.
  __device__ __forceinline__ void LoadSlotScale(const DecodePass& pass) {
    if constexpr (!kGated) {
      const int token = (Slice() * 32 + threadIdx.x % 32) / kColumns;
      if (gemm_.slot_scales != nullptr && token < pass.num_slots) {
        slot_scale_ = __ldg(gemm_.slot_scales + Shared::Slots()[pass.first_slot + token]);
      }
    }
  }

  const GroupedGemm& gemm_;
  int32_t* counters_;
  WeightContext<Element, kKind> context_;  // where weights have no groups
  int slices_;                             // a power of two
  Raw batch_[kDepth] = {};
  // Where the loads are.
  int load_k_;
  // A vector is 16 bytes of weights.
  const uint4* vector_;         // the lane's, of its first row
  uint32_t to_vector_[3] = {};  // how many vectors its others are further on
  uint32_t scale_ = 0;          // kScaleSums: its scale, in bytes; else the number of that vector
  // The lane's next 16 bytes of each of its tokens: of the unit that is loaded, if kTokensAhead,
  // else of the one that is multiplied.
  uint32_t token_[kTokenBlocks] = {};
  float slot_scale_ = 0.0f;  // of the unit that is multiplied
};

}  // namespace moe::sm80

#endif  // KERNELS_SM80_DECODE_GEMM_CUH_
