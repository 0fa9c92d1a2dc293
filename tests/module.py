# SPDX-License-Identifier: Apache-2.0
"""`FusedMoE` against models' own formulas, in every layout, format and way of running it."""

from __future__ import annotations

import importlib.util
import pathlib
import re
from typing import Any

import pytest
import torch

from fused_moe import ActivationType, FusedMoE, Routing
from fused_moe.module import Experts, Router, SharedExperts
from fused_moe.reference import reference_moe
from module_layers import (
    DEVICES,
    DTYPES,
    EVERYTHING,
    EXPERTS,
    FORMATS,
    HIDDEN,
    INTERMEDIATE,
    Checkpoint,
    mixtral_routing,
    needs_gpu,
    normal,
    random_layer,
    swiglu,
    tokens,
)
from tolerances import assert_close, relative_error

# Relative error that a format may bring to the output of these layers, over its weights': their
# steps are 1/127, 1/7.5 and about 1/6 of the largest weight, of groups of 32 numbers.
QUANTIZATION_ERRORS = {"int8": 0.02, "uint8": 0.02, "int4": 0.25, "mxfp4": 0.3}


def gpt_oss_glu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gpt_oss/torch/model.py, swiglu, with alpha 1.702 and limit 7 (here 0.5, to clamp)."""
    gate, up = gate.clamp(max=0.5), up.clamp(-0.5, 0.5)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def reference(layer: FusedMoE, x: torch.Tensor) -> torch.Tensor:
    """The layer in float32, with its own routing and its weights as its tensors say."""
    flat = x.reshape(-1, HIDDEN)
    scales, ids = layer.router(flat)
    e = layer.experts
    return reference_moe(
        flat,
        ids,
        scales,
        e.fc1_weight,
        e.fc2_weight,
        [e.fc1_scale, e.fc2_scale] if e.fc1_scale is not None else None,
        fc1_expert_biases=e.fc1_bias,
        fc2_expert_biases=e.fc2_bias,
        swiglu_alpha=e.swiglu_alpha,
        swiglu_beta=e.swiglu_beta,
        swiglu_limit=e.swiglu_limit,
        activation_type=e.activation,
        **e.format.call_arguments,
    ).view(x.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["experts", "gate_up", "transposed", "interleaved"])
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    checkpoint, routing = Checkpoint(dtype), Routing(2)
    gate_up, down = checkpoint.fused()
    if layout == "experts":
        layer = FusedMoE.from_experts(
            checkpoint.router, checkpoint.w1, checkpoint.w2, checkpoint.w3, routing
        )
    elif layout == "gate_up":
        layer = FusedMoE.from_gate_up(checkpoint.router, gate_up, down, routing)
    elif layout == "transposed":
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        layer = FusedMoE.from_gate_up(checkpoint.router, gate_up, down, routing, transposed=True)
    else:
        gate_up, down = checkpoint.interleaved()
        layer = FusedMoE.from_gate_up(
            checkpoint.router, gate_up, down, routing, transposed=True, interleaved=True
        )
    x = tokens(dtype=dtype)
    scales, ids = mixtral_routing(x @ checkpoint.router.T)
    out = layer(x)
    assert out.dtype == dtype and out.shape == x.shape
    assert_close(out, checkpoint.run(x, ids, scales, swiglu), dtype)


def test_gpt_oss() -> None:
    checkpoint = Checkpoint(biases=True)
    gate_up, down = checkpoint.interleaved()
    assert checkpoint.b1 is not None and checkpoint.b3 is not None
    router_bias = normal(EXPERTS, seed=4).bfloat16()
    layer = FusedMoE.from_gate_up(
        checkpoint.router,
        gate_up,
        down,
        Routing(4),
        transposed=True,
        interleaved=True,
        gate_up_bias=torch.stack([checkpoint.b1, checkpoint.b3], dim=2).view(EXPERTS, -1),
        down_bias=checkpoint.b2,
        router_bias=router_bias,
        activation=ActivationType.SwigluBias,
        swiglu_alpha=1.702,
        swiglu_beta=1.0,
        swiglu_limit=0.5,
    )
    x = tokens()
    logits = torch.nn.functional.linear(x, checkpoint.router, router_bias)
    values, ids = torch.topk(logits.float(), 4)
    expected = checkpoint.run(x, ids, torch.softmax(values, dim=1), gpt_oss_glu)
    assert_close(layer(x), expected, torch.bfloat16)


def test_not_gated() -> None:
    """Nemotron: up_proj and down_proj, squared ReLU."""
    checkpoint = Checkpoint()
    layer = FusedMoE.from_experts(
        checkpoint.router,
        checkpoint.w1,
        checkpoint.w2,
        None,
        Routing(2),
        activation=ActivationType.Relu2,
    )
    x = tokens()
    scales, ids = mixtral_routing(x @ checkpoint.router.T)
    expected = checkpoint.run(x, ids, scales, lambda up, _: torch.relu(up) ** 2)
    assert_close(layer(x), expected, torch.bfloat16)


@pytest.mark.parametrize("scale_gate", [False, True])
def test_shared_experts(scale_gate: bool) -> None:
    """modeling_deepseek_v3.py, DeepseekV3MoE; modeling_qwen3_next.py, Qwen3NextSparseMoeBlock."""
    checkpoint = Checkpoint()
    gate_up, down = checkpoint.fused()
    gate, up = (normal(40, HIDDEN, seed=s, size=HIDDEN**-0.5).bfloat16() for s in (5, 6))
    shared_down = normal(HIDDEN, 40, seed=7, size=40**-0.5).bfloat16()
    gate_weight = normal(1, HIDDEN, seed=8).bfloat16()
    bias = normal(EXPERTS, seed=9)
    layer = FusedMoE.from_gate_up(
        checkpoint.router,
        gate_up,
        down,
        Routing.deepseek_v3(2, 4, 2, 2.5),
        correction_bias=bias,
        shared_gate_up=torch.cat([gate, up]),
        shared_down=shared_down,
        shared_scale_gate=gate_weight if scale_gate else None,
    )
    x = tokens()
    scores = torch.sigmoid((x @ checkpoint.router.T).float())
    best_two = (scores + bias).view(-1, 4, 2).sum(dim=2).topk(2).indices
    allowed = torch.zeros(len(x), 4).scatter(1, best_two, 1).repeat_interleave(2, dim=1)
    ids = (scores + bias).masked_fill(allowed == 0, -torch.inf).topk(2).indices
    scales = scores.gather(1, ids)
    scales = 2.5 * scales / scales.sum(dim=1, keepdim=True)
    xf = x.float()
    shared = swiglu(xf @ gate.float().T, xf @ up.float().T) @ shared_down.float().T
    if scale_gate:
        shared = torch.sigmoid(xf @ gate_weight.float().T) * shared
    expected = checkpoint.run(x, ids, scales, swiglu) + shared
    assert_close(layer(x), expected, torch.bfloat16)


def test_llama4_scales_the_input() -> None:
    """modeling_llama4.py, Llama4TextMoe: experts of scores * x, and a shared expert."""
    checkpoint = Checkpoint(torch.float32)
    gate_up, down = (t.transpose(1, 2) for t in checkpoint.fused())
    layer = FusedMoE.from_gate_up(
        checkpoint.router,
        gate_up,
        down,
        Routing.llama4(),
        transposed=True,
        apply_router_weight_on_input=True,
    )
    x = tokens(dtype=torch.float32)
    logits, ids = torch.topk(x @ checkpoint.router.T, 1)
    expected = checkpoint.run(x * torch.sigmoid(logits), ids, torch.ones(len(x), 1), swiglu)
    assert_close(layer(x), expected, torch.float32)
    with pytest.raises(ValueError, match="apply_router_weight_on_input is True with top_k 2"):
        random_layer(apply_router_weight_on_input=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("model", ["mixtral", "gpt_oss", "nemotron"])
def test_formats(model: str, weight_format: str, device: str) -> None:
    layer = random_layer(model).to(device)
    x = tokens().to(device)
    before = layer(x)
    if weight_format != "same":
        assert layer.quantize(weight_format) is layer
        error = relative_error(layer(x), before)
        assert 1e-3 < error < QUANTIZATION_ERRORS[weight_format]
    assert layer.experts.weight_format == weight_format
    assert_close(layer(x), reference(layer, x), torch.bfloat16)
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("group_size", [32, 64])
def test_group_sizes(group_size: int) -> None:
    layer = FusedMoE(128, 64, 4, Routing(2), weight_format="int4", group_size=group_size)
    assert layer.experts.fc1_scale is not None
    assert layer.experts.fc1_scale.shape == (4, 128, 128 // group_size)
    assert FusedMoE(128, 64, 4, Routing(2), weight_format="int4").experts.format.group_size == 64


@pytest.mark.parametrize("shape", [(HIDDEN,), (0, HIDDEN), (1, HIDDEN), (2, 3, 4, HIDDEN)])
def test_shapes(shape: tuple[int, ...]) -> None:
    layer = random_layer("qwen3_next")
    x = normal(*shape, seed=1).bfloat16()
    assert layer(x).shape == x.shape
    assert torch.equal(layer(x).view(-1, HIDDEN), layer(x.view(-1, HIDDEN)))
    # A view whose rows are not contiguous is the same input.
    wide = torch.cat([x, x], dim=-1)[..., :HIDDEN]
    assert torch.equal(layer(wide), layer(x))


@pytest.mark.parametrize("kind", ["tp", "ep"])
def test_ranks_add_up(kind: str) -> None:
    """Two ranks' results are a sum that equals one rank's layer, biases and shared included."""
    checkpoint, x = Checkpoint(biases=True), tokens()
    assert checkpoint.b1 is not None and checkpoint.b3 is not None and checkpoint.b2 is not None
    gate_up, down = checkpoint.fused()
    bias = torch.cat([checkpoint.b1, checkpoint.b3], dim=1)
    shared = normal(2, 16, HIDDEN, seed=5, size=0.1).bfloat16()
    shared_down = normal(HIDDEN, 16, seed=6, size=0.2).bfloat16()
    parts = []
    for rank in range(2):
        i = slice(rank * INTERMEDIATE // 2, (rank + 1) * INTERMEDIATE // 2)
        e = slice(rank * EXPERTS // 2, (rank + 1) * EXPERTS // 2)
        s = slice(rank * 8, rank * 8 + 8)
        both = gate_up.view(EXPERTS, 2, INTERMEDIATE, HIDDEN)
        halves = bias.view(EXPERTS, 2, INTERMEDIATE)
        tp = kind == "tp"
        ranks: dict[str, Any] = {f"{kind}_size": 2, f"{kind}_rank": rank}
        layer = FusedMoE.from_gate_up(
            checkpoint.router,
            both[:, :, i].reshape(EXPERTS, -1, HIDDEN) if tp else gate_up[e],
            down[:, :, i].contiguous() if tp else down[e],
            Routing(2),
            gate_up_bias=halves[:, :, i].reshape(EXPERTS, -1) if tp else bias[e],
            down_bias=checkpoint.b2 if tp else checkpoint.b2[e],
            shared_gate_up=shared[:, s].reshape(16, HIDDEN),
            shared_down=shared_down[:, s].contiguous(),
            **ranks,
        )
        parts.append(layer(x).float())
    whole = FusedMoE.from_gate_up(
        checkpoint.router,
        gate_up,
        down,
        Routing(2),
        gate_up_bias=bias,
        down_bias=checkpoint.b2,
        shared_gate_up=shared.view(32, HIDDEN),
        shared_down=shared_down,
    )
    assert_close(sum(parts[1:], parts[0]), whole(x).float(), torch.bfloat16)
    scales, ids = mixtral_routing(x @ checkpoint.router.T)
    assert relative_error(parts[0], checkpoint.run(x, ids, scales, swiglu)) > 0.1


def compilers(device: str) -> list[str]:
    """Inductor where it can make code: on a CPU it would need a C++ compiler, too.

    "eager" would show no more than "aot_eager", which traces the same and then makes it functional.
    """
    triton = device != "cpu" and importlib.util.find_spec("triton")
    return ["aot_eager", "inductor"] if triton else ["aot_eager"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", EVERYTHING)
def test_compile(model: str, device: str) -> None:
    for weight_format in ("same", "int8", "int4"):
        layer = random_layer(model).to(device)
        if weight_format != "same":
            layer.quantize(weight_format)
        for compiler in compilers(device):
            torch.compiler.reset()
            compiled = torch.compile(layer, fullgraph=True, backend=compiler)
            for count in (12, 5, 9):
                x = tokens(count).to(device)
                if compiler == "inductor":  # it rounds the shared experts in other places
                    assert_close(compiled(x), layer(x), torch.bfloat16)
                else:
                    assert torch.equal(compiled(x), layer(x))


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("model", EVERYTHING)
def test_cuda_graph(model: str, weight_format: str, compiled: bool) -> None:
    layer = random_layer(model).cuda()
    if weight_format != "same":
        layer.quantize(weight_format)
    run: Any = layer
    if compiled:
        torch.compiler.reset()
        run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = tokens(16).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x)
    for seed in range(3):
        x.copy_(normal(16, HIDDEN, seed=seed))
        graph.replay()
        assert torch.equal(out, layer(x.clone()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_format", ["same", "int8", "mxfp4"])
@pytest.mark.parametrize("model", EVERYTHING)
def test_autocast(model: str, weight_format: str, device: str) -> None:
    """float32 tokens are rounded as a linear layer's; the router keeps its own dtype."""
    layer, x = random_layer(model).to(device), tokens(100).to(device)
    if weight_format != "same":
        layer.quantize(weight_format)
    scales, ids = layer.router(x)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, torch.bfloat16):
        for found, wanted in zip(layer.router(x), (scales, ids), strict=True):
            assert torch.equal(found, wanted)
        assert torch.equal(layer(x), expected)
        out = layer(x.float())
        torch.compiler.reset()
        assert torch.equal(compiled(x.float()), out)
    assert out.dtype == torch.float32
    assert torch.equal(out.bfloat16(), expected)


def test_parts_alone() -> None:
    layer, x = random_layer("qwen3_next"), tokens()
    router, experts, shared = layer.router, layer.experts, layer.shared_experts
    assert isinstance(router, Router) and isinstance(experts, Experts)
    assert isinstance(shared, SharedExperts)
    scales, ids = router(x)
    assert torch.equal(experts(x, ids, scales) + shared(x), layer(x))
    assert "int8" in repr(layer.quantize("int8")) and "bfloat16[8, 64]" in repr(layer)


def test_the_page() -> None:
    """The first program of docs/module.md, as it stands there."""
    page = pathlib.Path(__file__).absolute().parent.parent / "docs" / "module.md"
    programs = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(programs[0], names)
    assert names["y"].shape == names["x"].shape and names["y"].isfinite().all()
