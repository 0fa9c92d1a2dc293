# SPDX-License-Identifier: Apache-2.0
"""The benchmark's pictures: time against tokens, and ours over the best peer's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib

import report
import summary

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_COLORS = ["#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b"]


def draw(document: dict[str, Any], path: str) -> None:
    """Writes a PNG to `path`."""
    cells = document["cells"]
    panels = list(dict.fromkeys((cell["model"], cell["weights"]) for cell in cells))
    known = report.best_peers(document["chip"])
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.3 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (model, weights) in zip(axes.flat, panels, strict=False):
        mine = [c for c in cells if (c["model"], c["weights"]) == (model, weights)]
        tokens = [cell["tokens"] for cell in mine]
        axis.plot(tokens, [cell["floor_us"] for cell in mine], "k--", lw=1, label="floor")
        for color, name in zip(_COLORS, mine[0]["results"], strict=False):
            points = [
                (cell["tokens"], cell["results"][name]["us"])
                for cell in mine
                if "us" in cell["results"].get(name, {})
            ]
            if points:
                style = {"lw": 2.2, "zorder": 3} if color == _COLORS[0] else {"lw": 1.2}
                axis.plot(*zip(*points, strict=True), "o-", color=color, ms=3, label=name, **style)
        best = [
            (t, known[model, t, weights]["ampere"]["us"])
            for t in tokens
            if (model, t, weights) in known
        ]
        if best:
            axis.plot(
                *zip(*best, strict=True), "x", color="#555555", ms=5, label="best Ampere code"
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(model if weights == "same" else f"{model}, {weights}", fontsize=10)
        axis.set_xticks(tokens, [str(t) for t in tokens])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("microseconds")
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(
        f"One MoE layer, {cells[0]['dtype']}, {document['chip']}, {document['date']}", fontsize=11
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


_MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
_SIX_COLORS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2"]


def draw_ratios(rows: Sequence[dict[str, Any]], document: dict[str, Any], path: str) -> None:
    """Writes a PNG: a panel a kind of weights, ours over the best peer's against tokens.

    Args:
        rows: of summary.rows; those with another routing than uniform are left out.
        document: for the chip and the date.
        path: the file.

    Raises:
        ValueError: no row has a ratio.
    """
    rated = [r for r in rows if r["ratio"] is not None and r["routing"] == "uniform"]
    if not rated:
        raise ValueError("no cell has a peer to compare with")
    kinds = list(dict.fromkeys(row["weights"] for row in rated))
    models = list(dict.fromkeys(row["model"] for row in rated))
    tokens = sorted({row["tokens"] for row in rated})
    figure, axes = plt.subplots(
        1,
        len(kinds),
        figsize=(0.6 + 3.6 * len(kinds), 3.7),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        mine = [row for row in rated if row["weights"] == kind]
        for index, model in enumerate(models):
            points = sorted((r["tokens"], r["ratio"]) for r in mine if r["model"] == model)
            if points:
                axis.plot(
                    [tokens.index(t) for t, _ in points],
                    [ratio for _, ratio in points],
                    color=_SIX_COLORS[index % len(_SIX_COLORS)],
                    marker=_MARKERS[index % len(_MARKERS)],
                    ms=5,
                    lw=1.2,
                    label=model,
                )
        median = summary.statistics_of(mine)["median"]
        axis.axhline(1, color="black", lw=1)
        axis.axhline(median, color="#777777", lw=1, ls="--")
        axis.set_title(f"{summary.LABELS[kind]} weights, median {median:.2f}", fontsize=10)
        axis.set_xticks(range(len(tokens)), [str(t) for t in tokens])
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("our time / best peer's (lower is better)")
    axes[0][0].set_ylim(0, max(1.1, *(1.05 * row["ratio"] for row in rated)))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(6, len(models)), fontsize=8
    )
    figure.suptitle(
        f"One MoE layer in Ampere code, {document['chip']}, {document['date']}", fontsize=11
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
