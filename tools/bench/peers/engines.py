# SPDX-License-Identifier: Apache-2.0
"""What the peers from serving engines have in common.

Their kernels come from the released wheels (see bring_peers.py), unchanged. The tuned table of the
engine for the chip is always tried; where it has no entry for a shape the engine falls back to a
default that nobody tuned, so a few further tiles are tried on the layer itself and the fastest is
what is reported: a peer as good as its user could make it.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fused_moe import ActivationType
from layers import Layer

Config = dict[str, int]


def config(m: int, n: int, k: int, group: int, warps: int, stages: int) -> Config:
    """Tile sizes and schedule, in the engines' words."""
    return {
        "BLOCK_SIZE_M": m,
        "BLOCK_SIZE_N": n,
        "BLOCK_SIZE_K": k,
        "GROUP_SIZE_M": group,
        "num_warps": warps,
        "num_stages": stages,
    }


# Rows an expert gets on average, up to -> what to try beside the engine's own choice: what its
# tables have for such cases and its default has not; at the end a tile for mma.sync, 64x64 a warp.
_TABLE: tuple[tuple[float, tuple[Config, Config]], ...] = (
    (12, (config(16, 128, 64, 1, 4, 5), config(16, 64, 64, 1, 4, 5))),
    (48, (config(32, 128, 64, 1, 4, 4), config(16, 128, 128, 1, 4, 4))),
    (200, (config(64, 256, 64, 8, 8, 4), config(64, 128, 64, 8, 4, 4))),
    (float("inf"), (config(128, 256, 64, 16, 8, 4), config(128, 128, 32, 16, 4, 4))),
)


def candidates(layer: Layer) -> tuple[Config, Config]:
    """Two tiles worth trying on the layer."""
    rows = layer.ids.numel() / layer.model.shape.experts
    return next(configs for limit, configs in _TABLE if rows <= limit)


class EngineMoe:
    """A peer whose layer is one function of an engine. Its fc1 rows are [gate; up]."""

    name = ""
    gate_first = True

    def __init__(self, root: pathlib.Path) -> None:
        """`root`: the unpacked files of bring_peers.py."""
        self.root = root
        self._chosen: dict[object, Config | None] = {}
        self._refused: dict[object, str] = {}
        self.note = ""

    def formats(self) -> Sequence[str]:
        """The kinds of weights it has."""
        raise NotImplementedError

    def why_not(self, layer: Layer) -> str | None:
        """Why this peer cannot run the layer, or None."""
        if layer.weights.kind not in self.formats():
            return f"has no {layer.weights.kind} weights"
        if layer.model.activation != ActivationType.Swiglu:
            return f"is timed with Swiglu only, not {layer.model.activation.name}"
        if layer.x.dtype == torch.float32:
            return "takes 16-bit activations only"
        return None

    def choices(self, layer: Layer) -> Sequence[Config | None]:
        """The configurations to try; None is the engine's own."""
        return (None,)

    def run_with(self, layer: Layer, wanted: Config | None) -> torch.Tensor:
        """The layer's output, [M, H], with this configuration."""
        raise NotImplementedError

    def _key(self, layer: Layer) -> object:
        return (layer.model.name, layer.x.shape, layer.x.dtype, layer.weights.kind)

    def tune(self, layer: Layer, seconds: Callable[[Callable[[Layer], object]], float]) -> None:
        """Chooses a configuration by `seconds`, which times a run on such layers.

        Raises:
            RuntimeError: none of them runs; the engine's own error is the cause.
        """
        tried: list[tuple[float, int]] = []
        choices = self.choices(layer)
        failure: Exception | None = None
        self._refused.pop(self._key(layer), None)
        for index, wanted in enumerate(choices):
            try:
                tried.append((seconds(self._runner(wanted)), index))
            except Exception as error:  # more shared memory than there is, mostly
                failure = failure or error
                if wanted is None:
                    self._refused[self._key(layer)] = f"; its own does not run: {error!r}"[:200]
                if isinstance(error, getattr(torch, "AcceleratorError", ())):
                    raise  # nothing on this device works any more
        if not tried:
            raise RuntimeError(f"no configuration of {self.name} runs") from failure
        self._chosen[self._key(layer)] = choices[min(tried)[1]]

    def _runner(self, wanted: Config | None) -> Callable[[Layer], torch.Tensor]:
        return lambda layer: self.run_with(layer, wanted)

    def chosen(self, layer: Layer) -> str:
        """What `tune` found, for the report."""
        wanted = self._chosen[self._key(layer)]
        tiles = "its own" if wanted is None else "/".join(str(value) for value in wanted.values())
        return tiles + self._refused.get(self._key(layer), "")

    def run(self, layer: Layer) -> torch.Tensor:
        """The layer's output, [M, H]."""
        return self.run_with(layer, self._chosen[self._key(layer)])


def quantized_arguments(layer: Layer) -> dict[str, Any]:
    """The arguments both engines take for weight-only quantization."""
    weights = layer.weights
    if weights.kind == "same":
        return {}
    scales = {"w1_scale": weights.quant_scales[0], "w2_scale": weights.quant_scales[1]}
    if weights.kind == "int8":
        return {"use_int8_w8a16": True, **scales}
    return {"use_int4_w4a16": True, "block_shape": [0, weights.group_size], **scales}
