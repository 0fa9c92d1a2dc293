# SPDX-License-Identifier: Apache-2.0
"""Preparing expert weights: INT8, INT4 and MXFP4 quantization, and the order of gated rows.

The 4-bit formats hold two weights a byte along K, the even one in the low nibble, and a scale
for each group of neighbours in a row. A nibble is q + 8 in INT4, and an E2M1 number in MXFP4.

The same weights give the same bits on every device: a model may be quantized on a CPU, on a GPU,
or in parts on both. So nothing here may round one way on one of them and another way on the
other.
"""

from __future__ import annotations

import itertools

import torch

# uint8 weights hold q + 128, so that both formats cover the same range.
UINT8_OFFSET = 128

# Nibbles of INT4 weights hold q + 8.
INT4_OFFSET = 8
INT4_GROUPS = (32, 64, 128)

# The numbers of MXFP4 by their codes (OCP MX 1.0, section 5.3.3): sign, exponent with the bias
# 1, one bit of mantissa.
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = (*_E2M1_MAGNITUDES, *(-magnitude for magnitude in _E2M1_MAGNITUDES))
E2M1_LARGEST_EXPONENT = 2
E8M0_BIAS = 127
_E8M0_VALUES = (*(2.0 ** (s - E8M0_BIAS) for s in range(255)), float("nan"))
MXFP4_GROUP = 32

_NOT_FINITE = "weight has an infinity or a NaN, which {} bits cannot hold; clean the weights first"


def quantize_int8(
    weight: torch.Tensor, *, unsigned: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes expert weights to 8 bits, symmetrically, one scale an output channel.

    Args:
        weight: [E, N, K], any floating dtype, finite.
        unsigned: store q + 128 as uint8 instead of q as int8. Both mean the same weights.

    Returns:
        q, [E, N, K], int8 (uint8 if `unsigned`), and scale, [E, N], float32, such that
        q * scale is within scale / 2 of `weight`. A row of zeros gets the scale 1.

    Raises:
        ValueError: `weight` is not three-dimensional and floating, or is not finite.
    """
    _check_weight(weight)
    q = torch.empty(
        weight.shape, dtype=torch.uint8 if unsigned else torch.int8, device=weight.device
    )
    scale = torch.empty(weight.shape[:2], dtype=torch.float32, device=weight.device)
    # One expert at a time: a float32 copy of all of them could be larger than the memory.
    for expert in range(weight.shape[0]):
        rows = weight[expert].float()
        largest = rows.abs().amax(dim=1) if rows.shape[1] else rows.new_zeros(rows.shape[0])
        step = _divided(largest, 127)
        scale[expert] = step.masked_fill_(step == 0, 1)
        rounded = torch.round(rows / scale[expert].unsqueeze(1)).clamp_(-127, 127)
        q[expert] = (rounded + UINT8_OFFSET if unsigned else rounded).to(q.dtype)
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(_NOT_FINITE.format(8))
    return q, scale


def _check_weight(weight: torch.Tensor, group_size: int = 1) -> None:
    if weight.ndim != 3 or not weight.is_floating_point():
        raise ValueError(
            f"weight is a {weight.dtype} tensor of shape {list(weight.shape)}; it must be a "
            "floating point tensor [experts, rows, columns]"
        )
    if weight.shape[2] % group_size:
        raise ValueError(
            f"weight has the shape {list(weight.shape)}; its columns must be a multiple of "
            f"{group_size}, the group size: take a smaller one, or pad with columns of zeros"
        )


def quantize_int4(weight: torch.Tensor, group_size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes expert weights to 4 bits, symmetrically, one scale for each group of a row.

    q is in -8..7, and the scale the smallest that keeps every weight within half a step of a
    level: the group's largest weight over 7.5, or its lowest over -8.5. Against the usual
    largest magnitude over 7 the steps are 7 to 18% finer. The scale is then rounded up to 8
    significant bits. So bfloat16 holds it exactly, and so does float16 from 2^-17 to 65504: no
    kernel has to round it.

    Args:
        weight: [E, N, K], any floating dtype, finite.
        group_size: 32, 64 or 128 neighbours along K, which it divides. Use one size for fc1
            and fc2.

    Returns:
        packed, [E, N, K / 2] uint8, and scale, [E, N, K / group_size] float32, such that
        q * scale is within scale / 2 of `weight`. A group of zeros gets the scale 1.

    Raises:
        ValueError: `weight` is not three-dimensional and floating, or is not finite, or a
            group size that is not one of the three or does not divide K.
    """
    if group_size not in INT4_GROUPS:
        raise ValueError(f"group_size is {group_size}; it must be one of {list(INT4_GROUPS)}")
    _check_weight(weight, group_size)
    experts, rows, depth = weight.shape
    packed = torch.empty(experts, rows, depth // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(
        experts, rows, depth // group_size, dtype=torch.float32, device=weight.device
    )
    for expert in range(experts):
        groups = weight[expert].float().view(rows, -1, group_size)
        lowest, largest = groups.aminmax(dim=2)
        step = _to_8_bits_up(torch.maximum(_divided(largest, 7.5), _divided(lowest, -8.5)))
        scale[expert] = step.masked_fill_(step == 0, 1)
        q = torch.round(groups / step.unsqueeze(2)).clamp_(-8, 7)
        packed[expert] = pack_nibbles((q + INT4_OFFSET).to(torch.uint8).view(rows, depth))
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(_NOT_FINITE.format(4))
    return packed, scale


def dequantize_int4(
    packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """What INT4 weights mean: q * scale.

    Args:
        packed: [..., K / 2] uint8, nibbles q + 8, the even one low.
        scale: [..., K / g] of any floating dtype.
        dtype: what to compute in and to return; float32 is exact with scales of 16 bits.

    Returns:
        [..., K] of `dtype`.
    """
    return FourBitDecoder(dtype, packed.device, mxfp4=False)(packed, scale)


def quantize_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes expert weights to MXFP4: E2M1 numbers, a power of two for each 32 of them.

    By the OCP Microscaling Formats (MX) Specification, version 1.0: the scale is the largest
    power of two that is not above the group's largest magnitude, over 4, the largest power of
    two in E2M1 (section 6.3); numbers are rounded to nearest, ties to even, and saturate at 6
    (sections 5.3.3 and 6.3).

    Args:
        weight: [E, N, K], any floating dtype, finite; K is a multiple of 32.

    Returns:
        packed, [E, N, K / 2] uint8, and scale, [E, N, K / 32] uint8: E8M0, a byte s means
        2^(s - 127). A group of zeros gets the scale 1.

    Raises:
        ValueError: `weight` is not three-dimensional and floating, or is not finite, or K is
            no multiple of 32.
    """
    _check_weight(weight, MXFP4_GROUP)
    experts, rows, depth = weight.shape
    packed = torch.empty(experts, rows, depth // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(
        experts, rows, depth // MXFP4_GROUP, dtype=torch.uint8, device=weight.device
    )
    powers = torch.tensor(_E8M0_VALUES, dtype=torch.float32, device=weight.device)
    for expert in range(experts):
        groups = weight[expert].float().view(rows, -1, MXFP4_GROUP)
        largest = groups.abs().amax(dim=2)
        if not bool(torch.isfinite(largest).all()):
            raise ValueError(_NOT_FINITE.format(4))
        # frexp's mantissa is in [1/2, 1): its exponent is one above the floor of the logarithm.
        exponent = torch.frexp(largest).exponent - 1 - E2M1_LARGEST_EXPONENT
        exponent = exponent.clamp_(-E8M0_BIAS, E8M0_BIAS).masked_fill_(largest == 0, 0)
        scale[expert] = (exponent + E8M0_BIAS).to(torch.uint8)
        # 2^-exponent from a table: ldexp takes pow(2, n), which need not be exact everywhere.
        inverse = powers[(E8M0_BIAS - exponent).long()]
        codes = _to_e2m1(groups * inverse.unsqueeze(2))
        packed[expert] = pack_nibbles(codes.view(rows, depth))
    return packed, scale


def dequantize_mxfp4(
    packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """What MXFP4 weights mean: E2M1 numbers times 2^(s - 127).

    Args:
        packed: [..., K / 2] uint8, nibbles of a sign, two bits of exponent and one of mantissa.
        scale: [..., K / 32] E8M0: uint8, or torch.float8_e8m0fnu. 255 is NaN.
        dtype: what to compute in and to return; float32 and bfloat16 are exact.

    Returns:
        [..., K] of `dtype`.
    """
    return FourBitDecoder(dtype, packed.device, mxfp4=True)(packed, scale)


class FourBitDecoder:
    """The tables that make numbers of 4-bit weights, for many blocks of them.

    A byte of weights is looked up at once, as one integer of the size of two numbers: three
    times as quick on a CPU as a lookup for each nibble.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, *, mxfp4: bool) -> None:
        """Tables for numbers of `dtype` on `device`."""
        values = E2M1_VALUES if mxfp4 else range(-INT4_OFFSET, 16 - INT4_OFFSET)
        self._dtype = dtype
        self._kept = dtype if dtype.itemsize in (2, 4) else torch.float32
        pairs = torch.tensor(
            [(values[b & 15], values[b >> 4]) for b in range(256)], dtype=self._kept, device=device
        )
        self._pairs = pairs.view(torch.int32 if self._kept.itemsize == 2 else torch.int64).view(-1)
        self._powers = torch.tensor(_E8M0_VALUES, dtype=dtype, device=device) if mxfp4 else None

    def __call__(self, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Numbers [..., K] of packed [..., K / 2] and scale [..., K / g]."""
        found = self._pairs.index_select(0, packed.reshape(-1).int()).view(self._kept)
        groups = found.to(self._dtype).view(*scale.shape, -1)
        if self._powers is None:
            steps = scale.to(self._dtype)
        else:
            exponents = scale.view(torch.uint8).reshape(-1).int()
            steps = self._powers.index_select(0, exponents).view(scale.shape)
        return groups.mul_(steps.unsqueeze(-1)).view(*packed.shape[:-1], 2 * packed.shape[-1])


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """[..., K] uint8 in 0..15 to [..., K / 2]: the even code in the low nibble of a byte."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles`: [..., K / 2] uint8 to [..., K]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _divided(values: torch.Tensor, divisor: float) -> torch.Tensor:
    """values / divisor, rounded correctly on every device.

    PyTorch divides by a Python number as written on a CPU, but on a GPU multiplies by its
    reciprocal, which may be off by one bit. That is enough to move one in twenty of INT4's scales
    of bfloat16 weights up to the next number of 8 bits, and their weights with them. By a tensor
    on their own device both divide.
    """
    return values / values.new_full((), divisor)


def _to_8_bits_up(values: torch.Tensor) -> torch.Tensor:
    """Positive float32 rounded up to the significant bits of bfloat16; NaN, infinity stay."""
    up = (values.view(torch.int32) + 0xFFFF) & ~0xFFFF
    return torch.where(values.isfinite(), up.view(torch.float32), values)


def _to_e2m1(values: torch.Tensor) -> torch.Tensor:
    """float32 to E2M1 codes, nearest, ties to the even code, what is beyond 6 to 6."""
    magnitude = values.abs()
    code = torch.zeros_like(values, dtype=torch.uint8)
    for lower, (below, above) in enumerate(itertools.pairwise(_E2M1_MAGNITUDES)):
        middle = (below + above) / 2
        code += magnitude > middle if lower % 2 == 0 else magnitude >= middle
    return code | (torch.signbit(values).to(torch.uint8) << 3)


def check_two_halves(tensor: torch.Tensor) -> None:
    """Raises a ValueError unless `tensor` is [E, 2I, ...]: rows of gates and as many others."""
    if tensor.ndim < 2 or tensor.shape[1] % 2:
        raise ValueError(
            f"tensor has the shape {list(tensor.shape)}; it must be [experts, 2 * intermediate, "
            "...], with an even second dimension"
        )


def up_gate_from_gate_up(tensor: torch.Tensor) -> torch.Tensor:
    """Exchanges the halves of dimension 1: [gate; up] rows become the [up; gate] rows we need.

    Checkpoints and other libraries often concatenate w1 (gate) before w3 (up);
    `cutlass_fused_moe` wants up first, gate second, and cannot tell one from the other. The
    same exchange is its own inverse. Rows that alternate gate, up, gate, up (gpt-oss) are
    not what this converts.

    Args:
        tensor: fc1 weights [E, 2I, H], biases or INT8 scales [E, 2I].

    Returns:
        A new contiguous tensor of the same shape.

    Raises:
        ValueError: there is no dimension 1 or its size is odd.
    """
    check_two_halves(tensor)
    gate, up = tensor.chunk(2, dim=1)
    return torch.cat([up, gate], dim=1)
