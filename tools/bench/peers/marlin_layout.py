# SPDX-License-Identifier: Apache-2.0
"""How Marlin wants weights and scales, made from the plain layouts (vLLM's marlin_utils.py)."""

from __future__ import annotations

import torch

# The order of the scales in the accumulators of a warp: within 64 columns where there are groups
# along k, within 32 where a column has one scale.
GROUPED_ORDER = [i + 8 * j for i in range(8) for j in range(8)]
CHANNEL_ORDER = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]


def permuted_scales(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales [E, N, groups] or [E, N] as Marlin reads them: [E, groups, N] of `dtype`."""
    channel = scales.ndim == 2
    by_group = (scales.unsqueeze(2) if channel else scales).transpose(1, 2).to(dtype)
    order = CHANNEL_ORDER if channel else GROUPED_ORDER
    blocks = by_group.reshape(-1, len(order))[:, order]
    return blocks.reshape(by_group.shape).contiguous()


def words_along_k(weight: torch.Tensor) -> torch.Tensor:
    """Weights [E, N, bytes of K] as int32 [E, words of K, N]: the first k in the lowest bits.

    INT8 is stored with the offset 128, as INT4 has its offset 8 already.
    """
    if weight.dtype == torch.int8:
        weight = weight.view(torch.uint8) ^ 0x80
    return weight.view(torch.int32).transpose(1, 2).contiguous()
