# SPDX-License-Identifier: Apache-2.0
"""The file of results, from one process to the next, on a stand-in of the extension."""

from __future__ import annotations

import json
import logging
import pathlib
import re

import pytest

from fused_moe import autotune, tuning
from fused_moe.tuning import storage
from tuning_stand_ins import CHIP, Stage, run, set_stage


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Stage:
    caplog.set_level(logging.INFO, logger="fused_moe")
    return set_stage(monkeypatch)


def test_the_file_serves_the_next_process(
    stage: Stage, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "tactics.json")
    with autotune(cache=path):
        run(stage)
    stage.restart(monkeypatch)
    with autotune(cache=path):
        assert run(stage, 32) == (1, 1)
    assert not stage.machine.requests, "what the file holds was measured again"
    stage.restart(monkeypatch)
    with autotune(False, cache=path):
        pass
    assert run(stage, 32) == (1, 1) and run(stage, 1) == (5, 6)
    stage.restart(monkeypatch)
    monkeypatch.setenv("FUSED_MOE_TUNING_FILE", path)
    assert run(stage, 32) == (1, 1)
    stage.restart(monkeypatch)
    monkeypatch.delenv("FUSED_MOE_TUNING_FILE")
    tuning.load(path)
    assert run(stage, 32) == (1, 1)
    other = str(tmp_path / "other.json")
    tuning.save(other)
    assert storage.read(other) == storage.read(path)
    text = pathlib.Path(path).read_text()
    assert '["t32", "t32"]' in text and CHIP.name in text and '"experts": 4' in text


def edited(
    stage: Stage, tmp_path: pathlib.Path, pattern: str, replacement: str, times: int = 1
) -> str:
    """A file of this layer's results, changed."""
    path = tmp_path / "tactics.json"
    with autotune(cache=str(path), tuning_buckets=[32]):
        run(stage)
    text, count = re.subn(pattern, replacement, path.read_text())
    assert count == times
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (
            r'"version": "[^"]*"',
            '"version": "0.0.1"',
            r"ignoring 1 of 1 .*fused_moe 0\.0\.1;.*tune",
        ),
        (
            '"name": "Stand-in 80"',
            '"name": "NVIDIA A10"',
            r"1 of 1 layers are for NVIDIA A10 \(108 SMs.*here, which is Stand-in 80",
        ),
        ('"multiprocessors": 108', '"multiprocessors": 56', r"are for Stand-in 80 \(56 SMs"),
        (
            '"shared_memory_per_block": 166912',
            '"shared_memory_per_block": 101376',
            "99 KiB a block",
        ),
        (
            r'"tactics": \["t32"',
            '"tactics": ["t33"',
            r"names the tactics \['t33'\], which this build",
        ),
        (r'"tactics": \["t32"', '"tactics": ["t256"', r"\['t256', 't32'\], which do not fit"),
        (r'"tactics": \["t32"', '"tactics": ["fused a"', "which do not fit this layer and chip"),
    ],
)
def test_results_that_do_not_count_here(
    stage: Stage,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    pattern: str,
    replacement: str,
    message: str,
) -> None:
    path = edited(stage, tmp_path, pattern, replacement)
    stage.restart(monkeypatch)
    caplog.clear()
    with autotune(False, cache=path):
        assert run(stage, 32) is None and run(stage, 33) is None
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1 and re.search(message, warnings[0]), warnings
    assert "0.0.1" not in {key.version for key in stage.tuner.results()}
    assert "tactics.json" in warnings[0] or "4 experts of 64x48" in warnings[0]


def test_results_of_others_are_kept(
    stage: Stage, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = edited(stage, tmp_path, '"name": "Stand-in 80"', '"name": "NVIDIA A10"')
    stage.restart(monkeypatch)
    with autotune(cache=path, tuning_buckets=[32]):
        assert run(stage, 32) == (1, 1)
    assert stage.machine.tuned == [32]
    assert {key.chip.name for key in storage.read(path)} == {"Stand-in 80", "NVIDIA A10"}


def test_newer_results_of_others_are_kept(
    stage: Stage, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = edited(stage, tmp_path, "nothing", "nothing", 0)
    stage.restart(monkeypatch)
    with autotune(cache=path, tuning_buckets=[16]):
        run(stage)
        text = pathlib.Path(path).read_text()
        pathlib.Path(path).write_text(text.replace('"microseconds": 60.0', '"microseconds": 7.5'))
    (entries,) = storage.read(path).values()
    assert (entries[16].microseconds, entries[32].microseconds) == (60.0, 7.5)


def test_a_file_that_is_something_else(
    stage: Stage,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("buy milk")
    with pytest.raises(ValueError, match=r"notes.txt is not JSON"), autotune(cache=str(path)):
        raise AssertionError("the context was entered")
    with pytest.raises(ValueError, match=r"notes.txt is not JSON"):
        tuning.load(str(path))
    # A server that was told of it by the environment still runs, and says so.
    monkeypatch.setenv("FUSED_MOE_TUNING_FILE", str(path))
    assert run(stage) is None and run(stage, 5) is None
    assert caplog.text.count("running untuned") == 1, "it is read once"
    assert re.search("FUSED_MOE_TUNING_FILE=.*not JSON.*running untuned", caplog.text)
    stage.restart(monkeypatch)
    monkeypatch.setenv("FUSED_MOE_TUNING_FILE", str(tmp_path / "missing.json"))
    assert run(stage) is None and "missing.json" in caplog.text
    assert path.read_text() == "buy milk"


def test_a_file_that_cannot_be_written(
    stage: Stage, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tactics.json"
    with autotune(cache=str(path)):
        run(stage)
        path.mkdir()
    assert "tuning results could not be written to" in caplog.text
    assert run(stage, 32) == (1, 1), "what was found still counts"


def test_a_body_that_fails_keeps_what_was_found(stage: Stage, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tactics.json"
    with pytest.raises(KeyError), autotune(cache=str(path), tuning_buckets=[16]):
        run(stage)
        raise KeyError
    assert json.loads(path.read_text())["results"][0]["tokens"]["16"]["tactics"] == ["t16", "t16"]
    assert run(stage, 16) == (0, 0)
