# SPDX-License-Identifier: Apache-2.0
"""What a tuning result belongs to, what it says, and which token counts it speaks for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

ROUTINGS = ("given", "uniform", "skewed")

# The formats of weights by the extension's codes, as the file writes them.
WEIGHT_FORMATS = ("same", "int8", "uint8", "int4", "mxfp4")


@dataclasses.dataclass(frozen=True, order=True)
class Chip:
    """What of a GPU decides which tactic is fast; shared memory in bytes."""

    name: str
    multiprocessors: int
    shared_memory_per_block: int
    shared_memory_per_multiprocessor: int


@dataclasses.dataclass(frozen=True, order=True)
class Layer:
    """A layer's sizes and formats: what of a call, but its tokens, decides a tactic's time.

    Attributes:
        backend: "sm80".
        hidden_size, intermediate_size, top_k: H, I of this rank, k.
        experts, local_experts: those of all ranks and of this one.
        activation: the name of an ActivationType.
        input, output: names of dtypes, such as "bfloat16".
        weights: one of WEIGHT_FORMATS.
        weight_scales: the name of the scales' dtype; "" without scales.
        group_size: numbers along a row that share a scale; 0 where a row has one or none.
    """

    backend: str
    hidden_size: int
    intermediate_size: int
    experts: int
    local_experts: int
    top_k: int
    activation: str
    input: str
    output: str
    weights: str
    weight_scales: str
    group_size: int

    def describe(self) -> str:
        """A few words for messages and progress bars."""
        weights = self.weights + (f"/{self.group_size}" if self.group_size else "")
        return (
            f"{self.local_experts} experts of {self.hidden_size}x{self.intermediate_size}, "
            f"top {self.top_k}, {self.input}, weights {weights}"
        )


@dataclasses.dataclass(frozen=True, order=True)
class Key:
    """A result holds for one layer, on one kind of chip, in one version of the library."""

    chip: Chip
    version: str
    layer: Layer


Names = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Entry:
    """The outcome for one number of tokens.

    Attributes:
        tactics: the names of GEMM 1's and GEMM 2's tactics.
        untuned: those that the library chooses by itself for this number of tokens.
        microseconds, untuned_microseconds: of a whole call with either.
        routing: one of ROUTINGS, on which it was measured.
    """

    tactics: Names
    untuned: Names
    microseconds: float
    untuned_microseconds: float
    routing: str


def default_buckets(tune_max_num_tokens: int) -> tuple[int, ...]:
    """The token counts that are tuned: powers of two up to the argument, and the argument.

    As FlashInfer's, without its linear steps between 256 and 4096: a tile's height suits rows an
    expert within a factor, and `nearest` does not trust a bucket beyond that.
    """
    powers = {1 << i for i in range(tune_max_num_tokens.bit_length())}
    return tuple(sorted(powers | {tune_max_num_tokens}))


def nearest(tokens: int, buckets: Iterable[int]) -> list[int]:
    """The buckets that may speak for `tokens`: itself alone, or its two neighbours, nearer first.

    Nearness is that of logarithms: times and the best tile's height go by the ratio of rows.
    """
    ordered = sorted(buckets)
    if tokens in ordered:
        return [tokens]
    below = [b for b in ordered if b < tokens][-1:]
    above = [b for b in ordered if b > tokens][:1]
    return sorted(below + above, key=lambda b: abs(math.log(b / tokens)))


def entry_for(tokens: int, untuned: Names, entries: Mapping[int, Entry]) -> Entry | None:
    """The entry that a call of `tokens` may follow, or None.

    A bucket showed that its tactics beat its own untuned choice. For another number of tokens
    that is evidence only if the untuned choice is the same there: where the choice's model sees
    another regime, the bucket's winner was never compared with what it would replace. So the
    nearer neighbour with the same untuned choice decides, and without one nothing does.

    Args:
        tokens: M of the call.
        untuned: the names of what the library chooses for it by itself.
        entries: by bucket.
    """
    for bucket in nearest(tokens, entries):
        if bucket == tokens or entries[bucket].untuned == untuned:
            return entries[bucket]
    return None
