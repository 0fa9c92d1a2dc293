# SPDX-License-Identifier: Apache-2.0
"""What vLLM and SGLang do to loaded weights: load others, move experts, give up memory, share it.

On their own code or on stand-ins of it, as in serving_frameworks.py and serving_sglang.py.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import serving_frameworks as in_vllm
import serving_sglang as in_sglang
from fused_moe.integrations._activation_parameters import for_each_expert
from serving_frameworks import current_config, vllm  # noqa: F401
from serving_sglang import ask_for, sglang  # noqa: F401
from tolerances import assert_close

GPT_OSS = {"alpha": 1.702, "beta": 1.0, "limit": 7.0}


def tensors() -> dict[int, torch.Tensor]:
    """All that there are, by address of the object."""
    kinds = (torch.Tensor, torch.nn.Parameter)
    return {id(each): each for each in gc.get_objects() if type(each) in kinds}


def lose(memory: Iterable[torch.Tensor]) -> None:
    """What becomes of memory for weights that a server gave up, and took again."""
    for tensor in memory:
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 77)


@pytest.mark.parametrize("activation", ["SILU", "SWIGLUOAI", "SWIGLUOAI_UNINTERLEAVE"])
def test_vllm_sleeps(vllm: Any, activation: str) -> None:  # noqa: F811
    """Level 2: what was allocated while the model was loaded is lost, then weights come again."""
    given = {} if activation == "SILU" else GPT_OSS
    changes = {f"swiglu_{n}": v for n, v in given.items()} if activation.endswith("LEAVE") else {}
    moe = in_vllm.configuration(vllm, activation, has_bias=True, **changes)
    before = tensors()
    method, layer = vllm.method(moe), in_vllm.Layer(moe)
    method.process_weights_after_loading(layer)
    while_loading = [tensor for key, tensor in tensors().items() if key not in before]
    x, scales, ids = in_vllm.routed()
    for seed in (5, 6):
        other = in_vllm.Layer(moe, seed=seed)
        ref = in_vllm.expected(other, x, scales, ids, **given)
        lose(while_loading)
        for name, parameter in other.named_parameters():
            layer.fill(name, parameter.data)
        method.process_weights_after_loading(layer)
        assert_close(method.apply(layer, x, scales, ids, None, None), ref, torch.bfloat16)


@pytest.mark.parametrize("int8", [False, True], ids=["16-bit", "int8"])
def test_vllm_loads_in_its_ways_only(vllm: Any, int8: bool) -> None:  # noqa: F811
    """`model.load_weights` without vLLM's reload_weights would put the gate where up belongs."""
    moe = in_vllm.configuration(vllm, has_bias=True)
    layer = in_vllm.Layer(moe)
    layer._map_global_expert_id_to_local_expert_id = lambda expert: -1 if expert == 7 else expert

    def loads(param: torch.nn.Parameter, *rest: Any, **more: Any) -> bool:
        return True

    for parameter in layer.parameters():
        parameter.weight_loader = loads
    method = vllm.experts.FusedMoeInt8Method(moe=moe) if int8 else vllm.method(moe)
    # A cache of processed weights is keyed by what does not tell our order from vLLM's.
    assert not method.supports_pre_processed_weights
    for _ in range(2):
        method.process_weights_after_loading(layer)
        for name in ("w13_weight", "w13_bias", "w2_weight"):
            parameter = getattr(layer, name)
            arguments = (parameter, torch.zeros(1), f"experts.{name}", "w1")
            if name == "w2_weight" and not int8:  # as it was in the checkpoint
                assert parameter.weight_loader(*arguments, 3, return_success=True)
                continue
            with pytest.raises(RuntimeError, match=rf"experts\.{name} is in .*reload_weights"):
                parameter.weight_loader(*arguments, 3, return_success=True)
            assert parameter.weight_loader(*arguments, 7, return_success=True) is False


def test_vllm_in_float32(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """The GPU's kernels take 16 bits, so that vLLM's own have to run such a layer."""
    gpu = types.SimpleNamespace(
        is_cpu=lambda: False, is_cuda=lambda: True, has_device_capability=lambda least: True
    )
    monkeypatch.setattr(vllm.experts, "current_platform", gpu)
    for dtype, taken in ((torch.float32, False), (torch.bfloat16, True), (torch.float16, True)):
        reason = vllm.experts.refusal(in_vllm.configuration(vllm, in_dtype=dtype), None)
        assert (reason is None) == taken and (taken or "torch.float32" in str(reason))


def test_parameters_under_a_tracer() -> None:
    """What a tracer made in their place holds no numbers, and is not kept."""
    device = torch.device("cpu")
    with FakeTensorMode():
        assert isinstance(for_each_expert(0.125, 3, device), FakeTensor)
    made = for_each_expert(0.125, 3, device)
    assert made is not None and made.tolist() == [0.125] * 3
    assert for_each_expert(0.125, 3, device) is made and for_each_expert(None, 3, device) is None


SGLANG = ["silu", "gpt-oss", "halves", "relu2"]


@pytest.mark.parametrize("name", SGLANG)
def test_sglangs_sessions(name: str, sglang: None) -> None:  # noqa: F811
    """Updates of weights, with and without weights of the experts in them."""
    config, activation, parameters = in_sglang.CASES[name]
    layer = in_sglang.Layer(with_bias=True, **config)
    method, inputs = layer.method, in_sglang.routed()
    ref = layer.expected(*inputs, activation, **parameters)
    addresses = [parameter.data_ptr() for parameter in layer.parameters()]

    def check() -> None:
        assert_close(layer.run(*inputs), ref, torch.bfloat16)

    method.process_weights_after_loading(layer)
    check()
    # begin_weight_update, then end_weight_update: other layers' weights alone. A health check may
    # come between them.
    method.restore_weights_before_loading(layer)
    check()
    method.process_weights_after_loading(layer)
    check()
    # update_weights_from_ipc ends with processing all layers and begins with nothing.
    method.process_weights_after_loading(layer)
    check()
    layer.load(seed=9)
    ref = layer.expected(*inputs, activation, **parameters)
    method.process_weights_after_loading(layer)
    check()
    # load_format="direct": into the parameters, without a loader.
    method.restore_weights_before_loading(layer)
    other = in_sglang.Layer(seed=10, with_bias=True, **config)
    for into, values in zip(layer.parameters(), other.parameters(), strict=True):
        into.data.copy_(values)
    ref = layer.expected(*inputs, activation, **parameters)
    method.process_weights_after_loading(layer)
    check()
    kept = [parameter.data_ptr() for parameter in layer.parameters()]
    # Biases become 16-bit tensors once.
    assert [a for a, p in zip(addresses, layer.parameters(), strict=True) if p.dim() == 3] == [
        a for a, p in zip(kept, layer.parameters(), strict=True) if p.dim() == 3
    ]
    method.restore_weights_before_loading(layer)
    method.process_weights_after_loading(layer)
    assert [parameter.data_ptr() for parameter in layer.parameters()] == kept


@pytest.mark.parametrize("backend", ["fused_moe", "fused_moe_int8"])
def test_sglang_moves_experts(
    backend: str,
    sglang: None,  # noqa: F811
    ask_for: Callable[[str], None],  # noqa: F811
) -> None:
    """EPLB exchanges rows of the parameters: what belongs to an expert has to be in them."""
    ask_for(backend)
    layer = in_sglang.Layer(with_bias=True, gemm1_alpha=1.702, gemm1_clamp_limit=7.0)
    layer.method.process_weights_after_loading(layer)
    x, scales, ids = in_sglang.routed()
    expected = layer.run(x, scales, ids)
    # Where each expert goes.
    places = torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])
    for parameter in layer.parameters():
        assert parameter.shape[0] == in_sglang.E
        parameter.data[places] = parameter.data.clone()
    assert torch.equal(layer.run(x, scales, places[ids.long()].int()), expected)


def test_sglang_releases_memory(sglang: None) -> None:  # noqa: F811
    """release_memory_occupation loses what was loaded; resuming, weights come in a session."""
    before = tensors()
    layer = in_sglang.Layer(with_bias=True, gemm1_alpha=1.702, gemm1_clamp_limit=7.0)
    layer.method.process_weights_after_loading(layer)
    while_loading = [tensor for key, tensor in tensors().items() if key not in before]
    inputs = in_sglang.routed()
    layer.run(*inputs)
    lose(while_loading)
    layer.method.restore_weights_before_loading(layer)
    layer.load(seed=9)
    ref = layer.expected(*inputs, in_sglang.ActivationType.SwigluBias, **GPT_OSS)
    layer.method.process_weights_after_loading(layer)
    assert_close(layer.run(*inputs), ref, torch.bfloat16)


def test_sglangs_int8_is_loaded_once(
    sglang: None,  # noqa: F811
    ask_for: Callable[[str], None],  # noqa: F811
) -> None:
    ask_for("fused_moe_int8")
    layer = in_sglang.Layer(with_bias=True)
    layer.method.process_weights_after_loading(layer)
    expected = layer.run(*in_sglang.routed())
    # SGLang's answer to all updates of weights.
    assert "fused_moe_int8" in layer._derived_weight_cache_error
    with pytest.raises(RuntimeError, match=r"fused_moe_int8 quantized .* restart"):
        layer.load(seed=9)
    layer.method.restore_weights_before_loading(layer)
    layer.method.process_weights_after_loading(layer)
    assert torch.equal(layer.run(*in_sglang.routed()), expected)


def test_sglangs_weight_cache(sglang: None) -> None:  # noqa: F811
    """It brings weights that another process has prepared, in an order that is not known."""
    layer = in_sglang.Layer()
    with pytest.raises(RuntimeError, match="--weight-cache-mode off"):
        layer.run(*in_sglang.routed())
