# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and random layers of `FusedMoE`, small enough for the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_moe import ActivationType, FusedMoE, Routing

HIDDEN, INTERMEDIATE, EXPERTS = 64, 96, 8
FORMATS = ("same", "int8", "uint8", "int4", "mxfp4")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def normal(*shape: int, seed: int, size: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


class Checkpoint:
    """Mixtral-like weights, a tensor for each expert, and what the models compute with them."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, biases: bool = False) -> None:
        def weights(rows: int, columns: int, seed: int) -> list[torch.Tensor]:
            draw = range(seed, seed + EXPERTS)
            return [normal(rows, columns, seed=s, size=columns**-0.5).to(dtype) for s in draw]

        self.router = normal(EXPERTS, HIDDEN, seed=0, size=HIDDEN**-0.5).to(dtype)
        self.w1 = weights(INTERMEDIATE, HIDDEN, seed=100)  # gate
        self.w2 = weights(HIDDEN, INTERMEDIATE, seed=200)  # down
        self.w3 = weights(INTERMEDIATE, HIDDEN, seed=300)  # up
        zero = 0 if biases else None
        self.b1, self.b3 = (
            None if zero is None else normal(EXPERTS, INTERMEDIATE, seed=s, size=0.3).to(dtype)
            for s in (1, 2)
        )
        self.b2 = None if zero is None else normal(EXPERTS, HIDDEN, seed=3, size=0.3).to(dtype)

    def fused(self) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers 5: gate_up_proj [E, 2I, H] with the gate first, down_proj [E, H, I]."""
        rows = [torch.cat(pair) for pair in zip(self.w1, self.w3, strict=True)]
        return torch.stack(rows), torch.stack(self.w2)

    def interleaved(self) -> tuple[torch.Tensor, torch.Tensor]:
        """gpt-oss: [E, H, 2I] with columns gate, up, gate, up; down [E, I, H]."""
        pairs = [torch.stack(pair, dim=1) for pair in zip(self.w1, self.w3, strict=True)]
        columns = torch.stack([pair.reshape(-1, HIDDEN).T for pair in pairs])
        return columns.contiguous(), torch.stack(self.w2).transpose(1, 2).contiguous()

    def expert(self, expert: int, x: torch.Tensor, glu: Any) -> torch.Tensor:
        """down @ glu(gate @ x, up @ x), with biases, in float32."""
        x = x.float()
        gate, up = x @ self.w1[expert].float().T, x @ self.w3[expert].float().T
        if self.b1 is not None and self.b3 is not None:
            gate, up = gate + self.b1[expert].float(), up + self.b3[expert].float()
        y = glu(gate, up) @ self.w2[expert].float().T
        return y if self.b2 is None else y + self.b2[expert].float()

    def run(
        self, x: torch.Tensor, ids: torch.Tensor, scales: torch.Tensor, glu: Any
    ) -> torch.Tensor:
        """Token by token, choice by choice."""
        out = torch.zeros(x.shape[0], HIDDEN)
        for token in range(x.shape[0]):
            for expert, scale in zip(ids[token].tolist(), scales[token].tolist(), strict=True):
                out[token] += scale * self.expert(expert, x[token], glu)
        return out


def fused(**options: Any) -> FusedMoE:
    checkpoint = Checkpoint()
    arguments = {"gate_up": checkpoint.fused()[0], "down": checkpoint.fused()[1], **options}
    return FusedMoE.from_gate_up(checkpoint.router, routing=Routing(2), **arguments)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


def mixtral_routing(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """modeling_mixtral.py, MixtralTopKRouter, for logits without ties."""
    values, ids = torch.topk(torch.softmax(logits.float(), dim=1), 2)
    return values / values.sum(dim=1, keepdim=True), ids


def tokens(count: int = 21, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return normal(count, HIDDEN, seed=9).to(dtype)


# What a layer can have, for the tests that go over all of it.
EVERYTHING: dict[str, dict[str, Any]] = {
    "mixtral": {"routing": Routing(2)},
    "deepseek_v3": {
        "routing": Routing.deepseek_v3(3, 4, 2, 2.5),
        "correction_bias": True,
        "router_dtype": torch.float32,
        "shared_intermediate_size": 40,
    },
    "qwen3_next": {
        "routing": Routing(4),
        "shared_intermediate_size": 24,
        "shared_scale_gate": True,
    },
    "gpt_oss": {
        "routing": Routing(4),
        "router_bias": True,
        "activation": ActivationType.SwigluBias,
        "swiglu_alpha": 1.702,
        "swiglu_beta": 1.0,
        "swiglu_limit": 0.5,
        "fc1_bias": True,
        "fc2_bias": True,
    },
    "nemotron": {"routing": Routing.deepseek_v3(3), "activation": ActivationType.Relu2},
}


def random_layer(model: str = "mixtral", **options: Any) -> FusedMoE:
    """A layer of EVERYTHING in bfloat16, biases and all filled with random numbers."""
    torch.manual_seed(5)
    arguments = {"dtype": torch.bfloat16, **EVERYTHING[model], **options}
    layer = FusedMoE(HIDDEN, INTERMEDIATE, EXPERTS, **arguments)
    for name, tensor in layer.state_dict().items():
        if name.endswith("bias"):
            tensor.normal_(std=0.3)
    return layer
