# SPDX-License-Identifier: Apache-2.0
"""Where the time of one call goes: each launch's time, its bytes and operations, its limit.

The kernels' own durations come from torch.profiler (CUPTI) on replays of the graph that the
benchmark times, so the L2 cache is as cold as there; the time between them is the difference to
the time of the whole call without the profiler.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from floors import Shape

# Of mma.sync m16n8k16 on an H200, see docs/measurements.md; pass another chip's.
H200_MMA_SYNC_RATE = 636e12


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step has to move and to compute."""

    bytes: float
    operations: float


def work_of_steps(shape: Shape, tokens: int, touched: float, number_size: float) -> dict[str, Work]:
    """By step. What stays in the L2 cache between two steps is counted all the same."""
    slots = tokens * shape.top_k
    first = touched * shape.hidden * shape.fc1_rows * number_size
    second = touched * shape.hidden * shape.intermediate * number_size
    between = 2 * slots * shape.intermediate
    rows_out = 2 * slots * shape.hidden
    steps = {
        "route": Work(8 * slots + 8 * slots, 0),
        "GEMM 1": Work(
            first + 2 * tokens * shape.hidden + between, 2 * slots * shape.hidden * shape.fc1_rows
        ),
        "GEMM 2": Work(second + between + rows_out, 2 * slots * shape.hidden * shape.intermediate),
        "finalize": Work(rows_out + 2 * tokens * shape.hidden, slots * shape.hidden),
    }
    # One launch for everything still has to hand the values from one product to the other.
    gemms = (steps["GEMM 1"], steps["GEMM 2"])
    whole = sum(step.bytes for step in gemms) - rows_out + 2 * tokens * shape.hidden
    return steps | {"whole layer": Work(whole, sum(step.operations for step in gemms))}


def steps_of_names(names: Sequence[str]) -> list[str]:
    """Which step each kernel of one call belongs to, in launch order.

    By the kernels' names; the first GEMM is GEMM 1, the next GEMM 2. A kernel of neither kind is a
    step of its own, under its name.
    """
    steps = []
    gemms = 0
    for name in names:
        lower = name.lower()
        if "layer" in lower:
            steps.append("whole layer")
        elif "gemm" in lower:
            gemms += 1
            steps.append(f"GEMM {min(gemms, 2)}")
        elif any(word in lower for word in ("route", "count", "plan", "scatter", "memset")):
            steps.append("route")
        elif "finalize" in lower:
            steps.append("finalize")
        elif "split" in lower or "reduce" in lower:
            steps.append(f"GEMM {max(1, min(gemms, 2))}")
        else:
            steps.append(name.split("(")[0].split("<")[0][-40:])
    return steps


def durations(events: Sequence[tuple[float, str, float]], calls: int) -> list[tuple[str, float]]:
    """Kernels of one call in launch order, each with its median microseconds.

    Args:
        events: (start, name, microseconds) of every kernel of several calls, all alike.
        calls: how many.

    Raises:
        ValueError: the events are not the same number of kernels for each call.
    """
    ordered = sorted(events)
    if calls < 1 or not ordered or len(ordered) % calls:
        raise ValueError(f"{len(ordered)} kernels are no whole number for each of {calls} calls")
    each = len(ordered) // calls
    result = []
    for index in range(each):
        mine = ordered[index::each]
        result.append((mine[0][1], statistics.median(time for _, _, time in mine)))
    return result


def account_of(
    cell: dict[str, Any],
    shape: Shape,
    number_size: float,
    kernels: Sequence[tuple[str, float]],
    total_us: float,
    bandwidth: float,
    rate: float = H200_MMA_SYNC_RATE,
) -> dict[str, Any]:
    """The account of one cell: {model, tokens, weights, total_us, launches: [...]}.

    A launch is {step, us, bytes, operations, limit_us, bound, of_limit}; the last one, "gaps", is
    the time in which no kernel runs. Where a step takes several kernels they are added.
    """
    work = work_of_steps(shape, cell["tokens"], cell["touched_experts"], number_size)
    times: dict[str, float] = {}
    counts: dict[str, int] = {}
    for step, (_, us) in zip(steps_of_names([n for n, _ in kernels]), kernels, strict=True):
        times[step] = times.get(step, 0.0) + us
        counts[step] = counts.get(step, 0) + 1
    launches: list[dict[str, Any]] = []
    for step, us in times.items():
        launch: dict[str, Any] = {"step": step, "kernels": counts[step], "us": us}
        if step in work:
            memory = work[step].bytes / bandwidth * 1e6
            arithmetic = work[step].operations / rate * 1e6
            limit = max(memory, arithmetic)
            launch |= dataclasses.asdict(work[step])
            launch |= {
                "limit_us": limit,
                "bound": "memory" if memory >= arithmetic else "mma.sync",
                "of_limit": limit / us,
            }
        launches.append(launch)
    launches.append({"step": "gaps", "kernels": 0, "us": total_us - sum(times.values())})
    keys = ("model", "tokens", "weights", "routing")
    return {key: cell[key] for key in keys} | {"total_us": total_us, "launches": launches}


def markdown(accounts: Sequence[dict[str, Any]], bandwidth: float, rate: float) -> str:
    """A table of all accounts."""
    lines = [
        f"Limits: {bandwidth / 1e12:.2f} TB/s, mma.sync {rate / 1e12:.0f} TFLOP/s.",
        "",
        "| model | weights | M | step | kernels | us | share of the call | MB | GFLOP | bound | "
        "limit us | of limit |",
        "|---|---|--:|---|--:|--:|--:|--:|--:|---|--:|--:|",
    ]
    for account in accounts:
        head = f"| {account['model']} | {account['weights']} | {account['tokens']} "
        for launch in account["launches"]:
            share = launch["us"] / account["total_us"]
            row = f"| {launch['step']} | {launch['kernels'] or ''} | {launch['us']:.1f} "
            row += f"| {share:.0%} "
            if "limit_us" in launch:
                row += f"| {launch['bytes'] / 1e6:.2f} | {launch['operations'] / 1e9:.2f} "
                row += f"| {launch['bound']} | {launch['limit_us']:.1f} "
                row += f"| {launch['of_limit']:.0%} |"
            else:
                row += "| – | – | – | – | – |"
            lines.append(head + row)
        lines.append(f"{head}| the call | | {account['total_us']:.1f} | 100% | | | | | |")
    return "\n".join([*lines, ""])
