# SPDX-License-Identifier: Apache-2.0
"""The benchmark's table, in Markdown."""

from __future__ import annotations

import json
import pathlib
from typing import Any

_OURS = ("sm80", "sm90", "cpu")
_PEERS_FILE = pathlib.Path(__file__).parent / "h200_peers.json"


def best_peers(chip: str) -> dict[tuple[str, int, str], dict[str, Any]]:
    """The best peers measured before on this chip, by (model, tokens, weights)."""
    document = json.loads(_PEERS_FILE.read_text(encoding="utf-8"))
    if document["chip"] not in chip:
        return {}
    ceilings = {
        "bandwidth": document["bandwidth_TBps"] * 1e12,
        "rate": document["rate_TFLOPps"] * 1e12,
    }
    return {(c["model"], c["tokens"], c["weights"]): c | ceilings for c in document["cells"]}


def ours_of(cell: dict[str, Any]) -> dict[str, Any]:
    """The result of the library itself in a cell, {} if it was not asked for."""
    return next((cell["results"][name] for name in _OURS if name in cell["results"]), {})


def cell_text(result: dict[str, Any]) -> str:
    """Microseconds, or why there are none."""
    if "us" in result:
        return f"{result['us']:.1f}" if result["us"] < 100 else f"{result['us']:.0f}"
    if "failed" in result:
        return "FAILED"
    return "WRONG" if "wrong" in result else "–"


def _header(document: dict[str, Any]) -> list[str]:
    host = document["host_overhead"]
    return [
        f"{document['chip']}, {document['date']}, torch {document['torch']}.",
        f"Ceilings of the floor: {document['bandwidth_TBps']:.2f} TB/s, "
        f"{document['rate_TFLOPps']:.0f} TFLOP/s (measured here: "
        f"{document['measured_bandwidth_TBps']:.2f} and "
        f"{document['measured_rate_TFLOPps']:.0f}).",
        f"Host time of one eager call: {host['us']:.1f} us "
        f"({host['low_us']:.1f} to {host['high_us']:.1f}).",
        "",
    ]


def markdown(document: dict[str, Any]) -> str:
    """One row a cell: floor, ours with its share of the floor, every peer, the best on record."""
    cells = document["cells"]
    known = best_peers(document["chip"])
    named = dict.fromkeys(name for cell in cells for name in cell["results"])
    peers = [name for name in named if name not in _OURS]
    columns = ["model", "weights", "M", "experts touched", "floor us", "ours us", "p10 to p90"]
    columns += ["of floor", "TB/s", "TFLOP/s", *[f"{peer} us" for peer in peers]]
    columns += ["best Ampere on record us", "ours / best"] if known else []
    lines = _header(document)
    lines.append("| " + " | ".join(columns) + " |")
    lines.append("|---|---|" + "--:|" * (len(columns) - 2))
    for cell in cells:
        ours = ours_of(cell)
        kind = cell["weights"]
        if cell.get("routing", "uniform") != "uniform":
            kind += f", {cell['routing']}"
        row = [cell["model"], kind, str(cell["tokens"])]
        row += [f"{cell['touched_experts']:.1f}", f"{cell['floor_us']:.0f}", cell_text(ours)]
        if "us" in ours:
            seconds = ours["us"] * 1e-6
            row.append(f"{ours['low_us']:.0f} to {ours['high_us']:.0f}")
            row.append(f"{100 * cell['floor_us'] / ours['us']:.0f}%")
            row.append(f"{cell['bytes'] / seconds / 1e12:.2f}")
            row.append(f"{cell['operations'] / seconds / 1e12:.0f}")
        else:
            row += ["–"] * 4
        row += [cell_text(cell["results"].get(peer, {})) for peer in peers]
        if known:
            best = known.get((cell["model"], cell["tokens"], cell["weights"]))
            if best is None or cell.get("routing", "uniform") != "uniform":
                row += ["–", "–"]
            else:
                row.append(f"{best['ampere']['us']} {best['ampere']['who']}")
                # Their routing touched other experts: compare times over floors, both by
                # the ceilings on record.
                floor = max(cell["bytes"] / best["bandwidth"], cell["operations"] / best["rate"])
                theirs = best["ampere"]["us"] / best["floor_us"]
                row.append(f"{ours['us'] * 1e-6 / floor / theirs:.2f}" if "us" in ours else "–")
        lines.append("| " + " | ".join(row) + " |")
    sweeps = _sweep_lines(cells)
    return "\n".join([*lines, *sweeps, ""])


def _sweep_lines(cells: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for cell in cells:
        sweep = ours_of(cell).get("sweep")
        if not sweep:
            continue
        if not lines:
            lines = ["", "Tactics, GEMM 1 / GEMM 2, microseconds of the whole layer:", ""]
        lines.append(
            f"- {cell['model']} {cell['weights']} M={cell['tokens']}: chosen "
            f"{' / '.join(sweep['chosen'])} {sweep['chosen_seconds'] * 1e6:.1f}, best "
            f"{' / '.join(sweep['best'])} {sweep['best_seconds'] * 1e6:.1f}"
        )
        for step in ("gemm1", "gemm2"):
            ranked = sorted(sweep[step].items(), key=lambda pair: pair[1])
            lines.append(f"  - {step}: " + ", ".join(f"{name} {s * 1e6:.1f}" for name, s in ranked))
    return lines
