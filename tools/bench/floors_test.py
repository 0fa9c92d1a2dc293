# SPDX-License-Identifier: Apache-2.0
"""The benchmark's arithmetic, against floors that were computed apart from it."""

from __future__ import annotations

import json
import pathlib

import pytest

import report
from floors import (
    Ceilings,
    Shape,
    expected_touched,
    floor_seconds,
    layer_bytes,
    layer_operations,
    weight_bytes,
)
from layers import copies_needed, find_model
from timing import calls_in_a_graph

_RECORD = json.loads(
    (pathlib.Path(report.__file__).parent / "h200_peers.json").read_text(encoding="utf-8")
)
_CEILINGS = Ceilings(_RECORD["bandwidth_TBps"] * 1e12, _RECORD["rate_TFLOPps"] * 1e12)


@pytest.mark.parametrize(
    "cell", _RECORD["cells"], ids=lambda c: f"{c['model']}-{c['weights']}-{c['tokens']}"
)
def test_the_floor_is_that_on_record(cell: dict[str, object]) -> None:
    tokens, recorded = cell["tokens"], cell["floor_us"]
    assert isinstance(tokens, int) and isinstance(recorded, int)
    shape = find_model(str(cell["model"])).shape
    # INT4 in groups of 128, their scales of 2 bytes counted.
    size = {"same": 2, "int8": 1, "int4": 0.5 + 2 / 128}[str(cell["weights"])]
    floor = floor_seconds(shape, tokens, expected_touched(shape, tokens), size, _CEILINGS) * 1e6
    # The record has whole microseconds, and counted the experts that its routings touched: with
    # few tokens that is not the mean.
    drawn = 0.08 if 1 < tokens < 64 else 0.02
    assert floor == pytest.approx(recorded, rel=drawn, abs=0.5)


def test_bytes_and_operations_of_a_layer_by_hand() -> None:
    shape = Shape(hidden=10, intermediate=3, experts=4, top_k=2)
    assert shape.expert_numbers() == 6 * 10 + 10 * 3
    assert weight_bytes(shape, 3, 2) == 3 * 90 * 2
    # 5 tokens: 10 slots of 3 intermediate values, written and read; x and out.
    assert layer_bytes(shape, 5, 3, 1) == 3 * 90 + 2 * (2 * 30) + 2 * (2 * 50)
    assert layer_operations(shape, 5) == 2 * 10 * 90
    plain = Shape(hidden=10, intermediate=3, experts=4, top_k=2, gated=False)
    assert plain.expert_numbers() == 60


def test_the_larger_of_both_is_the_floor() -> None:
    shape = Shape(hidden=64, intermediate=64, experts=4, top_k=2)
    slow_memory, slow_math = Ceilings(1.0, 1e30), Ceilings(1e30, 1.0)
    assert floor_seconds(shape, 5, 3, 2, slow_memory) == layer_bytes(shape, 5, 3, 2)
    assert floor_seconds(shape, 5, 3, 2, slow_math) == layer_operations(shape, 5)


def test_touched_experts() -> None:
    shape = Shape(hidden=1, intermediate=1, experts=8, top_k=2)
    assert expected_touched(shape, 0) == 0
    assert expected_touched(shape, 1) == pytest.approx(2)
    assert expected_touched(shape, 1000) == pytest.approx(8)


def test_copies_put_four_caches_between_two_uses() -> None:
    cache = 60_000_000
    for touched in (1e6, 3e7, 6e7, 2.4e8, 1e10):
        copies = copies_needed(touched, cache)
        assert copies * touched >= 4 * cache
        assert copies == 1 or (copies - 1) * touched < 4 * cache


def test_a_graph_holds_every_copy_and_about_a_millisecond() -> None:
    assert calls_in_a_graph(30e-6, copies=4) == 32
    assert calls_in_a_graph(1e-2, copies=1) == 1
    assert calls_in_a_graph(1e-2, copies=5) == 5
    assert calls_in_a_graph(2e-4, copies=1) == 5


def test_names_of_models() -> None:
    shard = find_model("DeepSeek-V3-TP8")
    assert (shard.shape.hidden, shard.shape.intermediate, shard.shape.experts) == (7168, 256, 256)
    assert find_model("gpt-oss-20b-sizes").activation.name == "Swiglu"
    assert find_model("Mixtral-8x7B").shape.top_k == 2
    for name in ("Mixtral", "Mixtral-8x7B-TP3", "DeepSeek-V3-TP0", ""):
        with pytest.raises(ValueError, match=r"model|shards"):
            find_model(name)


def test_the_table_says_what_was_measured() -> None:
    cell = {
        "model": "Mixtral-8x7B",
        "weights": "same",
        "tokens": 1,
        "dtype": "bfloat16",
        "touched_experts": 2.0,
        "bytes": 7.05e8,
        "operations": 1,
        "floor_us": 168.0,
        "results": {
            "sm80": {"us": 180.0, "low_us": 179.0, "high_us": 181.0},
            "triton": {"wrong": 0.5},
            "torch_grouped_mm": {"why_not": "no"},
        },
    }
    document = {
        "chip": "NVIDIA H200",
        "date": "2026-01-01",
        "torch": "2",
        "bandwidth_TBps": 4.2,
        "rate_TFLOPps": 790.0,
        "measured_bandwidth_TBps": 4.3,
        "measured_rate_TFLOPps": 800.0,
        "host_overhead": {"us": 20.0, "low_us": 19.0, "high_us": 21.0},
        "cells": [cell],
    }
    text = report.markdown(document)
    row = next(line for line in text.splitlines() if line.startswith("| Mixtral"))
    assert "| 168 | 180 | 179 to 181 | 93% |" in row
    assert "| WRONG | – | 180 vLLM | 1.00 |" in row.replace("| – | WRONG |", "| WRONG | – |")
    assert report.best_peers("NVIDIA A100") == {}
