# SPDX-License-Identifier: Apache-2.0
"""Tunes layers on the GPU at hand, and says what tuning brings over the library's own choice.

    ./bazelw run //tools/tune -- --model=Mixtral-8x7B --weights=same,int4 --file=tactics.json
    ./bazelw run //tools/tune -- --report=report.json

The first writes a file for FUSED_MOE_TUNING_FILE or `autotune(cache=...)`. The second measures
the benchmark's six models anew, whatever a file says, and writes the times of both choices.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
import time
from typing import Any

import torch
from absl import app, flags
from outcome import Cell, document, table
from tqdm import tqdm

import fused_moe
from fused_moe import autotune, cutlass_fused_moe, tuning
from fused_moe.arguments import check_call
from fused_moe.signature import sign
from fused_moe.tuning.keys import WEIGHT_FORMATS, default_buckets
from layers import DTYPES, MEASURED_MODELS, Model, find_model, make_weights

_REPORT_TOKENS = (1, 8, 64, 512, 4096, 16384)

_MODEL = flags.DEFINE_list(
    "model",
    list(MEASURED_MODELS),
    "Names of fused_moe.models; NAME-TP8 is one of 8 shards, NAME-sizes has Swiglu, no biases.",
)
_TOKENS = flags.DEFINE_list(
    "tokens", [], "Numbers of tokens. Default: powers of two to 8192; for --report six of them."
)
_WEIGHTS = flags.DEFINE_list(
    "weights", ["same"], f"Any of {', '.join(WEIGHT_FORMATS)}; same: as the activations."
)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16"], "Of activations.")
_ROUTING = flags.DEFINE_enum(
    "routing", "uniform", ["uniform", "skewed"], "How random tokens choose experts; skewed: Zipf."
)
_FILE = flags.DEFINE_string(
    "file",
    "",
    "The file of results, read first and then added to. Default: $FUSED_MOE_TUNING_FILE, or "
    "fused_moe_tactics.json; with --report none.",
)
_REPORT = flags.DEFINE_string(
    "report", "", "Where to write, as JSON, untuned and tuned times of every cell, measured anew."
)


def path_of(name: str) -> str:
    """A path of the command line, relative to where it was typed, not to where Bazel runs it."""
    return os.path.join(os.environ.get("BUILD_WORKING_DIRECTORY", ""), name) if name else ""


def arguments_for(model: Model, kind: str, device: torch.device) -> dict[str, Any]:
    """A call of one token: the tuner makes its own tokens, and takes the weights."""
    shape, dtype = model.shape, DTYPES[_DTYPE.value]
    weights = make_weights(model, kind, dtype, device)
    return {
        "input": torch.zeros(1, shape.hidden, dtype=dtype, device=device),
        "token_selected_experts": torch.zeros(1, shape.top_k, dtype=torch.int32, device=device),
        "token_final_scales": torch.ones(1, shape.top_k, device=device),
        "fc1_expert_weights": weights.fc1,
        "fc2_expert_weights": weights.fc2,
        "output_dtype": dtype,
        "quant_scales": weights.quant_scales,
        "activation_type": model.activation,
        **weights.quantization_arguments(),
    }


def tune(model: Model, kind: str, tokens: list[int], file: str | None, bar: Any) -> list[Cell]:
    """Tunes one layer for all numbers of tokens."""
    done = 0

    def progress(count: int, total: int, what: str) -> None:
        nonlocal done
        done = count
        bar.set_postfix_str(f"{model.name} {kind} {what.rsplit(': ')[-1]}")
        bar.update()

    arguments = arguments_for(model, kind, torch.device("cuda", torch.cuda.current_device()))
    with autotune(cache=file, tuning_buckets=tokens, routing=_ROUTING.value, progress=progress):
        cutlass_fused_moe(**arguments)
    bar.update(len(tokens) - done)  # what the file knew
    parameters = inspect.signature(cutlass_fused_moe).parameters.values()
    every = {p.name: p.default for p in parameters} | arguments
    key = tuning.tuner.key(check_call(sign(every)), every)
    entries = tuning.tuner.results().get(key, {})
    return [Cell(model.name, kind, count, entries.get(count)) for count in tokens]


def main(argv: list[str]) -> None:
    """Tunes, prints, writes."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags are written --name=value")
    report = path_of(_REPORT.value)
    usual = _REPORT_TOKENS if report else default_buckets(8192)
    try:
        models = [find_model(name) for name in _MODEL.value]
        tokens = sorted({int(count) for count in _TOKENS.value} or usual)
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    if unknown := set(_WEIGHTS.value) - set(WEIGHT_FORMATS):
        raise app.UsageError(f"--weights has {sorted(unknown)}; they are {list(WEIGHT_FORMATS)}")
    if not torch.cuda.is_available():
        sys.exit("tuning needs a GPU, and PyTorch sees none")
    file: str | None = path_of(_FILE.value)
    if not file and not report:
        file = path_of(os.environ.get(tuning.FILE_VARIABLE) or "fused_moe_tactics.json")
    if report:
        # Of the file's results nothing is believed; it is added to, if it was asked for.
        os.environ.pop(tuning.FILE_VARIABLE, None)

    # The table says as much; warnings go beside the bar.
    logging.getLogger("fused_moe").setLevel(logging.WARNING)
    begin = time.perf_counter()
    cells: list[Cell] = []
    total = len(models) * len(_WEIGHTS.value) * len(tokens)
    with tqdm(total=total, unit="cell", mininterval=0.2) as bar:
        for model in models:
            for kind in _WEIGHTS.value:
                try:
                    cells += tune(model, kind, tokens, None if report else file, bar)
                except (ValueError, NotImplementedError) as error:
                    bar.write(f"{model.name}, {kind} weights: {error}", file=sys.stderr)
                    cells += [Cell(model.name, kind, count, None) for count in tokens]
                torch.cuda.empty_cache()
    seconds = time.perf_counter() - begin
    print(table(cells))
    print(f"{seconds:.1f} s in all.")
    if file and any(cell.entry is not None for cell in cells):
        if report:
            tuning.save(file)
        print(f"Tactics are in {file}; use them with {tuning.FILE_VARIABLE}={file}")
    if report:
        made = document(
            cells,
            chip=torch.cuda.get_device_name(),
            date=time.strftime("%Y-%m-%d", time.gmtime()),
            version=fused_moe.__version__,
            dtype=_DTYPE.value,
            routing=_ROUTING.value,
            seconds=round(seconds, 1),
        )
        with open(report, "w", encoding="utf-8") as out:
            json.dump(made, out, indent=1)
    if any(cell.entry is None for cell in cells):
        sys.exit("not every cell could be measured: see the messages above")


if __name__ == "__main__":
    app.run(main)
