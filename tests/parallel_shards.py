# SPDX-License-Identifier: Apache-2.0
"""What of `fused_moe.parallel` one process can show: shares, paddings, plans of rows, errors."""

from __future__ import annotations

import dataclasses
import datetime
import time
from typing import Any

import pytest
import torch

from cpu_layer import FOUR_BIT, WEIGHTS, make_layer, reference
from fused_moe import ActivationType, FusedMoE, Routing, cutlass_fused_moe
from fused_moe.parallel import (
    ExpertWeights,
    ParallelError,
    ParallelGroups,
    collectives,
    dispatched_moe,
    pad_intermediate,
    plan,
    replicated_moe,
    shard_experts,
    wait_for_device,
)
from parallel_layer import experts_of
from tolerances import TOLERANCES, assert_close, relative_error

# Products this small gain nothing from threads, which on a busy machine wait for each other.
torch.set_num_threads(1)

ACTIVATIONS = (ActivationType.SwigluBias, ActivationType.Relu2)


def make(weights: str, activation: ActivationType, **sizes: int) -> dict[str, Any]:
    """A call with every optional tensor, in float32 so that nothing but the shares differs."""
    group = int(weights.split("_")[1]) if weights.startswith("int4") else 32
    layer = make_layer(
        weights=weights,
        activation=activation,
        hidden=max(64, group),
        dtype=torch.float32,
        biases=("fc1", "fc2"),
        swiglu=("alpha", "beta", "limit") if activation.is_gated else (),
        **{"intermediate": 4 * group, "experts": 4, **sizes},
    )
    del layer["ep_size"], layer["ep_rank"]
    return layer


def called(layer: dict[str, Any], experts: ExpertWeights, **ranks: Any) -> torch.Tensor:
    tokens = ("input", "token_selected_experts", "token_final_scales", "output_dtype")
    return cutlass_fused_moe(**{n: layer[n] for n in tokens}, **experts.arguments(), **ranks)


def tokens_of(layer: dict[str, Any]) -> tuple[Any, Any, Any]:
    return layer["input"], layer["token_selected_experts"], layer["token_final_scales"]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
@pytest.mark.parametrize("tp_size, ep_size", [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2)])
def test_parts_of_all_ranks_sum_to_the_layer(
    weights: str, activation: ActivationType, tp_size: int, ep_size: int
) -> None:
    layer = make(weights, activation)
    experts = experts_of(layer)
    total = torch.zeros_like(layer["input"])
    for tp_rank in range(tp_size):
        for ep_rank in range(ep_size):
            ranks = {"tp_size": tp_size, "tp_rank": tp_rank, "ep_size": ep_size, "ep_rank": ep_rank}
            share = shard_experts(experts, **ranks)
            assert share.num_experts == 4 // ep_size
            assert share.intermediate_size == experts.intermediate_size // tp_size
            assert share.group_size == experts.group_size
            total += called(layer, share, **ranks)
    assert_close(total, reference(layer), torch.float32)


def test_a_share_has_memory_of_its_own() -> None:
    experts = experts_of(make("int8", ActivationType.SwigluBias))
    for ranks in ({"ep_size": 2, "ep_rank": 1}, {"tp_size": 2}, {}):
        share = shard_experts(experts, **ranks)
        for name, tensor in share.tensors().items():
            assert tensor is not None and tensor.is_contiguous(), name
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, f"{name} keeps the whole"
            whole = experts.tensors()[name]
            assert whole is not None and tensor.data_ptr() != whole.data_ptr()


def test_a_share_goes_to_the_device_asked_for() -> None:
    share = shard_experts(experts_of(make("same", ActivationType.Relu2)), device="meta")
    assert {t.device.type for t in share.tensors().values() if t is not None} == {"meta"}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_padding_changes_nothing(weights: str, activation: ActivationType) -> None:
    unit = int(weights.split("_")[1]) if weights.startswith("int4") else 32
    layer = make(weights, activation, intermediate=3 * unit)
    experts = experts_of(layer)
    padded = pad_intermediate(experts, 2 * unit)
    assert padded.intermediate_size == 4 * unit
    assert_close(called(layer, padded), reference(layer), torch.float32)
    parts = [shard_experts(padded, tp_size=2, tp_rank=rank) for rank in range(2)]
    total = sum(called(layer, part, tp_size=2, tp_rank=r) for r, part in enumerate(parts))
    assert isinstance(total, torch.Tensor)
    assert_close(total, reference(layer), torch.float32)
    assert pad_intermediate(padded, 2 * unit) is padded


BAD_SHARES: list[tuple[str, dict[str, int], str]] = [
    ("same", {"ep_size": 3}, "there are 4 experts; their number must be a multiple of ep_size = 3"),
    (
        "same",
        {"tp_size": 3},
        "intermediate size is 128, which tp_size = 3 cuts into shares of 42.6",
    ),
    ("same", {"tp_size": 32}, "shares of 4; with weights of torch.float32 a share must be a mult"),
    ("int8", {"tp_size": 16}, "a share must be a multiple of 16"),
    ("int4_64", {"tp_size": 8}, "shares of 32; .* multiple of 64 and whole groups of 64: .* 512"),
    ("mxfp4", {"tp_size": 8}, "shares of 16; .* multiple of 32 and whole groups of 32"),
    ("same", {"tp_size": 2, "tp_rank": 2}, "tp_rank is 2; it must be from 0 to tp_size - 1"),
    ("same", {"ep_size": 2, "ep_rank": -1}, "ep_rank is -1; it must be from 0 to ep_size - 1"),
]


@pytest.mark.parametrize("weights, ranks, text", BAD_SHARES)
def test_shares_that_cannot_be_cut(weights: str, ranks: dict[str, int], text: str) -> None:
    experts = experts_of(make(weights, ActivationType.SwigluBias))
    with pytest.raises(ValueError, match=text):
        shard_experts(experts, **ranks)


def test_tensors_that_do_not_fit_each_other() -> None:
    experts = experts_of(make("int8", ActivationType.SwigluBias))
    for name in ("fc1", "fc1_biases", "fc2_biases", "swiglu_alpha"):
        value = getattr(experts, name)
        bad = dataclasses.replace(experts, **{name: value[:, :-1] if value.ndim > 1 else value[1:]})
        with pytest.raises(ValueError, match=f"{name} has the shape .* it must be "):
            shard_experts(bad)
    with pytest.raises(ValueError, match=r"quant_scales\[1\] has the shape"):
        scales = [experts.quant_scales[0], experts.quant_scales[1][:2]]
        shard_experts(dataclasses.replace(experts, quant_scales=scales))
    with pytest.raises(ValueError, match="quant_scales has 1 tensors; it must have none or 2"):
        shard_experts(dataclasses.replace(experts, quant_scales=experts.quant_scales[:1]))
    with pytest.raises(ValueError, match=r"fc1 has the shape .* activation Relu"):
        shard_experts(dataclasses.replace(experts, activation_type=ActivationType.Relu))
    with pytest.raises(ValueError, match=r"must be \[experts, rows, hidden\]"):
        shard_experts(dataclasses.replace(experts, fc1=experts.fc1[0]))
    with pytest.raises(ValueError, match=r"multiple is 8; .* it must be a multiple of 16"):
        pad_intermediate(experts, 8)


@pytest.mark.parametrize("ep_size, top_k", [(1, 2), (2, 3), (4, 1), (4, 6), (8, 3)])
def test_rows_go_once_to_each_rank_and_come_back(ep_size: int, top_k: int) -> None:
    each, tokens, hidden = 3, 41, 5
    draw = torch.Generator().manual_seed(ep_size)
    ids = torch.randint(-2, each * ep_size + 2, (tokens, top_k), generator=draw, dtype=torch.int32)
    ids[7], ids[8], ids[9] = -(2**31), 2**31 - 1, 0
    wanted = [
        (rank, token)
        for rank in range(ep_size)
        for token in range(tokens)
        if any(0 <= e < each * ep_size and e // each == rank for e in ids[token].tolist())
    ]
    goes_to = plan.destinations(ids, each, ep_size)
    made = plan.plan_rows(goes_to, len(wanted), min(top_k, ep_size))
    assert made.tokens.tolist() == [token for _, token in wanted]
    assert goes_to.sum(0).tolist() == [sum(r == rank for r, _ in wanted) for rank in range(ep_size)]
    back = torch.randn(len(wanted) + 1, hidden, generator=draw)
    back[-1] = 0
    expected = torch.zeros(tokens, hidden)
    for row, (_, token) in enumerate(wanted):  # in the order of ranks
        expected[token] += back[row]
    assert torch.equal(plan.summed_rows(back, made.places), expected)


def test_one_process_is_a_group_of_one() -> None:
    layer = make("same", ActivationType.Relu2)
    experts = experts_of(layer)
    tokens = tokens_of(layer)
    alone = called(layer, experts)
    for run in (replicated_moe, dispatched_moe):
        assert torch.equal(run(*tokens, experts, ParallelGroups()), alone)


@pytest.mark.parametrize("weight_format", ["same", "int8", "int4", "mxfp4"])
def test_shares_of_a_module(weight_format: str) -> None:
    layer = FusedMoE(
        64,
        128,
        4,
        Routing(top_k=2),
        fc1_bias=True,
        fc2_bias=True,
        swiglu_alpha=1.5,
        group_size=64 if weight_format == "int4" else None,
        weight_format=weight_format,
        dtype=torch.float32,
    )
    for bias in (layer.experts.fc1_bias, layer.experts.fc2_bias):
        torch.nn.init.normal_(bias)
    x = torch.randn(11, 64)
    scales, ids = layer.router(x)
    experts = ExpertWeights.of(layer.experts)
    whole = replicated_moe(x, ids, scales, experts, ParallelGroups())
    assert (
        torch.equal(whole, layer(x))
        and experts.fc1.data_ptr() == layer.experts.fc1_weight.data_ptr()
    )
    total = torch.zeros_like(x)
    for tp_rank in range(2):
        share = shard_experts(experts, tp_size=2, tp_rank=tp_rank)
        total += cutlass_fused_moe(
            x, ids, scales, output_dtype=x.dtype, tp_rank=tp_rank, tp_size=2, **share.arguments()
        )
    assert_close(total, whole, torch.float32)


def test_gradients_are_refused() -> None:
    layer = make("same", ActivationType.Relu2)
    experts = experts_of(layer)
    x, ids, scales = (layer[n] for n in ("input", "token_selected_experts", "token_final_scales"))
    for run in (replicated_moe, dispatched_moe):
        for name in ("input", "token_final_scales", "fc1", "fc2_biases"):
            tensors = {"input": x, "token_final_scales": scales, **experts.tensors()}
            tensor = tensors[name]
            assert tensor is not None
            tensor.requires_grad_(True)
            with pytest.raises(RuntimeError, match=f"{name} requires a gradient.*no backward"):
                run(x, ids, scales, experts, ParallelGroups())
            with torch.no_grad():
                assert not run(x, ids, scales, experts, ParallelGroups()).requires_grad
            tensor.requires_grad_(False)


BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.zeros(13, 72)}, ValueError, r"input is a .*\[13, 72\]; it must be \[tokens, 64\]"),
    ({"x": torch.zeros(13, 64, dtype=torch.int8)}, ValueError, "input is a torch.int8 tensor"),
    ({"ids": torch.zeros(13, 2)}, ValueError, "token_selected_experts is a torch.float32"),
    ({"ids": torch.zeros(12, 2, dtype=torch.int32)}, ValueError, r"shape \[12, 2\]; it must be"),
    ({"scales": torch.ones(13, 3)}, ValueError, "token_final_scales is a .*it must be torch.fl"),
    ({"x": torch.zeros(64, 13).T}, ValueError, "input is not contiguous; .* input.contiguous()"),
    ({"x": torch.zeros(13, 64, device="meta")}, ValueError, "input is on meta; it must be on"),
    ({"output_dtype": torch.int8}, ValueError, "output_dtype is torch.int8"),
    ({"chunks": 0}, ValueError, "chunks is 0; it must be from 1 to 16"),
    ({"chunks": 17}, ValueError, "chunks is 17"),
    ({"max_tokens": 12}, ValueError, "input has 13 tokens, max_tokens is 12"),
    ({"max_tokens": 13, "row_per_expert": True}, ValueError, "are both given"),
]


@pytest.mark.parametrize("change, kind, text", BAD_CALLS)
def test_bad_calls(change: dict[str, Any], kind: type[Exception], text: str) -> None:
    change = dict(change)
    layer = make("same", ActivationType.Relu2)
    x, ids, scales = tokens_of(layer)
    tokens = change.pop("x", x), change.pop("ids", ids), change.pop("scales", scales)
    with pytest.raises(kind, match=text):
        dispatched_moe(*tokens, experts_of(layer), ParallelGroups(), **change)


def test_bad_reduction() -> None:
    layer = make("same", ActivationType.Relu2)
    reduction: Any = "sum"
    with pytest.raises(ValueError, match="reduction is 'sum'; it must be"):
        replicated_moe(*tokens_of(layer), experts_of(layer), ParallelGroups(), reduction=reduction)


@pytest.mark.parametrize(
    "environment, waits",
    [
        ({}, False),
        ({"TORCH_NCCL_BLOCKING_WAIT": "0"}, False),
        ({"TORCH_NCCL_BLOCKING_WAIT": "1"}, True),
        ({"TORCH_NCCL_BLOCKING_WAIT": "Yes"}, True),
        ({"NCCL_BLOCKING_WAIT": "true"}, True),
        ({"TORCH_NCCL_BLOCKING_WAIT": "0", "NCCL_BLOCKING_WAIT": "1"}, False),
    ],
)
def test_the_host_waits_where_pytorch_is_told_to(
    environment: dict[str, str], waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under that variable PyTorch has no watchdog: an exchange nobody waits for has no timeout."""
    for name in ("TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked: list[bool] = []
    waited: list[bool] = []

    class Work:
        def wait(self) -> None:
            waited.append(True)

    def all_reduce(x: torch.Tensor, *, group: object, async_op: bool) -> Work | None:
        asked.append(async_op)
        return Work() if async_op else None

    monkeypatch.setattr(collectives.dist, "all_reduce", all_reduce)
    collectives.all_reduce(torch.zeros(2), "nothing", "tensor", Any)
    assert asked == [waits] and waited == [True] * waits


@pytest.mark.parametrize("needed", [0.0, 0.05, None])
def test_waiting_for_the_device_has_an_end(
    needed: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an event that is done after so many seconds, or never."""
    begin = time.monotonic()

    class Event:
        def record(self, stream: object) -> None:
            assert stream == "the current stream of cuda:1"

        def query(self) -> bool:
            return needed is not None and time.monotonic() - begin >= needed

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d: f"the current stream of {d}")
    if needed is None:
        with pytest.raises(
            ParallelError, match=r"did not finish within 0\.2 s: another rank ended"
        ):
            wait_for_device(datetime.timedelta(seconds=0.2), "cuda:1")
        assert time.monotonic() - begin >= 0.2
    else:
        wait_for_device(datetime.timedelta(seconds=30), "cuda:1")
        assert time.monotonic() - begin >= needed


def test_formats_of_four_bits_say_their_groups() -> None:
    for weights in FOUR_BIT:
        experts = experts_of(make(weights, ActivationType.SwigluBias))
        group = 32 if weights == "mxfp4" else int(weights.split("_")[1])
        assert (experts.group_size, experts.multiple) == (group, group)
        assert experts.intermediate_size == 4 * group
    wrong = shard_experts(experts_of(make("same", ActivationType.SwigluBias)), tp_size=2)
    layer = make("same", ActivationType.SwigluBias)
    error = relative_error(called(layer, wrong, tp_size=2), reference(layer))
    assert error > 10 * TOLERANCES[torch.bfloat16], "half of a layer must not pass for a whole"
