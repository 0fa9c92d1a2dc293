# SPDX-License-Identifier: Apache-2.0
"""Progress of tuning: a bar on a terminal, a function of the caller's, or nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

# Called with what is done, of how much, and what it was.
Report = Callable[[int, int, str], None]


class Bar:
    """Args:
    show: None: a bar if tqdm is installed and stderr is a terminal. True: a bar, or without
        tqdm a line for each step. False: nothing. A function: it is called.
    """

    def __init__(self, show: bool | None | Report) -> None:
        if show is None:
            show = sys.stderr.isatty() and _tqdm() is not None
        self._report = show if callable(show) else None
        self._visible = show is True
        self._bar: Any = None

    @contextlib.contextmanager
    def task(self, what: str, steps: int) -> Iterator[Callable[[str], None]]:
        """So many steps of one thing; the function that comes back is called after each."""
        tqdm = _tqdm() if self._visible else None
        bar = tqdm(total=steps, desc=what, unit="bucket", leave=False) if tqdm else None
        count = 0

        def done(step: str) -> None:
            nonlocal count
            count += 1
            if self._report is not None:
                self._report(count, steps, f"{what}: {step}")
            if bar is not None:
                bar.set_postfix_str(step)
                bar.update()
            elif self._visible:
                print(f"tuning {what}: {count} of {steps}, {step}", file=sys.stderr)

        try:
            yield done
        finally:
            if bar is not None:
                bar.close()


def _tqdm() -> Any:
    """tqdm's bar, where it is installed: the library does not ask for it."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
