# SPDX-License-Identifier: Apache-2.0
"""The cpu backend against the plain reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cpu_layer import FOUR_BIT, WEIGHTS, make_layer, reference, run
from fused_moe import ActivationType, cpu, cutlass_fused_moe, up_gate_from_gate_up
from fused_moe.models import MODELS
from tolerances import TOLERANCES, assert_close, relative_error

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GATED = [a for a in ActivationType if a.is_gated]


def check(arguments: dict[str, Any]) -> torch.Tensor:
    """Runs, compares, and returns the output."""
    out = run(arguments)
    assert out.dtype == arguments["output_dtype"]
    dtypes = (arguments["input"].dtype, out.dtype)
    coarser = max(dtypes, key=lambda dtype: TOLERANCES[dtype])
    assert_close(out, reference(arguments), coarser)
    return out


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("activation", list(ActivationType), ids=lambda a: a.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_and_weights(
    dtype: torch.dtype, activation: ActivationType, weights: str
) -> None:
    check(make_layer(dtype=dtype, activation=activation, weights=weights, tokens=37))


@pytest.mark.parametrize("weights", ["same", "int8", "int4_32", "mxfp4"])
@pytest.mark.parametrize("biases", [("fc1",), ("fc2",), ("fc1", "fc2")], ids="+".join)
@pytest.mark.parametrize("activation", list(ActivationType), ids=lambda a: a.name)
def test_biases(activation: ActivationType, biases: tuple[str, ...], weights: str) -> None:
    layer = make_layer(activation=activation, biases=biases, weights=weights)
    out = check(layer)
    for name in biases:
        without = {**layer, f"{name}_expert_biases": None}
        assert relative_error(run(without), out.float()) > 0.05, "the bias made no difference"


@pytest.mark.parametrize("weights", ["same", "int8", "int4_64", "mxfp4"])
@pytest.mark.parametrize(
    "given", [("alpha",), ("beta",), ("limit",), ("alpha", "beta", "limit")], ids="+".join
)
@pytest.mark.parametrize(
    "activation", [ActivationType.Swiglu, ActivationType.SwigluBias], ids=lambda a: a.name
)
def test_swiglu_parameters(
    activation: ActivationType, given: tuple[str, ...], weights: str
) -> None:
    layer = make_layer(activation=activation, swiglu=given, weights=weights)
    out = check(layer)
    plain = {name: v for name, v in layer.items() if not name.startswith("swiglu")}
    assert relative_error(run(plain), out.float()) > 0.01, "the parameters made no difference"
    as_bias = {**layer, "activation_type": ActivationType.SwigluBias}
    assert torch.equal(run(as_bias), out), "parameters must turn Swiglu into SwigluBias"


def test_swiglu_step_limit() -> None:
    layer = make_layer(activation=ActivationType.SwigluStep, swiglu=("limit",))
    layer["input"] *= 8  # far enough for the limit of 7 to matter
    out = check(layer)
    default = {**layer, "swiglu_limit": torch.full((4,), 7.0)}
    del layer["swiglu_limit"]
    assert torch.equal(check(layer), run(default)), "the default limit is 7"
    assert relative_error(run(layer), out.float()) > 0.01


@pytest.mark.parametrize("output_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_dtypes(dtype: torch.dtype, output_dtype: torch.dtype) -> None:
    check(make_layer(dtype=dtype, output_dtype=output_dtype, biases=("fc1", "fc2")))


@pytest.mark.parametrize("weights", ["int8", "int4_32", "int4_128"])
@pytest.mark.parametrize("scale_dtype", ["float32", "same"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quant_scale_dtypes(dtype: torch.dtype, scale_dtype: str, weights: str) -> None:
    kind = dtype if scale_dtype == "same" else torch.float32
    check(make_layer(dtype=dtype, weights=weights, scale_dtype=kind))


def test_both_dtypes_of_e8m0_scales() -> None:
    layer = make_layer(weights="mxfp4")
    expected = check(layer)
    layer["quant_scales"] = [s.view(torch.float8_e8m0fnu) for s in layer["quant_scales"]]
    assert torch.equal(run(layer), expected)


def test_signs_of_scales_matter() -> None:
    """A scale may be negative: nothing says it is a magnitude."""
    layer = make_layer(weights="int4_32", activation=ActivationType.Identity)
    expected = run(layer)
    layer["quant_scales"][1].neg_()
    assert torch.equal(check(layer), -expected)


def test_without_scales() -> None:
    layer = make_layer()
    layer["token_final_scales"] = None
    check(layer)


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 64, 257])
@pytest.mark.parametrize(
    "sizes",
    [(8, 8), (16, 16), (24, 8), (40, 176), (96, 352), (2304, 24), (32, 1864)],
    ids=str,
)
def test_sizes(sizes: tuple[int, int], tokens: int) -> None:
    hidden, intermediate = sizes
    out = check(make_layer(tokens=tokens, hidden=hidden, intermediate=intermediate))
    assert out.shape == (tokens, hidden)


@pytest.mark.parametrize("tokens", [0, 1, 7, 257])
@pytest.mark.parametrize(
    ("sizes", "weights"),
    [
        ((32, 32), "int4_32"),
        ((32, 32), "mxfp4"),
        ((128, 128), "int4_128"),
        ((96, 352), "int4_32"),
        ((320, 192), "int4_64"),
        ((2304, 32), "mxfp4"),
        ((32, 1856), "int4_32"),
    ],
    ids=str,
)
def test_sizes_of_4_bit_weights(sizes: tuple[int, int], weights: str, tokens: int) -> None:
    hidden, intermediate = sizes
    layer = make_layer(tokens=tokens, hidden=hidden, intermediate=intermediate, weights=weights)
    assert check(layer).shape == (tokens, hidden)


@pytest.mark.parametrize("weights", ["same", "int4_32", "mxfp4"])
@pytest.mark.parametrize("name", list(MODELS))
def test_models_at_an_eighth(name: str, weights: str) -> None:
    model = MODELS[name]
    multiple = 8 if weights == "same" else 32
    experts = min(model.num_experts, 16)
    swiglu = ("alpha", "beta", "limit") if model.swiglu_alpha else ()
    check(
        make_layer(
            tokens=9,
            hidden=-(-model.hidden_size // 8 // multiple) * multiple,
            intermediate=-(-model.intermediate_size // 8 // multiple) * multiple,
            weights=weights,
            experts=experts,
            top_k=min(model.top_k, experts),
            activation=model.activation,
            biases=("fc1", "fc2") if model.biases else (),
            swiglu=swiglu,
        )
    )


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (8, 1), (8, 8), (512, 10)])
def test_expert_counts(experts: int, top_k: int) -> None:
    check(make_layer(tokens=31, experts=experts, top_k=top_k, hidden=32, intermediate=32))


@pytest.mark.parametrize("weights", ["same", *FOUR_BIT])
@pytest.mark.parametrize("ep_size", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expert_parallel_ranks_sum_to_the_layer(
    dtype: torch.dtype, ep_size: int, weights: str
) -> None:
    whole = make_layer(
        dtype=dtype,
        experts=8,
        top_k=3,
        biases=("fc1", "fc2"),
        swiglu=("alpha", "limit"),
        weights=weights,
    )
    whole["output_dtype"] = torch.float32
    sharded = [
        name for name, v in whole.items() if name.startswith(("fc", "swiglu")) and v is not None
    ]
    for name in ("fc1_expert_biases", "fc2_expert_biases"):
        whole[name] = whole[name].float()
    total = torch.zeros(whole["input"].shape)
    for rank in range(ep_size):
        part = {**whole, "ep_size": ep_size, "ep_rank": rank}
        for name in sharded:
            part[name] = whole[name].chunk(ep_size)[rank].contiguous()
        if weights != "same":
            part["quant_scales"] = [s.chunk(ep_size)[rank] for s in whole["quant_scales"]]
        total += check(part)
    assert_close(total, reference(whole), dtype)


@pytest.mark.parametrize("weights", ["same", "int4_32", "int4_64", "mxfp4"])
@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize(
    "activation", [ActivationType.Swiglu, ActivationType.Relu2], ids=lambda a: a.name
)
def test_tensor_parallel_ranks_sum_to_the_layer(
    activation: ActivationType, tp_size: int, weights: str
) -> None:
    whole = make_layer(
        activation=activation,
        intermediate=96 if weights == "same" else 256,
        biases=("fc1", "fc2"),
        weights=weights,
    )
    whole["output_dtype"] = torch.float32
    for name in ("fc1_expert_biases", "fc2_expert_biases"):
        whole[name] = whole[name].float()

    def fc1_shard(tensor: torch.Tensor, rank: int) -> torch.Tensor:
        halves = tensor.chunk(2, dim=1) if activation.is_gated else (tensor,)
        return torch.cat([half.chunk(tp_size, dim=1)[rank] for half in halves], dim=1)

    total = torch.zeros(13, 64)
    for rank in range(tp_size):
        part = {**whole, "tp_size": tp_size, "tp_rank": rank}
        part["fc1_expert_weights"] = fc1_shard(whole["fc1_expert_weights"], rank)
        part["fc1_expert_biases"] = fc1_shard(whole["fc1_expert_biases"], rank)
        fc2 = whole["fc2_expert_weights"].chunk(tp_size, dim=2)[rank]
        part["fc2_expert_weights"] = fc2.contiguous()
        if weights != "same":
            fc1_scale, fc2_scale = whole["quant_scales"]
            fc2_scale = fc2_scale.chunk(tp_size, dim=2)[rank].contiguous()
            part["quant_scales"] = [fc1_shard(fc1_scale, rank), fc2_scale]
        total += check(part)
    assert_close(total, reference(whole), torch.bfloat16)


OUTSIDE = [-1, 8, 9, -(2**31), 2**31 - 1, 1 << 20]


@pytest.mark.parametrize("ep_rank", [0, 1])
def test_ids_outside_contribute_nothing(ep_rank: int) -> None:
    layer = make_layer(tokens=24, ep_size=2, ep_rank=ep_rank, biases=("fc2",))
    ids = layer["token_selected_experts"]
    ids[:6, 0] = torch.tensor(OUTSIDE, dtype=torch.int32)
    ids[6:12] = torch.tensor(OUTSIDE, dtype=torch.int32).unsqueeze(1)
    # The scale of a slot that does not count must not count either.
    layer["token_final_scales"][6:12] = float("nan")
    # The reference multiplies no slot outside, so it needs no special care here.
    out = check(layer)
    assert not out[6:12].any(), "no expert, so exactly 0"
    other_rank = (ids // 4 != ep_rank).all(dim=1)
    assert other_rank.sum() > 6, "the case must have tokens of the other rank"
    assert not out[other_rank].any()


def test_garbage_ids() -> None:
    layer = make_layer(tokens=200)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(-(2**31), 2**31, (200, 2), generator=draw).to(torch.int32)
    layer["token_selected_experts"] = ids
    assert not run(layer).any()
    ids[::3, 1] = 2
    assert check(layer).any()


def test_duplicate_experts_are_summed() -> None:
    layer = make_layer(tokens=300, top_k=3)
    layer["token_selected_experts"][:, 1:] = layer["token_selected_experts"][:, :1]
    check(layer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_expert_takes_everything_in_several_blocks(dtype: torch.dtype) -> None:
    layer = make_layer(tokens=cpu.ROWS + 700, dtype=dtype)
    layer["token_selected_experts"].fill_(3)
    check(layer)


def test_bfloat16_without_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_bfloat16_is_fast", lambda: False)
    for weights in WEIGHTS:
        size = 1152 if weights in FOUR_BIT else 1040
        check(make_layer(weights=weights, hidden=size, intermediate=size, experts=2))


def test_bfloat16_products_are_not_rounded_before_the_activation() -> None:
    layer = make_layer(tokens=200, activation=ActivationType.Relu2, output_dtype=torch.float32)
    # What is left: the activation and each expert's result, sqrt(2) * 1.6e-3. Squaring rounded
    # products would add 3.2e-3 to that.
    assert relative_error(run(layer), reference(layer)) < 2.8e-3


def test_infinite_products_stay_what_they_are() -> None:
    layer = make_layer(tokens=3, experts=1, top_k=1, activation=ActivationType.Relu)
    layer["input"][1] = float("inf")
    layer["fc1_expert_weights"].fill_(-1)
    out = run(layer)
    assert not out[1].any(), "relu(-inf) is 0"


def test_a_bad_token_spoils_only_itself() -> None:
    layer = make_layer(tokens=50)
    clean = run(layer)
    layer["input"][17, 5] = float("nan")
    out = run(layer)
    assert out[17].isnan().all()
    rest = torch.arange(50) != 17
    assert torch.equal(out[rest], clean[rest])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_calls_give_equal_bits(dtype: torch.dtype) -> None:
    layer = make_layer(tokens=700, experts=8, top_k=8, dtype=dtype)
    first = run(layer)
    assert all(torch.equal(run(layer), first) for _ in range(5))


def test_output_is_allocated_where_none_is_given() -> None:
    layer = make_layer()
    out = cutlass_fused_moe(**layer)
    assert out.shape == (13, 64) and torch.equal(out, run(layer))


@pytest.mark.parametrize("weights", ["same", "int8", "int4_32", "mxfp4"])
@pytest.mark.parametrize("activation", GATED, ids=lambda a: a.name)
def test_gate_is_the_second_half(activation: ActivationType, weights: str) -> None:
    layer = make_layer(activation=activation, weights=weights)
    right = run(layer)

    def exchanged(layer: dict[str, Any]) -> dict[str, Any]:
        other = {**layer, "fc1_expert_weights": up_gate_from_gate_up(layer["fc1_expert_weights"])}
        if weights != "same":
            fc1_scale, fc2_scale = layer["quant_scales"]
            other["quant_scales"] = [up_gate_from_gate_up(fc1_scale), fc2_scale]
        return other

    swapped = exchanged(layer)
    assert relative_error(run(swapped), right.float()) > 0.1, "the order of halves must matter"
    assert torch.equal(run(exchanged(swapped)), right)
