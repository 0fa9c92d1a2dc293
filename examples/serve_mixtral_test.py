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
    graphs = re.search(r"^fused_moe +(?:[\d,]+ +){3}([\d,]+|-) ", done.stdout, re.MULTILINE)
    assert graphs and (graphs[1] == "-") == (device == "cpu"), done.stdout


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
    assert "FAILED: fused_moe agrees with eager in" in done.stderr
