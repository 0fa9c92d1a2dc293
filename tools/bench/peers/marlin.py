# SPDX-License-Identifier: Apache-2.0
"""A peer: Marlin's fused-MoE layer, W8A16 and W4A16, from vLLM's released wheel.

The kernels are compiled, Ampere code always. Its weights are prepacked; that is not timed.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import torch

from layers import Layer, Weights
from peers.engines import Config, EngineMoe
from peers.marlin_layout import permuted_scales, words_along_k
from peers.pieces import load_libraries
from peers.vllm_moe import load

_TILE = 16


class MarlinMoe(EngineMoe):
    """The peer."""

    name = "marlin"

    def __init__(self, root: pathlib.Path) -> None:
        """`root`: the unpacked files of bring_peers.py."""
        super().__init__(root)
        if why := load_libraries(root):
            raise ImportError(why)
        self._vllm = load(root)
        self.note = self._vllm.pieces.note
        if not hasattr(torch.ops._moe_C, "moe_wna16_marlin_gemm"):
            raise ImportError("vLLM's library has no moe_wna16_marlin_gemm")
        types = self._vllm.marlin.scalar_types
        self._types = {"int8": types.uint8b128.id, "int4": types.uint4b8.id}
        self._workspace: torch.Tensor | None = None

    def formats(self) -> Sequence[str]:
        """INT8 a channel, INT4 a group."""
        return ("int8", "int4")

    def why_not(self, layer: Layer) -> str | None:
        """Also where a size is not a multiple of its tiles, 64 by 128 or 128 by 64 of K by N."""
        if layer.weights.kind == "int4" and layer.weights.group_size != 128:
            return f"is brought for groups of 128, not {layer.weights.group_size}"
        shape = layer.model.shape
        for n, k in ((shape.fc1_rows, shape.hidden), (shape.hidden, shape.intermediate)):
            if not (n % 128 == 0 and k % 64 == 0) and not (n % 64 == 0 and k % 128 == 0):
                return f"has no tile for N = {n}, K = {k}"
        return super().why_not(layer)

    def prepare(self, weights: Weights) -> None:
        """Packs the weights, once; copies of them take the packed ones along."""
        if "marlin" in weights.packed:
            return
        bits = 8 if weights.kind == "int8" else 4
        packed = []
        for weight in (weights.fc1, weights.fc2):
            words = words_along_k(weight)
            experts, k, n = words.shape[0], words.shape[1] * 32 // bits, words.shape[2]
            none = torch.empty(0, dtype=torch.int32, device=weight.device)
            out = torch.empty(
                experts, k // _TILE, n * bits // 2, dtype=torch.int32, device=weight.device
            )
            for expert in range(experts):
                out[expert] = torch.ops._C.gptq_marlin_repack(
                    words[expert], none, k, n, bits, False
                )
            packed.append(out)
        packed += [permuted_scales(scales, torch.bfloat16) for scales in weights.quant_scales]
        weights.packed["marlin"] = tuple(packed)

    def run_with(self, layer: Layer, wanted: Config | None) -> torch.Tensor:
        """The layer's output, [M, H]."""
        self.prepare(layer.weights)
        w1, w2, s1, s2 = layer.weights.packed["marlin"]
        if self._workspace is None:
            count = torch.cuda.get_device_properties(layer.x.device).multi_processor_count
            self._workspace = torch.zeros(4 * count, dtype=torch.int32, device=layer.x.device)
        out = torch.empty_like(layer.x)

        def total(y: torch.Tensor, out: torch.Tensor, *_: object) -> torch.Tensor:
            self._vllm.pieces.moe_sum(y, out)
            return out

        return self._vllm.marlin.fused_marlin_moe(
            layer.x,
            w1,
            w2,
            None,
            None,
            s1,
            s2,
            layer.scales,
            layer.ids,
            quant_type_id=self._types[layer.weights.kind],
            activation=self._vllm.silu,
            activation_func=self._vllm.activate,
            moe_sum=total,
            workspace=self._workspace,
            output=out,
        )
