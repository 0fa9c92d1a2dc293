# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers, 5.7 and newer: its MoE models on our layer.

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

With `quantization_config=quantization("int8")` the experts are quantized while the checkpoint is
read, so that they are never all held unquantized.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import torch

from fused_moe.integrations import _transformers_experts as experts
from fused_moe.integrations import _transformers_weights as weights
from fused_moe.integrations._transformers_weights import FORMATS, IMPLEMENTATIONS, NAME
from fused_moe.op import cutlass_fused_moe

__all__ = ["FORMATS", "IMPLEMENTATIONS", "NAME", "prepare", "quantization", "register"]

# Before, the names that a model accepts were a fixed list.
_OLDEST = (5, 7)


def register() -> None:
    """Makes the names of IMPLEMENTATIONS known to transformers; again is harmless.

    Raises:
        ImportError: transformers is missing, or older than 5.7.
    """
    try:
        version = importlib.import_module("transformers").__version__
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if numbers is None or (int(numbers[1]), int(numbers[2])) < _OLDEST:
            raise ImportError(f"this is {version}")
        registry = importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            "fused_moe.integrations.transformers needs transformers 5.7 or newer, the first whose "
            f"models take experts implementations that others register ({error}): "
            "pip install 'transformers>=5.7'"
        ) from error
    for name, kept in IMPLEMENTATIONS.items():
        registry.register(name, _implementation(kept))
    try:
        fp8 = importlib.import_module("transformers.integrations.finegrained_fp8")
        for name in IMPLEMENTATIONS:
            fp8.ALL_FP8_EXPERTS_FUNCTIONS.register(name, _refuse_fp8)
    except (AttributeError, ImportError):
        pass  # versions without that registry refuse the name themselves


def quantization(kept: str = "int8") -> Any:
    """A `quantization_config` for from_pretrained: experts are quantized while they are read.

    Weight by weight, on the device they are loaded to, so that nothing ever holds all of them
    unquantized. It chooses the experts implementation, too.

    Args:
        kept: "int8", "int4" or "mxfp4".

    Raises:
        ImportError: transformers is missing, or its interface for quantizers is another.
        ValueError: another format.
    """
    register()
    try:
        loading = importlib.import_module("fused_moe.integrations._transformers_loading")
    except ImportError as error:
        raise ImportError(
            "this version of transformers has another interface for quantizers "
            f"({error}); load with experts_implementation='{NAME}_{kept}' instead, which "
            "quantizes once the model is loaded"
        ) from error
    loading.register()
    return loading.FusedMoeQuantization(kept)


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
    modules = weights.experts_modules(model)
    ours = [module for module in modules if weights.requested(module) in IMPLEMENTATIONS]
    if not ours:
        raise ValueError(
            f"the experts of {type(model).__name__} run on {weights.requested(modules[0])!r}; load "
            f"it with experts_implementation={NAME!r}, or call "
            f"model.set_experts_implementation({NAME!r}) first"
        )
    for module in ours:
        weights.prepare(module, IMPLEMENTATIONS[weights.requested(module)])
    return len(ours)


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
    state = weights.state_of(module)
    if state is None or not state.converted or state.kept != kept:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "the experts' weights are not converted yet, which must not happen inside "
                "torch.compile: call fused_moe.integrations.transformers.prepare(model) first"
            )
        state = weights.prepare(module, kept)
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
    alpha, beta, limit = state.swiglu_on(device)
    return cutlass_fused_moe(
        hidden_states.contiguous(),
        top_k_index.to(torch.int32).contiguous(),
        top_k_weights.to(torch.float32).contiguous(),
        fc1,
        fc2,
        output_dtype,
        weights.scales(module) if kept else None,
        fc1_expert_biases=biases[0],
        fc2_expert_biases=biases[1],
        swiglu_alpha=alpha,
        swiglu_beta=beta,
        swiglu_limit=limit,
        use_packed_weights=kept == "int4",
        use_w4_group_scaling=kept == "mxfp4",
        activation_type=state.activation.kind,
    )


def _refuse_fp8(module: torch.nn.Module, *_: Any) -> torch.Tensor:
    raise NotImplementedError(
        f"{type(module).__name__} holds FP8 experts, which fused_moe does not take: load the model "
        f"dequantized and let experts_implementation={NAME}_int8 quantize it"
    )
