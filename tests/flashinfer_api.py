# SPDX-License-Identifier: Apache-2.0
"""Code written for `flashinfer.fused_moe` runs with only its import changed."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fused_moe
from cpu_layer import make_layer, reference
from fused_moe.integrations import flashinfer
from fused_moe.integrations._flashinfer_names import REFUSED
from fused_moe.integrations.flashinfer import ActivationType, cutlass_fused_moe
from fused_moe.integrations.flashinfer import cutlass_fused_moe_workspace_size as workspace_size
from tolerances import assert_close

# What FlashInfer 0.7.2.post1 has, in its order; activation_type is ActivationType.Swiglu there.
SIGNATURE = """
    input, token_selected_experts, token_final_scales, fc1_expert_weights, fc2_expert_weights,
    output_dtype, quant_scales, fc1_expert_biases=None, fc2_expert_biases=None, input_sf=None,
    swiglu_alpha=None, swiglu_beta=None, swiglu_limit=None, tp_size=1, tp_rank=0, ep_size=1,
    ep_rank=0, cluster_size=1, cluster_rank=0, output=None, enable_alltoall=False,
    use_deepseek_fp8_block_scale=False, use_w4_group_scaling=False, use_mxfp8_act_scaling=False,
    min_latency_mode=False, use_packed_weights=False, use_wfp4afp8_humming=False,
    tune_max_num_tokens=8192, enable_pdl=None, activation_type=3, swizzled_input_sf=True,
    use_fused_finalize=True, profile_ids=None, workspace_buffer=None, *,
    clamped_relu2_limit=None, situ_beta=None, situ_linear_beta=None, backend='cutlass'
"""
WORKSPACE_SIGNATURE = """
    max_num_tokens, hidden_size, intermediate_size, num_experts_total, top_k, *, x_dtype,
    weight_dtype, output_dtype=torch.bfloat16, activation_type=3, tp_size=1, tp_rank=0, ep_size=1,
    ep_rank=0, min_latency_mode=False, use_deepseek_fp8_block_scale=False,
    use_w4_group_scaling=False, use_mxfp8_act_scaling=False, use_fused_finalize=True,
    use_packed_weights=False, use_wfp4afp8_humming=False, device=None, backend='cutlass'
"""
AUTOTUNE_SIGNATURE = """
    tune_mode=True, cache=None, tuning_buckets=None, round_up=None, skip_ops=None,
    cuda_graph_profile_replays=None
"""
# Ours, after all of FlashInfer's: names that older releases had.
OLDER = ("use_fp8_block_scaling", "use_w4a8_group_scaling")


def plain(function: Any, without: tuple[str, ...] = ()) -> str:
    """The parameters as text, without annotations, enumerations as numbers."""
    kept = []
    for p in inspect.signature(function).parameters.values():
        if p.name not in without:
            number = int(p.default) if isinstance(p.default, ActivationType) else p.default
            kept.append(p.replace(annotation=inspect.Parameter.empty, default=number))
    return str(inspect.Signature(kept))


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        ("cutlass_fused_moe", SIGNATURE),
        ("cutlass_fused_moe_workspace_size", WORKSPACE_SIGNATURE),
        ("autotune", AUTOTUNE_SIGNATURE),
    ],
)
def test_signatures(name: str, recorded: str) -> None:
    ours = plain(getattr(flashinfer, name), without=OLDER)
    assert ours == "(" + " ".join(recorded.split()) + ")"


def test_activation_numbers() -> None:
    numbers = {a.name: a.value for a in fused_moe.ActivationType}
    numbers |= {"Situ": 10, "InvalidType": 11, "ClampedRelu2": 12}
    assert {a.name: a.value for a in ActivationType} == numbers
    for activation in fused_moe.ActivationType:
        assert ActivationType(activation).is_gated == activation.is_gated
        assert flashinfer.is_gated_activation(int(activation)) == activation.is_gated
    with pytest.raises(ValueError, match="13"):
        flashinfer.is_gated_activation(13)


def flashinfers_example(fused_moe: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer as FlashInfer's users write it; the argument is what they import.

    Returns:
        What comes back, and the same layer computed plainly in float32.
    """
    batch, hidden, inter, experts, top_k = 7, 128, 64, 8, 2
    torch.manual_seed(42)
    x = torch.randn(batch, hidden, dtype=torch.float16)
    w31_weight = torch.randn(experts, 2 * inter, hidden, dtype=torch.float16) / 5
    w2_weight = torch.randn(experts, hidden, inter, dtype=torch.float16) / 5
    router_logits = torch.randn(batch, experts, dtype=torch.float32)
    probabilities = torch.softmax(router_logits, dim=1)
    routing_weights, selected_experts = torch.topk(probabilities, top_k, dim=-1)
    routing_weights /= routing_weights.sum(dim=-1, keepdim=True)

    flash_output = torch.zeros(batch, hidden, dtype=torch.float16)
    result = fused_moe.cutlass_fused_moe(
        x,
        selected_experts.to(torch.int),
        routing_weights,
        w31_weight,
        w2_weight,
        torch.float16,
        output=flash_output,
        quant_scales=None,
        activation_type=fused_moe.ActivationType.Swiglu,
        tune_max_num_tokens=8192,
    )
    assert isinstance(result, list) and result[0] is flash_output

    expected = torch.zeros(batch, hidden)
    for token in range(batch):
        for weight, expert in zip(routing_weights[token], selected_experts[token], strict=True):
            up, gate = (w31_weight[expert].float() @ x[token].float()).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            expected[token] += weight * (w2_weight[expert].float() @ inner)
    return flash_output, expected


def test_flashinfers_example() -> None:
    out, expected = flashinfers_example(flashinfer)
    assert_close(out, expected, torch.float16)


def test_every_argument_by_position() -> None:
    """None of them is misplaced: the same call by keyword gives the same bits."""
    layer = make_layer(
        biases=("fc1", "fc2"), swiglu=("alpha", "beta", "limit"), ep_size=2, ep_rank=1
    )
    layer["quant_scales"] = []
    expected = fused_moe.cutlass_fused_moe(**layer, tp_size=4, tp_rank=3)
    output = torch.full_like(expected, float("nan"))
    out = cutlass_fused_moe(
        layer["input"],
        layer["token_selected_experts"],
        layer["token_final_scales"],
        layer["fc1_expert_weights"],
        layer["fc2_expert_weights"],
        torch.bfloat16,
        [],
        layer["fc1_expert_biases"],
        layer["fc2_expert_biases"],
        None,
        layer["swiglu_alpha"],
        layer["swiglu_beta"],
        layer["swiglu_limit"],
        4,
        3,
        2,
        1,
        1,
        0,
        output,
        False,
        False,
        False,
        False,
        False,
        False,
        False,
        4096,
        None,
        ActivationType.SwigluBias,
        True,
        False,
        [-1, -1],
        torch.empty(256, dtype=torch.uint8),
    )
    assert out[0] is output and torch.equal(output, expected)
    assert_close(output, reference({**layer, "tp_rank": 3}), torch.bfloat16)


@pytest.mark.parametrize("weights", ["int8", "uint8", "int4_32", "mxfp4"])
@pytest.mark.parametrize("activation", list(fused_moe.ActivationType), ids=lambda a: a.name)
def test_what_flashinfer_has_not(activation: fused_moe.ActivationType, weights: str) -> None:
    layer = make_layer(weights=weights, activation=activation)
    layer["activation_type"] = ActivationType(int(activation))
    [out] = cutlass_fused_moe(**layer)
    assert_close(out, reference({**layer, "activation_type": activation}), torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_wfp4afp8_humming": True}, "use_wfp4afp8_humming.*FP8"),
        ({"profile_ids": [3, -1]}, r"profile_ids is \[3, -1\].*autotune"),
        ({"backend": "cake"}, '"cake".*"cutlass"'),
        ({"activation_type": ActivationType.Situ}, "activation_type is Situ"),
        ({"activation_type": 12}, "activation_type is ClampedRelu2"),
        ({"situ_beta": torch.ones(4)}, "situ_beta is given"),
        ({"situ_linear_beta": torch.ones(4)}, "situ_linear_beta is given"),
        ({"clamped_relu2_limit": torch.ones(1)}, "clamped_relu2_limit is given"),
        ({"min_latency_mode": True}, "Min latency mode"),
        ({"use_deepseek_fp8_block_scale": True}, "FP8 block scaling"),
        ({"use_fp8_block_scaling": True}, "FP8 block scaling"),
        ({"use_w4a8_group_scaling": True}, "W4A8 group scaling"),
        ({"use_w4_group_scaling": True, "use_packed_weights": True}, "W4A8 group scaling"),
        ({"use_mxfp8_act_scaling": True}, "MXFP8"),
        ({"input_sf": torch.ones(13, 4), "swizzled_input_sf": False}, "input_sf"),
    ],
    ids=str,
)
def test_refused(changes: dict[str, Any], words: str) -> None:
    layer = make_layer(weights="uint8")
    layer["output"] = torch.full((13, 64), float("nan"), dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match=words):
        cutlass_fused_moe(**{**layer, **changes})
    assert layer["output"].isnan().all(), "the output was written"


def test_older_flags() -> None:
    layer = make_layer()
    expected = fused_moe.cutlass_fused_moe(**layer)
    [out] = cutlass_fused_moe(**layer, use_fp8_block_scaling=False, use_w4a8_group_scaling=False)
    assert torch.equal(out, expected)
    for old, new in (
        ("use_fp8_block_scaling", "use_deepseek_fp8_block_scale"),
        ("use_w4a8_group_scaling", "use_w4_group_scaling"),
    ):
        with pytest.raises(ValueError, match=f"{old} is False and {new}.*True"):
            cutlass_fused_moe(**{**layer, old: False, new: True})


def test_positions_of_older_releases() -> None:
    """Before 0.6.16 the argument after use_packed_weights was tune_max_num_tokens."""
    layer = make_layer()
    first = ("input", "token_selected_experts", "token_final_scales")
    weights = ("fc1_expert_weights", "fc2_expert_weights")
    arguments: list[Any] = [layer[name] for name in first + weights] + [torch.bfloat16, []]
    arguments += [None] * 6 + [1, 0, 1, 0, 1, 0, None] + [False] * 6
    with pytest.raises(TypeError, match=r"use_wfp4afp8_humming is 8192.*tune_max_num_tokens"):
        cutlass_fused_moe(*[*arguments, 8192])
    assert torch.equal(cutlass_fused_moe(*arguments)[0], cutlass_fused_moe(**layer)[0])


def test_unknown_backend_and_activation() -> None:
    with pytest.raises(ValueError, match="backend"):
        cutlass_fused_moe(**make_layer(), backend="cudnn")
    with pytest.raises(ValueError, match="activation_type is 11"):
        cutlass_fused_moe(**{**make_layer(), "activation_type": ActivationType.InvalidType})
    [out] = cutlass_fused_moe(**make_layer(), backend="cpu")
    assert out.shape == (13, 64)


def test_workspace_size() -> None:
    sizes: dict[str, Any] = {"x_dtype": torch.bfloat16, "weight_dtype": torch.int8}
    assert workspace_size(64, 128, 64, 8, 2, **sizes, device="cpu") == 0
    assert workspace_size(64, 128, 64, 8, 2, **sizes, backend="cpu", ep_size=2, ep_rank=1) == 0
    assert (
        workspace_size(
            max_num_tokens=64,
            hidden_size=128,
            intermediate_size=64,
            num_experts_total=8,
            top_k=2,
            device=torch.device("cpu"),
            **sizes,
        )
        == 0
    )
    for changes, words in (
        ({"min_latency_mode": True}, "Min latency mode"),
        ({"use_fp8_block_scaling": True}, "FP8 block scaling"),
        ({"use_wfp4afp8_humming": True}, "FP8"),
        ({"activation_type": ActivationType.Situ}, "Situ"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            workspace_size(64, 128, 64, 8, 2, **{**sizes, "backend": "cpu", **changes})


def test_autotune() -> None:
    """Tuning changes no result, and what it cannot do it says."""
    layer = make_layer()
    with flashinfer.autotune():
        [out] = cutlass_fused_moe(**layer)
    with flashinfer.autotune(False, tuning_buckets=(8, 16), round_up=True, skip_ops={"fp4_gemm"}):
        [again] = cutlass_fused_moe(**layer)
    assert_close(out, reference(layer), torch.bfloat16)
    assert torch.equal(out, again)
    with pytest.raises(ValueError, match="tuning_buckets"), flashinfer.autotune(tuning_buckets=()):
        pass


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_names_without_a_kernel(name: str) -> None:
    """Importing one is no error, using it says what to use."""
    value = getattr(flashinfer, name)
    assert value is getattr(flashinfer, name), "a class must be the same one each time"
    with pytest.raises(NotImplementedError, match=rf"fused_moe\.{name} is not in fused_moe: .*:"):
        value(1, x=2)
    if isinstance(value, type):
        assert not isinstance(3, value)
        with pytest.raises(NotImplementedError, match=name):
            getattr(value, "Nvfp4")  # noqa: B009


def test_names() -> None:
    assert set(flashinfer.__all__) <= set(dir(flashinfer)) >= set(REFUSED)
    assert not flashinfer.has_bgmv_moe() and not flashinfer.has_monomoe()
    # 0.7.2.post1 has 203 public names, of which 11 are served; three were in older releases.
    assert len(REFUSED) == 192 + 3
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = flashinfer.no_such_name


def test_interleaving_changes_nothing() -> None:
    """FlashInfer's callers rearrange MXFP4 weights for Hopper; here they stay."""
    weight = torch.randint(0, 256, (2, 64, 32), dtype=torch.uint8)
    scales = torch.randint(120, 130, (2, 64, 4), dtype=torch.uint8)
    assert torch.equal(flashinfer.interleave_moe_weights_for_sm90_mixed_gemm(weight), weight)
    assert torch.equal(flashinfer.interleave_moe_scales_for_sm90_mixed_gemm(scales), scales)
    with pytest.raises(NotImplementedError, match="int4"):
        flashinfer.interleave_moe_weights_for_sm90_mixed_gemm(weight, "int4")
    with pytest.raises(NotImplementedError, match="groups of 128"):
        flashinfer.interleave_moe_scales_for_sm90_mixed_gemm(scales, 128)


def test_mxfp4_as_flashinfers_callers_pass_it() -> None:
    """Rearranged by the functions for Hopper, scales viewed as int32."""
    layer = make_layer(weights="mxfp4", hidden=128, intermediate=128, biases=("fc1", "fc2"))
    expected = reference(layer)
    for name in ("fc1_expert_weights", "fc2_expert_weights"):
        layer[name] = flashinfer.interleave_moe_weights_for_sm90_mixed_gemm(layer[name], "fp4")
    layer["quant_scales"] = [
        flashinfer.interleave_moe_scales_for_sm90_mixed_gemm(scales, group_size=32)
        for scales in layer["quant_scales"]
    ]
    assert layer["use_w4_group_scaling"]
    [out] = cutlass_fused_moe(**layer)
    assert_close(out, expected, torch.bfloat16)
    layer["quant_scales"] = [scales.view(torch.int32) for scales in layer["quant_scales"]]
    [viewed] = cutlass_fused_moe(**layer)
    assert torch.equal(viewed, out)


def test_compile() -> None:
    layer = make_layer()
    torch.compiler.reset()

    def model(x: torch.Tensor) -> torch.Tensor:
        return cutlass_fused_moe(**{**layer, "input": x})[0] * 2

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(layer["input"]), model(layer["input"]))


needs_absence = pytest.mark.skipif(
    importlib.util.find_spec("flashinfer") is not None, reason="FlashInfer itself is installed"
)


@pytest.fixture
def installed() -> Iterator[None]:
    flashinfer.install()
    yield
    flashinfer.uninstall()


@needs_absence
@pytest.mark.usefixtures("installed")
def test_install() -> None:
    """The imports that programs have, word for word."""
    import flashinfer as top
    import flashinfer.fused_moe as module
    from flashinfer import CuteDslMoEWrapper, autotune, cutlass_fused_moe
    from flashinfer.autotuner import autotune as autotune_of_its_module
    from flashinfer.fused_moe import ActivationType, trtllm_fp8_block_scale_moe
    from flashinfer.fused_moe.core import cutlass_fused_moe as cutlass_fused_moe_of_core
    from flashinfer.tllm_enums import RoutingMethodType, is_gated_activation

    assert cutlass_fused_moe is cutlass_fused_moe_of_core is module.cutlass_fused_moe
    assert autotune is autotune_of_its_module is top.autotune
    assert (ActivationType.Swiglu, RoutingMethodType.Renormalize) == (3, 1)
    assert callable(trtllm_fp8_block_scale_moe) and top.fused_moe is module
    assert isinstance(CuteDslMoEWrapper, type) and is_gated_activation(ActivationType.Swiglu)
    assert importlib.util.find_spec("flashinfer.fused_moe") is not None
    assert top.__version__ == "0.7.2.post1+fused.moe"
    out, expected = flashinfers_example(module)
    assert_close(out, expected, torch.float16)
    flashinfer.install()
    assert sys.modules["flashinfer"] is top, "a second call must change nothing"


@needs_absence
@pytest.mark.usefixtures("installed")
def test_install_brings_nothing_else() -> None:
    import flashinfer as top

    with pytest.raises(AttributeError, match=r"BatchDecodeWithPagedKVCacheWrapper.*stand-in"):
        _ = top.BatchDecodeWithPagedKVCacheWrapper
    with pytest.raises(ImportError):
        import flashinfer.prefill  # noqa: F401


@needs_absence
def test_uninstall() -> None:
    flashinfer.uninstall()
    flashinfer.install()
    flashinfer.uninstall()
    assert not [name for name in sys.modules if name.split(".")[0] == "flashinfer"]
    with pytest.raises(ImportError):
        import flashinfer as top  # noqa: F401


def test_the_real_one_is_not_replaced(tmp_path: Any) -> None:
    (tmp_path / "flashinfer").mkdir()
    (tmp_path / "flashinfer" / "__init__.py").write_text("real = True\n")
    for first in ("", "import flashinfer\n"):
        program = f"""
{first}from fused_moe.integrations.flashinfer import install, uninstall
try:
    install()
except RuntimeError as error:
    assert "FlashInfer itself is installed" in str(error), error
else:
    raise SystemExit("the real one was replaced")
uninstall()
import flashinfer
assert flashinfer.real
"""
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONPATH": ":".join([str(tmp_path), *sys.path])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
