# SPDX-License-Identifier: Apache-2.0
"""The checks of quant_scales, whose shapes and dtypes depend on the format of the weights."""

from __future__ import annotations

import torch

from fused_moe.quantization import INT4_GROUPS, MXFP4_GROUP
from fused_moe.shapes import expect_shape
from fused_moe.signature import Signature

# The dtypes that hold E8M0 scales, bytes s that mean 2^(s - 127).
E8M0: tuple[torch.dtype, ...] = (torch.uint8,)
if hasattr(torch, "float8_e8m0fnu"):
    E8M0 += (torch.float8_e8m0fnu,)


def fitting_groups(depths: tuple[int, ...], *, mxfp4: bool) -> tuple[int, ...]:
    """The group sizes of a format that divide every depth, how many weights a row has."""
    groups = (MXFP4_GROUP,) if mxfp4 else INT4_GROUPS
    return tuple(g for g in groups if not any(depth % g for depth in depths))


def check_quant_scales(s: Signature, *, quantized: bool) -> None:
    """Raises ValueError unless there are the scales that the weights' dtype needs."""
    weights = s.fc1_expert_weights
    if not quantized:
        if s.quant_scales:
            raise ValueError(
                f"quant_scales has {len(s.quant_scales)} tensors; it must be [] or None with "
                f"weights of {weights.dtype}"
            )
        return
    _expect_two_scales(s, "fc1's [experts, rows] and fc2's [experts, hidden]")
    for index, (name, meta) in enumerate(
        (("fc1_expert_weights", weights), ("fc2_expert_weights", s.fc2_expert_weights))
    ):
        scale = s.quant_scales[index]
        expect_shape(f"quant_scales[{index}]", scale, tuple(meta.shape[:2]), f"one a row of {name}")
    _expect_scale_dtypes(s)


def check_group_scales(s: Signature, depths: tuple[int, int], *, mxfp4: bool) -> int:
    """Checks the scales of 4-bit weights, [experts, rows, depth / group] each.

    Args:
        s: the call.
        depths: H and I, how many weights the rows of fc1 and of fc2 have.
        mxfp4: whether the scales are E8M0 rather than floating point.

    Returns:
        The group size, which the shapes tell.

    Raises:
        ValueError: not two scales, or a wrong shape or dtype, or two group sizes.
    """
    _expect_two_scales(
        s, "fc1's [experts, rows, hidden / group] and fc2's [experts, hidden, intermediate / group]"
    )
    groups = []
    for index, (meta, depth) in enumerate(
        zip((s.fc1_expert_weights, s.fc2_expert_weights), depths, strict=True)
    ):
        scale = s.quant_scales[index]
        allowed = fitting_groups((depth,), mxfp4=mxfp4)
        fits = {(*meta.shape[:2], depth // g): g for g in allowed}
        if tuple(scale.shape) not in fits:
            wanted = " or ".join(f"{list(shape)} (groups of {g})" for shape, g in fits.items())
            raise ValueError(
                f"quant_scales[{index}] has the shape {list(scale.shape)}; it must be {wanted}, "
                "[experts, rows, depth / group], where a group divides the depth, "
                f"{('the hidden', 'the intermediate')[index]} size {depth}"
            )
        groups.append(fits[tuple(scale.shape)])
    if groups[0] != groups[1]:
        raise ValueError(
            f"quant_scales[1] is in groups of {groups[1]}; it must be in groups of {groups[0]} as "
            f"quant_scales[0] is: quantize both weights with group_size={min(groups)}"
        )
    if not mxfp4:
        _expect_scale_dtypes(s)
        return groups[0]
    for index, scale in enumerate(s.quant_scales):
        if scale.dtype not in E8M0:
            raise ValueError(
                f"quant_scales[{index}] is {scale.dtype}; with MXFP4 weights it must be "
                f"{' or '.join(map(str, E8M0))}, E8M0 bytes s that mean 2^(s - 127)"
            )
    return groups[0]


def _expect_two_scales(s: Signature, what: str) -> None:
    if len(s.quant_scales) != 2:
        raise ValueError(
            f"quant_scales has {len(s.quant_scales)} tensors; with weights of "
            f"{s.fc1_expert_weights.dtype} it must have 2: {what}"
        )


def _expect_scale_dtypes(s: Signature) -> None:
    for index, scale in enumerate(s.quant_scales):
        if scale.dtype not in (torch.float32, s.input.dtype):
            raise ValueError(
                f"quant_scales[{index}] is {scale.dtype}; it must be torch.float32 or the dtype of "
                f"input, {s.input.dtype}"
            )
    if s.quant_scales[0].dtype != s.quant_scales[1].dtype:
        raise ValueError(
            f"quant_scales[1] is {s.quant_scales[1].dtype}; it must have the dtype of "
            f"quant_scales[0], {s.quant_scales[0].dtype}"
        )
