# SPDX-License-Identifier: Apache-2.0
"""Calls of random sizes, routings and options, as functions of a Rank: for tests/parallel.py.

Every rank draws the same calls. All numbers are small and whole, so that results are exact.
"""

from __future__ import annotations

import dataclasses
import math
import random

import torch
import torch.distributed as dist

from fused_moe import ActivationType
from fused_moe.parallel import ExpertWeights, ParallelGroups
from parallel_layer import Layer, dispatched, replicated, ternary
from parallel_world import Rank

CALLS = 80
ROUTINGS = ("uniform", "duplicates", "nowhere", "first")


def random_calls(me: Rank) -> None:
    """Both forms over all ranks, and over the first and the last of them alone."""
    ends = [0, me.size - 1]
    pair = dist.new_group(ends)
    every = dist.group.WORLD
    layouts = [ParallelGroups(ep=every), ParallelGroups(tp=every)]
    layouts.append(ParallelGroups(ep=pair) if me.rank in ends else ParallelGroups())
    for number in range(CALLS):
        draw = random.Random(number)
        groups = layouts[draw.choice((0, 0, 1, 2))]
        try:
            _random_call(me, draw, number, groups)
        except Exception as error:
            raise AssertionError(f"call {number}: {error}") from error


def _random_layer(me: Rank, draw: random.Random, number: int) -> Layer:
    """H and I from 8 on, one expert a rank and more; sums stay where float16 is exact."""
    experts = draw.choice((1, 1, 2, 5)) * math.lcm(2, me.size)
    hidden, inter = 8 * draw.randint(1, 9), 8 * me.size * draw.randint(1, 2)
    made = torch.Generator().manual_seed(number)

    def weight(*shape: int) -> torch.Tensor:
        return ternary(made, *shape).to(me.device, torch.float16)

    weights = ExpertWeights(
        fc1=weight(experts, inter, hidden),
        fc2=weight(experts, hidden, inter),
        activation_type=ActivationType.Relu,
    )
    if draw.random() < 0.5:
        biases = weight(experts, inter), weight(experts, hidden)
        weights = dataclasses.replace(weights, fc1_biases=biases[0], fc2_biases=biases[1])
    return Layer(weights, torch.float16, True, me.device)


def _random_call(me: Rank, draw: random.Random, number: int, groups: ParallelGroups) -> None:
    layer = _random_layer(me, draw, number)
    top_k = draw.randint(1, min(4, layer.experts.num_experts))
    counts = [draw.choice((0, 0, 1, 2, 7, 33)) for _ in range(me.size)]
    routings = [draw.choice(ROUTINGS) for _ in range(me.size)]
    chunks, row_per_expert = draw.choice((1, 1, 2, 5, 16)), draw.random() < 0.4
    most = max(counts) + draw.choice((0, 0, 3)) if draw.random() < 0.4 else None
    form = {"chunks": chunks, "max_tokens": most}
    if most is None:
        form["row_per_expert"] = row_per_expert
    mine = layer.experts.shard(groups)
    # Ranks that hold parts of the same experts have the same tokens.
    which = 0 if groups.tp is not None else me.rank
    drawn = layer.tokens(
        counts[which], top_k=top_k, routing=routings[which], seed=number * me.size + which
    )
    layer.check(dispatched(drawn, mine, groups, **form), *drawn)
    drawn = layer.tokens(counts[0], top_k=top_k, routing=routings[0], seed=number)
    layer.check(replicated(drawn, mine, groups), *drawn)
