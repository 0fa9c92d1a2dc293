# SPDX-License-Identifier: Apache-2.0
"""The activations between the two matrix products of an expert."""

from __future__ import annotations

import enum


class ActivationType(enum.IntEnum):
    """What happens to the first product; the numbers are part of the interface.

    A gated activation gets 2I values a row and returns I: `lin` is the first half (the up
    projection), `gate` the second. All of them are computed in float32.

    ========== ====== ==========================================================
    Gelu       plain  x * Phi(x), by erf
    Relu       plain  max(x, 0)
    Silu       plain  x * sigmoid(x)
    Swiglu     gated  silu(gate) * lin
    Geglu      gated  gelu(gate) * lin, by erf
    SwigluBias gated  g * sigmoid(alpha * g) * (l + beta) with g = min(gate, limit)
                      and l = clamp(lin, -limit, limit)
    Relu2      plain  max(x, 0) squared
    SwigluStep gated  min(silu(gate), limit) * clamp(lin, -limit, limit)
    GegluTanh  gated  gelu(gate) * lin, by the tanh approximation
    Identity   plain  x
    ========== ====== ==========================================================
    """

    Gelu = 0
    Relu = 1
    Silu = 2
    Swiglu = 3
    Geglu = 4
    SwigluBias = 5
    Relu2 = 6
    SwigluStep = 7
    GegluTanh = 8
    Identity = 9

    @property
    def is_gated(self) -> bool:
        """Whether fc1 has 2I rows: the up half, then the gate half."""
        return self in _GATED


_GATED = frozenset(
    {
        ActivationType.Swiglu,
        ActivationType.Geglu,
        ActivationType.SwigluBias,
        ActivationType.SwigluStep,
        ActivationType.GegluTanh,
    }
)

# What SwigluBias and SwigluStep use where the caller passes no tensor.
SWIGLU_BIAS_ALPHA = 1.0
SWIGLU_BIAS_BETA = 0.0
SWIGLU_BIAS_LIMIT = float("inf")
SWIGLU_STEP_LIMIT = 7.0
