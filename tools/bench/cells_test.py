# SPDX-License-Identifier: Apache-2.0
"""One cell: what is measured, and what becomes of an implementation that fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cells
from floors import Ceilings, Shape
from fused_moe import ActivationType
from layers import Layer, Model, make_weights
from ours import Ours

MODEL = Model("test", Shape(64, 32, 8, 2), ActivationType.Swiglu)
SETTINGS = cells.Settings(torch.bfloat16, Ceilings(1e9, 1e9), cache_bytes=1, seconds=0.001)


class Peer:
    """An implementation that does what it is told."""

    gate_first = False

    def __init__(self, name: str, run: Any, why_not: str | None = None) -> None:
        self.name, self._run, self._why_not = name, run, why_not
        self.calls = 0

    def why_not(self, layer: Layer) -> str | None:
        return self._why_not

    def tune(self, layer: Layer, seconds: Any) -> None:
        seconds(lambda one: None)

    def chosen(self, layer: Layer) -> str:
        return "the only one"

    def run(self, layer: Layer) -> torch.Tensor:
        self.calls += 1
        return self._run(layer)


def exact(layer: Layer) -> torch.Tensor:
    return layer.reference(torch.arange(layer.x.shape[0])).bfloat16()


def fail(error: Exception) -> Any:
    def run(layer: Layer) -> torch.Tensor:
        raise error

    return run


def filled(*implementations: Any, known: dict[str, Any] | None = None) -> dict[str, Any]:
    torch.manual_seed(0)
    weights = [make_weights(MODEL, "int4", torch.bfloat16, torch.device("cpu"))]
    layers = cells.layers_of_cell(MODEL, 5, weights, "uniform", SETTINGS)
    cell = cells.describe(MODEL, 5, layers, "uniform", SETTINGS)
    cell["results"] = dict(known or {})
    cells.fill(cell, list(implementations), layers[:1], SETTINGS)
    return cell


def test_a_cell_is_described_and_timed() -> None:
    cell = filled(Ours("cpu"), Peer("peer", exact))
    assert cells.key_of(cell) == ("test", "int4", 5, "uniform")
    assert cell["group_size"] == 32 and cell["operations"] == 2 * 5 * 2 * 64 * 32 * 3
    assert {"us", "low_us", "high_us", "error", "config"} <= set(cell["results"]["cpu"])
    assert cell["results"]["peer"]["error"] < 5e-3
    assert cell["results"]["peer"]["config"] == "the only one"


def test_what_is_wrong_or_fails_is_reported_and_the_rest_is_timed() -> None:
    results = filled(
        Peer("wrong", lambda layer: exact(layer) * 1.1),
        Peer("nan", lambda layer: exact(layer) * float("nan")),
        Peer("fails", fail(RuntimeError("no such kernel"))),
        Peer("refuses", exact, why_not="has no int4 weights"),
        Peer("fine", exact),
    )["results"]
    assert results["wrong"] == {"wrong": pytest.approx(0.1, rel=0.05)}
    assert results["nan"] == {"wrong": float("inf")}
    assert "no such kernel" in results["fails"]["failed"]
    assert results["refuses"] == {"why_not": "has no int4 weights"}
    assert "us" in results["fine"]


def test_each_is_timed_in_two_rounds_of_opposite_orders() -> None:
    order: list[str] = []

    def noted(name: str) -> Any:
        def run(layer: Layer) -> torch.Tensor:
            if not order or order[-1] != name:
                order.append(name)
            return exact(layer)

        return run

    results = filled(Peer("a", noted("a")), Peer("b", noted("b")))["results"]
    assert order == ["a", "b", "a"]
    assert results["a"]["low_us"] <= results["a"]["us"] <= results["a"]["high_us"]
    assert results["a"]["replays"] >= 6


def test_what_is_known_is_not_measured_again() -> None:
    peer = Peer("peer", exact)
    results = filled(peer, known={"peer": {"us": 1.0}})["results"]
    assert results == {"peer": {"us": 1.0}} and peer.calls == 0


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this PyTorch does not tell")
def test_a_lost_device_ends_the_process_but_not_the_record() -> None:
    after = Peer("after", exact)
    with pytest.raises(cells.DeviceLost) as raised:
        filled(Peer("bad", fail(torch.AcceleratorError("an illegal memory access"))), after)
    assert "illegal" in raised.value.cell["results"]["bad"]["failed"]
    assert after.calls == 0 and "after" not in raised.value.cell["results"]


def test_forced_tactics_that_do_not_exist_stop_the_benchmark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Sm80(Ours):
        def __init__(self) -> None:
            super().__init__("sm80")

    monkeypatch.setattr(cells, "tactics_of", lambda layer: [])
    settings = cells.dataclasses.replace(SETTINGS, tactics="a,b")
    with pytest.raises(cells.NoSuchTactic, match="a,b"):
        cells.measure_with_tactics(Sm80(), [None], 1.0, None, settings)
