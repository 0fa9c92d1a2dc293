# SPDX-License-Identifier: Apache-2.0
"""The layers that are timed: whose sizes, their tensors, and enough copies to defeat the cache."""

from __future__ import annotations

import dataclasses
import math

import torch

from floors import Shape
from fused_moe import ActivationType, topk_softmax, up_gate_from_gate_up
from fused_moe.models import MODELS
from fused_moe.reference import reference_moe

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# What is measured where nothing else is asked for: names that find_model() takes.
MEASURED_MODELS = (
    "Mixtral-8x7B",
    "Qwen3-30B-A3B",
    "DeepSeek-V2-Lite",
    "Qwen3-Next-80B-A3B",
    "gpt-oss-20b-sizes",
    "DeepSeek-V3-TP8",
)


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
    """The weights of one layer, as `cutlass_fused_moe` takes them.

    Attributes:
        fc1, fc2: [E, 2I or I, H] and [E, H, I]; of INT4 and MXFP4 half as many bytes.
        quant_scales: [] or two tensors.
        kind: same (as activations), int8, uint8, int4 or mxfp4.
        group_size: how many weights share a scale, 0 if a whole row does.
        packed: what a peer made of the weights, by its name.
    """

    fc1: torch.Tensor
    fc2: torch.Tensor
    quant_scales: list[torch.Tensor]
    kind: str = "same"
    group_size: int = 0
    packed: dict[str, tuple[torch.Tensor, ...]] = dataclasses.field(default_factory=dict)

    def copy(self) -> Weights:
        """The same numbers elsewhere in memory."""
        return Weights(
            self.fc1.clone(),
            self.fc2.clone(),
            [s.clone() for s in self.quant_scales],
            self.kind,
            self.group_size,
            {name: tuple(t.clone() for t in tensors) for name, tensors in self.packed.items()},
        )

    def number_size(self) -> float:
        """Bytes a weight, the scales of groups included."""
        if self.group_size == 0:
            return self.fc1.element_size()
        return 0.5 + self.quant_scales[0].element_size() / self.group_size

    def quantization_arguments(self) -> dict[str, bool]:
        """The flags of `cutlass_fused_moe` and of the reference that ask for this format."""
        flags = {"int4": "use_packed_weights", "mxfp4": "use_w4_group_scaling"}
        return {flags[self.kind]: True} if self.kind in flags else {}


@dataclasses.dataclass
class Layer:
    """What one timed call gets: x [M, H], ids [M, k] int32, scales [M, k] float32, weights."""

    model: Model
    x: torch.Tensor
    ids: torch.Tensor
    scales: torch.Tensor
    weights: Weights
    touched: int

    def reference(self, rows: torch.Tensor, gate_first: bool = False) -> torch.Tensor:
        """float32 [rows, H] of the given rows of x; `gate_first`: fc1's rows are [gate; up]."""
        fc1, quant_scales = self.weights.fc1, list(self.weights.quant_scales)
        if gate_first:
            fc1 = up_gate_from_gate_up(fc1)
            quant_scales[:1] = [up_gate_from_gate_up(scales) for scales in quant_scales[:1]]
        return reference_moe(
            self.x[rows],
            self.ids[rows],
            self.scales[rows],
            fc1,
            self.weights.fc2,
            quant_scales,
            activation_type=self.model.activation,
            **self.weights.quantization_arguments(),
        )


def group_size_of(shape: Shape, kind: str) -> int:
    """The group of the 4-bit formats: of INT4 the largest that both products can have, else 0."""
    if kind == "mxfp4":
        return 32
    if kind != "int4":
        return 0
    fitting = [g for g in (128, 64, 32) if shape.hidden % g == 0 and shape.intermediate % g == 0]
    if not fitting:
        raise ValueError(f"H = {shape.hidden}, I = {shape.intermediate}: no group divides both")
    return fitting[0]


def make_weights(model: Model, kind: str, dtype: torch.dtype, device: torch.device) -> Weights:
    """Random weights that keep activations of order 1. kind: see Weights.

    Quantized ones are drawn as they are stored: the time does not depend on the numbers. The
    scales have 8 significant bits, so that peers that keep them in bfloat16 have the same.
    """
    shape = model.shape
    group = group_size_of(shape, kind)
    fc1, scale1 = _random_weight(
        shape.experts, shape.fc1_rows, shape.hidden, kind, group, dtype, device
    )
    fc2, scale2 = _random_weight(
        shape.experts, shape.hidden, shape.intermediate, kind, group, dtype, device
    )
    return Weights(fc1, fc2, [s for s in (scale1, scale2) if s is not None], kind, group)


# The root of the mean square of what random bits stand for.
_SPREAD = {"int8": 73.3, "uint8": 73.3, "int4": 4.64, "mxfp4": 2.93}


def _random_weight(
    experts: int,
    rows: int,
    columns: int,
    kind: str,
    group: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One weight and its scales."""
    if kind == "same":
        weight = torch.empty(experts, rows, columns, dtype=dtype, device=device)
        return weight.normal_(0, columns**-0.5), None
    size = columns**-0.5 / _SPREAD[kind]
    stored = torch.int8 if kind == "int8" else torch.uint8
    bytes_of_row = columns // 2 if group else columns
    weight = torch.empty(experts, rows, bytes_of_row, dtype=stored, device=device)
    low, high = {"int8": (-127, 128), "uint8": (1, 256)}.get(kind, (0, 256))
    weight.random_(low, high)
    scale_shape = (experts, rows, columns // group) if group else (experts, rows)
    scale = torch.empty(scale_shape, device=device)
    if kind == "mxfp4":
        exponent = 127 + round(math.log2(size))
        return weight, scale.random_(exponent - 1, exponent + 2).to(torch.uint8)
    scale = scale.uniform_(0.75 * size, 1.25 * size).bfloat16()
    if not group:
        return weight, scale.float()
    return weight, scale if dtype == torch.bfloat16 else scale.to(dtype)


def _logits(tokens: int, experts: int, routing: str, device: torch.device) -> torch.Tensor:
    """Whose top k are a routing, [tokens, experts].

    uniform: every expert is as likely. zipf: the experts, in random order, are chosen without
    replacement with probabilities 1, 1/2, 1/3, ... of the first's (Gumbel's top-k trick).
    """
    if routing == "uniform":
        return torch.randn(tokens, experts, device=device)
    noise = -torch.empty(tokens, experts, device=device).exponential_().log()
    ranks = torch.randperm(experts, device=device) + 1.0
    return noise - ranks.log()


def make_layers(
    model: Model,
    tokens: int,
    count: int,
    copies: list[Weights],
    dtype: torch.dtype,
    routing: str = "uniform",
) -> list[Layer]:
    """`count` layers, each with a routing and an input of its own; the copies take turns."""
    device = copies[0].fc1.device
    layers = []
    for number in range(count):
        logits = _logits(tokens, model.shape.experts, routing, device)
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
