# SPDX-License-Identifier: Apache-2.0
"""Layers over several processes: gloo on the CPU everywhere, NCCL where there are two GPUs."""

from __future__ import annotations

import functools

import pytest
import torch

from parallel_world import PASSED, run_world

EVERYWHERE = (
    "replicated_exact",
    "replicated_formats",
    "replicated_same_bits",
    "dispatched_exact",
    "dispatched_without_scales",
    "dispatched_formats",
    "dispatched_same_bits",
    "meshes_with_one_kind",
    "ranks_that_disagree",
    "refused_before_anything_is_sent",
    "parallel_graphs.refused_in_a_graph",
    "parallel_random.random_calls",
)
FOUR_RANKS = (
    "meshes",
    "groups_of_some_ranks",
    "groups_that_are_no_mesh",
    "documented_program",
)
ON_GPUS = ("parallel_graphs.host_waits_once", "parallel_graphs.captured")
FAULTS = (
    "rank_dies_in_replicated",
    "rank_dies_in_dispatched",
    "rank_dies_in_padded",
    "rank_hangs",
)


def names_for(size: int, backend: str) -> tuple[str, ...]:
    names: tuple[str, ...] = EVERYWHERE
    if size == 4:
        names += FOUR_RANKS
    return names + ON_GPUS if backend == "nccl" else names


@functools.cache
def world(size: int, backend: str) -> dict[str, list[str]]:
    return run_world(size, "parallel_cases", names_for(size, backend), backend=backend)


def require_gpus(count: int) -> None:
    """Skips where there are fewer; `--config=gpu` makes it a failure where there is none at all."""
    found = torch.cuda.device_count()
    if found == 0:
        pytest.skip("needs two GPUs, and PyTorch sees none")
    if found < count:
        pytest.skip(f"needs {count} CUDA devices, and there are {found}")


def check(results: dict[str, list[str]], name: str, but: int | None = None) -> None:
    for rank, result in enumerate(results[name]):
        assert rank == but or result == PASSED, f"rank {rank} of {len(results[name])}:\n{result}"


@pytest.mark.parametrize("name", names_for(2, "gloo"))
def test_two_processes(name: str) -> None:
    check(world(2, "gloo"), name)


@pytest.mark.parametrize("name", names_for(4, "gloo"))
def test_four_processes(name: str) -> None:
    check(world(4, "gloo"), name)


@pytest.mark.parametrize("name", names_for(2, "nccl"))
def test_two_gpus(name: str) -> None:
    require_gpus(2)
    check(world(2, "nccl"), name)


@pytest.mark.parametrize("name", names_for(4, "nccl"))
def test_four_gpus(name: str) -> None:
    require_gpus(4)
    check(world(4, "nccl"), name)


def check_fault(name: str, results: dict[str, list[str]]) -> None:
    """All ranks but 1 found what they had to; rank 1 did what it was there for."""
    assert "rank_dies" not in name or "this rank dies" in results[name][1]
    check(results, name, but=1)


@pytest.mark.parametrize("name", (*FAULTS, "rank_fails_alone", "rank_hangs_in_mesh"))
def test_the_others_fail_where_a_rank_does_not_go_on(name: str) -> None:
    # A death shows at once; a rank that hangs does when the timeout is over.
    timeout = 20 if "rank_dies" in name else 5
    size = 4 if name == "rank_hangs_in_mesh" else 3
    results = run_world(
        size,
        "parallel_faults",
        [name],
        group_timeout=timeout,
        deadline=60,
        take_leave=False,
        idle=None if "rank_dies" in name else 1,
    )
    check_fault(name, results)


@pytest.mark.parametrize("name", (*FAULTS, "rank_dies_in_a_graph"))
def test_the_other_gpu_fails_where_a_rank_does_not_go_on(name: str) -> None:
    require_gpus(2)
    waits = {} if name == "rank_dies_in_a_graph" else {"TORCH_NCCL_BLOCKING_WAIT": "1"}
    results = run_world(
        2,
        "parallel_faults",
        [name],
        backend="nccl",
        group_timeout=5,
        deadline=60,
        environment=waits,
        take_leave=False,
        idle=None if "rank_dies" in name else 1,
    )
    check_fault(name, results)


def test_the_other_process_ends_where_the_host_does_not_wait() -> None:
    require_gpus(2)
    name = "rank_dies_and_host_does_not_wait"
    results = run_world(
        2,
        "parallel_faults",
        [name],
        backend="nccl",
        group_timeout=5,
        deadline=100,
        # The watchdog waits four times this before it ends the process: a minute by default.
        environment={"TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1000"},
        take_leave=False,
    )
    assert "this rank dies" in results[name][1]
    # PyTorch's watchdog aborts the process, or an error comes first.
    ended = results[name][0]
    assert "status -6" in ended or "Error" in ended, ended
    assert "neither an error nor" not in ended, ended
