# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels of the peers before anything is measured, in many processes.

A worker runs each configuration once, on memory that nobody initialised, so that Triton's cache on
disk holds what the measuring process will ask for. Compiling one kernel takes a second or two, and
there are hundreds.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

import implementations
from layers import DTYPES, Layer, Weights, find_model, group_size_of, make_layers


@dataclasses.dataclass(frozen=True)
class Task:
    """One peer on one cell."""

    peer: str
    model: str
    weights: str
    tokens: int
    dtype: str


def _empty_weights(task: Task) -> Weights:
    """Weights of the right shapes with any contents."""
    shape = find_model(task.model).shape
    group = group_size_of(shape, task.weights)
    dtype = DTYPES[task.dtype]
    stored = {"same": dtype, "int8": torch.int8}.get(task.weights, torch.uint8)
    tensors, scales = [], []
    for rows, columns in ((shape.fc1_rows, shape.hidden), (shape.hidden, shape.intermediate)):
        kept = columns // 2 if group else columns
        tensors.append(torch.empty(shape.experts, rows, kept, dtype=stored, device="cuda"))
        if group:
            scales.append(
                torch.empty(shape.experts, rows, columns // group, dtype=dtype, device="cuda")
            )
        elif task.weights != "same":
            scales.append(torch.empty(shape.experts, rows, device="cuda"))
    return Weights(tensors[0], tensors[1], scales, task.weights, group)


_peers: dict[str, object] = {}


def _compile(task: Task, files: str, triton_arch: str | None) -> str:
    """Runs in a worker; says what went wrong, or nothing."""
    implementations.prepare_environment(triton_arch)
    try:
        if task.peer not in _peers:
            _peers[task.peer] = implementations.make_peer(task.peer, files, triton_arch)
        peer: implementations.Any = _peers[task.peer]
        model = find_model(task.model)
        (layer,) = make_layers(model, task.tokens, 1, [_empty_weights(task)], DTYPES[task.dtype])
        if peer.why_not(layer):
            return ""

        def once(run: Callable[[Layer], object]) -> float:
            run(layer)
            return 1.0

        peer.tune(layer, once)
        torch.cuda.synchronize()
    except Exception as error:  # the measuring process will meet it again and report it
        return f"{task}: {error!r}"
    finally:
        torch.cuda.empty_cache()
    return ""


def precompile(tasks: list[Task], files: str, triton_arch: str | None, workers: int) -> float:
    """Compiles for all tasks; returns the seconds it took. workers = 0: one a core, up to 14."""
    begin = time.perf_counter()
    # What is large is compiled first: a worker that gets it last would keep the others waiting.
    tasks = sorted(tasks, key=lambda task: -task.tokens)
    workers = workers or max(1, min(14, (os.cpu_count() or 2) - 1))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        running = [pool.submit(_compile, task, files, triton_arch) for task in tasks]
        done = concurrent.futures.as_completed(running)
        for future in tqdm(done, total=len(tasks), unit="compiled", mininterval=2.0):
            try:
                problem = future.result()
            except concurrent.futures.process.BrokenProcessPool:
                print("a compiling process died; going on without the rest", flush=True)
                break
            if problem:
                print(problem, flush=True)
    return time.perf_counter() - begin
