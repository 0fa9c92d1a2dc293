# SPDX-License-Identifier: Apache-2.0
"""`FusedMoE` against the MoE blocks of transformers' models: router, experts, shared experts.

Each block's own tensors make a layer by the constructor that docs/module.md names for the model,
and both run on the same tokens in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip(
    "transformers", minversion="5.17", reason="this Python has no transformers 5.17 or newer"
)
import transformers

from fused_moe import ActivationType, FusedMoE, Routing
from tolerances import assert_close
from transformers_tiny import HIDDEN, configuration

TOKENS = 200


def gated(block: Any, routing: Routing, **options: Any) -> FusedMoE:
    """A layer of a block whose router is `gate` and whose experts are in the usual layout."""
    experts = block.experts
    return FusedMoE.from_gate_up(
        block.gate.weight, experts.gate_up_proj, experts.down_proj, routing, **options
    )


def shared(mlp: Any) -> dict[str, torch.Tensor]:
    """The options that take over shared experts."""
    both = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    return {"shared_gate_up": both, "shared_down": mlp.down_proj.weight}


def deepseek_v2(block: Any, config: Any) -> FusedMoE:
    routing = Routing.deepseek_v2(
        config.num_experts_per_tok,
        config.n_group,
        config.topk_group,
        config.routed_scaling_factor,
    )
    return gated(block, routing, **shared(block.shared_experts))


def sigmoid_routing(config: Any) -> Routing:
    return Routing.deepseek_v3(
        config.num_experts_per_tok,
        config.n_group,
        config.topk_group,
        config.routed_scaling_factor,
        config.norm_topk_prob,
    )


def deepseek_v3(block: Any, config: Any) -> FusedMoE:
    bias = block.gate.e_score_correction_bias
    options = shared(block.shared_experts)
    return gated(block, sigmoid_routing(config), correction_bias=bias, **options)


def qwen3_next(block: Any, config: Any) -> FusedMoE:
    return gated(
        block,
        Routing(config.num_experts_per_tok),
        shared_scale_gate=block.shared_expert_gate.weight,
        **shared(block.shared_expert),
    )


def gpt_oss(block: Any, config: Any) -> FusedMoE:
    experts = block.experts
    return FusedMoE.from_gate_up(
        block.router.weight,
        experts.gate_up_proj,
        experts.down_proj,
        Routing(config.num_experts_per_tok),
        transposed=True,
        interleaved=True,
        gate_up_bias=experts.gate_up_proj_bias,
        down_bias=experts.down_proj_bias,
        router_bias=block.router.bias,
        activation=ActivationType.SwigluBias,
        swiglu_alpha=1.702,
        swiglu_beta=1.0,
        swiglu_limit=7.0,
    )


def phimoe(block: Any, config: Any) -> FusedMoE:
    experts, routing = block.experts, Routing.sparsemixer(config.router_jitter_noise)
    return FusedMoE.from_gate_up(
        block.router.weight, experts.gate_up_proj, experts.down_proj, routing
    )


def nemotron_h(block: Any, config: Any) -> FusedMoE:
    return FusedMoE.from_experts(
        block.gate.weight,
        list(block.experts.up_proj),
        list(block.experts.down_proj),
        None,
        sigmoid_routing(config),
        correction_bias=block.gate.e_score_correction_bias,
        activation=ActivationType.Relu2,
        shared_gate_up=block.shared_experts.up_proj.weight,
        shared_down=block.shared_experts.down_proj.weight,
    )


LAYERS: dict[str, Callable[[Any, Any], FusedMoE]] = {
    "mixtral": lambda block, config: gated(block, Routing(config.num_experts_per_tok)),
    "qwen3_moe": lambda block, config: gated(block, Routing(config.num_experts_per_tok)),
    "qwen3_next": qwen3_next,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "olmoe": lambda block, config: gated(
        block, Routing(config.num_experts_per_tok, renormalize=False)
    ),
    "phimoe": phimoe,
    "gpt_oss": gpt_oss,
    "nemotron_h": nemotron_h,
}


@torch.no_grad()
def block_of(config: Any) -> Any:
    """A model's first MoE block, with weights of an order that makes its logits of order 1."""
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    draw = torch.Generator().manual_seed(3)
    block = next(
        m for m in model.modules() if hasattr(type(getattr(m, "experts", 0)), "_apply_gate")
    )
    for tensor in block.parameters():
        tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.2)
    for name, tensor in block.named_buffers():
        if name.endswith("correction_bias"):
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.3)
    return block


@torch.no_grad()
def compare(family: str, config: Any) -> None:
    block = block_of(config)
    layer = LAYERS[family](block, config)
    x = torch.randn(2, TOKENS // 2, HIDDEN, generator=torch.Generator().manual_seed(1))
    expected = block(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    expected = expected.view(TOKENS, HIDDEN)
    out = layer(x).view(TOKENS, HIDDEN)
    # Row by row: one token that went to other experts must not hide among the rest.
    for row in range(TOKENS):
        assert_close(out[row : row + 1], expected[row : row + 1], torch.float32)


@pytest.mark.parametrize("family", LAYERS)
def test_blocks(family: str) -> None:
    compare(family, configuration(family))


@pytest.mark.parametrize(
    ("groups", "chosen", "renormalize", "factor"),
    [(1, 1, True, 1.0), (4, 2, True, 2.5), (4, 3, False, 2.5), (2, 2, False, 1.0)],
)
def test_deepseek_v3_routers(groups: int, chosen: int, renormalize: bool, factor: float) -> None:
    config = configuration("deepseek_v3")
    config.n_routed_experts, config.n_group, config.topk_group = 16, groups, chosen
    config.norm_topk_prob, config.routed_scaling_factor = renormalize, factor
    compare("deepseek_v3", config)
