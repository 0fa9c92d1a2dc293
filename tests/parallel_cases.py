# SPDX-License-Identifier: Apache-2.0
"""What every rank of tests/parallel.py does: functions of a Rank that raise where they fail.

Each rank takes its share of the same layer, and knows what one process would compute.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from cpu_layer import WEIGHTS
from fused_moe import ActivationType
from fused_moe.parallel import ExpertWeights, ParallelGroups, dispatched_moe, replicated_moe
from parallel_layer import (
    EXPERTS,
    Layer,
    both_kinds,
    dispatched,
    exact_layer,
    real_layer,
    replicated,
)
from parallel_world import Rank


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
    layer.check_bits(out, x, ids, scales)
    x, ids, scales = layer.tokens(50, top_k=2)
    local = EXPERTS // me.size
    ids[:, 1] = ids[:, 0] // local * local + (ids[:, 0] + 1) % local
    out = replicated_moe(x, ids, scales, mine, groups)
    layer.check_bits(out, x, ids, scales)
    assert torch.equal(out, replicated_moe(x, ids, scales, mine, groups)), "not the same twice"


FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"chunks": 3},
    {"row_per_expert": True},
    {"row_per_expert": True, "chunks": 2},
    {"max_tokens": 40},
    {"max_tokens": 40, "chunks": 3},
    {"max_tokens": 40, "chunks": 16},
)

# One of each kind: parts and paddings are the exact layers' matter.
FEW_FORMS = (FORMS[0], FORMS[2], FORMS[4])


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
                layer.check(dispatched(drawn, mine, groups, **form), *drawn)


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
        for form in FEW_FORMS:
            layer.check(dispatched(drawn, mine, groups, **form), *drawn)


def dispatched_same_bits(me: Rank) -> None:
    layer = real_layer(me)
    groups = ParallelGroups(ep=dist.group.WORLD)
    mine = layer.experts.shard(groups)
    drawn = layer.tokens(23, seed=me.rank)
    for form in FORMS:
        first = dispatched(drawn, mine, groups, **form)
        for _ in range(2):
            assert torch.equal(first, dispatched(drawn, mine, groups, **form)), form
    # With the tokens of one rank alone, and one expert a token, the products are the same ones.
    drawn = layer.tokens(23 if me.rank == 0 else 0, top_k=1)
    for form in FORMS[:1] + FORMS[4:5]:
        out = dispatched(drawn, mine, groups, **form)
        layer.check_bits(out, *drawn)


def ranks_that_disagree(me: Rank) -> None:
    """Every rank raises, and says what differs; the group works on."""
    layer = exact_layer(me)
    groups = ParallelGroups(ep=dist.group.WORLD)
    mine = layer.experts.shard(groups)
    # Without biases, which would have to be of output_dtype.
    bare = dataclasses.replace(mine, fc1_biases=None, fc2_biases=None)
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
            dispatched(drawn, bare, groups, **form)
        except ValueError as error:
            assert text in str(error), error
        else:
            raise AssertionError(f"no error: {text}")
    layer.check(dispatched_moe(x, ids, scales, mine, groups), x, ids, scales)


def refused_before_anything_is_sent(me: Rank) -> None:
    """What one rank alone has wrong it is told before the others wait for it: all work on."""
    layer = exact_layer(me)
    groups = ParallelGroups(ep=dist.group.WORLD)
    mine = layer.experts.shard(groups)
    x, ids, scales = layer.tokens(6)
    assert mine.fc2_biases is not None
    # The first is seen by dispatched_moe, the others by the operator.
    few = dataclasses.replace(mine, fc2_biases=mine.fc2_biases[:1])
    plain = dataclasses.replace(mine, activation_type=ActivationType.Swiglu)
    cases: list[tuple[str, torch.Tensor, ExpertWeights]] = [
        ("token_selected_experts is a torch.int32 tensor of shape [6, 0]", ids[:, :0], mine),
        ("fc2_expert_biases has the shape [1, 64]", ids, few),
        ("fc1_expert_weights", ids, plain),
    ]
    for text, chosen, experts in cases:
        for form in FEW_FORMS:
            if me.rank == 1:
                try:
                    dispatched_moe(x, chosen.contiguous(), None, experts, groups, **form)
                except ValueError as error:
                    assert text in str(error), error
                else:
                    raise AssertionError(f"no error: {text}")
            layer.check(dispatched_moe(x, ids, scales, mine, groups, **form), x, ids, scales)


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
            for count in (5, 13):  # 5: the four ranks get 2, 2, 1 and 0 rows of a scattered sum
                check_reductions(layer, groups, count)
            two_sums = ParallelGroups(groups.tp, groups.ep)  # without the group of all
            mine = layer.experts.shard(groups)
            drawn = layer.tokens(13)
            layer.check(replicated(drawn, mine, two_sums), *drawn)
            for form in FORMS if layer.exact else FEW_FORMS:
                # The tensor-parallel ranks of one expert rank have the same tokens.
                drawn = layer.tokens(4 + 9 * groups.ep_rank, seed=groups.ep_rank)
                layer.check(dispatched(drawn, mine, groups, **form), *drawn)


def meshes_with_one_kind(me: Rank) -> None:
    """A mesh of one dimension, and of two of which one has a single rank."""
    layer = exact_layer(me)
    shapes: tuple[tuple[tuple[int, ...], tuple[str, ...]], ...] = (
        ((me.size,), ("ep",)),
        ((me.size,), ("tp",)),
        ((1, me.size), ("ep", "tp")),
        ((1, me.size), ("tp", "ep")),
    )
    for shape, names in shapes:
        mesh = init_device_mesh(me.device.type, shape, mesh_dim_names=names)
        groups = ParallelGroups.from_mesh(mesh)
        assert {groups.tp_size, groups.ep_size} == {1, me.size}
        assert (groups.tp_size if names[-1] == "tp" else groups.ep_size) == me.size
        check_reductions(layer, groups, 7)
        drawn = layer.tokens(6, seed=groups.ep_rank)
        for form in FORMS:
            layer.check(dispatched(drawn, layer.experts.shard(groups), groups, **form), *drawn)
    try:
        ParallelGroups.from_mesh(mesh, tp="x", ep="y")
    except ValueError as error:
        assert "it must have 'x', 'y' or both" in str(error), error
    else:
        raise AssertionError("a mesh without the dimensions was accepted")


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
        layer.check(dispatched(drawn, mine, groups), *drawn)
        check_reductions(layer, groups, 7)
        return
    try:
        ParallelGroups(ep=group)
    except ValueError as error:
        assert "is not in the ep group" in str(error), error
    else:
        raise AssertionError("a group of others was accepted")


def groups_that_are_no_mesh(me: Rank) -> None:
    """Each mistake is named: tp and ep of the same ranks, and a layer of others."""
    world = dist.group.WORLD
    low, high = dist.new_group([0, 1]), dist.new_group([2, 3])
    # A layer of the right size without this rank's own groups.
    pair = low if me.rank < 2 else high
    crossed = [dist.new_group([0, 2]), dist.new_group([1, 3])][me.rank % 2]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tp": world, "ep": world}, "tp and the ep group share the ranks [0, 1, 2, 3]"),
        ({"tp": pair, "ep": pair}, "tp and the ep group share the ranks"),
        ({"tp": pair, "layer": crossed}, "it must have those of tp and ep"),
    ]
    for groups, text in cases:
        try:
            ParallelGroups(**groups)
        except ValueError as error:
            assert text in str(error), error
        else:
            raise AssertionError(f"no error: {text}")
    assert ParallelGroups(tp=pair, ep=crossed, layer=world).tp_size == 2


def documented_program(me: Rank) -> None:
    """The program of docs/parallel.md, as it stands there but for the device. Of four ranks."""
    page = pathlib.Path(__file__).absolute().parent.parent / "docs" / "parallel.md"
    program = re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert program is not None
    layer = real_layer(me, "int8", ActivationType.Swiglu, biases=())
    x, ids, scales = layer.tokens(9)
    names = {"x": x, "ids": ids, "scales": scales, "fc1": layer.experts.fc1}
    names.update(fc2=layer.experts.fc2, quant_scales=layer.experts.quant_scales)
    lines = program[1].replace('"cuda"', f'"{me.device.type}"').splitlines()
    ends = [number for number, line in enumerate(lines) if line.startswith("out = ")]
    assert len(ends) == 2
    for begin, end in ((0, ends[0]), (ends[0] + 1, ends[1])):
        exec("\n".join(lines[begin : end + 1]), names)
        layer.check(names["out"], x, ids, scales)
