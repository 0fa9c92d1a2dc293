# SPDX-License-Identifier: Apache-2.0
"""The least time that a layer can take on a chip, from bytes and operations alone.

    bytes       weights of the touched experts
                + the intermediate values, [slots, I], written once and read once
                + the input and the output, [tokens, H]
    operations  2 * slots * H * (rows of fc1 + I): a multiply and an add each
    floor       the larger of bytes / bandwidth and operations / rate

The intermediate values count because they pass between two steps that no kernel can merge
without computing them several times; per-channel scales and routing weigh nothing beside it.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer: H, I of this rank, experts, experts a token, whether the activation is gated."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    gated: bool = True

    @property
    def fc1_rows(self) -> int:
        """Rows of one expert's first weight."""
        return self.intermediate * (2 if self.gated else 1)

    def expert_numbers(self) -> int:
        """Numbers in both weights of one expert."""
        return self.hidden * (self.fc1_rows + self.intermediate)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a chip does at best: bytes a second, and operations a second of its matrix units."""

    bandwidth: float
    rate: float


def expected_touched(shape: Shape, tokens: int) -> float:
    """How many experts get a token on average, each token choosing top_k distinct ones."""
    return shape.experts * (1 - (1 - shape.top_k / shape.experts) ** tokens)


def weight_bytes(shape: Shape, touched: float, weight_size: int) -> float:
    """Bytes of the touched experts' weights; weight_size is 2, or 1 for INT8."""
    return touched * shape.expert_numbers() * weight_size


def layer_bytes(shape: Shape, tokens: int, touched: float, weight_size: int) -> float:
    """All the bytes that have to cross the memory bus; activations have 2 bytes."""
    slots = tokens * shape.top_k
    activations = 2 * slots * shape.intermediate * 2 + 2 * tokens * shape.hidden * 2
    return weight_bytes(shape, touched, weight_size) + activations


def layer_operations(shape: Shape, tokens: int) -> int:
    """Multiplications and additions of both products."""
    return 2 * tokens * shape.top_k * shape.expert_numbers()


def floor_seconds(
    shape: Shape, tokens: int, touched: float, weight_size: int, ceilings: Ceilings
) -> float:
    """The floor; `touched` may be an average over several routings."""
    memory = layer_bytes(shape, tokens, touched, weight_size) / ceilings.bandwidth
    return max(memory, layer_operations(shape, tokens) / ceilings.rate)
