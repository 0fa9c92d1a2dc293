# SPDX-License-Identifier: Apache-2.0
"""A peer: PyTorch's own grouped matrix product, with the rest in PyTorch operators.

What one gets from PyTorch without writing a kernel: sort, gather, grouped_mm, SwiGLU,
grouped_mm, scale, scatter, sum. Nothing waits for the device, so it can be captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fused_moe import ActivationType
from layers import Layer

# PyTorch 2.10 and later; before, it is a private name.
_grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None) or getattr(
    torch, "_grouped_mm", None
)
if _grouped_mm is None:
    raise ImportError("this PyTorch has no grouped_mm")


class TorchGroupedMm:
    """The peer."""

    name = "torch_grouped_mm"

    def why_not(self, layer: Layer) -> str | None:
        """Why this peer cannot run the layer, or None."""
        if layer.weights.quant_scales:
            return f"has no {layer.weights.kind} weights"
        if layer.x.dtype != torch.bfloat16:
            return "takes bfloat16 only"
        if layer.model.activation != ActivationType.Swiglu:
            return f"does Swiglu only, not {layer.model.activation.name}"
        return None

    def tune(self, layer: Layer, seconds: Callable[[Callable[[Layer], object]], float]) -> None:
        """There is nothing to choose."""

    def chosen(self, layer: Layer) -> str:
        """Nothing."""
        return ""

    def run(self, layer: Layer) -> torch.Tensor:
        """The layer's output, [M, H]."""
        tokens, top_k = layer.ids.shape
        experts, order = layer.ids.view(-1).sort(stable=True)
        every = torch.arange(layer.model.shape.experts, device=experts.device, dtype=torch.int32)
        ends = torch.searchsorted(experts, every, right=True, out_int32=True)
        rows = layer.x[order // top_k]
        h = _grouped_mm(rows, layer.weights.fc1.transpose(1, 2), offs=ends)
        up, gate = h.chunk(2, dim=1)
        act = torch.nn.functional.silu(gate) * up
        y = _grouped_mm(act, layer.weights.fc2.transpose(1, 2), offs=ends)
        y = y * layer.scales.view(-1)[order].unsqueeze(1).to(y.dtype)
        by_slot = torch.empty_like(y).index_copy_(0, order, y)
        return by_slot.view(tokens, top_k, -1).sum(dim=1)
