# SPDX-License-Identifier: Apache-2.0
"""A peer: the whole layer in Triton, the way serving engines write it.

Slots sorted by expert, two grouped GEMMs with a gather, a SwiGLU kernel and a sum between and
after them; tile sizes from a table by the rows an expert gets, the best of a few tried on the
layer itself. With arch="sm80" Triton generates Ampere code (cp.async and mma.sync, no wgmma)
whatever the GPU is: that is the peer of the sm80 backend on a Hopper GPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import triton

from fused_moe import ActivationType
from layers import Layer
from peers import pieces
from peers import triton_kernels as kernels


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes and schedule of a grouped GEMM."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    warps: int
    stages: int


# Rows an expert gets on average, up to -> what to try, from those of the public tuned tables.
_TABLE: tuple[tuple[float, tuple[Config, ...]], ...] = (
    (
        12,
        (
            Config(16, 32, 128, 1, 4, 5),
            Config(16, 64, 128, 1, 4, 4),
            Config(16, 32, 256, 1, 4, 4),
            Config(16, 128, 128, 1, 4, 4),
            Config(16, 128, 64, 1, 4, 5),
        ),
    ),
    (
        48,
        (
            Config(16, 64, 128, 1, 4, 4),
            Config(16, 128, 128, 1, 4, 4),
            Config(32, 64, 128, 1, 4, 4),
            Config(32, 128, 64, 1, 4, 4),
            Config(64, 128, 64, 1, 4, 4),
        ),
    ),
    (
        200,
        (
            Config(64, 64, 64, 8, 4, 4),
            Config(64, 128, 64, 8, 4, 4),
            Config(64, 256, 64, 8, 8, 3),
            Config(128, 128, 64, 8, 8, 3),
            Config(128, 128, 32, 8, 4, 4),
        ),
    ),
    (
        math.inf,
        (
            Config(128, 128, 64, 16, 8, 3),
            Config(128, 128, 32, 16, 4, 4),
            Config(128, 256, 64, 16, 8, 3),
            Config(128, 256, 32, 16, 8, 4),
            Config(64, 256, 64, 16, 8, 3),
        ),
    ),
)


def candidates(rows_per_expert: float) -> tuple[Config, ...]:
    """The configurations worth trying."""
    return next(configs for limit, configs in _TABLE if rows_per_expert <= limit)


class TritonMoe:
    """The peer; `run` may be captured in a CUDA graph once `tune` has compiled it."""

    def __init__(self, arch: str | None) -> None:
        """`arch`: "sm80" for Ampere code, None for the GPU's own."""
        self.name = f"triton_{arch}" if arch else "triton"
        self._options: dict[str, Any] = {"arch": arch} if arch else {}
        self._pieces = pieces.Substitutes(self._options, gate_first=False)
        self._chosen: dict[object, tuple[Config, Config]] = {}

    def why_not(self, layer: Layer) -> str | None:
        """Why this peer cannot run the layer, or None."""
        if layer.weights.group_size:
            return f"has no {layer.weights.kind} weights"
        if layer.model.activation != ActivationType.Swiglu:
            return f"does Swiglu only, not {layer.model.activation.name}"
        return None

    def _key(self, layer: Layer) -> object:
        return (layer.model.name, layer.x.shape, layer.x.dtype, layer.weights.kind)

    def tune(self, layer: Layer, seconds: Callable[[Callable[[Layer], object]], float]) -> None:
        """Chooses the two configurations by `seconds`, which times a run on such layers."""
        slots = layer.ids.numel()
        tried: list[tuple[float, Config]] = []
        for config in candidates(slots / layer.model.shape.experts):
            try:
                time = seconds(self._runner(config, config))
            except triton.runtime.errors.OutOfResources:
                continue  # more shared memory than this chip has
            tried.append((time, config))
        best_time, best = min(tried, key=lambda pair: pair[0])
        second = best
        for _, config in tried:
            if config.block_m == best.block_m and config != best:
                time = seconds(self._runner(best, config))
                if time < best_time:
                    best_time, second = time, config
        self._chosen[self._key(layer)] = (best, second)

    def _runner(self, first: Config, second: Config) -> Callable[[Layer], torch.Tensor]:
        return lambda layer: self.run_with(layer, first, second)

    def chosen(self, layer: Layer) -> str:
        """What `tune` found, for the report."""
        return " / ".join(str(dataclasses.astuple(c)) for c in self._chosen[self._key(layer)])

    def run(self, layer: Layer) -> torch.Tensor:
        """The layer's output, [M, H]."""
        return self.run_with(layer, *self._chosen[self._key(layer)])

    def run_with(self, layer: Layer, first: Config, second: Config) -> torch.Tensor:
        """The layer with these configurations, whose block_m must be equal."""
        assert first.block_m == second.block_m
        x, shape, weights = layer.x, layer.model.shape, layer.weights
        tokens, top_k = layer.ids.shape
        slots = tokens * top_k
        experts = shape.experts
        tiles = min(slots, slots // first.block_m + experts)

        def ints(count: int) -> torch.Tensor:
            return torch.empty(count, dtype=torch.int32, device=x.device)

        sorted_slots, tile_experts, num_rows = ints(tiles * first.block_m), ints(tiles), ints(1)
        self._pieces.align(layer.ids, experts, first.block_m, sorted_slots, tile_experts, num_rows)
        code = {torch.int8: 1, torch.uint8: 2}.get(weights.fc1.dtype, 0)

        def gemm(
            a: torch.Tensor, index: int, columns: int, config: Config, slots_per_row: int
        ) -> torch.Tensor:
            b = (weights.fc1, weights.fc2)[index]
            c = torch.empty(slots, columns, dtype=x.dtype, device=x.device)
            kernels.grouped_gemm[(tiles * triton.cdiv(columns, config.block_n),)](
                a,
                b,
                c,
                weights.quant_scales[index] if code else layer.scales,
                layer.scales,
                sorted_slots,
                tile_experts,
                num_rows,
                columns,
                b.shape[2],
                slots,
                slots_per_row,
                tiles,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                BLOCK_K=config.block_k,
                GROUP_M=config.group_m,
                EVEN_K=b.shape[2] % config.block_k == 0,
                SCALED=index == 1,
                WEIGHTS=code,
                num_warps=config.warps,
                num_stages=config.stages,
                **self._options,
            )
            return c

        h = gemm(x, 0, 2 * shape.intermediate, first, top_k)
        act = torch.empty(slots, shape.intermediate, dtype=x.dtype, device=x.device)
        self._pieces.silu_and_mul(act, h)
        y = gemm(act, 1, shape.hidden, second, 1)
        out = torch.empty_like(x)
        self._pieces.moe_sum(y.view(tokens, top_k, shape.hidden), out)
        return out
