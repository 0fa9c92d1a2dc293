# SPDX-License-Identifier: Apache-2.0
"""Preparing expert weights: INT8 quantization and the order of gated rows."""

from __future__ import annotations

import torch

# uint8 weights hold q + 128, so that both formats cover the same range.
UINT8_OFFSET = 128


def quantize_int8(
    weight: torch.Tensor, *, unsigned: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes expert weights to 8 bits, symmetrically, one scale an output channel.

    Args:
        weight: [E, N, K], any floating dtype, finite.
        unsigned: store q + 128 as uint8 instead of q as int8. Both mean the same weights.

    Returns:
        q, [E, N, K], int8 (uint8 if `unsigned`), and scale, [E, N], float32, such that
        q * scale is within scale / 2 of `weight`. A row of zeros gets the scale 1.

    Raises:
        ValueError: `weight` is not three-dimensional and floating, or is not finite.
    """
    if weight.ndim != 3 or not weight.is_floating_point():
        raise ValueError(
            f"weight is a {weight.dtype} tensor of shape {list(weight.shape)}; it must be a "
            "floating point tensor [experts, rows, columns]"
        )
    q = torch.empty(
        weight.shape, dtype=torch.uint8 if unsigned else torch.int8, device=weight.device
    )
    scale = torch.empty(weight.shape[:2], dtype=torch.float32, device=weight.device)
    # One expert at a time: a float32 copy of all of them could be larger than the memory.
    for expert in range(weight.shape[0]):
        rows = weight[expert].float()
        largest = rows.abs().amax(dim=1) if rows.shape[1] else rows.new_zeros(rows.shape[0])
        scale[expert] = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
        rounded = torch.round(rows / scale[expert].unsqueeze(1)).clamp_(-127, 127)
        q[expert] = (rounded + UINT8_OFFSET if unsigned else rounded).to(q.dtype)
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(
            "weight has an infinity or a NaN, which 8 bits cannot hold; clean the weights first"
        )
    return q, scale


def up_gate_from_gate_up(tensor: torch.Tensor) -> torch.Tensor:
    """Exchanges the halves of dimension 1: [gate; up] rows become the [up; gate] rows we need.

    Checkpoints and other libraries often concatenate w1 (gate) before w3 (up);
    `cutlass_fused_moe` wants up first, gate second, and cannot tell one from the other. The
    same exchange is its own inverse. Rows that alternate gate, up, gate, up (gpt-oss) are
    not what this converts.

    Args:
        tensor: fc1 weights [E, 2I, H], biases or INT8 scales [E, 2I].

    Returns:
        A new contiguous tensor of the same shape.

    Raises:
        ValueError: there is no dimension 1 or its size is odd.
    """
    if tensor.ndim < 2 or tensor.shape[1] % 2:
        raise ValueError(
            f"tensor has the shape {list(tensor.shape)}; it must be [experts, 2 * intermediate, "
            "...], with an even second dimension"
        )
    gate, up = tensor.chunk(2, dim=1)
    return torch.cat([up, gate], dim=1)
