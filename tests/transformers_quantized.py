# SPDX-License-Identifier: Apache-2.0
"""Experts of transformers' models quantized: once a model is loaded, and while it is read."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip(
    "transformers", minversion="5.17", reason="this Python has no transformers 5.17 or newer"
)
import transformers

from fused_moe.integrations import transformers as moe
from gpu_layer import require_sm80
from transformers_tiny import IDS, configuration, experts_modules, load, run, write_checkpoint

moe.register()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints: one whose experts are in the usual layout, and gpt-oss's, with its own."""
    made = {family: tmp_path_factory.mktemp(family) for family in ("mixtral", "gpt_oss")}
    for family, folder in made.items():
        write_checkpoint(family, folder)
    return made


both_layouts = pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])


@pytest.mark.parametrize("kept", ["int8", "int4", "mxfp4"])
@both_layouts
def test_quantizing_releases_the_weights(family: str, kept: str, folders: dict[str, Path]) -> None:
    model = load(folders[family], f"fused_moe_{kept}", torch.bfloat16)
    modules = experts_modules(model)
    held = [weakref.ref(p) for m in modules for p in m.parameters() if p.ndim == 3]
    before = model.get_memory_footprint()
    moe.prepare(model)
    assert [reference() for reference in held] == [None] * 4
    weights = sum(p.numel() for m in modules for p in m.parameters() if p.ndim == 3)
    numbers = weights * (1 if kept == "int8" else 2)
    # Bytes saved, less what the scales need: float32 for a row or 32 numbers, or a byte.
    scales = sum(b.numel() * b.element_size() for m in modules for b in m.buffers())
    assert scales < 0.13 * 2 * numbers
    assert before - model.get_memory_footprint() == 2 * numbers - weights - scales
    assert moe.prepare(model) == 2  # again: nothing left to do


@both_layouts
def test_quantizing_a_running_model(family: str, folders: dict[str, Path]) -> None:
    model = load(folders[family], "fused_moe")
    run(model)
    model.set_experts_implementation("fused_moe_int8")
    assert torch.equal(run(model), run(load(folders[family], "fused_moe_int8")))


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("kept", ["int8", "int4", "mxfp4"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_quantizing_while_reading(
    family: str,
    kept: str,
    device: str,
    dtype: torch.dtype,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if device == "cuda":
        require_sm80()
    if family not in folders:
        write_checkpoint(family, tmp_path / family)
    folder = folders.get(family, tmp_path / family)
    config = moe.quantization(kept)
    unquantized: list[weakref.ref[torch.Tensor]] = []
    operation = type(config).__module__
    convert = sys.modules[operation]._Quantize.convert

    def watched(self: Any, tensors: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        assert not any(reference() is not None for reference in unquantized)
        (weight,) = tensors.values()
        unquantized.append(weakref.ref(weight[0] if isinstance(weight, list) else weight))
        return convert(self, tensors, *args, **kwargs)

    monkeypatch.setattr(sys.modules[operation]._Quantize, "convert", watched)
    # Onto the GPU at once where transformers can: that takes accelerate.
    there = device == "cuda" and importlib.util.find_spec("accelerate") is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=config,
        attn_implementation="eager",
        device_map={"": device} if there else None,
    ).to(device)
    modules = experts_modules(model)
    assert len(unquantized) == 2 * len(modules) > 0
    assert moe.prepare(model) == len(modules)
    assert model.config._experts_implementation == f"fused_moe_{kept}"
    later = load(folder, f"fused_moe_{kept}", dtype, device)
    assert torch.equal(run(model), run(later))
    prompt = IDS[:1].to(device)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(prompt, **options), later.generate(prompt, **options))
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(RuntimeError, match="original weights released"):
        model.state_dict()


@pytest.mark.parametrize("shift", [0, 8])
def test_quantizing_biases_of_a_mapped_file(
    shift: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    # One of the two shifts makes the file's tensors start between two multiples of 16 bytes.
    from safetensors.torch import load_file, save_file

    (file,) = folders["gpt_oss"].glob("*.safetensors")
    shutil.copy(folders["gpt_oss"] / "config.json", tmp_path)
    metadata = {"format": "pt", "shift": "x" * shift}
    save_file(load_file(file), tmp_path / "model.safetensors", metadata=metadata)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        quantization_config=moe.quantization("int8"),
        attn_implementation="eager",
    )
    assert torch.equal(run(model), run(load(folders["gpt_oss"], "fused_moe_int8")))


@pytest.mark.parametrize("kept", ["int8", "int4", "mxfp4"])
@both_layouts
def test_scales_keep_their_dtype(family: str, kept: str, folders: dict[str, Path]) -> None:
    model = load(folders[family], f"fused_moe_{kept}")
    moe.prepare(model)
    model.to(torch.bfloat16)
    # Of weights that bfloat16 holds, so that converting first changes nothing but the rest.
    expected = load(folders[family], f"fused_moe_{kept}").to(torch.bfloat16)
    assert torch.equal(run(model), run(expected))


def test_quantization_names_its_formats() -> None:
    with pytest.raises(ValueError, match=r"experts is 'fp8'; it must be one of \['int8', 'int4'"):
        moe.quantization("fp8")


def test_weights_that_cannot_be_quantized(folders: dict[str, Path]) -> None:
    model = load(folders["mixtral"], "fused_moe_int8")
    experts_modules(model)[0].down_proj.data[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="weight has an infinity or a NaN"):
        run(model)
    for name in ("fused_moe_int8", "fused_moe", "eager"):  # by now one weight is INT8, one is not
        model.set_experts_implementation(name)
        with pytest.raises(RuntimeError, match=r"stopped halfway.*load the model again"):
            run(model)


def test_a_quantized_model_cannot_go_back(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(folders["mixtral"], "fused_moe_int8")
    quantized = run(model)
    for other in ("eager", "grouped_mm", "fused_moe", "fused_moe_int4"):
        model.set_experts_implementation(other)
        with pytest.raises(RuntimeError, match=r"quantized to int8.*load the model again"):
            run(model)
    model.set_experts_implementation("fused_moe_int8")
    for saves in (model.state_dict, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(RuntimeError, match="original weights released"):
            saves()
    assert torch.equal(run(model), quantized)


def test_sizes_int4_cannot_group() -> None:
    config = configuration("mixtral")
    config.intermediate_size = 48
    model = transformers.AutoModelForCausalLM.from_config(
        config, experts_implementation="fused_moe_int4"
    )
    with pytest.raises(ValueError, match="size that 32 divides; they are 64 and 48"):
        moe.prepare(model)
