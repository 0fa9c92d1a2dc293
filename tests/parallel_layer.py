# SPDX-License-Identifier: Apache-2.0
"""The layers that tests of several ranks run on: every rank makes the same whole one.

Two kinds:

- exact: small whole numbers, so that no product and no sum is ever rounded. Results must then be
  equal to the last bit in every form and order of sums: nothing is lost, doubled or misplaced.
- real: normal random numbers, compared with the float32 reference within the tolerances.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from cpu_layer import make_layer, reference
from fused_moe import ActivationType, cutlass_fused_moe, topk_softmax
from fused_moe.parallel import ExpertWeights, ParallelGroups, dispatched_moe, replicated_moe
from parallel_world import Rank
from tolerances import assert_close

EXPERTS, HIDDEN, INTER = 12, 64, 64

Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def both_kinds(me: Rank) -> list[tuple[ParallelGroups, str]]:
    """All ranks as tensor-parallel ones, and all as expert-parallel ones."""
    world = dist.group.WORLD
    return [(ParallelGroups(tp=world), "tp"), (ParallelGroups(ep=world), "ep")]


def replicated(
    drawn: Tokens, mine: ExpertWeights, groups: ParallelGroups, **options: Any
) -> torch.Tensor:
    """replicated_moe on what Layer.tokens gives."""
    return replicated_moe(*drawn, mine, groups, **options)


def dispatched(
    drawn: Tokens, mine: ExpertWeights, groups: ParallelGroups, **options: Any
) -> torch.Tensor:
    """dispatched_moe on what Layer.tokens gives."""
    return dispatched_moe(*drawn, mine, groups, **options)


@dataclasses.dataclass
class Layer:
    """All experts on the rank's device, and how to draw tokens for them."""

    experts: ExpertWeights
    dtype: torch.dtype
    exact: bool
    device: torch.device

    def tokens(
        self, count: int, *, top_k: int = 3, routing: str = "uniform", seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """input, ids and scales. routing: uniform; duplicates; nowhere; first: one expert only."""
        draw = torch.Generator().manual_seed(1000 + seed)
        hidden, total = self.experts.hidden_size, self.experts.num_experts
        scales, ids = topk_softmax(torch.randn(count, total, generator=draw), top_k)
        if routing == "duplicates":
            ids = torch.randint(0, total, ids.shape, generator=draw, dtype=torch.int32)
            ids[:, -1] = ids[:, 0]
        elif routing == "nowhere":
            bad = torch.tensor([-1, total, 2**31 - 1, -(2**31)], dtype=torch.int32)
            ids = bad[torch.randint(0, 4, ids.shape, generator=draw)]
        elif routing == "first":
            ids.zero_()
        if self.exact:
            x = ternary(draw, count, hidden)
            scales = 2.0 ** torch.randint(-1, 2, scales.shape, generator=draw)
        else:
            x = torch.randn(count, hidden, generator=draw)
        return x.to(self.device, self.dtype), ids.to(self.device), scales.to(self.device)

    def alone(
        self, x: torch.Tensor, ids: torch.Tensor, scales: torch.Tensor | None
    ) -> torch.Tensor:
        """What one process computes."""
        return cutlass_fused_moe(x, ids, scales, output_dtype=x.dtype, **self.experts.arguments())

    def check(
        self, out: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, scales: torch.Tensor
    ) -> None:
        """Compares with one process: to the last bit if exact, else with the reference."""
        assert out.shape == x.shape and out.dtype == x.dtype, (out.shape, out.dtype)
        if self.exact:
            ours, theirs = out.float(), self.alone(x, ids, scales).float()
            assert torch.equal(ours, theirs), f"differs by {float((ours - theirs).abs().max())}"
            return
        arguments = dict(self.experts.arguments())
        arguments.update(input=x, token_selected_experts=ids, token_final_scales=scales)
        assert_close(out.float(), reference(arguments), out.dtype)

    def check_bits(
        self, out: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, scales: torch.Tensor
    ) -> None:
        """Compares with one process where the same products are summed in the same order.

        To the last bit on the CPU. A GPU's tactics depend on the number of tokens and of experts,
        and need not round alike.
        """
        if self.device.type == "cpu":
            assert torch.equal(out, self.alone(x, ids, scales))
        self.check(out, x, ids, scales)


def ternary(draw: torch.Generator, *shape: int) -> torch.Tensor:
    """-1, 0 and 1; three of four are 0."""
    return torch.randint(-1, 2, shape, generator=draw) * (torch.rand(shape, generator=draw) < 0.37)


def exact_layer(me: Rank) -> Layer:
    """Relu, both biases. Sums stay below 2048, up to where float16 has every whole number."""
    draw = torch.Generator().manual_seed(7)
    experts = ExpertWeights(
        fc1=ternary(draw, EXPERTS, INTER, HIDDEN).to(me.device, torch.float16),
        fc2=ternary(draw, EXPERTS, HIDDEN, INTER).to(me.device, torch.float16),
        fc1_biases=ternary(draw, EXPERTS, INTER).to(me.device, torch.float16),
        fc2_biases=ternary(draw, EXPERTS, HIDDEN).to(me.device, torch.float16),
        activation_type=ActivationType.Relu,
    )
    return Layer(experts, torch.float16, True, me.device)


def real_layer(
    me: Rank,
    weights: str = "same",
    activation: ActivationType = ActivationType.SwigluBias,
    dtype: torch.dtype = torch.bfloat16,
    biases: tuple[str, ...] = ("fc1", "fc2"),
) -> Layer:
    """Random numbers, every optional tensor given; I divides into four shares of whole groups."""
    group = int(weights.split("_")[1]) if weights.startswith("int4") else 32
    swiglu = ("alpha", "beta", "limit") if activation == ActivationType.SwigluBias else ()
    made = make_layer(
        tokens=1,
        hidden=max(HIDDEN, group),
        intermediate=4 * group,
        experts=EXPERTS,
        weights=weights,
        activation=activation,
        biases=biases,
        swiglu=swiglu,
        dtype=dtype,
        seed=3,
    )
    experts = experts_of(made, me.device)
    return Layer(experts, dtype, False, me.device)


def experts_of(made: dict[str, Any], device: torch.device | str = "cpu") -> ExpertWeights:
    """The weights among the arguments of a call."""
    taken = {
        "fc1": made["fc1_expert_weights"],
        "fc2": made["fc2_expert_weights"],
        "fc1_biases": made.get("fc1_expert_biases"),
        "fc2_biases": made.get("fc2_expert_biases"),
    }
    taken.update({name: made.get(name) for name in ("swiglu_alpha", "swiglu_beta", "swiglu_limit")})
    on_device = {name: None if t is None else t.to(device) for name, t in taken.items()}
    return ExpertWeights(
        **on_device,
        quant_scales=[scale.to(device) for scale in made["quant_scales"] or []],
        activation_type=made["activation_type"],
        use_packed_weights=made.get("use_packed_weights", False),
        use_w4_group_scaling=made.get("use_w4_group_scaling", False),
    )
