# SPDX-License-Identifier: Apache-2.0
"""The example runs, compares what it says it compares, and fails where it must."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers 5 or newer")
pytest.importorskip("absl", reason="needs absl-py")

PROGRAM = pathlib.Path(__file__).absolute().with_name("serve_mixtral.py")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SMALL = ("--size=small", "--layers=1", "--batch=2", "--prompt=12", "--new_tokens=4", "--repeats=1")


def run(*flags: str, program: str = "") -> subprocess.CompletedProcess[str]:
    """The example with these flags; `program` is put before its last line."""
    source = PROGRAM.read_text(encoding="utf-8")
    source = source.replace("\nif __name__", f"\n{program}\nif __name__")
    return subprocess.run(
        [sys.executable, "-c", source, *SMALL, *flags],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def rows(output: str) -> dict[str, str]:
    """The lines of the table by their implementations."""
    return {line[1]: line[0] for line in re.finditer(r"^(\w+) .*%$", output, re.MULTILINE)}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_it_runs(family: str, device: str) -> None:
    dtype = "float32" if device == "cpu" else "bfloat16"
    done = run(f"--family={family}", f"--device={device}", f"--dtype={dtype}")
    assert done.returncode == 0, done.stdout + done.stderr
    shares = dict(re.findall(r"^(\w+) .* ([\d.]+)%$", done.stdout, re.MULTILINE))
    assert list(shares) == ["eager", "grouped_mm", "fused_moe", "fused_moe_int8"], done.stdout
    assert shares["eager"] == "100.0"
    assert float(shares["fused_moe"]) >= (99 if device == "cpu" else 80)
    assert float(shares["fused_moe_int8"]) > 50
    table = {name: re.split(r"\s{2,}", line)[1:] for name, line in rows(done.stdout).items()}
    assert all(len(cells) == 6 for cells in table.values()), "columns run together\n" + done.stdout
    off = {name: float(cells[4].rstrip("%")) for name, cells in table.items()}
    assert off["eager"] == 0 and off["fused_moe"] <= (0.01 if device == "cpu" else 2)
    assert 0.01 < off["fused_moe_int8"] < 10
    for name in ("grouped_mm", "fused_moe", "fused_moe_int8"):
        graphs = table[name][3]
        assert graphs == "-" if device == "cpu" else re.fullmatch(r"[\d,]+", graphs), done.stdout


def test_it_fails_where_tokens_differ() -> None:
    """With the gate and the up half of fc1 exchanged, the commonest mistake."""
    wrong = """
def swap(model):
    prepared(model)
    for name, module in model.named_modules():
        if name.endswith("experts"):
            module.gate_up_proj.data = fused_moe.up_gate_from_gate_up(module.gate_up_proj.data)
import fused_moe
prepared, moe.prepare = moe.prepare, swap
"""
    done = run("--device=cpu", "--experts=eager,fused_moe", "--dtype=float32", program=wrong)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"FAILED: fused_moe's logits are \d{2,}\.\d+% off eager's", done.stderr)


# Takes the place of CUDA graphs, on the CPU: `replay` is what a captured step does.
CAPTURED = """
def captured(run):
    return lambda: replay(run)
def graphs(model, name, prompt, new, first):
    result, tokens, logits = measured(model, name, prompt, new, first)
    result.graph_rate, result.graph_note = graph_rate(model, prompt, tokens)
    return result, tokens, logits
capture, measured, measure = captured, measure, graphs
"""
REPLAYS = {
    "same": (
        "def replay(run): run.step()",
        r"[\d,]+",
        False,
    ),
    # Sums in another order: of random tokens some turn out otherwise, and no rate is withheld.
    "rounding": (
        "def replay(run): run.step(); run.logits.mul_(1 + 2**-8 * torch.randn(run.logits.shape))",
        r"[\d,]+",
        True,
    ),
    # What a graph does that was captured with the length of the cache as a number.
    "stale": (
        "def replay(run):\n"
        "    run.step()\n"
        "    for layer in run.cache.layers: layer.cumulative_length.sub_(1)",
        "other logits",
        True,
    ),
}


@pytest.mark.parametrize(("replay", "expected", "noted"), REPLAYS.values(), ids=REPLAYS)
def test_replayed_steps_are_compared(replay: str, expected: str, noted: bool) -> None:
    program = CAPTURED + replay
    done = run("--device=cpu", "--experts=fused_moe", "--dtype=bfloat16", program=program)
    assert done.returncode == 0, done.stdout + done.stderr
    cell = re.split(r"\s{2,}", rows(done.stdout)["fused_moe"])[4]
    assert re.fullmatch(expected, cell), done.stdout
    assert ("CUDA graphs:   fused_moe: logits off by" in done.stdout) == noted, done.stdout
