# SPDX-License-Identifier: Apache-2.0
"""What `cutlass_fused_moe` means, in the plainest PyTorch: the truth other backends are held to.

Slow and memory-hungry on purpose. Nothing is blocked, fused or rounded on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fused_moe.activation import ActivationType

# E2M1, MXFP4's numbers, by its definition: the bits s, ee, m mean (-1)^s * m / 2 where ee is 0,
# else (-1)^s * 2^(ee - 1) * (1 + m / 2).
_E2M1 = [
    (-1) ** (code >> 3)
    * (code % 2 / 2 if code // 2 % 4 == 0 else 2.0 ** (code // 2 % 4 - 1) * (1 + code % 2 / 2))
    for code in range(16)
]


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
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    int4: bool = False,
    mxfp4: bool = False,
) -> torch.Tensor:
    """One expert's weight as [N, K] of `dtype`.

    q * scale for int8, (u - 128) * scale for uint8, with the scale [N]. Of `int4` and `mxfp4`
    the weight is [N, K / 2] and the scale [N, K / group]: a byte holds weights 2i and 2i + 1,
    low nibble first, each u - 8 or an E2M1 number, whose scales are powers 2^(s - 127).
    """
    if int4 or mxfp4:
        assert scale is not None
        rows, half = weight.shape
        nibbles = torch.empty(rows, 2 * half, dtype=torch.long, device=weight.device)
        nibbles[:, 0::2] = weight % 16
        nibbles[:, 1::2] = weight // 16
        if int4:
            values, steps = (nibbles - 8).to(dtype), scale.to(dtype)
        else:
            values = torch.tensor(_E2M1, dtype=dtype, device=weight.device)[nibbles]
            codes = scale.view(torch.uint8)
            steps = torch.pow(2.0, codes.double() - 127).to(dtype)
            steps = steps.masked_fill(codes == 255, float("nan"))  # E8M0's NaN
        return values * steps.repeat_interleave(2 * half // scale.shape[1], dim=1)
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
    use_packed_weights: bool = False,
    use_w4_group_scaling: bool = False,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The layer of `cutlass_fused_moe` (same names, same shapes), computed in `dtype`.

    Takes any floating dtypes, and INT8, INT4 (use_packed_weights) and MXFP4
    (use_w4_group_scaling) weights with two `quant_scales`. Checks nothing.

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

    def numbers(weights: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        return dequantize(
            weights, scale, dtype, int4=use_packed_weights, mxfp4=use_w4_group_scaling
        )

    for expert in range(num_local_experts):
        token, slot = torch.where(token_selected_experts == ep_rank * num_local_experts + expert)
        if token.numel() == 0:
            continue
        fc1_scale, fc2_scale = (s[expert] for s in quant_scales) if quant_scales else (None, None)
        h = input[token].to(dtype) @ numbers(fc1_expert_weights[expert], fc1_scale).T
        if fc1_expert_biases is not None:
            h = h + fc1_expert_biases[expert].to(dtype)
        a = reference_activation(
            h,
            activation,
            parameter(swiglu_alpha, expert),
            parameter(swiglu_beta, expert),
            parameter(swiglu_limit, expert),
        )
        y = a @ numbers(fc2_expert_weights[expert], fc2_scale).T
        if fc2_expert_biases is not None and tp_rank == 0:
            y = y + fc2_expert_biases[expert].to(dtype)
        if token_final_scales is not None:
            y = y * token_final_scales[token, slot].to(dtype).unsqueeze(1)
        out.index_add_(0, token, y)
    return out
