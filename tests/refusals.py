# SPDX-License-Identifier: Apache-2.0
"""What a backend does not do is refused in words, before it looks at any device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cpu_layer import make_layer
from fused_moe import cutlass_fused_moe, cutlass_fused_moe_workspace_size, refusals

FP8 = torch.float8_e4m3fn


def layer(device: str, **changes: Any) -> dict[str, Any]:
    """A call on `device` with some tensors cast (a dtype) or arguments replaced."""
    arguments = make_layer(weights=changes.pop("weights", "same"))
    arguments["output"] = torch.full((13, 64), float("nan"), dtype=torch.bfloat16)
    for name, value in changes.items():
        cast = isinstance(value, torch.dtype) and name != "output_dtype"
        arguments[name] = arguments[name].to(value) if cast else value
    return {
        name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()
    }


BOTH_WEIGHTS = ("fc1_expert_weights", "fc2_expert_weights")
# The changes, the words, and whether the cpu backend refuses it too.
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...], bool]] = {
    "fp8-input": ({"input": FP8}, ("FP8", "input is torch.float8_e4m3fn"), True),
    "fp8-fc1": ({"fc1_expert_weights": FP8}, ("FP8", "fc1_expert_weights"), True),
    "fp8-fc2": ({"fc2_expert_weights": FP8}, ("FP8", "fc2_expert_weights"), True),
    "fp8-e5m2": ({"input": torch.float8_e5m2}, ("FP8", "input"), True),
    "fp8-block": (
        {"use_deepseek_fp8_block_scale": True, **dict.fromkeys(BOTH_WEIGHTS, FP8)},
        ("FP8 block scaling",),
        True,
    ),
    "w4a8": (
        {"weights": "uint8", "use_packed_weights": True, "use_w4_group_scaling": True},
        ("W4A8 group scaling",),
        True,
    ),
    "fp4-input": ({"input": torch.uint8}, ("FP4", "input is torch.uint8"), True),
    "mxfp8-mxfp4": (
        {"weights": "mxfp4", "use_mxfp8_act_scaling": True},
        ("FP4", "MXFP8", "use_mxfp8_act_scaling"),
        True,
    ),
    "fp4-weights": (dict.fromkeys(BOTH_WEIGHTS, torch.int64), ("FP4", "torch.int64"), True),
    "fp4-scales": ({"input_sf": torch.ones(13, 4)}, ("FP4", "input_sf"), True),
    "mxfp8": ({"use_mxfp8_act_scaling": True}, ("FP4", "MXFP8", "use_mxfp8_act_scaling"), True),
    "min-latency": ({"min_latency_mode": True}, ("Min latency mode",), True),
    "fp32": (
        {"input": torch.float32, **dict.fromkeys(BOTH_WEIGHTS, torch.float32)},
        ("FP32", "input is torch.float32", "cpu"),
        False,
    ),
    "fp32-output": ({"output_dtype": torch.float32}, ("FP32", "output_dtype"), False),
}

if hasattr(torch, "float4_e2m1fn_x2"):  # from PyTorch 2.8 on
    packed = torch.empty(13, 64, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    CASES["fp4-dtype"] = ({"input": packed}, ("FP4", "input is torch.float4_e2m1fn_x2"), True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        (n, b)
        for n, (_, _, by_cpu) in CASES.items()
        for b in ("sm80", "cpu")
        if by_cpu or b != "cpu"
    ],
)
def test_refused(name: str, backend: str, device: str) -> None:
    changes, words, _ = CASES[name]
    arguments = layer(device, **changes)
    with pytest.raises(NotImplementedError) as error:
        cutlass_fused_moe(**arguments, backend=backend)
    for word in (*words, f"backend '{backend}'", "Use" if name != "min-latency" else "Call"):
        assert word in str(error.value), f"{word!r} is not in: {error.value}"
    if device == "cpu":
        assert arguments["output"].isnan().all(), "the output was written"


def test_sm90_is_not_there_yet() -> None:
    with pytest.raises(NotImplementedError, match=r"'sm90' is not in this version.*sm80"):
        cutlass_fused_moe(**make_layer(), backend="sm90")


@pytest.mark.parametrize("backend", ["sm80", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("flag", [None, "use_packed_weights", "use_w4_group_scaling"])
@pytest.mark.parametrize("weights", [None, torch.int8, torch.uint8])
def test_what_is_supported_is_not_refused(
    backend: str, dtype: torch.dtype, weights: torch.dtype | None, flag: str | None
) -> None:
    refusals.check(
        backend,
        input_dtype=dtype,
        fc1_dtype=weights or dtype,
        fc2_dtype=weights or dtype,
        output_dtype=torch.float16,
        **({flag: True} if flag else {}),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x_dtype": FP8}, "FP8"),
        ({"weight_dtype": FP8}, "FP8"),
        ({"x_dtype": torch.float32}, "FP32"),
        ({"min_latency_mode": True}, "Min latency mode"),
        ({"use_deepseek_fp8_block_scale": True}, "FP8 block scaling"),
        (
            {
                "weight_dtype": torch.uint8,
                "use_packed_weights": True,
                "use_w4_group_scaling": True,
            },
            "W4A8 group scaling",
        ),
    ],
)
def test_the_workspace_query_refuses_the_same(changes: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"x_dtype": torch.bfloat16, "backend": "sm80", **changes}
    with pytest.raises(NotImplementedError, match=words):
        cutlass_fused_moe_workspace_size(8, 64, 64, 4, 2, **arguments)
