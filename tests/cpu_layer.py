# SPDX-License-Identifier: Apache-2.0
"""Small layers on the CPU, as the keyword arguments of `cutlass_fused_moe`."""

from __future__ import annotations

from typing import Any

import torch

from fused_moe import (
    ActivationType,
    cutlass_fused_moe,
    quantize_int4,
    quantize_int8,
    quantize_mxfp4,
    topk_softmax,
)
from fused_moe.reference import reference_moe

# The arguments that the reference does not take: it needs or checks nothing of them.
_NOT_FOR_REFERENCE = (
    "output_dtype",
    "tp_size",
    "ep_size",
    "output",
    "workspace_buffer",
    "backend",
)


# The formats of weights, and those of them that hold two weights a byte.
WEIGHTS = ("same", "int8", "uint8", "int4_32", "int4_64", "int4_128", "mxfp4")
FOUR_BIT = WEIGHTS[3:]


def quantized(
    weight: torch.Tensor, weights: str, scale_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """A floating-point weight in one of the formats but "same": the weight and its scales."""
    if weights == "mxfp4":
        return quantize_mxfp4(weight)
    if weights.startswith("int4"):
        q, scale = quantize_int4(weight, int(weights.split("_")[1]))
    else:
        q, scale = quantize_int8(weight, unsigned=weights == "uint8")
    return q, scale.to(scale_dtype)


def flags(weights: str) -> dict[str, Any]:
    """The arguments that say what uint8 weights are."""
    if weights == "mxfp4":
        return {"use_w4_group_scaling": True}
    return {"use_packed_weights": True} if weights.startswith("int4") else {}


def make_layer(
    *,
    tokens: int = 13,
    hidden: int | None = None,
    intermediate: int | None = None,
    experts: int = 4,
    top_k: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    weights: str = "same",
    activation: ActivationType = ActivationType.Swiglu,
    biases: tuple[str, ...] = (),
    swiglu: tuple[str, ...] = (),
    ep_size: int = 1,
    ep_rank: int = 0,
    output_dtype: torch.dtype | None = None,
    scale_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """Random arguments for one call.

    Args:
        hidden, intermediate: None is 64 and 48, or what the groups of 4-bit weights divide.
        experts: those of this rank.
        weights: one of WEIGHTS.
        biases: any of "fc1", "fc2".
        swiglu: any of "alpha", "beta", "limit"; limits are small enough to clamp.
        output_dtype: None is dtype.
        scale_dtype: of quant_scales, but MXFP4's.
    """
    if hidden is None or intermediate is None:
        multiple = {"int4_64": 64, "int4_128": 128}.get(weights, 32)
        hidden = hidden or max(64, multiple)
        intermediate = intermediate or (3 * multiple if weights in FOUR_BIT else 48)
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, deviation: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * deviation

    output_dtype = dtype if output_dtype is None else output_dtype
    rows = intermediate * (2 if activation.is_gated else 1)
    fc1 = normal(experts, rows, hidden, deviation=hidden**-0.5).to(dtype)
    fc2 = normal(experts, hidden, intermediate, deviation=intermediate**-0.5).to(dtype)
    quant_scales: list[torch.Tensor] | None = None
    if weights != "same":
        fc1, scale1 = quantized(fc1, weights, scale_dtype)
        fc2, scale2 = quantized(fc2, weights, scale_dtype)
        quant_scales = [scale1, scale2]
    scales, ids = topk_softmax(normal(tokens, experts * ep_size), top_k)
    arguments = {
        "input": normal(tokens, hidden).to(dtype),
        "token_selected_experts": ids,
        "token_final_scales": scales,
        "fc1_expert_weights": fc1,
        "fc2_expert_weights": fc2,
        "output_dtype": output_dtype,
        "quant_scales": quant_scales,
        "ep_size": ep_size,
        "ep_rank": ep_rank,
        "activation_type": activation,
        **flags(weights),
    }
    for name in biases:
        width = rows if name == "fc1" else hidden
        arguments[f"{name}_expert_biases"] = normal(experts, width).to(output_dtype)
    for name in swiglu:
        low = {"alpha": 0.5, "beta": -1.0, "limit": 0.4}[name]
        arguments[f"swiglu_{name}"] = torch.rand(experts, generator=draw) + low
    return arguments


def run(arguments: dict[str, Any]) -> torch.Tensor:
    """The call, into an output full of NaN, which is what comes back."""
    shape = (arguments["input"].shape[0], arguments["fc2_expert_weights"].shape[1])
    output = torch.full(shape, float("nan"), dtype=arguments["output_dtype"])
    returned = cutlass_fused_moe(**arguments, output=output)
    assert returned is output
    return output


def reference(arguments: dict[str, Any], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The plain reference on the same arguments."""
    taken = {name: v for name, v in arguments.items() if name not in _NOT_FOR_REFERENCE}
    return reference_moe(**taken, dtype=dtype)
