# SPDX-License-Identifier: Apache-2.0
"""What `cutlass_fused_moe` means, in the plainest PyTorch: the truth other backends are held to.

Slow and memory-hungry on purpose. Nothing is blocked, fused or rounded on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fused_moe.activation import ActivationType


def reference_activation(
    h: torch.Tensor,
    activation: ActivationType,
    alpha: float | None = None,
    beta: float | None = None,
    limit: float | None = None,
) -> torch.Tensor:
    """Applies `activation` to rows h, [rows, 2I] if gated, else [rows, I]; returns [rows, I]."""
    if not activation.is_gated:
        if activation == ActivationType.Gelu:
            return torch.nn.functional.gelu(h)
        if activation == ActivationType.Relu:
            return torch.relu(h)
        if activation == ActivationType.Silu:
            return h * torch.sigmoid(h)
        if activation == ActivationType.Relu2:
            return torch.relu(h) ** 2
        return h
    half = h.shape[1] // 2
    lin, gate = h[:, :half], h[:, half:]
    if activation == ActivationType.Swiglu:
        return gate * torch.sigmoid(gate) * lin
    if activation == ActivationType.Geglu:
        return torch.nn.functional.gelu(gate) * lin
    if activation == ActivationType.GegluTanh:
        return torch.nn.functional.gelu(gate, approximate="tanh") * lin
    if activation == ActivationType.SwigluBias:
        alpha = 1.0 if alpha is None else alpha
        beta = 0.0 if beta is None else beta
        limit = float("inf") if limit is None else limit
        gate = torch.clamp(gate, max=limit)
        lin = torch.clamp(lin, min=-limit, max=limit)
        return gate * torch.sigmoid(alpha * gate) * (lin + beta)
    assert activation == ActivationType.SwigluStep
    limit = 7.0 if limit is None else limit
    silu = gate * torch.sigmoid(gate)
    return torch.clamp(silu, max=limit) * torch.clamp(lin, min=-limit, max=limit)


def dequantize(
    weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """One expert's weight [N, K] in `dtype`: q * scale for int8, (u - 128) * scale for uint8."""
    values = weight.to(dtype)
    if weight.dtype == torch.uint8:
        values = values - 128
    if scale is not None:
        values = values * scale.to(dtype).unsqueeze(1)
    return values


def reference_moe(
    input: torch.Tensor,
    token_selected_experts: torch.Tensor,
    token_final_scales: torch.Tensor | None,
    fc1_expert_weights: torch.Tensor,
    fc2_expert_weights: torch.Tensor,
    quant_scales: Sequence[torch.Tensor] | None = None,
    fc1_expert_biases: torch.Tensor | None = None,
    fc2_expert_biases: torch.Tensor | None = None,
    swiglu_alpha: torch.Tensor | None = None,
    swiglu_beta: torch.Tensor | None = None,
    swiglu_limit: torch.Tensor | None = None,
    *,
    tp_rank: int = 0,
    ep_rank: int = 0,
    activation_type: ActivationType | int = ActivationType.Swiglu,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The layer of `cutlass_fused_moe` (same names, same shapes), computed in `dtype`.

    Takes any floating dtypes, and INT8 weights with two `quant_scales`. Checks nothing.

    Returns:
        [M, H] of `dtype` (float32, or float64 to judge float32 itself): not rounded to any
        output dtype.
    """
    activation = ActivationType(activation_type)
    if activation == ActivationType.Swiglu and (
        swiglu_alpha is not None or swiglu_beta is not None or swiglu_limit is not None
    ):
        activation = ActivationType.SwigluBias
    num_local_experts = fc1_expert_weights.shape[0]
    hidden_size = fc2_expert_weights.shape[1]
    out = torch.zeros(input.shape[0], hidden_size, dtype=dtype, device=input.device)

    def parameter(values: torch.Tensor | None, expert: int) -> float | None:
        return None if values is None else float(values[expert])

    for expert in range(num_local_experts):
        token, slot = torch.where(token_selected_experts == ep_rank * num_local_experts + expert)
        if token.numel() == 0:
            continue
        fc1_scale, fc2_scale = (s[expert] for s in quant_scales) if quant_scales else (None, None)
        h = input[token].to(dtype) @ dequantize(fc1_expert_weights[expert], fc1_scale, dtype).T
        if fc1_expert_biases is not None:
            h = h + fc1_expert_biases[expert].to(dtype)
        a = reference_activation(
            h,
            activation,
            parameter(swiglu_alpha, expert),
            parameter(swiglu_beta, expert),
            parameter(swiglu_limit, expert),
        )
        y = a @ dequantize(fc2_expert_weights[expert], fc2_scale, dtype).T
        if fc2_expert_biases is not None and tp_rank == 0:
            y = y + fc2_expert_biases[expert].to(dtype)
        if token_final_scales is not None:
            y = y * token_final_scales[token, slot].to(dtype).unsqueeze(1)
        out.index_add_(0, token, y)
    return out
