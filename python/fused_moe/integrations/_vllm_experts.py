# SPDX-License-Identifier: Apache-2.0
"""Our layer behind vLLM's interface for experts (0.33). Importing this imports vLLM.

vLLM holds the rows of fc1 as [gate; up] (gpt-oss: alternating), our function wants [up; gate]: the
weights are put in order once, when vLLM has loaded them. Expert ids arrive as global ones with a
map to this rank's, or as this rank's; the partial sums of ranks are added by vLLM.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization.experts_int8 import ExpertsInt8Config
from vllm.model_executor.layers.quantization.online.int8 import Int8OnlineMoEMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import kInt8StaticChannelSym
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from fused_moe.activation import ActivationType
from fused_moe.integrations._activation_parameters import for_each_expert
from fused_moe.op import cutlass_fused_moe
from fused_moe.quantization import up_gate_from_gate_up

# Below vLLM's logger, whose handler and level it has.
_log = logging.getLogger("vllm.fused_moe")

_ACTIVATIONS = {
    MoEActivation.SILU: ActivationType.Swiglu,
    MoEActivation.GELU: ActivationType.Geglu,
    MoEActivation.GELU_TANH: ActivationType.GegluTanh,
    MoEActivation.SWIGLUOAI: ActivationType.SwigluBias,
    MoEActivation.SWIGLUOAI_UNINTERLEAVE: ActivationType.SwigluBias,
    MoEActivation.SWIGLUSTEP: ActivationType.SwigluStep,
    MoEActivation.SILU_NO_MUL: ActivationType.Silu,
    MoEActivation.GELU_NO_MUL: ActivationType.Gelu,
    MoEActivation.RELU2_NO_MUL: ActivationType.Relu2,
}
# vLLM's kernel for gpt-oss takes no parameters: these are built in.
_GPT_OSS = (1.702, 1.0, 7.0)

# Weight and activation keys of vLLM's oracle -> multiple that H and I must be of.
_SCHEMES = {(None, None): 8, (kInt8StaticChannelSym, None): 16}


class FusedMoeExperts(mk.FusedMoEExpertsModular):
    """`cutlass_fused_moe` as vLLM's modular experts: routing weights and the sum included."""

    def _swiglu_parameters(
        self, activation: Any
    ) -> tuple[float | None, float | None, float | None]:
        """alpha, beta and limit; None where the activation has no such parameter."""
        given = self.activation_config
        if activation == MoEActivation.SWIGLUOAI:
            return _GPT_OSS
        if activation == MoEActivation.SWIGLUOAI_UNINTERLEAVE:
            return given.alpha, given.beta, given.clamp_limit
        if activation == MoEActivation.SILU and given.clamp_limit is not None:
            return None, None, given.clamp_limit
        return None, None, None

    @staticmethod
    def _supports_current_device() -> bool:
        return current_platform.is_cpu() or (
            current_platform.is_cuda() and current_platform.has_device_capability(80)
        )

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return (weight_key, activation_key) in _SCHEMES

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation in _ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        # The other dispatchers hand over rows in forms of their own, which were not tried.
        return not moe_parallel_config.use_passthrough_all2all and (
            not moe_parallel_config.use_all2all_kernels
            or moe_parallel_config.use_ag_rs_all2all_kernels
        )

    @staticmethod
    def activation_format() -> Any:
        return mk.FusedMoEActivationFormat.Standard

    def finalize_weight_and_reduce_impl(self) -> Any:
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: Any,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Two workspaces, of which we use none (ours is PyTorch's), and the output [M, K]."""
        return (M, K), (0,), (M, K)

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor | None,
        workspace2: torch.Tensor | None,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Writes the layer's output, summed over the k choices, into `output` [M, H].

        Args:
            w1, w2: as `FusedMoeMethod` leaves them, fc1's rows [up; gate].
            topk_ids: [M, k] of any integer dtype: global with an `expert_map` ([global experts]
                int32, -1 where another rank's), this rank's without; negative ones count
                nothing.
            apply_router_weight_on_input: vLLM has multiplied the rows already.

        Raises:
            NotImplementedError: the model wants the k choices' outputs, to sum them itself.
        """
        if self.post_gemm2_hook is not None:
            raise NotImplementedError(
                "the model adds up the outputs of its experts itself (post_gemm2_hook), which "
                "fused_moe does inside: run it without FUSED_MOE_VLLM and fused_moe_int8"
            )
        ids = topk_ids.to(torch.int32).contiguous()
        if expert_map is not None:
            ids = torch.where(ids < 0, -1, expert_map[ids.clamp_min(0)].to(torch.int32))
        quantized = w1.dtype == torch.int8
        alpha, beta, limit = (
            for_each_expert(value, w1.shape[0], w1.device)
            for value in self._swiglu_parameters(activation)
        )
        cutlass_fused_moe(
            hidden_states.contiguous(),
            ids,
            None if apply_router_weight_on_input else topk_weights.float().contiguous(),
            w1,
            w2,
            output.dtype,
            [self.w1_scale, self.w2_scale] if quantized else None,
            fc1_expert_biases=self.w1_bias,
            fc2_expert_biases=self.w2_bias,
            swiglu_alpha=alpha,
            swiglu_beta=beta,
            swiglu_limit=limit,
            output=output,
            activation_type=_ACTIVATIONS[activation],
        )


def refusal(moe: Any, weight_key: Any) -> str | None:
    """Why a layer of this configuration is not ours to run; None where it is."""
    supported, reason = FusedMoeExperts.is_supported_config(
        FusedMoeExperts, moe, weight_key, None, _activation_format(moe)
    )
    if not supported:
        return str(reason)
    if current_platform.is_cuda() and moe.in_dtype not in (torch.float16, torch.bfloat16):
        return f"kernel does not support activations of {moe.in_dtype}"
    multiple = _SCHEMES[weight_key, None]
    for name, size in (
        ("hidden size", moe.hidden_dim),
        ("intermediate size of a rank", moe.intermediate_size_per_partition),
    ):
        if size % multiple:
            return f"the {name}, {size}, is no multiple of {multiple}"
    return None


def _activation_format(moe: Any) -> Any:
    batched = moe.moe_parallel_config.use_batched_activation_format
    formats = mk.FusedMoEActivationFormat
    return formats.BatchedExperts if batched else formats.Standard


def _in_our_order(rows: torch.Tensor, activation: Any) -> torch.Tensor:
    """fc1's weights [E, 2I, H], biases or scales [E, 2I] as [up; gate], a new tensor if gated."""
    if not activation.is_gated:
        return rows.contiguous()
    if activation == MoEActivation.SWIGLUOAI:
        return torch.cat([rows[:, 1::2], rows[:, 0::2]], dim=1)
    return up_gate_from_gate_up(rows)


def _refuse_to_load(layer: Any, name: str) -> None:
    """Makes the loader of a parameter that is not as in a checkpoint any more say so.

    vLLM's reload_weights and weight transfer put parameters as in a checkpoint in its place while
    they load; `model.load_weights` alone does not, and would load the gate where up belongs.
    """
    original: Callable[..., Any] | None = getattr(getattr(layer, name, None), "weight_loader", None)
    if original is None or hasattr(original, "refuses"):
        return

    def refusing_loader(
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        # Experts of other ranks may come after all of this one's have.
        if layer._map_global_expert_id_to_local_expert_id(expert_id) != -1:
            raise RuntimeError(
                f"{weight_name} is in fused_moe's order of rows or INT8, and a checkpoint's tensor "
                "cannot be loaded into it: use vLLM's reload_weights or its weight transfer"
            )
        return False if return_success else None

    refusing_loader.refuses = True  # type: ignore[attr-defined]
    getattr(layer, name).weight_loader = refusing_loader


@functools.cache
def _say_once(level: int, message: str) -> None:
    """Logs what is the same for dozens of layers."""
    _log.log(level, message)


class FusedMoeMethod(UnquantizedFusedMoEMethod):
    """16-bit experts on our layer; on vLLM's own choice where `refusal` says why, with a warning.

    A `moe_backend` that the user names is left alone.
    """

    def __init__(self, moe: Any) -> None:
        ours = moe.moe_backend == "auto"
        if ours and (reason := refusal(moe, None)) is not None:
            _say_once(logging.WARNING, f"fused_moe does not run this layer, vLLM does: {reason}")
            ours = False
        if not ours:
            super().__init__(moe)
            return
        # Past the in-tree choice of a kernel, which fails where vLLM has none for the layer.
        super(UnquantizedFusedMoEMethod, self).__init__(moe)
        # Of vLLM's names the one that asks for nothing before or after loading.
        self.unquantized_backend = UnquantizedMoeBackend.TRITON
        self.experts_cls = FusedMoeExperts
        # Those of vLLM's weight cache are in the order of the process that loaded them, which need
        # not be ours: the key to the cache does not know.
        self.supports_pre_processed_weights = False
        _say_once(logging.INFO, "16-bit experts run on fused_moe")

    def _setup_kernel(self, layer: Any, w13: torch.Tensor, w2: torch.Tensor) -> None:
        if self.experts_cls is not FusedMoeExperts:
            super()._setup_kernel(layer, w13, w2)
            return
        # Later calls bring new weights in vLLM's order; the kernel keeps its addresses.
        first = self.moe_kernel is None
        replace_parameter(layer, "w13_weight", _in_our_order(w13.data, self.moe.activation))
        replace_parameter(layer, "w2_weight", w2.data.contiguous())
        if self.moe.has_bias:
            bias = _in_our_order(layer.w13_bias.data, self.moe.activation)
            replace_parameter(layer, "w13_bias", bias)
        if self.moe.activation.is_gated:
            for name in ("w13_weight", "w13_bias"):
                _refuse_to_load(layer, name)
        if first:
            self._init_moe_kernel(layer)


class FusedMoeInt8Method(Int8OnlineMoEMethod):
    """Experts that vLLM quantizes to INT8 while loading, one scale a row, on our layer."""

    def __init__(self, *, moe: Any) -> None:
        reason = refusal(moe, kInt8StaticChannelSym)
        if reason is not None:
            raise NotImplementedError(
                f"fused_moe does not run this layer: {reason}; use --quantization experts_int8, "
                "which is vLLM's own"
            )
        # Past Int8OnlineMoEMethod's own, which fails where vLLM has no INT8 kernel of its own.
        super(Int8OnlineMoEMethod, self).__init__(moe)
        self.int8_backend = Int8MoeBackend.TRITON
        self.experts_cls = FusedMoeExperts
        _say_once(logging.INFO, "INT8 experts run on fused_moe")

    def _setup_kernel(self, layer: Any) -> None:
        for name in ("w13_weight", "w13_scale", "w13_bias"):
            rows = getattr(layer, name, None)
            if rows is not None:
                replace_parameter(layer, name, _in_our_order(rows.data, self.moe.activation))
        for name in ("w13_weight", "w2_weight", "w13_bias"):
            _refuse_to_load(layer, name)
        super()._setup_kernel(layer)


class FusedMoeInt8Config(ExpertsInt8Config):
    """`--quantization fused_moe_int8`: experts in INT8 on our layer, all else as it is."""

    @classmethod
    def get_name(cls) -> str:
        return "fused_moe_int8"

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Ours for routed experts, ExpertsInt8Config's choice for other layers."""
        if isinstance(layer, RoutedExperts):
            return FusedMoeInt8Method(moe=layer.moe_config)
        return super().get_quant_method(layer, prefix)
