# SPDX-License-Identifier: Apache-2.0
"""INT4 matrices of AWQ, GPTQ and compressed-tensors checkpoints as ours.

K is the depth, a linear layer's in_features, N its out_features, g the weights that share a scale.
All three pack eight codes into an int32.

=================== ============== =========================== ================================
layout              weights        order in a word             zero points
=================== ============== =========================== ================================
AWQ ("GEMM")        [K, N/8]       n + 0, 2, 4, 6, 1, 3, 5, 7  [K/g, N/8], ordered the same
GPTQ                [K/8, N]       k + 0, 1, ..., 7            [K/g, N/8], sequential; version 1
                                                               stores them less one, 2 as is
compressed-tensors  [N, K/8]       k + 0, 1, ..., 7            none if symmetric, which is 8;
                                                               else [N/8, K/g], sequential
ours                [N, K/2] bytes k + 0, 1                    none: 8
=================== ============== =========================== ================================

As AutoAWQ (WQLinear_GEMM), GPTQModel (formats "gptq" and "gptq_v2") and compressed-tensors
("pack-quantized") write and read them.
"""

from __future__ import annotations

import torch

from fused_moe.checkpoints import symmetric as sym
from fused_moe.quantization import pack_nibbles

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def int4_from_awq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One AWQ matrix (version "GEMM") as INT4 weights.

    Args:
        qweight: [K, N / 8] int32.
        qzeros: [K / g, N / 8] int32.
        scales: [K / g, N] float16 or another floating dtype.

    Returns:
        packed, [N, K / 2] uint8, and scale, [N, K / g] float32; groups larger than 128 become
        several with the same scale.

    Raises:
        ValueError: shapes or dtypes that are not those, groups of less than 32, or zero points
            other than 8 and 7 whose weights 4 symmetric bits cannot hold; most AWQ checkpoints
            have such. `dequantize_awq` then leads to INT8.
    """
    codes, zeros = _awq_codes(qweight, qzeros, scales)
    return sym.symmetric(pack_nibbles(codes.T), zeros.T, scales.T)


def dequantize_awq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """What an AWQ matrix means, whatever its zero points: (u - zero) * scale, [N, K] float32.

    The arguments are those of `int4_from_awq`.
    """
    codes, zeros = _awq_codes(qweight, qzeros, scales)
    return _numbers(codes.T, zeros.T, scales.T)


def int4_from_gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None = None,
    *,
    v2: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One GPTQ matrix as INT4 weights.

    Args:
        qweight: [K / 8, N] int32.
        qzeros: [K / g, N / 8] int32, zero points less one; as they are if `v2`.
        scales: [K / g, N] float16 or another floating dtype.
        g_idx: [K], the group of each k. It must be k // g: with the order of activations
            (desc_act) groups are no neighbours, and there is no layout here for that.
        v2: whether the checkpoint_format is "gptq_v2" rather than "gptq".

    Returns:
        packed, [N, K / 2] uint8, and scale, [N, K / g] float32; groups larger than 128 become
        several with the same scale.

    Raises:
        ValueError: as `int4_from_awq`, and for another g_idx.
    """
    packed, zeros = _gptq_codes(qweight, qzeros, scales, v2)
    depth, groups = 8 * qweight.shape[0], scales.shape[0]
    if g_idx is not None:
        _expect("g_idx", g_idx, (depth,), "one for each of the K weights a row")
        neighbours = torch.arange(depth, device=g_idx.device) // (depth // groups)
        _check_order("g_idx", g_idx, neighbours)
    return sym.symmetric(packed, zeros.T, scales.T)


def dequantize_gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None = None,
    *,
    v2: bool = False,
) -> torch.Tensor:
    """What a GPTQ matrix means, whatever its zero points and order: [N, K] float32.

    The arguments are those of `int4_from_gptq`.
    """
    packed, zeros = _gptq_codes(qweight, qzeros, scales, v2)
    codes = sym.unpack_nibbles(packed)
    if g_idx is None:
        return _numbers(codes, zeros.T, scales.T)
    _expect("g_idx", g_idx, (codes.shape[1],), "one for each of the K weights a row")
    group = g_idx.long()
    return (codes - zeros[group].T.float()) * scales[group].T.float()


def int4_from_compressed_tensors(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_shape: torch.Tensor | None = None,
    weight_zero_point: torch.Tensor | None = None,
    weight_g_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One matrix of a "pack-quantized" compressed-tensors checkpoint as INT4 weights.

    Args:
        weight_packed: [N, K / 8] int32.
        weight_scale: [N, K / g], or [N, 1] where a row has one scale; any floating dtype.
        weight_shape: [2], N and K; None takes them from weight_packed.
        weight_zero_point: [N / 8, K / g] int32; None if the weights are symmetric.
        weight_g_idx: [K], the group of each k, as GPTQ's; -1 everywhere is none.

    Returns:
        packed, [N, K / 2] uint8, and scale, [N, K / g] float32; groups larger than 128 become
        several with the same scale.

    Raises:
        ValueError: as `int4_from_gptq`, and for weights that are not 4 bits.
    """
    _expect_words("weight_packed", weight_packed)
    rows, depth = weight_packed.shape[0], 8 * weight_packed.shape[1]
    if weight_shape is not None and tuple(weight_shape.tolist()) != (rows, depth):
        raise ValueError(
            f"weight_shape is {weight_shape.tolist()}, but weight_packed has the shape "
            f"{list(weight_packed.shape)}, which holds [{rows}, {depth}] of 4 bits; K must be a "
            "multiple of 8, and the weights be of 4 bits (num_bits)"
        )
    groups = weight_scale.shape[-1]
    _expect("weight_scale", weight_scale, (rows, groups), "one row a row of weight_packed")
    zeros = None
    if weight_zero_point is not None:
        _expect_words("weight_zero_point", weight_zero_point)
        _expect("weight_zero_point", weight_zero_point, (rows // 8, groups), "[N / 8, groups]")
        zeros = sym.unpack_words(weight_zero_point.T).T
    if weight_g_idx is not None and bool((weight_g_idx != -1).any()):
        neighbours = torch.arange(depth, device=weight_g_idx.device) // (depth // groups)
        _check_order("weight_g_idx", weight_g_idx, neighbours)
    packed = weight_packed.contiguous().view(torch.uint8)
    return sym.symmetric(packed.clone(), zeros, weight_scale)


def _awq_codes(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [K, N] and zero points [K / g, N]."""
    _expect_words("qweight", qweight)
    groups, rows = scales.shape
    if 8 * qweight.shape[1] != rows:
        raise ValueError(
            f"qweight has the shape {list(qweight.shape)} and scales {list(scales.shape)}; they "
            'must be [K, N / 8] and [K / g, N], as AWQ\'s version "GEMM" has them'
        )
    _expect_words("qzeros", qzeros)
    _expect("qzeros", qzeros, (groups, rows // 8), "[K / g, N / 8]")
    return sym.unpack_words(qweight, AWQ_ORDER), sym.unpack_words(qzeros, AWQ_ORDER)


def _gptq_codes(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, v2: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes [N, K / 2] and zero points [K / g, N]."""
    _expect_words("qweight", qweight)
    groups, rows = scales.shape
    if qweight.shape[1] != rows:
        raise ValueError(
            f"qweight has the shape {list(qweight.shape)} and scales {list(scales.shape)}; they "
            "must be [K / 8, N] and [K / g, N]"
        )
    _expect_words("qzeros", qzeros)
    _expect("qzeros", qzeros, (groups, rows // 8), "[K / g, N / 8], of 4-bit weights")
    zeros = sym.unpack_words(qzeros)
    return qweight.T.contiguous().view(torch.uint8), zeros if v2 else (zeros + 1) & 15


def _numbers(codes: torch.Tensor, zeros: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(codes - zeros) * scale: [N, K] float32 from [N, K] and twice [N, groups]."""
    groups = codes.float().unflatten(1, (scale.shape[1], -1))
    return ((groups - zeros.unsqueeze(2)) * scale.float().unsqueeze(2)).flatten(1)


def _expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...], what: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} has the shape {list(tensor.shape)}; it must be {list(shape)}, {what}"
        )


def _expect_words(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype != torch.int32 or tensor.ndim != 2:
        raise ValueError(
            f"{name} is a {tensor.dtype} tensor of shape {list(tensor.shape)}; it must be a "
            "torch.int32 matrix of eight codes a word"
        )


def _check_order(name: str, groups: torch.Tensor, neighbours: torch.Tensor) -> None:
    differs = (groups != neighbours).nonzero()
    if differs.numel():
        first = int(differs[0])
        raise ValueError(
            f"{name}[{first}] is {int(groups[first])}; it must be {int(neighbours[first])}, so "
            "that neighbours share a scale. This checkpoint orders weights by activations "
            "(desc_act, actorder), which the kernels have no layout for: use one without, or "
            "dequantize_gptq and quantize_int4 or quantize_int8"
        )
