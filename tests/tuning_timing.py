# SPDX-License-Identifier: Apache-2.0
"""What a timed graph holds: which calls, with whose tensors, and how their times are read.

Stand-ins take the place of streams, events and graphs, so that this needs no GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cpu_layer import make_layer
from fused_moe import _extension, arguments, autotune, cutlass_fused_moe, tuning
from fused_moe.tuning import samples, timing
from fused_moe.tuning.timing import Request, graph_timer
from tuning_stand_ins import set_stage

INPUT, EXPERTS, SCALES, FC1, FC2, FC1_SCALES = 3, 4, 5, 6, 7, 8
OUTPUT, WORKSPACE, TACTICS = 16, 17, 20


class Clock:
    """A device whose time passes where a graph is replayed; it sees what is going on."""

    def __init__(self) -> None:
        self.milliseconds = 0.0
        self.capturing: Graph | None = None


class Graph:
    """Takes a tenth of a millisecond for each call in it."""

    def __init__(self, clock: Clock, runs: list[Any]) -> None:
        self._clock, self._runs = clock, runs
        self.calls: list[Any] = []

    def capture_begin(self, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local" and self._clock.capturing is None
        self._clock.capturing = self
        self._begin = len(self._runs)

    def capture_end(self) -> None:
        assert self._clock.capturing is self
        self._clock.capturing = None
        self.calls = self._runs[self._begin :]

    def replay(self) -> None:
        assert self.calls and self._clock.capturing is None
        self._clock.milliseconds += 0.1 * len(self.calls)


class Event:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def record(self) -> None:
        self.at = self._clock.milliseconds

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


class Recorder:
    """The extension's `run`, keeping every argument."""

    def __init__(self) -> None:
        self.runs: list[Any] = []

    def __call__(self, *values: Any) -> None:
        self.runs.append(values)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    set_stage(monkeypatch)
    monkeypatch.setattr(timing, "_loaded", set())
    timing._stream_of.cache_clear()
    recorder, clock = Recorder(), Clock()
    monkeypatch.setattr(_extension.C, "run", recorder)
    stream = types.SimpleNamespace(synchronize=lambda: None)
    chip = types.SimpleNamespace(L2_cache_size=1 << 20)
    for name, value in {
        "device": contextlib.nullcontext,
        "stream": contextlib.nullcontext,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "Stream": lambda: stream,
        "Event": lambda enable_timing: Event(clock),
        "CUDAGraph": lambda: Graph(clock, recorder.runs),
        "get_device_properties": lambda device: chip,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    yield recorder
    timing._stream_of.cache_clear()


def request_for(tokens: int, routing: str = "given", **options: Any) -> Request:
    """What the tuner would ask for; the layer is checked for `tokens` as its own."""
    requests: list[Request] = []

    @contextlib.contextmanager
    def timer(request: Request) -> Iterator[Any]:
        requests.append(request)
        yield lambda pair, rounds: [1.0] * rounds

    tuning.tuner.machine.timer = timer  # type: ignore[method-assign]
    with autotune(tuning_buckets=[tokens], routing=routing):
        cutlass_fused_moe(**make_layer(tokens=13, **options), backend="sm80")
    (request,) = requests
    return request


def calls_of(recorder: Recorder, request: Request) -> list[Any]:
    """The arguments of every call in the graph of the tactics (1, 3)."""
    recorder.runs.clear()
    with graph_timer(request) as timer:
        times = timer((1, 3), 5)
        loads = 1  # the first call outside of the capture
        calls = recorder.runs[loads:]
        assert times == pytest.approx([100.0] * 5), "microseconds a call"
        assert len(timer((1, 3), 2)) == 2 and len(recorder.runs) == loads + len(calls)
        assert len(timer((3, 1), 2)) == 2
    assert all(call[TACTICS] == (1, 3) for call in calls)
    return calls


def test_few_tokens_take_turns_among_copies(recorder: Recorder) -> None:
    request = request_for(2, weights="int8")
    calls = calls_of(recorder, request)
    assert len(calls) == timing._MOST_CALLS, "a toy layer: as many calls as may be"
    fc1 = [call[FC1] for call in calls]
    assert len(set(fc1)) == timing._MOST_COPIES and fc1[0] == fc1[timing._MOST_COPIES]
    own = request.tensors["fc1_expert_weights"].data_ptr()
    assert fc1[0] == own, "the caller's own weights are one of the copies"
    assert len({call[EXPERTS] for call in calls}) == len(calls), "each with a routing of its own"
    scales = request.tensors["quant_scales"]
    assert {call[FC1_SCALES] for call in calls} == {scales[0].data_ptr()}
    for index in (INPUT, OUTPUT, WORKSPACE, SCALES):
        assert len({call[index] for call in calls}) == 1 and calls[0][index]
    assert calls[0][INPUT] != request.tensors["input"].data_ptr()
    assert calls[0][1].fields["num_tokens"] == 2


def test_large_layers_are_not_copied(recorder: Recorder) -> None:
    request = request_for(2048, "uniform", hidden=2048, intermediate=512)
    nbytes = sum(request.tensors[f"fc{i}_expert_weights"].nbytes for i in (1, 2))
    assert nbytes > timing._CACHES_BETWEEN << 20
    calls = calls_of(recorder, request)
    assert len(calls) == 1, "one call fills the cache by itself"
    assert calls[0][FC1] == request.tensors["fc1_expert_weights"].data_ptr()


def test_any_default_dtype(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels read float32 scales, whatever PyTorch would make of a Python number."""
    request = request_for(2, "uniform")
    k = request.call.top_k
    read: list[list[float]] = []

    def run(*values: Any) -> None:
        recorder(*values)
        read.append(list((ctypes.c_float * (2 * k)).from_address(values[SCALES])))

    monkeypatch.setattr(_extension.C, "run", run)

    def drawn() -> list[torch.Tensor]:
        experts = samples.Experts(8, 0, 8)
        generator = torch.Generator().manual_seed(0)
        return [samples.random_ids(64, 2, experts, skew, generator) for skew in (False, True)]

    expected = drawn()
    torch.set_default_dtype(torch.bfloat16)
    try:
        calls_of(recorder, request)
        again = drawn()
    finally:
        torch.set_default_dtype(torch.float32)
    assert read and all(scales == pytest.approx([1 / k] * 2 * k) for scales in read)
    assert all(map(torch.equal, again, expected))


def test_tensors_that_are_not_given(recorder: Recorder) -> None:
    layer = make_layer(tokens=13)
    assert request_for(4).tensors["token_final_scales"] is not None
    tuning.clear()
    layer["token_final_scales"] = None
    requests: list[Request] = []

    @contextlib.contextmanager
    def timer(request: Request) -> Iterator[Any]:
        requests.append(request)
        yield lambda pair, rounds: [1.0] * rounds

    tuning.tuner.machine.timer = timer  # type: ignore[method-assign]
    with autotune(tuning_buckets=[4]):
        cutlass_fused_moe(**layer, backend="sm80")
    calls = calls_of(recorder, requests[0])
    assert calls[0][SCALES] == 0 and calls[0][FC1_SCALES] == 0


def test_the_callers_routing(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name in ("given_ids", "random_ids"):
        monkeypatch.setattr(samples, name, noting(getattr(samples, name), asked))
    for tokens, routing, expected in (
        (4, "given", "given_ids"),
        (13, "given", "given_ids"),
        (14, "given", "random_ids"),  # more than the caller has
        (4, "uniform", "random_ids"),
    ):
        tuning.clear()
        request = request_for(tokens, routing)
        asked.clear()
        calls_of(recorder, request)
        assert set(asked) == {expected}, (tokens, routing)


def noting(function: Any, names: list[str]) -> Any:
    """The function, its name noted at each call."""

    def called(*values: Any) -> Any:
        names.append(function.__name__)
        return function(*values)

    return called


def test_a_tactic_that_fails_in_a_capture_ends_it(recorder: Recorder) -> None:
    request = request_for(4)
    call, run = request.call, recorder.runs

    class Refuses(Recorder):
        def __call__(self, *values: Any) -> None:
            if values[TACTICS] == (0, 0):
                raise RuntimeError("invalid configuration")
            run.append(values)

    assert _extension.C is not None
    _extension.C.run = Refuses()  # type: ignore[attr-defined]
    with graph_timer(request) as timer:
        timing._loaded.update(
            ("sm80", call.device, *(2 * [torch.bfloat16]), 0, call.activation, gemm, 0)
            for gemm in (0, 1)
        )
        with pytest.raises(RuntimeError, match="invalid configuration"):
            timer((0, 0), 1)
        assert len(timer((1, 1), 1)) == 1, "the next one must find no capture open"


def test_the_weight_codes_are_the_arguments() -> None:
    from fused_moe.tuning.keys import WEIGHT_FORMATS

    codes = [getattr(arguments, f"WEIGHTS_{n}") for n in ("INT8", "UINT8", "INT4", "MXFP4")]
    assert [WEIGHT_FORMATS[code] for code in codes] == ["int8", "uint8", "int4", "mxfp4"]
    assert WEIGHT_FORMATS[arguments.WEIGHTS_AS_INPUT] == "same"
