# SPDX-License-Identifier: Apache-2.0
"""What `fused_moe.integrations.vllm` uses of vLLM 0.33, for machines where vLLM is not installed.

The names and signatures are vLLM's, the bodies the least that makes a layer run on a CPU.
`MIRRORED` lists what a test compares with the real vLLM where there is one.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import sys
import types
from typing import Any

import torch

_LAYERS = "vllm.model_executor.layers."
_MOE = _LAYERS + "fused_moe."


class MoEActivation(enum.Enum):
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU2 = "relu2"
    SWIGLUOAI = "swigluoai"
    SITU = "situ"
    SWIGLUOAI_UNINTERLEAVE = "swigluoai_uninterleave"
    SWIGLUSTEP = "swiglustep"
    SILU_NO_MUL = "silu_no_mul"
    GELU_NO_MUL = "gelu_no_mul"
    GELU_TANH_NO_MUL = "gelu_tanh_no_mul"
    RELU2_NO_MUL = "relu2_no_mul"

    @property
    def is_gated(self) -> bool:
        return not self.value.endswith("_no_mul")


class RoutingMethodType(enum.IntEnum):
    Renormalize = 1


class FusedMoEActivationFormat(enum.Enum):
    Standard = ("standard",)
    BatchedExperts = ("batched_experts",)


class UnquantizedMoeBackend(enum.Enum):
    TRITON = "TRITON"
    CPU = "CPU"


class Int8MoeBackend(enum.Enum):
    TRITON = "TRITON"
    CPU = "CPU"


kInt8StaticChannelSym = "int8, static, channel, symmetric"


@dataclasses.dataclass
class FusedMoEParallelConfig:
    tp_size: int
    pcp_size: int
    dp_size: int
    ep_size: int
    tp_rank: int
    pcp_rank: int
    dp_rank: int
    ep_rank: int
    sp_size: int
    use_ep: bool
    all2all_backend: str
    enable_eplb: bool

    @property
    def use_all2all_kernels(self) -> bool:
        return self.use_ep and (self.dp_size > 1 or self.pcp_size > 1 or self.sp_size > 1)

    @property
    def use_batched_activation_format(self) -> bool:
        return self.use_all2all_kernels and self.all2all_backend == "deepep_low_latency"

    @property
    def use_ag_rs_all2all_kernels(self) -> bool:
        return self.use_all2all_kernels and self.all2all_backend == "allgather_reducescatter"

    @property
    def use_passthrough_all2all(self) -> bool:
        return self.all2all_backend == "passthrough"


@dataclasses.dataclass
class FusedMoEConfig:
    num_experts: int
    experts_per_token: int
    hidden_dim: int
    intermediate_size: int
    num_local_experts: int
    num_logical_experts: int
    activation: MoEActivation
    device: torch.device | str
    routing_method: RoutingMethodType
    moe_parallel_config: FusedMoEParallelConfig
    in_dtype: torch.dtype
    moe_backend: str = "auto"
    has_bias: bool = False
    is_lora_enabled: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float | None = None
    swiglu_beta: float | None = None

    def __post_init__(self) -> None:
        tp_size = self.moe_parallel_config.tp_size
        self.intermediate_size_per_partition = self.intermediate_size // tp_size
        self.is_act_and_mul = self.activation.is_gated


@dataclasses.dataclass
class _QuantConfig:
    w1_scale: Any = None
    w2_scale: Any = None
    w1_bias: Any = None
    w2_bias: Any = None


class FusedMoEExpertsModular(abc.ABC):
    post_gemm2_hook: Any = None

    def __init__(
        self,
        moe_config: Any,
        quant_config: Any,
        max_num_tokens: int | None = None,
        num_dispatchers: int | None = None,
    ) -> None:
        self.moe_config = moe_config
        self.quant_config = quant_config
        self.activation_config = types.SimpleNamespace(
            clamp_limit=moe_config.swiglu_limit,
            alpha=1.0 if moe_config.swiglu_alpha is None else moe_config.swiglu_alpha,
            beta=0.0 if moe_config.swiglu_beta is None else moe_config.swiglu_beta,
        )

    w1_scale = property(lambda self: self.quant_config.w1_scale)
    w2_scale = property(lambda self: self.quant_config.w2_scale)
    w1_bias = property(lambda self: self.quant_config.w1_bias)
    w2_bias = property(lambda self: self.quant_config.w2_bias)

    @staticmethod
    def is_supported_config(
        cls: Any, moe_config: Any, weight_key: Any, activation_key: Any, activation_format: Any
    ) -> tuple[bool, str | None]:
        for supported, reason in (
            (cls._supports_current_device(), "current device"),
            (cls._supports_activation(moe_config.activation), "activation"),
            (cls._supports_quant_scheme(weight_key, activation_key), "quantization scheme"),
            (cls._supports_parallel_config(moe_config.moe_parallel_config), "parallel config"),
            (activation_format == cls.activation_format(), "activation format"),
            (not moe_config.is_lora_enabled, "LoRA"),
        ):
            if not supported:
                return False, f"kernel does not support {reason}"
        return True, None

    @staticmethod
    @abc.abstractmethod
    def activation_format() -> Any: ...

    @abc.abstractmethod
    def finalize_weight_and_reduce_impl(self) -> Any: ...

    @abc.abstractmethod
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
    ) -> Any: ...

    @abc.abstractmethod
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
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> Any: ...


class TopKWeightAndReduceNoOP:
    pass


class RoutedExperts(torch.nn.Module):
    pass


op_registry_oot: dict[str, type] = {}


class CustomOp(torch.nn.Module):
    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(op_registry_oot.get(cls.__name__, cls))

    @classmethod
    def register_oot(cls, _decorated_op_cls: Any = None, name: str | None = None) -> Any:
        def decorator(op_cls: type) -> type:
            key = name or cls.__name__
            assert key not in op_registry_oot
            op_registry_oot[key] = op_cls
            return op_cls

        return decorator


def replace_parameter(layer: Any, param_name: str, new_tensor: torch.Tensor) -> None:
    old = getattr(layer, param_name, None)
    if old is not None and (old.shape, old.dtype) == (new_tensor.shape, new_tensor.dtype):
        old.data.copy_(new_tensor)
    elif old is not None:
        old.data = new_tensor
    else:
        setattr(layer, param_name, torch.nn.Parameter(new_tensor, requires_grad=False))


class _Method(CustomOp):
    """What FusedMoEMethodBase and the modular kernel do on one rank."""

    experts_cls: Any = None
    supports_pre_processed_weights: bool = False

    def __init__(self, moe: Any) -> None:
        super().__init__()
        self.moe = moe
        self.fused_experts: Any = None
        self.moe_kernel: Any = None

    def _init_moe_kernel(self, layer: Any) -> None:
        scales = [getattr(layer, name, None) for name in ("w13_scale", "w2_scale")]
        biases = [getattr(layer, name, None) for name in ("w13_bias", "w2_bias")]
        self.fused_experts = self.experts_cls(
            moe_config=self.moe, quant_config=_QuantConfig(*scales, *biases)
        )
        self.moe_kernel = self

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        experts, early = self.fused_experts, layer.apply_router_weight_on_input
        sizes = (x.shape[0], layer.w13_weight.shape[1], x.shape[1], topk_ids.shape[1])
        count = layer.w13_weight.shape[0]
        *scratch, shape = experts.workspace_shapes(
            *sizes, layer.global_num_experts, count, None, layer.activation
        )
        output = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
        unfinished = experts.apply(
            output=output,
            hidden_states=x * topk_weights.to(x.dtype) if early else x,
            w1=layer.w13_weight,
            w2=layer.w2_weight,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=layer.activation,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            a1q_scale=None,
            a2_scale=None,
            workspace13=torch.empty(scratch[0]),
            workspace2=torch.empty(scratch[1]),
            expert_tokens_meta=None,
            apply_router_weight_on_input=early,
        )
        assert unfinished is None
        assert isinstance(experts.finalize_weight_and_reduce_impl(), TopKWeightAndReduceNoOP)
        return output


class UnquantizedFusedMoEMethod(_Method):
    def __init__(self, moe: Any) -> None:
        super().__init__(moe)
        self.unquantized_backend, self.experts_cls = UnquantizedMoeBackend.CPU, object
        self.supports_pre_processed_weights = True

    def _setup_kernel(self, layer: Any, w13: torch.Tensor, w2: torch.Tensor) -> None:
        raise AssertionError("vLLM's own experts are not here")

    def process_weights_after_loading(self, layer: Any) -> None:
        self._setup_kernel(layer=layer, w13=layer.w13_weight, w2=layer.w2_weight)


class Int8OnlineMoEMethod(_Method):
    def __init__(self, *, moe: Any) -> None:
        super().__init__(moe)
        self.int8_backend, self.experts_cls = Int8MoeBackend.CPU, object

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        for name in ("w13", "w2"):
            weight = getattr(layer, f"{name}_weight")
            scale = weight.abs().amax(dim=2) / 127
            q = (weight / scale.unsqueeze(2)).round().clamp(-127, 127).to(torch.int8)
            replace_parameter(layer, f"{name}_weight", q)
            replace_parameter(layer, f"{name}_scale", scale.float())
        self._setup_kernel(layer)
        layer._already_called_process_weights_after_loading = True

    def _setup_kernel(self, layer: Any) -> None:
        self._init_moe_kernel(layer)


class ExpertsInt8Config:
    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        return None


_quantizations: dict[str, type] = {}


def register_quantization_config(quantization: str) -> Any:
    return lambda config: _quantizations.setdefault(quantization, config)


def get_quantization_config(quantization: str) -> type:
    return _quantizations[quantization]


current_platform = types.SimpleNamespace(
    is_cpu=lambda: True, is_cuda=lambda: False, has_device_capability=lambda least: False
)

_MODULES: dict[str, dict[str, Any]] = {
    "vllm": {"__version__": "0.33.0"},
    "vllm.model_executor.custom_op": {"CustomOp": CustomOp, "op_registry_oot": op_registry_oot},
    "vllm.model_executor.utils": {"replace_parameter": replace_parameter},
    "vllm.platforms": {"current_platform": current_platform},
    _LAYERS + "quantization": {
        "get_quantization_config": get_quantization_config,
        "register_quantization_config": register_quantization_config,
    },
    _LAYERS + "quantization.experts_int8": {"ExpertsInt8Config": ExpertsInt8Config},
    _LAYERS + "quantization.online.int8": {"Int8OnlineMoEMethod": Int8OnlineMoEMethod},
    _LAYERS + "quantization.utils.quant_utils": {"kInt8StaticChannelSym": kInt8StaticChannelSym},
    _MOE + "activation": {"MoEActivation": MoEActivation},
    _MOE + "config": {
        "FusedMoEConfig": FusedMoEConfig,
        "FusedMoEParallelConfig": FusedMoEParallelConfig,
        "RoutingMethodType": RoutingMethodType,
    },
    _MOE + "modular_kernel": {
        "FusedMoEActivationFormat": FusedMoEActivationFormat,
        "FusedMoEExpertsModular": FusedMoEExpertsModular,
    },
    _MOE + "oracle.int8": {"Int8MoeBackend": Int8MoeBackend},
    _MOE + "oracle.unquantized": {"UnquantizedMoeBackend": UnquantizedMoeBackend},
    _MOE + "routed_experts": {"RoutedExperts": RoutedExperts},
    _MOE + "topk_weight_and_reduce": {"TopKWeightAndReduceNoOP": TopKWeightAndReduceNoOP},
    _MOE + "unquantized_fused_moe_method": {"UnquantizedFusedMoEMethod": UnquantizedFusedMoEMethod},
}

# Module, class and methods whose parameters must be those of the real vLLM.
MIRRORED: tuple[tuple[str, type, tuple[str, ...]], ...] = (
    (
        _MOE + "modular_kernel",
        FusedMoEExpertsModular,
        ("__init__", "is_supported_config", "workspace_shapes", "apply"),
    ),
    (
        _MOE + "unquantized_fused_moe_method",
        UnquantizedFusedMoEMethod,
        ("__init__", "_setup_kernel", "_init_moe_kernel", "apply", "process_weights_after_loading"),
    ),
    (
        _LAYERS + "quantization.online.int8",
        Int8OnlineMoEMethod,
        ("__init__", "_setup_kernel", "process_weights_after_loading"),
    ),
)


def install() -> None:
    """Puts the modules where an import finds them."""
    for name, contents in _MODULES.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path not in sys.modules:
                sys.modules[path] = types.ModuleType(path)
                sys.modules[path].__path__ = []
                if depth > 1:
                    setattr(
                        sys.modules[".".join(parts[: depth - 1])],
                        parts[depth - 1],
                        sys.modules[path],
                    )
        vars(sys.modules[name]).update(contents)


def uninstall() -> None:
    """Takes them away."""
    op_registry_oot.clear()
    _quantizations.clear()
    for name in [n for n in sys.modules if n.split(".")[0] == "vllm"]:
        del sys.modules[name]
