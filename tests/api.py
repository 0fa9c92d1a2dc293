# SPDX-License-Identifier: Apache-2.0
"""The package as its users see it: signatures, import, torch.compile, threads."""

from __future__ import annotations

import concurrent.futures
import inspect
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_moe
from cpu_layer import make_layer, reference, run
from fused_moe import ActivationType, cutlass_fused_moe, op
from fused_moe import cutlass_fused_moe_workspace_size as workspace_size
from tolerances import assert_close

# FlashInfer's order, which callers rely on by position; after the star, by keyword only.
SIGNATURE = """
    input, token_selected_experts, token_final_scales, fc1_expert_weights, fc2_expert_weights,
    output_dtype, quant_scales, fc1_expert_biases=None, fc2_expert_biases=None, input_sf=None,
    swiglu_alpha=None, swiglu_beta=None, swiglu_limit=None, tp_size=1, tp_rank=0, ep_size=1,
    ep_rank=0, cluster_size=1, cluster_rank=0, output=None, enable_alltoall=False,
    use_deepseek_fp8_block_scale=False, use_w4_group_scaling=False, use_mxfp8_act_scaling=False,
    min_latency_mode=False, use_packed_weights=False, tune_max_num_tokens=8192, enable_pdl=None,
    activation_type=3, *, use_fused_finalize=None, workspace_buffer=None, backend=None
"""


def test_signature() -> None:
    signature = inspect.signature(cutlass_fused_moe)
    assert signature.parameters["activation_type"].default is ActivationType.Swiglu
    plain = [
        p.replace(
            annotation=inspect.Parameter.empty,
            default=int(p.default) if isinstance(p.default, ActivationType) else p.default,
        )
        for p in signature.parameters.values()
    ]
    assert str(inspect.Signature(plain)) == "(" + " ".join(SIGNATURE.split()) + ")"


def test_activation_numbers() -> None:
    names = [
        "Gelu",
        "Relu",
        "Silu",
        "Swiglu",
        "Geglu",
        "SwigluBias",
        "Relu2",
        "SwigluStep",
        "GegluTanh",
        "Identity",
    ]
    assert [a.name for a in ActivationType] == names
    assert [a.value for a in ActivationType] == list(range(10))
    assert [a.value for a in ActivationType if a.is_gated] == [3, 4, 5, 7, 8]


def test_every_argument_is_documented() -> None:
    for function in (cutlass_fused_moe, workspace_size):
        text = inspect.getdoc(function) or ""
        for name in inspect.signature(function).parameters:
            known = name in text or (name.startswith(("use_", "min_")) and "use_...:" in text)
            assert known, f"{function.__name__} says nothing of {name}"
    assert "The gate is the second half" in (cutlass_fused_moe.__doc__ or "")


def test_public_names() -> None:
    assert all(hasattr(fused_moe, name) for name in fused_moe.__all__)
    assert fused_moe.__all__ == sorted(fused_moe.__all__, key=lambda n: (not n[0].isupper(), n))
    assert fused_moe.__version__.count(".") == 2
    assert (pathlib.Path(fused_moe.__file__).parent / "py.typed").exists()


def test_import_is_quick_and_touches_no_gpu() -> None:
    program = """
import time, torch, sys
before = time.perf_counter()
import fused_moe
spent = time.perf_counter() - before
assert not torch.cuda.is_initialized(), "CUDA was initialized"
assert "torch._inductor" not in sys.modules, "the compiler was imported"
print(spent)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1, "importing fused_moe takes more than a second beyond torch"


@pytest.fixture
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("options", [{}, {"weights": "int8", "biases": ("fc1", "fc2")}])
@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_compile(compiler: str, options: dict[str, Any]) -> None:
    layer = make_layer(tokens=20, **options)
    varying = ("input", "token_selected_experts", "token_final_scales")

    def model(x: torch.Tensor, ids: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        arguments = {**layer, **dict(zip(varying, (x * 2, ids, scales), strict=True))}
        return cutlass_fused_moe(**arguments) + 1

    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for tokens in (20, 7, 3, 12):
        inputs = [layer[name][:tokens].contiguous() for name in varying]
        assert torch.equal(compiled(*inputs), model(*inputs))


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_output() -> None:
    layer = make_layer()
    expected = cutlass_fused_moe(**layer)
    workspace = torch.empty(256, dtype=torch.uint8)

    def model(x: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = output + 1
        arguments = {**layer, "input": x}
        result = cutlass_fused_moe(**arguments, output=output, workspace_buffer=workspace)
        return before, result * 2

    output = torch.full((13, 64), 3.0, dtype=torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True)
    before, doubled = compiled(layer["input"], output)
    assert bool((before == 4).all()), "what was read before the call must not see its result"
    assert torch.equal(doubled, expected * 2) and torch.equal(output, expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_calls_are_checked() -> None:
    layer = make_layer()
    layer["token_selected_experts"] = layer["token_selected_experts"].long()
    compiled = torch.compile(lambda x: cutlass_fused_moe(**{**layer, "input": x}), fullgraph=True)
    with pytest.raises(ValueError, match=r"token_selected_experts is torch\.int64"):
        compiled(layer["input"])


def test_export() -> None:
    layer = make_layer()

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return cutlass_fused_moe(**{**layer, "input": x})

    exported = torch.export.export(Model(), (layer["input"],))
    assert torch.equal(exported.module()(layer["input"]), cutlass_fused_moe(**layer))


@pytest.mark.parametrize("options", [{}, {"weights": "uint8", "biases": ("fc2",)}])
def test_operator(options: dict[str, Any]) -> None:
    layer = make_layer(**options)
    layer["output"] = torch.zeros(13, 64, dtype=torch.bfloat16)
    layer["quant_scales"] = layer["quant_scales"] or []
    schema = torch.ops.fused_moe.cutlass_fused_moe.default._schema
    given = inspect.signature(cutlass_fused_moe).bind(**layer)
    given.apply_defaults()
    arguments = [given.arguments[a.name] for a in schema.arguments]
    arguments = [int(a) if isinstance(a, ActivationType) else a for a in arguments]
    results = torch.library.opcheck(op._operator, tuple(arguments))
    assert len(results) >= 4 and set(results.values()) == {"SUCCESS"}, results
    named = [a.name for a in schema.arguments]
    assert named == [n for n in inspect.signature(cutlass_fused_moe).parameters if n in named]


def test_fake_tensors() -> None:
    layer = make_layer(output_dtype=torch.float16)
    with FakeTensorMode() as mode:
        fake = {
            name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
            for name, v in layer.items()
        }
        out = cutlass_fused_moe(**fake)
    assert out.shape == (13, 64) and out.dtype == torch.float16


def test_parameters_get_no_gradient() -> None:
    layer = make_layer()
    expected = cutlass_fused_moe(**layer)
    for name in ("input", "fc1_expert_weights", "fc2_expert_weights"):
        layer[name] = torch.nn.Parameter(layer[name])
    out = cutlass_fused_moe(**layer)
    assert torch.equal(out, expected) and not out.requires_grad


def test_threads() -> None:
    layers = [
        make_layer(tokens=tokens, seed=tokens, weights=weights, dtype=dtype)
        for tokens in (1, 8, 33, 64)
        for weights in ("same", "int8")
        for dtype in (torch.bfloat16, torch.float16)
    ]
    expected = [run(layer) for layer in layers]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for out, alone in zip(pool.map(run, layers * 6), expected * 6, strict=True):
            assert torch.equal(out, alone)


def test_example() -> None:
    """What the package's own text shows."""
    w1, w2 = torch.randn(8, 128, 32).bfloat16() / 6, torch.randn(8, 32, 64).bfloat16() / 8
    x = torch.randn(5, 32).bfloat16()
    scales, experts = fused_moe.topk_softmax(torch.randn(5, 8), k=2)
    out = cutlass_fused_moe(x, experts, scales, w1, w2, x.dtype, None)
    named = make_layer()
    named.update(input=x, token_selected_experts=experts, token_final_scales=scales)
    named.update(fc1_expert_weights=w1, fc2_expert_weights=w2)
    assert_close(out, reference(named), torch.bfloat16)
