# SPDX-License-Identifier: Apache-2.0
"""How calls of the sm80 backend behave: graphs, streams, threads, memory, symmetries, parts.

Whether single calls are right, over every kind of input, is sm80_moe.py's subject.
"""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

from cases import Case
from fused_moe import ActivationType, cutlass_fused_moe, topk_softmax
from gpu_layer import (
    GuardedBuffer,
    Layer,
    check,
    realized,
    require_sm80,
    route,
    same_bits,
)
from tolerances import assert_close

_SMALL = Case("calls", 256, 192, experts=8, top_k=2, tokens=37)
_INT8 = dataclasses.replace(_SMALL, weights="int8", biases="both", tokens=130)
_LARGE = dataclasses.replace(_SMALL, tokens=6000, dtype="float16", routing="garbage")
_ONE = dataclasses.replace(_SMALL, tokens=1, experts=64, top_k=6)
_INT4 = dataclasses.replace(_SMALL, weights="int4_64", biases="both", tokens=130)
_MXFP4 = dataclasses.replace(
    _SMALL,
    weights="mxfp4",
    activation=ActivationType.SwigluBias,
    swiglu="all",
    biases="both",
    tokens=9,
)
_ALL = (_SMALL, _INT8, _LARGE, _ONE, _INT4, _MXFP4)


def _name(case: Case) -> str:
    return f"m{case.tokens}-{case.weights}-{case.dtype}"


def _capture(layer: Layer, out: torch.Tensor) -> torch.cuda.CUDAGraph:
    layer.run(output=out)  # the warm-up that PyTorch asks for before a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.run(output=out)
    return graph


@pytest.mark.parametrize("case", _ALL, ids=_name)
def test_graph_replays_follow_changed_inputs(case: Case) -> None:
    require_sm80()
    with realized(case) as layer:
        out = torch.empty(case.tokens, case.hidden, dtype=layer.output_dtype, device="cuda")
        graph = _capture(layer, out)
        for routing in ("uniform", "garbage", "one_expert", "few_experts", "outside"):
            ids, scales = route(dataclasses.replace(case, routing=routing))
            layer.ids.copy_(ids)
            assert layer.scales is not None and scales is not None
            layer.scales.copy_(scales)
            layer.input.normal_()
            out.fill_(float("nan"))
            graph.replay()
            check(layer, out)
            # Outside a graph the same call gives the same bits.
            assert same_bits(out, layer.run())


def test_nan_router_rows_in_a_graph_harm_no_other_row() -> None:
    require_sm80()
    with realized(_SMALL) as layer:
        logits = torch.randn(_SMALL.tokens, _SMALL.experts, device="cuda")
        scales, ids = topk_softmax(logits, _SMALL.top_k)
        layer.scales, layer.ids = scales, ids
        out = torch.empty(_SMALL.tokens, _SMALL.hidden, dtype=torch.bfloat16, device="cuda")

        def step() -> None:
            new_scales, new_ids = topk_softmax(logits, _SMALL.top_k)
            scales.copy_(new_scales)
            ids.copy_(new_ids)
            layer.run(output=out)

        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        logits.normal_()
        logits[5] = float("nan")
        logits[11] = float("inf")
        graph.replay()
        assert bool(out[5].isnan().all()) and bool(out[11].isnan().all())
        good = torch.tensor([row for row in range(_SMALL.tokens) if row not in (5, 11)]).cuda()
        check(layer, out[good], good)


def test_streams_at_once() -> None:
    require_sm80()
    for case in _ALL:
        with realized(case) as layer:
            expected = layer.run()
            streams = [torch.cuda.Stream() for _ in range(4)]
            torch.cuda.synchronize()
            results = []
            for _ in range(5):
                for stream in streams:
                    with torch.cuda.stream(stream):
                        results.append(layer.run())
            torch.cuda.synchronize()
            assert all(same_bits(result, expected) for result in results)


def test_threads_at_once() -> None:
    require_sm80()
    for case in _ALL:
        with realized(case) as layer:
            expected = layer.run()
            torch.cuda.synchronize()
            equal: list[bool] = []

            def work(
                layer: Layer = layer,
                expected: torch.Tensor = expected,
                equal: list[bool] = equal,
            ) -> None:
                stream = torch.cuda.Stream()
                with torch.cuda.stream(stream):
                    results = [layer.run() for _ in range(10)]
                stream.synchronize()
                equal.append(all(same_bits(result, expected) for result in results))

            threads = [threading.Thread(target=work) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert equal == [True] * 6


def test_runs_on_the_callers_stream() -> None:
    """Work queued before on the stream is waited for: the input is made there, slowly."""
    require_sm80()
    with realized(_SMALL) as layer:
        expected = layer.run()
        kept = layer.input.clone()
        layer.input.zero_()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            layer.input.copy_(kept)
            out = layer.run()
        stream.synchronize()
        assert same_bits(out, expected)


@pytest.mark.parametrize("case", _ALL, ids=_name)
def test_nothing_is_allocated_when_memory_is_given(case: Case) -> None:
    require_sm80()
    with realized(case) as layer:
        out = torch.empty(case.tokens, case.hidden, dtype=layer.output_dtype, device="cuda")
        workspace = GuardedBuffer(layer.workspace_bytes(), 128)
        layer.run(output=out, workspace_buffer=workspace.tensor)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        layer.run(output=out, workspace_buffer=workspace.tensor)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        check(layer, out)


@pytest.mark.parametrize("case", _ALL, ids=_name)
def test_order_of_tokens_slots_and_experts_does_not_matter(case: Case) -> None:
    require_sm80()
    with realized(case) as layer:
        expected = layer.run().float()
        assert layer.scales is not None

        tokens = torch.randperm(case.tokens, device="cuda")
        permuted = dataclasses.replace(
            layer,
            input=layer.input[tokens],
            ids=layer.ids[tokens],
            scales=layer.scales[tokens],
        )
        assert_close(permuted.run(), expected[tokens], layer.input.dtype)

        slots = torch.rand(case.tokens, case.top_k, device="cuda").argsort(dim=1)
        shuffled = dataclasses.replace(
            layer, ids=layer.ids.gather(1, slots), scales=layer.scales.gather(1, slots)
        )
        assert_close(shuffled.run(), expected, layer.input.dtype)

        experts = torch.randperm(case.experts, device="cuda")
        new_name = experts.argsort().to(torch.int32)
        here = (layer.ids >= 0) & (layer.ids < case.experts)
        renamed = dataclasses.replace(
            layer,
            ids=torch.where(here, new_name[layer.ids.clamp(0, case.experts - 1).long()], layer.ids),
            fc1=layer.fc1[experts],
            fc2=layer.fc2[experts],
            quant_scales=[scale[experts] for scale in layer.quant_scales],
            optional={name: tensor[experts] for name, tensor in layer.optional.items()},
        )
        assert_close(renamed.run(), expected, layer.input.dtype)


def test_a_batch_is_the_sum_of_its_parts() -> None:
    require_sm80()
    case = dataclasses.replace(_SMALL, tokens=9001, top_k=3)
    with realized(case) as layer:
        expected = layer.run().float()
        assert layer.scales is not None
        for begin, end in ((0, 4), (4, 40), (40, 3000), (3000, 9001)):
            part = dataclasses.replace(
                layer,
                input=layer.input[begin:end],
                ids=layer.ids[begin:end],
                scales=layer.scales[begin:end],
            )
            assert_close(part.run(), expected[begin:end], layer.input.dtype)


@pytest.mark.parametrize("weights", ["same", "int8", "int4_32", "int4_64", "mxfp4"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_add_up(size: int, weights: str) -> None:
    """The partial results of all TP ranks, or of all EP ranks, sum to the whole layer."""
    require_sm80()
    case = Case("ranks", 256, 256, 8, 3, 100, weights=weights, biases="both")
    with realized(case) as layer:
        whole = layer.reference()
        tp_sum, ep_sum = torch.zeros_like(whole), torch.zeros_like(whole)
        part = case.intermediate // size

        def along_k(tensor: torch.Tensor, rank: int) -> torch.Tensor:
            return tensor.chunk(size, dim=2)[rank].contiguous()

        for rank in range(size):
            columns = slice(rank * part, (rank + 1) * part)

            def up_and_gate(rows: torch.Tensor, columns: slice = columns) -> torch.Tensor:
                up, gate = rows.chunk(2, dim=1)
                return torch.cat([up[:, columns], gate[:, columns]], dim=1)

            sharded = dataclasses.replace(
                layer,
                case=dataclasses.replace(case, intermediate=part, tp_size=size, tp_rank=rank),
                fc1=up_and_gate(layer.fc1),
                fc2=along_k(layer.fc2, rank),
                quant_scales=[
                    up_and_gate(layer.quant_scales[0]),
                    along_k(layer.quant_scales[1], rank)
                    if case.group_size
                    else layer.quant_scales[1],
                ]
                if layer.quant_scales
                else [],
                optional={
                    "fc1_expert_biases": up_and_gate(layer.optional["fc1_expert_biases"]),
                    "fc2_expert_biases": layer.optional["fc2_expert_biases"],
                },
            )
            tp_sum += sharded.run().float()
            experts = slice(rank * 8 // size, (rank + 1) * 8 // size)
            local = dataclasses.replace(
                layer,
                case=dataclasses.replace(case, experts=8 // size, ep_size=size, ep_rank=rank),
                fc1=layer.fc1[experts],
                fc2=layer.fc2[experts],
                quant_scales=[scale[experts] for scale in layer.quant_scales],
                optional={name: tensor[experts] for name, tensor in layer.optional.items()},
            )
            ep_sum += local.run().float()
        assert_close(tp_sum, whole, layer.input.dtype)
        assert_close(ep_sum, whole, layer.input.dtype)


@pytest.mark.parametrize("case", [_SMALL, _INT8, _INT4, _MXFP4], ids=_name)
def test_torch_compile_takes_it_whole(case: Case) -> None:
    require_sm80()
    with realized(case) as layer:

        def step(x: torch.Tensor) -> torch.Tensor:
            return dataclasses.replace(layer, input=x * 2).run() + 1

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        x = layer.input.clone()
        assert same_bits(compiled(x), step(x))


@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_scales_of_every_size(tokens: int) -> None:
    """E8M0 scales over 60 powers of two: no product or weight is lost on the way to bfloat16."""
    require_sm80()
    case = dataclasses.replace(
        _SMALL, weights="mxfp4", tokens=tokens, activation=ActivationType.Identity
    )
    with realized(case) as layer:
        for exponent in (-40, -20, 0, 20):
            fc1_scale, fc2_scale = layer.quant_scales
            fc1_scale.random_(118 + exponent, 121 + exponent)
            fc2_scale.random_(118 - exponent, 121 - exponent)
            check(layer, layer.run())


@pytest.mark.parametrize("tokens", [1, 300])
def test_a_scale_that_is_not_a_number_shows(tokens: int) -> None:
    """E8M0's 255 in one group of fc2: that column is NaN for the tokens of its expert alone."""
    require_sm80()
    case = dataclasses.replace(_SMALL, intermediate=256, tokens=tokens, weights="mxfp4")
    with realized(case) as layer:
        expert = int(layer.ids[0, 0])
        layer.quant_scales[1][expert, 5, 3] = 255
        out = layer.run()
        hit = (layer.ids == expert).any(dim=1)
        assert out[hit, 5].isnan().all() and not out[~hit].isnan().any()
        assert not out[:, :5].isnan().any() and not out[:, 6:].isnan().any()


@pytest.mark.parametrize("weights", ["int8", "uint8", "int4_32", "int4_64", "int4_128"])
@pytest.mark.parametrize("tokens", [1, 300])
def test_scales_may_be_negative(tokens: int, weights: str) -> None:
    require_sm80()
    case = dataclasses.replace(_SMALL, intermediate=256, tokens=tokens, weights=weights)
    with realized(case) as layer:
        for scale in layer.quant_scales:
            scale *= torch.randint(0, 2, scale.shape, device="cuda") * 2 - 1
        check(layer, layer.run())


@pytest.mark.parametrize("weights", ["int4_32", "int4_64", "int4_128", "mxfp4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_each_code_and_each_group_has_its_own_value(dtype: str, weights: str) -> None:
    """Inputs and weights with one number each: the result is that weight's value, exactly."""
    require_sm80()
    case = Case(
        *("codes", 256, 128, 1, 1, 256),
        dtype=dtype,
        weights=weights,
        activation=ActivationType.Identity,
    )
    with realized(case) as layer:
        group = case.group_size
        # Row n of fc2 copies column n % I of what fc1 gives, and input k picks fc1's column k.
        layer.input.copy_(torch.eye(256, device="cuda"))
        layer.ids.zero_()
        assert layer.scales is not None
        layer.scales.fill_(1)
        one = 0x2 if weights == "mxfp4" else 0x9  # the code of the number 1
        zero = 0x0 if weights == "mxfp4" else 0x8
        codes = torch.full((256, 128), zero, dtype=torch.uint8, device="cuda")
        rows = torch.arange(256, device="cuda")
        codes[rows, rows % 128] = one
        layer.fc2[0] = codes[:, ::2] | (codes[:, 1::2] << 4)
        powers = torch.arange(128 * (256 // group), device="cuda").view(1, 128, -1) % 7 - 3
        fc1_scale, fc2_scale = layer.quant_scales
        if weights == "mxfp4":
            fc1_scale.copy_(powers + 127)
            fc2_scale.fill_(127)
        else:
            fc1_scale.copy_(torch.exp2(powers.float()))
            fc2_scale.fill_(1)
        numbers = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)
        values = torch.arange(-8.0, 8.0) if weights != "mxfp4" else torch.tensor(numbers)
        stored = torch.stack((layer.fc1[0] & 15, layer.fc1[0] >> 4), dim=2).view(128, 256)
        weight = values.cuda()[stored.long()] * torch.exp2(powers[0].float()).repeat_interleave(
            group, dim=1
        )
        out = layer.run().float()
        assert torch.equal(out, weight.T.repeat(1, 2))


def test_a_second_gpu() -> None:
    """Tensors on a device that is not the current one: the call goes where they are."""
    require_sm80()
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    with realized(_SMALL) as layer:
        expected = layer.run()
        moved = [t.to("cuda:1") for t in (layer.input, layer.ids, layer.fc1, layer.fc2)]
        assert layer.scales is not None
        out = cutlass_fused_moe(
            moved[0],
            moved[1],
            layer.scales.to("cuda:1"),
            moved[2],
            moved[3],
            torch.bfloat16,
            [],
            activation_type=ActivationType.Swiglu,
        )
        assert out.device == torch.device("cuda:1")
        assert same_bits(out.to("cuda:0"), expected)
