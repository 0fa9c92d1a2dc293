# SPDX-License-Identifier: Apache-2.0
"""SGLang's mixture-of-experts layers on our kernels: its own code where it is installed.

Without SGLang the same tests run on a stand-in of what is used of it, which
`test_the_stand_in_mirrors_sglang` compares with the real one where that is. CPU tensors in both.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import serving_sglang_stand_in as stand_in
from fused_moe import ActivationType, topk_softmax, up_gate_from_gate_up
from fused_moe.integrations import sglang as integration
from fused_moe.reference import reference_moe
from tolerances import assert_close

REAL = importlib.util.find_spec("sglang") is not None
E, K, H, INTER = 8, 2, 64, 48
UNQUANT = "sglang.srt.layers.quantization.unquant"


def of(module: str, name: str) -> Any:
    """A name of SGLang, whichever of the two it is."""
    return getattr(importlib.import_module("sglang.srt." + module), name)


@pytest.fixture(scope="module", autouse=True)
def sglang() -> Iterator[None]:
    if not REAL:
        stand_in.install()
    integration.register()
    # What load_plugins does once all plugins have run.
    of("plugins.hook_registry", "HookRegistry").apply_hooks()
    yield
    if not REAL:
        stand_in.uninstall()
        for ours in ("_sglang_runner", "_sglang_weights"):
            sys.modules.pop(f"fused_moe.integrations.{ours}", None)


@pytest.fixture(autouse=True)
def ask_for() -> Iterator[Callable[[str], None]]:
    """Sets what --moe-runner-backend says."""
    flags = of("runtime_context", "get_flags")().moe

    def ask(name: str) -> None:
        flags.runner_backend = of("layers.moe.utils", "resolve_moe_runner_backend")(name)

    ask("fused_moe")
    yield ask
    flags.runner_backend = None


class Layer(torch.nn.Module):
    """What a method sees of SGLang's FusedMoE, its weights in SGLang's order."""

    def __init__(self, seed: int = 0, with_bias: bool = False, **config: Any) -> None:
        super().__init__()
        self.num_experts = self.num_local_experts = E
        self.hidden_size, self.intermediate_size_per_partition = H, INTER
        self.moe_runner_config = of("layers.moe.moe_runner.base", "MoeRunnerConfig")(
            num_experts=E,
            num_local_experts=E,
            intermediate_size_per_partition=INTER,
            num_fused_shared_experts=0,
            params_dtype=torch.bfloat16,
            layer=self,
            **{"hidden_size": H, "top_k": K, **config},
        )
        self.method = of("layers.quantization.unquant", "UnquantizedFusedMoEMethod")()
        self.method.create_weights(self, E, H, INTER, torch.bfloat16, with_bias=with_bias)
        self.method.create_moe_runner(self, self.moe_runner_config)
        self.load(seed)

    def load(self, seed: int) -> None:
        """New random weights, in place, as SGLang's loaders of experts do it."""
        draw = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            self.method.maybe_restore_flashinfer_trtllm_bf16_weight_shape_for_load(
                layer=self, param=parameter, weight_name=name
            )
            deviation = 1.0 if name.endswith("bias") else parameter.shape[2] ** -0.5
            values = torch.randn(parameter.shape, generator=draw) * deviation
            # Biases are float32 there and come from bfloat16 checkpoints.
            parameter.data.copy_(values.bfloat16())

    def expected(
        self,
        x: torch.Tensor,
        scales: torch.Tensor | None,
        ids: torch.Tensor,
        activation: ActivationType = ActivationType.Swiglu,
        **parameters: float,
    ) -> torch.Tensor:
        """The float32 reference; call it before the layer is processed."""
        config = self.moe_runner_config

        def ours(rows: torch.Tensor) -> torch.Tensor:
            if not activation.is_gated:
                return rows
            if config.gemm1_alpha is not None and config.gate_up_interleaved:
                return torch.stack([rows[:, 1::2], rows[:, 0::2]], dim=1).reshape(rows.shape)
            return up_gate_from_gate_up(rows)

        tensors = {f"swiglu_{name}": torch.full((E,), v) for name, v in parameters.items()}
        if hasattr(self, "w13_weight_bias"):
            tensors["fc1_expert_biases"] = ours(self.w13_weight_bias.data)
            tensors["fc2_expert_biases"] = self.w2_weight_bias.data
        return reference_moe(
            x,
            ids,
            scales,
            ours(self.w13_weight.data),
            self.w2_weight.data.clone(),
            activation_type=activation,
            **tensors,
        )

    def run(self, x: torch.Tensor, scales: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.method.apply(self, dispatched(x, scales, ids)).hidden_states


def dispatched(x: torch.Tensor, scales: torch.Tensor, ids: torch.Tensor) -> Any:
    top_k = of("layers.moe.topk", "StandardTopKOutput")(scales, ids, None)
    return of("layers.moe.token_dispatcher.standard", "StandardDispatchOutput")(x, None, top_k)


def routed(k: int = K) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    scales, ids = topk_softmax(torch.randn(13, E, generator=draw), k)
    return torch.randn(13, H, generator=draw).bfloat16(), scales, ids


# SGLang's configuration, then our activation and its parameters.
CASES: dict[str, tuple[dict[str, Any], ActivationType, dict[str, float]]] = {
    "silu": ({}, ActivationType.Swiglu, {}),
    "gelu": ({"activation": "gelu"}, ActivationType.Geglu, {}),
    "gelu_tanh": ({"activation": "gelu_tanh"}, ActivationType.GegluTanh, {}),
    "gpt-oss": (
        {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0},
        ActivationType.SwigluBias,
        {"alpha": 1.702, "beta": 1.0, "limit": 7.0},
    ),
    "halves": (
        {"gemm1_alpha": 1.5, "gemm1_clamp_limit": 0.5, "gate_up_interleaved": False},
        ActivationType.SwigluBias,
        {"alpha": 1.5, "beta": 1.0, "limit": 0.5},
    ),
    "clamped-after": ({"gemm1_clamp_limit": 0.25}, ActivationType.SwigluStep, {"limit": 0.25}),
    "clamped-before": ({"swiglu_limit": 0.25}, ActivationType.SwigluBias, {"limit": 0.25}),
    "plain-silu": ({"is_gated": False}, ActivationType.Silu, {}),
    "plain-gelu": ({"is_gated": False, "activation": "gelu"}, ActivationType.Gelu, {}),
    "relu2": ({"is_gated": False, "activation": "relu2"}, ActivationType.Relu2, {}),
}


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("name", list(CASES))
def test_layer(name: str, with_bias: bool) -> None:
    config, activation, parameters = CASES[name]
    layer = Layer(with_bias=with_bias, **config)
    inputs = routed()
    ref = layer.expected(*inputs, activation, **parameters)
    layer.method.process_weights_after_loading(layer)
    assert_close(layer.run(*inputs), ref, torch.bfloat16)


@pytest.mark.parametrize("name", ["silu", "gpt-oss", "relu2"])
def test_int8(name: str, ask_for: Callable[[str], None]) -> None:
    ask_for("fused_moe_int8")
    config, activation, parameters = CASES[name]
    layer = Layer(with_bias=True, **config)
    for weight in (layer.w13_weight, layer.w2_weight):
        # Whole numbers up to 127 times a power of two: exact in bfloat16 and in INT8.
        q = torch.randint(-127, 128, weight.shape, generator=torch.Generator().manual_seed(3))
        q[:, :, 0] = 127
        weight.data.copy_(q * 2**-9)
    inputs = routed()
    ref = layer.expected(*inputs, activation, **parameters)
    layer.method.process_weights_after_loading(layer)
    assert layer.w13_weight.dtype == layer.w2_weight.dtype == torch.int8
    assert_close(layer.run(*inputs), ref, torch.bfloat16)


def test_ids_of_other_ranks() -> None:
    layer = Layer()
    x, scales, ids = routed()
    ids[::3] = -1
    ref = layer.expected(x, scales, ids)
    layer.method.process_weights_after_loading(layer)
    out = layer.run(x, scales, ids.long())
    assert_close(out, ref, torch.bfloat16)
    assert not out[::3].any()


def test_scaling_and_router_weight_on_input() -> None:
    layer = Layer(routed_scaling_factor=2.5, apply_router_weight_on_input=True, top_k=1)
    x, _, ids = routed(k=1)
    scales = torch.rand(13, 1) + 0.25
    ref = layer.expected(x * scales.to(x.dtype), None, ids) * 2.5
    layer.method.process_weights_after_loading(layer)
    assert_close(layer.run(x, scales, ids), ref, torch.bfloat16)


def test_new_weights_keep_their_addresses() -> None:
    layer, inputs = Layer(), routed()
    layer.method.process_weights_after_loading(layer)
    addresses = [parameter.data_ptr() for parameter in layer.parameters()]
    layer.load(seed=9)
    ref = layer.expected(*inputs)
    layer.method.process_weights_after_loading(layer)
    assert_close(layer.run(*inputs), ref, torch.bfloat16)
    assert [parameter.data_ptr() for parameter in layer.parameters()] == addresses


@pytest.mark.parametrize(
    "config",
    [
        {"no_combine": True},
        {"activation": "situ"},
        {"is_gated": False, "activation": "gelu_tanh"},
        {"activation": "gelu", "gemm1_alpha": 1.5},
        {"is_gated": False, "gemm1_clamp_limit": 7.0},
        {"apply_router_weight_on_input": True},
        {"hidden_size": 60},
    ],
    ids=str,
)
def test_refused(config: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=r"fused_moe does not run .* auto"):
        Layer(**config)


def test_other_dispatchers_are_refused_at_the_start() -> None:
    flags = of("runtime_context", "get_flags")().moe
    flags.a2a_backend = of("layers.moe.utils", "MoeA2ABackend").DEEPEP
    try:
        with pytest.raises(NotImplementedError, match=r"--moe-a2a-backend deepep; use .*auto"):
            Layer()
    finally:
        flags.a2a_backend = None


def test_experts_of_a_quantized_checkpoint(ask_for: Callable[[str], None]) -> None:
    """SGLang's methods for these do not know our runners, and fail each in its way or later."""
    validate = of("layers.moe.fused_moe_triton.layer", "_validate_hpc_ops_quant_method")
    validate(of("layers.quantization.unquant", "UnquantizedFusedMoEMethod")())
    for name in ("fused_moe", "fused_moe_int8"):
        ask_for(name)
        with pytest.raises(NotImplementedError, match=rf"{name} runs unquantized.*Layer's"):
            validate(Layer.__new__(Layer))
    ask_for("triton")
    validate(Layer.__new__(Layer))


def test_lora_is_refused() -> None:
    layer = Layer()
    with pytest.raises(NotImplementedError, match=r"fused_moe does not run .*LoRA; use .*auto"):
        layer.method.get_moe_quant_info(layer, layer.method.runner.runner_backend)


def test_other_dispatchers_are_refused() -> None:
    layer, inputs = Layer(), routed()
    runner = layer.method.runner.runner_core
    with pytest.raises(NotImplementedError, match="LoRA"):
        runner.run_from_dispatch(dispatched(*inputs), None, layer.moe_runner_config, object())


def test_compiled_decoding_keeps_our_order() -> None:
    layer = Layer()
    assert layer.method._torch_compile_forward(num_tokens=1) is None


def test_other_backends_are_left_alone(ask_for: Callable[[str], None]) -> None:
    ask_for("triton")
    layer = Layer()
    before = layer.w13_weight.data.clone()
    assert layer.method.runner.runner_backend.value == "triton"
    if not REAL:
        layer.method.process_weights_after_loading(layer)
        assert layer.processed_by == "sglang" and torch.equal(layer.w13_weight.data, before)
        assert layer.method.forward_cuda(layer, dispatched(*routed())) == "sglang"
    assert layer.method._torch_compile_forward(num_tokens=1) is not None


def test_register(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert {"fused_moe", "fused_moe_int8"} <= set(
        of("arg_groups.choices", "MOE_RUNNER_BACKEND_CHOICES")
    )
    integration.register()
    integration.plugin()
    monkeypatch.setattr(sys.modules["sglang.version"], "__version__", "0.5.230")
    with pytest.raises(RuntimeError, match=r"SGLang is 0\.5\.230; .* any_version=True"):
        integration.register()
    integration.register(any_version=True)
    with caplog.at_level(logging.WARNING):
        integration.plugin()
    assert "fused_moe is not available: SGLang is 0.5.230" in caplog.text


GROUP = "sglang.srt.plugins"


@pytest.mark.skipif(
    not REAL or "fused_moe" not in importlib.metadata.entry_points(group=GROUP).names,
    reason="SGLang and the wheel of fused_moe are not both installed",
)
def test_sglang_finds_the_plugin() -> None:
    plugin, distribution = of("plugins", "load_plugins_by_group")(GROUP)["fused_moe"]
    assert plugin is integration.plugin and distribution == "fused-moe"


@pytest.mark.skipif(not REAL, reason="SGLang is not installed")
def test_the_command_line_takes_our_names() -> None:
    arguments = of("server_args", "ServerArgs")
    parser = argparse.ArgumentParser()
    arguments.add_cli_args(parser)
    for name in ("fused_moe", "fused_moe_int8"):
        taken = parser.parse_args(["--model-path", "x", "--moe-runner-backend", name])
        assert taken.moe_runner_backend == name


@pytest.mark.skipif(not REAL, reason="SGLang is not installed")
@pytest.mark.parametrize(("module", "mirror", "methods"), stand_in.MIRRORED)
def test_the_stand_in_mirrors_sglang(module: str, mirror: type, methods: tuple[str, ...]) -> None:
    real = getattr(importlib.import_module(module), mirror.__name__)
    for name in methods:
        theirs = inspect.unwrap(getattr(real, name))
        ours = inspect.unwrap(getattr(mirror, name))
        assert [
            (p.name, p.kind, p.default) for p in inspect.signature(theirs).parameters.values()
        ] == [(p.name, p.kind, p.default) for p in inspect.signature(ours).parameters.values()], (
            f"{mirror.__name__}.{name}"
        )
