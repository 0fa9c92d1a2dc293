# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs and the host's waiting, as functions of a Rank: for tests/parallel.py."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from fused_moe.parallel import ParallelGroups
from parallel_layer import both_kinds, dispatched, exact_layer, replicated
from parallel_world import Rank

# The module; of the package the name is the function.
dispatched_module = importlib.import_module("fused_moe.parallel.dispatched")


def refused_in_a_graph(me: Rank) -> None:
    """What waits for the device says so where a graph is captured; the group works on."""
    layer = exact_layer(me)
    groups = ParallelGroups(ep=dist.group.WORLD)
    mine = layer.experts.shard(groups)
    drawn = layer.tokens(6)
    layer.check(dispatched(drawn, mine, groups), *drawn)
    calls: list[tuple[str, dict[str, str], dict[str, Any]]] = [
        ("max_tokens is None, and the current stream is being captured", {}, {}),
        ("TORCH_NCCL_BLOCKING_WAIT is set", {"TORCH_NCCL_BLOCKING_WAIT": "1"}, {"max_tokens": 6}),
    ]
    for text, environment, form in calls:
        with mock.patch.dict(os.environ, environment), in_a_capture(me):
            try:
                dispatched(drawn, mine, groups, **form)
            except RuntimeError as error:
                assert text in str(error), error
            else:
                raise AssertionError(f"no error: {text}")
    layer.check(dispatched(drawn, mine, groups), *drawn)


@contextlib.contextmanager
def in_a_capture(me: Rank) -> Iterator[None]:
    """A CUDA graph is captured inside; without CUDA it is said to be."""
    if me.backend == "nccl":
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            yield
        return
    with (
        mock.patch("fused_moe.parallel.collectives.capturing", return_value=True),
        mock.patch.object(dispatched_module, "capturing", return_value=True),
    ):
        yield


def host_waits_once(me: Rank) -> None:
    """Of calls that have run before: the plain dispatched form waits once, the others never."""
    layer = exact_layer(me)
    groups = ParallelGroups(ep=dist.group.WORLD)
    mine = layer.experts.shard(groups)
    drawn = layer.tokens(13, seed=me.rank)
    same = layer.tokens(13)
    for waits, call in (
        (1, lambda: dispatched(drawn, mine, groups)),
        (1, lambda: dispatched(drawn, mine, groups, chunks=3)),
        (1, lambda: dispatched(drawn, mine, groups, row_per_expert=True)),
        (0, lambda: dispatched(drawn, mine, groups, max_tokens=20)),
        (0, lambda: dispatched(drawn, mine, groups, max_tokens=20, chunks=3)),
        (0, lambda: replicated(same, mine, groups)),
        (0, lambda: replicated(same, mine, groups, reduction="reduce_scatter")),
    ):
        call()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            call()
            torch.cuda.set_sync_debug_mode("default")
        found = [str(warning.message) for warning in caught]
        found = [text for text in found if "synchronizing CUDA operation" in text]
        assert len(found) == waits, (waits, found)


def captured(me: Rank) -> None:
    """What does not wait for the device, replayed from a CUDA graph with other routings."""
    layer = exact_layer(me)
    for groups, kind in both_kinds(me):
        mine = layer.experts.shard(groups)
        forms: list[dict[str, Any]] = [{"reduction": "all_reduce"}]
        if kind == "ep":
            forms += [{"max_tokens": 20}, {"max_tokens": 20, "chunks": 3}]
        for form in forms:
            run = replicated if "reduction" in form else dispatched
            own = 0 if run is replicated else me.rank
            drawn = layer.tokens(13, seed=own)
            run(drawn, mine, groups, **form)  # NCCL connects outside of the capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Only this thread is kept from waiting: PyTorch's watchdog looks at older exchanges.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                out = run(drawn, mine, groups, **form)
            for seed in (50, 60):
                for held, new in zip(drawn, layer.tokens(13, seed=seed + own), strict=True):
                    held.copy_(new)
                graph.replay()
                torch.cuda.synchronize()
                layer.check(out, *drawn)
