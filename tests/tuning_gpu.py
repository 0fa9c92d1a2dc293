# SPDX-License-Identifier: Apache-2.0
"""`autotune` on a GPU: how long it takes, that it finds what is faster and changes nothing else."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cases import Case
from fused_moe import autotune, execute, tuning
from fused_moe.arguments import check_call
from fused_moe.signature import sign
from fused_moe.tuning import samples, storage, timing
from gpu_layer import check, realized, require_sm80, run_poisoned, same_bits

SMALL = Case("tuned", 1024, 512, 16, 4, 100)
FORMATS = ("same", "int8", "int4_64", "mxfp4")


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    require_sm80()
    tuning.clear()
    yield
    tuning.clear()


@pytest.mark.parametrize("weights", FORMATS)
def test_tuning_takes_seconds_and_results_stay_right(weights: str) -> None:
    with realized(dataclasses.replace(SMALL, weights=weights)) as layer:
        untuned = run_poisoned(layer, 0xFF)
        begin = time.monotonic()
        with autotune():
            # Guards around output and workspace show whether tuning writes beyond them.
            first = run_poisoned(layer, 0xFF)
        seconds = time.monotonic() - begin
        assert seconds < 15, f"14 buckets of a small layer took {seconds:.1f} s"
        (entries,) = tuning.tuner.results().values()
        assert len(entries) == 14
        check(layer, first)
        second = run_poisoned(layer, 0x7B)
        assert same_bits(first, second), "two runs with the same tactics differ"
        if tactics_of_the_last_call() is None:
            assert same_bits(untuned, first), "the same tactics, other bits"


def tactics_of_the_last_call() -> Any:
    return list(execute._passed.values())[-1].tactics


@pytest.mark.parametrize("tokens", [1, 64, 1024])
def test_what_is_found_is_not_slower(tokens: int) -> None:
    """Measured once more, in turn with the untuned choice."""
    case = Case("tuned", 2048, 768, 64, 8, tokens)
    with realized(case) as layer, autotune(tuning_buckets=[tokens]):
        layer.run()
        (entries,) = tuning.tuner.results().values()
        entry = entries[tokens]
        assert entry.microseconds <= entry.untuned_microseconds
        arguments = arguments_of(layer)
        call = check_call(sign(arguments))
        space, names = tuning.tuner.space(call, tuning.tuner.machine.chip(call.device))
        pair = (names.index(entry.tactics[0]), names.index(entry.tactics[1]))
        request = timing.Request(call, arguments, samples.Experts(64, 0, 64), "given")
        with timing.graph_timer(request) as timer:
            rounds = [(timer(pair, 1)[0], timer(space.untuned, 1)[0]) for _ in range(15)]
    tuned, untuned = (statistics.median(times) for times in zip(*rounds, strict=True))
    assert tuned <= 1.03 * untuned, f"{entry}: {tuned:.1f} us, untuned {untuned:.1f} us"


def arguments_of(layer: Any) -> dict[str, Any]:
    """The arguments of a call by name, as `execute` has them."""
    caught: dict[str, Any] = {}
    settle = tuning.tuner.settle

    def catch(call: Any, arguments: Any) -> Any:
        caught.update(arguments)
        return settle(call, arguments)

    tuning.tuner.settle = catch  # type: ignore[method-assign]
    try:
        execute._passed.clear()
        layer.run()
    finally:
        del tuning.tuner.settle
    return caught


def test_nothing_else_changes() -> None:
    with realized(SMALL) as layer:
        layer.run()
        torch.cuda.synchronize()
        state = torch.cuda.get_rng_state()
        memory = torch.cuda.memory_allocated()
        tensors = [layer.input, layer.ids, layer.fc1, layer.fc2]
        before = [tensor.clone() for tensor in tensors]
        stream = torch.cuda.current_stream()
        with autotune(tuning_buckets=[1, 16, 256], routing="skewed"):
            layer.run()
        assert torch.equal(torch.cuda.get_rng_state(), state), "random numbers were drawn"
        assert torch.cuda.current_stream() == stream
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
        del before
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() - memory < 2**20, "tuning kept memory"


def test_a_capture_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="fused_moe")
    with realized(SMALL) as layer:
        expected = layer.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with autotune(tuning_buckets=[128]), torch.cuda.graph(graph):
            captured = layer.run()
        assert "captured into a CUDA graph" in caplog.text and not tuning.tuner.results()
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(captured, expected)
        with autotune(tuning_buckets=[128]):
            layer.run()
        assert tuning.tuner.results()


def test_the_file_is_of_this_chip(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "tactics.json")
    with realized(SMALL) as layer:
        with autotune(cache=path, tuning_buckets=[100]):
            first = layer.run()
        (key,) = storage.read(path)
        assert key.chip.name == torch.cuda.get_device_name()
        tuning.clear()
        tuning.load(path)
        assert same_bits(layer.run(), first)
        check(layer, first)
