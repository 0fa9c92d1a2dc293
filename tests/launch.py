# SPDX-License-Identifier: Apache-2.0
"""From arguments to the extension: which addresses, sizes and device it is given.

A stand-in takes the extension's place, so that this needs neither kernels nor a GPU: CPU
tensors play the part of those on a device.
"""

from __future__ import annotations

import ast
import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fused_moe
from cpu_layer import FOUR_BIT, flags, make_layer
from fused_moe import _extension, arguments, backends, cuda, cutlass_fused_moe, execute
from fused_moe import cutlass_fused_moe_workspace_size as workspace_size
from fused_moe.signature import Signature

WORKSPACE_BYTES = 4096


def run_arguments() -> tuple[str, ...]:
    """The names of `_C.run`'s arguments, in order, as its stub declares them."""
    text = (pathlib.Path(fused_moe.__file__).parent / "_C.pyi").read_text()
    (run,) = (node for node in ast.parse(text).body if getattr(node, "name", "") == "run")
    assert isinstance(run, ast.FunctionDef) and not run.args.kwonlyargs
    return tuple(argument.arg for argument in run.args.args)


RUN_ARGUMENTS = run_arguments()


def empty_strided(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Memory of the CPU in place of the current device's."""
    return torch.empty_strided(shape, strides, dtype=dtype)


class Extension:
    """Records what it is asked for, and looks at the workspace while it is alive."""

    BACKENDS = ("sm80",)
    BUILT_FOR = "sm80"

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []

    @staticmethod
    def Problem(**fields: int) -> dict[str, int]:
        return fields

    @staticmethod
    def workspace_size(backend: str, problem: dict[str, int]) -> int:
        assert backend == "sm80"
        return WORKSPACE_BYTES

    def run(self, *values: Any) -> None:
        self.runs.append(dict(zip(RUN_ARGUMENTS, values, strict=False)))


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[Extension]:
    stand_in = Extension()
    monkeypatch.setattr(_extension, "C", stand_in)
    monkeypatch.setattr(backends, "check_device", lambda backend, device: None)
    monkeypatch.setattr(cuda, "_raw_stream", lambda index: 77)
    monkeypatch.setattr(cuda, "_current_device", lambda: None)  # as CPU tensors' index
    monkeypatch.setattr(cuda, "_empty_strided", empty_strided)
    monkeypatch.setattr(execute, "_passed", {})
    yield stand_in


def addresses_of(layer: dict[str, Any]) -> dict[str, int]:
    """What `run` must get, by its own names."""
    scales = layer["quant_scales"] or (None, None)
    tensors = {
        "input": layer["input"],
        "experts": layer["token_selected_experts"],
        "scales": layer["token_final_scales"],
        "fc1_weights": layer["fc1_expert_weights"],
        "fc2_weights": layer["fc2_expert_weights"],
        "fc1_scales": scales[0],
        "fc2_scales": scales[1],
        "fc1_bias": layer.get("fc1_expert_biases"),
        "fc2_bias": layer.get("fc2_expert_biases"),
        "swiglu_alpha": layer.get("swiglu_alpha"),
        "swiglu_beta": layer.get("swiglu_beta"),
        "swiglu_limit": layer.get("swiglu_limit"),
    }
    return {name: 0 if t is None else t.data_ptr() for name, t in tensors.items()}


FULL: dict[str, Any] = {"biases": ("fc1", "fc2"), "swiglu": ("alpha", "beta", "limit")}


@pytest.mark.parametrize(
    "options",
    [{}, FULL, {"weights": "uint8"}, *({**FULL, "weights": w} for w in ("int8", *FOUR_BIT))],
)
def test_addresses(extension: Extension, options: dict[str, Any]) -> None:
    layer = make_layer(**options)
    out = cutlass_fused_moe(**layer, backend="sm80")
    (run,) = extension.runs
    expected = addresses_of(layer)
    assert {name: run[name] for name in expected} == expected
    assert run["output"] == out.data_ptr() and run["stream"] == 77
    assert out.shape == layer["input"].shape and out.dtype == torch.bfloat16
    assert run["workspace"] % 16 == 0 and run["workspace_bytes"] == WORKSPACE_BYTES
    assert run["add_fc2_bias"] == ("biases" in options)


def test_what_is_not_given_has_no_address(extension: Extension) -> None:
    layer = {**make_layer(), "token_final_scales": None}
    cutlass_fused_moe(**layer, backend="sm80")
    (run,) = extension.runs
    missing = {name for name, address in addresses_of(layer).items() if not address}
    assert missing >= {"scales", "fc1_scales", "fc2_scales", "fc1_bias", "fc2_bias", "swiglu_beta"}
    assert {run[name] for name in missing} == {0} and run["weight_scale_dtype"] == 0
    assert run["problem"]["activation"] == 3, "only parameters make Swiglu SwigluBias"


def test_problem(extension: Extension) -> None:
    layer = make_layer(
        weights="uint8", dtype=torch.float16, output_dtype=torch.bfloat16, ep_size=4, ep_rank=2
    )
    layer["swiglu_limit"] = torch.ones(4)
    cutlass_fused_moe(**layer, backend="sm80")
    assert extension.runs[0]["problem"] == {
        "num_tokens": 13,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_experts": 16,
        "num_local_experts": 4,
        "first_local_expert": 8,
        "top_k": 2,
        "activation": 5,
        "dtype": 1,
        "output_dtype": 2,
        "weight_format": 2,
        "group_size": 0,
    }
    assert extension.runs[0]["weight_scale_dtype"] == 0


@pytest.mark.parametrize(
    ("weights", "sizes", "weight_format", "group_size"),
    [
        ("same", (64, 48), 0, 0),
        ("int8", (64, 48), 1, 0),
        ("int4_32", (64, 96), 3, 32),
        ("int4_64", (64, 192), 3, 64),
        ("int4_128", (128, 384), 3, 128),
        ("mxfp4", (64, 96), 4, 32),
    ],
)
def test_problem_of_a_format(
    extension: Extension, weights: str, sizes: tuple[int, int], weight_format: int, group_size: int
) -> None:
    cutlass_fused_moe(**make_layer(weights=weights), backend="sm80")
    problem = extension.runs[0]["problem"]
    assert (problem["hidden_size"], problem["intermediate_size"]) == sizes
    assert problem["weight_format"] == weight_format
    assert problem["group_size"] == group_size


@pytest.mark.parametrize(
    ("dtype", "code"), [(torch.float32, 0), (torch.float16, 1), (torch.bfloat16, 2)]
)
def test_weight_scale_dtype(extension: Extension, dtype: torch.dtype, code: int) -> None:
    kind = torch.float16 if dtype == torch.float16 else torch.bfloat16
    for weights in ("int8", "int4_64"):
        layer = make_layer(weights=weights, dtype=kind, scale_dtype=dtype)
        cutlass_fused_moe(**layer, backend="sm80")
        assert extension.runs.pop()["weight_scale_dtype"] == code


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_e8m0_scales(extension: Extension, dtype: torch.dtype) -> None:
    layer = make_layer(weights="mxfp4")
    layer["quant_scales"] = [scale.view(dtype) for scale in layer["quant_scales"]]
    cutlass_fused_moe(**layer, backend="sm80")
    assert extension.runs[0]["weight_scale_dtype"] == 3


def test_fc2_bias_is_for_the_first_rank_only(extension: Extension) -> None:
    layer = make_layer(biases=("fc1", "fc2"))
    for rank in range(3):
        cutlass_fused_moe(**layer, tp_size=3, tp_rank=rank, backend="sm80")
    assert [run["add_fc2_bias"] for run in extension.runs] == [True, False, False]
    assert all(run["fc1_bias"] for run in extension.runs)


def test_given_memory_is_used(extension: Extension) -> None:
    layer = make_layer()
    output = torch.empty(13, 64, dtype=torch.bfloat16)
    workspace = torch.empty(WORKSPACE_BYTES + 64, dtype=torch.int8)
    returned = cutlass_fused_moe(**layer, output=output, workspace_buffer=workspace, backend="sm80")
    (run,) = extension.runs
    assert returned is output and run["output"] == output.data_ptr()
    assert run["workspace"] == workspace.data_ptr()
    assert run["workspace_bytes"] == WORKSPACE_BYTES + 64


def test_a_small_workspace_is_refused(extension: Extension) -> None:
    workspace = torch.empty(WORKSPACE_BYTES - 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"workspace_buffer has 4095 bytes.*4096 or more"):
        cutlass_fused_moe(**make_layer(), workspace_buffer=workspace, backend="sm80")
    assert not extension.runs


def test_no_tokens_launch_nothing(extension: Extension) -> None:
    out = cutlass_fused_moe(**make_layer(tokens=0), backend="sm80")
    assert out.shape == (0, 64) and not extension.runs


def test_too_many_local_experts(extension: Extension) -> None:
    layer = make_layer(experts=2049, hidden=8, intermediate=8)
    with pytest.raises(ValueError, match=r"fc1_expert_weights.shape\[0\] is 2049.*at most 2048"):
        cutlass_fused_moe(**layer, backend="sm80")
    assert cutlass_fused_moe(**layer, backend="cpu").isfinite().all()
    assert not extension.runs
    cutlass_fused_moe(**make_layer(experts=2048, hidden=8, intermediate=8), backend="sm80")
    assert len(extension.runs) == 1


def test_the_device_is_made_current(extension: Extension, monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[int | None] = [1]
    entered = []

    @contextlib.contextmanager
    def device(index: int | None) -> Iterator[None]:
        entered.append(index)
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(cuda, "_current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    cutlass_fused_moe(**make_layer(), backend="sm80")
    assert entered == [None] and len(extension.runs) == 1 and current == [1]


def test_checks_run_once_for_each_signature(
    extension: Extension, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[object] = []

    def check(signature: Signature) -> arguments.MoeCall:
        checked.append(signature)
        return arguments.check_call(signature)

    monkeypatch.setattr(execute, "check_call", check)
    monkeypatch.setattr(execute, "_MOST_PASSED", 2)
    for tokens in (13, 14) * 5:
        cutlass_fused_moe(**make_layer(tokens=tokens), backend="sm80")
    assert len(checked) == 2, "each call would pay for all the checks"
    cutlass_fused_moe(**make_layer(tokens=15), backend="sm80")
    assert len(checked) == 3 and len(execute._passed) <= 2, "memory would grow with every M"
    assert len(extension.runs) == 11


@pytest.mark.parametrize(
    "name",
    [
        "input",
        "token_selected_experts",
        "token_final_scales",
        "fc1_expert_weights",
        "fc2_expert_weights",
    ],
)
def test_checks_are_not_skipped_by_a_like_call(extension: Extension, name: str) -> None:
    layer = make_layer()
    cutlass_fused_moe(**layer, backend="sm80")
    good = layer[name]
    for bad, words in (
        (torch.stack([good, good], dim=-1)[..., 0], f"{name} is not contiguous"),
        (good.to("meta"), "is on .*meta"),
    ):
        with pytest.raises(ValueError, match=words):
            cutlass_fused_moe(**{**layer, name: bad}, backend="sm80")
    with pytest.raises(NotImplementedError, match="input_sf"):
        cutlass_fused_moe(**layer, input_sf=layer[name], backend="sm80")
    assert len(extension.runs) == 1


@pytest.mark.parametrize("weights", ["int8", *FOUR_BIT])
def test_workspace_query_describes_the_same_problem(
    extension: Extension, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    layer = make_layer(weights=weights, ep_size=2, ep_rank=1)
    cutlass_fused_moe(**layer, backend="sm80")
    problem = extension.runs[0]["problem"]
    seen: list[dict[str, int]] = []

    def size(backend: str, problem: dict[str, int]) -> int:
        seen.append(problem)
        return len(seen)

    monkeypatch.setattr(Extension, "workspace_size", staticmethod(size))

    def ask(group_size: int | None) -> int:
        return workspace_size(
            *(13, problem["hidden_size"], problem["intermediate_size"], 8, 2),
            x_dtype=torch.bfloat16,
            weight_dtype=layer["fc1_expert_weights"].dtype,
            group_size=group_size,
            ep_size=2,
            ep_rank=1,
            backend="sm80",
            **flags(weights),
        )

    ask(problem["group_size"])
    assert seen == [problem]
    # Where the group size is not said, it is enough for each that the sizes allow.
    del seen[:]
    most = ask(None)
    assert problem in seen and most == len(seen)
    groups = [p["group_size"] for p in seen]
    assert (
        groups
        == {
            "int4_32": [32],
            "int4_64": [32, 64],
            "int4_128": [32, 64, 128],
            "mxfp4": [32],
            "int8": [0],
        }[weights]
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_packed_weights": True, "group_size": 48}, r"group_size is 48.*\[32, 64\]"),
        ({"use_packed_weights": True, "group_size": 128}, r"group_size is 128.*\[32, 64\]"),
        ({"use_w4_group_scaling": True, "group_size": 64}, r"group_size is 64.*\[32\]"),
        ({"group_size": 32}, r"group_size is 32.*\[0\]"),
    ],
)
def test_group_sizes_of_the_workspace_query(options: dict[str, Any], words: str) -> None:
    sizes = (13, 128, 192, 8, 2)
    with pytest.raises(ValueError, match=words):
        workspace_size(
            *sizes, x_dtype=torch.float16, weight_dtype=torch.uint8, backend="cpu", **options
        )


@pytest.mark.parametrize("flag", ["use_packed_weights", "use_w4_group_scaling"])
def test_the_workspace_query_checks_4_bit_weights(flag: str) -> None:
    options: dict[str, Any] = {flag: True, "x_dtype": torch.float16, "backend": "cpu"}
    with pytest.raises(ValueError, match=f"{flag} is True, which is for 4-bit weights"):
        workspace_size(13, 64, 64, 8, 2, **options)
    with pytest.raises(ValueError, match=r"hidden size .* is 48; .*positive multiple of 32"):
        workspace_size(13, 48, 64, 8, 2, weight_dtype=torch.uint8, **options)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "C", None)
    monkeypatch.setattr(_extension, "_reason", "no such file")
    with pytest.raises(RuntimeError, match=r"fused_moe\._C.*no such file.*--config=sm80.*cpu"):
        workspace_size(1, 64, 64, 4, 2, x_dtype=torch.float16, backend="sm80")
    assert workspace_size(1, 64, 64, 4, 2, x_dtype=torch.float16, backend="cpu") == 0
    assert cutlass_fused_moe(**make_layer()).isfinite().all()


def test_a_build_without_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = Extension()
    monkeypatch.setattr(stand_in, "BACKENDS", (), raising=False)
    monkeypatch.setattr(stand_in, "BUILT_FOR", "cpu", raising=False)
    monkeypatch.setattr(_extension, "C", stand_in)
    with pytest.raises(RuntimeError, match=r"'sm80' is not in this build.*'cpu'.*--config=sm80"):
        workspace_size(1, 64, 64, 4, 2, x_dtype=torch.float16, backend="sm80")
