# SPDX-License-Identifier: Apache-2.0
"""`topk_softmax` against float64, and what must hold for any logits."""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies

from fused_moe import topk_softmax

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(0, 8, 2), (1, 1, 1), (7, 8, 8), (64, 64, 6), (33, 128, 8), (5, 512, 10)]


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "k"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(
    dtype: torch.dtype, tokens: int, experts: int, k: int, renormalize: bool
) -> None:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0)).to(dtype)
    scales, ids = topk_softmax(logits, k, renormalize=renormalize)
    assert scales.shape == ids.shape == (tokens, k)
    assert scales.dtype == torch.float32 and ids.dtype == torch.int32
    assert scales.is_contiguous() and ids.is_contiguous(), "as cutlass_fused_moe wants them"
    probabilities = torch.softmax(logits.double(), dim=1)
    # Chosen one by one, the lowest id first among equals: nothing of the code under test.
    for token in range(tokens):
        row = logits[token].tolist()
        best = sorted(range(experts), key=lambda e, row=row: (-row[e], e))[:k]  # type: ignore[misc]
        assert ids[token].tolist() == best
        expected = probabilities[token, best]
        if renormalize:
            expected = expected / expected.sum()
        torch.testing.assert_close(scales[token].double(), expected, rtol=2e-6, atol=1e-9)


def test_ties_take_the_lowest_ids() -> None:
    logits = torch.zeros(3, 300)
    logits[1, 200:] = 1
    logits[2, ::7] = 2
    _, ids = topk_softmax(logits, 4)
    assert ids.tolist() == [[0, 1, 2, 3], [200, 201, 202, 203], [0, 7, 14, 21]]


def test_large_logits_do_not_overflow() -> None:
    scales, ids = topk_softmax(torch.tensor([[3e38, -3e38, 2.9e38]]), 2)
    assert ids.tolist() == [[0, 2]] and scales.tolist() == [[1.0, 0.0]]


def test_minus_infinity_excludes_an_expert() -> None:
    scales, ids = topk_softmax(torch.tensor([[-math.inf, 0.0, -math.inf]]), 2)
    assert ids[0, 0] == 1 and scales[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("renormalize", [True, False])
def test_a_bad_row_keeps_valid_ids_and_shows_nan(value: float, renormalize: bool) -> None:
    logits = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    clean_scales, clean_ids = topk_softmax(logits, 3, renormalize)
    logits[1] = value
    logits[2, 5] = value
    scales, ids = topk_softmax(logits, 3, renormalize)
    assert ((ids >= 0) & (ids < 16)).all()
    assert all(len(set(row)) == 3 for row in ids.tolist())
    assert scales[1:3].isnan().any(dim=1).all(), "the fault must be seen in the scales"
    assert torch.equal(scales[[0, 3]], clean_scales[[0, 3]])
    assert torch.equal(ids[[0, 3]], clean_ids[[0, 3]])


any_float = strategies.floats(width=32, allow_nan=True, allow_infinity=True)


@hypothesis.settings(max_examples=300, deadline=None, database=None, derandomize=True)
@hypothesis.given(
    data=strategies.data(),
    tokens=strategies.integers(0, 5),
    experts=strategies.integers(1, 40),
    renormalize=strategies.booleans(),
)
def test_any_logits(
    data: strategies.DataObject, tokens: int, experts: int, renormalize: bool
) -> None:
    k = data.draw(strategies.integers(1, experts))
    values = strategies.lists(any_float, min_size=experts, max_size=experts)
    rows = data.draw(strategies.lists(values, min_size=tokens, max_size=tokens))
    logits = torch.tensor(rows, dtype=torch.float32).reshape(tokens, experts)
    scales, ids = topk_softmax(logits, k, renormalize)
    assert ((ids >= 0) & (ids < experts)).all()
    for row_ids, row_scales, row in zip(ids.tolist(), scales, logits, strict=True):
        assert len(set(row_ids)) == k
        if row.isnan().any() or row.isposinf().any() or row.isneginf().all():
            continue
        assert ((row_scales >= 0) & (row_scales <= 1)).all()
        assert (row_scales.diff() <= 0).all(), "the largest comes first"
        left_out = [row[e] for e in range(experts) if e not in row_ids]
        assert not left_out or max(left_out) <= row[row_ids].min()
        if renormalize:
            assert math.isclose(float(row_scales.sum()), 1, rel_tol=1e-5)
        elif k == experts:
            assert math.isclose(float(row_scales.sum()), 1, rel_tol=1e-4)


@pytest.mark.parametrize(
    ("logits", "k", "words"),
    [
        (torch.zeros(2, 4), 0, "k is 0; it must be from 1 to the number of experts, 4"),
        (torch.zeros(2, 4), 5, "k is 5; it must be from 1 to the number of experts, 4"),
        (torch.zeros(4), 1, "router_logits is a torch.float32 tensor of shape [4]"),
        (torch.zeros(2, 4, dtype=torch.int64), 1, "router_logits is a torch.int64 tensor"),
    ],
)
def test_bad_arguments(logits: torch.Tensor, k: int, words: str) -> None:
    with pytest.raises(ValueError) as error:
        topk_softmax(logits, k)
    assert words in str(error.value)
