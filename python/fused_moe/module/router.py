# SPDX-License-Identifier: Apache-2.0
"""The router: one number an expert for each token, and the choice that follows from them."""

from __future__ import annotations

import torch

from fused_moe.module.tensors import (
    InferenceModule,
    check_tokens,
    parameter,
    refuse_gradients,
)
from fused_moe.routing import Routing


class Router(InferenceModule):
    """Logits x @ weight.T + bias, and a `Routing` that makes scales and ids of them.

    The product is computed in the dtype of `weight`, under autocast too. DeepSeek-V2 and -V3
    compute it in float32 whatever the dtype of the model: `dtype=torch.float32, keep_dtype=True`.

    State: `weight` [E, H]; `bias` [E] (gpt-oss); `correction_bias` [E], always float32
    (DeepSeek-V3's e_score_correction_bias).
    """

    correction_bias: torch.Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        routing: Routing,
        *,
        bias: bool = False,
        correction_bias: bool = False,
        keep_dtype: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Makes a router with random weights and biases of 0.

        Args:
            hidden_size: H.
            num_experts: E, those of all ranks.
            routing: how experts follow from logits.
            bias: whether logits have a bias.
            correction_bias: whether the choice of experts has one of its own.
            keep_dtype: whether weight and bias stay in dtype when the model is converted.
            dtype: of weight and bias, and of the product; None is PyTorch's default.
            device: as in torch.nn.Linear.

        Raises:
            TypeError: `routing` is none.
            ValueError: an E that `routing` does not fit.
        """
        super().__init__()
        if not isinstance(routing, Routing):
            raise TypeError(
                f"routing is {routing!r}; it must be a Routing, such as fused_moe.Routing(top_k=2)"
            )
        routing.check_num_experts(num_experts)
        self.routing = routing
        self.weight = parameter((num_experts, hidden_size), dtype, device)
        self.bias = parameter((num_experts,), dtype, device) if bias else None
        self.register_buffer(
            "correction_bias",
            torch.zeros(num_experts, dtype=torch.float32, device=device)
            if correction_bias
            else None,
        )
        self.kept.add("correction_bias")
        if keep_dtype:
            self.kept.update(("weight", "bias"))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights of deviation H^-0.5, so that logits are of order 1; biases of 0."""
        torch.nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        for bias in (self.bias, self.correction_bias):
            if bias is not None:
                torch.nn.init.zeros_(bias)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[M, E] in the dtype of the weight, of x [M, H] in any floating dtype."""
        x = x.to(self.weight.dtype)
        if not torch.is_autocast_enabled(x.device.type):
            return torch.nn.functional.linear(x, self.weight, self.bias)
        with torch.autocast(x.device.type, enabled=False):
            return torch.nn.functional.linear(x, self.weight, self.bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales [M, k] float32 and ids [M, k] int32 for the tokens x [M, H]."""
        refuse_gradients(x, self.weight, self.bias)
        check_tokens("x", x, self.weight.shape[1])
        return self.routing(self.logits(x), self.correction_bias)
