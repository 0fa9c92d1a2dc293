# SPDX-License-Identifier: Apache-2.0
"""What every rank of tests/parallel.py does: functions of a Rank that raise where they fail.

Every rank makes the same whole layer from a seed, takes its share of it, and knows what one
process would compute. Two kinds of layers:

- exact: small whole numbers, so that no product and no sum is ever rounded. Results must then be
  equal to the last bit in every form and order of sums: nothing is lost, doubled or misplaced.
- real: normal random numbers, compared with the float32 reference within the tolerances.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from cpu_layer import WEIGHTS, make_layer, reference
from fused_moe import ActivationType, cutlass_fused_moe, topk_softmax
from fused_moe.parallel import (
    ExpertWeights,
    ParallelError,
    ParallelGroups,
    dispatched_moe,
    replicated_moe,
)
from parallel_world import Rank
from tolerances import assert_close

EXPERTS, HIDDEN, INTER = 12, 64, 64


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
            x = _ternary(draw, count, hidden)
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


def _ternary(draw: torch.Generator, *shape: int) -> torch.Tensor:
    """-1, 0 and 1; three of four are 0."""
    return torch.randint(-1, 2, shape, generator=draw) * (torch.rand(shape, generator=draw) < 0.37)


def exact_layer(me: Rank) -> Layer:
    """Relu, both biases. Sums stay below 2048, up to where float16 has every whole number."""
    draw = torch.Generator().manual_seed(7)
    experts = ExpertWeights(
        fc1=_ternary(draw, EXPERTS, INTER, HIDDEN).to(me.device, torch.float16),
        fc2=_ternary(draw, EXPERTS, HIDDEN, INTER).to(me.device, torch.float16),
        fc1_biases=_ternary(draw, EXPERTS, INTER).to(me.device, torch.float16),
        fc2_biases=_ternary(draw, EXPERTS, HIDDEN).to(me.device, torch.float16),
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


def both_kinds(me: Rank) -> list[tuple[ParallelGroups, str]]:
    """All ranks as tensor-parallel ones, and all as expert-parallel ones."""
    world = dist.group.WORLD
    return [(ParallelGroups(tp=world), "tp"), (ParallelGroups(ep=world), "ep")]


def check_reductions(layer: Layer, groups: ParallelGroups, count: int) -> None:
    """All three reductions of the replicated form."""
    mine = layer.experts.shard(groups)
    x, ids, scales = layer.tokens(count)
    layer.check(replicated_moe(x, ids, scales, mine, groups), x, ids, scales)
    ranks = groups.tp_size * groups.ep_size
    each = -(-count // ranks)
    begin = (groups.ep_rank * groups.tp_size + groups.tp_rank) * each
    out = replicated_moe(x, ids, scales, mine, groups, reduction="reduce_scatter")
    rows = slice(min(begin, count), min(begin + each, count))
    layer.check(out, x[rows], ids[rows], scales[rows])
    part = replicated_moe(x, ids, scales, mine, groups, reduction="none")
    dist.all_reduce(part, group=groups.layer or groups.tp or groups.ep)
    layer.check(part, x, ids, scales)


def replicated_exact(me: Rank) -> None:
    layer = exact_layer(me)
    for groups, _ in both_kinds(me):
        for count in (0, 1, 3, 13, 64):
            check_reductions(layer, groups, count)


def replicated_formats(me: Rank) -> None:
    for weights in WEIGHTS:
        layer = real_layer(me, weights)
        for groups, _ in both_kinds(me):
            x, ids, scales = layer.tokens(29)
            mine = layer.experts.shard(groups)
            layer.check(replicated_moe(x, ids, scales, mine, groups), x, ids, scales)


def replicated_same_bits(me: Rank) -> None:
    """Where all of a token's experts are on one rank, one process computes nothing else."""
    layer = real_layer(me)
    groups = ParallelGroups(ep=dist.group.WORLD)
    mine = layer.experts.shard(groups)
    x, ids, scales = layer.tokens(50, top_k=1)
    out = replicated_moe(x, ids, scales, mine, groups)
    assert torch.equal(out, layer.alone(x, ids, scales))
    x, ids, scales = layer.tokens(50, top_k=2)
    local = EXPERTS // me.size
    ids[:, 1] = ids[:, 0] // local * local + (ids[:, 0] + 1) % local
    out = replicated_moe(x, ids, scales, mine, groups)
    assert torch.equal(out, layer.alone(x, ids, scales))
    assert torch.equal(out, replicated_moe(x, ids, scales, mine, groups)), "not the same twice"


FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"chunks": 3},
    {"row_per_expert": True},
    {"row_per_expert": True, "chunks": 2},
    {"max_tokens": 40},
    {"max_tokens": 40, "chunks": 3},
)


def token_counts(me: Rank) -> list[int]:
    """How many tokens this rank has, in several calls: uneven ones, none on some, none at all."""
    return [(5 + 7 * me.rank) % 40, 0 if me.rank == 0 else 11, 9 if me.rank == 1 else 0, 0]


def dispatched_exact(me: Rank) -> None:
    layer = exact_layer(me)
    groups = ParallelGroups(ep=dist.group.WORLD)
    mine = layer.experts.shard(groups)
    for form in FORMS:
        for number, count in enumerate(token_counts(me)):
            for routing in ("uniform", "duplicates", "nowhere", "first"):
                drawn = layer.tokens(count, routing=routing, seed=10 * me.rank + number)
                layer.check(dispatched_moe(*drawn, mine, groups, **form), *drawn)


def dispatched_without_scales(me: Rank) -> None:
    layer = exact_layer(me)
    groups = ParallelGroups(ep=dist.group.WORLD)
    mine = layer.experts.shard(groups)
    x, ids, _ = layer.tokens(7 + me.rank, seed=me.rank)
    for form in FORMS:
        out = dispatched_moe(x, ids, None, mine, groups, **form)
        assert torch.equal(out, layer.alone(x, ids, None)), form


def dispatched_formats(me: Rank) -> None:
    groups = ParallelGroups(ep=dist.group.WORLD)
    for weights in WEIGHTS:
        layer = real_layer(me, weights)
        mine = layer.experts.shard(groups)
        drawn = layer.tokens(17 + 3 * me.rank, seed=me.rank)
        for form in FORMS:
            layer.check(dispatched_moe(*drawn, mine, groups, **form), *drawn)


def dispatched_same_bits(me: Rank) -> None:
    layer = real_layer(me)
    groups = ParallelGroups(ep=dist.group.WORLD)
    mine = layer.experts.shard(groups)
    drawn = layer.tokens(23, seed=me.rank)
    for form in FORMS:
        first = dispatched_moe(*drawn, mine, groups, **form)
        for _ in range(2):
            assert torch.equal(first, dispatched_moe(*drawn, mine, groups, **form)), form
    # With the tokens of one rank alone, and one expert a token, the products are the same ones.
    drawn = layer.tokens(23 if me.rank == 0 else 0, top_k=1)
    for form in FORMS[:1] + FORMS[4:5]:
        out = dispatched_moe(*drawn, mine, groups, **form)
        assert torch.equal(out, layer.alone(*drawn)), form


def ranks_that_disagree(me: Rank) -> None:
    """Every rank raises, and says what differs; the group works on."""
    layer = exact_layer(me)
    groups = ParallelGroups(ep=dist.group.WORLD)
    mine = layer.experts.shard(groups)
    odd = me.rank == 1
    x, ids, scales = layer.tokens(6)
    few = layer.tokens(6, top_k=2)
    cases: list[tuple[str, tuple[Any, Any, Any], dict[str, Any]]] = [
        ("chunks differs", (x, ids, scales), {"chunks": 2 if odd else 3}),
        ("k, the experts a token", few if odd else (x, ids, scales), {}),
        ("token_final_scales", (x, ids, None if odd else scales), {}),
        ("output_dtype differs", (x, ids, scales), {"output_dtype": torch.bfloat16} if odd else {}),
        ("row_per_expert", (x, ids, scales), {"row_per_expert": odd}),
    ]
    for text, drawn, form in cases:
        try:
            dispatched_moe(*drawn, mine, groups, **form)
        except ValueError as error:
            assert text in str(error), error
        else:
            raise AssertionError(f"no error: {text}")
    layer.check(dispatched_moe(x, ids, scales, mine, groups), x, ids, scales)


def meshes(me: Rank) -> None:
    """TP x EP in either order of dimensions, and beside data parallelism. Of four ranks."""
    kind = me.device.type
    for layer in (exact_layer(me), real_layer(me), real_layer(me, "int8", ActivationType.Swiglu)):
        for names in (("ep", "tp"), ("tp", "ep"), ("dp", "ep"), ("tp", "dp"), ("e", "t")):
            mesh = init_device_mesh(kind, (2, 2), mesh_dim_names=names)
            other = names == ("e", "t")
            groups = ParallelGroups.from_mesh(mesh, **({"tp": "t", "ep": "e"} if other else {}))
            assert (groups.layer is not None) == ("dp" not in names)
            sizes = {"tp": groups.tp_size, "ep": groups.ep_size}
            assert sizes == {n: 2 if n in names or other else 1 for n in ("tp", "ep")}
            check_reductions(layer, groups, 13)
            two_sums = ParallelGroups(groups.tp, groups.ep)  # without the group of all
            mine = layer.experts.shard(groups)
            drawn = layer.tokens(13)
            layer.check(replicated_moe(*drawn, mine, two_sums), *drawn)
            for form in FORMS:
                # The tensor-parallel ranks of one expert rank have the same tokens.
                drawn = layer.tokens(4 + 9 * groups.ep_rank, seed=groups.ep_rank)
                layer.check(dispatched_moe(*drawn, mine, groups, **form), *drawn)


def groups_of_some_ranks(me: Rank) -> None:
    """A layer on the last two of four ranks; the others cannot use its group."""
    members = [me.size - 2, me.size - 1]
    group = dist.new_group(members)
    if me.rank in members:
        layer = exact_layer(me)
        groups = ParallelGroups(ep=group)
        assert groups.ep_rank == me.rank - members[0]
        drawn = layer.tokens(5 * groups.ep_rank)
        mine = layer.experts.shard(groups)
        layer.check(dispatched_moe(*drawn, mine, groups), *drawn)
        check_reductions(layer, groups, 7)
        return
    try:
        ParallelGroups(ep=group)
    except ValueError as error:
        assert "is not in the ep group" in str(error), error
    else:
        raise AssertionError("a group of others was accepted")


def captured(me: Rank) -> None:
    """What does not wait for the device, replayed from a CUDA graph with other routings."""
    layer = exact_layer(me)
    for groups, kind in both_kinds(me):
        mine = layer.experts.shard(groups)
        forms: list[dict[str, Any]] = [{"reduction": "all_reduce"}]
        if kind == "ep":
            forms += [{"max_tokens": 20}, {"max_tokens": 20, "chunks": 3}]
        for form in forms:
            run = replicated_moe if "reduction" in form else dispatched_moe
            own = 0 if run is replicated_moe else me.rank
            drawn = layer.tokens(13, seed=own)
            run(*drawn, mine, groups, **form)  # NCCL connects outside of the capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = run(*drawn, mine, groups, **form)
            for seed in (50, 60):
                for held, new in zip(drawn, layer.tokens(13, seed=seed + own), strict=True):
                    held.copy_(new)
                graph.replay()
                torch.cuda.synchronize()
                layer.check(out, *drawn)


def same_as_one_gpu(me: Rank) -> None:
    """A row for each expert is summed as the sm80 backend sums: the bits of one GPU."""
    for weights in ("same", "int8"):
        layer = real_layer(me, weights, ActivationType.Swiglu)
        groups = ParallelGroups(ep=dist.group.WORLD)
        mine = layer.experts.shard(groups)
        drawn = layer.tokens(64, seed=me.rank)
        out = dispatched_moe(*drawn, mine, groups, row_per_expert=True)
        assert torch.equal(out, layer.alone(*drawn)), weights


def _expect_error(me: Rank, form: str) -> None:
    """One call of a form, which must fail within the timeout and say what it was doing."""
    layer = exact_layer(me)
    groups = ParallelGroups(ep=dist.group.WORLD)
    mine = layer.experts.shard(groups)
    drawn = layer.tokens(9)
    try:
        if form == "replicated":
            replicated_moe(*drawn, mine, groups)
        else:
            dispatched_moe(*drawn, mine, groups, max_tokens=9 if form == "padded" else None)
        if me.backend == "nccl":
            torch.cuda.synchronize()
    except ParallelError as error:
        text = str(error)
        assert f"failed on rank {me.rank} of the {me.size} expert-parallel ranks" in text, text
        assert "another rank ended" in text and error.__cause__ is not None, text
        what = {"replicated": "all-reduce", "padded": "all-gather", "dispatched": "all-to-all"}
        assert what[form] in text, text
    else:
        raise AssertionError("no error although a rank is missing")


def one_rank_dies_replicated(me: Rank) -> None:
    _warm_up(me)
    if me.rank == 1:
        raise SystemExit("this rank dies")
    _expect_error(me, "replicated")


def one_rank_dies_dispatched(me: Rank) -> None:
    _warm_up(me)
    if me.rank == 1:
        raise SystemExit("this rank dies")
    _expect_error(me, "dispatched")


def one_rank_dies_padded(me: Rank) -> None:
    _warm_up(me)
    if me.rank == 1:
        raise SystemExit("this rank dies")
    _expect_error(me, "padded")


def one_rank_hangs(me: Rank) -> None:
    """A rank that lives but never makes the call."""
    _warm_up(me)
    if me.rank == 1:
        time.sleep(2 * me.timeout)
        return
    begin = time.monotonic()
    _expect_error(me, "dispatched")
    assert time.monotonic() - begin < 2 * me.timeout


def _warm_up(me: Rank) -> None:
    """A good call first: the ranks are connected when one dies."""
    layer = exact_layer(me)
    groups = ParallelGroups(ep=dist.group.WORLD)
    drawn = layer.tokens(9)
    layer.check(dispatched_moe(*drawn, layer.experts.shard(groups), groups), *drawn)
