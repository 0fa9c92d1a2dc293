# SPDX-License-Identifier: Apache-2.0
"""MoE models of transformers on our layer: logits and tokens against its own eager experts.

The truth is always the float32 model with transformers' eager experts on the CPU. In float32 ours
has to be as close as one layer must be. In 16 bits the rest of the model rounds too, and so do
eager experts: ours may be off by what they are off, and by the bound of one layer.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip(
    "transformers", minversion="5.17", reason="this Python has no transformers 5.17 or newer"
)
from fused_moe import (
    dequantize_int4,
    dequantize_mxfp4,
    quantize_int4,
    quantize_int8,
    quantize_mxfp4,
)
from fused_moe.integrations import transformers as moe
from gpu_layer import require_sm80
from tolerances import TOLERANCES, assert_close, relative_error
from transformers_tiny import FAMILIES, VOCABULARY, experts_modules, load, write_checkpoint

moe.register()

NEW_TOKENS = 8
PLACES = [
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
    ("cuda", torch.float16),
    ("cuda", torch.bfloat16),
]
# 16-bit runs of eager experts differ among themselves by this factor: other orders of sums.
SPREAD = 1.25

family_cases = pytest.mark.parametrize("family", [*FAMILIES, "nemotron_h"])
place_cases = pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)


@dataclasses.dataclass(frozen=True)
class Truth:
    """A family's checkpoint and what the float32 model makes of two prompts.

    Attributes:
        prompts: [2, 5] token ids.
        sequences: [2, 13], with the tokens that follow greedily.
        logits: [2, 13, VOCABULARY] of the sequences.
    """

    folder: Path
    prompts: torch.Tensor
    sequences: torch.Tensor
    logits: torch.Tensor


@pytest.fixture(scope="session")
def truths(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a family to its Truth, each made once."""

    @functools.cache
    def make(family: str) -> Truth:
        folder = tmp_path_factory.mktemp(family)
        write_checkpoint(family, folder)
        model = load(folder, "eager")
        draw = torch.Generator().manual_seed(1)
        prompts = torch.randint(2, VOCABULARY, (64, 5), generator=draw)
        made = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        # Of many prompts those whose tokens are furthest from a tie: a rounding, which is all
        # that may differ, must not decide.
        best = torch.stack(made.logits).topk(2, dim=2).values
        margin = (best[..., 0] - best[..., 1]).amin(dim=0) / made.logits[0].std()
        chosen = margin.topk(2).indices
        assert margin[chosen].min() > 0.1, "no prompt's tokens are clear of ties"
        sequences = made.sequences[chosen]
        return Truth(folder, prompts[chosen], sequences, logits_of(model, sequences))

    return make


@torch.no_grad()
def logits_of(model: Any, sequences: torch.Tensor) -> torch.Tensor:
    """[2, 13, VOCABULARY], float32 on the CPU."""
    return model(sequences.to(model.device), use_cache=False).logits.float().cpu()


def tokens_of(model: Any, prompts: torch.Tensor) -> torch.Tensor:
    """[2, 13]: the prompts and what follows greedily, on the CPU."""
    prompts = prompts.to(model.device)
    mask = torch.ones_like(prompts)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    return model.generate(prompts, attention_mask=mask, **options).cpu()


def check_logits(
    logits: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype, eager_error: float
) -> None:
    """Judges by one layer's bound in float32, and beyond eager experts' own error in 16 bits."""
    if dtype == torch.float32:
        assert_close(logits, truth, dtype)
        return
    error = relative_error(logits, truth)
    assert error < SPREAD * eager_error + TOLERANCES[dtype], (
        f"off by {error:.2e}; eager experts are off by {eager_error:.2e}"
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The device of each call of the layer that the integration makes."""
    seen: list[str] = []
    real = moe.cutlass_fused_moe

    def counted(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(x.device.type)
        return real(x, *args, **kwargs)

    monkeypatch.setattr(moe, "cutlass_fused_moe", counted)
    return seen


@place_cases
@family_cases
def test_logits_and_tokens(
    family: str, device: str, dtype: torch.dtype, truths: Any, calls: list[str]
) -> None:
    if device == "cuda":
        require_sm80()
    truth: Truth = truths(family)
    eager = load(truth.folder, "eager", dtype, device)
    eager_error = relative_error(logits_of(eager, truth.sequences), truth.logits)
    model = load(truth.folder, "fused_moe", dtype, device)
    assert not calls
    logits = logits_of(model, truth.sequences)
    assert calls == [device] * len(experts_modules(model))
    check_logits(logits, truth.logits, dtype, eager_error)
    tokens = tokens_of(model, truth.prompts)
    assert torch.equal(tokens, tokens_of(eager, truth.prompts))
    assert torch.equal(tokens, truth.sequences)


@family_cases
def test_experts_matter(family: str, truths: Any) -> None:
    # Otherwise the comparisons above would hold whatever the layer computes.
    truth: Truth = truths(family)
    model = load(truth.folder, "eager")
    for module in experts_modules(model):
        first = getattr(module, "gate_up_proj", None)
        first = module.up_proj if first is None else first
        first.data = first.data.roll(1, dims=2)
    assert relative_error(logits_of(model, truth.sequences), truth.logits) > 0.1


@family_cases
def test_saving_after_a_run(family: str, truths: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    truth: Truth = truths(family)
    model = load(truth.folder, "fused_moe")
    before = logits_of(model, truth.sequences)
    model.save_pretrained(tmp_path)
    names = [path.name for path in truth.folder.glob("*.safetensors")]
    assert names
    for name in names:
        original, saved = load_file(truth.folder / name), load_file(tmp_path / name)
        assert original.keys() == saved.keys()
        for key, tensor in original.items():
            assert torch.equal(saved[key], tensor), key
    assert torch.equal(logits_of(model, truth.sequences), before)
    again = load(tmp_path, "fused_moe")
    assert torch.equal(logits_of(again, truth.sequences), before)


def _rounded(weight: torch.Tensor, kept: str) -> torch.Tensor:
    """[E, N, K] as the format `kept` holds it."""
    if kept == "int8":
        q, scale = quantize_int8(weight)
        return q * scale.unsqueeze(2)
    if kept == "int4":
        return dequantize_int4(*quantize_int4(weight, 32))
    return dequantize_mxfp4(*quantize_mxfp4(weight))


@torch.no_grad()
def _quantized_truth(truth: Truth, kept: str) -> torch.Tensor:
    """Logits of the float32 model whose experts hold the values that `kept` leaves of them."""
    model = load(truth.folder, "eager")
    for module in experts_modules(model):
        for name, parameter in module.named_parameters():
            if parameter.ndim == 3 and module.is_transposed:
                rows = _rounded(parameter.transpose(1, 2).contiguous(), kept)
                getattr(module, name).copy_(rows.transpose(1, 2))
            elif parameter.ndim == 3:
                getattr(module, name).copy_(_rounded(parameter, kept))
    return logits_of(model, truth.sequences)


QUANTIZED = [
    *((family, "int8") for family in [*FAMILIES, "nemotron_h"]),
    ("mixtral", "int4"),
    ("gpt_oss", "int4"),
    ("mixtral", "mxfp4"),
    ("gpt_oss", "mxfp4"),
]


@place_cases
@pytest.mark.parametrize(("family", "kept"), QUANTIZED)
def test_quantized_on_load(
    family: str, kept: str, device: str, dtype: torch.dtype, truths: Any
) -> None:
    if device == "cuda":
        require_sm80()
    truth: Truth = truths(family)
    eager = load(truth.folder, "eager", dtype, device)
    eager_error = relative_error(logits_of(eager, truth.sequences), truth.logits)
    expected = _quantized_truth(truth, kept)
    assert relative_error(expected, truth.logits) > 1e-4
    model = load(truth.folder, f"fused_moe_{kept}", dtype, device)
    logits = logits_of(model, truth.sequences)
    check_logits(logits, expected, dtype, eager_error)
    held = {p.dtype for m in experts_modules(model) for p in m.parameters() if p.ndim == 3}
    assert held == {torch.int8 if kept == "int8" else torch.uint8}
    tokens = tokens_of(model, truth.prompts)
    if dtype == torch.float32:  # in 16 bits a tie may fall either way
        prompt = truth.prompts.shape[1]
        assert torch.equal(
            logits_of(model, tokens)[:, prompt - 1 : -1].argmax(2), tokens[:, prompt:]
        )
