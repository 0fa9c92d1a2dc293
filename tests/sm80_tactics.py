# SPDX-License-Identifier: Apache-2.0
"""Tactics of the sm80 backend: the choice, without a GPU; every one of them, on a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cases import TOKENS, WEIGHTS, Case, multiple_of
from fused_moe import ActivationType, arguments
from fused_moe import _extension as extension
from fused_moe.models import MODELS
from gpu_layer import (
    DTYPES,
    check,
    output_dtype,
    realized,
    require_sm80,
    run_poisoned,
    same_bits,
    weight_dtype,
    workspace_bytes,
)

C: Any = extension.C
_BUILT = C is not None and "sm80" in C.BACKENDS
_needs_build = pytest.mark.skipif(
    not _BUILT, reason="this build has no sm80 kernels (--config=cpu): no tactics to choose from"
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the choice knows of a chip; shared memory in bytes."""

    multiprocessors: int
    shared_memory_per_block: int
    shared_memory_per_multiprocessor: int


CHIPS = {
    "A100": Chip(108, 163 * 1024, 164 * 1024),
    "A30": Chip(56, 163 * 1024, 164 * 1024),
    "A10": Chip(72, 99 * 1024, 100 * 1024),
    "RTX3060": Chip(28, 99 * 1024, 100 * 1024),
    "L40": Chip(142, 99 * 1024, 100 * 1024),
    "H200": Chip(132, 227 * 1024, 228 * 1024),
}


def format_of(weights: str) -> int:
    """The extension's number of a format of weights."""
    numbers: tuple[int, ...] = (
        arguments.WEIGHTS_AS_INPUT,
        arguments.WEIGHTS_INT8,
        arguments.WEIGHTS_UINT8,
        arguments.WEIGHTS_INT4,
        arguments.WEIGHTS_MXFP4,
    )
    return numbers[("same", "int8", "uint8", "int4", "mxfp4").index(weights.split("_")[0])]


def tactics_for(weights: str) -> list[Any]:
    """All tactics, with the stages and the shared memory that they have for these weights."""
    tactics: list[Any] = C.tactics("sm80", weight_format=format_of(weights))
    return tactics


def whole_layer_pairs(case: Case, shared_memory_per_block: int) -> list[tuple[int, int]]:
    """The pairs that run both products in one launch, which only work together."""
    pairs: list[tuple[int, int]] = C.whole_layer_tactics(
        "sm80", problem_of(case), shared_memory_per_block
    )
    return pairs


def problem_of(case: Case) -> Any:
    """The extension's view of a case."""
    problem, _ = arguments.plan_problem(
        "sm80",
        case.activation,
        DTYPES[case.dtype],
        output_dtype(case),
        format_of(case.weights),
        group_size=case.group_size,
        num_tokens=case.tokens,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_local_experts=case.experts,
        first_local_expert=case.ep_rank * case.experts,
        top_k=case.top_k,
    )
    return problem


def model_cases(weights: str = "same") -> Iterator[Case]:
    """Every model, TP degree and token count that the weights' format allows; all experts."""
    for (name, shape), tp_size, tokens in itertools.product(
        MODELS.items(), (1, 2, 4, 8), (*TOKENS, 16384, 100000)
    ):
        case = Case(
            name=name,
            hidden=shape.hidden_size,
            intermediate=shape.intermediate_size // tp_size,
            experts=shape.num_experts,
            top_k=shape.top_k,
            tokens=tokens,
            weights=weights,
            activation=shape.activation,
            tp_size=tp_size,
        )
        if case.accepted():
            yield case


def _choose(case: Case, chip: Chip) -> list[Any]:
    pair = C.choose_tactics("sm80", problem_of(case), **dataclasses.asdict(chip))
    tactics = tactics_for(case.weights)
    limit = chip.shared_memory_per_block
    allowed = C.supported_tactics("sm80", problem_of(case), limit)
    if tuple(pair) not in whole_layer_pairs(case, limit):
        assert set(pair) <= set(allowed), f"{case.id}: chose {pair}, {sorted(allowed)} fit"
    return [tactics[index] for index in pair]


@_needs_build
@pytest.mark.parametrize("weights", list(WEIGHTS))
def test_the_extension_has_the_sm80_backend(weights: str) -> None:
    assert "sm80" in C.BACKENDS
    assert "sm80" in C.BUILT_FOR
    tactics = tactics_for(weights)
    assert len({tactic.name for tactic in tactics}) == len(tactics) > 0
    for tactic in tactics:
        if tactic.whole_layer:
            assert tactic.tile_m % 8 == 0 and tactic.threads % 32 == 0
            continue
        assert tactic.tile_m % 16 == 0 and tactic.tile_n % 8 == 0 and tactic.tile_k % 16 == 0
        assert tactic.threads % 32 == 0 and 32 <= tactic.threads <= 1024
        assert tactic.stages >= 2
        size = {"same": 2, "int8": 1, "uint8": 1}.get(weights, 0.5)
        stage = tactic.tile_m * tactic.tile_k * 2 + tactic.tile_n * tactic.tile_k * size
        assert tactic.shared_memory >= tactic.stages * stage


@_needs_build
@pytest.mark.parametrize("chip", list(CHIPS))
@pytest.mark.parametrize("weights", list(WEIGHTS))
def test_the_choice_fits_every_chip(weights: str, chip: str) -> None:
    for case in model_cases(weights):
        for tactic in _choose(case, CHIPS[chip]):
            assert tactic.shared_memory <= CHIPS[chip].shared_memory_per_block, case.id


@_needs_build
@pytest.mark.parametrize("weights", list(WEIGHTS))
def test_the_choice_follows_the_rows_an_expert_gets(weights: str) -> None:
    for case in model_cases(weights):
        rows = case.tokens * case.top_k / case.experts
        for tactic in _choose(case, CHIPS["A100"]):
            # Few rows: most of a high tile would multiply nothing.
            assert rows > 8 or tactic.tile_m <= 32, f"{case.id}: {tactic.name}"
            # Many rows: a low tile reads every weight too often from L2.
            assert rows < 1000 or tactic.tile_m >= 64, f"{case.id}: {tactic.name}"
            assert rows < 1000 or tactic.tile_m * tactic.tile_n >= 64 * 128, case.id


@_needs_build
@pytest.mark.parametrize("weights", list(WEIGHTS))
def test_fewer_tactics_fit_less_shared_memory(weights: str) -> None:
    case = Case("fit", 4096, 14336, 8, 2, 512, weights=weights)
    fitting = [
        set(C.supported_tactics("sm80", problem_of(case), kib * 1024)) for kib in (48, 99, 163, 227)
    ]
    assert all(less <= more for less, more in itertools.pairwise(fitting))
    assert fitting[1], "no tactic fits a chip with 99 KiB of shared memory a block"
    for index in fitting[1]:
        assert tactics_for(weights)[index].shared_memory <= 99 * 1024


@_needs_build
def test_whole_layers_take_up_to_2048_slots() -> None:
    for tokens, there in ((1024, True), (1025, False)):
        case = Case("fit", 4096, 14336, 8, 2, tokens)
        assert bool(whole_layer_pairs(case, 99 * 1024)) == there, f"{2 * tokens} slots"


@_needs_build
@pytest.mark.parametrize("weights", list(WEIGHTS))
def test_the_workspace_is_within_its_bound(weights: str) -> None:
    for case in model_cases(weights):
        slots = case.tokens * case.top_k
        bound = 2 * (case.intermediate + 2 * case.hidden) * slots + 2**20
        assert 0 <= workspace_bytes(case) <= bound, case.id
    # The routing's own lists, where they weigh most: narrow rows, many experts.
    for experts, tokens in itertools.product((1, 8, 512, 2048), (1, 100, 10000, 200000)):
        width = max(16, multiple_of(weights))
        case = Case("narrow", width, width, experts, 4, tokens, weights=weights)
        assert workspace_bytes(case) <= 2 * (width + 2 * width) * tokens * 4 + 2**20, case.id


@contextlib.contextmanager
def forced(**settings: Any) -> Iterator[None]:
    """Meanwhile every call runs with these further arguments of the extension's `run`."""
    run = C.run
    C.run = functools.partial(run, **settings)
    try:
        yield
    finally:
        C.run = run


def each_tactic(case: Case) -> Iterator[tuple[Any, tuple[int, int]]]:
    """What runs the case on this GPU: a tactic, and the pair that forces it on both products."""
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    pairs = {(index, index) for index in C.supported_tactics("sm80", problem_of(case), limit)}
    assert pairs
    for pair in sorted(pairs | set(whole_layer_pairs(case, limit))):
        yield tactics_for(case.weights)[pair[0]], pair


_TACTICS_SHAPES = {
    "odd": Case("tactic", 328, 176, 6, 3, 33, biases="both", routing="garbage"),
    "few": Case("tactic", 512, 256, 16, 2, 5, dtype="float16"),
    "one": Case("tactic", 1024, 768, 8, 4, 1, biases="both", routing="outside"),
    "some": Case("tactic", 640, 448, 4, 2, 12, dtype="float16", biases="fc2", ep_size=2),
    "rows": Case("tactic", 256, 352, 4, 2, 700, activation=ActivationType.Geglu),
    "plain": Case("tactic", 192, 464, 5, 2, 130, activation=ActivationType.Relu2),
}


@_needs_build
@pytest.mark.parametrize("shape", list(_TACTICS_SHAPES))
@pytest.mark.parametrize("weights", list(WEIGHTS))
def test_every_tactic_is_right(weights: str, shape: str) -> None:
    """Each tactic as GEMM 1's and as GEMM 2's, beside all others in turn."""
    require_sm80()
    case = dataclasses.replace(_TACTICS_SHAPES[shape], weights=weights)
    multiple = case.multiple
    case = dataclasses.replace(
        case,
        hidden=-(-case.hidden // multiple) * multiple,
        intermediate=-(-case.intermediate // multiple) * multiple,
    )
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    with realized(case) as layer:
        assert layer.fc1.dtype == weight_dtype(case)
        supported = sorted(C.supported_tactics("sm80", problem_of(case), limit))
        assert supported
        pairs = set(whole_layer_pairs(case, limit))
        for step, first in enumerate(supported):
            second = supported[(step * 7 + 3) % len(supported)]
            pairs |= {(first, second), (second, first), (first, first)}
        for pair in sorted(pairs):
            names = [tactics_for(weights)[index].name for index in pair]
            try:
                with forced(tactics=pair):
                    out = run_poisoned(layer, 0xFF)
                    assert same_bits(out, run_poisoned(layer, 0x7B)), "two runs differ"
                check(layer, out)
            except (AssertionError, RuntimeError) as error:
                raise AssertionError(f"tactics {names}: {error}") from error


# Of the few-token launch, units of work enough to be handed out, so that GEMM 2 follows GEMM 1 pass
# by pass instead of waiting for all of it; in the second an expert has very many passes.
_FOLLOWING = {
    "experts": Case("follows", 1024, 512, 160, 8, 64, biases="fc1"),
    "passes": Case(
        "follows", 1024, 640, 3, 8, 256, activation=ActivationType.Relu2, routing="one_expert"
    ),
}


@_needs_build
@pytest.mark.parametrize("shape", list(_FOLLOWING))
@pytest.mark.parametrize("weights", list(WEIGHTS))
def test_gemm2_takes_what_gemm1_has_stored(weights: str, shape: str) -> None:
    """What GEMM 2 read too early would be poison, or bits that change from run to run."""
    require_sm80()
    case = dataclasses.replace(_FOLLOWING[shape], weights=weights)
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    with realized(case) as layer:
        for pair in whole_layer_pairs(case, limit):
            with forced(tactics=pair):
                out = run_poisoned(layer, 0xFF)
                check(layer, out)
                for run in range(10):
                    assert same_bits(out, run_poisoned(layer, (0x7B, 0xFF)[run % 2])), run


@_needs_build
@pytest.mark.parametrize("kib", [99, 163])
@pytest.mark.parametrize("weights", list(WEIGHTS))
def test_runs_within_a_smaller_chips_shared_memory(weights: str, kib: int) -> None:
    require_sm80()
    for tokens in (1, 8, 64, 512, 4096):
        case = Case("limit", 1024, 512, 8, 2, tokens, weights=weights)
        with realized(case) as layer, forced(shared_memory_per_block=kib * 1024):
            check(layer, run_poisoned(layer, 0xFF))


@_needs_build
def test_a_tactic_that_does_not_fit_is_refused() -> None:
    require_sm80()
    case = Case("limit", 1024, 512, 8, 2, 64)
    tactics = tactics_for("same")
    largest = max(range(len(tactics)), key=lambda index: tactics[index].shared_memory)
    with (
        realized(case) as layer,
        forced(tactics=(largest, largest), shared_memory_per_block=16 * 1024),
        pytest.raises((ValueError, RuntimeError)),
    ):
        layer.run()
