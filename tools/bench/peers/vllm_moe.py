# SPDX-License-Identifier: Apache-2.0
"""A peer: vLLM's fused-MoE layer in Triton, with its tuned tables, from its released wheel.

fused_moe.py, activation.py and moe_align_block_size.py are vLLM's; what they import from the rest
of vLLM and is needed is supplied here.
"""

from __future__ import annotations

import functools
import importlib
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from layers import Layer
from peers import foreign
from peers.engines import Config, EngineMoe, candidates, quantized_arguments
from peers.pieces import pieces

_LAYERS = "vllm.model_executor.layers.fused_moe"
_REAL = (
    "vllm.scalar_type",
    f"{_LAYERS}.activation",
    f"{_LAYERS}.fused_moe",
    f"{_LAYERS}.moe_align_block_size",
    f"{_LAYERS}.experts.marlin_moe",
)


class _Platform:
    """A CUDA device that is to be taken for an Ampere one."""

    def is_cuda(self) -> bool:
        return True

    def is_rocm(self) -> bool:
        return False

    def is_device_capability(self, capability: int) -> bool:
        return False


class _Experts(foreign.Placeholder):
    """Base class of classes that are not used; one of its functions is."""

    @staticmethod
    def adjust_N_for_activation(columns: int, activation: Any) -> int:
        return columns // 2 if activation.is_gated else columns


def _dtype_name(dtype: torch.dtype, **flags: bool) -> str | None:
    """The name of a table's dtype: that of the flag that is set."""
    names = [flag.removeprefix("use_") for flag, value in flags.items() if value]
    return names[0] if names else "float32" if dtype == torch.float32 else None


def _wna16_gemm(*arguments: Any) -> None:
    torch.ops._moe_C.moe_wna16_gemm(*arguments)


def _marlin_gemm(*arguments: Any, **named: Any) -> torch.Tensor:
    """Positional for the operator, in the order that the caller names them."""
    values = [*arguments, *(v.id if hasattr(v, "id") else v for v in named.values())]
    return torch.ops._moe_C.moe_wna16_marlin_gemm(*values, -1, -1, -1)


def _resized(cache: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return cache.flatten()[: torch.Size(shape).numel()].view(shape)


@functools.cache
def load(root: pathlib.Path) -> types.SimpleNamespace:
    """Imports vLLM's layer, once: two copies would take their configuration from one place.

    Returns:
        .layer and .marlin, vLLM's modules; .pieces, what the small steps are done by; .override,
        a dict whose "config" replaces the tuned table's choice.
    """
    small = pieces(root)
    override: dict[str, Config | None] = {"config": None}

    def align(
        ids: torch.Tensor,
        experts: int,
        block: int,
        sorted_ids: torch.Tensor,
        tile_experts: torch.Tensor,
        rows: torch.Tensor,
        expert_map: None = None,
    ) -> None:
        assert expert_map is None
        small.align(ids, experts, block, sorted_ids, tile_experts, rows)

    def quantized_input(
        A: torch.Tensor, A_scale: None, quant_dtype: None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        assert quant_dtype is None
        return A, None

    def make_workspace(device: torch.device, blocks: int = 1) -> torch.Tensor:
        count = torch.cuda.get_device_properties(device).multi_processor_count
        return torch.zeros(count * blocks, dtype=torch.int32, device=device)

    import triton

    known: Mapping[str, Mapping[str, Any]] = {
        "vllm.envs": {"VLLM_BATCH_INVARIANT": False, "VLLM_TUNED_CONFIG_FOLDER": None},
        "vllm.logger": {"init_logger": foreign.QuietLogger},
        "vllm.platforms": {"current_platform": _Platform()},
        "vllm.triton_utils": {"triton": triton, "tl": triton.language},
        "vllm.utils.math_utils": {
            "round_up": lambda value, step: -(-value // step) * step,
            "cdiv": lambda value, step: -(-value // step),
        },
        "vllm.utils.platform_utils": {
            "get_device_name_as_file_name": lambda: torch.cuda.get_device_name().replace(" ", "_")
        },
        "vllm.utils.torch_utils": {"direct_register_custom_op": lambda **_: None},
        "vllm._custom_ops": {
            "moe_align_block_size": align,
            "moe_sum": lambda y, out, *_: small.moe_sum(y, out),
            "moe_wna16_gemm": _wna16_gemm,
            "moe_wna16_marlin_gemm": _marlin_gemm,
        },
        _LAYERS: {"get_config": lambda: override["config"]},
        f"{_LAYERS}.modular_kernel": {"FusedMoEExpertsModular": _Experts},
        f"{_LAYERS}.config": {
            "FUSED_MOE_UNQUANTIZED_CONFIG": None,
            "_get_config_dtype_str": _dtype_name,
        },
        f"{_LAYERS}.utils": {
            "enable_swap_ab": lambda *_: False,
            "moe_kernel_quantize_input": quantized_input,
            "_resize_cache": _resized,
        },
        "vllm.model_executor.layers.quantization.utils.marlin_utils": {
            "marlin_make_workspace_new": make_workspace,
            "marlin_moe_intermediate_size": lambda w1, w2: w2.shape[1] * 16,
        },
    }
    foreign.install(root, "vllm", _REAL, known)
    layer = importlib.import_module(f"{_LAYERS}.fused_moe")
    marlin = importlib.import_module(f"{_LAYERS}.experts.marlin_moe")
    activation = importlib.import_module(f"{_LAYERS}.activation")

    def activate(kind: Any, output: torch.Tensor, input: torch.Tensor, **_: Any) -> torch.Tensor:
        assert kind == activation.MoEActivation.SILU
        small.silu_and_mul(output, input)
        return output

    layer.apply_moe_activation = activate  # type: ignore[attr-defined]
    return types.SimpleNamespace(
        layer=layer,
        marlin=marlin,
        activate=activate,
        silu=activation.MoEActivation.SILU,
        pieces=small,
        override=override,
    )


class VllmMoe(EngineMoe):
    """The peer."""

    name = "vllm"

    def __init__(self, root: pathlib.Path) -> None:
        """`root`: the unpacked files of bring_peers.py."""
        super().__init__(root)
        self._vllm = load(root)
        self.note = self._vllm.pieces.note
        if not hasattr(torch.ops._moe_C, "moe_wna16_gemm"):
            # Without the compiled library the Triton kernel serves few tokens too.
            self._vllm.layer.should_moe_wna16_use_cuda = lambda *_, **__: False

    def formats(self) -> Sequence[str]:
        """16-bit, INT8 a channel, INT4 a group."""
        return ("same", "int8", "int4")

    def choices(self, layer: Layer) -> Sequence[Config | None]:
        """Its own and two tiles; for INT4 its own, and for many tokens one that a tuner finds."""
        if layer.weights.kind != "int4":
            return (None, *candidates(layer))
        if layer.ids.numel() <= 6 * layer.model.shape.experts:
            return (None,)  # a CUDA kernel without choices
        return (None, candidates(layer)[1] | {"SPLIT_K": 1})

    def run_with(self, layer: Layer, wanted: Config | None) -> torch.Tensor:
        """The layer's output, [M, H]."""
        self._vllm.override["config"] = wanted
        try:
            return self._vllm.layer.fused_experts_impl(
                layer.x,
                layer.weights.fc1,
                layer.weights.fc2,
                layer.scales,
                layer.ids,
                **quantized_arguments(layer),
            )
        finally:
            self._vllm.override["config"] = None
