# SPDX-License-Identifier: Apache-2.0
"""Expert ids to measure on: rows of the caller's own, or random ones, even or skewed."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

# Zipf's law, the r-th most popular expert is chosen with a weight of 1 / r: traffic of one kind
# on a model whose training balanced its experts over all kinds is about so uneven.
ZIPF_EXPONENT = 1.0


@dataclasses.dataclass(frozen=True)
class Experts:
    """E over all ranks, and which of them are this rank's."""

    total: int
    first: int
    local: int


def random_ids(
    tokens: int, top_k: int, experts: Experts, skewed: bool, generator: torch.Generator
) -> torch.Tensor:
    """Ids [tokens, top_k] int32, distinct within a token where there are enough experts.

    A token's choices are drawn without replacement by adding Gumbel noise to the logarithms of
    the experts' weights and taking the largest. Which experts are popular is drawn too.
    """
    device = generator.device
    # In float32 whatever the default: in 16 bits many noises would be equal.
    number: dict[str, Any] = {"dtype": torch.float32, "device": device}
    logits = torch.zeros(experts.total, **number)
    if skewed:
        ranks = torch.randperm(experts.total, generator=generator, device=device) + 1
        logits = -ZIPF_EXPONENT * ranks.float().log()
    if top_k > experts.total:
        odds = logits.softmax(dim=0).expand(tokens, -1)
        return odds.multinomial(top_k, replacement=True, generator=generator).to(torch.int32)
    uniform = torch.rand(tokens, experts.total, generator=generator, **number)
    gumbel = -(-uniform.clamp_min(1e-20).log()).clamp_min(1e-20).log()
    return (logits + gumbel).topk(top_k, dim=1).indices.to(torch.int32)


def given_ids(
    ids: torch.Tensor, tokens: int, number: int, count: int, experts: Experts
) -> torch.Tensor:
    """The number-th of `count` samples [tokens, k] out of the caller's ids [M, k], tokens <= M.

    Rows are taken evenly over the batch, other ones for each sample. Each sample also goes to
    other experts of this rank, all shifted alike: it loads them as unevenly, but finds their
    weights where the samples before did not bring them into the cache.
    """
    m = ids.shape[0]
    rows = (torch.arange(tokens, device=ids.device) * m // tokens + number) % m
    picked = ids[rows]
    local = picked - experts.first
    here = (local >= 0) & (local < experts.local)
    shift = number * max(1, experts.local // count)
    return torch.where(here, (local + shift) % experts.local + experts.first, picked).contiguous()


def touched(ids: torch.Tensor, experts: Experts) -> int:
    """How many of this rank's experts get a token. Waits for the device."""
    local = ids - experts.first
    return int(local[(local >= 0) & (local < experts.local)].unique().numel())
