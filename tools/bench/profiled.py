# SPDX-License-Identifier: Apache-2.0
"""Reads the durations of kernels under the profiler."""

from __future__ import annotations

import torch

import account
import timing
from cells import Settings, describe, layers_of_cell
from layers import Model, make_weights
from ours import Ours


def kernels_of(calls: list[timing.Call], replays: int) -> list[tuple[str, float]]:
    """The kernels of one call, as account.durations returns them, from replays of one graph."""
    graph = timing.capture(calls)
    graph.replay()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
    events = [
        (event.time_range.start, event.name, event.time_range.elapsed_us())
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return account.durations(events, replays * len(calls))


def measure(
    model: Model, tokens: int, kind: str, routing: str, settings: Settings, rate: float
) -> dict[str, object]:
    """The account of the library's own call on one cell."""
    weights = [make_weights(model, kind, settings.dtype, torch.device("cuda"))]
    layers = layers_of_cell(model, tokens, weights, routing, settings)
    cell = describe(model, tokens, layers, routing, settings)
    ours = Ours("sm80")
    calls = [lambda layer=layer: ours.run(layer) for layer in layers]
    total = timing.measure(calls, settings.seconds).median
    replays = max(3, min(20, round(0.02 / total / len(calls))))
    kernels = kernels_of(calls, replays)
    return account.account_of(
        cell,
        model.shape,
        weights[0].number_size(),
        kernels,
        total * 1e6,
        settings.ceilings.bandwidth,
        rate,
    )
