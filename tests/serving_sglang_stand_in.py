# SPDX-License-Identifier: Apache-2.0
"""What `fused_moe.integrations.sglang` uses of SGLang 0.5.23, for machines where it is not there.

The names and signatures are SGLang's, the bodies the least that makes a layer run on a CPU.
`MIRRORED` lists what a test compares with the real SGLang where there is one.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import pkgutil
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

_MOE = "sglang.srt.layers.moe."


class HookType(enum.Enum):
    AROUND = "around"


class HookRegistry:
    _hooks: dict[str, Callable[..., Any]] = {}  # noqa: RUF012
    _patched: set[str] = set()  # noqa: RUF012

    @classmethod
    def register(
        cls,
        target: str,
        hook: Callable[..., Any],
        hook_type: HookType = HookType.AROUND,
        *,
        source: Any = None,
    ) -> None:
        assert hook_type is HookType.AROUND and target not in cls._hooks
        cls._hooks[target] = hook

    @classmethod
    def apply_hooks(cls) -> None:
        for target, hook in cls._hooks.items():
            if target in cls._patched:
                continue
            path, method = target.rsplit(".", 1)
            holder = pkgutil.resolve_name(path)
            original = getattr(holder, method)

            def wrapper(
                *args: Any, original: Any = original, hook: Any = hook, **kwargs: Any
            ) -> Any:
                return hook(original, *args, **kwargs)

            setattr(holder, method, wrapper)
            if path in _MODULES:  # for the next installation, whose module is a new one
                _MODULES[path][method] = wrapper
            cls._patched.add(target)


@dataclasses.dataclass(frozen=True)
class RegisteredMoeRunnerBackend:
    value: str


_flags = types.SimpleNamespace(moe=types.SimpleNamespace(runner_backend=None, a2a_backend=None))
_names = {"auto", "triton"}
MOE_RUNNER_BACKEND_CHOICES = ["auto", "triton"]


def get_flags() -> Any:
    return _flags


def resolve_moe_runner_backend(backend: Any) -> Any:
    if isinstance(backend, RegisteredMoeRunnerBackend):
        return backend
    if backend not in _names:
        raise ValueError(f"MoE runner backend {backend!r} is neither built in nor registered")
    return RegisteredMoeRunnerBackend(backend)


def get_moe_runner_backend() -> Any:
    return _flags.moe.runner_backend or RegisteredMoeRunnerBackend("auto")


class MoeA2ABackend(enum.Enum):
    NONE = "none"
    DEEPEP = "deepep"

    def is_none(self) -> bool:
        return self is MoeA2ABackend.NONE


def get_moe_a2a_backend() -> MoeA2ABackend:
    return _flags.moe.a2a_backend or MoeA2ABackend.NONE


@dataclasses.dataclass
class MoeRunnerConfig:
    num_experts: int | None = None
    num_local_experts: int | None = None
    hidden_size: int | None = None
    intermediate_size_per_partition: int | None = None
    layer_id: int | None = None
    top_k: int | None = None
    num_fused_shared_experts: int | None = None
    params_dtype: torch.dtype | None = None
    activation: str = "silu"
    is_gated: bool = True
    apply_router_weight_on_input: bool = False
    inplace: bool = True
    no_combine: bool = False
    routed_scaling_factor: float | None = None
    gemm1_alpha: float | None = None
    gemm1_beta: float | None = None
    gemm1_clamp_limit: float | None = None
    swiglu_limit: float | None = None
    gate_up_interleaved: bool = True
    layer: torch.nn.Module | None = None


class MoeQuantInfo(abc.ABC):  # noqa: B024
    pass


class DispatchMoeRunnerCore(abc.ABC):
    def __init__(self, config: MoeRunnerConfig) -> None:
        self.config = config

    @property
    @abc.abstractmethod
    def runner_backend(self) -> Any: ...

    @abc.abstractmethod
    def run_from_dispatch(
        self,
        dispatch_output: Any,
        quant_info: MoeQuantInfo,
        runner_config: MoeRunnerConfig,
        hooks: Any = None,
    ) -> Any: ...


class StandardTopKOutput(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: Any


class _Format(enum.Enum):
    STANDARD = "standard"


class StandardDispatchOutput(NamedTuple):
    hidden_states: torch.Tensor
    hidden_states_scale: torch.Tensor | None
    topk_output: Any
    hidden_states_pre_quant: Any = None

    @property
    def format(self) -> _Format:
        return _Format.STANDARD


class StandardCombineInput(NamedTuple):
    hidden_states: torch.Tensor


_factories: dict[str, Callable[[MoeRunnerConfig], DispatchMoeRunnerCore]] = {}


def register_moe_runner_core(
    backend_name: str, factory: Callable[[MoeRunnerConfig], DispatchMoeRunnerCore]
) -> None:
    assert backend_name not in _factories
    _names.add(backend_name)
    _factories[backend_name] = factory


class MoeRunner:
    def __init__(self, runner_backend: Any, config: Any, lora_enabled: bool = False) -> None:
        self.runner_backend, self.config = runner_backend, config
        self.runner_core = _factories[runner_backend.value](config)

    def run(self, dispatch_output: Any, quant_info: Any, lora_info: Any = None) -> Any:
        return self.runner_core.run_from_dispatch(
            dispatch_output, quant_info, self.config, hooks=lora_info
        )


class UnquantizedFusedMoEMethod:
    def __init__(
        self,
        use_triton_kernels: bool = False,
        use_flashinfer_trtllm_moe: bool = False,
        use_deep_gemm: bool = False,
    ) -> None:
        self.runner: Any = None

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        with_bias: bool = False,
        **extra_weight_attrs: Any,
    ) -> None:
        rows = intermediate_size_per_partition * (2 if layer.moe_runner_config.is_gated else 1)
        shapes: dict[str, tuple[int, ...]] = {
            "w13_weight": (rows, hidden_size),
            "w2_weight": (hidden_size, intermediate_size_per_partition),
        }
        if with_bias:
            shapes |= {"w13_weight_bias": (rows,), "w2_weight_bias": (hidden_size,)}
        for name, shape in shapes.items():
            dtype = torch.float32 if name.endswith("bias") else params_dtype
            empty = torch.empty(num_experts, *shape, dtype=dtype)
            layer.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.processed_by = "sglang"

    def restore_weights_before_loading(self, layer: torch.nn.Module) -> None:
        layer.processed_by = None

    def maybe_restore_flashinfer_trtllm_bf16_weight_shape_for_load(
        self, layer: torch.nn.Module, param: torch.nn.Parameter, weight_name: str
    ) -> None:
        layer.processed_by = None

    def get_moe_quant_info(self, layer: torch.nn.Module, runner_backend: Any) -> Any:
        return "sglang"

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: Any) -> None:
        self.runner = types.SimpleNamespace(runner_backend=RegisteredMoeRunnerBackend("triton"))

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        return self.forward_cpu(layer=layer, dispatch_output=dispatch_output)

    def _torch_compile_forward(self, num_tokens: int) -> Any:
        return self.forward_native if num_tokens == 1 else None

    def forward_cuda(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        return "sglang"

    def forward_cpu(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        return "sglang"

    forward_native = forward_cpu


def _validate_hpc_ops_quant_method(quant_method: Any) -> None:
    return None


_MODULES: dict[str, dict[str, Any]] = {
    "sglang.version": {"__version__": "0.5.23"},
    "sglang.srt.arg_groups.choices": {
        "MOE_RUNNER_BACKEND_CHOICES": MOE_RUNNER_BACKEND_CHOICES,
        "add_moe_runner_backend_choices": MOE_RUNNER_BACKEND_CHOICES.extend,
    },
    "sglang.srt.plugins.hook_registry": {"HookRegistry": HookRegistry, "HookType": HookType},
    "sglang.srt.runtime_context": {"get_flags": get_flags},
    _MOE + "fused_moe_triton.layer": {
        "_validate_hpc_ops_quant_method": _validate_hpc_ops_quant_method
    },
    _MOE + "moe_runner.base": {
        "DispatchMoeRunnerCore": DispatchMoeRunnerCore,
        "MoeQuantInfo": MoeQuantInfo,
        "MoeRunnerConfig": MoeRunnerConfig,
    },
    _MOE + "moe_runner.runner": {
        "MoeRunner": MoeRunner,
        "register_moe_runner_core": register_moe_runner_core,
    },
    _MOE + "token_dispatcher.standard": {
        "StandardCombineInput": StandardCombineInput,
        "StandardDispatchOutput": StandardDispatchOutput,
    },
    _MOE + "topk": {"StandardTopKOutput": StandardTopKOutput},
    _MOE + "utils": {
        "MoeA2ABackend": MoeA2ABackend,
        "get_moe_a2a_backend": get_moe_a2a_backend,
        "get_moe_runner_backend": get_moe_runner_backend,
        "resolve_moe_runner_backend": resolve_moe_runner_backend,
    },
    "sglang.srt.layers.quantization.unquant": {
        "UnquantizedFusedMoEMethod": UnquantizedFusedMoEMethod
    },
}

# Module, class and methods whose parameters must be those of the real SGLang.
MIRRORED: tuple[tuple[str, type, tuple[str, ...]], ...] = (
    (_MOE + "moe_runner.base", DispatchMoeRunnerCore, ("__init__", "run_from_dispatch")),
    (_MOE + "moe_runner.runner", MoeRunner, ("__init__", "run")),
    (
        "sglang.srt.layers.quantization.unquant",
        UnquantizedFusedMoEMethod,
        (
            "__init__",
            "create_weights",
            "create_moe_runner",
            "process_weights_after_loading",
            "restore_weights_before_loading",
            "maybe_restore_flashinfer_trtllm_bf16_weight_shape_for_load",
            "get_moe_quant_info",
            "apply",
            "forward_cuda",
            "forward_cpu",
            "forward_native",
            "_torch_compile_forward",
        ),
    ),
)


def install() -> None:
    """Puts the modules where an import finds them."""
    for name, contents in _MODULES.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path, parent = ".".join(parts[:depth]), ".".join(parts[: depth - 1])
            if path not in sys.modules:
                sys.modules[path] = types.ModuleType(path)
                sys.modules[path].__path__ = []
                if parent:
                    setattr(sys.modules[parent], parts[depth - 1], sys.modules[path])
        vars(sys.modules[name]).update(contents)


def uninstall() -> None:
    """Takes them away; what was hooked stays hooked."""
    for name in [n for n in sys.modules if n.split(".")[0] == "sglang"]:
        del sys.modules[name]
