# SPDX-License-Identifier: Apache-2.0
"""The comparison of weight formats, on the CPU backend and a small layer."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

import formats
import timing
from cells import Settings
from floors import Ceilings
from layers import find_model


def test_the_ratio_is_of_the_same_round() -> None:
    # A clock that halves from the third round on: medians of each would say 1.5.
    found = formats.compare({"same": [1.0, 1.0, 2.0, 2.0, 2.0], "int8": [1.5, 1.5, 3.0, 3.0, 3.0]})
    assert found["int8"]["ratio"] == found["int8"]["low_ratio"] == pytest.approx(1.5)
    slower = formats.compare({"same": [1.0, 1.0, 2.0], "int8": [1.0, 2.0, 2.0]})
    assert slower["int8"]["ratio"] == pytest.approx(1.0)
    assert slower["int8"]["high_ratio"] == pytest.approx(2.0)
    assert "ratio" not in found["same"]


def test_groups_take_turns() -> None:
    order: list[str] = []
    groups = [[lambda: order.append("a")] * 2, [lambda: order.append("b")]]
    if torch.cuda.is_available():
        pytest.skip("calls of the host are not captured in a graph")
    rounds = timing.measure_in_turns(groups, 0.0, fewest=3)
    assert [len(times) for times in rounds] == [3, 3]
    assert "".join(order) == "aab" + "aab" + "baa" + "aab"


def test_a_cell_holds_every_format() -> None:
    model = find_model("Qwen3-30B-A3B")
    small = dataclasses.replace(
        model, shape=dataclasses.replace(model.shape, hidden=256, intermediate=128, experts=8)
    )
    settings = Settings(torch.bfloat16, Ceilings(1e11, 1e12), cache_bytes=1, seconds=0.0)
    cell = formats.measure(small, 3, ["int8", "int4"], settings, torch.device("cpu"), seed=0)
    assert list(cell["formats"]) == ["same", "int8", "int4"]
    assert all(found["us"] > 0 for found in cell["formats"].values())
    table = formats.markdown([cell])
    assert "INT4 / 16-bit" in table
    assert table.count("|\n") == 3


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-v"]))
