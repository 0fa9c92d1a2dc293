# SPDX-License-Identifier: Apache-2.0
"""Merging measurements, rating them against the peers, and what is written about it."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

import summary


def cell(
    model: str, tokens: int, weights: str, results: dict[str, Any], **more: Any
) -> dict[str, Any]:
    return {
        "model": model,
        "tokens": tokens,
        "weights": weights,
        "routing": "uniform",
        "dtype": "bfloat16",
        "touched_experts": 2.0,
        "bytes": 168e-6 * 4.2e12,
        "operations": 1,
        "floor_us": 168.0,
        "results": results,
    } | more


def timed(us: float) -> dict[str, Any]:
    return {"us": us, "low_us": us, "high_us": us, "error": 1e-3}


def document(*cells: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "chip": "NVIDIA H200",
        "date": "2026-01-01",
        "torch": "2",
        "bandwidth_TBps": 4.2,
        "rate_TFLOPps": 790.0,
        "measured_bandwidth_TBps": 4.3,
        "measured_rate_TFLOPps": 800.0,
        "host_overhead": timed(20.0),
        "absent": {},
        "notes": {},
        "ampere": ["marlin", "sglang", "vllm"],
        "cells": list(cells),
    } | more


MIXTRAL = "Mixtral-8x7B"


def test_the_fastest_peer_in_ampere_code_counts() -> None:
    results = {
        "sm80": timed(170.0),
        "vllm": timed(190.0),
        "sglang": timed(180.0),
        "torch_grouped_mm": timed(100.0),
        "marlin": {"why_not": "has no same weights"},
    }
    (row,) = summary.rows(document(cell(MIXTRAL, 1, "same", results)))
    assert (row["best_peer"], row["best_peer_us"], row["us"]) == ("sglang", 180.0, 170.0)
    assert row["ratio"] == pytest.approx(170 / 180, abs=1e-4)
    assert row["not_ampere"] == {"torch_grouped_mm": 100.0}
    # On record: 180 us at a floor of 168.
    assert row["record_us"] == pytest.approx(180, rel=1e-3)


@pytest.mark.parametrize("marlin", [{"failed": "no"}, None])
def test_without_marlin_its_record_counts(marlin: dict[str, Any] | None) -> None:
    results = {"sm80": timed(100.0), "vllm": timed(200.0)}
    if marlin:
        results["marlin"] = marlin
    # On record 112 us at a floor of 84; this cell's bytes are twice those.
    (row,) = summary.rows(document(cell(MIXTRAL, 1, "int8", results | {"vllm": timed(300.0)})))
    assert row["best_peer"] == "Marlin (on record)"
    assert row["best_peer_us"] == pytest.approx(224, rel=1e-3)
    # A peer that was timed and is faster than that record stays the best.
    (row,) = summary.rows(document(cell(MIXTRAL, 1, "int8", results)))
    assert (row["best_peer"], row["best_peer_us"]) == ("vllm", 200.0)


def test_a_timed_marlin_replaces_its_record() -> None:
    results = {"sm80": timed(100.0), "marlin": timed(250.0)}
    (row,) = summary.rows(document(cell(MIXTRAL, 1, "int4", results)))
    assert (row["best_peer"], row["best_peer_us"]) == ("marlin", 250.0)


def test_without_any_peer_there_is_no_ratio() -> None:
    (row,) = summary.rows(document(cell("gpt-oss-20b-sizes", 1, "int4", {"sm80": timed(9.0)})))
    assert row["best_peer"] is None and row["ratio"] is None
    assert "–" in summary.markdown(document(cell("x", 1, "int4", {"sm80": timed(9.0)})))


def test_another_routing_has_no_record() -> None:
    skewed = cell(MIXTRAL, 1, "same", {"sm80": timed(9.0)}, routing="zipf")
    (row,) = summary.rows(document(skewed))
    assert "record" not in row and row["ratio"] is None


def test_many_tokens_are_compared_with_our_own_16_bit() -> None:
    cells = [
        cell(MIXTRAL, tokens, kind, {"sm80": timed(us)})
        for tokens in (64, 512)
        for kind, us in (("same", 100.0), ("int8", 110.0))
    ]
    found = {(r["tokens"], r["weights"]): r for r in summary.rows(document(*cells))}
    assert found[512, "int8"]["of_own_16bit"] == pytest.approx(1.1)
    assert "of_own_16bit" not in found[64, "int8"]
    assert "of_own_16bit" not in found[512, "same"]


def test_later_results_replace_earlier_ones_cell_by_cell() -> None:
    first = document(
        cell(MIXTRAL, 1, "same", {"sm80": timed(9.0), "vllm": timed(8.0)}),
        cell(MIXTRAL, 8, "same", {"sm80": timed(7.0)}),
        absent={"sglang": "gone"},
    )
    second = document(cell(MIXTRAL, 1, "same", {"sm80": timed(5.0)}), ampere=["triton_sm80"])
    both = summary.merged([first, second])
    results = {c["tokens"]: c["results"] for c in both["cells"]}
    assert results[1]["sm80"]["us"] == 5.0 and results[1]["vllm"]["us"] == 8.0
    assert results[8]["sm80"]["us"] == 7.0
    assert both["absent"] == {"sglang": "gone"}
    assert both["ampere"] == ["marlin", "sglang", "triton_sm80", "vllm"]


def test_nothing_and_different_chips_do_not_merge() -> None:
    with pytest.raises(ValueError, match="nothing"):
        summary.merged([])
    with pytest.raises(ValueError, match="different chips"):
        summary.merged([document(), document(chip="NVIDIA A100")])


def test_the_statistics() -> None:
    cells = [
        cell(MIXTRAL, tokens, "same", {"sm80": timed(us), "vllm": timed(100.0)})
        for tokens, us in ((1, 80.0), (8, 90.0), (64, 101.0), (512, 110.0))
    ]
    found = summary.statistics_of(summary.rows(document(*cells)))
    assert found["cells"] == 4
    assert found["median"] == pytest.approx(0.955)
    assert found["worst"]["tokens"] == 512 and found["best"]["tokens"] == 1
    assert [row["tokens"] for row in found["above"]] == [512]
    text = summary.markdown(document(*cells))
    assert "| all | 4 | 0.96 | 1.10, Mixtral-8x7B at 512 tokens |" in text
    assert "- Mixtral-8x7B at 512 tokens, 16-bit: 1.10 of vllm" in text


def test_floors_and_our_own_16_bit_time() -> None:
    cells = [
        cell(MIXTRAL, tokens, kind, {"sm80": timed(us)})
        for tokens, kind, us in (
            (1, "int8", 168.0 * 1.1),
            (8, "int8", 168.0 * 1.3),
            (512, "same", 100.0),
            (512, "int8", 104.0),
            (4096, "same", 100.0),
            (4096, "int8", 112.0),
        )
    ]
    text = "\n".join(summary.bars(summary.rows(document(*cells))))
    assert "| 16-bit | – | – | – | – |" in text
    assert "| INT8 | 1.20 | 1.30, Mixtral-8x7B at 8 tokens | 1.08 | 1.12, Mixtral-8x7B at " in text


def test_what_failed_or_is_wrong_is_said() -> None:
    results = {
        "sm80": timed(9.0),
        "vllm": {"failed": "RuntimeError('x | y')"},
        "sglang": {"wrong": 0.5},
        "marlin": {"why_not": "has no same weights"},
    }
    text = summary.markdown(document(cell(MIXTRAL, 1, "same", results)))
    assert "- vllm, Mixtral-8x7B at 1 token, 16-bit, uniform: RuntimeError('x   y')" in text
    assert (
        "- sglang, Mixtral-8x7B at 1 token, 16-bit, uniform: its result is off by 5.0e-01" in text
    )
    assert "- marlin" not in text


def test_what_is_written(tmp_path: pathlib.Path) -> None:
    results = {"sm80": timed(170.0), "vllm": timed(190.0)}
    whole = document(cell(MIXTRAL, 1, "same", results), cell(MIXTRAL, 8, "same", {}))
    summary.write(whole, tmp_path / "peers.json")
    (row,) = json.loads((tmp_path / "peers.json").read_text(encoding="utf-8"))
    wanted = {"model", "tokens", "weights", "us", "best_peer", "best_peer_us", "ratio"}
    assert wanted <= set(row)


def test_the_picture(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib", reason="no matplotlib here")
    import plot

    cells = [
        cell(MIXTRAL, tokens, kind, {"sm80": timed(90.0), "vllm": timed(100.0)})
        for tokens in (1, 512)
        for kind in ("same", "int8")
    ]
    whole = document(*cells)
    plot.draw_ratios(summary.rows(whole), whole, str(tmp_path / "ratios.png"))
    assert (tmp_path / "ratios.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no cell"):
        plot.draw_ratios([], whole, str(tmp_path / "none.png"))
