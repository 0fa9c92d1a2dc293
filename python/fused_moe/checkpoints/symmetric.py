# SPDX-License-Identifier: Apache-2.0
"""From 4-bit codes with zero points to our symmetric INT4, where that loses nothing.

A checkpoint's weight is (u - zero) * scale with u and zero in 0..15; ours is q * scale with q
in -8..7. The two are the same numbers where every u - zero of a group is in -8..7, which the zero
point 8 gives, or, with the sign of the scale changed, in -7..8, which 7 gives. Other zero points
reach further to one side than any 4-bit q can.
"""

from __future__ import annotations

import torch

from fused_moe.quantization import INT4_GROUPS, INT4_OFFSET, pack_nibbles, unpack_nibbles

# The order of the codes in an int32, from its lowest 4 bits up.
SEQUENTIAL = (0, 1, 2, 3, 4, 5, 6, 7)


def unpack_words(words: torch.Tensor, order: tuple[int, ...] = SEQUENTIAL) -> torch.Tensor:
    """The codes in int32 words along the last dimension: [..., n] to uint8 [..., 8n].

    Args:
        words: int32.
        order: order[i] says which of its eight codes a word holds in bits 4i to 4i + 3.
    """
    # A word's bytes are its pairs of codes, low ones first: all hosts are little-endian here.
    codes = unpack_nibbles(words.contiguous().view(torch.uint8))
    if order == SEQUENTIAL:
        return codes
    position = [order.index(code) for code in range(8)]
    return codes.unflatten(-1, (-1, 8))[..., position].flatten(-2)


def group_size_of(depth: int, groups: int) -> int:
    """The largest group size of ours that divides a checkpoint's groups.

    Raises:
        ValueError: there is none: its scales are for fewer than 32 weights, or for a number of
            them that is no multiple of 32.
    """
    size = depth // groups if groups and depth % groups == 0 else 0
    for ours in reversed(INT4_GROUPS):
        if size and size % ours == 0:
            return ours
    raise ValueError(
        f"the scales are {groups} for {depth} weights a row; the weights that share one must be "
        f"a multiple of {INT4_GROUPS[0]}: dequantize and quantize anew with quantize_int4"
    )


def regroup(scale: torch.Tensor, depth: int, group_size: int) -> torch.Tensor:
    """Scales [..., groups] repeated for smaller groups: [..., depth / group_size]."""
    return scale.repeat_interleave(depth // group_size // scale.shape[-1], dim=-1)


def symmetric(
    packed: torch.Tensor, zeros: torch.Tensor | None, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Our INT4 for codes with zero points.

    Args:
        packed: [N, K / 2] uint8, the even code in the low nibble.
        zeros: [N, groups], the zero points 0 to 15; None is 8 everywhere.
        scale: [N, groups], any floating dtype.

    Returns:
        packed, [N, K / 2] uint8, and scale, [N, K / g] float32, with g the largest of 32, 64
        and 128 that divides the checkpoint's groups.

    Raises:
        ValueError: a zero point that symmetric weights cannot express, or groups too small.
    """
    rows, depth = packed.shape[0], 2 * packed.shape[1]
    groups = scale.shape[1]
    size = group_size_of(depth, groups)
    scale = scale.float()
    if zeros is not None and bool((zeros != INT4_OFFSET).any()):
        q = unpack_nibbles(packed).view(rows, groups, -1).to(torch.int8)
        q -= zeros.to(torch.int8).unsqueeze(2)
        lowest, largest = q.aminmax(dim=2)
        fits = (lowest >= -8) & (largest <= 7)
        negated = ~fits & (lowest >= -7) & (largest <= 8)
        _refuse_zero_points(zeros, fits | negated)
        q = torch.where(negated.unsqueeze(2), -q, q).view(rows, depth)
        packed = pack_nibbles((q + INT4_OFFSET).to(torch.uint8))
        scale = torch.where(negated, -scale, scale)
    return packed.contiguous(), regroup(scale, depth, size).contiguous()


def _refuse_zero_points(zeros: torch.Tensor, good: torch.Tensor) -> None:
    bad = (~good).nonzero()
    if not bad.numel():
        return
    row, group = bad[0].tolist()
    values = sorted(set(zeros[~good].tolist()))
    raise ValueError(
        f"group {group} of row {row} has the zero point {int(zeros[row, group])}, and so "
        f"{len(bad)} of {good.numel()} groups have one of {values}; INT4 weights here are "
        "symmetric, q * scale with q in -8..7, which is exact for the zero points 8 and 7 only. "
        "Dequantize them (dequantize_awq, dequantize_gptq) and take quantize_int8, which adds "
        "little to their error, or quantize_int4; or use a checkpoint that was quantized "
        "symmetrically"
    )
