# SPDX-License-Identifier: Apache-2.0
"""vLLM's mixture-of-experts layers on our kernels: its own code where it is installed.

Without vLLM the same tests run on a stand-in of what is used of it, which
`test_the_stand_in_mirrors_vllm` compares with the real one where that is. CPU tensors in both.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import inspect
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import serving_vllm_stand_in as stand_in
from fused_moe import ActivationType, topk_softmax, up_gate_from_gate_up
from fused_moe.integrations import vllm as integration
from fused_moe.reference import reference_moe
from tolerances import assert_close

REAL = importlib.util.find_spec("vllm") is not None
E, K, H, INTER = 8, 2, 64, 48


@dataclasses.dataclass
class Names:
    """What the tests use of vLLM."""

    config: Any
    activation: Any
    experts: Any
    method: Any
    quantization: Any
    custom_op: Any


@pytest.fixture(scope="module")
def vllm() -> Iterator[Names]:
    if REAL:
        # Without a GPU vLLM knows its platform by how its wheel was built; this one is CUDA's.
        platforms = importlib.import_module("vllm.platforms")
        cpu = importlib.import_module("vllm.platforms.cpu").CpuPlatform()
        vars(platforms)["_current_platform"] = cpu
    else:
        stand_in.install()
    integration.register()
    moe = "vllm.model_executor.layers.fused_moe."
    yield Names(
        config=importlib.import_module(moe + "config"),
        activation=importlib.import_module(moe + "activation").MoEActivation,
        experts=importlib.import_module("fused_moe.integrations._vllm_experts"),
        method=importlib.import_module(
            moe + "unquantized_fused_moe_method"
        ).UnquantizedFusedMoEMethod,
        quantization=importlib.import_module("vllm.model_executor.layers.quantization"),
        custom_op=importlib.import_module("vllm.model_executor.custom_op"),
    )
    if not REAL:
        stand_in.uninstall()
        sys.modules.pop("fused_moe.integrations._vllm_experts", None)


@pytest.fixture(autouse=True)
def current_config(vllm: Names) -> Iterator[None]:
    if not REAL:
        yield
        return
    config = importlib.import_module("vllm.config")
    with config.set_current_vllm_config(config.VllmConfig()):
        yield


def configuration(vllm: Names, activation: str = "SILU", **changes: Any) -> Any:
    """One layer on one rank, in vLLM's words."""
    parallel = {
        **dict.fromkeys(("tp_size", "pcp_size", "dp_size", "ep_size", "sp_size"), 1),
        **dict.fromkeys(("tp_rank", "pcp_rank", "dp_rank", "ep_rank"), 0),
        "use_ep": False,
        "all2all_backend": "allgather_reducescatter",
        "enable_eplb": False,
    }
    parallel.update({name: changes.pop(name) for name in list(changes) if name in parallel})
    fields: dict[str, Any] = {
        "num_experts": E,
        "experts_per_token": K,
        "hidden_dim": H,
        "intermediate_size": INTER,
        "num_local_experts": E,
        "num_logical_experts": E,
        "activation": vllm.activation[activation],
        "device": "cpu",
        "routing_method": vllm.config.RoutingMethodType.Renormalize,
        "in_dtype": torch.bfloat16,
    }
    return vllm.config.FusedMoEConfig(
        **{**fields, **changes},
        moe_parallel_config=vllm.config.FusedMoEParallelConfig(**parallel),
    )


class Layer(torch.nn.Module):
    """What a method sees of vLLM's RoutedExperts."""

    expert_map: torch.Tensor | None = None
    apply_router_weight_on_input = False

    def __init__(self, moe: Any, local_experts: int = E, seed: int = 0) -> None:
        super().__init__()
        self.moe_config, self.activation = moe, moe.activation
        self.num_experts = self.local_num_experts = local_experts
        self.global_num_experts = E
        draw = torch.Generator().manual_seed(seed)
        rows = INTER * (2 if moe.activation.is_gated else 1)
        # Different sizes of the halves, so that their order shows.
        grow = torch.linspace(0.5, 2, rows).unsqueeze(1)
        w13 = torch.randn(local_experts, rows, H, generator=draw) / 8 * grow
        self.fill("w13_weight", w13.bfloat16())
        self.fill(
            "w2_weight", (torch.randn(local_experts, H, INTER, generator=draw) / 7).bfloat16()
        )
        if moe.has_bias:
            self.fill("w13_bias", torch.randn(local_experts, rows, generator=draw).bfloat16())
            self.fill("w2_bias", torch.randn(local_experts, H, generator=draw).bfloat16())

    def fill(self, name: str, values: torch.Tensor) -> None:
        """Sets a parameter, in place where it exists, as vLLM's loader does."""
        if hasattr(self, name):
            getattr(self, name).data.copy_(values)
        else:
            self.register_parameter(name, torch.nn.Parameter(values, requires_grad=False))

    def _expert_routing_tables(self) -> None:
        return None


OURS = {
    "SILU": ActivationType.Swiglu,
    "GELU": ActivationType.Geglu,
    "GELU_TANH": ActivationType.GegluTanh,
    "SWIGLUOAI": ActivationType.SwigluBias,
    "SWIGLUOAI_UNINTERLEAVE": ActivationType.SwigluBias,
    "SWIGLUSTEP": ActivationType.SwigluStep,
    "SILU_NO_MUL": ActivationType.Silu,
    "GELU_NO_MUL": ActivationType.Gelu,
    "RELU2_NO_MUL": ActivationType.Relu2,
}


def up_gate(rows: torch.Tensor, activation: str) -> torch.Tensor:
    """vLLM's rows of fc1 in the reference's order."""
    if activation.endswith("_NO_MUL"):
        return rows
    if activation == "SWIGLUOAI":
        return torch.stack([rows[:, 1::2], rows[:, 0::2]], dim=1).reshape(rows.shape)
    return up_gate_from_gate_up(rows)


def expected(
    layer: Layer, x: torch.Tensor, scales: torch.Tensor | None, ids: torch.Tensor, **parameters: Any
) -> torch.Tensor:
    """The float32 reference; call it before the layer is processed."""
    name = layer.activation.name
    tensors = {
        f"swiglu_{key}": torch.full((layer.w13_weight.shape[0],), value)
        for key, value in parameters.items()
    }
    biases = {}
    if layer.moe_config.has_bias:
        biases = {
            "fc1_expert_biases": up_gate(layer.w13_bias.data, name),
            "fc2_expert_biases": layer.w2_bias.data.clone(),
        }
    return reference_moe(
        x,
        ids,
        scales,
        up_gate(layer.w13_weight.data, name),
        layer.w2_weight.data,
        activation_type=OURS[name],
        **biases,
        **tensors,
    )


def routed(tokens: int = 13, k: int = K) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    scales, ids = topk_softmax(torch.randn(tokens, E, generator=draw), k)
    return torch.randn(tokens, H, generator=draw).bfloat16(), scales, ids


@pytest.mark.parametrize("has_bias", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("activation", list(OURS))
def test_layer(vllm: Names, activation: str, has_bias: bool) -> None:
    if REAL and activation.endswith("_NO_MUL"):
        pytest.skip("vLLM takes ungated experts on GPUs only")
    parameters = {}
    changes: dict[str, Any] = {}
    if activation == "SWIGLUOAI":
        parameters = {"alpha": 1.702, "beta": 1.0, "limit": 7.0}
    if activation == "SWIGLUOAI_UNINTERLEAVE":
        parameters = {"alpha": 1.5, "beta": 0.5, "limit": 1.0}
        changes = {f"swiglu_{name}": value for name, value in parameters.items()}
    moe = configuration(vllm, activation, has_bias=has_bias, **changes)
    method = vllm.method(moe)
    assert type(method) is vllm.experts.FusedMoeMethod
    layer = Layer(moe)
    x, scales, ids = routed()
    ref = expected(layer, x, scales, ids, **parameters)
    method.process_weights_after_loading(layer)
    assert_close(method.apply(layer, x, scales, ids, None, None), ref, torch.bfloat16)


def test_clamped_silu(vllm: Names) -> None:
    moe = configuration(vllm, swiglu_limit=0.5)
    method, layer = vllm.method(moe), Layer(moe)
    x, scales, ids = routed()
    draw = expected(layer, x, scales, ids)
    # silu(min(gate, limit)) * clamp(up): SwigluBias with its neutral alpha and beta.
    layer.activation = vllm.activation.SWIGLUOAI_UNINTERLEAVE
    ref = expected(layer, x, scales, ids, limit=0.5)
    layer.activation = moe.activation
    method.process_weights_after_loading(layer)
    out = method.apply(layer, x, scales, ids, None, None)
    assert_close(out, ref, torch.bfloat16)
    assert (out.float() - draw).norm() > 0.05 * draw.norm(), "the limit made no difference"


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_expert_parallel(vllm: Names, ids_dtype: torch.dtype) -> None:
    """A rank that holds experts 6, 1 and 4, and ids that vLLM has struck out."""
    moe = configuration(vllm, ep_size=2, use_ep=True, num_local_experts=3)
    method, layer = vllm.method(moe), Layer(moe, local_experts=3)
    layer.expert_map = torch.full((E,), -1, dtype=torch.int32)
    layer.expert_map[torch.tensor([6, 1, 4])] = torch.arange(3, dtype=torch.int32)
    x, scales, ids = routed(40)
    ids[::7] = -1
    local = torch.where(ids < 0, -1, layer.expert_map[ids.clamp_min(0)])
    ref = expected(layer, x, scales, local)
    method.process_weights_after_loading(layer)
    out = method.apply(layer, x, scales, ids.to(ids_dtype), None, None)
    assert_close(out, ref, torch.bfloat16)
    assert not out[(local < 0).all(dim=1)].any()


def test_router_weight_on_input(vllm: Names) -> None:
    """Llama-4: one expert a token, whose weight multiplies the input."""
    moe = configuration(vllm, experts_per_token=1)
    method, layer = vllm.method(moe), Layer(moe)
    layer.apply_router_weight_on_input = True
    x, _, ids = routed(k=1)
    scales = torch.rand(13, 1) + 0.25
    ref = expected(layer, x * scales.to(x.dtype), None, ids)
    method.process_weights_after_loading(layer)
    assert_close(method.apply(layer, x, scales, ids, None, None), ref, torch.bfloat16)


def test_a_model_that_sums_itself(vllm: Names) -> None:
    moe = configuration(vllm)
    method, layer = vllm.method(moe), Layer(moe)
    method.process_weights_after_loading(layer)
    method.moe_kernel.fused_experts.post_gemm2_hook = print
    with pytest.raises(NotImplementedError, match=r"post_gemm2_hook.* without FUSED_MOE_VLLM"):
        method.apply(layer, *routed(), None, None)


def test_new_weights_keep_their_addresses(vllm: Names) -> None:
    """Captured CUDA graphs read the old addresses when vLLM loads other weights."""
    moe = configuration(vllm, has_bias=True)
    method, layer, other = vllm.method(moe), Layer(moe), Layer(moe, seed=5)
    x, scales, ids = routed()
    method.process_weights_after_loading(layer)
    names = [name for name, _ in layer.named_parameters()]
    addresses = [getattr(layer, name).data_ptr() for name in names]
    ref = expected(other, x, scales, ids)
    for name in names:
        layer.fill(name, getattr(other, name).data)
    method.process_weights_after_loading(layer)
    assert_close(method.apply(layer, x, scales, ids, None, None), ref, torch.bfloat16)
    assert [getattr(layer, name).data_ptr() for name in names] == addresses


@pytest.mark.parametrize("activation", ["SILU", "SWIGLUOAI"])
def test_int8(vllm: Names, activation: str) -> None:
    """`quantization="fused_moe_int8"`: vLLM quantizes while loading, we compute."""
    config = vllm.quantization.get_quantization_config(integration.QUANTIZATION)
    assert config is vllm.experts.FusedMoeInt8Config and config.get_name() == "fused_moe_int8"
    moe = configuration(vllm, activation, has_bias=True)
    routed_experts = vllm.experts.RoutedExperts.__new__(vllm.experts.RoutedExperts)
    torch.nn.Module.__init__(routed_experts)
    routed_experts.moe_config = moe
    method = config().get_quant_method(routed_experts, "model.layers.0.mlp.experts")
    assert type(method) is vllm.experts.FusedMoeInt8Method
    layer = Layer(moe)
    x, scales, ids = routed()
    # The same weights as vLLM rounds them: largest |w| of a row / 127.
    for name in ("w13_weight", "w2_weight"):
        weight = getattr(layer, name).data.float()
        step = weight.abs().amax(dim=2, keepdim=True) / 127
        getattr(layer, name).data = (weight / step).round() * step
    parameters = {"alpha": 1.702, "beta": 1.0, "limit": 7.0} if activation == "SWIGLUOAI" else {}
    ref = expected(layer, x, scales, ids, **parameters)
    method.process_weights_after_loading(layer)
    assert layer.w13_weight.dtype == layer.w2_weight.dtype == torch.int8
    assert_close(method.apply(layer, x, scales, ids, None, None), ref, torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_dim": 60}, "hidden size, 60, is no multiple of 8"),
        ({"intermediate_size": 42}, "intermediate size of a rank, 42"),
        ({"all2all_backend": "passthrough"}, "parallel config"),
        ({"is_lora_enabled": True}, "LoRA"),
        ({"activation": "SITU"}, "activation"),
    ],
    ids=str,
)
def test_what_is_not_ours_is_left_to_vllm(vllm: Names, changes: dict[str, Any], words: str) -> None:
    moe = configuration(vllm, **changes)
    assert words in (vllm.experts.refusal(moe, None) or "")
    with pytest.raises(NotImplementedError, match="experts_int8"):
        vllm.experts.FusedMoeInt8Method(moe=moe)


def test_what_is_logged_once(vllm: Names, caplog: pytest.LogCaptureFixture) -> None:
    if REAL:
        pytest.skip("vLLM has no kernel of its own for such a layer on this machine")
    vllm.experts._say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            method = vllm.method(configuration(vllm, hidden_dim=60))
            assert method.experts_cls is not vllm.experts.FusedMoeExperts
            vllm.method(configuration(vllm, hidden_dim=72))
    assert caplog.text.count("fused_moe does not run this layer, vLLM does") == 1
    assert caplog.text.count("16-bit experts run on fused_moe") == 1


def test_a_named_backend_is_left_alone(vllm: Names) -> None:
    if REAL:
        pytest.skip("vLLM's backends that can be named need a GPU")
    method = vllm.method(configuration(vllm, moe_backend="triton"))
    assert method.experts_cls is not vllm.experts.FusedMoeExperts


def test_register(vllm: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = vllm.custom_op.op_registry_oot
    assert registry["UnquantizedFusedMoEMethod"] is vllm.experts.FusedMoeMethod
    integration.register()
    monkeypatch.setitem(registry, "UnquantizedFusedMoEMethod", Layer)
    with pytest.raises(RuntimeError, match=r"Layer has replaced vLLM's Unquantized"):
        integration.register()
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.330.1")
    with pytest.raises(RuntimeError, match=r"vLLM is 0\.330\.1; .* any_version=True"):
        integration.register()
    integration.register(any_version=True, unquantized=False)


def test_plugin(
    vllm: Names, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = vllm.custom_op.op_registry_oot
    for value, replaced in ((None, False), ("0", False), ("1", True)):
        monkeypatch.delitem(registry, "UnquantizedFusedMoEMethod", raising=False)
        monkeypatch.delenv(integration.VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(integration.VARIABLE, value)
        integration.plugin()
        assert ("UnquantizedFusedMoEMethod" in registry) == replaced
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.26.0")
    with pytest.raises(RuntimeError, match=r"vLLM is 0\.26\.0"):
        integration.plugin()
    monkeypatch.setenv(integration.VARIABLE, "0")
    with caplog.at_level(logging.WARNING):
        integration.plugin()
    assert "fused_moe is not available: vLLM is 0.26.0" in caplog.text
    caplog.clear()
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.33.9")
    monkeypatch.setitem(sys.modules, "fused_moe.integrations._vllm_experts", None)
    with caplog.at_level(logging.WARNING):
        integration.plugin()
    assert "fused_moe is not available: import of" in caplog.text
    monkeypatch.setenv(integration.VARIABLE, "yes")
    with pytest.raises(RuntimeError, match="FUSED_MOE_VLLM is 'yes'"):
        integration.plugin()


GROUP = "vllm.general_plugins"


@pytest.mark.skipif(
    not REAL or "fused_moe" not in importlib.metadata.entry_points(group=GROUP).names,
    reason="vLLM and the wheel of fused_moe are not both installed",
)
def test_vllm_finds_the_plugin(vllm: Names) -> None:
    plugins = importlib.import_module("vllm.plugins")
    assert plugins.load_plugins_by_group(GROUP)["fused_moe"] is integration.plugin


@pytest.mark.skipif(not REAL, reason="vLLM is not installed")
@pytest.mark.parametrize(("module", "mirror", "methods"), stand_in.MIRRORED)
def test_the_stand_in_mirrors_vllm(module: str, mirror: type, methods: tuple[str, ...]) -> None:
    real = getattr(importlib.import_module(module), mirror.__name__)
    for name in methods:
        theirs = inspect.signature(getattr(real, name)).parameters.values()
        ours = inspect.signature(getattr(mirror, name)).parameters.values()
        assert [(p.name, p.kind, p.default) for p in theirs] == [
            (p.name, p.kind, p.default) for p in ours
        ], f"{mirror.__name__}.{name}"
