# SPDX-License-Identifier: Apache-2.0
"""What the interface can express but a backend does not do: NotImplementedError, in words.

Decided from the backend's name, dtypes and flags alone: no device is looked at.
"""

from __future__ import annotations

import torch

_FP8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
)
_FP4 = tuple(getattr(torch, name) for name in ("float4_e2m1fn_x2",) if hasattr(torch, name))
# FlashInfer's callers pass FP4 packed: activations two a byte, weights sixteen an int64.
_PACKED_FP4 = {
    "input": torch.uint8,
    "fc1_expert_weights": torch.int64,
    "fc2_expert_weights": torch.int64,
}

_USE = (
    "Use float16 or bfloat16 activations, with weights of the same dtype, or INT8, INT4 or MXFP4 "
    "weights (see fused_moe.quantize_int8, quantize_int4 and quantize_mxfp4)."
)


def check(
    backend: str,
    *,
    input_dtype: torch.dtype,
    fc1_dtype: torch.dtype,
    fc2_dtype: torch.dtype,
    output_dtype: torch.dtype,
    has_input_sf: bool = False,
    use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    use_packed_weights: bool = False,
    min_latency_mode: bool = False,
) -> None:
    """Raises NotImplementedError for a mode that `backend` does not have.

    The text says what is refused, why, and what to use instead. Dtypes that no mode has are
    not refused here; the argument checks reject them.
    """

    def refuse(what: str, why: str) -> None:
        raise NotImplementedError(f"{what} is not supported by backend '{backend}': {why} {_USE}")

    if min_latency_mode:
        raise NotImplementedError(
            f"Min latency mode is not supported by backend '{backend}': its results have another "
            "layout, and it needs Blackwell. Call without min_latency_mode: few tokens take a "
            "path of their own anyway."
        )
    if use_deepseek_fp8_block_scale:
        refuse(
            "FP8 block scaling (use_deepseek_fp8_block_scale)",
            "it needs FP8 matrix instructions, which begin with Hopper.",
        )
    if use_packed_weights and use_w4_group_scaling:
        refuse(
            "W4A8 group scaling (use_packed_weights with use_w4_group_scaling)",
            "it needs FP8 matrix instructions, which begin with Hopper.",
        )
    if use_mxfp8_act_scaling:
        refuse(
            "MXFP8 activations with FP4 weights (use_mxfp8_act_scaling)",
            "it needs block-scaled matrix instructions, which begin with Blackwell.",
        )
    for name, dtype in (
        ("input", input_dtype),
        ("fc1_expert_weights", fc1_dtype),
        ("fc2_expert_weights", fc2_dtype),
    ):
        if dtype in _FP8:
            refuse(
                f"FP8 ({name} is {dtype})",
                "it needs FP8 matrix instructions, which begin with Ada and Hopper.",
            )
        if dtype in _FP4 or dtype == _PACKED_FP4[name]:
            refuse(
                f"FP4 ({name} is {dtype}, which holds packed FP4 values)",
                "it needs FP4 matrix instructions, which begin with Blackwell.",
            )
    if has_input_sf:
        refuse(
            "FP4 or MXFP8 activations (input_sf, their block scales, is given)",
            "they need block-scaled matrix instructions, which begin with Blackwell.",
        )
    if backend != "cpu":
        for name, dtype in (
            ("input", input_dtype),
            ("fc1_expert_weights", fc1_dtype),
            ("fc2_expert_weights", fc2_dtype),
            ("output_dtype", output_dtype),
        ):
            if dtype == torch.float32:
                refuse(
                    f"FP32 ({name} is {dtype})",
                    "its tensor cores multiply 16-bit numbers; the cpu backend takes float32.",
                )
