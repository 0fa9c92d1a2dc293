# SPDX-License-Identifier: Apache-2.0
"""Tiny randomly initialized MoE language models of transformers, one a family, as checkpoints.

Weights are rounded to bfloat16, so that every dtype loads the same numbers. Which experts a token
goes to depends on the token alone and by a wide margin: the first E numbers of the hidden state
hold one level for each expert, nothing but the embedding writes them, and routers read little
else. Otherwise two runs that differ by a rounding would now and then choose other experts, and
logits could only be compared loosely.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers

# The products are too small to share among threads.
torch.set_num_threads(1)

VOCABULARY = 128
HIDDEN = 64
IDS = torch.arange(2, 22).view(2, 10)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LATENT_ATTENTION: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "topk_group": 1,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
}

# Family: the name of its configuration class, and what differs from _COMMON.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "MixtralConfig",
        {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 16,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
    # Three layers of linear attention, then one of the usual kind.
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "intermediate_size": 96,
            "linear_key_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_value_head_dim": 16,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            **_LATENT_ATTENTION,
            "q_lora_rank": None,
            "num_experts_per_tok": 2,
            "routed_scaling_factor": 1.5,
            "topk_method": "group_limited_greedy",
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**_LATENT_ATTENTION, "q_lora_rank": 32, "num_experts_per_tok": 3},
    ),
    "olmoe": (
        "OlmoeConfig",
        {"intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3},
    ),
    "phimoe": (
        "PhimoeConfig",
        {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "head_dim": 16,
            "intermediate_size": 96,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
        },
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        {"intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 3},
    ),
}
# One that is not gated: relu(x) squared. Beyond the families that the integration names.
UNGATED: tuple[str, dict[str, Any]] = (
    "NemotronHConfig",
    {
        "num_hidden_layers": 2,
        "layers_block_type": ["attention", "moe"],
        "head_dim": 16,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "n_group": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "topk_group": 1,
    },
)


def experts_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that hold the stacked experts, one a layer."""
    return [module for module in model.modules() if hasattr(type(module), "_apply_gate")]


def configuration(family: str) -> Any:
    """The configuration of a tiny model of `family`."""
    name, settings = UNGATED if family == "nemotron_h" else FAMILIES[family]
    return getattr(transformers, name)(**{**_COMMON, **settings})


@torch.no_grad()
def write_checkpoint(family: str, folder: Path) -> None:
    """Saves a tiny model of `family`, float32 tensors of bfloat16 values, as transformers does."""
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what is not drawn below, transformers draws
        model = transformers.AutoModelForCausalLM.from_config(
            configuration(family), dtype=torch.float32, experts_implementation="eager"
        )
    experts = experts_modules(model)
    number = experts[0].num_experts
    inside = {id(p) for module in experts for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in inside:
            scale = 0.5 if name.endswith("_bias") else 0.15
            # Wide enough that gpt-oss's clamp at 7 matters, and no louder afterwards than others:
            # the levels that the router reads have to stay above the rounding of the rest.
            if family == "gpt_oss":
                scale *= 4 if "gate_up_proj" in name else 1 / 8
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * scale)
        elif parameter.ndim == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * HIDDEN**-0.5)
        if re.search(r"embed(_tokens|dings)\.weight$", name):
            parameter.mul_(HIDDEN**0.5)
            levels = torch.linspace(-2, 2, number)
            order = torch.rand(VOCABULARY, number, generator=draw).argsort(dim=1)
            parameter[:, :number] = levels[order]
        elif re.search(r"(gate|router)\.weight$", name) and parameter.shape[0] == number:
            parameter.mul_(0.02)
            parameter[:, :number] += 2 * torch.eye(number)
        elif re.search(r"\.(o_proj|out_proj|down_proj)(\.weight)?$", name):
            # What a layer adds leaves the levels alone.
            out = parameter.transpose(-1, -2) if _is_transposed(model, name) else parameter
            out[..., :number, :] = 0
        elif name.endswith("down_proj_bias"):
            parameter[:, :number] = 0
        parameter.copy_(parameter.bfloat16().float())
    model.save_pretrained(folder)


def _is_transposed(model: torch.nn.Module, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return bool(getattr(owner, "is_transposed", False))


def load(
    folder: Path,
    implementation: str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Any:
    """The checkpoint as a model in evaluation mode."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        experts_implementation=implementation,
        attn_implementation="eager",
        local_files_only=True,
    ).to(device)


@torch.no_grad()
def run(model: Any) -> torch.Tensor:
    """The logits of IDS, [2, 10, VOCABULARY]."""
    return model(IDS.to(model.device), use_cache=False).logits
