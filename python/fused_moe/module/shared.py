# SPDX-License-Identifier: Apache-2.0
"""Shared experts: the dense gated MLP that every token goes through beside the routed ones."""

from __future__ import annotations

import torch

from fused_moe.activation import ActivationType
from fused_moe.module.tensors import InferenceModule, check_tokens, parameter, refuse_gradients

_ACTIVATIONS = {
    ActivationType.Swiglu: torch.nn.functional.silu,
    ActivationType.Silu: torch.nn.functional.silu,
    ActivationType.Geglu: torch.nn.functional.gelu,
    ActivationType.Gelu: torch.nn.functional.gelu,
    ActivationType.Relu: torch.relu,
    ActivationType.Relu2: lambda x: torch.relu(x).square(),
}


class SharedExperts(InferenceModule):
    """y = down @ (activation(gate) * up), optionally times sigmoid(scale_gate @ x).

    Several shared experts are one with the sum of their intermediate sizes (DeepSeek). They
    are two dense products in the model's dtype, or autocast's, run by PyTorch: every token has
    them all, so there is nothing to group.

    On several ranks each holds a share along I_s, or one holds all of it and the others none:
    what a rank holds it adds, and the sum over ranks is the layer.

    State: `gate_up_weight` [2 * I_s, H], the gate first as checkpoints have it (for activations
    that are not gated [I_s, H]); `down_weight` [H, I_s]; `scale_gate_weight` [1, H] (Qwen's
    shared_expert_gate).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: ActivationType = ActivationType.Swiglu,
        scale_gate: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Makes shared experts with random weights.

        Args:
            hidden_size: H.
            intermediate_size: I_s of this rank.
            activation: Swiglu, Geglu, or one that is not gated: Silu, Gelu, Relu, Relu2.
            scale_gate: whether each token scales them by a sigmoid (Qwen2-MoE, Qwen3-Next).
            dtype: of the weights; None is PyTorch's default.
            device: as in torch.nn.Linear.

        Raises:
            ValueError: an activation or a size that they do not have.
        """
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"the activation of the shared experts is {ActivationType(activation).name}; it "
                f"must be one of {', '.join(a.name for a in _ACTIVATIONS)}"
            )
        if intermediate_size < 1:
            raise ValueError(
                f"the intermediate size of the shared experts is {intermediate_size}; it must be 1 "
                "or more"
            )
        self.activation = ActivationType(activation)
        rows = intermediate_size * (2 if self.activation.is_gated else 1)
        self.gate_up_weight = parameter((rows, hidden_size), dtype, device)
        self.down_weight = parameter((hidden_size, intermediate_size), dtype, device)
        self.scale_gate_weight = parameter((1, hidden_size), dtype, device) if scale_gate else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights of deviation K^-0.5, so that each product keeps the size of its input."""
        for weight in self.parameters():
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[M, H] in the dtype of x, of x [M, H] in the dtype of the weights.

        Under autocast x may have any floating dtype; the result is of autocast's.

        Raises:
            RuntimeError: a gradient is required.
            ValueError: an x of another size or dtype.
        """
        refuse_gradients(x, self.gate_up_weight, self.down_weight, self.scale_gate_weight)
        check_tokens("x", x, self.gate_up_weight.shape[1])
        if x.dtype != self.down_weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"x is {x.dtype}, the shared experts' weights are {self.down_weight.dtype}; "
                "they must be of one dtype: convert one of them"
            )
        h = torch.nn.functional.linear(x, self.gate_up_weight)
        if self.activation.is_gated:
            gate, up = h.chunk(2, dim=-1)
            h = _ACTIVATIONS[self.activation](gate) * up
        else:
            h = _ACTIVATIONS[self.activation](h)
        y = torch.nn.functional.linear(h, self.down_weight)
        if self.scale_gate_weight is not None:
            y = y * torch.sigmoid(torch.nn.functional.linear(x, self.scale_gate_weight))
        return y
