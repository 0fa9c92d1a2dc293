# SPDX-License-Identifier: Apache-2.0
"""Times the whole layer, from expert ids to the output, beside its floor and its peers.

    bazel run //tools/bench:moe -- --tokens=1,64,4096 --json=/tmp/moe.json --plot=/tmp/moe.png

Medians of CUDA-graph replays, weights rotated so that the L2 cache cannot serve them, uniform
random routing. Each implementation's result is compared with the float32 reference first, on
rows from both ends; one that is wrong or fails is reported as that, not timed, and the program
then exits with status 1. On a CPU it runs too, to be tried; its numbers then say little.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from absl import app, flags
from tqdm import tqdm

import report
import timing
from floors import Ceilings, floor_seconds, layer_bytes, layer_operations, weight_bytes
from layers import (
    DTYPES,
    Layer,
    Model,
    Weights,
    copies_needed,
    find_model,
    make_layers,
    make_weights,
)
from ours import Ours, forced_tactics, sweep, tactics_of
from tolerances import TOLERANCES, relative_error

_MODELS = flags.DEFINE_list(
    "models",
    [
        "Mixtral-8x7B",
        "Qwen3-30B-A3B",
        "DeepSeek-V2-Lite",
        "Qwen3-Next-80B-A3B",
        "gpt-oss-20b-sizes",
        "DeepSeek-V3-TP8",
    ],
    "Names of fused_moe.models; NAME-TP8 is one of 8 shards, NAME-sizes has Swiglu, no biases.",
)
_TOKENS = flags.DEFINE_list("tokens", ["1", "8", "64", "512", "4096", "16384"], "Rows of x.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", sorted(DTYPES), "Of activations.")
_WEIGHTS = flags.DEFINE_list("weights", ["same"], "Any of same (as activations), int8, uint8.")
_BACKENDS = flags.DEFINE_list(
    "backends",
    ["auto"],
    "Of sm80, cpu, and the peers torch_grouped_mm, triton. auto: this device's, and every peer "
    "that can be imported.",
)
_TRITON_ARCH = flags.DEFINE_enum(
    "triton_arch",
    "sm80",
    ["sm80", "native"],
    "What the Triton peer generates: Ampere code on any GPU, or the GPU's own.",
)
_TACTICS = flags.DEFINE_string(
    "tactics", "", "FIRST,SECOND: names of tactics to force; sweep: time every one of them."
)
_SECONDS = flags.DEFINE_float("seconds", 0.1, "About how long to measure each number.")
_BANDWIDTH = flags.DEFINE_float("bandwidth", 0, "Ceiling in TB/s. 0: a device copy's, measured.")
_RATE = flags.DEFINE_float("rate", 0, "Ceiling in TFLOP/s. 0: a large matrix product's, measured.")
_JSON = flags.DEFINE_string("json", "", "Where to write everything that was measured.")
_PLOT = flags.DEFINE_string("plot", "", "Where to draw it, a PNG.")
_TABLE = flags.DEFINE_string("table", "", "Where to write the printed table, Markdown.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of inputs and routing.")

_PEERS = {
    "torch_grouped_mm": ("peers.torch_grouped_mm", "TorchGroupedMm", False),
    "triton": ("peers.triton_moe", "TritonMoe", True),
}
# A peer rounds more often than the layer does; what is wrong is wrong by much more.
_PEER_TOLERANCE_FACTOR = 3


def load_implementations(device: torch.device) -> list[Any]:
    """What --backends names; under auto, a peer that cannot be imported is left out, aloud."""
    wanted = list(_BACKENDS.value)
    auto = wanted == ["auto"]
    if auto:
        wanted = ["cpu"] if device.type == "cpu" else ["sm80", *_PEERS]
    implementations: list[Any] = []
    for name in wanted:
        if name not in _PEERS:
            implementations.append(Ours(name))
            continue
        module, factory, takes_arch = _PEERS[name]
        try:
            make = getattr(importlib.import_module(module), factory)
        except ImportError as error:
            if not auto:
                raise
            print(f"without {name}: {error}", file=sys.stderr)
            continue
        arch = None if _TRITON_ARCH.value == "native" else _TRITON_ARCH.value
        implementations.append(make(arch) if takes_arch else make())
    return implementations


def error_of(implementation: Any, layer: Layer) -> float:
    """Relative error on rows from both ends of the batch; infinity for a NaN."""
    tokens = layer.x.shape[0]
    ends = torch.arange(min(tokens, 6), device=layer.x.device)
    rows = torch.cat([ends, tokens - 1 - ends]).unique()
    return relative_error(implementation.run(layer)[rows].float(), layer.reference(rows))


def time_one(implementation: Any, layers: list[Layer], seconds: float) -> timing.Timing:
    """Every layer in turn in one graph."""
    calls = [lambda layer=layer: implementation.run(layer) for layer in layers]
    return timing.measure(calls, seconds)


def measure_cell(
    implementation: Any, layers: list[Layer], floor: float, dtype: torch.dtype
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
    error = error_of(implementation, first)
    if not error < TOLERANCES[dtype] * (1 if ours else _PEER_TOLERANCE_FACTOR):
        return {"wrong": error}
    result = time_one(implementation, layers, _SECONDS.value)
    return {
        "us": result.median * 1e6,
        "low_us": result.low * 1e6,
        "high_us": result.high * 1e6,
        "replays": result.replays,
        "error": error,
        "config": implementation.chosen(first),
    }


def layers_of_cell(
    model: Model, tokens: int, weights: list[Weights], size: int, ceilings: Ceilings, cache: int
) -> list[Layer]:
    """As many layers as one graph captures; weights is filled up with the copies needed."""
    dtype = DTYPES[_DTYPE.value]
    trial = make_layers(model, tokens, 1, weights[:1], dtype)[0]
    copies = copies_needed(weight_bytes(model.shape, trial.touched, size), cache)
    if weights[0].fc1.is_cuda:
        while len(weights) < copies:
            weights.append(weights[0].copy())
    estimate = floor_seconds(model.shape, tokens, trial.touched, size, ceilings)
    count = timing.calls_in_a_graph(1.5 * estimate, min(copies, len(weights)))
    return make_layers(model, tokens, count, weights[:copies], dtype)


def run_cells(ceilings: Ceilings, device: torch.device) -> list[dict[str, Any]]:
    """All models, weights and token counts."""
    implementations = load_implementations(device)
    dtype = DTYPES[_DTYPE.value]
    models = [find_model(name) for name in _MODELS.value]
    tokens_list = [int(tokens) for tokens in _TOKENS.value]
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1
    cells: list[dict[str, Any]] = []
    total = len(models) * len(_WEIGHTS.value) * len(tokens_list)
    bar = tqdm(total=total, unit="cell", mininterval=1.0)
    for model in models:
        for kind in _WEIGHTS.value:
            weights = [make_weights(model, kind, dtype, device)]
            for tokens in tokens_list:
                bar.set_postfix_str(f"{model.name} {kind} M={tokens}")
                size = dtype.itemsize if kind == "same" else 1
                layers = layers_of_cell(model, tokens, weights, size, ceilings, cache)
                touched = sum(layer.touched for layer in layers) / len(layers)
                floor = floor_seconds(model.shape, tokens, touched, size, ceilings)
                cell: dict[str, Any] = {
                    "model": model.name,
                    "tokens": tokens,
                    "weights": kind,
                    "dtype": _DTYPE.value,
                    "touched_experts": touched,
                    "layers": len(layers),
                    "bytes": layer_bytes(model.shape, tokens, touched, size),
                    "operations": layer_operations(model.shape, tokens),
                    "floor_us": floor * 1e6,
                    "results": {},
                }
                for implementation in implementations:
                    cell["results"][implementation.name] = run_or_report(
                        implementation, layers, floor, dtype
                    )
                cells.append(cell)
                del layers
                bar.update()
            del weights
            if device.type == "cuda":
                torch.cuda.empty_cache()
    bar.close()
    return cells


def run_or_report(
    implementation: Any, layers: list[Layer], floor: float, dtype: torch.dtype
) -> dict[str, Any]:
    """run_with_tactics; an error becomes {"failed": text}, so that the other numbers are kept."""
    try:
        return run_with_tactics(implementation, layers, floor, dtype)
    except app.UsageError:
        raise
    except Exception as error:
        first = layers[0]
        print(
            f"{implementation.name} failed on {first.model.name} M={first.x.shape[0]}: {error!r}",
            file=sys.stderr,
        )
        return {"failed": repr(error)}


def run_with_tactics(
    implementation: Any, layers: list[Layer], floor: float, dtype: torch.dtype
) -> dict[str, Any]:
    """measure_cell, under --tactics where the implementation is ours."""
    if not _TACTICS.value or implementation.name != "sm80":
        return measure_cell(implementation, layers, floor, dtype)
    if _TACTICS.value == "sweep":
        result = measure_cell(implementation, layers, floor, dtype)
        result["sweep"] = sweep(
            layers[0], lambda: time_one(implementation, layers, _SECONDS.value / 3).median
        )
        return result
    names = [tactic.name for tactic in tactics_of(layers[0])]
    wanted = _TACTICS.value.split(",")
    if len(wanted) != 2 or not set(wanted) <= set(names):
        raise app.UsageError(f"--tactics={_TACTICS.value}: must be sweep, or two of {names}")
    with forced_tactics(names.index(wanted[0]), names.index(wanted[1])):
        result = measure_cell(implementation, layers, floor, dtype)
    result["config"] = " / ".join(wanted)
    return result


def host_overhead(device: torch.device) -> dict[str, float]:
    """Microseconds of host time of one eager call, a layer so small that nothing else counts."""
    model = find_model("Qwen3-30B-A3B")
    small = dataclasses.replace(
        model, shape=dataclasses.replace(model.shape, hidden=128, intermediate=64)
    )
    dtype = DTYPES[_DTYPE.value]
    weights = [make_weights(small, "same", dtype, device)]
    (layer,) = make_layers(small, 4, 1, weights, dtype)
    implementation = Ours("cpu" if device.type == "cpu" else "sm80")
    result = timing.host_seconds(lambda: implementation.run(layer))
    return {"us": result.median * 1e6, "low_us": result.low * 1e6, "high_us": result.high * 1e6}


def main(argv: list[str]) -> None:
    """Measures, prints, writes."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags are written --name=value")
    begin = time.perf_counter()
    torch.manual_seed(_SEED.value)
    gpu = torch.cuda.is_available() and _BACKENDS.value != ["cpu"]
    device = torch.device("cuda" if gpu else "cpu")
    chip = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    measured = timing.measured_ceilings(device, DTYPES[_DTYPE.value])
    ceilings = Ceilings(
        bandwidth=_BANDWIDTH.value * 1e12 or measured.bandwidth,
        rate=_RATE.value * 1e12 or measured.rate,
    )
    document = {
        "chip": chip,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "torch": torch.__version__,
        "bandwidth_TBps": ceilings.bandwidth / 1e12,
        "rate_TFLOPps": ceilings.rate / 1e12,
        "measured_bandwidth_TBps": measured.bandwidth / 1e12,
        "measured_rate_TFLOPps": measured.rate / 1e12,
        "host_overhead": host_overhead(device),
        "cells": run_cells(ceilings, device),
    }
    document["seconds"] = time.perf_counter() - begin
    text = report.markdown(document)
    print(text)
    if _TABLE.value:
        with open(_TABLE.value, "w", encoding="utf-8") as file:
            file.write(text)
    if _JSON.value:
        with open(_JSON.value, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
    if _PLOT.value:
        import plot  # matplotlib takes a second to import

        plot.draw(document, _PLOT.value)
    bad = [
        f"{name} on {cell['model']} {cell['weights']} M={cell['tokens']}: "
        + (result.get("failed") or f"error {result['wrong']:.1e}")
        for cell in document["cells"]
        for name, result in cell["results"].items()
        if "wrong" in result or "failed" in result
    ]
    if bad:
        sys.exit(
            "not timed, because the result was wrong or the call failed:\n  " + "\n  ".join(bad)
        )


if __name__ == "__main__":
    app.run(main)
