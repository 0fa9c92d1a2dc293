# SPDX-License-Identifier: Apache-2.0
"""The benchmark's Triton peer is right: through Triton's interpreter, without a GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="this PyTorch came without Triton")

import triton.runtime.interpreter as interpreter

from floors import Shape
from fused_moe import ActivationType
from layers import Model, make_layers, make_weights
from peers.triton_moe import Config, TritonMoe

_patch = interpreter._patch_lang_tensor


def _patch_for_new_numpy(tensor: Any, scope: Any) -> None:
    """The interpreter turns arrays of one element into int, which NumPy 2.4 refuses to do."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_for_new_numpy

_INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize("weights", ["same", "int8", "uint8"])
@pytest.mark.parametrize(
    ("tokens", "shape"),
    [
        (1, Shape(32, 48, 8, 2)),
        (21, Shape(80, 32, 5, 3)),
        (400, Shape(16, 16, 12, 3)),
    ],
)
def test_agrees_with_the_reference(tokens: int, shape: Shape, weights: str) -> None:
    if not _INTERPRETED and not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 and no GPU")
    device = torch.device("cpu" if _INTERPRETED else "cuda")
    torch.manual_seed(0)
    model = Model("test", shape, ActivationType.Swiglu)
    copies = [make_weights(model, weights, torch.float16, device)]
    (layer,) = make_layers(model, tokens, 1, copies, torch.float16)
    config = Config(block_m=16, block_n=32, block_k=32, group_m=2, warps=4, stages=2)
    out = TritonMoe(None).run_with(layer, config, config).float()
    expected = layer.reference(torch.arange(tokens, device=device))
    assert float((out - expected).norm() / expected.norm()) < 1.5e-3
