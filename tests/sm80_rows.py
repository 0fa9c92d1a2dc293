# SPDX-License-Identifier: Apache-2.0
"""The rows of one call do not disturb each other, in any tactic of the sm80 backend."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch

from cases import Case
from fused_moe import ActivationType
from gpu_layer import DTYPES, Layer, check, realized, require_sm80, run_poisoned, same_bits
from sm80_tactics import each_tactic, forced

_KINDS = ("same", "int8", "int4_32", "int4_128", "mxfp4")


@contextlib.contextmanager
def _cancelling(case: Case) -> Iterator[Layer]:
    """A layer whose first product is 0, but for the errors of its float32 sums.

    The second half of k is the first one with the opposite sign. What is left differs in its
    leading bits if sums are added in another order or rounded in another place; in a usual product
    few of the 16-bit results would show it. Weights are of the size of 16, activations of 100: what
    is left is then within the range of float16.
    """
    with realized(case, exact=True) as layer:
        half = case.hidden // 2
        layer.input[:, :half] *= 100
        layer.input[:, half:] = -layer.input[:, :half]
        assert layer.scales is not None
        layer.scales.uniform_(0.5, 2)
        depth = layer.fc1.shape[2] // 2
        layer.fc1[:, :, depth:] = layer.fc1[:, :, :depth]
        for weights in (layer.fc1, layer.fc2) if case.weights == "same" else layer.quant_scales:
            if case.weights == "mxfp4":
                weights += 10  # exponents
            else:
                weights *= 1024
        if case.group_size:
            groups = layer.quant_scales[0].shape[2] // 2
            layer.quant_scales[0][:, :, groups:] = layer.quant_scales[0][:, :, :groups]
        for bias in layer.optional.values():
            bias /= 128
        yield layer


def _part(layer: Layer, begin: int, end: int) -> Layer:
    """The layer with some of its tokens."""
    assert layer.scales is not None
    return dataclasses.replace(
        layer,
        input=layer.input[begin:end],
        ids=layer.ids[begin:end],
        scales=layer.scales[begin:end],
    )


@pytest.mark.parametrize("activation", [ActivationType.Swiglu, ActivationType.Identity])
@pytest.mark.parametrize("weights", _KINDS)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_row_depends_on_no_other(dtype: str, weights: str, activation: ActivationType) -> None:
    """Each row of smaller batches has the bits that it has in the largest, all of one expert.

    In a tile it then stands elsewhere, and beside another number of rows. The kernels for few
    tokens divide k by how much work there is: up to 17 tokens of this layer are too little to make
    a difference, where there are 28 multiprocessors or more.
    """
    require_sm80()
    case = Case(
        *("rows", 768, 128, 2, 1, 65),
        dtype=dtype,
        weights=weights,
        activation=activation,
        routing="one_expert",
        biases="none" if activation.is_gated else "both",
    )
    with _cancelling(case) as layer:
        for tactic, pair in each_tactic(case):
            tokens = 17 if tactic.whole_layer else 65
            with forced(tactics=pair):
                expected = _part(layer, 0, tokens).run()
                assert expected.isfinite().all() and expected.any(), tactic.name
                for count in (1, 5, 9, 17, 33):
                    if count >= tokens:
                        continue
                    # In the middle, but at no multiple of 8, and at the end.
                    for begin in ((tokens - count) // 2 - 1, tokens - count):
                        out = _part(layer, begin, begin + count).run()
                        assert same_bits(out, expected[begin : begin + count]), (
                            f"{tactic.name}: rows {begin} to {begin + count - 1} of {tokens} have "
                            f"other bits than in a batch of {count}"
                        )


@pytest.mark.parametrize("weights", ["int4_128", "mxfp4"])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_row_that_is_not_finite_harms_no_other(dtype: str, weights: str) -> None:
    """One NaN and one infinity in two of 16 tokens that share an expert."""
    require_sm80()
    case = Case(
        *("not_finite", 384, 256, 2, 1, 16),
        dtype=dtype,
        weights=weights,
        routing="one_expert",
        biases="both",
    )
    with realized(case) as layer:
        good = torch.tensor([row for row in range(16) if row not in (3, 10)], device="cuda")
        clean = layer.input.clone()
        for tactic, pair in each_tactic(case):
            with forced(tactics=pair):
                layer.input.copy_(clean)
                expected = run_poisoned(layer, 0xFF)
                layer.input[3, 301] = float("nan")
                layer.input[10, 77] = float("inf")
                out = run_poisoned(layer, 0xFF)
                assert same_bits(out[good], expected[good]), tactic.name
                assert out[3].isnan().all() and not out[10].isfinite().any(), tactic.name


@pytest.mark.parametrize("activation", [ActivationType.Swiglu, ActivationType.Relu])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_positive_activations(dtype: str, activation: ActivationType) -> None:
    """Where values do not cancel, an excess of the weights that is subtracted again weighs most."""
    require_sm80()
    for tokens, hidden in ((5, 384), (16, 4096), (70, 1152)):
        case = Case(
            *("positive", hidden, 384, 2, 1, tokens),
            dtype=dtype,
            weights="int4_128",
            activation=activation,
        )
        with realized(case) as layer:
            layer.input.abs_().add_(0.5)
            # INT4 has one more negative number: without this, sums would be, too.
            for scale in layer.quant_scales:
                scale *= torch.randint(0, 2, scale.shape, device="cuda") * 2 - 1
            for tactic, pair in each_tactic(case):
                with forced(tactics=pair):
                    out = run_poisoned(layer, 0xFF)
                try:
                    check(layer, out)
                except AssertionError as error:
                    raise AssertionError(f"{tactic.name}, {tokens} tokens: {error}") from error
