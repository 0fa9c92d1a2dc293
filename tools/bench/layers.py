# SPDX-License-Identifier: Apache-2.0
"""The layers that are timed: whose sizes, their tensors, and enough copies to defeat the cache."""

from __future__ import annotations

import dataclasses
import math

import torch

from floors import Shape
from fused_moe import ActivationType, quantize_int8, topk_softmax
from fused_moe.models import MODELS
from fused_moe.reference import reference_moe

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Model:
    """What a name on the command line stands for."""

    name: str
    shape: Shape
    activation: ActivationType


def find_model(name: str) -> Model:
    """A model of fused_moe.models by name, its TP shard as NAME-TP8, its sizes as NAME-sizes.

    "-sizes" keeps H, I, E and k, but takes Swiglu without biases: what every peer can do.

    Raises:
        ValueError: no such model, or a TP degree that does not divide I.
    """
    base, _, suffix = name.rpartition("-")
    tp_size = 1
    if base in MODELS and suffix.startswith("TP") and suffix[2:].isdigit():
        tp_size = int(suffix[2:])
    elif not (base in MODELS and suffix == "sizes"):
        base = name
    if base not in MODELS:
        raise ValueError(f"there is no model {name!r}; the names are {', '.join(MODELS)}")
    model = MODELS[base]
    activation = ActivationType.Swiglu if suffix == "sizes" else model.activation
    if tp_size < 1 or model.intermediate_size % (8 * tp_size):
        raise ValueError(f"{base} cannot be cut into {tp_size} shards: I is not a multiple")
    shape = Shape(
        hidden=model.hidden_size,
        intermediate=model.intermediate_size // tp_size,
        experts=model.num_experts,
        top_k=model.top_k,
        gated=activation.is_gated,
    )
    return Model(name, shape, activation)


@dataclasses.dataclass
class Weights:
    """fc1 [E, 2I or I, H] and fc2 [E, H, I]; quant_scales is [] or two float32 tensors."""

    fc1: torch.Tensor
    fc2: torch.Tensor
    quant_scales: list[torch.Tensor]

    def copy(self) -> Weights:
        """The same numbers elsewhere in memory."""
        return Weights(self.fc1.clone(), self.fc2.clone(), [s.clone() for s in self.quant_scales])


@dataclasses.dataclass
class Layer:
    """What one timed call gets: x [M, H], ids [M, k] int32, scales [M, k] float32, weights."""

    model: Model
    x: torch.Tensor
    ids: torch.Tensor
    scales: torch.Tensor
    weights: Weights
    touched: int

    def reference(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 [rows, H] of the given rows of x."""
        return reference_moe(
            self.x[rows],
            self.ids[rows],
            self.scales[rows],
            self.weights.fc1,
            self.weights.fc2,
            self.weights.quant_scales,
            activation_type=self.model.activation,
        )


def make_weights(model: Model, kind: str, dtype: torch.dtype, device: torch.device) -> Weights:
    """Random weights that keep activations of order 1. kind: same, int8 or uint8."""
    shape = model.shape

    def normal(rows: int, columns: int) -> torch.Tensor:
        weight = torch.empty(shape.experts, rows, columns, dtype=dtype, device=device)
        return weight.normal_(0, columns**-0.5)

    fc1 = normal(shape.fc1_rows, shape.hidden)
    fc2 = normal(shape.hidden, shape.intermediate)
    if kind == "same":
        return Weights(fc1, fc2, [])
    fc1, fc1_scale = quantize_int8(fc1, unsigned=kind == "uint8")
    fc2, fc2_scale = quantize_int8(fc2, unsigned=kind == "uint8")
    return Weights(fc1, fc2, [fc1_scale, fc2_scale])


def make_layers(
    model: Model, tokens: int, count: int, copies: list[Weights], dtype: torch.dtype
) -> list[Layer]:
    """`count` layers, each with a routing and an input of its own; the copies take turns.

    Routing is uniform: the top k of independent random logits.
    """
    device = copies[0].fc1.device
    layers = []
    for number in range(count):
        logits = torch.randn(tokens, model.shape.experts, device=device)
        scales, ids = topk_softmax(logits, model.shape.top_k)
        layers.append(
            Layer(
                model=model,
                x=torch.randn(tokens, model.shape.hidden, device=device, dtype=dtype),
                ids=ids.contiguous(),
                scales=scales.contiguous(),
                weights=copies[number % len(copies)],
                touched=int(ids.unique().numel()),
            )
        )
    return layers


def copies_needed(touched_bytes: float, cache_bytes: int) -> int:
    """How many weight copies taking turns put 4 caches full of bytes between two uses of one."""
    return max(1, math.ceil(4 * cache_bytes / touched_bytes))
