# SPDX-License-Identifier: Apache-2.0
"""The library itself, as the benchmark sees an implementation; and a sweep over its tactics."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fused_moe import _extension, arguments, cutlass_fused_moe
from layers import Layer

_FORMATS = {
    "same": arguments.WEIGHTS_AS_INPUT,
    "int8": arguments.WEIGHTS_INT8,
    "uint8": arguments.WEIGHTS_UINT8,
    "int4": arguments.WEIGHTS_INT4,
    "mxfp4": arguments.WEIGHTS_MXFP4,
}


class Ours:
    """`cutlass_fused_moe` on one backend."""

    gate_first = False
    note = ""

    def __init__(self, backend: str) -> None:
        """`backend`: as the function's argument of that name."""
        self.name = backend

    def why_not(self, layer: Layer) -> str | None:
        """Nothing that is benchmarked is beyond it."""
        return None

    def tune(self, layer: Layer, seconds: Callable[[Callable[[Layer], object]], float]) -> None:
        """The choice is the library's own."""

    def chosen(self, layer: Layer) -> str:
        """The names of the two tactics."""
        if self.name == "cpu":
            return ""
        names = [tactic.name for tactic in tactics_of(layer)]
        return " / ".join(names[index] for index in default_tactics(layer))

    def run(self, layer: Layer) -> torch.Tensor:
        """The layer's output, [M, H]."""
        return cutlass_fused_moe(
            layer.x,
            layer.ids,
            layer.scales,
            layer.weights.fc1,
            layer.weights.fc2,
            layer.x.dtype,
            layer.weights.quant_scales,
            activation_type=layer.model.activation,
            backend=self.name,
            **layer.weights.quantization_arguments(),
        )


def _format_of(layer: Layer) -> int:
    return _FORMATS[layer.weights.kind]


def _problem(layer: Layer) -> Any:
    shape = layer.model.shape
    problem, _ = arguments.plan_problem(
        "sm80",
        layer.model.activation,
        layer.x.dtype,
        layer.x.dtype,
        _format_of(layer),
        layer.weights.group_size,
        num_tokens=layer.x.shape[0],
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_local_experts=shape.experts,
        first_local_expert=0,
        top_k=shape.top_k,
    )
    return problem


def tactics_of(layer: Layer) -> list[Any]:
    """The sm80 backend's tactics for the layer's weights; an index into the list names one."""
    tactics: list[Any] = _extension.require("sm80").tactics("sm80", weight_format=_format_of(layer))
    return tactics


def supported_tactics(layer: Layer) -> list[int]:
    """Those that fit this GPU."""
    limit = torch.cuda.get_device_properties(layer.x.device).shared_memory_per_block_optin
    indices: list[int] = _extension.require("sm80").supported_tactics(
        "sm80", _problem(layer), limit
    )
    return indices


def default_tactics(layer: Layer) -> tuple[int, int]:
    """What the library chooses on this GPU: for GEMM 1 and for GEMM 2."""
    properties = torch.cuda.get_device_properties(layer.x.device)
    pair: tuple[int, int] = _extension.require("sm80").choose_tactics(
        "sm80",
        _problem(layer),
        multiprocessors=properties.multi_processor_count,
        shared_memory_per_block=properties.shared_memory_per_block_optin,
        shared_memory_per_multiprocessor=properties.shared_memory_per_multiprocessor,
    )
    return pair


@contextlib.contextmanager
def forced_tactics(first: int, second: int) -> Iterator[None]:
    """Meanwhile every call runs with these two tactics."""
    extension = _extension.require("sm80")
    run = extension.run

    def forced(*given: Any) -> None:
        # A call that is tuned names its tactics at the end.
        run(*(given[:-1] if isinstance(given[-1], tuple) else given), (first, second))

    extension.run = forced  # type: ignore[attr-defined]
    try:
        yield
    finally:
        extension.run = run  # type: ignore[attr-defined]


def sweep(layer: Layer, seconds: Callable[[], float]) -> dict[str, Any]:
    """Times every tactic as GEMM 1's, then as GEMM 2's beside the best first; and whole layers.

    Returns:
        The library's choice, and seconds by tactic name: {"chosen": [names],
        "chosen_seconds": s, "gemm1": {name: s}, "gemm2": {name: s}, "layer": {name: s},
        "best": [names], "best_seconds": s}.
    """
    names = [tactic.name for tactic in tactics_of(layer)]
    chosen = default_tactics(layer)
    found: dict[str, Any] = {
        "chosen": [names[index] for index in chosen],
        "chosen_seconds": seconds(),
    }

    def timed(first: int, second: int) -> float:
        with forced_tactics(first, second):
            return seconds()

    supported = supported_tactics(layer)
    firsts = {
        index: timed(index, chosen[1] if chosen[1] in supported else index) for index in supported
    }
    best_first = min(firsts, key=lambda index: firsts[index])
    seconds_by_second = {index: timed(best_first, index) for index in supported}
    pairs = {(best_first, index): value for index, value in seconds_by_second.items()}
    limit = torch.cuda.get_device_properties(layer.x.device).shared_memory_per_block_optin
    layers = {
        pair: timed(*pair)
        for pair in _extension.require("sm80").whole_layer_tactics("sm80", _problem(layer), limit)
    }
    pairs |= layers
    best = min(pairs, key=lambda pair: pairs[pair])
    found["best"] = [names[index] for index in best]
    found["best_seconds"] = pairs[best]
    found["layer"] = {names[pair[0]]: value for pair, value in layers.items()}
    found["gemm1"] = {names[index]: value for index, value in firsts.items()}
    found["gemm2"] = {names[index]: value for index, value in seconds_by_second.items()}
    return found
