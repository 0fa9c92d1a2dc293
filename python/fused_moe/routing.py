# SPDX-License-Identifier: Apache-2.0
"""From router logits to what `cutlass_fused_moe` takes: expert ids and scales."""

from __future__ import annotations

import torch


def topk_softmax(
    router_logits: torch.Tensor, k: int, renormalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses the k experts of largest probability for each token.

    Deterministic: of equal logits the one with the lower expert id comes first. The k ids of
    a token are distinct and within [0, E) whatever the logits are; a row with a NaN (or
    +inf) keeps valid ids and gets NaN scales, so that the fault shows in the output.

    Args:
        router_logits: [M, E], any floating dtype.
        k: experts a token, 1 <= k <= E.
        renormalize: make the k scales of a token sum to 1 (Mixtral, Qwen3); otherwise they
            are probabilities among all E experts (OLMoE).

    Returns:
        scales [M, k] float32 in descending order, and ids [M, k] int32.

    Raises:
        ValueError: `router_logits` is not a floating [M, E] tensor, or k is out of range.
    """
    if router_logits.ndim != 2 or not router_logits.is_floating_point():
        raise ValueError(
            f"router_logits is a {router_logits.dtype} tensor of shape "
            f"{list(router_logits.shape)}; it must be a floating point tensor [tokens, experts]"
        )
    num_experts = router_logits.shape[1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"k is {k}; it must be from 1 to the number of experts, {num_experts}")
    logits = router_logits.float()
    # A stable sort, because torch.topk leaves the order of equal values open.
    ordered, order = torch.sort(logits, dim=1, descending=True, stable=True)
    # A NaN sorts first and +inf - +inf is NaN, so that both show in the scales of their row.
    considered = ordered[:, :k] if renormalize else ordered
    scales = torch.softmax(considered, dim=1)[:, :k].contiguous()
    return scales, order[:, :k].to(torch.int32)
