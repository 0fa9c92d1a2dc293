// SPDX-License-Identifier: Apache-2.0
//
// One grouped GEMM of the few-token layer: weights stream from global memory straight into the
// registers of mma.m16n8k16, whose 16-row side they take; the 8 columns are tokens.
//
// A unit of work is kColumns output columns of one pass (an expert and up to 8 * kTokenBlocks of its
// slots). It belongs to a group of warps, its slices, that divide k among themselves, chunk by
// chunk in turn, and whose sums are added in shared memory in a fixed order. Few slices make long
// runs of loads, many make enough work for every multiprocessor: the number of units decides.
//
//   weights of a warp              a chunk: 64 bytes of each of 32 rows. Lane 4g + q holds 16
//       k ->                       bytes of rows g, g+8, g+16, g+24: as many mma steps as these
//   +--------+--------+            hold weights for, 4 a step. Which k a step takes does not
//   | slice0 | slice1 | ...        matter as long as both operands agree, so the activations are
//   +--------+--------+            read in the same order, 16 bytes of a token at a time
//   16 up rows, 16 gate rows       (through L1, where all warps find the same ones).
//   (or 32 rows without a gate)
//
// What bounds it: DRAM. A multiprocessor has kDepth chunks of each of 16 warps in flight, 2 KiB
// each; no shared memory lies between DRAM and the mma, and the loads of the next unit are on their
// way while this one's sums are added. Chunks come in batches of kDepth, each in registers of its
// own: registers that are loaded cannot be moved before the load has ended, so a ring that shifts
// waited for its newest load at each step.

#ifndef KERNELS_SM80_DECODE_GEMM_CUH_
#define KERNELS_SM80_DECODE_GEMM_CUH_

#include <cstdint>

#include "kernels/common/activation.cuh"
#include "kernels/common/dequantize.cuh"
#include "kernels/common/numeric.cuh"
#include "kernels/sm80/decode.h"
#include "kernels/sm80/decode_route.cuh"
#include "kernels/sm80/mma.cuh"

namespace moe::sm80 {

// 16 bytes that nobody will want again: past L1.
__device__ inline uint4 LoadOnce(const char* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

template <typename Element, WeightKind kKind, int kTokenBlocks, bool kGated>
class DecodeGemm {
  using Shared = DecodeShared<kTokenBlocks>;

 public:
  static constexpr int kWarps = kDecodeThreads / 32;
  static constexpr int kColumns = kGated ? 16 : 32;        // of a group of warps: 32 weight rows
  static constexpr int kVector = 128 / WeightBits(kKind);  // weights of a 16-byte load
  static constexpr int kChunk = 4 * kVector;               // of k
  // Chunks of a batch: as many as the registers allow.
  static constexpr int kDepth = HasGroups(kKind) ? 3 - kTokenBlocks : 4 - kTokenBlocks;
  static constexpr int kTokens = 8 * kTokenBlocks;
  static constexpr int kWarpSums = 2 * kTokens * kDecodePitch;
  static_assert(2 * kWarps * kWarpSums * 4 == DecodeSumBytes(kTokenBlocks), "two of each warp's");

  // `counter` counts the units handed out; it must be 0 when Run() begins.
  __device__ DecodeGemm(const GroupedGemm& gemm, int num_passes, int32_t* counter,
                        uint32_t weight_flip)
      : gemm_(gemm), counter_(counter), weight_flip_(weight_flip) {
    chunks_ = (gemm.k + kChunk - 1) / kChunk;
    column_units_ = (gemm.columns + kColumns - 1) / kColumns;
    units_ = num_passes * column_units_;
    ChooseSlices();
    load_unit_ = FirstUnit();
    next_unit_ = FirstUnit() + Workers();
    BeginLoads();
  }

  // Whether units are handed out as groups come for them. Multiprocessors with the same work end 5
  // to 10% apart, which we put down to the ports of the crossbar that they share. Not where a group
  // has two units at most, nor where a unit is a single batch: the loads are too far ahead then.
  __device__ bool HandsOut() const {
    return units_ > 2 * Workers() && chunks_ > (kDepth + 1) * Slices();
  }

  // Starts the first loads of weights, which depend on nothing that a kernel before has written.
  __device__ __forceinline__ void Prime() { LoadBatch<0>(); }

  __device__ __forceinline__ void Run() {
    // Of each group, twice: the unit after the next one.
    __shared__ int handed_out[2][kWarps];
    int buffer = 0;
    int unit = FirstUnit();
#pragma unroll 1
    while (unit < units_) {
      int after_next = 0;
      if (HandsOut() && Slice() == 0 && threadIdx.x % 32 == 0) {
        after_next = 2 * Workers() + atomicAdd(counter_, 1);
      }
      BeginTokens(GetPass(unit / column_units_));
      float acc[2][kTokenBlocks][4] = {};
#pragma unroll 1
      for (int chunk = Slice(); chunk < chunks_; chunk += kDepth * Slices()) {
        MultiplyBatch<0>(chunk, acc);
      }
      if (HandsOut() && Slice() == 0 && threadIdx.x % 32 == 0) {
        handed_out[buffer][Group()] = after_next;
      }
      Finish(unit, buffer, acc);
      if (HandsOut()) {
        unit = load_unit_;  // which the last batch has moved to
        next_unit_ = handed_out[buffer][Group()];
      } else {
        unit += Workers();
      }
      buffer ^= 1;
    }
  }

 private:
  struct Pass {
    int expert;
    int first_slot;  // in Shared::Slots()
    int num_slots;
  };
  __device__ static Pass GetPass(int index) {
    const auto pass = Shared::Passes()[index];
    return {pass.expert, pass.first_slot, Shared::Passes()[index + 1].first_slot - pass.first_slot};
  }

  // What a lane holds of a chunk: rows [block of 16][upper, lower half].
  struct Raw {
    uint4 row[2][2];
    uint32_t scale[HasGroups(kKind) ? 4 : 1];
  };

  __device__ int Warp() const { return threadIdx.x / 32; }
  __device__ int Slices() const { return 1 << slices_log2_; }
  __device__ int Slice() const { return Warp() & (Slices() - 1); }
  __device__ int Group() const { return Warp() >> slices_log2_; }
  // Groups are numbered so that a few units go to as many multiprocessors.
  __device__ int FirstUnit() const { return Group() * gridDim.x + blockIdx.x; }
  __device__ int Workers() const { return (kWarps >> slices_log2_) * gridDim.x; }
  __device__ int Quad() const { return threadIdx.x % 4; }
  __device__ int Row() const { return threadIdx.x % 32 / 4; }

  // As many slices as leave a warp 8 chunks of a unit or more; more where units are few. (Qwen3-30B,
  // 8 tokens, 16-bit weights: 4, 8 and 16 chunks a warp take 139, 124 and 134 us.)
  __device__ void ChooseSlices() {
    slices_log2_ = 0;
    while (slices_log2_ < 4 && (16 << slices_log2_) <= chunks_) ++slices_log2_;
    while (slices_log2_ < 4 && (2 << slices_log2_) <= chunks_ && 2 * units_ < Workers()) {
      ++slices_log2_;
    }
  }

  __device__ __forceinline__ void BeginLoads() {
    load_chunk_ = Slice();
    if (load_unit_ >= units_) return;
    const int pass = load_unit_ / column_units_;
    const int column = (load_unit_ - pass * column_units_) * kColumns + Row();
    // Beyond the last column it is read once more; what comes of it is not stored.
    const int last = gemm_.columns - 1;
    const int first = min(column, last);
    const int64_t row =
        static_cast<int64_t>(Shared::Passes()[pass].expert) * gemm_.columns * (kGated ? 2 : 1) +
        first;
    row_ =
        static_cast<const char*>(gemm_.weights) + row * RowBytes() + load_chunk_ * 64 + Quad() * 16;
    const int lower = min(column + 8, last) - first;
    to_row_[0] = lower;
    to_row_[1] = kGated ? gemm_.columns : min(column + 16, last) - first;
    to_row_[2] = kGated ? gemm_.columns + lower : min(column + 24, last) - first;
    if constexpr (HasGroups(kKind)) scale_row_ = static_cast<uint32_t>(row);
  }

  __device__ uint32_t RowBytes() const {
    return static_cast<uint32_t>(gemm_.k) / 2 * (WeightBits(kKind) / 4);
  }

  // Loads chunks kFirst .. kDepth - 1 of a batch, and moves on to the next one.
  template <int kFirst>
  __device__ __forceinline__ void LoadBatch() {
    if constexpr (kFirst < kDepth) {
      Load(ring_[kFirst]);
      LoadBatch<kFirst + 1>();
    } else {
      EndLoads();
    }
  }

  // Multiplies a batch from its chunk kFirst on; each is followed by the load of the same chunk of
  // the next batch. A unit's last batch may be cut short.
  template <int kFirst>
  __device__ __forceinline__ void MultiplyBatch(int chunk, float (&acc)[2][kTokenBlocks][4]) {
    if constexpr (kFirst < kDepth) {
      if (chunk < chunks_) Multiply(ring_[kFirst], chunk, acc);
      Load(ring_[kFirst]);
      MultiplyBatch<kFirst + 1>(chunk + Slices(), acc);
    } else {
      EndLoads();
    }
  }

  __device__ __forceinline__ void Load(Raw& raw) {
    const int k = load_chunk_ * kChunk + Quad() * kVector;
    const bool inside = load_unit_ < units_ && k < gemm_.k;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint4& v = raw.row[i / 2][i % 2];
      v = make_uint4(0, 0, 0, 0);
      if (inside) v = LoadOnce(i == 0 ? row_ : WideOffset(row_, to_row_[i - 1], RowBytes()));
    }
    row_ += Slices() * 64;
    if constexpr (HasGroups(kKind)) {
      // Where no weights are loaded, some other scale is read: it is multiplied by zeros.
      const int group_log2 = 31 - __clz(gemm_.group_size);
      const uint32_t groups = gemm_.k >> group_log2;
      uint32_t index[4];
      index[0] = scale_row_ * groups + (inside ? k >> group_log2 : 0);
#pragma unroll
      for (int i = 1; i < 4; ++i) index[i] = index[0] + to_row_[i - 1] * groups;
      LoadScaleBits<kKind>(gemm_.weight_scales, index, gemm_.weight_scale_dtype, raw.scale);
    }
    load_chunk_ += Slices();
  }

  // At the end of a batch.
  __device__ __forceinline__ void EndLoads() {
    if (load_chunk_ >= chunks_) {
      load_unit_ = next_unit_;
      if (!HandsOut()) next_unit_ += Workers();
      BeginLoads();
    }
  }

  __device__ __forceinline__ void BeginTokens(const Pass& pass) {
#pragma unroll
    for (int t = 0; t < kTokenBlocks; ++t) {
      // Columns beyond the pass's slots repeat the last; what comes of them is not stored.
      const int slot = Shared::Slots()[pass.first_slot + min(t * 8 + Row(), pass.num_slots - 1)];
      const int source = gemm_.gather ? slot / gemm_.top_k : slot;
      token_[t] = source * (gemm_.k / 8) + (Slice() * kChunk + Quad() * kVector) / 8;
    }
  }

  __device__ __forceinline__ void Multiply(const Raw& raw, int chunk,
                                           float (&acc)[2][kTokenBlocks][4]) {
    constexpr int kPairs = Dequantizer<Element, kKind>::kPairs;
    // Stored words for 16 bytes of each token's activations: 8 weights, two mma steps.
    constexpr int kWords = 4 / kPairs;
    const bool inside = chunk * kChunk + Quad() * kVector < gemm_.k;
    uint32_t context[4] = {weight_flip_, weight_flip_, weight_flip_, weight_flip_};
    if constexpr (HasGroups(kKind)) {
      GroupScales<Element, kKind>(raw.scale, gemm_.weight_scale_dtype, context);
    }
#pragma unroll
    for (int step = 0; step < kVector / 8; ++step) {
      uint4 tokens[kTokenBlocks];
#pragma unroll
      for (int t = 0; t < kTokenBlocks; ++t) {
        // Zeros beyond the end of k, where the weights are whatever a zero stands for.
        tokens[t] = make_uint4(0, 0, 0, 0);
        if (inside) tokens[t] = static_cast<const uint4*>(gemm_.a)[token_[t] + step];
      }
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        uint32_t a[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 row = raw.row[block][half];
          const uint32_t words[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
          for (int w = 0; w < kWords; ++w) {
            uint32_t pairs[kPairs];
            Dequantizer<Element, kKind>::Word(words[step * kWords + w], context[2 * block + half],
                                              pairs);
#pragma unroll
            for (int i = 0; i < kPairs; ++i) a[half][w * kPairs + i] = pairs[i];
          }
        }
#pragma unroll
        for (int t = 0; t < kTokenBlocks; ++t) {
          float(&c)[4] = acc[block][t];
          Mma<Element>::fma(c[0], c[1], c[2], c[3], a[0][0], a[1][0], a[0][1], a[1][1], tokens[t].x,
                            tokens[t].y, c[0], c[1], c[2], c[3]);
          Mma<Element>::fma(c[0], c[1], c[2], c[3], a[0][2], a[1][2], a[0][3], a[1][3], tokens[t].z,
                            tokens[t].w, c[0], c[1], c[2], c[3]);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTokenBlocks; ++t) token_[t] += Slices() * (kChunk / 8);
  }

  // Adds the slices' sums and stores the unit's outputs. One barrier of the group: the next unit's
  // sums go to the other buffer, and those of the one after it come behind the next barrier.
  __device__ __forceinline__ void Finish(int unit, int buffer,
                                         const float (&acc)[2][kTokenBlocks][4]) {
    float* sums = Shared::Sums() + buffer * kWarps * kWarpSums;
    float* own = sums + Warp() * kWarpSums + Row();
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int t = 0; t < kTokenBlocks; ++t) {
        float* p = own + (block * kTokens + t * 8 + 2 * Quad()) * kDecodePitch;
        p[0] = acc[block][t][0];
        p[kDecodePitch] = acc[block][t][1];
        p[8] = acc[block][t][2];
        p[kDecodePitch + 8] = acc[block][t][3];
      }
    }
    if (slices_log2_ == 0) {
      __syncwarp();
    } else {
      asm volatile("bar.sync %0, %1;" ::"r"(1 + Group()), "r"(32 * Slices()) : "memory");
    }
    // Looked up again, which the empty asm keeps the compiler from seeing: carried through the loop,
    // a pass would take registers that 4-bit weights do not leave.
    asm volatile("" : "+r"(unit));
    const Pass pass = GetPass(unit / column_units_);
    const int first_column = unit % column_units_ * kColumns;
    StoreOutputs(gemm_, pass, first_column, Slice() * 32 + threadIdx.x % 32, slices_log2_,
                 sums + (Warp() - Slice()) * kWarpSums);
  }

  // Static, for an address of the object that is taken would put it into memory.
  __device__ __forceinline__ static void StoreOutputs(const GroupedGemm& gemm, const Pass& pass,
                                                      int first_column, int thread, int slices_log2,
                                                      const float* sums) {
    const int64_t expert_row = static_cast<int64_t>(pass.expert) * gemm.columns * (kGated ? 2 : 1);
    DispatchActivation<kGated>(gemm.activation, [&](auto tag) {
      constexpr Activation kActivation = decltype(tag)::value;
#pragma unroll 1
      for (int i = thread; i < kColumns * pass.num_slots; i += 32 << slices_log2) {
        const int in_unit = i % kColumns;
        const int token = i / kColumns;
        const int column = first_column + in_unit;
        if (column >= gemm.columns) continue;
        const float* p = sums + token * kDecodePitch + in_unit % 16;
        const int64_t slot = Shared::Slots()[pass.first_slot + token];
        float value;
        if constexpr (kGated) {
          const float up = Channel(gemm, expert_row + column, Add(p, slices_log2));
          const float gate = Channel(gemm, expert_row + gemm.columns + column,
                                     Add(p + kTokens * kDecodePitch, slices_log2));
          value = ApplyGated<kActivation>(gate, up, LoadActivationScalars(gemm, pass.expert));
        } else {
          value = Apply<kActivation>(
              Channel(gemm, expert_row + column,
                      Add(p + in_unit / 16 * kTokens * kDecodePitch, slices_log2)));
          if (gemm.slot_scales != nullptr) value *= __ldg(gemm.slot_scales + slot);
        }
        static_cast<uint16_t*>(gemm.out)[slot * gemm.columns + column] =
            static_cast<uint16_t>(PackPair(value, value, gemm.out_dtype));
      }
    });
  }

  // The slices' sums of one output, in order.
  __device__ static float Add(const float* sums, int slices_log2) {
    float sum = 0.0f;
#pragma unroll 4
    for (int s = 0; s < 1 << slices_log2; ++s) sum += sums[s * kWarpSums];
    return sum;
  }

  // A sum with its channel's scale and bias.
  __device__ static float Channel(const GroupedGemm& gemm, int64_t row, float sum) {
    sum *= kUnscale<Element, kKind>;
    if (kKind == WeightKind::k8Bit) {
      sum *= LoadAsFloat(gemm.weight_scales, row, gemm.weight_scale_dtype);
    }
    if (gemm.bias != nullptr) sum += LoadAsFloat(gemm.bias, row, gemm.bias_dtype);
    return sum;
  }

  const GroupedGemm& gemm_;
  int32_t* counter_;
  uint32_t weight_flip_;
  int slices_log2_;
  int chunks_;
  int column_units_;
  int units_;
  Raw ring_[kDepth];
  // Where the loads are.
  int load_unit_;
  int next_unit_;
  int load_chunk_;
  const char* row_;          // the lane's 16 bytes of its first row
  uint32_t to_row_[3] = {};  // how many rows its others are further on
  uint32_t scale_row_ = 0;   // its first row, among all experts'
  // Of the unit that is multiplied.
  uint32_t token_[kTokenBlocks];  // the lane's next 16 bytes of each of its tokens
};

}  // namespace moe::sm80

#endif  // KERNELS_SM80_DECODE_GEMM_CUH_
