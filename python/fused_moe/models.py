# SPDX-License-Identifier: Apache-2.0
"""The sizes of the MoE layers of published models: for tests, benchmarks and the demo."""

from __future__ import annotations

import dataclasses

from fused_moe.activation import ActivationType


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """One MoE layer.

    Attributes:
        hidden_size: H, the width of a token.
        intermediate_size: I, the width between an expert's two products, before any sharding.
        num_experts: E, routed experts only.
        top_k: k, experts a token.
        activation: what lies between the two products.
        swiglu_alpha, swiglu_beta, swiglu_limit: SwigluBias's parameters, None where unused.
        biases: whether both products have a bias.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    activation: ActivationType = ActivationType.Swiglu
    swiglu_alpha: float | None = None
    swiglu_beta: float | None = None
    swiglu_limit: float | None = None
    biases: bool = False

    @property
    def fc1_rows(self) -> int:
        """Rows of an expert's first weight: 2I where the activation is gated, else I."""
        return self.intermediate_size * (2 if self.activation.is_gated else 1)


def _gpt_oss(num_experts: int) -> ModelShape:
    return ModelShape(
        hidden_size=2880,
        intermediate_size=2880,
        num_experts=num_experts,
        top_k=4,
        activation=ActivationType.SwigluBias,
        swiglu_alpha=1.702,
        swiglu_beta=1.0,
        swiglu_limit=7.0,
        biases=True,
    )


MODELS: dict[str, ModelShape] = {
    "Mixtral-8x7B": ModelShape(4096, 14336, 8, 2),
    "Mixtral-8x22B": ModelShape(6144, 16384, 8, 2),
    "Qwen3-30B-A3B": ModelShape(2048, 768, 128, 8),
    "Qwen3-235B-A22B": ModelShape(4096, 1536, 128, 8),
    "Qwen3-Next-80B-A3B": ModelShape(2048, 512, 512, 10),
    "DeepSeek-V2-Lite": ModelShape(2048, 1408, 64, 6),
    "DeepSeek-V3": ModelShape(7168, 2048, 256, 8),
    "gpt-oss-20b": _gpt_oss(32),
    "gpt-oss-120b": _gpt_oss(128),
    "Llama-4-Scout": ModelShape(5120, 8192, 16, 1),
    "Phi-3.5-MoE": ModelShape(4096, 6400, 16, 2),
    "Nemotron-3-Nano-30B": ModelShape(2688, 1856, 128, 6, ActivationType.Relu2),
    "OLMoE": ModelShape(2048, 1024, 64, 8),
    "Kimi-K2": ModelShape(7168, 2048, 384, 8),
}
