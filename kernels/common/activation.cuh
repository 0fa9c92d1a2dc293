// SPDX-License-Identifier: Apache-2.0
//
// The activations, in float32. Comparisons are written so that a NaN comes out as NaN, as
// PyTorch's clamp and minimum do, where fminf and fmaxf would hide it.

#ifndef KERNELS_COMMON_ACTIVATION_CUH_
#define KERNELS_COMMON_ACTIVATION_CUH_

#include <cuda_runtime.h>

#include <type_traits>

#include "moe/grouped_gemm.h"

namespace moe {

__device__ inline float Min(float x, float limit) { return x > limit ? limit : x; }
__device__ inline float Max(float x, float limit) { return x < limit ? limit : x; }

// 2^x, or 0 for what is no normal number: three instructions less than __expf takes for those.
__device__ inline float Exp2(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// y / (1 + exp(-x)). For x < -88 the exponential is infinite and the quotient 0, as it must be; for
// x > 87 it is 0 here, and nothing beside 1 in any case.
__device__ inline float SigmoidTimes(float y, float x) {
  return __fdividef(y, 1.0f + Exp2(-1.4426950408889634f * x));
}
__device__ inline float Silu(float x) { return SigmoidTimes(x, x); }

__device__ inline float GeluErf(float x) {
  return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
}

// x/2 * (1 + tanh(u)) = x * sigmoid(2u), u = sqrt(2/pi) * (x + 0.044715 x^3).
__device__ inline float GeluTanh(float x) {
  const float u = 0.79788456080286536f * (x + 0.044715f * x * x * x);
  return SigmoidTimes(x, 2.0f * u);
}

// The per-expert numbers of the clamped activations, fetched once a tile.
struct ActivationScalars {
  float alpha = 1.0f;
  float beta = 0.0f;
  float limit = 0.0f;
};

__device__ inline ActivationScalars LoadActivationScalars(const GroupedGemm& gemm, int expert) {
  ActivationScalars s;
  if (gemm.swiglu_alpha != nullptr) s.alpha = gemm.swiglu_alpha[expert];
  if (gemm.swiglu_beta != nullptr) s.beta = gemm.swiglu_beta[expert];
  if (gemm.swiglu_limit != nullptr) {
    s.limit = gemm.swiglu_limit[expert];
  } else {
    s.limit = gemm.activation == Activation::kSwigluStep ? 7.0f : __int_as_float(0x7f800000);
  }
  return s;
}

template <Activation A>
__device__ inline float ApplyGated(float gate, float up, const ActivationScalars& s) {
  static_assert(IsGated(A), "takes a gate");
  if constexpr (A == Activation::kSwiglu) {
    return Silu(gate) * up;
  } else if constexpr (A == Activation::kGeglu) {
    return GeluErf(gate) * up;
  } else if constexpr (A == Activation::kGegluTanh) {
    return GeluTanh(gate) * up;
  } else if constexpr (A == Activation::kSwigluBias) {
    const float g = Min(gate, s.limit);
    const float u = Max(Min(up, s.limit), -s.limit);
    return SigmoidTimes(g, s.alpha * g) * (u + s.beta);
  } else {
    static_assert(A == Activation::kSwigluStep, "every gated activation is listed");
    return Min(Silu(gate), s.limit) * Max(Min(up, s.limit), -s.limit);
  }
}

template <Activation A>
__device__ inline float Apply(float x) {
  static_assert(!IsGated(A), "takes no gate");
  if constexpr (A == Activation::kGelu) {
    return GeluErf(x);
  } else if constexpr (A == Activation::kRelu) {
    return Max(x, 0.0f);
  } else if constexpr (A == Activation::kSilu) {
    return Silu(x);
  } else if constexpr (A == Activation::kRelu2) {
    const float y = Max(x, 0.0f);
    return y * y;
  } else {
    static_assert(A == Activation::kIdentity, "every activation is listed");
    return x;
  }
}

template <Activation A>
using ActivationTag = std::integral_constant<Activation, A>;

// Calls body(ActivationTag<A>{}) for the activation chosen at run time. The branch is taken once
// a tile, outside the loops over accumulators; gated activations have kernels of their own.
template <bool Gated, typename Body>
__device__ inline void DispatchActivation(Activation activation, Body&& body) {
  if constexpr (Gated) {
    switch (activation) {
      case Activation::kGeglu: return body(ActivationTag<Activation::kGeglu>{});
      case Activation::kGegluTanh: return body(ActivationTag<Activation::kGegluTanh>{});
      case Activation::kSwigluBias: return body(ActivationTag<Activation::kSwigluBias>{});
      case Activation::kSwigluStep: return body(ActivationTag<Activation::kSwigluStep>{});
      default: return body(ActivationTag<Activation::kSwiglu>{});
    }
  } else {
    switch (activation) {
      case Activation::kGelu: return body(ActivationTag<Activation::kGelu>{});
      case Activation::kRelu: return body(ActivationTag<Activation::kRelu>{});
      case Activation::kSilu: return body(ActivationTag<Activation::kSilu>{});
      case Activation::kRelu2: return body(ActivationTag<Activation::kRelu2>{});
      default: return body(ActivationTag<Activation::kIdentity>{});
    }
  }
}

}  // namespace moe

#endif  // KERNELS_COMMON_ACTIVATION_CUH_
