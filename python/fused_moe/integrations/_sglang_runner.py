# SPDX-License-Identifier: Apache-2.0
"""Our layer behind SGLang's interface for experts (0.5.23). Importing this imports SGLang.

SGLang's method for unquantized experts chooses among its own runners only, so hooks around its
methods put ours in where the user asked for it by name. Expert ids arrive as this rank's, -1 where
another rank's; the partial sums of ranks are added by SGLang.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from sglang.srt.layers.moe.moe_runner.base import (
    DispatchMoeRunnerCore,
    MoeQuantInfo,
    MoeRunnerConfig,
)
from sglang.srt.layers.moe.moe_runner.runner import MoeRunner
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.moe.utils import get_moe_runner_backend, resolve_moe_runner_backend

from fused_moe.activation import ActivationType
from fused_moe.op import cutlass_fused_moe
from fused_moe.quantization import quantize_int8, up_gate_from_gate_up

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


@dataclasses.dataclass
class Experts(MoeQuantInfo):
    """A layer's weights in our order, and what its activation is.

    Attributes:
        w13, w2: [E_l, 2I or I, H] with rows [up; gate], and [E_l, H, I]; int8 or the input's dtype.
        scales: those of INT8 weights; empty otherwise.
        b13, b2: biases in the input's dtype, or None.
        alpha, beta, limit: [E_l] float32, or None.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    scales: list[torch.Tensor]
    b13: torch.Tensor | None
    b2: torch.Tensor | None
    activation: ActivationType
    alpha: torch.Tensor | None
    beta: torch.Tensor | None
    limit: torch.Tensor | None


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
    """Our activation for SGLang's, with alpha, beta and limit.

    Raises:
        NotImplementedError: it is not among ours, or the layer does not add up its choices.
    """
    known = (_GATED if config.is_gated else _PLAIN).get(config.activation)
    if known is None or config.no_combine:
        wanted = (
            "no_combine" if config.no_combine else f"the activation {config.activation!r}"
        ) + (", gated" if config.is_gated else ", ungated")
        raise NotImplementedError(
            f"--moe-runner-backend fused_moe does not run a layer with {wanted}; use "
            "--moe-runner-backend triton"
        )
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


def prepare(layer: Any, int8: bool) -> Experts:
    """Puts a loaded layer's rows of fc1 in our order, and quantizes it if `int8`.

    16-bit weights keep their addresses, for CUDA graphs that were captured before a reload. INT8
    ones take the place of the layer's parameters and cannot be loaded into again.
    """
    config = layer.moe_runner_config
    activation, *parameters = activation_of(config)
    alternating = config.gemm1_alpha is not None and config.gate_up_interleaved

    def in_our_order(rows: torch.Tensor) -> torch.Tensor:
        if not activation.is_gated:
            return rows
        if alternating:
            return torch.cat([rows[:, 1::2], rows[:, 0::2]], dim=1)
        return up_gate_from_gate_up(rows)

    w13, w2 = in_our_order(layer.w13_weight.data), layer.w2_weight.data
    dtype = w2.dtype
    scales: list[torch.Tensor] = []
    if int8:
        (w13, scale13), (w2, scale2) = quantize_int8(w13), quantize_int8(w2)
        scales = [scale13, scale2]
        layer.w13_weight = torch.nn.Parameter(w13, requires_grad=False)
        layer.w2_weight = torch.nn.Parameter(w2, requires_grad=False)
    elif activation.is_gated:
        layer.w13_weight.data.copy_(w13)
    b13, b2 = getattr(layer, "w13_weight_bias", None), getattr(layer, "w2_weight_bias", None)
    alpha, beta, limit = (
        None
        if value is None
        else torch.full((w2.shape[0],), float(value), dtype=torch.float32, device=w2.device)
        for value in parameters
    )
    return Experts(
        w13=layer.w13_weight.data,
        w2=layer.w2_weight.data,
        scales=scales,
        b13=None if b13 is None else in_our_order(b13.data).to(dtype),
        b2=None if b2 is None else b2.data.to(dtype),
        activation=activation,
        alpha=alpha,
        beta=beta,
        limit=limit,
    )


def _is_ours(method: Any) -> bool:
    return method.runner is not None and method.runner.runner_backend.value in BACKENDS


# What follows wraps methods of UnquantizedFusedMoEMethod: `original` is SGLang's, `method` its
# instance. Where another runner was asked for, they only call it.


def around_create_moe_runner(original: Any, method: Any, layer: Any, config: Any) -> None:
    """Gives the method our runner where --moe-runner-backend names it."""
    backend = get_moe_runner_backend()
    if backend.value not in BACKENDS:
        original(method, layer, config)
        return
    activation_of(config)
    method.moe_runner_config = config
    method.runner = MoeRunner(backend, config)


def around_process_weights(original: Any, method: Any, layer: Any) -> None:
    """Prepares the weights instead of SGLang's own rearrangements."""
    if not _is_ours(method):
        original(method, layer)
        return
    method.fused_moe_experts = prepare(layer, BACKENDS[method.runner.runner_backend.value])


def around_forward(original: Any, method: Any, layer: Any, dispatch_output: Any) -> Any:
    """Runs the layer; SGLang has one such method for each kind of device."""
    if not _is_ours(method):
        return original(method, layer, dispatch_output)
    return method.runner.run(dispatch_output, method.fused_moe_experts)


def around_torch_compile_forward(original: Any, method: Any, num_tokens: int) -> Any:
    """None keeps our forward, where SGLang would take one that reads its own order of rows."""
    return None if _is_ours(method) else original(method, num_tokens)
