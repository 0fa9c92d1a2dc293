# SPDX-License-Identifier: Apache-2.0
"""The table and the summary of what tuning brought."""

from __future__ import annotations

import json

from outcome import Cell, document, summary, table

from fused_moe.tuning.keys import Entry


def cell(tokens: int, untuned: float, tuned: float) -> Cell:
    tactics = ("fast", "fast") if tuned < untuned else ("plain", "plain")
    return Cell(
        "Model", "int8", tokens, Entry(tactics, ("plain", "plain"), tuned, untuned, "uniform")
    )


CELLS = [cell(1, 30.0, 30.0), cell(64, 110.0, 100.0), cell(512, 102.0, 100.0)]


def test_summary() -> None:
    total = summary(CELLS)
    assert total["median"] == 1.02 and total["worst"] == 1.1 and total["over_bar"] == 1
    assert total["worst_cell"] == "Model, int8 weights, 64 tokens"
    assert total["cells"] == 3 and total["not_measured"] == 0
    assert summary([]) == {} and summary([Cell("Model", "same", 1, None)]) == {}
    assert summary([*CELLS, Cell("Model", "same", 1, None)])["not_measured"] == 1


def test_table() -> None:
    lines = table([*CELLS, Cell("Model", "same", 8, None)]).splitlines()
    assert lines[2] == "| Model | int8 | 1 | 30.0 | 30.0 | 1.000 | plain / plain | the same |"
    assert lines[3] == "| Model | int8 | 64 | 110.0 | 100.0 | 1.100 | plain / plain | fast / fast |"
    assert "not measured" in lines[5]
    assert "median 1.020, worst 1.100 (Model, int8 weights, 64 tokens); 1 above 1.05" in lines[-1]


def test_document() -> None:
    made = document(CELLS, chip="NVIDIA A10", seconds=2.5)
    assert json.loads(json.dumps(made)) == made
    assert made["chip"] == "NVIDIA A10" and made["summary"]["worst"] == 1.1
    assert made["cells"][1] == {
        "model": "Model",
        "weights": "int8",
        "tokens": 64,
        "untuned_us": 110.0,
        "tuned_us": 100.0,
        "ratio": 1.1,
        "untuned": ["plain", "plain"],
        "tuned": ["fast", "fast"],
    }
