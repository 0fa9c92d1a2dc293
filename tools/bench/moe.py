# SPDX-License-Identifier: Apache-2.0
"""Times the whole layer, from expert ids to the output, beside its floor and its peers.

    bazel run //tools/bench:moe -- --tokens=1,64,4096 --json=/tmp/moe.json --plot=/tmp/moe.png
    bazel run //tools/bench:moe -- --peers=$PWD/.peers/peers.tar.xz --weights=same,int8,int4 \
        --json=/tmp/all.json --summary=/tmp/summary.json

Medians of CUDA-graph replays, weights rotated so that the L2 cache cannot serve them, uniform
random routing. Each implementation's result is compared with the float32 reference first, on
rows from both ends; one that is wrong or fails is reported as that, not timed, and the program
then exits with status 1. --peers adds vLLM's, SGLang's and Marlin's layers (tools/bench/
bring_peers.py makes the file). The JSON is written after every cell; --merge=FILE goes on where an
earlier run ended. On a CPU it runs too, to be tried; its numbers then say little.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import sys
import time
from typing import Any

import torch
from absl import app, flags
from tqdm import tqdm

import cells
import implementations
import report
import summary
import timing
from cells import Settings, key_of
from floors import Ceilings
from layers import DTYPES, MEASURED_MODELS, Weights, find_model, make_layers, make_weights
from ours import Ours

_MODELS = flags.DEFINE_list(
    "models",
    list(MEASURED_MODELS),
    "Names of fused_moe.models; NAME-TP8 is one of 8 shards, NAME-sizes has Swiglu, no biases.",
)
_TOKENS = flags.DEFINE_list("tokens", ["1", "8", "64", "512", "4096", "16384"], "Rows of x.")
_CELLS = flags.DEFINE_list(
    "cells", [], "MODEL@TOKENS, instead of every one of --models with every one of --tokens."
)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", sorted(DTYPES), "Of activations.")
_KINDS = ("same", "int8", "uint8", "int4", "mxfp4")
_WEIGHTS = flags.DEFINE_list(
    "weights", ["same"], "Any of same (as activations), int8, uint8, int4 (groups of 128), mxfp4."
)
_ROUTING = flags.DEFINE_enum("routing", "uniform", ["uniform", "zipf"], "How tokens choose.")
_BACKENDS = flags.DEFINE_list(
    "backends",
    ["auto"],
    "Of sm80, cpu, and the peers vllm, sglang, marlin (these by --peers), triton, "
    "torch_grouped_mm. auto: this device's, and every peer that can be imported.",
)
_PEERS = flags.DEFINE_string("peers", "", "What bring_peers.py made, a file or an unpacked folder.")
_TRITON_ARCH = flags.DEFINE_enum(
    "triton_arch",
    "sm80",
    ["sm80", "native"],
    "What the peers in Triton generate: Ampere code on any GPU, or the GPU's own.",
)
_WORKERS = flags.DEFINE_integer(
    "workers", 0, "Processes that compile the peers in Triton first; 0: one a core, -1: none."
)
_TACTICS = flags.DEFINE_string(
    "tactics", "", "FIRST,SECOND: names of tactics to force; sweep: time every one of them."
)
_ACCOUNT = flags.DEFINE_bool(
    "account", False, "Instead of peers: the time of each launch of ours, by the profiler."
)
_MMA_RATE = flags.DEFINE_float("mma_rate", 636, "TFLOP/s that mma.sync can issue, for --account.")
_SECONDS = flags.DEFINE_float("seconds", 0.1, "About how long to measure each number.")
_BANDWIDTH = flags.DEFINE_float("bandwidth", 0, "Ceiling in TB/s. 0: a device copy's, measured.")
_RATE = flags.DEFINE_float("rate", 0, "Ceiling in TFLOP/s. 0: a large matrix product's, measured.")
_JSON = flags.DEFINE_string("json", "", "Where to write everything that was measured.")
_MERGE = flags.DEFINE_list("merge", [], "JSON of earlier runs, whose cells are taken over.")
_SUMMARY = flags.DEFINE_string("summary", "", "Where to write ours beside the best peer, JSON.")
_PLOT = flags.DEFINE_string("plot", "", "Where to draw it, a PNG.")
_TABLE = flags.DEFINE_string("table", "", "Where to write the printed table, Markdown.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of inputs and routing.")

_RESTARTS = "FUSED_MOE_BENCH_RESTARTS"


def _triton_arch() -> str | None:
    return None if _TRITON_ARCH.value == "native" else str(_TRITON_ARCH.value)


def write_json(document: dict[str, Any]) -> None:
    """Writes --json, whole or not at all."""
    if _JSON.value:
        target = pathlib.Path(_JSON.value)
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(document, indent=1), encoding="utf-8")
        partial.replace(target)


def wanted_cells() -> list[tuple[str, str, int, str]]:
    """The keys of the cells that the flags ask for, those of one weight tensor together.

    Raises:
        app.UsageError: --cells is malformed.
    """
    pairs = [(model, tokens) for model in _MODELS.value for tokens in _TOKENS.value]
    if _CELLS.value:
        pairs = [(model, tokens) for model, _, tokens in (c.partition("@") for c in _CELLS.value)]
    if wrong := [tokens for _, tokens in pairs if not tokens.isdigit()]:
        raise app.UsageError(f"{wrong}: must be numbers of tokens, in --cells as MODEL@TOKENS")
    models = dict.fromkeys(model for model, _ in pairs)
    return [
        (model, kind, int(tokens), _ROUTING.value)
        for model in models
        for kind in _WEIGHTS.value
        for name, tokens in pairs
        if name == model
    ]


def compile_peers(names: list[str], known: dict[Any, dict[str, Any]]) -> None:
    """Has other processes compile what is in Triton and not measured yet."""
    if _WORKERS.value < 0:
        return
    import precompile

    tasks = [
        precompile.Task(name, model, kind, tokens, _DTYPE.value)
        for model, kind, tokens, routing in wanted_cells()
        for name in names
        if name in implementations.IN_TRITON
        and name not in known.get((model, kind, tokens, routing), {}).get("results", {})
    ]
    tasks = [dataclasses.replace(t, peer=t.peer.removesuffix("_sm80")) for t in tasks]
    if tasks:
        took = precompile.precompile(tasks, _PEERS.value, _triton_arch(), _WORKERS.value)
        print(f"compiled {len(tasks)} cells' peers in {took:.0f} s", flush=True)


def run_cells(document: dict[str, Any], settings: Settings, device: torch.device) -> None:
    """Measures all cells that are asked for; document["cells"] holds those known already."""
    known = {key_of(cell): cell for cell in document["cells"]}
    own = "cpu" if device.type == "cpu" else "sm80"
    loaded, absent = implementations.load(_BACKENDS.value, own, _PEERS.value, _triton_arch())
    names = [implementation.name for implementation in loaded]
    document["absent"] = document.get("absent", {}) | absent
    document["ampere"] = sorted(
        {n for n in names if implementations.is_ampere(n, _triton_arch())}
        | set(document.get("ampere", []))
    )
    notes = {one.name: one.note for one in loaded if getattr(one, "note", "")}
    document["notes"] = document.get("notes", {}) | notes
    if device.type == "cuda":
        compile_peers(names, known)
    bar = tqdm(total=len(wanted_cells()), unit="cell", mininterval=5.0)
    for (name, kind), keys in itertools.groupby(wanted_cells(), lambda key: key[:2]):
        model = find_model(name)
        weights: list[Weights] = []
        for key in keys:
            bar.set_postfix_str(f"{name} {kind} M={key[2]}", refresh=False)
            bar.update()
            cell = known.get(key)
            if cell is not None and set(names) <= set(cell["results"]):
                continue
            if not weights:
                weights = [make_weights(model, kind, settings.dtype, device)]
                for one in loaded:
                    if hasattr(one, "prepare"):
                        prepare(one, weights[0])
            layers = cells.layers_of_cell(model, key[2], weights, key[3], settings)
            if cell is None:
                cell = cells.describe(model, key[2], layers, key[3], settings)
                document["cells"].append(cell)
            try:
                cells.fill(cell, loaded, layers, settings)
            finally:
                write_json(document)
            del layers
        del weights
        if device.type == "cuda":
            torch.cuda.empty_cache()
    bar.close()


def prepare(implementation: Any, weights: Any) -> None:
    """Lets a peer pack the first copy of the weights; what fails here fails again, and is noted."""
    if weights.kind in implementation.formats():
        try:
            implementation.prepare(weights)
        except (RuntimeError, AttributeError) as error:
            print(f"{implementation.name} cannot pack: {error!r}", file=sys.stderr, flush=True)


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


def run_account(document: dict[str, Any], settings: Settings) -> None:
    """Fills document["accounts"] and prints them."""
    import account
    import profiled

    document["accounts"] = []
    for model, kind, tokens, routing in wanted_cells():
        try:
            found = profiled.measure(
                find_model(model), tokens, kind, routing, settings, _MMA_RATE.value * 1e12
            )
        except (RuntimeError, ValueError) as error:
            print(f"no account of {model} {kind} M={tokens}: {error!r}", file=sys.stderr)
            document["absent"][f"{model} {kind} {tokens}"] = repr(error)
            continue
        document["accounts"].append(found)
        write_json(document)
    text = account.markdown(
        document["accounts"], settings.ceilings.bandwidth, _MMA_RATE.value * 1e12
    )
    print(text)
    if _TABLE.value:
        pathlib.Path(_TABLE.value).write_text(text, encoding="utf-8")
    if document["absent"]:
        sys.exit(1)


def start_again(lost: cells.DeviceLost) -> None:
    """Replaces this process by a new one that goes on after the cell; gives up after a few."""
    count = int(os.environ.get(_RESTARTS, "0")) + 1
    print(f"{lost}; restart {count}", file=sys.stderr, flush=True)
    if not _JSON.value or count > 8:
        raise lost
    os.environ[_RESTARTS] = str(count)
    arguments = [a for a in sys.argv[1:] if not a.lstrip("-").startswith("merge")]
    os.execv(sys.executable, [sys.executable, sys.argv[0], *arguments, f"--merge={_JSON.value}"])


def main(argv: list[str]) -> None:
    """Measures, prints, writes."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags are written --name=value")
    if wrong := [kind for kind in _WEIGHTS.value if kind not in _KINDS]:
        raise app.UsageError(f"--weights={','.join(wrong)}: must be of {', '.join(_KINDS)}")
    begin = time.perf_counter()
    implementations.prepare_environment(_triton_arch())
    torch.manual_seed(_SEED.value)
    gpu = torch.cuda.is_available() and _BACKENDS.value != ["cpu"]
    device = torch.device("cuda" if gpu else "cpu")
    measured = timing.measured_ceilings(device, DTYPES[_DTYPE.value])
    settings = Settings(
        dtype=DTYPES[_DTYPE.value],
        ceilings=Ceilings(
            bandwidth=_BANDWIDTH.value * 1e12 or measured.bandwidth,
            rate=_RATE.value * 1e12 or measured.rate,
        ),
        cache_bytes=torch.cuda.get_device_properties(device).L2_cache_size if gpu else 1,
        seconds=_SECONDS.value,
        tactics=_TACTICS.value,
    )
    document: dict[str, Any] = {
        "chip": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "torch": torch.__version__,
        "bandwidth_TBps": settings.ceilings.bandwidth / 1e12,
        "rate_TFLOPps": settings.ceilings.rate / 1e12,
        "measured_bandwidth_TBps": measured.bandwidth / 1e12,
        "measured_rate_TFLOPps": measured.rate / 1e12,
        "host_overhead": host_overhead(device),
        "absent": {},
        "cells": [],
    }
    earlier = [json.loads(pathlib.Path(f).read_text(encoding="utf-8")) for f in _MERGE.value]
    document = summary.merged([*earlier, document])
    if _ACCOUNT.value:
        run_account(document, settings)
        return
    try:
        run_cells(document, settings, device)
    except cells.DeviceLost as lost:
        write_json(document)
        start_again(lost)
    except cells.NoSuchTactic as error:
        raise app.UsageError(str(error)) from error
    document["seconds"] = time.perf_counter() - begin
    write_json(document)
    finish(document)


def finish(document: dict[str, Any]) -> None:
    """Writes the table, the summary and the picture; exits with 1 if something was wrong."""
    text = report.markdown(document)
    print(text)
    if _TABLE.value:
        pathlib.Path(_TABLE.value).write_text(text, encoding="utf-8")
    if _SUMMARY.value:
        summary.write(document, pathlib.Path(_SUMMARY.value))
        print(summary.markdown(document))
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
