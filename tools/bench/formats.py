# SPDX-License-Identifier: Apache-2.0
"""Times the library's weight formats against each other: what quantized weights cost.

    bazel run //tools/bench:formats -- --json=/tmp/formats.json --table=/tmp/formats.md

With many tokens the arithmetic is the same whatever the weights, and the chip lowers its clock
under load, by a tenth within seconds. So programs that time one format each, or one format after
the other, compare clocks. Here the formats of a layer take turns, a graph replay each, and the
ratio is the median over the rounds of quantized over 16-bit weights in the same round.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
import time
from typing import Any

import torch
from absl import app, flags
from tqdm import tqdm

import timing
from cells import References, Settings, layers_of_cell
from floors import Ceilings
from layers import DTYPES, MEASURED_MODELS, Layer, Model, find_model, make_weights
from ours import Ours
from summary import LABELS
from tolerances import TOLERANCES

_MODELS = flags.DEFINE_list(
    "models",
    list(MEASURED_MODELS),
    "Names of fused_moe.models; NAME-TP8 is one of 8 shards, NAME-sizes has Swiglu, no biases.",
)
_TOKENS = flags.DEFINE_list("tokens", ["512", "4096", "16384"], "Rows of x.")
_WEIGHTS = flags.DEFINE_list("weights", ["int8", "int4"], "Any of int8, uint8, int4, mxfp4.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16"], "Of activations.")
_SECONDS = flags.DEFINE_float("seconds", 0.5, "About how long to measure a layer, all formats.")
_JSON = flags.DEFINE_string("json", "", "Where to write everything that was measured.")
_TABLE = flags.DEFINE_string("table", "", "Where to write the printed table, Markdown.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of inputs and routing.")


def compare(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """By format: us, the median; and of all but "same" its ratio to that of the same round.

    ratio is the median of the rounds, low_ratio and high_ratio their 10th and 90th percentile.
    """
    result: dict[str, dict[str, float]] = {}
    for kind, own in times.items():
        result[kind] = {"us": statistics.median(own) * 1e6}
        if kind != "same":
            ratios = sorted(a / b for a, b in zip(own, times["same"], strict=True))
            last = len(ratios) - 1
            result[kind] |= {
                "ratio": statistics.median(ratios),
                "low_ratio": ratios[round(0.1 * last)],
                "high_ratio": ratios[round(0.9 * last)],
            }
    return result


def measure(
    model: Model, tokens: int, kinds: list[str], settings: Settings, device: torch.device, seed: int
) -> dict[str, Any]:
    """One cell: a model and a number of tokens, with 16-bit weights and all `kinds`.

    Raises:
        ValueError: a result is not the float32 reference's.
    """
    ours = Ours("sm80" if device.type == "cuda" else "cpu")
    groups: dict[str, list[Layer]] = {}
    errors: dict[str, float] = {}
    for kind in ["same", *kinds]:
        weights = [make_weights(model, kind, settings.dtype, device)]
        torch.manual_seed(seed)  # the same tokens go to the same experts
        groups[kind] = layers_of_cell(model, tokens, weights, "uniform", settings)
        errors[kind] = References(groups[kind][0]).error(ours)
        if not errors[kind] < TOLERANCES[settings.dtype]:
            raise ValueError(f"{model.name}, {kind}, {tokens} tokens: error {errors[kind]:.1e}")
    calls = [[lambda layer=layer: ours.run(layer) for layer in group] for group in groups.values()]
    rounds = timing.measure_in_turns(calls, settings.seconds)
    times = dict(zip(groups, rounds, strict=True))
    return {
        "model": model.name,
        "tokens": tokens,
        "rounds": len(rounds[0]),
        "formats": compare(times),
        "configs": {kind: ours.chosen(group[0]) for kind, group in groups.items()},
        "errors": errors,
    }


def markdown(cells: list[dict[str, Any]]) -> str:
    """A line a cell: microseconds with 16-bit weights, then of each format with its ratio."""
    kinds = [kind for kind in cells[0]["formats"] if kind != "same"]
    head = ["model", "tokens", "16-bit"]
    for kind in kinds:
        head += [LABELS[kind], f"{LABELS[kind]} / 16-bit", "10th to 90th percentile"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for cell in cells:
        row = [cell["model"], str(cell["tokens"]), f"{cell['formats']['same']['us']:.0f}"]
        for kind in kinds:
            found = cell["formats"][kind]
            row += [f"{found['us']:.0f}", f"{found['ratio']:.3f}"]
            row.append(f"{found['low_ratio']:.3f} to {found['high_ratio']:.3f}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, ""])


def main(argv: list[str]) -> None:
    """Measures, prints, writes."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags are written --name=value")
    if wrong := [kind for kind in _WEIGHTS.value if kind not in LABELS or kind == "same"]:
        raise app.UsageError(f"--weights={','.join(wrong)}: must be of int8, uint8, int4, mxfp4")
    if wrong := [tokens for tokens in _TOKENS.value if not tokens.isdigit() or int(tokens) < 1]:
        raise app.UsageError(f"--tokens={','.join(wrong)}: must be numbers of at least 1")
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: there is nothing to compare")
    device = torch.device("cuda")
    settings = Settings(
        dtype=DTYPES[_DTYPE.value],
        ceilings=Ceilings(4e12, 6e14),  # only for how many calls a graph captures
        cache_bytes=torch.cuda.get_device_properties(device).L2_cache_size,
        seconds=_SECONDS.value,
    )
    document: dict[str, Any] = {
        "chip": torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "torch": torch.__version__,
        "cells": [],
    }
    todo = [(find_model(name), int(tokens)) for name in _MODELS.value for tokens in _TOKENS.value]
    for model, tokens in tqdm(todo, unit="cell", mininterval=5.0):
        document["cells"].append(
            measure(model, tokens, _WEIGHTS.value, settings, device, _SEED.value)
        )
        torch.cuda.empty_cache()
        if _JSON.value:
            pathlib.Path(_JSON.value).write_text(json.dumps(document, indent=1), encoding="utf-8")
    text = markdown(document["cells"])
    print(text)
    if _TABLE.value:
        pathlib.Path(_TABLE.value).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
