# SPDX-License-Identifier: Apache-2.0
"""Times calls on a GPU as servers see them: captured in a CUDA graph, replayed, caches cold.

On a CPU the same interface times plain calls, so that the benchmark runs, for itself to be
tried, where there is no GPU.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from floors import Ceilings

Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call: the median of the replays, the tenth and the ninetieth percentile."""

    median: float
    low: float
    high: float
    replays: int


def _summary(times: list[float], calls: int) -> Timing:
    ordered = sorted(seconds / calls for seconds in times)
    last = len(ordered) - 1
    return Timing(
        median=statistics.median(ordered),
        low=ordered[round(0.1 * last)],
        high=ordered[round(0.9 * last)],
        replays=len(ordered),
    )


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A graph of the calls, one after another, each of which ran once before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _replay_seconds(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e-3 for a, b in itertools.pairwise(marks)]


def measure(calls: Sequence[Call], seconds: float, fewest: int = 5) -> Timing:
    """Times the calls, made in turn so that each finds the caches full of the others' data.

    Args:
        calls: captured in one graph, whose time is divided by their number: the gaps between
            them are counted, as in a model of many layers, the graph's launch hardly.
        seconds: about how long to measure.
        fewest: the fewest replays.
    """
    if not torch.cuda.is_available():
        return _measure_cpu(calls, seconds)
    graph = capture(calls)
    graph.replay()
    estimate = statistics.median(_replay_seconds(graph, 2))
    replays = max(fewest, min(200, int(seconds / max(estimate, 1e-6))))
    timing = _summary(_replay_seconds(graph, replays), len(calls))
    del graph
    return timing


def measure_in_turns(
    groups: Sequence[Sequence[Call]], seconds: float, fewest: int = 5
) -> list[list[float]]:
    """Times groups of calls against each other, on a chip whose clock changes with its load.

    Args:
        groups: what `measure` takes, each captured in a graph of its own.
        seconds: about how long to measure, all groups together.
        fewest: the fewest rounds.

    Returns:
        For each group the seconds a call, round by round. A round replays each group once; the one
        that begins changes from round to round.
    """
    cuda = torch.cuda.is_available()
    graphs = [capture(calls) for calls in groups] if cuda else []

    def once(index: int) -> float:
        if cuda:
            (taken,) = _replay_seconds(graphs[index], 1)
        else:
            start = time.perf_counter()
            for call in groups[index]:
                call()
            taken = time.perf_counter() - start
        return taken / len(groups[index])

    numbers = range(len(groups))
    start = time.perf_counter()
    for index in numbers:
        once(index)
    rounds = max(fewest, min(200, int(seconds / max(time.perf_counter() - start, 1e-6))))
    result: list[list[float]] = [[] for _ in numbers]
    for turn in range(rounds):
        for step in numbers:
            index = (turn + step) % len(groups)
            result[index].append(once(index))
    return result


def _measure_cpu(calls: Sequence[Call], seconds: float) -> Timing:
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - begin < seconds and len(times) < 100):
        start = time.perf_counter()
        for call in calls:
            call()
        times.append(time.perf_counter() - start)
    return _summary(times, len(calls))


def calls_in_a_graph(estimate: float, copies: int) -> int:
    """How many calls to capture: every copy once, and a millisecond at least, up to 32."""
    return max(copies, min(32, max(1, round(1e-3 / max(estimate, 1e-6)))))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a device copy moves, read and write counted.

    The copy is a kernel: as a graph's memcpy node it would go to a copy engine, at two thirds of
    the speed.
    """
    size = 2 << 30 if device.type == "cuda" else 64 << 20
    source = torch.zeros(size // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copies = [lambda: torch.bitwise_not(source, out=target)] * 2
    return 2 * size / measure(copies, 0.1).median


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of PyTorch's matrix product on large squares."""
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / measure([lambda: a @ b.T], 0.15).median


def measured_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """What this chip does at best, measured now."""
    ceilings = Ceilings(copy_bandwidth(device), matmul_rate(device, dtype))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return ceilings


def host_seconds(call: Call, repeats: int = 100, burst: int = 16) -> Timing:
    """Host time of one call in eager mode, in bursts as a model's layers make them.

    The device is waited for between bursts, outside of what is timed, so that a full launch
    queue is not mistaken for work of the host.
    """
    cuda = torch.cuda.is_available()
    for _ in range(20):
        call()
    times = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(burst):
                call()
            times.append(time.perf_counter() - start)
    finally:
        gc.enable()
    return _summary(times, burst)
