# SPDX-License-Identifier: Apache-2.0
"""The benchmark's picture: time against tokens, a panel a model, log-log."""

from __future__ import annotations

import math
from typing import Any

import matplotlib

import report

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
                if "us" in cell["results"][name]
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
