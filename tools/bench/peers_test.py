# SPDX-License-Identifier: Apache-2.0
"""The peers from serving engines: our substitutes for their small steps, and their layers.

Through Triton's interpreter, without a GPU. The layers need what bring_peers.py makes:

    FUSED_MOE_PEERS=$PWD/.peers/peers.tar.xz python3 -m pytest tools/bench/peers_test.py
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="this PyTorch came without Triton")

import triton.runtime.interpreter as interpreter

from cells import References
from floors import Shape
from fused_moe import ActivationType
from layers import Model, make_layers, make_weights
from peers import foreign
from peers.engines import EngineMoe, config
from peers.pieces import Substitutes

_patch = interpreter._patch_lang_tensor


def _patch_for_new_numpy(tensor: Any, scope: Any) -> None:
    """The interpreter turns arrays of one element into int, which NumPy 2.4 refuses to do."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_for_new_numpy

_INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
_DEVICE = torch.device("cpu" if _INTERPRETED else "cuda")
pytestmark = pytest.mark.skipif(
    not _INTERPRETED and not torch.cuda.is_available(), reason="TRITON_INTERPRET=0 and no GPU"
)


@pytest.mark.parametrize(("slots", "experts", "block"), [(1, 8, 16), (50, 5, 16), (2500, 12, 32)])
def test_slots_are_sorted_into_whole_tiles(slots: int, experts: int, block: int) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, experts, (slots,), dtype=torch.int32, device=_DEVICE)
    ids[ids == 3] = 2  # an expert without slots
    tiles = slots // block + experts
    ordered = torch.full((tiles * block,), -7, dtype=torch.int32, device=_DEVICE)
    tile_experts = torch.full((tiles,), -7, dtype=torch.int32, device=_DEVICE)
    rows = torch.zeros(1, dtype=torch.int32, device=_DEVICE)
    Substitutes().align(ids.view(-1, 1), experts, block, ordered, tile_experts, rows)
    counts = ids.cpu().bincount(minlength=experts)
    used = (-(-counts // block)).tolist()
    assert int(rows) == sum(used) * block
    position = 0
    for expert, (tiles_used, count) in enumerate(zip(used, counts.tolist(), strict=True)):
        mine = ordered[position * block : (position + tiles_used) * block].tolist()
        expected = torch.where(ids == expert)[0].tolist()
        assert sorted(mine) == expected + [slots] * (len(mine) - count)
        assert tile_experts[position : position + tiles_used].tolist() == [expert] * tiles_used
        position += tiles_used


def test_activation_and_sum() -> None:
    torch.manual_seed(0)
    h = torch.randn(7, 2 * 48, dtype=torch.float16, device=_DEVICE)
    out = torch.empty(7, 48, dtype=torch.float16, device=_DEVICE)
    Substitutes().silu_and_mul(out, h)
    gate, up = h.float().chunk(2, dim=1)
    torch.testing.assert_close(
        out.float(), torch.nn.functional.silu(gate) * up, rtol=1e-3, atol=1e-3
    )
    y = torch.randn(5, 3, 80, dtype=torch.float16, device=_DEVICE)
    total = torch.empty(5, 80, dtype=torch.float16, device=_DEVICE)
    Substitutes().moe_sum(y, total)
    torch.testing.assert_close(total.float(), y.float().sum(dim=1), rtol=1e-3, atol=2e-3)


class Doubling(EngineMoe):
    """An engine whose second configuration does not run."""

    name = "doubling"

    def __init__(self, choices: list[Any]) -> None:
        super().__init__(pathlib.Path())
        self._choices = choices
        self.broken: Any = {"BLOCK_SIZE_M": 0}
        self.ran: list[Any] = []

    def formats(self) -> list[str]:
        return ["same"]

    def choices(self, layer: Any) -> list[Any]:
        return self._choices

    def run_with(self, layer: Any, wanted: Any) -> torch.Tensor:
        self.ran.append(wanted)
        if wanted == self.broken:
            raise RuntimeError("out of resources")
        return layer.x * 2


def test_the_fastest_configuration_that_runs_is_taken() -> None:
    model = Model("test", Shape(32, 32, 8, 2), ActivationType.Swiglu)
    weights = make_weights(model, "same", torch.float16, _DEVICE)
    (layer,) = make_layers(model, 3, 1, [weights], torch.float16)
    fast, broken = config(16, 32, 32, 1, 4, 2), {"BLOCK_SIZE_M": 0}
    engine = Doubling([None, broken, fast])

    def seconds(run: Any) -> float:
        run(layer)
        return 1.0 if engine.ran[-1] == fast else 2.0

    engine.tune(layer, seconds)
    engine.run(layer)
    assert engine.ran == [None, broken, fast, fast]
    assert engine.chosen(layer) == "16/32/32/1/4/2"
    alone = Doubling([None, fast])
    alone.broken = None
    alone.tune(layer, lambda run: run(layer) is None or 1.0)
    assert alone.chosen(layer).startswith("16/32/32/1/4/2; its own does not run: RuntimeError")
    with pytest.raises(RuntimeError, match="no configuration") as raised:
        Doubling([broken]).tune(layer, seconds)
    assert "out of resources" in str(raised.value.__cause__)
    int8 = make_weights(model, "int8", torch.float16, _DEVICE)
    (layer,) = make_layers(model, 3, 1, [int8], torch.float16)
    assert engine.why_not(layer) == "has no int8 weights"


@pytest.mark.parametrize("own", [True, False], ids=["its-own", "given"])
@pytest.mark.parametrize("kind", ["same", "int8", "int4"])
@pytest.mark.parametrize("name", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("tokens", "shape"),
    [(1, Shape(64, 64, 16, 2)), (21, Shape(128, 64, 5, 3)), (5, Shape(32, 32, 8, 2))],
)
def test_engines_agree_with_the_reference(
    tokens: int, shape: Shape, name: str, kind: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = os.environ.get("FUSED_MOE_PEERS")
    if not files:
        pytest.skip("FUSED_MOE_PEERS names no file made by bring_peers.py")
    if _INTERPRETED:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    from implementations import make_peer

    torch.manual_seed(0)
    peer = make_peer(name, str(foreign.unpacked(files)), None)
    model = Model("test", shape, ActivationType.Swiglu)
    weights = make_weights(model, kind, torch.float16, _DEVICE)
    (layer,) = make_layers(model, tokens, 1, [weights], torch.float16)
    if why := peer.why_not(layer):
        pytest.skip(f"{name} {why}")
    given = config(16, 32, 32, 2, 4, 2) | ({"SPLIT_K": 1} if kind == "int4" else {})
    peer._chosen[peer._key(layer)] = None if own else given
    assert References(layer).error(peer) < 1.5e-3
    # The configuration that is asked for is the one that runs, also beside another such peer.
    make_peer(name, str(foreign.unpacked(files)), None)
    with pytest.raises(Exception, match=r"."):
        peer.run_with(layer, given | {"BLOCK_SIZE_K": 33})
