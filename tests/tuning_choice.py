# SPDX-License-Identifier: Apache-2.0
"""The choice without tuning: on sm_86 (A10, A40, RTX 30), where less shared memory lets fewer tiles
fit, and on the chip that it was fitted on, where it is compared with what was timed.

No GPU: the choice is a function of sizes and of what is known of a chip.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fused_moe import _extension, arguments
from fused_moe.models import MODELS, ModelShape

C: Any = _extension.C
_BUILT = C is not None and "sm80" in C.BACKENDS
pytestmark = pytest.mark.skipif(
    not _BUILT, reason="this build has no sm80 kernels (--config=cpu): no tactics to choose from"
)

# CUDA programming guide, compute capability 8.6: 100 KiB a multiprocessor, 99 a block. A40 and
# RTX 3090 class chips have 84 multiprocessors.
SM_86 = {
    "multiprocessors": 84,
    "shared_memory_per_block": 101376,
    "shared_memory_per_multiprocessor": 102400,
}
H200 = {
    "multiprocessors": 132,
    "shared_memory_per_block": 232448,
    "shared_memory_per_multiprocessor": 233472,
}
# Microseconds of a call beside its kernels' own times, in four launches and in one: the median of
# what whole calls in CUDA graphs took longer, up to 64 tokens.
FOUR_LAUNCHES, ONE_LAUNCH = 2.0, 0.7
# Codes of arguments.WEIGHTS_..., and how many weights share a scale, 0 for all of a row.
FORMATS = {
    "same": (0, 0),
    "int8": (1, 0),
    "uint8": (2, 0),
    "int4_32": (3, 32),
    "int4_64": (3, 64),
    "int4_128": (3, 128),
    "mxfp4": (4, 32),
}
TOKENS = sorted({1 << i for i in range(15)} | {3 << i for i in range(13)} | {7, 100, 1000, 10000})


def problem_of(shape: ModelShape, weights: str, tokens: int) -> Any:
    weight_format, group_size = FORMATS[weights]
    problem, _ = arguments.plan_problem(
        "sm80",
        shape.activation,
        torch.bfloat16,
        torch.bfloat16,
        weight_format,
        group_size=group_size,
        num_tokens=tokens,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_experts=shape.num_experts,
        num_local_experts=shape.num_experts,
        first_local_expert=0,
        top_k=shape.top_k,
    )
    return problem


def problems(weights: str) -> Iterator[tuple[str, Any]]:
    """Every model whose sizes the format takes, with every number of tokens."""
    group_size = FORMATS[weights][1] or 16
    for name, shape in MODELS.items():
        if shape.hidden_size % group_size or shape.intermediate_size % group_size:
            continue
        for tokens in TOKENS:
            yield f"{name}, {tokens} tokens", problem_of(shape, weights, tokens)


@pytest.mark.parametrize("weights", list(FORMATS))
def test_the_choice_fits_99_kib(weights: str) -> None:
    tactics = C.tactics("sm80", weight_format=FORMATS[weights][0])
    limit = SM_86["shared_memory_per_block"]
    models = set()
    for what, problem in problems(weights):
        pair = C.choose_tactics("sm80", problem, **SM_86)
        for index in pair:
            used = tactics[index].shared_memory
            assert used <= limit, f"{what}: {tactics[index].name} takes {used} bytes a block"
        alone = set(pair) <= set(C.supported_tactics("sm80", problem, limit))
        assert alone or pair in C.whole_layer_tactics("sm80", problem, limit), what
        models.add(what.split(",")[0])
    assert len(models) >= 10, "too few models to say anything"


@pytest.mark.parametrize("weights", list(FORMATS))
def test_three_heights_fit_99_kib(weights: str) -> None:
    tactics = C.tactics("sm80", weight_format=FORMATS[weights][0])
    for what, problem in problems(weights):
        fitting = C.supported_tactics("sm80", problem, SM_86["shared_memory_per_block"])
        heights = {tactics[index].tile_m for index in fitting}
        assert len(heights) >= 3, f"{what}: only tiles of {sorted(heights)} rows fit"


@pytest.mark.parametrize("weights", list(FORMATS))
def test_the_choice_goes_with_the_tokens(weights: str) -> None:
    """Low tiles for few rows, higher ones for many, also among those that fit."""
    tactics = C.tactics("sm80", weight_format=FORMATS[weights][0])
    for name in ("Mixtral-8x7B", "Qwen3-30B-A3B"):
        few = C.choose_tactics("sm80", problem_of(MODELS[name], weights, 1), **SM_86)
        many = C.choose_tactics("sm80", problem_of(MODELS[name], weights, 16384), **SM_86)
        for low, high in zip(few, many, strict=True):
            assert tactics[low].tile_m <= 32, name
            assert tactics[high].tile_m >= 64, name


@pytest.mark.parametrize("weights", ["same", "int8", "int4_128", "int4_64"])
def test_few_tokens_take_one_launch(weights: str) -> None:
    """As timed: up to 8 tokens one launch was the faster way in every model and format."""
    tactics = C.tactics("sm80", weight_format=FORMATS[weights][0])
    measured = [model for model in MODELS if model in {c["model"] for c in timed()}]
    assert len(measured) >= 4, "too few models to say anything"
    for name in measured:
        shape = MODELS[name]
        if FORMATS[weights][1] and shape.hidden_size % FORMATS[weights][1]:
            continue
        for tokens in range(1, 9):
            first, _ = C.choose_tactics("sm80", problem_of(shape, weights, tokens), **H200)
            assert tactics[first].whole_layer, f"{name}, {tokens} tokens: {tactics[first].name}"


@functools.cache
def timed() -> list[dict[str, Any]]:
    """Layers on an H200 with each tactic's time; docs/measurements/README.md has the keys."""
    folder = pathlib.Path(__file__).absolute().parent.parent / "docs" / "measurements"
    cells: list[dict[str, Any]] = json.loads((folder / "sm80_tactics.json").read_text())
    return cells


def excess(cell: dict[str, Any]) -> float:
    """How much slower than the best that was timed a layer is with what is chosen for it."""
    model, _, shards = cell["model"].partition(", TP ")
    shape = MODELS[model.removesuffix(" sizes")]
    intermediate_size = shape.intermediate_size // int(shards or 1)
    shape = dataclasses.replace(shape, intermediate_size=intermediate_size)
    weights = cell["weights"]
    if weights == "int4":
        weights = "int4_64" if shape.hidden_size % 128 else "int4_128"
    problem = problem_of(shape, weights, cell["tokens"])
    tactics = C.tactics("sm80", weight_format=FORMATS[weights][0])
    first, second = (tactics[i] for i in C.choose_tactics("sm80", problem, **H200))

    def time(step: str, tactic: Any) -> float:
        tile = tactic.name.rsplit("x", 1)[0] if not tactic.whole_layer else tactic.name
        assert tile in cell[step], f"{cell['model']}, {cell['tokens']}, {weights}: chose {tile}"
        microseconds: float = cell[step][tile]
        return microseconds

    between = FOUR_LAUNCHES + cell["rest"]
    best = min(cell["gemm1"].values()) + min(cell["gemm2"].values()) + between
    best = min([best, *(microseconds + ONE_LAUNCH for microseconds in cell["layer"].values())])
    if first.whole_layer:
        return (time("layer", first) + ONE_LAUNCH) / best - 1
    return (time("gemm1", first) + time("gemm2", second) + between) / best - 1


def test_the_choice_is_near_the_best_that_was_timed() -> None:
    """What docs/measurements.md says of the costs behind the choice."""
    found = {f"{c['model']}, {c['weights']}, {c['tokens']} tokens": excess(c) for c in timed()}
    assert len(found) == 108, "six models, six numbers of tokens, three widths of weights"
    worst = max(found, key=lambda name: found[name])
    assert found[worst] < 0.06, f"{worst}: {found[worst]:.1%} slower than the best"
    above = sorted(name for name, slower in found.items() if slower > 0.04)
    assert len(above) <= 2, f"more than 4% slower than the best: {'; '.join(above)}"
    assert sum(found.values()) / len(found) < 0.004
