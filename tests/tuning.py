# SPDX-License-Identifier: Apache-2.0
"""`autotune` around calls: what is measured and when, and what calls then run with.

Nothing here needs a GPU: tuning_stand_ins.py says what takes its place.
"""

from __future__ import annotations

import logging
import re
import threading
from typing import Any

import pytest
import torch

from cpu_layer import make_layer
from fused_moe import autotune, cutlass_fused_moe, tuning
from tuning_stand_ins import Stage, run, set_stage

BUCKETS = [1, 2, 4, 8, 16, 32, 64]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Stage:
    caplog.set_level(logging.INFO, logger="fused_moe")
    return set_stage(monkeypatch)


def test_without_tuning_the_extension_chooses(stage: Stage) -> None:
    assert run(stage) is None and not stage.machine.requests


def test_the_first_call_tunes_every_bucket(stage: Stage) -> None:
    with autotune():
        assert run(stage) == (0, 0)
        assert stage.machine.tuned == BUCKETS
        assert run(stage) == (0, 0) and run(stage, 5) == (0, 0)
    assert stage.machine.tuned == BUCKETS, "what is known was measured again"
    assert stage.machine.released == 1
    # After the context: each number of tokens has its own.
    expected = {1: (5, 6), 2: (0, 0), 16: (0, 0), 32: (1, 1), 40: (1, 1), 64: None, 99: None}
    assert {tokens: run(stage, tokens) for tokens in expected} == expected
    tuning.clear()
    assert run(stage, 32) is None
    assert len(stage.extension.runs) == 11, "one run a call: tuning runs elsewhere"


def test_calls_without_a_kernel_tune_nothing(stage: Stage) -> None:
    with autotune():
        out = cutlass_fused_moe(**make_layer(tokens=13), backend="cpu")
        assert cutlass_fused_moe(**make_layer(tokens=0), backend="sm80").shape == (0, 64)
    assert out.isfinite().all() and not stage.machine.requests and not stage.extension.runs


def test_other_layers_are_other_results(stage: Stage) -> None:
    with autotune(tuning_buckets=[16]):
        run(stage)
    others: list[dict[str, Any]] = [{"hidden": 128}, {"ep_size": 2}, {"weights": "int8"}]
    others.append({"weights": "int8", "scale_dtype": torch.bfloat16})
    sizes = {"hidden": 256, "intermediate": 192}
    others += [{"weights": w, **sizes} for w in ("int4_32", "int4_64", "mxfp4")]
    for options in others:
        assert run(stage, 16, **options) is None, options
        with autotune(tuning_buckets=[16]):
            assert run(stage, 16, **options) == (0, 0)
    assert run(stage, 16) == (0, 0) and stage.machine.tuned == [16] * 8


def test_what_is_measured_is_the_call(stage: Stage) -> None:
    output = torch.full((13, 64), 7.0, dtype=torch.bfloat16)
    workspace = torch.full((4096,), 5, dtype=torch.uint8)
    layer = make_layer(tokens=13, weights="int8")
    before = {n: t.clone() for n, t in layer.items() if isinstance(t, torch.Tensor)}
    with autotune(tuning_buckets=[4, 32], routing="skewed"):
        cutlass_fused_moe(**layer, output=output, workspace_buffer=workspace, backend="sm80")
    for request, tokens in zip(stage.machine.requests, (4, 32), strict=True):
        assert request.routing == "skewed" and request.call.problem.fields["num_tokens"] == tokens
        assert request.call.weight_format == 1 and request.call.workspace_bytes == 4096
        assert request.tensors["fc1_expert_weights"] is layer["fc1_expert_weights"]
        assert request.experts.total == request.experts.local == 4
    assert bool((output == 7).all()) and bool((workspace == 5).all())
    assert all(torch.equal(layer[name], tensor) for name, tensor in before.items())


def test_nested_contexts(stage: Stage) -> None:
    with autotune(tuning_buckets=[1]):
        with autotune(tuning_buckets=[2]):
            run(stage)
        with autotune(False):
            run(stage, 14)  # as FlashInfer: an open context that tunes does
        run(stage, 15)
    assert stage.machine.tuned == [2, 1]
    with pytest.raises(KeyError), autotune(tuning_buckets=[4]):
        raise KeyError
    run(stage, 16)
    assert stage.machine.tuned == [2, 1], "a context was left open"


@pytest.mark.parametrize(
    "options",
    [
        {"tune_mode": False},
        {"skip_ops": "trtllm::fused_moe::gemm1"},
        {"skip_ops": {"fused_moe::cutlass_fused_moe", "fp4_gemm"}},
    ],
)
def test_contexts_that_do_not_tune(stage: Stage, options: dict[str, Any]) -> None:
    with autotune(**options):
        assert run(stage) is None
    assert not stage.machine.requests


def test_flashinfer_arguments(stage: Stage) -> None:
    with autotune(
        True, None, (8, 8, 2), round_up=True, skip_ops={"fp4_gemm"}, cuda_graph_profile_replays=10
    ):
        run(stage)
    assert stage.machine.tuned == [2, 8]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tuning_buckets": ()}, r"tuning_buckets is \(\); it must hold numbers of tokens"),
        ({"tuning_buckets": (0,)}, r"tuning_buckets is \(0,\)"),
        ({"tuning_buckets": ("8",)}, "tuning_buckets is"),
        ({"routing": "fair"}, "routing is 'fair'; it must be one of .*'uniform'"),
        ({"cuda_graph_profile_replays": 0}, "cuda_graph_profile_replays is 0"),
        ({"cache": "/nowhere/tactics.json"}, "cache is .*/nowhere must exist"),
    ],
)
def test_bad_arguments(stage: Stage, options: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words), autotune(**options):
        raise AssertionError("the context was entered")
    run(stage)
    assert not stage.machine.requests


def test_another_routing_measures_anew(stage: Stage) -> None:
    for routing in ("uniform", "uniform", "skewed"):
        with autotune(tuning_buckets=[16], routing=routing):
            run(stage)
    assert [r.routing for r in stage.machine.requests] == ["uniform", "skewed"]


def test_a_batch_that_was_made_up_is_warned_of(
    stage: Stage, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warns(tokens: int, top_k: int, ids: torch.Tensor | None = None) -> bool:
        caplog.clear()
        layer = make_layer(tokens=tokens, top_k=top_k)
        if ids is not None:
            layer["token_selected_experts"] = ids.expand(tokens, top_k).contiguous()
        stage.restart(monkeypatch)
        with autotune(tuning_buckets=[1]):
            cutlass_fused_moe(**layer, backend="sm80")
        assert stage.machine.tuned == [1]
        return 'routing="uniform"' in caplog.text

    same = torch.tensor([0, 1], dtype=torch.int32)
    assert warns(8, 2, same) and warns(13, 2, same[:1])
    assert not warns(7, 2, same), "so few tokens may well go to the same experts"
    assert not warns(13, 2) and not warns(13, 4), "other experts, or all there are"


def test_capture_is_skipped(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    with autotune(tuning_buckets=[16]):
        stage.machine.captures = True
        assert run(stage) is None and run(stage) is None
        assert caplog.text.count("captured into a CUDA graph") == 1
        assert not stage.machine.requests
        stage.machine.captures = False
        assert run(stage) == (0, 0)
        stage.machine.captures = True
        assert run(stage, 16) == (0, 0), "what is known is used in a capture too"


def test_a_bucket_that_fails_is_left_untuned(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    stage.machine.fails_at = 32
    with autotune():
        run(stage)
    assert stage.machine.tuned == [b for b in BUCKETS if b != 32]
    assert "for 32 tokens: CUDA out of memory" in caplog.text
    assert run(stage, 16) == (0, 0)


def test_a_neighbour_with_another_choice_says_nothing(stage: Stage) -> None:
    stage.extension.chosen = (2, 3)
    with autotune(tuning_buckets=[16]):
        assert run(stage, 15) == (0, 0)
        stage.extension.chosen = (3, 3)
        assert run(stage, 14) is None and run(stage, 16) == (0, 0)


def test_what_is_found_later_counts_for_earlier_calls(stage: Stage) -> None:
    with autotune():
        assert run(stage, 40, tune_max_num_tokens=16) == (0, 0)
        run(stage, 64, tune_max_num_tokens=64)
        assert run(stage, 40, tune_max_num_tokens=16) == (1, 1)


def test_what_the_log_says(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    time = stage.machine.time

    def broken(tokens: int, pair: tuple[int, int]) -> float:
        if pair == (1, 2):
            raise RuntimeError("too many resources")
        return time(tokens, pair)

    stage.machine.time = broken
    with autotune(tuning_buckets=[16]):
        run(stage)
    assert "the tactics t32 / t64 do not run for 16 tokens: too many resources" in caplog.text
    words = r"16 tokens: t16 / t16 takes 60\.0 us, untuned t64 / t64 100\.0 us \(noise 0\.5%, "
    assert re.search(words, caplog.text)


def test_threads(stage: Stage) -> None:
    errors: list[BaseException] = []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        try:
            start.wait()
            for tokens in (1 + number, 16, 32):
                for _ in range(3):
                    run(stage, tokens)
        except BaseException as error:
            errors.append(error)

    with autotune():
        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert sorted(stage.machine.tuned) == BUCKETS, "each bucket once"
    assert run(stage, 16) == (0, 0) and run(stage, 32) == (1, 1)


def test_calls_are_settled_once(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    settle = stage.tuner.settle

    def count(call: Any, arguments: Any) -> Any:
        asked.append(call)
        return settle(call, arguments)

    monkeypatch.setattr(stage.tuner, "settle", count)
    with autotune(tuning_buckets=[16]):
        for _ in range(5):
            run(stage, 16)
    assert len(asked) == 1, "every call would pay for a look at the table"
    run(stage, 16)
    with autotune(tuning_buckets=[32]):
        run(stage, 20)
    for _ in range(5):
        run(stage, 16)
    assert len(asked) == 3, "calls must be looked at anew where the table changed, and only then"
    with autotune(tuning_buckets=[16]):
        for _ in range(5):
            run(stage, 16)
    assert len(asked) == 4, "there was nothing left to tune"


def test_a_call_that_is_refused_is_not_tuned(stage: Stage) -> None:
    workspace = torch.empty(4095, dtype=torch.uint8)
    with autotune(), pytest.raises(ValueError, match="workspace_buffer"):
        run(stage, workspace_buffer=workspace)
    whole = torch.empty(4096 + 1, dtype=torch.uint8)
    with autotune(), pytest.raises(ValueError, match=r"workspace_buffer.*aligned"):
        run(stage, workspace_buffer=whole[1:])
    assert not stage.machine.requests


def test_progress(stage: Stage) -> None:
    steps: list[tuple[int, int, str]] = []
    with autotune(tuning_buckets=[1, 16], progress=lambda *step: steps.append(step)):
        run(stage)
    assert [step[:2] for step in steps] == [(1, 2), (2, 2)]
    assert "4 experts of 64x48" in steps[0][2] and steps[0][2].endswith(": 1 tokens")
