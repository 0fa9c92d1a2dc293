# SPDX-License-Identifier: Apache-2.0
"""The integrations on a GPU: FlashInfer's example, and vLLM's and SGLang's ways in CUDA graphs.

vLLM and SGLang are stand-ins here (see serving_vllm_stand_in.py): what is tested is our side of
their interfaces, on the GPU's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import serving_frameworks as vllm_tests
import serving_sglang as sglang_tests
from fused_moe.integrations import flashinfer
from fused_moe.reference import reference_moe
from gpu_layer import require_sm80
from serving_frameworks import vllm  # noqa: F401
from serving_sglang import ask_for, sglang  # noqa: F401
from tolerances import assert_close

DEVICE = "cuda"


@pytest.fixture(autouse=True)
def gpu() -> None:
    require_sm80()


def captured(call: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """A CUDA graph of `call`: what replays it, and the output it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph.replay, out


def test_flashinfers_function() -> None:
    """With a workspace of the size that it says, in a CUDA graph, tuned."""
    draw = torch.Generator().manual_seed(0)
    tokens, hidden, inter, experts, k = 65, 256, 128, 8, 2
    x = torch.randn(tokens, hidden, generator=draw).half()
    fc1 = (torch.randn(experts, 2 * inter, hidden, generator=draw) / 16).half()
    fc2 = (torch.randn(experts, hidden, inter, generator=draw) / 11).half()
    weights, ids = torch.topk(torch.rand(tokens, experts, generator=draw).softmax(1), k)
    nbytes = flashinfer.cutlass_fused_moe_workspace_size(
        tokens,
        hidden,
        inter,
        experts,
        k,
        x_dtype=x.dtype,
        weight_dtype=x.dtype,
        output_dtype=x.dtype,
        device=torch.device(DEVICE),
    )
    expected = reference_moe(x, ids, weights, fc1, fc2)
    on_gpu = [t.to(DEVICE) for t in (x, ids.int(), weights, fc1, fc2)]
    workspace = torch.empty(nbytes, dtype=torch.uint8, device=DEVICE)
    output = torch.empty_like(on_gpu[0])
    x_gpu, ids_gpu, weights_gpu, fc1_gpu, fc2_gpu = on_gpu

    def call() -> torch.Tensor:
        [out] = flashinfer.cutlass_fused_moe(
            x_gpu,
            ids_gpu,
            weights_gpu,
            fc1_gpu,
            fc2_gpu,
            torch.float16,
            [],
            output=output,
            workspace_buffer=workspace,
        )
        assert out is output
        return output

    with flashinfer.autotune(tuning_buckets=(64,)):
        call()
    replay, out = captured(call)
    output.fill_(float("nan"))
    replay()
    assert_close(out.cpu(), expected, torch.float16)


@pytest.mark.parametrize("activation", ["SILU", "SWIGLUOAI"])
def test_vllm_reloads_under_a_graph(vllm: Any, activation: str) -> None:  # noqa: F811
    """A graph that was captured before vLLM loads other weights computes with those."""
    moe = vllm_tests.configuration(vllm, activation, has_bias=True, device=DEVICE)
    method = vllm.method(moe)
    layer, other = vllm_tests.Layer(moe), vllm_tests.Layer(moe, seed=5)
    x, scales, ids = vllm_tests.routed()
    given = {"alpha": 1.702, "beta": 1.0, "limit": 7.0} if activation == "SWIGLUOAI" else {}
    refs = [vllm_tests.expected(each, x, scales, ids, **given) for each in (layer, other)]
    layer.to(DEVICE)
    method.process_weights_after_loading(layer)
    on_gpu = [t.to(DEVICE) for t in (x, scales, ids)]
    replay, out = captured(lambda: method.apply(layer, *on_gpu, None, None))
    replay()
    assert_close(out.cpu(), refs[0], torch.bfloat16)
    for name, parameter in other.named_parameters():
        layer.fill(name, parameter.data)
    method.process_weights_after_loading(layer)
    replay()
    assert_close(out.cpu(), refs[1], torch.bfloat16)


@pytest.mark.parametrize("backend", ["fused_moe", "fused_moe_int8"])
def test_sglang_under_a_graph(
    backend: str,
    sglang: None,  # noqa: F811
    ask_for: Callable[[str], None],  # noqa: F811
) -> None:
    ask_for(backend)
    layer = sglang_tests.Layer(with_bias=True, routed_scaling_factor=2.5)
    for weight in (layer.w13_weight, layer.w2_weight):
        q = torch.randint(-127, 128, weight.shape, generator=torch.Generator().manual_seed(3))
        q[:, :, 0] = 127
        weight.data.copy_(q * 2**-9)
    x, scales, ids = sglang_tests.routed()
    ref = layer.expected(x, scales * 2.5, ids)
    layer.to(DEVICE)
    layer.method.process_weights_after_loading(layer)
    on_gpu = [t.to(DEVICE) for t in (x, scales, ids)]
    replay, out = captured(lambda: layer.run(*on_gpu))
    replay()
    assert_close(out.cpu(), ref, torch.bfloat16)


@pytest.mark.parametrize("name", ["silu", "gpt-oss"])
def test_sglang_updates_under_a_graph(name: str, sglang: None) -> None:  # noqa: F811
    """A graph that was captured before a session of updates computes with the new weights."""
    config, activation, parameters = sglang_tests.CASES[name]
    layer = sglang_tests.Layer(with_bias=True, **config)
    x, scales, ids = sglang_tests.routed()
    refs = [layer.expected(x, scales, ids, activation, **parameters)]
    layer.to(DEVICE)
    method = layer.method
    method.process_weights_after_loading(layer)
    on_gpu = [t.to(DEVICE) for t in (x, scales, ids)]
    replay, out = captured(lambda: layer.run(*on_gpu))
    for new in (False, True):
        method.restore_weights_before_loading(layer)
        if new:
            layer.load(seed=9)
            other = sglang_tests.Layer(seed=9, with_bias=True, **config)
            refs.append(other.expected(x, scales, ids, activation, **parameters))
        method.process_weights_after_loading(layer)
        replay()
        assert_close(out.cpu(), refs[-1], torch.bfloat16)
