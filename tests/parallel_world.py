# SPDX-License-Identifier: Apache-2.0
"""Starts the ranks of a test and collects what each found: many cases for one start.

The ranks are forked from a server process that has imported PyTorch and computed nothing, so that
a start takes a tenth of a second instead of seconds. They find each other through a file, and
speak over the loopback interface only (gloo) or among the GPUs of this machine (NCCL).
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import multiprocessing
import os
import pathlib
import resource
import tempfile
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

# What every rank imports; the server imports it once.
_PRELOAD = ["torch", "torch.distributed.device_mesh", "fused_moe.parallel", "parallel_layer"]

PASSED = "passed"

# What a rank has to end its process group and itself.
_LEAVE_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class Rank:
    """What a case knows of its process."""

    rank: int
    size: int
    backend: str
    timeout: float

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.rank) if self.backend == "nccl" else torch.device("cpu")


def run_world(
    size: int,
    module: str,
    names: Sequence[str],
    *,
    backend: str = "gloo",
    group_timeout: float = 60.0,
    deadline: float = 120.0,
    environment: dict[str, str] | None = None,
    take_leave: bool = True,
    idle: int | None = None,
) -> dict[str, list[str]]:
    """Runs functions of a module, one after another, on every rank of a new world.

    A rank stops at its first failure, because its exchanges no longer match the others'.

    Args:
        size: the number of ranks.
        module: the module's name.
        names: of the functions; each takes a `Rank`. One of another module is called
            module.function.
        backend: "gloo" on the CPU, "nccl" with a GPU a rank.
        group_timeout: seconds, the process group's.
        deadline: seconds, after which ranks that still run are killed.
        environment: variables set in every rank.
        take_leave: whether ranks end their process group in order, which needs all of them.
        idle: a rank that is killed when all others have ended, because it only lets them wait.

    Returns:
        For each name what became of it on each rank: PASSED, a traceback, or why there is none.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    results = {name: ["not run: the rank ended before"] * size for name in names}
    with tempfile.TemporaryDirectory() as folder:
        ends: dict[Any, int] = {}
        processes = []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            me = Rank(rank, size, backend, group_timeout)
            process = context.Process(
                target=_serve,
                args=(me, module, names, folder, theirs, environment or {}, take_leave),
                daemon=True,
            )
            process.start()
            theirs.close()
            processes.append(process)
            ends[ours] = rank
        until = time.monotonic() + deadline
        while set(ends.values()) - {idle} and (left := until - time.monotonic()) > 0:
            for end in wait(list(ends), timeout=left):
                assert isinstance(end, Connection)
                rank = ends[end]
                try:
                    name, result = end.recv()
                    results[name][rank] = result
                except EOFError:
                    del ends[end]
        for rank, process in enumerate(processes):
            process.join(0 if rank in ends.values() else _LEAVE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
                late = f" after {deadline:g} s" if rank != idle else ""
                ended = f"not run: the rank was killed{late}"
                if rank not in ends.values():
                    stuck = f"the rank did not end within {_LEAVE_SECONDS} s of its last case"
                    results[names[-1]][rank] = stuck
            else:
                ended = f"not run: the rank ended with status {process.exitcode}"
            for name in names:
                if results[name][rank].startswith("not run"):
                    results[name][rank] = ended
    return results


def _serve(
    me: Rank,
    module: str,
    names: Sequence[str],
    folder: str,
    results: Connection,
    environment: dict[str, str],
    take_leave: bool,
) -> None:
    """The life of one rank."""
    # Nothing but the loopback interface, which is all that a sandbox has.
    os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="=lo", NCCL_IB_DISABLE="1")
    # Multicast through NVLink is the host's, not the test's: others may share its switches.
    os.environ.update(NCCL_NVLS_ENABLE="0", TORCH_SYMM_MEM_DISABLE_MULTICAST="1")
    os.environ.update(environment)
    # A rank that PyTorch's watchdog aborts must not write its gigabytes to a core file first.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    for number, name in enumerate(names):
        try:
            if number == 0:  # what goes wrong here is the first case's to tell
                _join(me, folder)
            place, _, function = name.rpartition(".")
            getattr(importlib.import_module(place or module), function)(me)
        except BaseException:
            results.send((name, traceback.format_exc()))
            # Neither waits for the other ranks nor tells them: what a process that crashes does.
            results.close()
            os._exit(1)
        results.send((name, PASSED))
    results.close()
    if not take_leave:
        os._exit(0)
    dist.destroy_process_group()


def _join(me: Rank, folder: str) -> None:
    """Meets the other ranks."""
    if me.backend == "nccl":
        torch.cuda.set_device(me.device)
    dist.init_process_group(
        me.backend,
        init_method=(pathlib.Path(folder) / "rendezvous").as_uri(),
        rank=me.rank,
        world_size=me.size,
        timeout=datetime.timedelta(seconds=me.timeout),
        device_id=me.device if me.backend == "nccl" else None,
    )
