// SPDX-License-Identifier: Apache-2.0
//
// The producer half of the pipeline: cp.async from global memory into the stages, scales of groups,
// and the widening of weights that are not stored in 16 bits and that several warps share.
//
// Copies run kStages - 1 steps ahead of the mma, across tile boundaries: when the tensor cores
// finish a tile, the first steps of the next are already in shared memory, so the flow of bytes
// never drains between tiles. Rows of A are gathered by index here, which costs one 4-byte load a
// row and tile (scheduler.cuh), and no copy of the input.
//
// Widening runs one step ahead of the mma. A thread widens the chunks that it copied itself, so
// no barrier lies between the two; each weight is widened once a block, where warps that share
// columns would do it again and again in their registers, and the mainloop is that of 16-bit
// weights. (Widening in registers, in the order of bytes: 1.83 us a step of a 128x256 tile against
// 1.31 with 16-bit weights.)
//
// Where each warp has its columns alone, unpacking_mainloop.cuh takes the weights as they are
// stored. A thread then brings the scales of one weight row: they are loaded with the step's
// copies, and stored to its stage a step later.
//
// Of 8-bit weights a high tile's scales, one a weight row, come with the copies of one of its last
// steps: the epilogue would wait for them at the latency of DRAM, with nothing else to do.
//
// What is loaded where nothing is to be loaded: beyond the end of k both operands are filled
// with zeros (0 * 0 adds nothing, nor does 0 * whatever a weight of zeros stands for); rows and
// columns beyond a tile's edge are left as they are, since they only reach accumulators that
// are never stored.

#ifndef KERNELS_SM80_LOADER_CUH_
#define KERNELS_SM80_LOADER_CUH_

#include <cstdint>

#include "kernels/common/dequantize.cuh"
#include "kernels/sm80/scheduler.cuh"
#include "kernels/sm80/traits.cuh"
#include "moe/numeric.cuh"

namespace moe::sm80 {

// 16 bytes past L1, or zeros where fill is 0, or nothing where copy is 0. The predicate is in the
// instruction: as a C++ condition it may become a branch around it.
__device__ inline void CopyAsync16(uint32_t shared, const void* global, uint32_t copy, int fill) {
  asm volatile(
      "{\n"
      "  .reg .pred copy;\n"
      "  setp.ne.b32 copy, %2, 0;\n"
      "  @copy cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %3;\n"
      "}\n" ::"r"(shared),
      "l"(global), "r"(copy), "r"(fill));
}

template <typename T>
class Loader {
  using Columns = typename T::Columns;
  using Element = typename T::Element;
  static constexpr bool kGroups = HasGroups(T::kKind);

 public:
  __device__ Loader(const GroupedGemm& gemm, TileQueue<T>& queue, char* shared,
                    uint32_t weight_flip)
      : gemm_(gemm), queue_(queue), weight_flip_(weight_flip) {
    const auto base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    shared_a_ = base + RowA() * T::kRowBytes + (ChunkA() ^ SwizzleA<T>(RowA())) * 16;
    shared_b_ = T::kWidens    ? base + T::kBytesA + threadIdx.x * 16
                : T::kUnpacks ? base + T::kBytesA + StoredPlace()
                              : shared_a_ + T::kBytesA;
    if constexpr (T::kWidens) {
      stored_ = shared + T::kBytesA + threadIdx.x * 16;
      wide_ = shared + T::kWidePlace + RowB() * T::kRowBytes;
    }
    if constexpr (kGroups && T::kUnpacks) scales_ = shared + T::kScalesPlace;
    BeginTile();
  }

  // Issues part `kPart` of `kParts` of the current step's copies into the stage at byte offset
  // `stage`, so that a caller can spread them between its mma instructions. Branch-free for the
  // same reason: a bit of copies_ predicates each copy, and after the last tile all are clear.
  template <int kPart, int kParts>
  __device__ void Issue(int stage) {
    const uint32_t k = static_cast<uint32_t>(gemm_.k);
    const uint32_t to_a = shared_a_ + stage;
    const char* a = ChunkOfA();
    const int fill_a = ChunkA() * 8 < k_left_ ? 16 : 0;
#pragma unroll
    for (int i = kPart; i < T::kLoadsA; i += kParts) {
      CopyAsync16(to_a + i * T::kRowStepA * T::kRowBytes, Chunk(a, row_a_[i]), copies_ & BitA(i),
                  fill_a);
    }
    const uint32_t to_b = shared_b_ + stage;
    // In chunks of 16 bytes.
    const uint32_t row = k / kWeightsOfChunk;
    const uint32_t gate = row * gemm_.columns;
    const int fill_b = ChunkB() * kWeightsOfChunk < k_left_ ? 16 : 0;
    constexpr int kStep = kStored ? T::kThreads * 16 : T::kRowStepB * T::kRowBytes;
#pragma unroll
    for (int i = kPart; i < T::kLoadsB; i += kParts) {
      const char* from = Chunk(b_, RowOffset(i, row, gate));
      CopyAsync16(to_b + i * kStep, from, copies_ & BitB(i), fill_b);
    }
  }

  // Moves on to the next step: further along k, or in the next tile.
  __device__ void Advance() {
    a_ += T::kRowBytes;
    b_ += T::kStep * WeightBits(T::kKind) / 8;
    k_left_ -= T::kStep;
    if (k_left_ <= 0) {
      // The tile whose copies end has kStages - 1 steps to be multiplied, and the barrier of one
      // behind it: nobody reads the scales of the tile before any more. These join the next step's
      // copies, so that they are there when the last step has passed its barrier.
      if constexpr (T::kHasChannels) {
        if (turn_ < queue_.turns() && !IsLate(gemm_)) BringChannels(turn_);
      }
      ++turn_;
      BeginTile();
    }
  }

  // Widens part `kPart` of `kParts` of the thread's weights in the stage at byte offset `stage`,
  // whose copies must have arrived, into buffer `wide` of the two.
  template <int kPart, int kParts>
  __device__ void Widen(int stage, int wide) const {
    if constexpr (T::kWidens) {
      char* to = wide_ + wide * T::kBytesB;
#pragma unroll
      for (int i = kPart; i < T::kLoadsB; i += kParts) {
        const uint4 v = *reinterpret_cast<const uint4*>(stored_ + stage + i * T::kThreads * 16);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
        using Words = Dequantizer<Element, T::kKind>;
        typename Words::Context context[1];
        if constexpr (kGroups) {
          const uint32_t bits[1] = {scale_[0][i]};
          GroupScales<Element, T::kKind>(bits, gemm_.weight_scale_dtype, context);
        } else {
          // The exponent is a constant here: registers are what these tiles lack.
          context[0] = {weight_flip_, kByteExponent<Element>};
        }
        constexpr int kPerStore = 4 / Words::kPairs;  // stored words for 16 bytes of 16-bit ones
#pragma unroll
        for (int w = 0; w < 4; w += kPerStore) {
          uint32_t out[4];
#pragma unroll
          for (int j = 0; j < kPerStore; ++j) {
            uint32_t pairs[Words::kPairs];
            Words::Word(words[w + j], context[0], pairs);
#pragma unroll
            for (int p = 0; p < Words::kPairs; ++p) out[j * Words::kPairs + p] = pairs[p];
          }
          const int chunk = (ChunkB() * (4 / kPerStore) + w / kPerStore) ^ Swizzle(RowB());
          *reinterpret_cast<uint4*>(to + i * T::kRowStepB * T::kRowBytes + chunk * 16) =
              make_uint4(out[0], out[1], out[2], out[3]);
        }
      }
    }
  }

  // After a step has been widened: the scales of the step that is being copied join the queue.
  // Where there is nothing to copy some other scale is read: what comes of it is multiplied by
  // zeros or not stored.
  __device__ void PushScales() {
    if constexpr (kGroups && T::kWidens) {
#pragma unroll
      for (int s = 0; s + 1 < kScaleSteps; ++s) {
#pragma unroll
        for (int i = 0; i < T::kLoadsB; ++i) scale_[s][i] = scale_[s + 1][i];
      }
      const int group_log2 = 31 - __clz(gemm_.group_size);
      const int k = min(gemm_.k - k_left_ + ChunkB() * kWeightsOfChunk, gemm_.k - 1);
      uint32_t index[T::kLoadsB];
#pragma unroll
      for (int i = 0; i < T::kLoadsB; ++i) {
        const uint32_t row =
            (copies_ & BitB(i)) != 0 ? first_row_ + RowOffset(i, 1, gemm_.columns) : 0;
        index[i] = row * (gemm_.k >> group_log2) + (k >> group_log2);
      }
      LoadScaleBits<T::kKind>(gemm_.weight_scales, index, gemm_.weight_scale_dtype,
                              scale_[kScaleSteps - 1]);
    }
  }

  // Whether tiles have fewer steps than stages, too few for Advance() to bring scales of weight rows
  // ahead. Then BringLate() brings what the epilogue of a turn needs, just before it; the caller
  // waits for the copies, and all at a barrier.
  __device__ static bool IsLate(const GroupedGemm& gemm) {
    return T::kHasChannels && gemm.k <= (T::kStages - 1) * T::kStep;
  }
  __device__ void BringLate(int32_t turn) {
    if constexpr (T::kHasChannels) {
      BringChannels(turn);
      queue_.Renew(turn);
    }
  }

  // Scales of unpacked weights: of a row's step, or of each 32 weights in it.
  static constexpr int kStepScales = T::kScaleSums ? 1 : T::kStep / 32;
  using ScaleBits = uint32_t[kStepScales];

  // Loads the scales of the step that is being copied. Where there is nothing to copy some other
  // scale is read, as above. With kKeep those of the step before are given, and stay where their
  // group goes on: a warp's loads are of 32 rows, and take as long as 32 of one row.
  template <bool kKeep = false>
  __device__ void LoadScales(ScaleBits& bits) const {
    if constexpr (kGroups && T::kUnpacks) {
      const int group_log2 = 31 - __clz(gemm_.group_size);
      const int k_first = gemm_.k - k_left_;
      if (kKeep && (k_first & (gemm_.group_size - 1)) != 0) return;
#pragma unroll
      for (int i = 0; i < kStepScales; ++i) {
        // A group's scale is loaded once.
        if (i > 0 && (i * 32 & (gemm_.group_size - 1)) != 0) {
          bits[i] = bits[i - 1];
          continue;
        }
        const uint32_t index[1] = {first_scale_ +
                                   (min(k_first + i * 32, gemm_.k - 1) >> group_log2)};
        uint32_t one[1];
        LoadScaleBits<T::kKind>(gemm_.weight_scales, index, gemm_.weight_scale_dtype, one);
        bits[i] = one[0];
      }
    }
  }

  // Stores them to the stage at byte offset `stage`, as factors of the row's sum over the step or
  // of pairs of its weights. They lie as a lane wants them: rows 8 apart beside each other.
  __device__ void StoreScales(const ScaleBits& bits, int stage) const {
    if constexpr (kGroups && T::kUnpacks) {
      static_assert(T::kThreads >= T::kTile.n, "a row each");
      int n = static_cast<int>(threadIdx.x);
      // As in BeginTile(): of INT4 the 128x128 tile spilled what follows from it.
      constexpr bool kSpilled = T::kTile.lean(T::kKind) && T::kTile.n == 128;
      if constexpr (kSpilled && T::kKind == WeightKind::kInt4) asm volatile("" : "+r"(n));
      if (T::kThreads > T::kTile.n && n >= T::kTile.n) return;
      uint32_t factor[kStepScales];
      GroupScales<Element, T::kKind>(bits, gemm_.weight_scale_dtype, factor);
      const int place = n / T::kWarpN * T::kWarpN + n % 8 * (T::kWarpN / 8) + n % T::kWarpN / 8;
      uint32_t* to = reinterpret_cast<uint32_t*>(scales_ + stage) + place;
#pragma unroll
      for (int i = 0; i < kStepScales; ++i) {
        to[i * T::kTile.n] =
            T::kScaleSums ? __float_as_uint(ToFloat2(AsPair<Element>(factor[i])).x) : factor[i];
      }
    }
  }

 private:
  static_assert(T::kLoadsA + T::kLoadsB <= 32, "a bit a copy");
  static constexpr bool kStored = T::kWidens || T::kUnpacks;  // weights lie there as in the tensor
  static constexpr int kWeightsOfChunk = 128 / WeightBits(T::kKind);
  static constexpr int kScaleSteps = T::kStages - 2;
  static constexpr uint32_t BitA(int i) { return 1u << i; }
  static constexpr uint32_t BitB(int i) { return 1u << (T::kLoadsA + i); }

  // The thread's chunk of a row, and its first row of each operand; its other rows follow in steps
  // of kRowStep. With 16-bit weights all is the same for both operands.
  __device__ static int ChunkA() { return threadIdx.x % T::kChunks; }
  __device__ static int ChunkB() { return threadIdx.x % T::kStoredChunks; }
  __device__ static int RowA() { return threadIdx.x / T::kChunks; }
  __device__ static int RowB() { return threadIdx.x / T::kStoredChunks; }

  // A chunk of 16 bytes by its number. In C++ it is one instruction, in assembly two that want
  // fewer registers.
  __device__ static const char* Chunk(const char* base, uint32_t number) {
    if constexpr (T::kTile.lean(T::kKind)) return WideOffset(base, number, 16);
    return base + static_cast<uint64_t>(number) * 16;
  }

  // Where its first chunk of weights goes as they are stored, in bytes.
  __device__ static int StoredPlace() {
    return (RowB() * T::kStoredChunks + (ChunkB() ^ SwizzleStored<T>(RowB()))) * 16;
  }

  // The thread's chunk of the step, in the first row of the input. Where weights are unpacked it is
  // found anew: registers are what the kernels for 32 rows lack.
  __device__ const char* ChunkOfA() const {
    if constexpr (!T::kUnpacks) return a_;
    return static_cast<const char*>(gemm_.a) + ((gemm_.k - k_left_) * 2 + ChunkA() * 16);
  }

  // The weight row of the thread's i-th load, from its first, where a row counts as `row` and the
  // way from an up row to its gate row as `gate`. The gate bit of a row's place in the tile is
  // either in the thread's own part of it, as in BeginTile(), or in the compile-time part, as here.
  __device__ static uint32_t RowOffset(int i, uint32_t row, uint32_t gate) {
    const int n = i * T::kRowStepB;
    return Columns::Column(n) * row + (Columns::IsGate(n) ? gate : 0);
  }

  // Begins to copy the scales of a tile's weight rows, as they are stored: up rows, then gate rows.
  __device__ void BringChannels(int32_t turn) const {
    const int size_log2 = gemm_.weight_scale_dtype == DType::kFloat32 ? 2 : 1;
    const int n = static_cast<int>(threadIdx.x << (4 - size_log2));  // the first of its chunk
    const WorkItem& item = queue_.Item(turn);
    const int column = item.column + n % T::kTileColumns;
    const int64_t row =
        (static_cast<int64_t>(item.expert) * Columns::kHalves + n / T::kTileColumns) *
            gemm_.columns +
        column;
    // In the first stage, at the place of this chunk as weights are stored.
    const uint32_t chunk = T::kWidens ? shared_b_ : shared_b_ - StoredPlace() + threadIdx.x * 16;
    CopyAsync16(chunk - T::kBytesA + T::kChannelsPlace,
                static_cast<const char*>(gemm_.weight_scales) + (row << size_log2),
                n < T::kTile.n && column < gemm_.columns, 16);
  }

  __device__ void BeginTile() {
    k_left_ = gemm_.k;
    copies_ = 0;
    if (turn_ >= queue_.turns()) return;
    queue_.Begin(turn_);
    const WorkItem item = queue_.Item(turn_);

    a_ = static_cast<const char*>(gemm_.a) + ChunkA() * 16;
#pragma unroll
    for (int i = 0; i < T::kLoadsA; ++i) {
      const int row = RowA() + i * T::kRowStepA;
      row_a_[i] = 0;
      if (row >= item.rows) continue;
      copies_ |= BitA(i);
      const uint32_t source = gemm_.gather ? queue_.Word(turn_, item, row) : item.row_begin + row;
      row_a_[i] = source * (static_cast<uint32_t>(gemm_.k) / 8);
    }

    const int32_t column = item.column + Columns::Column(RowB());
#pragma unroll
    for (int i = 0; i < T::kLoadsB; ++i) {
      if (column + Columns::Column(i * T::kRowStepB) < gemm_.columns) copies_ |= BitB(i);
    }
    const int64_t row_bytes = static_cast<int64_t>(gemm_.k) * WeightBits(T::kKind) / 8;
    const int64_t expert_rows = static_cast<int64_t>(gemm_.columns) * Columns::kHalves;
    const int64_t row =
        item.expert * expert_rows + column + (Columns::IsGate(RowB()) ? gemm_.columns : 0);
    b_ = static_cast<const char*>(gemm_.weights) + row * row_bytes + ChunkB() * 16;
    if constexpr (kGroups && T::kWidens) first_row_ = static_cast<uint32_t>(row);
    if constexpr (kGroups && T::kUnpacks) {
      int n = min(static_cast<int>(threadIdx.x), T::kTile.n - 1);
      // The empty asm keeps the compiler from holding what follows from it through the loop over k.
      if constexpr (T::kTile.lean(T::kKind)) asm volatile("" : "+r"(n));
      const int own = min(item.column + Columns::Column(n), gemm_.columns - 1);
      const auto scale_row = static_cast<uint32_t>(item.expert * expert_rows + own +
                                                   (Columns::IsGate(n) ? gemm_.columns : 0));
      first_scale_ = scale_row * (static_cast<uint32_t>(gemm_.k) / gemm_.group_size);
    }
  }

  const GroupedGemm& gemm_;
  TileQueue<T>& queue_;
  uint32_t weight_flip_;
  int32_t turn_ = 0;
  int32_t k_left_;              // of the tile's k, from this step on: beyond it are zeros
  uint32_t shared_a_;           // where the thread's first chunk of A goes, in the first stage
  uint32_t shared_b_;           // and that of B
  uint32_t copies_;             // which of the thread's copies the tile has
  const char* a_ = nullptr;     // of the input, at the thread's chunk of the step
  uint32_t row_a_[T::kLoadsA];  // where its rows of the input begin, in chunks of 16 bytes
  const char* b_ = nullptr;     // the thread's first weight row, at its chunk of the step
  // Weights that are widened:
  const char* stored_;  // the thread's first chunk in the first stage
  char* wide_;          // the thread's first row in the first of the two buffers
  // Weights with scales along k: the scales' bits, from the step to be widened next to the one that
  // is being copied. They are indexed with 32 bits, which RunLayer checks.
  uint32_t scale_[kGroups && T::kWidens ? kScaleSteps : 1][T::kLoadsB];
  uint32_t first_row_;
  // Weights that are unpacked:
  char* scales_;              // in the first stage
  uint32_t first_scale_ = 0;  // of the weight row whose scales the thread brings
};

}  // namespace moe::sm80

#endif  // KERNELS_SM80_LOADER_CUH_
