# SPDX-License-Identifier: Apache-2.0
"""What the ranks of tests/parallel.py do where one of them, number 1, does not go on."""

from __future__ import annotations

import datetime
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fused_moe.parallel import ParallelError, ParallelGroups, wait_for_device
from parallel_layer import Layer, Tokens, dispatched, exact_layer, replicated
from parallel_world import Rank

EXCHANGES = {"replicated": "all-reduce", "padded": "all-gather", "dispatched": "all-to-all"}


def _call(form: str, layer: Layer, groups: ParallelGroups, drawn: Tokens) -> torch.Tensor:
    mine = layer.experts.shard(groups)
    if form == "replicated":
        return replicated(drawn, mine, groups)
    return dispatched(drawn, mine, groups, max_tokens=9 if form == "padded" else None)


def _connect(me: Rank, form: str, groups: ParallelGroups) -> None:
    """A good call of the form first: NCCL connects in it, and would wait there without timeout."""
    layer = exact_layer(me)
    drawn = layer.tokens(9)
    layer.check(_call(form, layer, groups, drawn), *drawn)
    if me.backend == "nccl":
        torch.cuda.synchronize()


def _expect_error(me: Rank, form: str, groups: ParallelGroups) -> None:
    """One call of a form, which must fail within the timeout and say what it was doing."""
    layer = exact_layer(me)
    drawn = layer.tokens(9)
    begin = time.monotonic()
    try:
        _call(form, layer, groups, drawn)
        if me.backend == "nccl":
            torch.cuda.synchronize()
    except ParallelError as error:
        text = str(error)
        assert "another rank ended" in text and error.__cause__ is not None, text
        assert f"(this is global rank {me.rank})" in text, text
        if groups.tp is None:
            said = f"failed on rank {me.rank} of the {me.size} expert-parallel ranks"
            assert said in text and EXCHANGES[form] in text, text
    else:
        raise AssertionError("no error although a rank is missing")
    assert time.monotonic() - begin < 2 * me.timeout


def _one_rank_dies(me: Rank, form: str) -> None:
    groups = ParallelGroups(ep=dist.group.WORLD)
    _connect(me, form, groups)
    if me.rank == 1:
        raise SystemExit("this rank dies")
    _expect_error(me, form, groups)


def rank_dies_in_replicated(me: Rank) -> None:
    _one_rank_dies(me, "replicated")


def rank_dies_in_dispatched(me: Rank) -> None:
    _one_rank_dies(me, "dispatched")


def rank_dies_in_padded(me: Rank) -> None:
    _one_rank_dies(me, "padded")


def _one_rank_hangs(me: Rank, groups: ParallelGroups) -> None:
    """A rank that lives but never makes the call."""
    _connect(me, "dispatched", groups)
    if me.rank == 1:
        time.sleep(10 * me.timeout)  # until it is killed
    _expect_error(me, "dispatched", groups)


def rank_hangs(me: Rank) -> None:
    _one_rank_hangs(me, ParallelGroups(ep=dist.group.WORLD))


def rank_hangs_in_mesh(me: Rank) -> None:
    """The timeout given to init_process_group holds in the groups of a mesh. Of four ranks."""
    mesh = init_device_mesh(me.device.type, (2, 2), mesh_dim_names=("ep", "tp"))
    _one_rank_hangs(me, ParallelGroups.from_mesh(mesh))


def rank_fails_alone(me: Rank) -> None:
    """An error of one rank before it sends anything; the others wait for it until the timeout."""
    groups = ParallelGroups(ep=dist.group.WORLD)
    _connect(me, "dispatched", groups)
    if me.rank != 1:
        _expect_error(me, "dispatched", groups)
        return
    layer = exact_layer(me)
    x, ids, scales = layer.tokens(9)
    try:
        dispatched((x[:, :-8].contiguous(), ids, scales), layer.experts.shard(groups), groups)
    except ValueError as error:
        assert "it must be [tokens, 64], the hidden size of experts" in str(error), error
    else:
        raise AssertionError("an input of the wrong size was accepted")
    time.sleep(10 * me.timeout)  # until it is killed


def rank_dies_in_a_graph(me: Rank) -> None:
    """Replays of a graph, which neither PyTorch's watchdog nor its blocking wait looks at."""
    layer = exact_layer(me)
    groups = ParallelGroups(ep=dist.group.WORLD)
    mine = layer.experts.shard(groups)
    drawn = layer.tokens(9)
    layer.check(replicated(drawn, mine, groups), *drawn)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = replicated(drawn, mine, groups)
    timeout = datetime.timedelta(seconds=me.timeout)
    graph.replay()
    wait_for_device(timeout)
    layer.check(out, *drawn)
    if me.rank == 1:
        raise SystemExit("this rank dies")
    begin = time.monotonic()
    graph.replay()
    try:
        wait_for_device(timeout)
    except ParallelError as error:
        assert "did not finish within" in str(error), error
    else:
        raise AssertionError("no error although a rank is missing")
    assert me.timeout <= time.monotonic() - begin < 2 * me.timeout


def rank_dies_and_host_does_not_wait(me: Rank) -> None:
    """NCCL as it is by default: PyTorch ends the process, with an exit status that tells."""
    groups = ParallelGroups(ep=dist.group.WORLD)
    _connect(me, "dispatched", groups)
    if me.rank == 1:
        raise SystemExit("this rank dies")
    layer = exact_layer(me)
    _call("dispatched", layer, groups, layer.tokens(9))
    torch.cuda.synchronize()
    raise AssertionError("neither an error nor the end of the process")
