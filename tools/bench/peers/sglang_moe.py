# SPDX-License-Identifier: Apache-2.0
"""A peer: SGLang's fused-MoE layer in Triton, with its tuned tables, from its released wheel.

fused_moe.py, its configuration and the Triton kernels are SGLang's. Sorting beyond its own Triton
kernel for few slots, the activation and the sum are compiled in packages for another PyTorch; they
are vLLM's here, or ours, which do the same in as many launches.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from layers import Layer
from peers import foreign
from peers.engines import Config, EngineMoe, candidates, quantized_arguments
from peers.pieces import pieces

_UTILS = "sglang.srt.layers.moe.moe_runner.triton_utils"
_REAL = (
    "sglang.kernels.ops.moe.fused_moe_triton_kernels",
    "sglang.kernels.ops.moe.moe_align_small_numel",
    f"{_UTILS}.fused_moe",
    f"{_UTILS}.fused_moe_triton_config",
    f"{_UTILS}.moe_align_block_size",
)


class _Unset:
    """An environment in which no variable is set."""

    def __getattr__(self, name: str) -> Any:
        return types.SimpleNamespace(get=lambda: False)


def _no(*_: object, **__: object) -> bool:
    return False


def _same(*_: object, **__: object) -> Callable[[Any], Any]:
    return lambda function: function


@functools.cache
def load(root: pathlib.Path) -> types.SimpleNamespace:
    """Imports SGLang's layer, once.

    Returns:
        .layer, SGLang's module; .pieces, what the small steps are done by; .override, a dict whose
        "config" replaces the tuned table's choice.
    """
    small = pieces(root)
    override: dict[str, Config | None] = {"config": None}

    def align(
        ids: torch.Tensor,
        buckets: int,
        block: int,
        sorted_ids: torch.Tensor,
        tile_experts: torch.Tensor,
        rows: torch.Tensor,
        *_: Any,
    ) -> None:
        # Their first bucket is for ids of -1, which there are none of.
        small.align(ids, buckets - 1, block, sorted_ids, tile_experts, rows)

    def total(y: torch.Tensor, out: torch.Tensor, factor: float) -> None:
        assert factor == 1.0
        small.moe_sum(y, out)

    def activate(h: torch.Tensor, out: torch.Tensor, **_: Any) -> None:
        small.silu_and_mul(out, h)

    state = types.SimpleNamespace(
        deterministic=types.SimpleNamespace(enable_deterministic_inference=False),
        moe=types.SimpleNamespace(enable_fused_moe_sum_all_reduce=False),
    )
    known: Mapping[str, Mapping[str, Any]] = {
        # Ampere has no dependent launches.
        "sglang.kernels.jit.utils": {"is_arch_support_pdl": _no},
        "sglang.kernels.ops.activation.activation": {"silu_and_mul": activate},
        "sglang.kernels.ops.moe": {"moe_align_block_size": align},
        "sglang.srt.batch_invariant_ops": {"is_batch_invariant_mode_enabled": _no},
        "sglang.srt.distributed.device_communicators.pynccl_allocator": {
            "use_symmetric_memory": lambda *_, **__: contextlib.nullcontext()
        },
        "sglang.srt.environ": {"envs": _Unset()},
        "sglang.srt.layers.dp_attention": {"is_allocation_symmetric": _no},
        "sglang.srt.layers.moe.utils": {"get_moe_padding_size": lambda _: 0},
        "sglang.srt.runtime_context": {
            "get_exec": lambda: state,
            "get_parallel": lambda: types.SimpleNamespace(tp_group=None),
        },
        "sglang.srt.utils": {
            "cpu_has_amx_support": _no,
            "get_bool_env_var": _no,
            "get_device_name": lambda: torch.cuda.get_device_name(),
            "is_cpu": _no,
            "is_cuda": lambda: True,
            "is_hip": _no,
            "is_musa": _no,
            "is_sm90_supported": _no,
            "is_xpu": _no,
        },
        "sglang.srt.utils.custom_op": {"register_custom_op": _same},
        _UTILS: {"get_config": lambda: override["config"]},
        "sgl_kernel": {"moe_sum_reduce": total},
    }
    foreign.install(root, "sgl_kernel", (), known)
    foreign.install(root, "sglang", _REAL, known)
    layer = importlib.import_module(f"{_UTILS}.fused_moe")
    # For few tokens they have PyTorch compile the sum into one kernel.
    layer.moe_sum_reduce_torch_compile = total  # type: ignore[attr-defined]
    for name in ("fused_moe", "fused_moe_triton_config"):
        module = importlib.import_module(f"{_UTILS}.{name}")
        module.logger = foreign.QuietLogger()  # type: ignore[attr-defined]
    return types.SimpleNamespace(layer=layer, pieces=small, override=override)


class SglangMoe(EngineMoe):
    """The peer."""

    name = "sglang"

    def __init__(self, root: pathlib.Path) -> None:
        """`root`: the unpacked files of bring_peers.py."""
        super().__init__(root)
        self._sglang = load(root)
        self.note = self._sglang.pieces.note

    def formats(self) -> Sequence[str]:
        """16-bit and INT8 a channel; its users run INT4 by Marlin."""
        return ("same", "int8")

    def choices(self, layer: Layer) -> Sequence[Config | None]:
        """Its own and one tile; vLLM's kernel, nearly the same, is tried with two."""
        return (None, candidates(layer)[0])

    def run_with(self, layer: Layer, wanted: Config | None) -> torch.Tensor:
        """The layer's output, [M, H]."""
        self._sglang.override["config"] = wanted
        try:
            return self._sglang.layer.fused_experts_impl(
                layer.x,
                layer.weights.fc1,
                layer.weights.fc2,
                layer.scales,
                layer.ids,
                filter_expert=False,
                **quantized_arguments(layer),
            )
        finally:
            self._sglang.override["config"] = None
