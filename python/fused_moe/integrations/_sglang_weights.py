# SPDX-License-Identifier: Apache-2.0
"""Weights of SGLang's layers, made ready for our function and back. Importing this imports SGLang.

All that a layer computes with are parameters of that layer, in place: SGLang moves them between
ranks (EPLB), off the GPU and back, and loads into them again. A layer knows whether the rows of fc1
are in our order, so that preparing it twice, or not loading into it between two preparations,
changes nothing.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch
from sglang.srt.layers.moe.moe_runner.base import MoeQuantInfo

from fused_moe.activation import ActivationType
from fused_moe.integrations._activation_parameters import for_each_expert
from fused_moe.quantization import quantize_int8, up_gate_from_gate_up

NO_RELOAD = (
    "--moe-runner-backend fused_moe_int8 quantized the experts when they were loaded, and other "
    "weights cannot be loaded over them: restart the server, or use --moe-runner-backend fused_moe"
)

# What a prepared layer has besides SGLang's: whether its rows are in our order just now, and the
# scales of INT8 weights.
_PREPARED = "fused_moe_prepared"
_SCALES = ("fused_moe_w13_scale", "fused_moe_w2_scale")

# SGLang may load experts in several threads, and the first to load into a layer restores it.
_restoring = threading.Lock()


@dataclasses.dataclass
class Experts(MoeQuantInfo):
    """A prepared layer's tensors, fc1's rows in our order, and what its activation is.

    Attributes:
        w13, w2: [E_l, 2I or I, H] with rows [up; gate], and [E_l, H, I]; int8 or the input's dtype.
        scales: those of INT8 weights; empty otherwise.
        b13, b2: biases in the model's dtype, or None.
        alpha, beta, limit: [E_l] float32, or None.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    scales: list[torch.Tensor]
    b13: torch.Tensor | None
    b2: torch.Tensor | None
    activation: ActivationType
    alpha: torch.Tensor | None
    beta: torch.Tensor | None
    limit: torch.Tensor | None


def _reordered(layer: Any, rows: torch.Tensor, back: bool = False) -> torch.Tensor:
    """One expert's rows of fc1 [2I, ...] in our order [up; gate], or `back` in SGLang's: a copy."""
    config = layer.moe_runner_config
    if not config.is_gated:
        return rows
    if config.gemm1_alpha is None or not config.gate_up_interleaved:
        return up_gate_from_gate_up(rows.unsqueeze(0)).squeeze(0)
    if back:
        up, gate = rows.chunk(2)
        return torch.stack([gate, up], dim=1).flatten(0, 1)
    return torch.cat([rows[1::2], rows[0::2]])


def _reorder(layer: Any, back: bool = False) -> None:
    """Puts fc1's weights and biases [E_l, 2I, ...] in our order, or `back`.

    In place, for CUDA graphs that were captured before a reload, and an expert at a time, for the
    memory that a copy takes.
    """
    for name in ("w13_weight", "w13_weight_bias"):
        for rows in getattr(layer, name, torch.empty(0)).data:
            rows.copy_(_reordered(layer, rows, back))


def prepare(layer: Any, int8: bool) -> None:
    """Makes a loaded layer ready for `experts_of`; a layer that is ready stays as it is.

    Puts the rows of fc1 in our order, biases (float32 in SGLang, from checkpoints in 16 bits) in
    the weights' dtype, and quantizes the weights if `int8`, after which nothing can be loaded into
    them.
    """
    if getattr(layer, _PREPARED, False):
        return
    dtype = layer.w2_weight.dtype
    for name in ("w13_weight_bias", "w2_weight_bias"):
        bias = getattr(layer, name, None)
        if bias is not None and bias.dtype != dtype:
            bias.data = bias.data.to(dtype)
    _reorder(layer)
    if int8:
        for weight, name in zip((layer.w13_weight, layer.w2_weight), _SCALES, strict=True):
            weight.data, scale = quantize_int8(weight.data)
            layer.register_parameter(name, torch.nn.Parameter(scale, requires_grad=False))
        # SGLang's updates of weights return this as their error.
        layer._derived_weight_cache_error = NO_RELOAD
    setattr(layer, _PREPARED, True)


def restore(layer: Any) -> None:
    """Undoes `prepare` for 16-bit weights, so that a checkpoint's can be loaded in SGLang's order.

    INT8 weights stay as they are: nothing is loaded into them (`around_restore_for_load`).
    """
    with _restoring:
        if getattr(layer, _PREPARED, False) and layer.w13_weight.dtype != torch.int8:
            _reorder(layer, back=True)
            setattr(layer, _PREPARED, False)


def experts_of(layer: Any, activation: tuple[ActivationType, Any, Any, Any]) -> Experts:
    """What the layer computes with, as its parameters are now.

    Raises:
        RuntimeError: the layer was not prepared.
    """
    ready = getattr(layer, _PREPARED, None)
    if ready is None:
        raise RuntimeError(
            "the experts were loaded in a way that fused_moe does not know, without "
            "process_weights_after_loading at its end: leave --weight-cache-mode off"
        )
    kind, *parameters = activation
    w13, w2 = layer.w13_weight.data, layer.w2_weight.data
    b13, b2 = getattr(layer, "w13_weight_bias", None), getattr(layer, "w2_weight_bias", None)
    if not ready:
        # A request (of a health check, say) in the midst of an update of weights.
        w13 = torch.stack([_reordered(layer, rows) for rows in w13])
        b13 = None if b13 is None else torch.stack([_reordered(layer, rows) for rows in b13])
    alpha, beta, limit = (for_each_expert(value, w2.shape[0], w2.device) for value in parameters)
    return Experts(
        w13=w13,
        w2=w2,
        scales=[getattr(layer, name).data for name in _SCALES] if w13.dtype == torch.int8 else [],
        b13=None if b13 is None else b13.data,
        b2=None if b2 is None else b2.data,
        activation=kind,
        alpha=alpha,
        beta=beta,
        limit=limit,
    )
