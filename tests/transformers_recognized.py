# SPDX-License-Identifier: Apache-2.0
"""Which of transformers' experts the layer stands in for: found by asking them; or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip(
    "transformers", minversion="5.17", reason="this Python has no transformers 5.17 or newer"
)
import transformers

from fused_moe import ActivationType
from fused_moe.integrations import transformers as moe
from transformers_tiny import (
    VOCABULARY,
    configuration,
    experts_modules,
    load,
    run,
    write_checkpoint,
)

moe.register()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose experts are in the usual layout."""
    made = tmp_path_factory.mktemp("mixtral")
    write_checkpoint("mixtral", made)
    return made


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        ("silu", ActivationType.Swiglu),
        ("gelu", ActivationType.Geglu),
        ("gelu_pytorch_tanh", ActivationType.GegluTanh),
        ("gelu_new", ActivationType.GegluTanh),
    ],
)
def test_activations_are_recognized(act: str, kind: ActivationType) -> None:
    config = configuration("mixtral")
    config.hidden_act = act
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    eager = run(model)
    model.set_experts_implementation("fused_moe")
    assert torch.allclose(run(model), eager, rtol=1e-4, atol=1e-6)
    found = {module._fused_moe.activation.kind for module in experts_modules(model)}
    assert found == {kind}


@pytest.mark.parametrize("act", ["relu", "quick_gelu", "tanh", "relu2"])
def test_unknown_activations_are_refused(act: str) -> None:
    config = configuration("mixtral")
    config.hidden_act = act
    model = transformers.AutoModelForCausalLM.from_config(
        config, experts_implementation="fused_moe"
    )
    with pytest.raises(NotImplementedError, match="another experts_implementation"):
        run(model)


def _clamped(module: torch.nn.Module, limit: float, step: bool) -> None:
    """Gives a module a gate of its own, as DeepSeek-V4 or Step have it."""

    def gate(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        up = up.clamp(-self.limit, self.limit)
        if step:
            return self.act_fn(gate).clamp(max=self.limit) * up
        return self.act_fn(gate.clamp(max=self.limit)) * up

    module.limit = limit
    module._apply_gate = gate.__get__(module)


@pytest.mark.parametrize("step", [False, True])
def test_clamped_gates_are_recognized(step: bool, folder: Path) -> None:
    model = load(folder, "eager")
    for module in experts_modules(model):
        _clamped(module, 0.75, step)
    model.set_experts_implementation("batched_mm")  # which asks the module for its gate
    expected = run(model)
    model.set_experts_implementation("fused_moe")
    assert torch.allclose(run(model), expected, rtol=1e-4, atol=1e-5)
    kinds = {module._fused_moe.activation.kind for module in experts_modules(model)}
    assert kinds == {ActivationType.SwigluStep if step else ActivationType.SwigluBias}


def test_clamps_of_another_name_are_not_overlooked(folder: Path) -> None:
    def gate(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate.clamp(max=40)) * up

    model = load(folder, "fused_moe")
    experts_modules(model)[1]._apply_gate = gate
    with pytest.raises(NotImplementedError, match="another experts_implementation"):
        run(model)


def test_models_that_would_ignore_it() -> None:
    llama = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(llama)
    with pytest.raises(ValueError, match="no experts that go through transformers' interface"):
        moe.prepare(model)


def test_prepare_wants_the_implementation(folder: Path) -> None:
    with pytest.raises(ValueError, match="run on 'eager'; load it with experts_implementation"):
        moe.prepare(load(folder, "eager"))


def _post_norm(module: Any) -> None:
    module.has_post_expert_norm = True


def _offloaded(module: Any) -> None:
    module._hf_hook = type("Hook", (), {"offload": True})()


def _other_format(module: Any) -> None:
    weight = module.gate_up_proj.detach().to(torch.float8_e4m3fn)
    module.gate_up_proj = torch.nn.Parameter(weight, requires_grad=False)


def _on_meta(module: Any) -> None:
    module.to("meta")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_post_norm, "normalizes each expert's output"),
        (_offloaded, "a device_map that offloads no experts"),
        (_other_format, "quantized already.*fused_moe_int8"),
        (_on_meta, "is offloaded"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_modules_that_are_refused(change: Any, text: str, folder: Path) -> None:
    model = load(folder, "fused_moe")
    change(experts_modules(model)[0])
    with pytest.raises(NotImplementedError, match=text):
        moe.prepare(model)
