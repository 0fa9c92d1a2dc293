# SPDX-License-Identifier: Apache-2.0
"""What the ranks of tests/parallel.py do where one of them, number 1, does not go on."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from fused_moe.parallel import ParallelError, ParallelGroups
from parallel_layer import dispatched, exact_layer, replicated
from parallel_world import Rank


def _expect_error(me: Rank, form: str) -> None:
    """One call of a form, which must fail within the timeout and say what it was doing."""
    layer = exact_layer(me)
    groups = ParallelGroups(ep=dist.group.WORLD)
    mine = layer.experts.shard(groups)
    drawn = layer.tokens(9)
    try:
        if form == "replicated":
            replicated(drawn, mine, groups)
        else:
            dispatched(drawn, mine, groups, max_tokens=9 if form == "padded" else None)
        if me.backend == "nccl":
            torch.cuda.synchronize()
    except ParallelError as error:
        text = str(error)
        assert f"failed on rank {me.rank} of the {me.size} expert-parallel ranks" in text, text
        assert "another rank ended" in text and error.__cause__ is not None, text
        what = {"replicated": "all-reduce", "padded": "all-gather", "dispatched": "all-to-all"}
        assert what[form] in text, text
    else:
        raise AssertionError("no error although a rank is missing")


def rank_dies_in_replicated(me: Rank) -> None:
    _one_rank_dies(me, "replicated")


def rank_dies_in_dispatched(me: Rank) -> None:
    _one_rank_dies(me, "dispatched")


def rank_dies_in_padded(me: Rank) -> None:
    _one_rank_dies(me, "padded")


def rank_hangs(me: Rank) -> None:
    """A rank that lives but never makes the call."""
    _warm_up(me)
    if me.rank == 1:
        time.sleep(2 * me.timeout)
        return
    begin = time.monotonic()
    _expect_error(me, "dispatched")
    assert time.monotonic() - begin < 2 * me.timeout


def rank_dies_and_host_does_not_wait(me: Rank) -> None:
    """NCCL as it is by default: PyTorch ends the process, with an exit status that tells."""
    _warm_up(me)
    if me.rank == 1:
        raise SystemExit("this rank dies")
    layer = exact_layer(me)
    groups = ParallelGroups(ep=dist.group.WORLD)
    dispatched(layer.tokens(9), layer.experts.shard(groups), groups)
    torch.cuda.synchronize()
    raise AssertionError("neither an error nor the end of the process")


def _one_rank_dies(me: Rank, form: str) -> None:
    _warm_up(me)
    if me.rank == 1:
        raise SystemExit("this rank dies")
    _expect_error(me, form)


def _warm_up(me: Rank) -> None:
    """A good call first: the ranks are connected when one dies."""
    layer = exact_layer(me)
    groups = ParallelGroups(ep=dist.group.WORLD)
    drawn = layer.tokens(9)
    layer.check(dispatched(drawn, layer.experts.shard(groups), groups), *drawn)
