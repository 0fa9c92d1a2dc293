# SPDX-License-Identifier: Apache-2.0
"""gpt-oss's MXFP4 expert weights as its checkpoints store them.

`gate_up_proj_blocks` [E, 2I, H / 32, 16] and `down_proj_blocks` [E, H, I / 32, 16] are bytes of two
E2M1 numbers, the even one in the low nibble, 16 bytes a block; `..._scales` without the last
dimension are their E8M0 scales. So rows have our layout already, and only their order differs:
gate and up alternate in gate_up's rows, beginning with a gate.
"""

from __future__ import annotations

import torch

from fused_moe.quantization import MXFP4_GROUP, check_two_halves


def up_gate_from_interleaved(tensor: torch.Tensor) -> torch.Tensor:
    """Rows gate, up, gate, up, ... along dimension 1 become the [up; gate] rows we need.

    Args:
        tensor: fc1 weights [E, 2I, ...], scales [E, 2I, ...] or biases [E, 2I].

    Returns:
        A new contiguous tensor of the same shape.

    Raises:
        ValueError: there is no dimension 1 or its size is odd.
    """
    check_two_halves(tensor)
    return torch.cat([tensor[:, 1::2], tensor[:, 0::2]], dim=1)


def mxfp4_from_gpt_oss(
    blocks: torch.Tensor, scales: torch.Tensor, *, gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """One of gpt-oss's two weights as MXFP4 weights.

    Args:
        blocks: [E, N, K / 32, 16] uint8.
        scales: [E, N, K / 32] uint8.
        gated: whether these are gate_up_proj's, whose rows are put in order.

    Returns:
        packed, [E, N, K / 2] uint8, and scale, [E, N, K / 32] uint8.

    Raises:
        ValueError: another shape or dtype.
    """
    block_bytes = MXFP4_GROUP // 2
    if blocks.dtype != torch.uint8 or blocks.ndim != 4 or blocks.shape[3] != block_bytes:
        raise ValueError(
            f"blocks is a {blocks.dtype} tensor of shape {list(blocks.shape)}; it must be "
            f"torch.uint8 [experts, rows, K / 32, {block_bytes}]"
        )
    if scales.dtype != torch.uint8 or scales.shape != blocks.shape[:3]:
        raise ValueError(
            f"scales is a {scales.dtype} tensor of shape {list(scales.shape)}; it must be "
            f"torch.uint8 {list(blocks.shape[:3])}, one for each block"
        )
    if gated:
        return up_gate_from_interleaved(blocks.flatten(2)), up_gate_from_interleaved(scales)
    return blocks.flatten(2).contiguous(), scales.contiguous()
