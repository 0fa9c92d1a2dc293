# SPDX-License-Identifier: Apache-2.0
"""Every tactic of the sm80 backend on numbers whose products are exact, bit for bit.

Weights are small integers, or E2M1 numbers, times powers of two that differ from scale to scale,
and activations small integers. All float32 sums are then exact in any order, and the 16-bit result
is known: a wrong order of k, a wrong weight row or the scale of another group cannot hide in a
tolerance.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch

from cases import FOUR_BIT, WEIGHTS, Case
from fused_moe import ActivationType
from gpu_layer import DTYPES, Layer, realized, require_sm80, run_poisoned, same_bits
from sm80_tactics import each_tactic, forced

# Which weights of the layer are random. The others copy: a row of them is one number.
_DENSE = ("first", "up", "gate", "second")
# One step or two of k, an odd number of steps, and of those of 128.
_DEPTHS = (128, 384, 1152)
_TOKENS = 70
# In the first column of the input, which "up" and "gate" copy from.
_FOUR = 4
_E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


def _columns(weights: str) -> int:
    """As odd a number of columns as the format takes: of the largest tile it is no multiple."""
    return {"same": 152, "int8": 176, "uint8": 176, "int4_64": 192, "int4_128": 384}.get(
        weights, 160
    )


@dataclasses.dataclass
class _Weights:
    """Of one product: codes [experts, rows, depth], and powers of two [experts, rows, groups].

    `weights` is how they are stored. Codes of 16-bit weights are those of INT4.
    """

    weights: str
    codes: torch.Tensor
    powers: torch.Tensor

    @classmethod
    def copying(cls, weights: str, rows: int, depth: int, first: int) -> _Weights:
        """Row n has a one in column n % depth if that is less than `first`, else in its first."""
        column = torch.arange(rows, device="cuda") % min(depth, first)
        codes = _codes_of(weights)
        numbers = torch.full((2, rows, depth), codes[0], device="cuda")
        numbers[:, torch.arange(rows, device="cuda"), column] = codes[1]
        groups = depth // (WEIGHTS[weights] or depth)
        return cls(weights, numbers, torch.zeros(2, rows, groups, dtype=torch.int, device="cuda"))

    @classmethod
    def dense(cls, weights: str, rows: int, depth: int, positive: bool = False) -> _Weights:
        """Random; positive ones have scales that differ less: their sums differ little."""
        numbers = _numbers(weights).cuda()
        allowed = torch.nonzero(numbers >= 0 if positive else numbers.isfinite()).flatten()
        pick = torch.randint(len(allowed), (2, rows, depth), device="cuda")
        low, high = (0, 2) if positive else (-2, 2)
        # 8-bit numbers are 16 times as large as the others.
        down = 4 if weights in ("int8", "uint8") else 0
        groups = depth // (WEIGHTS[weights] or depth)
        powers = torch.randint(low - down, high - down, (2, rows, groups), device="cuda")
        return cls(weights, allowed[pick], powers)

    def beside(self, other: _Weights) -> _Weights:
        """Up rows, and the gate rows `other`."""
        return _Weights(
            self.weights,
            torch.cat((self.codes, other.codes), dim=1),
            torch.cat((self.powers, other.powers), dim=1),
        )

    def values(self) -> torch.Tensor:
        """float64 [experts, rows, depth]."""
        scale = torch.exp2(self.powers.double())
        scale = scale.repeat_interleave(self.codes.shape[2] // scale.shape[2], dim=2)
        return _numbers(self.weights).cuda().double()[self.codes] * scale

    def store(self, weight: torch.Tensor, scale: torch.Tensor | None) -> None:
        """Writes them as the layer's tensors."""
        if self.weights == "same":
            weight.copy_(self.values())
            return
        assert scale is not None
        codes = self.codes - 128 if self.weights == "int8" else self.codes
        if self.weights in FOUR_BIT:
            codes = codes[..., ::2] | codes[..., 1::2] << 4
        weight.copy_(codes)
        powers = self.powers.view(scale.shape)
        scale.copy_(powers + 127 if self.weights == "mxfp4" else torch.exp2(powers.float()))


def _numbers(weights: str) -> torch.Tensor:
    """What each code means."""
    if weights == "mxfp4":
        return torch.tensor(_E2M1)
    return torch.arange(-128.0, 128.0) if weights in ("int8", "uint8") else torch.arange(-8.0, 8.0)


def _codes_of(weights: str) -> tuple[int, int]:
    """The codes of 0 and of 1."""
    numbers = _numbers(weights).tolist()
    return numbers.index(0), numbers.index(1)


@contextlib.contextmanager
def _exact_layer(case: Case, dense: str) -> Iterator[tuple[Layer, torch.Tensor]]:
    """The layer and its result, 16-bit [tokens, hidden]."""
    kind, hidden, inter = case.weights, case.hidden, case.intermediate
    with realized(case, exact=True) as layer:
        low = 0 if dense == "gate" else -1
        layer.input.copy_(torch.randint(low, 2, layer.input.shape, device="cuda"))
        if dense in ("up", "gate"):
            layer.input[:, 0] = _FOUR
        layer.ids.random_(2)
        assert layer.scales is not None
        layer.scales.fill_(1)
        second = _Weights.copying(kind, hidden, inter, inter)
        if dense == "first":
            first = _Weights.dense(kind, inter, hidden)
        elif dense == "second":
            first = _Weights.copying(kind, inter, hidden, hidden)
            second = _Weights.dense(kind, hidden, inter)
        else:
            # 16 for the gate, whose GELU is the number itself, or 1 to multiply the gate by.
            other = _Weights.copying(kind, inter, hidden, 1)
            other.powers[:, :, 0] = 2 if dense == "up" else -2
            if dense == "up":
                first = _Weights.dense(kind, inter, hidden).beside(other)
            else:
                first = other.beside(_Weights.dense(kind, inter, hidden, positive=True))
        for weights, tensor, index in ((first, layer.fc1, 0), (second, layer.fc2, 1)):
            weights.store(tensor, layer.quant_scales[index] if layer.quant_scales else None)

        out = torch.empty(case.tokens, hidden, dtype=layer.input.dtype, device="cuda")
        for expert in range(2):
            rows = (layer.ids == expert).flatten()
            product = layer.input[rows].double() @ first.values()[expert].T
            if dense in ("up", "gate"):
                up, gate = product.chunk(2, dim=1)
                assert float(gate.min()) >= 16, "GELU is the identity from 6 on, in float32"
                product = up * gate
            product = product.to(out.dtype).double()
            product = product @ second.values()[expert].T
            assert product.isfinite().all()
            out[rows] = product.to(out.dtype)
        yield layer, out


@pytest.mark.parametrize("dense", _DENSE)
@pytest.mark.parametrize("weights", list(WEIGHTS))
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_exact_numbers(dtype: str, weights: str, dense: str) -> None:
    require_sm80()
    gated = dense in ("up", "gate")
    for depth in _DEPTHS:
        columns = _columns(weights)
        hidden, inter = (columns, depth) if dense == "second" else (depth, columns)
        for weight_scales in ("float32", "dtype"):
            case = Case(
                *("exact", hidden, inter, 2, 1, _TOKENS),
                dtype=dtype,
                weights=weights,
                weight_scales=weight_scales,
                activation=ActivationType.Geglu if gated else ActivationType.Identity,
            )
            if weight_scales == "dtype" and weights in ("same", "mxfp4"):
                continue  # without scales, or with those of one dtype
            _check_each_tactic(case, dense)


@pytest.mark.parametrize("weights", list(WEIGHTS))
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_exact_numbers_in_tiles_one_after_the_other(dtype: str, weights: str) -> None:
    """More tiles than fit on the GPU at once, of one step and of three."""
    require_sm80()
    for depth in (128, 384):
        case = Case(
            *("exact", 4224, depth, 2, 1, 2000),
            dtype=dtype,
            weights=weights,
            activation=ActivationType.Identity,
        )
        _check_each_tactic(case, "second")


def _check_each_tactic(case: Case, dense: str) -> None:
    with _exact_layer(case, dense) as (layer, expected):
        for tactic, pair in each_tactic(case):
            with forced(tactics=pair):
                out = run_poisoned(layer, 0xFF)
            wrong = int((out != expected).sum())
            # Adding 0 makes a 0 of -0.
            assert same_bits(out + 0, expected + 0), (
                f"{tactic.name}: {wrong} of {out.numel()} numbers of {case.id} are wrong"
            )
