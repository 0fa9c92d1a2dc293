// SPDX-License-Identifier: Apache-2.0
//
// How weights are stored, as far as the code of a kernel differs: what kernels are instantiated by.

#ifndef KERNELS_COMMON_WEIGHT_KIND_H_
#define KERNELS_COMMON_WEIGHT_KIND_H_

#include "moe/problem.h"

namespace moe {

// int8 and uint8 share a kernel, to which the host says which of them it is (WeightFlip).
enum class WeightKind { k16Bit = 0, k8Bit = 1, kInt4 = 2, kMxfp4 = 3 };
inline constexpr int kNumWeightKinds = 4;

constexpr WeightKind KindOf(WeightFormat format) {
  if (format == WeightFormat::kSameAsInput) return WeightKind::k16Bit;
  if (format == WeightFormat::kInt4) return WeightKind::kInt4;
  return format == WeightFormat::kMxfp4 ? WeightKind::kMxfp4 : WeightKind::k8Bit;
}

constexpr int WeightBits(WeightKind kind) {
  return kind == WeightKind::k16Bit ? 16 : kind == WeightKind::k8Bit ? 8 : 4;
}

// Whether scales belong to groups along k, so that they cannot wait for the finished sum.
constexpr bool HasGroups(WeightKind kind) {
  return kind == WeightKind::kInt4 || kind == WeightKind::kMxfp4;
}

}  // namespace moe

#endif  // KERNELS_COMMON_WEIGHT_KIND_H_
