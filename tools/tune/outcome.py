# SPDX-License-Identifier: Apache-2.0
"""What tuning brought, as a table and as a JSON document: untuned over tuned, cell by cell."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from fused_moe.tuning.keys import Entry

# How much the choice without tuning may lose to the tuned one.
BAR = 1.05


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model, format of weights and number of tokens; entry None: it could not be measured."""

    model: str
    weights: str
    tokens: int
    entry: Entry | None

    @property
    def ratio(self) -> float:
        """The untuned time over the tuned one: 1 or more."""
        assert self.entry is not None
        return self.entry.untuned_microseconds / self.entry.microseconds


def summary(cells: Sequence[Cell]) -> dict[str, Any]:
    """The ratios' median and worst, and how many cells exceed BAR; {} without cells."""
    measured = [cell for cell in cells if cell.entry is not None]
    if not measured:
        return {}
    worst = max(measured, key=lambda cell: cell.ratio)
    return {
        "cells": len(measured),
        "not_measured": len(cells) - len(measured),
        "median": round(statistics.median(cell.ratio for cell in measured), 4),
        "worst": round(worst.ratio, 4),
        "worst_cell": f"{worst.model}, {worst.weights} weights, {worst.tokens} tokens",
        "bar": BAR,
        "over_bar": sum(cell.ratio > BAR for cell in measured),
    }


def document(cells: Sequence[Cell], **about: Any) -> dict[str, Any]:
    """Everything, for a JSON file."""
    rows: list[dict[str, Any]] = []
    for cell in cells:
        row: dict[str, Any] = {"model": cell.model, "weights": cell.weights, "tokens": cell.tokens}
        if cell.entry is not None:
            row |= {
                "untuned_us": cell.entry.untuned_microseconds,
                "tuned_us": cell.entry.microseconds,
                "ratio": round(cell.ratio, 4),
                "untuned": list(cell.entry.untuned),
                "tuned": list(cell.entry.tactics),
            }
        rows.append(row)
    return {**about, "summary": summary(cells), "cells": rows}


def table(cells: Sequence[Cell]) -> str:
    """Markdown: a row a cell, and the summary."""
    lines = [
        "| model | weights | tokens | untuned us | tuned us | ratio | untuned | tuned |",
        "|---|---|--:|--:|--:|--:|---|---|",
    ]
    for cell in cells:
        start = f"| {cell.model} | {cell.weights} | {cell.tokens} "
        if cell.entry is None:
            lines.append(start + "| not measured | | | | |")
            continue
        same = cell.entry.tactics == cell.entry.untuned
        lines.append(
            start + f"| {cell.entry.untuned_microseconds:.1f} | {cell.entry.microseconds:.1f} "
            f"| {cell.ratio:.3f} | {' / '.join(cell.entry.untuned)} "
            f"| {'the same' if same else ' / '.join(cell.entry.tactics)} |"
        )
    total = summary(cells)
    if total:
        lines += [
            "",
            f"Untuned over tuned, {total['cells']} cells: median {total['median']:.3f}, worst "
            f"{total['worst']:.3f} ({total['worst_cell']}); {total['over_bar']} above {BAR}.",
        ]
    return "\n".join(lines) + "\n"
