# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers, 5 and newer: its MoE models on our layer.

    from fused_moe.integrations import transformers as moe

    moe.register()
    model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="fused_moe")

transformers asks its registry of experts implementations by the model's
`config._experts_implementation` each time an experts module runs. `register` adds these names:

    fused_moe        the weights as they are
    fused_moe_int8   experts quantized to INT8, one scale a row
    fused_moe_int4   experts quantized to INT4, one scale a group of 128, 64 or 32
    fused_moe_mxfp4  experts quantized to MXFP4

A module's weights are converted once, in place, when `prepare` or its first forward meets it: our
gated rows are [up; gate], transformers' are [gate; up]. Whatever else reads them sees
transformers' order, because it is put back, in place, before another implementation runs, before
a state dict is made and before one is loaded; the next forward on ours converts again.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch

from fused_moe.integrations import _transformers_experts as experts
from fused_moe.op import cutlass_fused_moe
from fused_moe.quantization import quantize_int4, quantize_int8, quantize_mxfp4

NAME = "fused_moe"
# What follows NAME: how the weights are kept. The empty one keeps them as they are.
FORMATS = ("", "int8", "int4", "mxfp4")
IMPLEMENTATIONS = {f"{NAME}_{kept}" if kept else NAME: kept for kept in FORMATS}

# The attribute of an experts module that holds its _State.
_STATE = "_fused_moe"
_SCALES = ("fused_moe_fc1_scale", "fused_moe_fc2_scale")


@dataclasses.dataclass
class _State:
    """What is known of one experts module.

    Attributes:
        kept: the format of its weights, one of FORMATS.
        converted: whether its parameters are in our order.
        swiglu: alpha, beta and limit, each [E] float32 on the weights' device, or None.
    """

    activation: experts.Activation
    layout: experts.Layout
    kept: str = ""
    converted: bool = False
    swiglu: tuple[torch.Tensor | None, ...] = (None, None, None)


def register() -> None:
    """Makes the names of IMPLEMENTATIONS known to transformers; again is harmless.

    Raises:
        ImportError: transformers is missing, or older than its registry of experts.
    """
    try:
        moe = importlib.import_module("transformers.integrations.moe")
        registry = moe.ALL_EXPERTS_FUNCTIONS
    except (AttributeError, ImportError) as error:
        raise ImportError(
            "fused_moe.integrations.transformers needs transformers 5.0 or newer, with its "
            f"registry of experts implementations ({error}): pip install 'transformers>=5'"
        ) from error
    for name, kept in IMPLEMENTATIONS.items():
        registry.register(name, _implementation(kept))
    try:
        fp8 = importlib.import_module("transformers.integrations.finegrained_fp8")
        for name in IMPLEMENTATIONS:
            fp8.ALL_FP8_EXPERTS_FUNCTIONS.register(name, _refuse_fp8)
    except (AttributeError, ImportError):
        pass  # versions without that registry refuse the name themselves


def prepare(model: torch.nn.Module) -> int:
    """Converts, and where the name says so quantizes, all experts of `model` now.

    The first forward would do it too, layer by layer. Call this before `torch.compile` or the
    capture of a CUDA graph, which must not see it; or on a model still on the CPU, so that the
    GPU never holds the unquantized experts.

    Returns:
        The number of layers that run on `cutlass_fused_moe`.

    Raises:
        ValueError: no layer does: the implementation was not asked for, or the model's experts
            do not go through transformers' interface.
        NotImplementedError: a layer is one that ours cannot stand in for.
    """
    modules = [module for module in model.modules() if hasattr(type(module), "_apply_gate")]
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no experts that go through transformers' interface of "
            "experts implementations, so that it would ignore experts_implementation"
        )
    number = 0
    for module in modules:
        name = _requested(module)
        if name in IMPLEMENTATIONS:
            _prepare(module, IMPLEMENTATIONS[name])
            number += 1
    if not number:
        raise ValueError(
            f"the experts of {type(model).__name__} run on {_requested(modules[0])!r}; load it "
            f"with experts_implementation={NAME!r}, or call "
            f"model.set_experts_implementation({NAME!r}) first"
        )
    return number


def _requested(module: torch.nn.Module) -> Any:
    return getattr(module.config, "_experts_implementation", None)


def _implementation(kept: str) -> Callable[..., torch.Tensor]:
    """The function that transformers calls in place of an experts module's forward."""

    def forward(
        module: torch.nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        return _forward(kept, module, hidden_states, top_k_index, top_k_weights)

    return forward


def _forward(
    kept: str,
    module: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """An experts module's forward.

    Args:
        hidden_states: [tokens, H].
        top_k_index: [tokens, k] int64. With expert parallelism an id of another rank is E.
        top_k_weights: [tokens, k].

    Returns:
        [tokens, H] of hidden_states' dtype.
    """
    state = module.__dict__.get(_STATE)
    if state is None or not state.converted or state.kept != kept:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "the experts' weights are not converted yet, which must not happen inside "
                "torch.compile: call fused_moe.integrations.transformers.prepare(model) first"
            )
        state = _prepare(module, kept)
    fc1 = experts.weight(module, experts.first_name(module), state.layout)
    fc2 = experts.weight(module, "down_proj", state.layout)
    if torch.is_grad_enabled() and (hidden_states.requires_grad or fc1.requires_grad):
        raise RuntimeError(
            "fused_moe is inference only and gradients are enabled: run the model under "
            "torch.no_grad() or torch.inference_mode() (generate() does), or train with "
            'model.set_experts_implementation("eager")'
        )
    output_dtype = hidden_states.dtype
    device = hidden_states.device
    if fc1.is_floating_point() and fc1.dtype != output_dtype:
        if not torch.is_autocast_enabled(device.type):
            raise ValueError(
                f"hidden_states are {output_dtype}, the experts' weights {fc1.dtype}; load the "
                "model with one dtype, or run it under torch.autocast"
            )
        hidden_states = hidden_states.to(fc1.dtype)
    biases: list[Any] = [None, None]
    if getattr(module, "has_bias", False):
        names = (f"{experts.first_name(module)}_bias", "down_proj_bias")
        biases = [getattr(module, name).to(output_dtype) for name in names]
    if any(p is not None and p.device != device for p in state.swiglu):  # the model has moved
        state.swiglu = tuple(p if p is None else p.to(device) for p in state.swiglu)
    alpha, beta, limit = state.swiglu
    return cutlass_fused_moe(
        hidden_states.contiguous(),
        top_k_index.to(torch.int32).contiguous(),
        top_k_weights.to(torch.float32).contiguous(),
        fc1,
        fc2,
        output_dtype,
        [getattr(module, name) for name in _SCALES] if kept else None,
        fc1_expert_biases=biases[0],
        fc2_expert_biases=biases[1],
        swiglu_alpha=alpha,
        swiglu_beta=beta,
        swiglu_limit=limit,
        use_packed_weights=kept == "int4",
        use_w4_group_scaling=kept == "mxfp4",
        activation_type=state.activation.kind,
    )


def _prepare(module: torch.nn.Module, kept: str) -> _State:
    """Converts one experts module, and quantizes it if `kept` names a format."""
    # Not inference tensors, whatever mode the caller is in: parameters outlive it.
    with torch.inference_mode(False), torch.no_grad():
        state = module.__dict__.get(_STATE)
        if state is not None and state.kept:
            if state.kept != kept:
                raise RuntimeError(_released(module, state))
            return state
        experts.check(module)
        if state is None:
            state = _State(*experts.recognize(module))
            setattr(module, _STATE, state)
            module.register_forward_pre_hook(_before_forward)
            module.register_state_dict_pre_hook(_before_state_dict)
            module.register_load_state_dict_pre_hook(_before_load)
        weight = getattr(module, experts.first_name(module))
        state.swiglu = tuple(
            None if value is None else torch.full((weight.shape[0],), value, device=weight.device)
            for value in dataclasses.astuple(state.activation)[1:]
        )
        if not state.converted:
            for parameter in module.parameters(recurse=False):
                # The layer reads 16 bytes at a time; tensors of a mapped file start anywhere.
                if not parameter.is_contiguous() or parameter.data_ptr() % 16:
                    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            experts.rewrite(module, state.layout, back=False)
            state.converted = True
        if kept:
            _quantize(module, state, kept)
    return state


def _quantize(module: torch.nn.Module, state: _State, kept: str) -> None:
    """Replaces both weights by quantized ones under their names, and adds their scales."""
    names = (experts.first_name(module), "down_proj")
    depths = [experts.weight(module, name, state.layout).shape[2] for name in names]
    # One size for both; MXFP4 has one only.
    groups = {"int4": (128, 64, 32), "mxfp4": (32,)}.get(kept, (1,))
    group = next((g for g in groups if all(depth % g == 0 for depth in depths)), 0)
    if not group:
        raise ValueError(
            f"{type(module).__name__}: {kept} needs a hidden and an intermediate size that 32 "
            f"divides; they are {depths[0]} and {depths[1]}. Use {NAME}_int8"
        )
    for name, scale_name in zip(names, _SCALES, strict=True):
        weight = experts.weight(module, name, state.layout)
        if kept == "int8":
            q, scale = quantize_int8(weight)
        elif kept == "int4":
            q, scale = quantize_int4(weight, group)
        else:
            q, scale = quantize_mxfp4(weight)
        # The last reference to the unquantized weights goes here, before the next ones' turn.
        del weight
        setattr(module, name, torch.nn.Parameter(q, requires_grad=False))
        module.register_buffer(scale_name, scale)
    state.kept = kept
    state.layout = dataclasses.replace(state.layout, transposed=False)


def _released(module: torch.nn.Module, state: _State) -> str:
    return (
        f"{type(module).__name__}'s experts were quantized to {state.kept} and the original "
        "weights released, so that they can neither be saved, nor loaded into, nor run on "
        f"{_requested(module)!r}; load the model again"
    )


def _restore(module: torch.nn.Module) -> None:
    """Puts the parameters back into transformers' order."""
    state = module.__dict__[_STATE]
    if state.kept:
        raise RuntimeError(_released(module, state))
    if state.converted:
        with torch.inference_mode(False):
            experts.rewrite(module, state.layout, back=True)
        state.converted = False


def _before_forward(module: torch.nn.Module, _: Any) -> None:
    if _requested(module) not in IMPLEMENTATIONS:
        _restore(module)


def _before_state_dict(module: torch.nn.Module, *_: Any) -> None:
    _restore(module)


def _before_load(module: torch.nn.Module, *_: Any) -> None:
    _restore(module)


def _refuse_fp8(module: torch.nn.Module, *_: Any) -> torch.Tensor:
    raise NotImplementedError(
        f"{type(module).__name__} holds FP8 experts, which fused_moe does not take: load the model "
        f"dequantized and let experts_implementation={NAME}_int8 quantize it"
    )
