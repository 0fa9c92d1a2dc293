# SPDX-License-Identifier: Apache-2.0
"""The compiled extension: that its stub is true, and how much workspace it asks for."""

from __future__ import annotations

import ast
import itertools
import pathlib
from typing import Any

import pytest
import torch

import fused_moe
from fused_moe import _extension, shapes
from fused_moe import cutlass_fused_moe_workspace_size as workspace_size
from fused_moe.models import MODELS, ModelShape

needs_extension = pytest.mark.skipif(
    _extension.C is None, reason="fused_moe._C is not built: run this by Bazel"
)
needs_sm80 = pytest.mark.skipif(
    _extension.C is None or "sm80" not in _extension.C.BACKENDS,
    reason="this build has no sm80 backend (--config=cpu)",
)


def stub() -> dict[str, ast.stmt]:
    """The definitions of _C.pyi by name."""
    text = (pathlib.Path(fused_moe.__file__).parent / "_C.pyi").read_text()
    named: dict[str, ast.stmt] = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            named[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            named[node.target.id] = node
    return named


@needs_extension
def test_the_stub_names_what_the_extension_has() -> None:
    public = {name for name in dir(_extension.C) if not name.startswith("_")}
    declared = set(stub())
    assert public <= declared, "_C.pyi lacks names"
    assert _extension.C is not None
    if _extension.C.BACKENDS:
        assert public == declared
        assert _extension.C.MAX_LOCAL_EXPERTS == shapes.MAX_LOCAL_EXPERTS


@needs_sm80
def test_the_stub_names_the_arguments() -> None:
    for name, node in stub().items():
        if isinstance(node, ast.ClassDef):
            members = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
            assert all(hasattr(getattr(_extension.C, name), member) for member in members)
            constructor = [n for n in node.body if getattr(n, "name", "") == "__init__"]
            functions, text = constructor, getattr(_extension.C, name).__init__.__doc__
        elif isinstance(node, ast.FunctionDef):
            functions, text = [node], getattr(_extension.C, name).__doc__
        else:
            continue
        for function in functions:
            assert isinstance(function, ast.FunctionDef)
            declared = [a.arg for a in (*function.args.args, *function.args.kwonlyargs)]
            written = text.split("(", 1)[1].split(") ->", 1)[0]
            names = [part.split(":")[0].strip() for part in written.split(", ") if ":" in part]
            assert [n for n in declared if n != "self"] == [n for n in names if n != "self"], name


def workspace_contents(tokens: int, model: ModelShape, experts: int) -> int:
    """The bytes that moe/workspace.h lists, for the routing over `experts` that needs most."""
    slots = tokens * model.top_k
    results = 2 * (model.intermediate_size + model.hidden_size)
    rows_and_slots = 2 * 4
    # Two lists of tiles of 16 rows: every expert has a tile for one row, and then others are full.
    busy = min(experts, slots)
    tiles = 2 * 16 * (busy + (slots - busy) // 16)
    return slots * (results + rows_and_slots) + tiles + 4 * experts + 2 * 4


@needs_sm80
@pytest.mark.parametrize("name", list(MODELS))
def test_workspace_bound(name: str) -> None:
    model = MODELS[name]
    slot = 2 * (model.intermediate_size + 2 * model.hidden_size)
    formats: tuple[dict[str, Any], ...] = (
        {},
        {"weight_dtype": torch.int8},
        {"weight_dtype": torch.uint8},
        {"weight_dtype": torch.uint8, "use_packed_weights": True},
        {"weight_dtype": torch.uint8, "use_w4_group_scaling": True},
    )
    for weights, ep_size in itertools.product(formats, (1, 4)):
        previous = 0
        for tokens in (0, 1, 2, 7, 64, 257, 1000, 4096, 16384, 65536, 131072):
            nbytes = workspace_size(
                tokens,
                model.hidden_size,
                model.intermediate_size,
                model.num_experts,
                model.top_k,
                x_dtype=torch.bfloat16,
                activation_type=model.activation,
                ep_size=ep_size,
                backend="sm80",
                **weights,
            )
            bound = slot * tokens * model.top_k + (1 << 20)
            least = workspace_contents(tokens, model, model.num_experts // ep_size)
            assert max(previous, least) <= nbytes <= bound, (
                f"{tokens} tokens: {nbytes} bytes, not from {least} to {bound}"
            )
            previous = nbytes


@needs_sm80
@pytest.mark.parametrize(
    ("hidden", "inter", "fits"),
    [(1 << 23, 8, False), (8, 1 << 23, False), ((1 << 22) - 8, 8, True), (4096, 14336, True)],
)
def test_few_token_kernels_take_what_they_can_count(hidden: int, inter: int, fits: bool) -> None:
    """They count eighths of slots x H and of slots x I in 32 bits, with signs."""
    assert _extension.C is not None
    problem = _extension.C.Problem(
        num_tokens=2048,
        hidden_size=hidden,
        intermediate_size=inter,
        num_local_experts=1,
        first_local_expert=0,
        top_k=1,
        activation=3,
        dtype=2,
        output_dtype=2,
        weight_format=0,
    )
    assert bool(_extension.C.whole_layer_tactics("sm80", problem, 227 * 1024)) == fits
