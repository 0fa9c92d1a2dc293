# SPDX-License-Identifier: Apache-2.0
"""`flashinfer.fused_moe`, as of FlashInfer 0.7.2.post1, on this package's kernels.

Code written for FlashInfer's function runs by changing its import:

    from fused_moe.integrations.flashinfer import ActivationType, autotune, cutlass_fused_moe

    out = cutlass_fused_moe(x, ids, scales, fc1, fc2, torch.bfloat16, [])[0]

or, where FlashInfer is not installed, by `install()`, after which `from flashinfer.fused_moe
import cutlass_fused_moe` finds this module. Arguments have FlashInfer's names, order and defaults,
and a list comes back. All other public names of that module can be imported; what cannot be served
raises NotImplementedError when it is used, and says what to use.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

import fused_moe
from fused_moe.integrations._flashinfer_names import (
    REFUSED,
    ActivationType,
    Fp8QuantizationType,
    GatedActType,
    RoutingInputMode,
    RoutingMethodType,
    WeightLayout,
    is_gated_activation,
    refused,
)
from fused_moe.integrations._flashinfer_stand_in import install, uninstall

__all__ = [
    "ActivationType",
    "Fp8QuantizationType",
    "GatedActType",
    "RoutingInputMode",
    "RoutingMethodType",
    "WeightLayout",
    "autotune",
    "cutlass_fused_moe",
    "cutlass_fused_moe_workspace_size",
    "has_bgmv_moe",
    "has_monomoe",
    "install",
    "interleave_moe_scales_for_sm90_mixed_gemm",
    "interleave_moe_weights_for_sm90_mixed_gemm",
    "is_gated_activation",
    "uninstall",
]


def cutlass_fused_moe(
    input: torch.Tensor,
    token_selected_experts: torch.Tensor,
    token_final_scales: torch.Tensor | None,
    fc1_expert_weights: torch.Tensor,
    fc2_expert_weights: torch.Tensor,
    output_dtype: torch.dtype,
    quant_scales: Sequence[torch.Tensor] | None,
    fc1_expert_biases: torch.Tensor | None = None,
    fc2_expert_biases: torch.Tensor | None = None,
    input_sf: torch.Tensor | None = None,
    swiglu_alpha: torch.Tensor | None = None,
    swiglu_beta: torch.Tensor | None = None,
    swiglu_limit: torch.Tensor | None = None,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    cluster_size: int = 1,
    cluster_rank: int = 0,
    output: torch.Tensor | None = None,
    enable_alltoall: bool = False,
    use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    min_latency_mode: bool = False,
    use_packed_weights: bool = False,
    use_wfp4afp8_humming: bool = False,
    tune_max_num_tokens: int = 8192,
    enable_pdl: bool | None = None,
    activation_type: int = ActivationType.Swiglu,
    swizzled_input_sf: bool = True,
    use_fused_finalize: bool = True,
    profile_ids: Sequence[int] | None = None,
    workspace_buffer: torch.Tensor | None = None,
    *,
    clamped_relu2_limit: torch.Tensor | None = None,
    situ_beta: torch.Tensor | None = None,
    situ_linear_beta: torch.Tensor | None = None,
    backend: str = "cutlass",
    use_fp8_block_scaling: bool | None = None,
    use_w4a8_group_scaling: bool | None = None,
) -> list[torch.Tensor]:
    """One Mixture-of-Experts layer with FlashInfer's arguments.

    The shapes, dtypes and errors are those of `fused_moe.cutlass_fused_moe`, its weight formats
    too: what FlashInfer does not have (INT8, INT4 weights) is asked for as there.

    Args:
        input, ..., use_packed_weights, tune_max_num_tokens, enable_pdl, activation_type,
            use_fused_finalize, workspace_buffer: as in `fused_moe.cutlass_fused_moe`.
        quant_scales: as there; MXFP4 scales may be viewed as int32, as FlashInfer's callers do.
        use_wfp4afp8_humming: an FP8 path of Hopper: True is refused.
        swizzled_input_sf: says how `input_sf` lies, which is refused; without it, nothing.
        profile_ids: numbers of FlashInfer's own tactics: None or [-1, -1] (choose); others are
            refused.
        clamped_relu2_limit, situ_beta, situ_linear_beta: parameters of activations that are not
            here: refused.
        backend: "cutlass" is FlashInfer's only name for this function and means the backend of
            the device; "sm80" and "cpu" are taken too.
        use_fp8_block_scaling: the older name of `use_deepseek_fp8_block_scale`.
        use_w4a8_group_scaling: the older name for W4A8, which is asked for by
            `use_w4_group_scaling` with `use_packed_weights` today.

    Returns:
        [out], out [M, H] of output_dtype; `output` itself where given.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as
            `fused_moe.cutlass_fused_moe`; ValueError also for an older flag that is False where
            the newer one is True.
    """
    for name, value in (
        ("clamped_relu2_limit", clamped_relu2_limit),
        ("situ_beta", situ_beta),
        ("situ_linear_beta", situ_linear_beta),
    ):
        if value is not None:
            raise NotImplementedError(
                f"{name} is given, a parameter of an activation that fused_moe does not have: use "
                "one of fused_moe.ActivationType"
            )
    if profile_ids is not None and any(number != -1 for number in profile_ids):
        raise NotImplementedError(
            f"profile_ids is {list(profile_ids)}: these are numbers of FlashInfer's own tactics, "
            "which fused_moe does not have; leave it out, and tune with autotune()"
        )
    use_fp8_block, use_w4, use_packed = _current_flags(
        use_deepseek_fp8_block_scale,
        use_w4_group_scaling,
        use_packed_weights,
        use_fp8_block_scaling,
        use_w4a8_group_scaling,
    )
    _refuse_humming(use_wfp4afp8_humming)
    if use_w4 and not use_packed and quant_scales:
        quant_scales = [_bytes_of(scales) for scales in quant_scales]
    out = fused_moe.cutlass_fused_moe(
        input,
        token_selected_experts,
        token_final_scales,
        fc1_expert_weights,
        fc2_expert_weights,
        output_dtype,
        quant_scales,
        fc1_expert_biases,
        fc2_expert_biases,
        input_sf,
        swiglu_alpha,
        swiglu_beta,
        swiglu_limit,
        tp_size,
        tp_rank,
        ep_size,
        ep_rank,
        cluster_size,
        cluster_rank,
        output,
        enable_alltoall,
        use_fp8_block,
        use_w4,
        use_mxfp8_act_scaling,
        min_latency_mode,
        use_packed,
        tune_max_num_tokens,
        enable_pdl,
        _own_activation(activation_type),
        use_fused_finalize=use_fused_finalize,
        workspace_buffer=workspace_buffer,
        backend=_own_backend(backend),
    )
    return [out]


def cutlass_fused_moe_workspace_size(
    max_num_tokens: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts_total: int,
    top_k: int,
    *,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    output_dtype: torch.dtype = torch.bfloat16,
    activation_type: int = ActivationType.Swiglu,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    min_latency_mode: bool = False,
    use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    use_fused_finalize: bool = True,
    use_packed_weights: bool = False,
    use_wfp4afp8_humming: bool = False,
    device: torch.device | str | None = None,
    backend: str = "cutlass",
    use_fp8_block_scaling: bool | None = None,
    use_w4a8_group_scaling: bool | None = None,
) -> int:
    """Returns the bytes that `workspace_buffer` must have, with FlashInfer's arguments.

    As `fused_moe.cutlass_fused_moe_workspace_size`; `device` None is the current CUDA device, or
    the CPU (0 bytes) where there is none.

    Raises:
        ValueError, NotImplementedError, RuntimeError: what `cutlass_fused_moe` would raise.
    """
    use_fp8_block, use_w4, use_packed = _current_flags(
        use_deepseek_fp8_block_scale,
        use_w4_group_scaling,
        use_packed_weights,
        use_fp8_block_scaling,
        use_w4a8_group_scaling,
    )
    _refuse_humming(use_wfp4afp8_humming)
    return fused_moe.cutlass_fused_moe_workspace_size(
        max_num_tokens,
        hidden_size,
        intermediate_size,
        num_experts_total,
        top_k,
        x_dtype=x_dtype,
        weight_dtype=weight_dtype,
        output_dtype=output_dtype,
        activation_type=_own_activation(activation_type),
        tp_size=tp_size,
        tp_rank=tp_rank,
        ep_size=ep_size,
        ep_rank=ep_rank,
        use_deepseek_fp8_block_scale=use_fp8_block,
        use_w4_group_scaling=use_w4,
        use_mxfp8_act_scaling=use_mxfp8_act_scaling,
        min_latency_mode=min_latency_mode,
        use_packed_weights=use_packed,
        use_fused_finalize=use_fused_finalize,
        device=device,
        backend=_own_backend(backend),
    )


def autotune(
    tune_mode: bool = True,
    cache: str | None = None,
    tuning_buckets: Sequence[int] | None = None,
    round_up: bool | None = None,
    skip_ops: str | Collection[str] | None = None,
    cuda_graph_profile_replays: int | None = None,
) -> AbstractContextManager[None]:
    """Tunes the layers that are called inside: `fused_moe.autotune`, which has two arguments more.

    FlashInfer offers it as `flashinfer.autotune` and `flashinfer.autotuner.autotune`. A `cache`
    that FlashInfer wrote is no file of this one.

    Raises:
        TypeError, ValueError, OSError: as there.
    """
    return fused_moe.autotune(
        tune_mode, cache, tuning_buckets, round_up, skip_ops, cuda_graph_profile_replays
    )


def has_bgmv_moe() -> bool:
    """False: FlashInfer's question whether its LoRA kernels are there."""
    return False


def has_monomoe() -> bool:
    """False: FlashInfer's question whether its one-kernel layer is there."""
    return False


def interleave_moe_weights_for_sm90_mixed_gemm(
    weight: torch.Tensor, quant_type: str = "fp4"
) -> torch.Tensor:
    """Returns a copy of MXFP4 weights uint8 [E, N, K/2]: here they stay as they are.

    FlashInfer rearranges them for Hopper. Its callers' order of steps is right on Ampere, too,
    because `cutlass_fused_moe` here takes what this returns.

    Raises:
        NotImplementedError: a quant_type other than "fp4".
    """
    if quant_type != "fp4":
        raise NotImplementedError(
            f'quant_type is {quant_type!r}, a format for FP8 activations; use "fp4", or '
            "fused_moe's weight-only formats"
        )
    return weight.clone(memory_format=torch.contiguous_format)


def interleave_moe_scales_for_sm90_mixed_gemm(
    scales: torch.Tensor, group_size: int = 32
) -> torch.Tensor:
    """Returns a copy of MXFP4 scales uint8 [E, N, K/32]: here they stay as they are.

    Raises:
        NotImplementedError: scales that are not MXFP4's.
    """
    if group_size != 32 or scales.dtype != torch.uint8:
        raise NotImplementedError(
            f"scales are {scales.dtype} in groups of {group_size}; only those of MXFP4, uint8 in "
            "groups of 32, are taken here"
        )
    return scales.clone(memory_format=torch.contiguous_format)


def _current_flags(
    fp8_block: bool, w4: bool, packed: bool, old_fp8_block: bool | None, old_w4a8: bool | None
) -> tuple[bool, bool, bool]:
    """Today's use_deepseek_fp8_block_scale, use_w4_group_scaling and use_packed_weights."""
    for old, new, old_value, new_value in (
        ("use_fp8_block_scaling", "use_deepseek_fp8_block_scale", old_fp8_block, fp8_block),
        ("use_w4a8_group_scaling", "use_w4_group_scaling", old_w4a8, w4),
    ):
        if old_value is not None and new_value and not old_value:
            raise ValueError(f"{old} is False and {new}, its newer name, is True; give one of them")
    return bool(fp8_block or old_fp8_block), bool(w4 or old_w4a8), bool(packed or old_w4a8)


def _refuse_humming(use_wfp4afp8_humming: bool) -> None:
    if not isinstance(use_wfp4afp8_humming, bool):
        raise TypeError(
            f"use_wfp4afp8_humming is {use_wfp4afp8_humming!r}; it must be a bool. Before "
            "FlashInfer 0.6.16 tune_max_num_tokens was the argument in this place: give that one "
            "by its name"
        )
    if use_wfp4afp8_humming:
        raise NotImplementedError(
            "use_wfp4afp8_humming is True: FP8 activations with MXFP4 weights need FP8 matrix "
            "instructions; use 16-bit activations with use_w4_group_scaling"
        )


def _own_activation(activation_type: int) -> int:
    """The same number, unless it is one of the activations that only FlashInfer has."""
    if activation_type in (ActivationType.Situ, ActivationType.ClampedRelu2):
        name = ActivationType(activation_type).name
        raise NotImplementedError(
            f"activation_type is {name}, which fused_moe does not have: use one of "
            "fused_moe.ActivationType"
        )
    return int(activation_type)


def _own_backend(backend: str) -> str | None:
    if backend == "cake":
        raise NotImplementedError(
            'backend is "cake", a kernel of Blackwell: use "cutlass", which means the backend of '
            "the device"
        )
    return None if backend == "cutlass" else backend


def _bytes_of(scales: Any) -> Any:
    """E8M0 scales [E, N, K/128] int32 as the uint8 [E, N, K/32] that they are."""
    if isinstance(scales, torch.Tensor) and scales.dtype == torch.int32:
        return scales.view(torch.uint8)
    return scales


def __getattr__(name: str) -> Any:
    if name in REFUSED:
        # Kept, so that a class is the same object each time.
        value = globals()[name] = refused(name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *REFUSED})
