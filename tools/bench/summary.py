# SPDX-License-Identifier: Apache-2.0
"""Ours beside the best peer in Ampere code, cell by cell, out of the benchmark's JSON.

    python3 tools/bench/summary.py A.json B.json --out=docs/measurements/sm80_peers.json \
        --table=OUT.md --plot=docs/measurements/sm80_peers.png

The best peer is the fastest of those timed in the same run that run Ampere code. Where Marlin, the
strongest with quantized weights, could not be timed in a cell, what is on record for it counts
instead, times over floors being compared, because another day's routing touched other experts.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import report

LABELS = {"same": "16-bit", "int8": "INT8", "int4": "INT4", "uint8": "UINT8", "mxfp4": "MXFP4"}
# Above this ratio a peer counts as faster: the noise between two measurements.
NOISE = 1.02
_MANY_TOKENS = 512
_FEW_TOKENS = 64


def _key(cell: dict[str, Any]) -> tuple[str, str, int, str]:
    return cell["model"], cell["weights"], cell["tokens"], cell.get("routing", "uniform")


def merged(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One document of several: of two results of one implementation on one cell the later's.

    What describes the run (chip, date, ceilings) is the last document's.

    Raises:
        ValueError: no document, or they are of different chips.
    """
    if not documents:
        raise ValueError("there is nothing to merge")
    chips = {document["chip"] for document in documents}
    if len(chips) > 1:
        raise ValueError(f"measurements of different chips do not belong together: {chips}")
    cells: dict[tuple[str, str, int, str], dict[str, Any]] = {}
    absent: dict[str, str] = {}
    notes: dict[str, str] = {}
    ampere: set[str] = set()
    for document in documents:
        for cell in document["cells"]:
            known = cells.get(_key(cell))
            results = (known["results"] if known else {}) | cell["results"]
            cells[_key(cell)] = cell | {"results": results}
        absent |= document.get("absent", {})
        notes |= document.get("notes", {})
        ampere |= set(document.get("ampere", []))
    everything = {"cells": list(cells.values()), "absent": absent, "notes": notes}
    return documents[-1] | everything | {"ampere": sorted(ampere)}


def _timed_peers(cell: dict[str, Any], ampere: Sequence[str]) -> dict[str, float]:
    return {n: r["us"] for n, r in cell["results"].items() if n in ampere and "us" in r}


def _on_record(
    cell: dict[str, Any], known: dict[tuple[str, int, str], Any]
) -> tuple[str, float] | None:
    """The best on record, scaled from its floor to the cell's; None where there is none."""
    best = known.get((cell["model"], cell["tokens"], cell["weights"]))
    if best is None or cell.get("routing", "uniform") != "uniform":
        return None
    floor = max(cell["bytes"] / best["bandwidth"], cell["operations"] / best["rate"])
    return best["ampere"]["who"], best["ampere"]["us"] / best["floor_us"] * floor * 1e6


def rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry a cell that was timed.

    {model, tokens, weights, us, best_peer, best_peer_us, ratio} and further: routing, floor_us,
    peers (each timed one's us), record and record_us, error; with quantized weights and many tokens
    own_16bit_us and of_own_16bit. best_peer, best_peer_us and ratio are None where no peer has the
    format.
    """
    known = report.best_peers(document["chip"])
    own: dict[tuple[Any, ...], float] = {}
    for cell in document["cells"]:
        if cell["weights"] == "same" and "us" in report.ours_of(cell):
            own[cell["model"], cell["tokens"], cell.get("routing")] = report.ours_of(cell)["us"]
    result = []
    for cell in document["cells"]:
        ours = report.ours_of(cell)
        if "us" not in ours:
            continue
        peers = _timed_peers(cell, document.get("ampere", []))
        candidates = dict(peers)
        record = _on_record(cell, known)
        marlin_missing = cell["weights"] != "same" and "marlin" not in peers
        if record and (not peers or (marlin_missing and record[0] == "Marlin")):
            candidates[f"{record[0]} (on record)"] = record[1]
        best = min(candidates, key=lambda name: candidates[name]) if candidates else None
        row: dict[str, Any] = {
            "model": cell["model"],
            "tokens": cell["tokens"],
            "weights": cell["weights"],
            "us": round(ours["us"], 2),
            "best_peer": best,
            "best_peer_us": round(candidates[best], 2) if best else None,
            "ratio": round(ours["us"] / candidates[best], 4) if best else None,
            "routing": cell.get("routing", "uniform"),
            "floor_us": round(cell["floor_us"], 2),
            "peers": {name: round(us, 2) for name, us in peers.items()},
            "error": ours.get("error"),
        }
        others = {
            name: round(r["us"], 2)
            for name, r in cell["results"].items()
            if "us" in r and name not in peers and r is not ours
        }
        if others:
            row["not_ampere"] = others
        if record:
            row |= {"record": record[0], "record_us": round(record[1], 2)}
        sixteen = own.get((cell["model"], cell["tokens"], cell.get("routing")))
        if cell["weights"] != "same" and cell["tokens"] >= _MANY_TOKENS and sixteen:
            row |= {
                "own_16bit_us": round(sixteen, 2),
                "of_own_16bit": round(ours["us"] / sixteen, 4),
            }
        result.append(row)
    return result


def _name(row: dict[str, Any]) -> str:
    return f"{row['model']} at {row['tokens']} token{'s' if row['tokens'] > 1 else ''}"


def statistics_of(group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the rows with a ratio: cells, median, worst, best, and those above NOISE."""
    rated = [row for row in group if row["ratio"] is not None]
    if not rated:
        return {"cells": 0}
    ordered = sorted(rated, key=lambda row: row["ratio"])
    return {
        "cells": len(rated),
        "median": statistics.median(row["ratio"] for row in rated),
        "worst": ordered[-1],
        "best": ordered[0],
        "above": [row for row in ordered if row["ratio"] > NOISE],
    }


def groups(all_rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """All cells of uniform routing, then each kind of weights, then each other routing."""
    uniform = [row for row in all_rows if row["routing"] == "uniform"]
    result = [("all", uniform)]
    for kind in dict.fromkeys(row["weights"] for row in uniform):
        result.append((LABELS[kind], [row for row in uniform if row["weights"] == kind]))
    for routing in dict.fromkeys(row["routing"] for row in all_rows if row["routing"] != "uniform"):
        result.append((routing, [row for row in all_rows if row["routing"] == routing]))
    return result


def bars(all_rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table of what peers do not enter: few tokens by the floor, many by our own 16-bit time."""
    lines = [
        "| weights | ours / floor, 1 to 64 tokens: median | worst | ours / own 16-bit, from 512 "
        "tokens on: median | worst |",
        "|---|--:|---|--:|---|",
    ]
    for label, group in groups(all_rows)[1:]:
        row = [label]
        floors = [(r["us"] / r["floor_us"], r) for r in group if r["tokens"] <= _FEW_TOKENS]
        own = [(r["of_own_16bit"], r) for r in group if "of_own_16bit" in r]
        for found in (floors, own):
            if found:
                worst, where = max(found, key=lambda pair: pair[0])
                median = statistics.median(value for value, _ in found)
                row += [f"{median:.2f}", f"{worst:.2f}, {_name(where)}"]
            else:
                row += ["–", "–"]
        lines.append("| " + " | ".join(row) + " |")
    return [*lines, ""]


def markdown(document: dict[str, Any]) -> str:
    """The statistics, the cells above the noise, and the table of all cells."""
    all_rows = rows(document)
    lines = ["| | cells | median | worst | best | above 1.02 |", "|---|--:|--:|---|---|--:|"]
    above: list[dict[str, Any]] = []
    for label, group in groups(all_rows):
        found = statistics_of(group)
        if not found["cells"]:
            continue
        worst, best = found["worst"], found["best"]
        lines.append(
            f"| {label} | {found['cells']} | {found['median']:.2f} "
            f"| {worst['ratio']:.2f}, {_name(worst)} | {best['ratio']:.2f}, {_name(best)} "
            f"| {len(found['above'])} |"
        )
        if label != "all":
            above += found["above"]
    lines.append("")
    if above:
        cells = [
            f"{_name(r)}, {LABELS[r['weights']]}"
            + (f", {r['routing']}" if r["routing"] != "uniform" else "")
            + f": {r['ratio']:.2f} of {r['best_peer']}"
            for r in sorted(above, key=lambda r: -r["ratio"])
        ]
        lines += ["A peer is faster in:", "", *(f"- {cell}" for cell in cells), ""]
    lines += [*bars(all_rows), *table(document, all_rows)]
    return "\n".join([*lines, ""])


def table(document: dict[str, Any], all_rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line a cell: floor, ours, each peer in Ampere code, other code, ratio."""
    peers = [n for n in document.get("ampere", []) if any(n in row["peers"] for row in all_rows)]
    others = sorted({name for row in all_rows for name in row.get("not_ampere", {})})
    head = ["model", "weights", "tokens", "floor", "ours", "of floor", *peers, *others]
    head += ["record", "best peer", "ours / best", "ours / own 16-bit"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(head) - 2)]

    def us(value: float | None) -> str:
        return "–" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"

    for row in all_rows:
        kind = LABELS[row["weights"]]
        kind += f", {row['routing']}" if row["routing"] != "uniform" else ""
        cells = [row["model"], kind, str(row["tokens"]), us(row["floor_us"]), us(row["us"])]
        cells.append(f"{row['floor_us'] / row['us']:.0%}")
        cells += [us(row["peers"].get(name)) for name in peers]
        cells += [us(row.get("not_ampere", {}).get(name)) for name in others]
        record = f"{us(row['record_us'])} {row['record']}" if "record" in row else "–"
        ratio = f"{row['ratio']:.2f}" if row["ratio"] is not None else "–"
        own = f"{row['of_own_16bit']:.2f}" if "of_own_16bit" in row else "–"
        lines.append(
            "| " + " | ".join([*cells, record, row["best_peer"] or "–", ratio, own]) + " |"
        )
    lines += troubles(document)
    for name, why in document.get("absent", {}).items():
        lines += ["", f"Not there: {name}: {why}"]
    for name, note in document.get("notes", {}).items():
        lines += ["", f"{name}: {note}."]
    return lines


def troubles(document: dict[str, Any]) -> list[str]:
    """A line for each result that is wrong, or call that failed; those cells have no time."""
    lines = []
    for cell in document["cells"]:
        for name, result in cell["results"].items():
            if "wrong" in result:
                reason = f"its result is off by {result['wrong']:.1e}"
            elif "failed" in result:
                reason = result["failed"][:160].replace("|", " ").replace("\n", " ")
            else:
                continue
            where = f"{_name(cell)}, {LABELS[cell['weights']]}"
            lines.append(f"- {name}, {where}, {cell.get('routing', 'uniform')}: {reason}")
    return ["", "Not timed:", "", *lines] if lines else []


def write(document: dict[str, Any], path: pathlib.Path) -> None:
    """Writes rows() as JSON, a cell a line."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows(document)]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def main() -> None:
    """Merges the documents and writes what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("documents", nargs="+", help="What the benchmark wrote with --json.")
    parser.add_argument("--out", help="Where to write the list of cells, JSON.")
    parser.add_argument("--table", help="Where to write statistics and table, Markdown.")
    parser.add_argument("--plot", help="Where to draw the ratios, a PNG.")
    options = parser.parse_args()
    documents = [json.loads(pathlib.Path(f).read_text(encoding="utf-8")) for f in options.documents]
    document = merged(documents)
    text = markdown(document)
    print(text)
    if options.table:
        pathlib.Path(options.table).write_text(text, encoding="utf-8")
    if options.out:
        write(document, pathlib.Path(options.out))
    if options.plot:
        import plot

        plot.draw_ratios(rows(document), document, options.plot)


if __name__ == "__main__":
    main()
