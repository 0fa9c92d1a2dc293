# SPDX-License-Identifier: Apache-2.0
"""Our layer behind SGLang's interface for experts (0.5.23). Importing this imports SGLang.

SGLang's method for unquantized experts chooses among its own runners only, so hooks around its
methods put ours in where the user asked for it by name. Expert ids arrive as this rank's, -1 where
another rank's; the partial sums of ranks are added by SGLang.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe.moe_runner.base import (
    DispatchMoeRunnerCore,
    MoeRunnerConfig,
)
from sglang.srt.layers.moe.moe_runner.runner import MoeRunner
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.moe.utils import (
    get_moe_a2a_backend,
    get_moe_runner_backend,
    resolve_moe_runner_backend,
)
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

from fused_moe.activation import ActivationType
from fused_moe.integrations._sglang_weights import NO_RELOAD, Experts, experts_of, prepare, restore
from fused_moe.op import cutlass_fused_moe

# Names for --moe-runner-backend, and whether the experts are quantized after loading.
BACKENDS = {"fused_moe": False, "fused_moe_int8": True}

_GATED = {
    "silu": ActivationType.Swiglu,
    "gelu": ActivationType.Geglu,
    "gelu_tanh": ActivationType.GegluTanh,
}
_PLAIN = {
    "silu": ActivationType.Silu,
    "gelu": ActivationType.Gelu,
    "relu2": ActivationType.Relu2,
}


class FusedMoeRunnerCore(DispatchMoeRunnerCore):
    """One call of `cutlass_fused_moe` for SGLang's standard dispatch."""

    def __init__(self, config: MoeRunnerConfig, name: str) -> None:
        super().__init__(config)
        self._name = name

    @property
    def runner_backend(self) -> Any:
        return resolve_moe_runner_backend(self._name)

    def run_from_dispatch(
        self,
        dispatch_output: Any,
        quant_info: Experts,
        runner_config: MoeRunnerConfig,
        hooks: Any = None,
    ) -> Any:
        """Returns the layer's output [M, H], summed over the k choices and scaled.

        Raises:
            NotImplementedError: tokens that another dispatcher sent, or LoRA.
        """
        if dispatch_output.format.value != "standard" or hooks is not None:
            raise NotImplementedError(
                f"--moe-runner-backend {self._name} got tokens in the form "
                f"{dispatch_output.format.value!r}{', with LoRA' if hooks is not None else ''}; it "
                "takes SGLang's standard dispatch (--moe-a2a-backend none), without LoRA"
            )
        weights, ids = dispatch_output.topk_output[:2]
        x = dispatch_output.hidden_states
        scales = weights.float()
        if runner_config.apply_router_weight_on_input:
            x = x * weights.to(x.dtype)
            scales = torch.ones_like(scales)
        if runner_config.routed_scaling_factor not in (None, 1.0):
            scales = scales * runner_config.routed_scaling_factor
        out = cutlass_fused_moe(
            x.contiguous(),
            ids.to(torch.int32).contiguous(),
            scales.contiguous(),
            quant_info.w13,
            quant_info.w2,
            x.dtype,
            quant_info.scales,
            fc1_expert_biases=quant_info.b13,
            fc2_expert_biases=quant_info.b2,
            swiglu_alpha=quant_info.alpha,
            swiglu_beta=quant_info.beta,
            swiglu_limit=quant_info.limit,
            activation_type=quant_info.activation,
        )
        return StandardCombineInput(hidden_states=out)


def activation_of(
    config: MoeRunnerConfig,
) -> tuple[ActivationType, float | None, float | None, float | None]:
    """Our activation for SGLang's, with alpha, beta and limit."""
    if not config.is_gated:
        return _PLAIN[config.activation], None, None, None
    known = _GATED[config.activation]
    if known is not ActivationType.Swiglu:
        return known, None, None, None
    if config.gemm1_alpha is not None:
        beta = 1.0 if config.gemm1_beta is None else config.gemm1_beta
        return ActivationType.SwigluBias, config.gemm1_alpha, beta, config.gemm1_clamp_limit
    if config.gemm1_clamp_limit is not None:
        # Without alpha SGLang clamps what silu returns, with swiglu_limit what it gets.
        return ActivationType.SwigluStep, None, None, config.gemm1_clamp_limit
    if config.swiglu_limit is not None:
        return ActivationType.SwigluBias, None, None, config.swiglu_limit
    return known, None, None, None


def refusal(config: MoeRunnerConfig, int8: bool) -> str | None:
    """Why a layer of this configuration is not ours to run; None where it is."""
    known = config.activation in (_GATED if config.is_gated else _PLAIN)
    given = config.gemm1_alpha is not None or config.gemm1_clamp_limit is not None
    if not known or (given and not (config.is_gated and config.activation == "silu")):
        kind = "gated" if config.is_gated else "ungated"
        parameters = ", with gemm1_alpha or gemm1_clamp_limit" if known else ""
        return f"the activation {config.activation!r}, {kind}{parameters}"
    if config.no_combine:
        return "no_combine"
    if config.apply_router_weight_on_input and config.top_k != 1:
        return f"apply_router_weight_on_input and {config.top_k} experts a token"
    if not get_moe_a2a_backend().is_none():
        return f"--moe-a2a-backend {get_moe_a2a_backend().value}"
    multiple = 16 if int8 else 8
    for name, size in (
        ("hidden size", config.hidden_size),
        ("intermediate size of a rank", config.intermediate_size_per_partition),
    ):
        if size is not None and size % multiple:
            return f"the {name} {size}, no multiple of {multiple}"
    return None


def _is_ours(method: Any) -> bool:
    return method.runner is not None and method.runner.runner_backend.value in BACKENDS


# What follows wraps methods of UnquantizedFusedMoEMethod: `original` is SGLang's, `method` its
# instance. Where another runner was asked for, they only call it.


def around_create_moe_runner(original: Any, method: Any, layer: Any, config: Any) -> None:
    """Gives the method our runner where --moe-runner-backend names it.

    Raises:
        NotImplementedError: it does not run such a layer.
    """
    backend = get_moe_runner_backend()
    if backend.value not in BACKENDS:
        original(method, layer, config)
        return
    if (reason := refusal(config, BACKENDS[backend.value])) is not None:
        raise NotImplementedError(
            f"--moe-runner-backend {backend.value} does not run a layer with {reason}; use "
            "--moe-runner-backend auto"
        )
    method.moe_runner_config = config
    method.fused_moe_activation = activation_of(config)
    method.runner = MoeRunner(backend, config)


def around_process_weights(original: Any, method: Any, layer: Any) -> None:
    """Prepares the weights instead of SGLang's own rearrangements."""
    if not _is_ours(method):
        original(method, layer)
        return
    prepare(layer, BACKENDS[method.runner.runner_backend.value])


def around_restore(original: Any, method: Any, layer: Any) -> None:
    """SGLang calls this at the beginning of an update of weights."""
    if not _is_ours(method):
        original(method, layer)
        return
    restore(layer)


def around_restore_for_load(
    original: Any, method: Any, layer: Any, param: Any, weight_name: str
) -> None:
    """SGLang's loaders of experts call this before each tensor that they load.

    Raises:
        RuntimeError: the experts are INT8 already.
    """
    if not _is_ours(method):
        original(method, layer, param, weight_name)
        return
    if param.dtype == torch.int8:
        raise RuntimeError(NO_RELOAD)
    restore(layer)


def around_forward(original: Any, method: Any, layer: Any, dispatch_output: Any) -> Any:
    """Runs the layer; SGLang has one such method for each kind of device."""
    if not _is_ours(method):
        return original(method, layer, dispatch_output)
    return method.runner.run(dispatch_output, experts_of(layer, method.fused_moe_activation))


def around_torch_compile_forward(original: Any, method: Any, num_tokens: int) -> Any:
    """None keeps our forward, where SGLang would take one that reads its own order of rows."""
    return None if _is_ours(method) else original(method, num_tokens)


def around_quant_info(original: Any, method: Any, layer: Any, runner_backend: Any) -> Any:
    """What SGLang's LoRA layers ask for to run the experts themselves.

    Raises:
        NotImplementedError: the experts are ours.
    """
    if not _is_ours(method):
        return original(method, layer, runner_backend)
    raise NotImplementedError(
        f"--moe-runner-backend {runner_backend.value} does not run experts with LoRA; use "
        "--moe-runner-backend auto"
    )


def around_validate(original: Any, quant_method: Any) -> None:
    """SGLang's layers of experts show this the method that they chose.

    Raises:
        NotImplementedError: one of our runners was asked for and the method has none.
    """
    original(quant_method)
    backend = get_moe_runner_backend()
    if backend.value in BACKENDS and not isinstance(quant_method, UnquantizedFusedMoEMethod):
        raise NotImplementedError(
            f"--moe-runner-backend {backend.value} runs unquantized experts; these are "
            f"{type(quant_method).__name__}'s: leave it out, or use an unquantized checkpoint"
        )
