# SPDX-License-Identifier: Apache-2.0
"""The checks of shapes against each other, of devices, contiguity, alignment and overlap."""

from __future__ import annotations

import torch

from fused_moe.activation import ActivationType
from fused_moe.signature import Meta, Signature

# Slots, the M * k pairs of a token and an expert, are counted in 32 bits, and so is the end of a
# partly filled tile of them: kMaxSlots in moe/problem.h.
MAX_SLOTS = 2**31 - 1024

# What the routing kernel's tables hold: _C.MAX_LOCAL_EXPERTS, known without _C too.
MAX_LOCAL_EXPERTS = 2048

# What kernels lay their tables out by, and, where none runs, what PyTorch's CPU allocator gives.
WORKSPACE_ALIGNMENTS = {"cuda": 128, "cpu": 64}

# Tensors that are read element by element: ids and scales of a slice of the tokens are fine.
ALIGNMENTS = {
    "token_selected_experts": 4,
    "token_final_scales": 4,
    "swiglu_alpha": 4,
    "swiglu_beta": 4,
    "swiglu_limit": 4,
}


def activation_of(value: int) -> ActivationType:
    """The activation of this number; raises ValueError where there is none."""
    try:
        return ActivationType(value)
    except ValueError:
        names = ", ".join(f"{a.name} {a.value}" for a in ActivationType)
        raise ValueError(
            f"activation_type is {value!r}; it must be an ActivationType: {names}"
        ) from None


def effective_activation(s: Signature) -> ActivationType:
    """The activation that is computed: parameters turn Swiglu into SwigluBias.

    Raises:
        ValueError: no such activation, or a parameter that it does not use.
    """
    activation = activation_of(s.activation_type)
    parameters = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")
    given = [name for name in parameters if getattr(s, name) is not None]
    if activation == ActivationType.Swiglu and given:
        return ActivationType.SwigluBias
    used: tuple[str, ...] = ()
    if activation == ActivationType.SwigluBias:
        used = parameters
    elif activation == ActivationType.SwigluStep:
        used = ("swiglu_limit",)
    for name in given:
        if name not in used:
            raise ValueError(
                f"{name} is given, but activation_type is {activation.name}, which does not use "
                "it; leave it None, or use Swiglu or SwigluBias"
            )
    return activation


def expect_shape(name: str, meta: Meta | None, shape: tuple[int, ...], what: str) -> None:
    """Raises ValueError, saying `what` the shape is, where `meta` is given and has another."""
    if meta is not None and tuple(meta.shape) != shape:
        raise ValueError(
            f"{name} has the shape {list(meta.shape)}; it must be {list(shape)}, {what}"
        )


def check_shapes(s: Signature, gated: bool, weights_a_byte: int = 1) -> dict[str, int]:
    """Checks every shape but those of quant_scales against the others.

    Args:
        s: the call.
        gated: whether fc1 has 2I rows.
        weights_a_byte: 2 for 4-bit weights, whose last dimension is half of H or I; 1 for
            others, one an element.

    Returns:
        num_tokens, hidden_size, intermediate_size, num_local_experts and top_k.

    Raises:
        ValueError: a wrong rank or size.
    """
    half = " / 2" if weights_a_byte == 2 else ""
    for name, meta, rank, what in (
        ("input", s.input, 2, "[tokens, hidden]"),
        ("token_selected_experts", s.token_selected_experts, 2, "[tokens, experts a token]"),
        ("fc1_expert_weights", s.fc1_expert_weights, 3, f"[experts, rows, hidden{half}]"),
        ("fc2_expert_weights", s.fc2_expert_weights, 3, f"[experts, hidden, intermediate{half}]"),
    ):
        if len(meta.shape) != rank:
            raise ValueError(
                f"{name} has {len(meta.shape)} dimensions, shape {list(meta.shape)}; it must have "
                f"{rank}, {what}"
            )
    num_tokens, hidden = s.input.shape
    experts, _, fc1_depth = s.fc1_expert_weights.shape
    fc2_hidden, fc2_depth = s.fc2_expert_weights.shape[1:]
    fc1_hidden, intermediate = fc1_depth * weights_a_byte, fc2_depth * weights_a_byte
    if fc1_hidden == fc2_hidden != hidden:
        raise ValueError(
            f"input has the shape {list(s.input.shape)}; its second dimension must be "
            f"{fc1_hidden}, the hidden size of fc1_expert_weights and fc2_expert_weights"
        )
    if experts < 1:
        raise ValueError("fc1_expert_weights has no expert; its first dimension must be 1 or more")
    expect_shape(
        "fc2_expert_weights",
        s.fc2_expert_weights,
        (experts, hidden, fc2_depth),
        f"[experts of fc1_expert_weights, hidden size of input, intermediate{half}]",
    )
    name = ActivationType(s.activation_type).name
    rows = 2 * intermediate if gated else intermediate
    kind = (
        f"[experts, 2 * intermediate, hidden{half}]: {name} is gated, with the rows [up; gate]"
        if gated
        else f"[experts, intermediate, hidden{half}]: {name} is not gated"
    )
    packed = weights_a_byte == 2
    if not packed and s.fc1_expert_weights.dtype == torch.uint8 and 2 * fc1_depth == hidden:
        kind += (
            ". Two 4-bit weights a byte are asked for by use_packed_weights=True (INT4) or "
            "use_w4_group_scaling=True (MXFP4)"
        )
    fc1_shape = (experts, rows, hidden // weights_a_byte)
    expect_shape("fc1_expert_weights", s.fc1_expert_weights, fc1_shape, kind)
    top_k = s.token_selected_experts.shape[1]
    if top_k < 1:
        raise ValueError(
            "token_selected_experts has no column; its second dimension, the experts a token, "
            "must be 1 or more"
        )
    slots = (num_tokens, top_k)
    expect_shape(
        "token_selected_experts", s.token_selected_experts, slots, "one row a token of input"
    )
    check_slots("the size of token_selected_experts", num_tokens, top_k)
    expect_shape(
        "token_final_scales", s.token_final_scales, slots, "the shape of token_selected_experts"
    )
    expect_shape("fc1_expert_biases", s.fc1_expert_biases, (experts, rows), "one a row of fc1")
    expect_shape("fc2_expert_biases", s.fc2_expert_biases, (experts, hidden), "one a row of fc2")
    for parameter in ("swiglu_alpha", "swiglu_beta", "swiglu_limit"):
        expect_shape(parameter, getattr(s, parameter), (experts,), "one an expert of this rank")
    expect_shape("output", s.output, (num_tokens, hidden), "the shape of input")
    return {
        "num_tokens": num_tokens,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_local_experts": experts,
        "top_k": top_k,
    }


def check_slots(name: str, num_tokens: int, top_k: int) -> None:
    """Raises ValueError where there are more slots than can be counted."""
    if num_tokens * top_k > MAX_SLOTS:
        raise ValueError(
            f"{name} is {num_tokens * top_k}; it must be at most {MAX_SLOTS}: split the "
            "tokens over several calls"
        )


def check_local_experts(name: str, backend: str, num_local_experts: int) -> None:
    """Raises ValueError where a rank has more experts than the backend can route to."""
    if backend != "cpu" and num_local_experts > MAX_LOCAL_EXPERTS:
        raise ValueError(
            f"{name} is {num_local_experts}; it must be at most {MAX_LOCAL_EXPERTS} on backend "
            f"'{backend}': spread the experts over more ranks with ep_size"
        )


def check_devices(s: Signature) -> None:
    """Raises ValueError unless all tensors are where input is."""
    for name, meta in s.tensors().items():
        if meta.device != s.input.device:
            raise ValueError(
                f"{name} is on {meta.device}; it must be on the device of input, "
                f"{s.input.device}: use {name}.to(input.device)"
            )


def check_contiguity(s: Signature) -> None:
    """Raises ValueError unless every tensor is contiguous."""
    for name, meta in s.tensors().items():
        if not meta.contiguous:
            raise ValueError(
                f"{name} is not contiguous; it must be contiguous, row-major: "
                + (
                    "pass a contiguous tensor and copy from it"
                    if name in ("output", "workspace_buffer")
                    else f"use {name}.contiguous()"
                )
            )


def check_workspace(meta: Meta | None, needed: int) -> None:
    """Raises ValueError unless the workspace is bytes in one dimension, and enough of them."""
    if meta is None:
        return
    if meta.dtype not in (torch.uint8, torch.int8) or len(meta.shape) != 1:
        raise ValueError(
            f"workspace_buffer is a {meta.dtype} tensor of shape {list(meta.shape)}; it must be "
            "torch.uint8 or torch.int8 with one dimension"
        )
    if meta.shape[0] < needed:
        raise ValueError(
            f"workspace_buffer has {meta.shape[0]} bytes; it must have {needed} or more: ask "
            "cutlass_fused_moe_workspace_size"
        )


def check_alignment(addresses: dict[str, int], device_type: str) -> None:
    """Raises ValueError, naming the argument, for an address that kernels cannot load from."""
    for name, address in addresses.items():
        alignment = ALIGNMENTS.get(name, 16)
        if name == "workspace_buffer":
            alignment = WORKSPACE_ALIGNMENTS[device_type]
        if address % alignment:
            raise ValueError(
                f"{name} starts at the address {address:#x}; it must be {alignment}B-aligned: "
                "slices may start anywhere, .clone() makes an aligned copy"
            )


def check_overlap(written: str, addresses: dict[str, int], nbytes: dict[str, int]) -> None:
    """Raises ValueError where the tensor `written` shares memory with another argument."""
    start = addresses[written]
    end = start + nbytes[written]
    for name, address in addresses.items():
        if name != written and address < end and start < address + nbytes[name]:
            raise ValueError(
                f"{written} overlaps {name} in memory; it must be a tensor of its own, because it "
                "is written while the others are still read"
            )
