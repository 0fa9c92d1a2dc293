# SPDX-License-Identifier: Apache-2.0
"""The account of a call's launches, on events made up for the purpose."""

from __future__ import annotations

import pytest

import account
from floors import Shape, layer_bytes, layer_operations

NAMES = [
    "void moe::RouteInOneLaunchKernel(moe::Params)",
    "void moe::sm80::GroupedGemmKernel<moe::Traits<1>>(moe::GroupedGemm, unsigned int)",
    "void moe::sm80::GroupedGemmKernel<moe::Traits<2>>(moe::GroupedGemm, unsigned int)",
    "void moe::FinalizeKernel<__nv_bfloat162>(uint4 const*)",
]
SHAPE = Shape(hidden=64, intermediate=32, experts=8, top_k=2)


def test_steps_by_name() -> None:
    assert account.steps_of_names(NAMES) == ["route", "GEMM 1", "GEMM 2", "finalize"]
    several = ["moe::CountKernel(p)", "moe::PlanKernel(p)", "moe::ScatterKernel(p)"]
    assert account.steps_of_names(several) == ["route"] * 3
    assert account.steps_of_names(["moe::DecodeLayerKernel<4>(p)"]) == ["whole layer"]
    assert account.steps_of_names(["a::Other<3>(int)"]) == ["a::Other"]


def test_durations_are_medians_in_launch_order() -> None:
    events = []
    for call in range(3):
        for index, name in enumerate(NAMES):
            events.append((100.0 * call + 10 * index, name, float(index + 1 + (call == 2))))
    events.reverse()
    assert account.durations(events, 3) == list(zip(NAMES, [1.0, 2.0, 3.0, 4.0], strict=True))


@pytest.mark.parametrize("calls", [0, 2])
def test_a_lost_event_is_noticed(calls: int) -> None:
    events = [(float(i), "k", 1.0) for i in range(5)]
    with pytest.raises(ValueError, match="whole number"):
        account.durations(events, calls)


def test_the_steps_add_up_to_the_layer() -> None:
    tokens, touched = 5, 6.0
    work = account.work_of_steps(SHAPE, tokens, touched, 2)
    gemms = [work["GEMM 1"], work["GEMM 2"]]
    assert sum(step.operations for step in gemms) == layer_operations(SHAPE, tokens)
    slots = 2 * tokens * SHAPE.top_k
    # The layer's own bytes have no rows between GEMM 2 and the sum.
    between = 2 * slots * SHAPE.hidden
    total = sum(work[step].bytes for step in ("GEMM 1", "GEMM 2", "finalize"))
    assert total == pytest.approx(layer_bytes(SHAPE, tokens, touched, 2) + between)
    assert work["whole layer"].bytes == pytest.approx(layer_bytes(SHAPE, tokens, touched, 2))


def test_the_account_of_a_call() -> None:
    cell = {
        "model": "m",
        "tokens": 5,
        "weights": "same",
        "routing": "uniform",
        "touched_experts": 6.0,
    }
    times = [2.0, 10.0, 5.0, 1.0]
    kernels = list(zip(NAMES, times, strict=True))
    found = account.account_of(cell, SHAPE, 2, kernels, 20.0, bandwidth=1e12, rate=1e30)
    by_step = {launch["step"]: launch for launch in found["launches"]}
    assert by_step["gaps"]["us"] == pytest.approx(2.0)
    first = by_step["GEMM 1"]
    weights = 6 * SHAPE.hidden * SHAPE.fc1_rows * 2
    assert first["bytes"] == weights + 2 * 5 * 64 + 2 * 10 * 32
    assert first["limit_us"] == pytest.approx(first["bytes"] / 1e12 * 1e6)
    assert first["of_limit"] == pytest.approx(first["limit_us"] / 10)
    assert first["bound"] == "memory"
    bound = account.account_of(cell, SHAPE, 2, kernels, 20.0, bandwidth=1e30, rate=1e9)
    assert bound["launches"][1]["bound"] == "mma.sync"
    text = account.markdown([found], 1e12, 636e12)
    assert "| m | same | 5 | GEMM 1 | 1 | 10.0 | 50% |" in text
    assert "| m | same | 5 | the call | | 20.0 | 100% |" in text
