# SPDX-License-Identifier: Apache-2.0
"""gpt-oss's released checkpoints, against its own formulas on its own order of rows."""

from __future__ import annotations

import pytest
import torch

from cpu_layer import make_layer
from fused_moe import cutlass_fused_moe, dequantize_mxfp4, quantize_mxfp4
from fused_moe.checkpoints import (
    load_gpt_oss_experts,
    mxfp4_from_gpt_oss,
    up_gate_from_interleaved,
)
from tolerances import assert_close

Tensors = dict[str, torch.Tensor]


def gpt_oss(experts: int = 3, hidden: int = 64, inter: int = 96) -> tuple[Tensors, Tensors]:
    """A gpt-oss layer's tensors, and the plain weights and biases in its own order of rows."""
    draw = torch.Generator().manual_seed(5)
    plain = {
        "gate_up_proj": torch.randn(experts, 2 * inter, hidden, generator=draw) / 8,
        "down_proj": torch.randn(experts, hidden, inter, generator=draw) / 8,
    }
    tensors: Tensors = {}
    for name, weight in list(plain.items()):
        packed, scale = quantize_mxfp4(weight)
        plain[name] = dequantize_mxfp4(packed, scale)
        tensors[f"mlp.experts.{name}_blocks"] = packed.view(*scale.shape, 16)
        tensors[f"mlp.experts.{name}_scales"] = scale
        bias = torch.randn(weight.shape[:2], generator=draw).bfloat16()
        plain[f"{name}_bias"] = tensors[f"mlp.experts.{name}_bias"] = bias
    return tensors, plain


def test_gpt_oss_layer() -> None:
    """Against gpt-oss's own formulas on its own order of rows: gate, up, gate, up, ..."""
    tensors, plain = gpt_oss()
    experts = load_gpt_oss_experts(tensors, "mlp.experts")
    assert experts.format == "mxfp4" and experts.group_size == 32
    layer = make_layer(hidden=64, intermediate=96, experts=3, tokens=29)
    layer["input"] *= 4  # far enough for the limit of 7 to matter
    del layer["activation_type"]
    out = cutlass_fused_moe(**{**layer, **experts.arguments()})
    expected = torch.zeros(29, 64)
    clamped = 0
    for token in range(29):
        x = layer["input"][token].float()
        chosen = zip(
            layer["token_selected_experts"][token].tolist(),
            layer["token_final_scales"][token].tolist(),
            strict=True,
        )
        for expert, scale in chosen:
            h = plain["gate_up_proj"][expert] @ x + plain["gate_up_proj_bias"][expert].float()
            gate, up = h[::2], h[1::2]
            clamped += int((gate > 7).sum() + (up.abs() > 7).sum())
            gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
            a = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            y = plain["down_proj"][expert] @ a + plain["down_proj_bias"][expert].float()
            expected[token] += scale * y
    assert clamped > 20
    assert_close(out, expected, torch.bfloat16)


def test_gpt_oss_experts_of_a_rank() -> None:
    tensors, plain = gpt_oss()
    whole = load_gpt_oss_experts(tensors, "mlp.experts")
    part = load_gpt_oss_experts(
        tensors, "mlp.experts", experts=slice(1, 3), bias_dtype=torch.float16
    )
    assert torch.equal(part.fc1_weight, whole.fc1_weight[1:])
    assert torch.equal(part.fc2_scale, whole.fc2_scale[1:])
    assert part.further["fc1_expert_biases"].dtype == torch.float16
    assert part.further["swiglu_alpha"].tolist() == [torch.tensor(1.702).item()] * 2
    up = plain["gate_up_proj_bias"][1:, 1::2].half()
    assert torch.equal(part.further["fc1_expert_biases"][:, :96], up)


def test_gpt_oss_under_another_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        further = load_gpt_oss_experts(gpt_oss()[0], "mlp.experts").further
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(further["swiglu_alpha"], torch.full((3,), 1.702))


def test_interleaved_rows() -> None:
    rows = torch.arange(12).view(1, 6, 2)
    assert up_gate_from_interleaved(rows)[0, :, 0].tolist() == [2, 6, 10, 0, 4, 8]
    for bad in (torch.zeros(6), torch.zeros(2, 5)):
        with pytest.raises(ValueError, match="even second dimension"):
            up_gate_from_interleaved(bad)


@pytest.mark.parametrize(
    ("blocks", "scales", "words"),
    [
        ((2, 4, 3, 8), (2, 4, 3), r"blocks is .* must be torch\.uint8 \[experts, rows, K / 32, 16"),
        ((2, 4, 48), (2, 4, 3), "blocks is a torch.uint8 tensor of shape"),
        ((2, 4, 3, 16), (2, 4, 2), r"scales is .* must be torch\.uint8 \[2, 4, 3\]"),
    ],
)
def test_gpt_oss_shapes(blocks: tuple[int, ...], scales: tuple[int, ...], words: str) -> None:
    kind = torch.uint8
    with pytest.raises(ValueError, match=words):
        mxfp4_from_gpt_oss(
            torch.zeros(blocks, dtype=kind), torch.zeros(scales, dtype=kind), gated=True
        )


def test_gpt_oss_dtypes() -> None:
    blocks = torch.zeros(2, 4, 3, 16, dtype=torch.uint8)
    for bad in ((blocks.float(), blocks[..., 0]), (blocks, blocks[..., 0].float())):
        with pytest.raises(ValueError, match=r"is a torch\.float32 tensor .* must be torch\.uint8"):
            mxfp4_from_gpt_oss(*bad, gated=True)
