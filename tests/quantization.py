# SPDX-License-Identifier: Apache-2.0
"""The formats of weights: their bits by hand, their errors by bound, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fused_moe import (
    dequantize_int4,
    dequantize_mxfp4,
    quantize_int4,
    quantize_int8,
    quantize_mxfp4,
    up_gate_from_gate_up,
)
from fused_moe.quantization import E2M1_VALUES, pack_nibbles, unpack_nibbles
from fused_moe.reference import dequantize

INFINITY = float("inf")


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal random numbers with some that are large and a stretch of zeros."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=draw) / 16
    values[torch.rand(*shape, generator=draw) < 0.01] *= 10
    values[..., -1, :] = 0
    return values


@pytest.mark.parametrize("unsigned", [False, True])
def test_quantize_int8(unsigned: bool) -> None:
    weight = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(0))
    weight[1, 4] = 0
    q, scale = quantize_int8(weight, unsigned=unsigned)
    assert q.dtype == (torch.uint8 if unsigned else torch.int8) and scale.shape == (3, 20)
    values = (q.float() - (128 if unsigned else 0)) * scale.unsqueeze(2)
    assert ((values - weight).abs() <= scale.unsqueeze(2) * 0.5001).all()
    assert not values[1, 4].any() and scale[1, 4] == 1
    assert torch.equal(values.abs().amax(2)[0], (scale * 127)[0]), "the largest value maps to 127"
    with pytest.raises(ValueError, match="weight has an infinity"):
        quantize_int8(torch.full((1, 1, 16), float("inf")))


def test_nibbles() -> None:
    codes = torch.tensor([[0x1, 0x2, 0xF, 0x0, 0x8, 0x7]], dtype=torch.uint8)
    packed = torch.tensor([[0x21, 0x0F, 0x78]], dtype=torch.uint8)
    assert torch.equal(pack_nibbles(codes), packed)
    assert torch.equal(unpack_nibbles(packed), codes)


def test_int4_by_hand() -> None:
    """A row of 32 from -8.5 to 7.5 has the scale 1, so weights are their q."""
    row = torch.zeros(32)
    row[:10] = torch.tensor([-8.5, 7.5, 7.0, -7.0, 0.4, 0.6, -0.6, 2.5, 1.5, -2.5])
    packed, scale = quantize_int4(row.view(1, 1, 32), 32)
    assert scale.tolist() == [[[1.0]]]
    # -8, 7 | 7, -7 | 0, 1 | -1, 2 | 2, -2 (halves go to the even q), and 0 for all others.
    assert packed[0, 0, :5].tolist() == [0xF0, 0x1F, 0x98, 0xA7, 0x6A]
    assert packed[0, 0, 5:].tolist() == [0x88] * 11
    expected = [-8.0, 7.0, 7.0, -7.0, 0.0, 1.0, -1.0, 2.0, 2.0, -2.0]
    assert dequantize_int4(packed, scale)[0, 0, :10].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4(group: int, dtype: torch.dtype) -> None:
    weight = weights(3, 20, 256).to(dtype)
    packed, scale = quantize_int4(weight, group)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 20, 128)
    assert scale.dtype == torch.float32 and scale.shape == (3, 20, 256 // group)
    values = dequantize_int4(packed, scale)
    steps = scale.repeat_interleave(group, dim=2)
    assert ((values - weight.float()).abs() <= steps * 0.5001).all()
    assert not values[:, 19].any() and (scale[:, 19] == 1).all()
    q = unpack_nibbles(packed).int() - 8
    assert q.min() == -8 and q.max() == 7
    # Each group uses its range up or down: no finer scale would do.
    lowest, largest = q.view(3, 20, -1, group)[:, :19].aminmax(dim=3)
    assert ((lowest == -8) | (largest == 7)).all()
    assert torch.equal(scale.bfloat16().float(), scale), "a kernel would round it"
    assert torch.equal(scale.half().float(), scale), "a kernel would round it"
    for expert in range(3):
        plain = dequantize(packed[expert], scale[expert], torch.float32, int4=True)
        assert torch.equal(values[expert], plain)


@pytest.mark.parametrize("size", [6e-5, 4e-4, 1.0, 2e5])
def test_int4_scales_are_exact_in_float16_over_its_range(size: float) -> None:
    """From 2^-17, where float16's subnormals still have 8 bits, to its largest number."""
    _, scale = quantize_int4(weights(1, 200, 32)[:, :-1] * size * 16, 32)
    inside = scale[(scale >= 2**-17) & (scale <= 65504)]
    assert inside.numel()
    assert torch.equal(inside.half().float(), inside)
    assert torch.equal(scale.bfloat16().float(), scale)


def test_smallest_numbers() -> None:
    """Steps below the smallest float32: nothing divides by zero."""
    for tiny in (1e-45, 1e-44, 1e-40, 1e-38):
        weight = torch.full((1, 1, 32), tiny)
        for packed, scale, back in (
            (*quantize_int4(weight, 32), dequantize_int4),
            (*quantize_mxfp4(weight), dequantize_mxfp4),
        ):
            values = back(packed, scale)
            assert values.isfinite().all() and (values - weight).abs().max() <= 2**-128


def test_e2m1_values() -> None:
    """OCP MX 1.0, table 5: the numbers of E2M1."""
    assert E2M1_VALUES == (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    scale = torch.full((1, 1, 1), 127, dtype=torch.uint8)
    values = dequantize_mxfp4(pack_nibbles(codes).view(1, 1, 16), scale)
    assert tuple(values.view(-1)[:16].tolist()) == E2M1_VALUES
    plain = dequantize(pack_nibbles(codes).view(1, 16), scale[0], torch.float32, mxfp4=True)
    assert torch.equal(values.view(-1), plain.view(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_e8m0_scales(dtype: torch.dtype) -> None:
    """A byte s is 2^(s - 127), down to a subnormal of float32; 255 is NaN."""
    packed = torch.full((1, 256, 16), 0x22, dtype=torch.uint8)
    scale = torch.arange(256, dtype=torch.uint8).view(1, 256, 1)
    values = dequantize_mxfp4(packed, scale, dtype)[0, :, 0]
    assert values[255].isnan()
    assert values[:255].tolist() == [2.0 ** (s - 127) for s in range(255)]
    same = dequantize_mxfp4(packed, scale.view(torch.float8_e8m0fnu), dtype)[0, :, 0]
    assert torch.equal(same[:255], values[:255])
    plain = dequantize(packed[0], scale[0], dtype, mxfp4=True)[:, 0]
    assert plain[255].isnan() and torch.equal(plain[:255], values[:255])


def test_mxfp4_by_hand() -> None:
    """Ties go to the even code, what is beyond 6 to 6, and the scale is floor(log2) - 2."""
    row = torch.zeros(32)
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -5.0]
    above = [0.26, 0.76, 1.26, 1.76, 2.51, 3.51, 5.01, 7.9, -7.9, 4.0]
    row[:20] = torch.tensor(ties + above)
    packed, scale = quantize_mxfp4(row.view(1, 1, 32) * 8)
    assert scale.tolist() == [[[127 + 3]]], "the largest is 7.9 * 8, and 63.2 is 2^5 and more"
    values = dequantize_mxfp4(packed, scale).view(-1) / 8
    assert values[:10].tolist() == [0, 1, 1, 2, 2, 4, 4, 0, -1, -4]
    assert values[10:20].tolist() == [0.5, 1, 1.5, 2, 3, 4, 6, 6, -6, 4]
    assert not values[20:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mxfp4(dtype: torch.dtype) -> None:
    weight = weights(3, 20, 256).to(dtype)
    packed, scale = quantize_mxfp4(weight)
    assert packed.dtype == scale.dtype == torch.uint8
    assert packed.shape == (3, 20, 128) and scale.shape == (3, 20, 8)
    values = dequantize_mxfp4(packed, scale)
    power = torch.exp2(scale.float() - 127).repeat_interleave(32, dim=2)
    scaled = weight.float() / power
    largest = scaled.view(3, 20, 8, 32)[:, :19].abs().amax(dim=3)
    assert (largest >= 4).all() and (largest < 8).all()
    nearest = torch.tensor(E2M1_VALUES)
    distance = (scaled.unsqueeze(-1) - nearest).abs().amin(dim=-1)
    assert torch.equal((values / power - scaled).abs(), distance), "not the nearest number"
    assert not values[:, 19].any() and (scale[:, 19] == 127).all()
    for expert in range(3):
        plain = dequantize(packed[expert], scale[expert], torch.float32, mxfp4=True)
        assert torch.equal(values[expert], plain)
    assert torch.equal(dequantize_mxfp4(packed, scale, torch.bfloat16).float(), values)


@pytest.mark.parametrize("call", [quantize_int8, quantize_int4, quantize_mxfp4])
def test_what_cannot_be_quantized(call: Callable[[torch.Tensor], object]) -> None:
    for bad in (INFINITY, -INFINITY, float("nan")):
        weight = torch.ones(2, 3, 128)
        weight[1, 2, 77] = bad
        with pytest.raises(ValueError, match=r"weight has an infinity or a NaN, which [48] bits"):
            call(weight)
    with pytest.raises(ValueError, match=r"weight is a torch\.float32 tensor of shape \[3, 128\]"):
        call(torch.ones(3, 128))
    with pytest.raises(ValueError, match=r"weight is a torch\.int8 tensor"):
        call(torch.ones(2, 3, 128, dtype=torch.int8))
    if call is not quantize_int8:
        text = r"shape \[2, 3, 80\]; its columns must be a multiple of"
        with pytest.raises(ValueError, match=text):
            call(torch.ones(2, 3, 80))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    weight = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)) * 1e-6
    expected = [quantize(weight) for quantize in QUANTIZERS.values()]
    torch.set_default_dtype(dtype)
    try:
        made = [quantize(weight) for quantize in QUANTIZERS.values()]
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(made, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


def test_rows_too_small_for_a_scale() -> None:
    """The smallest numbers of float32 over 127 are 0, and 0 / 0 is no weight."""
    weight = torch.tensor([[[0.0, 1e-45, -1e-44, 0.0]]])
    for unsigned in (False, True):
        q, scale = quantize_int8(weight, unsigned=unsigned)
        assert (q == (128 if unsigned else 0)).all() and (scale == 1).all()


def test_int4_group_sizes() -> None:
    with pytest.raises(ValueError, match=r"group_size is 48; it must be one of \[32, 64, 128\]"):
        quantize_int4(torch.ones(1, 1, 96), 48)
    with pytest.raises(ValueError, match=r"multiple of 64, the group size: take a smaller one"):
        quantize_int4(torch.ones(1, 1, 96), 64)


QUANTIZERS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "int8": quantize_int8,
    "uint8": lambda weight: quantize_int8(weight, unsigned=True),
    "int4": lambda weight: quantize_int4(weight, 32),
    "mxfp4": quantize_mxfp4,
}
all_formats = pytest.mark.parametrize("kept", QUANTIZERS)
all_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)


class OtherDevice(TorchFunctionMode):
    """Rounds as other devices may: what is not one operation of IEEE 754 comes out differently.

    A division by a Python number is a product with its reciprocal, which is what PyTorch's CUDA
    kernels make of it; powers and logarithms are off by their last bit.
    """

    _DIVISIONS = ("div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__")
    _INEXACT = ("exp2", "ldexp", "log2", "pow", "__pow__", "__rpow__", "float_power")

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """What `func` gives there."""
        name = getattr(func, "__name__", "")
        if name in self._DIVISIONS and isinstance(args[1], int | float):
            return args[0] * (torch.ones(()) / torch.full((), float(args[1])))
        out = func(*args, **(kwargs or {}))
        if name in self._INEXACT:
            return torch.nextafter(out, torch.full_like(out, INFINITY))
        return out


@all_dtypes
@all_formats
def test_bits_do_not_depend_on_how_a_device_rounds(kept: str, dtype: torch.dtype) -> None:
    weight = weights(4, 64, 512).to(dtype)
    here = QUANTIZERS[kept](weight)
    with OtherDevice():
        # It sees to it that a quantizer which does depend on it would be found.
        assert not torch.equal(weight.float() / 7.5, weight.float() / torch.tensor(7.5))
        there = QUANTIZERS[kept](weight)
    assert torch.equal(here[0], there[0]) and torch.equal(here[1], there[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@all_dtypes
@all_formats
def test_bits_are_the_same_on_a_gpu(kept: str, dtype: torch.dtype) -> None:
    weight = weights(4, 256, 1024).to(dtype)
    # Smallest numbers too, which a device could flush to zero.
    weight[0] *= 2**-14 if dtype == torch.float16 else 2**-124
    here = QUANTIZERS[kept](weight)
    there = QUANTIZERS[kept](weight.cuda())
    assert torch.equal(there[0].cpu(), here[0]) and torch.equal(there[1].cpu(), here[1])


def test_formulas() -> None:
    """Scales by a division that is rounded once to float32, q by the scale that is stored.

    A quotient of float32 numbers that float64 rounds first is rounded the same way after.
    """
    weight = weights(2, 64, 256)[:, :-1].bfloat16().double()
    q, scale = quantize_int8(weight)
    expected = (weight.abs().amax(dim=2) / 127).float()
    assert torch.equal(scale, expected)
    assert torch.equal(q.float(), (weight / expected.double().unsqueeze(2)).float().round())

    packed, scale = quantize_int4(weight, 32)
    groups = weight.view(2, 63, 8, 32)
    finest = torch.maximum(groups.amax(dim=3) / 7.5, groups.amin(dim=3) / -8.5).float()
    mantissa, exponent = torch.frexp(finest.double())
    expected = torch.ldexp(torch.ceil(mantissa * 256) / 256, exponent)
    assert torch.equal(scale.double(), expected)
    levels = (groups / expected.unsqueeze(3)).float().round().clamp(-8, 7)
    assert torch.equal(unpack_nibbles(packed).float() - 8, levels.view(2, 63, 256))


def test_halves_are_exchanged() -> None:
    for shape in ((1, 4), (2, 4, 3)):
        tensor = torch.arange(torch.Size(shape).numel()).view(shape)
        made = up_gate_from_gate_up(tensor)
        assert made.is_contiguous() and torch.equal(made, tensor[:, [2, 3, 0, 1]])
    for bad in (torch.zeros(4), torch.zeros(2, 3, 4)):
        with pytest.raises(ValueError, match="even second dimension"):
            up_gate_from_gate_up(bad)
