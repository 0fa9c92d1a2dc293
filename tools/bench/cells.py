# SPDX-License-Identifier: Apache-2.0
"""Measures one cell of the benchmark: a model, a number of tokens, a kind of weights, a routing."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch

import timing
from floors import Ceilings, floor_seconds, layer_bytes, layer_operations, weight_bytes
from layers import Layer, Model, Weights, copies_needed, make_layers
from ours import Ours, forced_tactics, sweep, tactics_of
from tolerances import TOLERANCES, relative_error

# A peer rounds more often than the layer does; what is wrong is wrong by much more.
_PEER_TOLERANCE_FACTOR = 3
_LOST_DEVICE: tuple[type[BaseException], ...] = (
    (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()
)


class NoSuchTactic(ValueError):
    """--tactics names something that the library does not have."""


class DeviceLost(RuntimeError):
    """After an illegal access nothing runs in this process any more; .cell is what there was."""

    def __init__(self, cell: dict[str, Any]) -> None:
        super().__init__("the device is lost to this process")
        self.cell = cell


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is the same for all cells.

    Attributes:
        dtype: of activations.
        ceilings: for the floor.
        cache_bytes: of the L2 cache.
        seconds: about how long to measure each number.
        tactics: "", "sweep" or the names of two tactics to force.
    """

    dtype: torch.dtype
    ceilings: Ceilings
    cache_bytes: int
    seconds: float
    tactics: str = ""


def key_of(cell: dict[str, Any]) -> tuple[str, str, int, str]:
    """What tells a cell from others."""
    return cell["model"], cell["weights"], cell["tokens"], cell.get("routing", "uniform")


def layers_of_cell(
    model: Model, tokens: int, weights: list[Weights], routing: str, settings: Settings
) -> list[Layer]:
    """As many layers as one graph captures; weights is filled up with the copies needed."""
    size = weights[0].number_size()
    trial = make_layers(model, tokens, 1, weights[:1], settings.dtype, routing)[0]
    copies = copies_needed(weight_bytes(model.shape, trial.touched, size), settings.cache_bytes)
    if weights[0].fc1.is_cuda:
        while len(weights) < copies:
            weights.append(weights[0].copy())
    estimate = floor_seconds(model.shape, tokens, trial.touched, size, settings.ceilings)
    count = timing.calls_in_a_graph(1.5 * estimate, min(copies, len(weights)))
    return make_layers(model, tokens, count, weights[:copies], settings.dtype, routing)


def describe(
    model: Model, tokens: int, layers: list[Layer], routing: str, settings: Settings
) -> dict[str, Any]:
    """A cell without results."""
    weights = layers[0].weights
    size = weights.number_size()
    touched = sum(layer.touched for layer in layers) / len(layers)
    floor = floor_seconds(model.shape, tokens, touched, size, settings.ceilings)
    return {
        "model": model.name,
        "tokens": tokens,
        "weights": weights.kind,
        "group_size": weights.group_size,
        "routing": routing,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "touched_experts": touched,
        "layers": len(layers),
        "bytes": layer_bytes(model.shape, tokens, touched, size),
        "operations": layer_operations(model.shape, tokens),
        "floor_us": floor * 1e6,
        "results": {},
    }


class References:
    """The float32 result of a layer's rows at both ends of the batch, computed once."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        tokens = layer.x.shape[0]
        ends = torch.arange(min(tokens, 6), device=layer.x.device)
        self.rows = torch.cat([ends, tokens - 1 - ends]).unique()
        self._known: dict[bool, torch.Tensor] = {}

    def error(self, implementation: Any) -> float:
        """Relative error on those rows; infinity for a NaN."""
        order = bool(getattr(implementation, "gate_first", False))
        if order not in self._known:
            self._known[order] = self._layer.reference(self.rows, order)
        out = implementation.run(self._layer)[self.rows]
        return relative_error(out.float(), self._known[order])


def time_one(implementation: Any, layers: list[Layer], seconds: float) -> timing.Timing:
    """Every layer in turn in one graph."""
    calls = [lambda layer=layer: implementation.run(layer) for layer in layers]
    return timing.measure(calls, seconds)


def measure(
    implementation: Any,
    layers: list[Layer],
    floor: float,
    references: References,
    settings: Settings,
) -> dict[str, Any]:
    """One implementation on one cell: {"us": ..} or {"why_not": ..} or {"wrong": error}."""
    first = layers[0]
    if why_not := implementation.why_not(first):
        return {"why_not": why_not}
    few = layers[: max(2, min(len(layers), round(0.5e-3 / floor)))]

    def quick(run: Callable[[Layer], object]) -> float:
        calls = [lambda layer=layer: run(layer) for layer in few]
        return timing.measure(calls, 0.0, fewest=3).median

    implementation.tune(first, quick)
    ours = isinstance(implementation, Ours)
    error = references.error(implementation)
    if not error < TOLERANCES[settings.dtype] * (1 if ours else _PEER_TOLERANCE_FACTOR):
        return {"wrong": error}
    result = time_one(implementation, layers, settings.seconds / 2)
    return {
        "us": result.median * 1e6,
        "low_us": result.low * 1e6,
        "high_us": result.high * 1e6,
        "replays": result.replays,
        "error": error,
        "config": implementation.chosen(first),
    }


def combined(result: dict[str, Any], again: timing.Timing) -> dict[str, Any]:
    """A result with a second round's: the mean of the medians, the wider spread."""
    return result | {
        "us": (result["us"] + again.median * 1e6) / 2,
        "low_us": min(result["low_us"], again.low * 1e6),
        "high_us": max(result["high_us"], again.high * 1e6),
        "replays": result["replays"] + again.replays,
    }


def measure_with_tactics(
    implementation: Any,
    layers: list[Layer],
    floor: float,
    references: References,
    settings: Settings,
) -> dict[str, Any]:
    """measure, under settings.tactics where the implementation is ours.

    Raises:
        NoSuchTactic: by --tactics.
    """
    if not settings.tactics or implementation.name != "sm80":
        return measure(implementation, layers, floor, references, settings)
    if settings.tactics == "sweep":
        result = measure(implementation, layers, floor, references, settings)
        result["sweep"] = sweep(
            layers[0], lambda: time_one(implementation, layers, settings.seconds / 3).median
        )
        return result
    names = [tactic.name for tactic in tactics_of(layers[0])]
    wanted = settings.tactics.split(",")
    if len(wanted) != 2 or not set(wanted) <= set(names):
        raise NoSuchTactic(f"--tactics={settings.tactics}: must be sweep, or two of {names}")
    with forced_tactics(names.index(wanted[0]), names.index(wanted[1])):
        result = measure(implementation, layers, floor, references, settings)
    result["config"] = " / ".join(wanted)
    return result


def fill(
    cell: dict[str, Any], implementations: list[Any], layers: list[Layer], settings: Settings
) -> None:
    """Measures what the cell has no result of yet; an error becomes {"failed": text}.

    Each is timed twice, the second time in the opposite order: a chip that has become warm is
    slower, and whoever came first would have had it cool.

    Raises:
        DeviceLost: an implementation took the device down; its result says so.
        NoSuchTactic: as measure_with_tactics.
    """
    floor = cell["floor_us"] * 1e-6
    references = References(layers[0])
    results = cell["results"]

    def first(one: Any) -> dict[str, Any]:
        return measure_with_tactics(one, layers, floor, references, settings)

    def second(one: Any) -> dict[str, Any]:
        return combined(results[one.name], time_one(one, layers, settings.seconds / 2))

    new = [one for one in implementations if one.name not in results]
    for one in new:
        _note(cell, one, first)
    if not settings.tactics:
        for one in reversed(new):
            if "us" in results[one.name]:
                _note(cell, one, second)


def _note(
    cell: dict[str, Any], implementation: Any, result_of: Callable[[Any], dict[str, Any]]
) -> None:
    """Puts a result into the cell, or how it failed."""
    name = implementation.name
    try:
        cell["results"][name] = result_of(implementation)
    except NoSuchTactic:
        raise
    except Exception as error:
        where = f"{cell['model']} {cell['weights']} M={cell['tokens']}"
        print(f"{name} failed on {where}: {error!r}", file=sys.stderr, flush=True)
        cause = f" from {error.__cause__!r}" if error.__cause__ else ""
        cell["results"][name] = {"failed": f"{error!r}{cause}"[:500]}
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        if isinstance(error, _LOST_DEVICE) and not out_of_memory:
            raise DeviceLost(cell) from error
