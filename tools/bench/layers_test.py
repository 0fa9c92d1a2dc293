# SPDX-License-Identifier: Apache-2.0
"""The layers that are timed: their weights, routing and reference; and Marlin's layouts of them."""

from __future__ import annotations

import pytest
import torch

from cells import References, key_of
from floors import Shape
from fused_moe import ActivationType
from layers import Layer, Model, find_model, group_size_of, make_layers, make_weights
from ours import Ours
from peers.marlin_layout import CHANNEL_ORDER, GROUPED_ORDER, permuted_scales, words_along_k
from tolerances import TOLERANCES

CPU = torch.device("cpu")
MODEL = Model("test", Shape(128, 64, 6, 2), ActivationType.Swiglu)
KINDS = ["same", "int8", "uint8", "int4", "mxfp4"]


def make_layer(kind: str, tokens: int = 9, routing: str = "uniform") -> Layer:
    torch.manual_seed(0)
    weights = make_weights(MODEL, kind, torch.bfloat16, CPU)
    (layer,) = make_layers(MODEL, tokens, 1, [weights], torch.bfloat16, routing)
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_keep_the_activations_size(kind: str) -> None:
    out = make_layer(kind, 40).reference(torch.arange(40))
    # silu(g) * l of unit normals has the root mean square 0.6; two experts are averaged.
    assert 0.2 < float(out.square().mean().sqrt()) < 1.2


@pytest.mark.parametrize("kind", KINDS)
def test_ours_agrees_with_the_reference(kind: str) -> None:
    layer = make_layer(kind)
    assert References(layer).error(Ours("cpu")) < TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("kind", KINDS)
def test_swapped_halves_are_noticed(kind: str) -> None:
    class Wrong(Ours):
        gate_first = True

    assert References(make_layer(kind)).error(Wrong("cpu")) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_weight(kind: str) -> None:
    weights = make_layer(kind).weights
    stored = [weights.fc1, weights.fc2]
    numbers = MODEL.shape.experts * MODEL.shape.expert_numbers()
    if weights.group_size:
        stored += weights.quant_scales
    assert sum(t.numel() * t.element_size() for t in stored) == numbers * weights.number_size()


def test_groups_divide_both_products() -> None:
    assert group_size_of(find_model("Mixtral-8x7B").shape, "int4") == 128
    assert group_size_of(find_model("gpt-oss-20b-sizes").shape, "int4") == 64
    assert group_size_of(find_model("gpt-oss-20b-sizes").shape, "mxfp4") == 32
    assert group_size_of(find_model("Mixtral-8x7B").shape, "int8") == 0
    with pytest.raises(ValueError, match="no group"):
        group_size_of(Shape(48, 64, 4, 2), "int4")


def test_a_copy_lies_elsewhere_and_takes_packed_weights_along() -> None:
    weights = make_layer("int4").weights
    weights.packed["peer"] = (weights.fc1 + 1,)
    copy = weights.copy()
    assert (copy.kind, copy.group_size) == ("int4", 64)
    for mine, theirs in zip(
        [weights.fc1, weights.fc2, *weights.quant_scales, *weights.packed["peer"]],
        [copy.fc1, copy.fc2, *copy.quant_scales, *copy.packed["peer"]],
        strict=True,
    ):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()


def test_zipf_routing_is_skewed_and_uniform_is_not() -> None:
    shares = {}
    for routing in ("uniform", "zipf"):
        torch.manual_seed(1)
        wide = Model("wide", Shape(32, 32, 32, 2), ActivationType.Swiglu)
        weights = make_weights(wide, "same", torch.bfloat16, CPU)
        (layer,) = make_layers(wide, 4000, 1, [weights], torch.bfloat16, routing)
        assert all(len(set(row)) == 2 for row in layer.ids.tolist())
        shares[routing] = layer.ids.flatten().bincount(minlength=32).sort(descending=True)[0] / 8000
    assert float(shares["uniform"][0]) < 1.3 / 32
    # One draw has 1 / (1 + 1/2 + ... + 1/32) = 0.25 for the first, half of it for the second.
    assert 0.2 < float(shares["zipf"][0]) < 0.27
    assert 0.1 < float(shares["zipf"][1]) < 0.16


def test_cells_differ_by_their_routing() -> None:
    cell = {"model": "m", "weights": "same", "tokens": 1}
    assert key_of(cell) == key_of(cell | {"routing": "uniform"})
    assert key_of(cell) != key_of(cell | {"routing": "zipf"})


def test_words_hold_the_first_k_lowest() -> None:
    int8 = torch.tensor([[[-128, -1, 0, 127, 5, 6, 7, 8]]], dtype=torch.int8)
    words = words_along_k(int8)
    assert words.shape == (1, 2, 1)
    assert [int(w) & 0xFFFFFFFF for w in words.flatten()] == [0xFF807F00, 0x88878685]
    int4 = torch.tensor([[[0x10, 0x32, 0x54, 0x76]]], dtype=torch.uint8)
    assert int(words_along_k(int4).flatten()[0]) == 0x76543210


def test_scales_in_marlins_order() -> None:
    assert sorted(GROUPED_ORDER) == list(range(64)) and sorted(CHANNEL_ORDER) == list(range(32))
    grouped = torch.arange(2 * 128 * 3, dtype=torch.float32).reshape(2, 128, 3)
    packed = permuted_scales(grouped, torch.float32)
    assert packed.shape == (2, 3, 128)
    for column in range(128):
        source = column // 64 * 64 + GROUPED_ORDER[column % 64]
        assert torch.equal(packed[1, :, column], grouped[1, source])
    channel = torch.arange(2 * 64, dtype=torch.float32).reshape(2, 64)
    packed = permuted_scales(channel, torch.float32)
    assert packed.shape == (2, 1, 64)
    for column in range(64):
        source = column // 32 * 32 + CHANNEL_ORDER[column % 32]
        assert packed[1, 0, column] == channel[1, source]
