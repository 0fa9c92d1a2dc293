# SPDX-License-Identifier: Apache-2.0
"""The weights of an experts module: when they are in our order, in transformers', or quantized.

A module gets a `State` with the first conversion, and three hooks that put transformers' order
back: before another implementation runs, before a state dict is made, before one is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import torch

from fused_moe.integrations import _transformers_experts as experts
from fused_moe.quantization import quantize_int4, quantize_int8, quantize_mxfp4

NAME = "fused_moe"
# What follows NAME: how the weights are kept. The empty one keeps them as they are.
FORMATS = ("", "int8", "int4", "mxfp4")
IMPLEMENTATIONS = {f"{NAME}_{kept}" if kept else NAME: kept for kept in FORMATS}

SCALES = ("fused_moe_fc1_scale", "fused_moe_fc2_scale")
# The attribute of an experts module that holds its State.
_STATE = "_fused_moe"
# Threads that serve one model may meet an unconverted module at once: exchanged twice, its rows
# would be wrong, and nothing would show it.
_LOCK = threading.RLock()


@dataclasses.dataclass
class State:
    """What is known of one experts module.

    Attributes:
        kept: the format of its weights, one of FORMATS.
        converted: whether its parameters are in our order.
        partial: whether a change of its parameters has begun and not ended.
        swiglu: alpha, beta and limit, each [E] float32 on the weights' device, or None.
    """

    activation: experts.Activation
    layout: experts.Layout
    kept: str = ""
    converted: bool = False
    partial: bool = False
    swiglu: tuple[torch.Tensor | None, ...] = (None, None, None)

    def swiglu_on(self, device: torch.device) -> tuple[torch.Tensor | None, ...]:
        """`swiglu` on `device`; kept there if the model has moved."""
        if any(p is not None and p.device != device for p in self.swiglu):
            self.swiglu = tuple(p if p is None else p.to(device) for p in self.swiglu)
        return self.swiglu


def state_of(module: torch.nn.Module) -> State | None:
    """The module's state, None before its first conversion."""
    return module.__dict__.get(_STATE)


def experts_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules whose experts go through transformers' interface.

    Raises:
        ValueError: there is none.
    """
    # The decorator of that interface gives it to every class.
    modules = [module for module in model.modules() if hasattr(type(module), "_apply_gate")]
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no experts that go through transformers' interface of "
            "experts implementations, so that it would ignore experts_implementation"
        )
    return modules


def requested(module: torch.nn.Module) -> Any:
    """The name of the implementation that transformers would run the module by."""
    return getattr(module.config, "_experts_implementation", None)


def prepare(module: torch.nn.Module, kept: str) -> State:
    """Converts one experts module, and quantizes it if `kept` names a format.

    Raises:
        NotImplementedError: the module is one that our layer cannot stand in for.
        RuntimeError: it is quantized to another format, or an earlier conversion failed.
    """
    with _LOCK, _mode(module):
        state = state_of(module)
        if state is not None:
            _check_whole(module, state)
        if state is not None and state.kept:
            if state.kept != kept:
                raise RuntimeError(_released(module, state))
            return state
        experts.check(module)
        experts.check_class(module)
        if state is None:
            state = start(module)
        if not state.converted:
            align(module)
            with _change(state):
                experts.rewrite(module, state.layout, back=False)
            state.converted = True
        if kept:
            _quantize(module, state, kept)
    return state


@contextlib.contextmanager
def _mode(module: torch.nn.Module) -> Iterator[None]:
    """The mode that the weights were made in: outside of it inference tensors cannot change.

    Within inference mode new tensors would be inference tensors. Parameters outlive the caller's
    mode, so that theirs decides, not the caller's.
    """
    inference = getattr(module, experts.first_name(module)).is_inference()
    with torch.inference_mode(inference), torch.no_grad():
        yield


@contextlib.contextmanager
def _change(state: State) -> Iterator[None]:
    """Notes that the weights are in no order that is known, unless the change comes to its end.

    It may not: memory runs out, or somebody presses Ctrl-C. A second try would begin at the
    start and exchange what is exchanged already.
    """
    state.converted, state.partial = False, True
    yield
    state.partial = False


def _check_whole(module: torch.nn.Module, state: State) -> None:
    if state.partial:
        raise RuntimeError(
            f"converting the weights of this {type(module).__name__} was stopped halfway by an "
            "error, so that some are in our order and some are not; load the model again"
        )


def align(module: torch.nn.Module) -> None:
    """Copies the parameters that the layer cannot read where they are.

    It reads 16 bytes at a time; tensors of a mapped file start anywhere.
    """
    for parameter in module.parameters(recurse=False):
        if not parameter.is_contiguous() or parameter.data_ptr() % 16:
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def start(module: torch.nn.Module) -> State:
    """Finds out what the module computes, and watches it from here on.

    Raises:
        NotImplementedError: it is nothing that our layer computes.
    """
    state = State(*experts.recognize(module))
    weight = getattr(module, experts.first_name(module))
    state.swiglu = tuple(
        None
        if value is None
        else torch.full((weight.shape[0],), value, dtype=torch.float32, device=weight.device)
        for value in dataclasses.astuple(state.activation)[1:]
    )
    setattr(module, _STATE, state)
    module.register_forward_pre_hook(_before_forward)
    module.register_state_dict_pre_hook(_before_state_dict)
    module.register_load_state_dict_pre_hook(_before_load)
    return state


def group_size(module: torch.nn.Module, transposed: bool, kept: str) -> int:
    """Weights to a scale in the format `kept`, for both products; 0 where a scale has a row.

    Raises:
        ValueError: no size divides both.
    """
    groups = {"int4": (128, 64, 32), "mxfp4": (32,)}.get(kept)
    if groups is None:
        return 0
    names = (experts.first_name(module), "down_proj")
    depths = [getattr(module, name).shape[1 if transposed else 2] for name in names]
    for group in groups:
        if all(depth % group == 0 for depth in depths):
            return group
    raise ValueError(
        f"{type(module).__name__}: {kept} needs a hidden and an intermediate size that 32 "
        f"divides; they are {depths[0]} and {depths[1]}. Use {NAME}_int8"
    )


def quantized(weight: torch.Tensor, kept: str, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[E, N, K] in our order, as the format `kept`, and its scales."""
    if kept == "int8":
        return quantize_int8(weight)
    if kept == "int4":
        return quantize_int4(weight, group)
    return quantize_mxfp4(weight)


def held_scale(scale: torch.Tensor) -> torch.Tensor:
    """A scale as the buffer holds it: float32 as int32, which `model.to(dtype)` lets alone."""
    return scale.view(torch.int32) if scale.is_floating_point() else scale


def scales(module: torch.nn.Module) -> list[torch.Tensor]:
    """The scales of both quantized weights, as `cutlass_fused_moe` takes them."""
    held = (getattr(module, name) for name in SCALES)
    return [s.view(torch.float32) if s.dtype == torch.int32 else s for s in held]


def _quantize(module: torch.nn.Module, state: State, kept: str) -> None:
    """Replaces both weights by quantized ones under their names, and adds their scales."""
    group = group_size(module, state.layout.transposed, kept)
    with _change(state):
        for name, scale_name in zip((experts.first_name(module), "down_proj"), SCALES, strict=True):
            q, scale = quantized(experts.weight(module, name, state.layout), kept, group)
            # Drops the last reference to the unquantized weights, before the next ones' turn.
            setattr(module, name, torch.nn.Parameter(q, requires_grad=False))
            module.register_buffer(scale_name, held_scale(scale))
    finish_quantized(state, kept)


def finish_quantized(state: State, kept: str) -> None:
    """Notes that both weights are quantized, in the plain order that quantizing leaves."""
    state.kept = kept
    state.converted = True
    state.layout = dataclasses.replace(state.layout, transposed=False)


def _released(module: torch.nn.Module, state: State) -> str:
    return (
        f"{type(module).__name__}'s experts were quantized to {state.kept} and the original "
        "weights released, so that they can neither be saved, nor loaded into, nor run on "
        f"{requested(module)!r}; load the model again"
    )


def _restore(module: torch.nn.Module) -> None:
    """Puts the parameters back into transformers' order."""
    state = state_of(module)
    assert state is not None
    if not (state.converted or state.partial or state.kept):
        return  # nothing to do, and nothing that torch.compile could not trace
    with _LOCK, _mode(module):
        _check_whole(module, state)
        if state.kept:
            raise RuntimeError(_released(module, state))
        if state.converted:
            with _change(state):
                experts.rewrite(module, state.layout, back=True)


def _before_forward(module: torch.nn.Module, _: Any) -> None:
    if requested(module) not in IMPLEMENTATIONS:
        _restore(module)


def _before_state_dict(module: torch.nn.Module, *_: Any) -> None:
    _restore(module)


def _before_load(module: torch.nn.Module, *_: Any) -> None:
    _restore(module)
