# SPDX-License-Identifier: Apache-2.0
"""An extension and a machine that are not there, so that tuning is tested without a GPU.

CPU tensors play the part of those on a device. The extension's tactics have made-up times, which
the machine's timer reports and nothing waits for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cpu_layer import make_layer
from fused_moe import _extension, backends, cuda, cutlass_fused_moe, execute
from fused_moe.tuning.engine import Tuner
from fused_moe.tuning.keys import Chip
from fused_moe.tuning.machine import Machine
from fused_moe.tuning.search import Pair, Timer
from fused_moe.tuning.timing import Request

CHIP = Chip("Stand-in 80", 108, 166912, 167936)
HEIGHTS = (16, 32, 64, 128)
NAMES = ("t16", "t32", "t64", "t128", "t256", "fused a", "fused b")


@dataclasses.dataclass(frozen=True)
class Tactic:
    """As the extension's."""

    name: str
    tile_m: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """As the extension's, with its fields to be seen."""

    fields: dict[str, int]


class Extension:
    """Tactics 0 to 3 work, 4 does not fit, 5 and 6 only work together. It chooses 64 rows."""

    BACKENDS = ("sm80",)
    BUILT_FOR = "sm80"

    def __init__(self) -> None:
        self.runs: list[Any] = []
        self.chosen: Pair = (2, 2)

    def Problem(self, **fields: int) -> Sizes:
        """A problem."""
        return Sizes(fields)

    def workspace_size(self, backend: str, problem: Sizes) -> int:
        """Some bytes."""
        return 4096

    def tactics(self, backend: str, weight_format: int = 0) -> list[Tactic]:
        """All seven."""
        return [Tactic(n, h) for n, h in zip(NAMES, (*HEIGHTS, 256, 16, 16), strict=True)]

    def supported_tactics(self, backend: str, problem: Sizes, limit: int) -> list[int]:
        """Those that either GEMM may use."""
        return [0, 1, 2, 3]

    def whole_layer_tactics(self, backend: str, problem: Sizes, limit: int) -> list[Pair]:
        """The one pair that only works together."""
        return [(5, 6)]

    def choose_tactics(self, backend: str, problem: Sizes, **chip: int) -> Pair:
        """The choice without tuning."""
        assert set(chip) == {
            "multiprocessors",
            "shared_memory_per_block",
            "shared_memory_per_multiprocessor",
        }
        return self.chosen

    def run(self, *values: Any) -> None:
        """Keeps the tactics it is given, None without."""
        self.runs.append(values[20] if len(values) > 20 else None)


class StandIn(Machine):
    """Times by a formula: the best height is that of 16 tokens and more, by powers of two."""

    def __init__(self) -> None:
        self.chip_here = CHIP
        self.captures = False
        self.requests: list[Request] = []
        self.problems: list[dict[str, int]] = []
        self.at_once = 0
        self.released = 0
        self.fails_at: int | None = None

    def chip(self, device: torch.device) -> Chip:
        """The one there is."""
        return self.chip_here

    def chips(self) -> set[Chip]:
        """The one there is."""
        return {self.chip_here}

    def capturing(self) -> bool:
        """As the test says."""
        return self.captures

    def release(self) -> None:
        """Counts."""
        self.released += 1

    def clock(self) -> float:
        """Stands still."""
        return 0.0

    @property
    def tuned(self) -> list[int]:
        """The numbers of tokens that were measured, in order."""
        return [request.call.num_tokens for request in self.requests]

    @contextlib.contextmanager
    def timer(self, request: Request) -> Iterator[Timer]:
        """Fails where two threads measure at once."""
        tokens = request.call.num_tokens
        if tokens == self.fails_at:
            raise RuntimeError("CUDA out of memory")
        self.requests.append(request)
        self.at_once += 1
        assert self.at_once == 1, "two threads measure at once"
        wake = threading.Event()

        def time(pair: Pair, rounds: int) -> list[float]:
            wake.wait(0.0001)  # lets other threads in
            return [self.time(tokens, pair)] * rounds

        try:
            yield time
        finally:
            self.at_once -= 1

    @staticmethod
    def best(tokens: int) -> int:
        """The tactic that is fastest for either GEMM."""
        return max(i for i, height in enumerate(HEIGHTS) if height <= max(tokens, 16))

    def time(self, tokens: int, pair: Pair) -> float:
        """Microseconds."""
        if pair == (5, 6):
            return 10.0 if tokens == 1 else 1000.0
        return 60.0 + 10 * sum(abs(i - self.best(tokens)) for i in pair)


@dataclasses.dataclass
class Stage:
    """What a test plays with."""

    extension: Extension
    machine: StandIn
    tuner: Tuner

    def restart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A new process: nothing measured, nothing remembered."""
        self.machine = StandIn()
        self.tuner = Tuner(self.machine)
        self.install(monkeypatch)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Puts the tuner where calls ask it."""
        from fused_moe import tuning

        monkeypatch.setattr(execute, "_passed", {})
        monkeypatch.setattr(execute, "tuner", self.tuner)
        monkeypatch.setattr(tuning, "tuner", self.tuner)
        self.tuner.on_change = lambda: execute._passed.clear()
        self.extension.runs.clear()


def set_stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """`cutlass_fused_moe(..., backend="sm80")` on CPU tensors, with a tuner of its own."""
    extension = Extension()
    monkeypatch.setattr(_extension, "C", extension)
    monkeypatch.setattr(backends, "check_device", lambda backend, device: None)
    monkeypatch.setattr(cuda, "_raw_stream", lambda index: 0)
    monkeypatch.setattr(cuda, "_current_device", lambda: None)
    monkeypatch.setattr(
        cuda,
        "_empty_strided",
        lambda s, strides, dtype: torch.empty_strided(s, strides, dtype=dtype),
    )
    monkeypatch.delenv("FUSED_MOE_TUNING_FILE", raising=False)
    machine = StandIn()
    stage = Stage(extension, machine, Tuner(machine))
    stage.install(monkeypatch)
    return stage


# Options of the layer, not of the call.
LAYER = ("weights", "hidden", "intermediate", "ep_size", "scale_dtype")


def run(stage: Stage, tokens: int = 13, **options: Any) -> Any:
    """A call; returns the tactics that the extension was given, None without."""
    options = {"tune_max_num_tokens": 64, **options}
    layer = {key: options.pop(key) for key in LAYER if key in options}
    cutlass_fused_moe(**make_layer(tokens=tokens, **layer), backend="sm80", **options)
    return stage.extension.runs[-1]
