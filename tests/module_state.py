# SPDX-License-Identifier: Apache-2.0
"""What `FusedMoE` saves, loads, converts and refuses."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import pytest
import torch

from fused_moe import ActivationType, FusedMoE, Routing
from module_layers import (
    EVERYTHING,
    EXPERTS,
    FORMATS,
    HIDDEN,
    INTERMEDIATE,
    Checkpoint,
    fused,
    normal,
    random_layer,
    tokens,
)


def safetensors() -> Any:
    """safetensors.torch, which an interpreter's own packages may lack."""
    return pytest.importorskip("safetensors.torch", reason="needs safetensors")


@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("model", EVERYTHING)
def test_safetensors(model: str, weight_format: str, on_meta: bool, tmp_path: pathlib.Path) -> None:
    layer = random_layer(model)
    if weight_format != "same":
        layer.quantize(weight_format)
    x = tokens()
    expected = layer(x)
    files = safetensors()
    files.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    saved = files.load_file(tmp_path / "layer.safetensors")
    torch.manual_seed(6)  # other random weights than the saved ones
    arguments = {**EVERYTHING[model], "weight_format": weight_format, "dtype": torch.bfloat16}
    device = "meta" if on_meta else "cpu"
    loaded = FusedMoE(HIDDEN, INTERMEDIATE, EXPERTS, **arguments, device=device)
    assert on_meta or not torch.equal(loaded(x), expected)
    loaded.load_state_dict(saved, strict=True, assign=on_meta)
    assert torch.equal(loaded(x), expected)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_state_names() -> None:
    assert list(random_layer("deepseek_v3", weight_format="int8").state_dict()) == [
        "router.weight",
        "router.correction_bias",
        "experts.fc1_weight",
        "experts.fc2_weight",
        "experts.fc1_scale",
        "experts.fc2_scale",
        "shared_experts.gate_up_weight",
        "shared_experts.down_weight",
    ]
    names = random_layer("gpt_oss").state_dict().keys()
    assert names >= {"router.bias", "experts.fc2_bias", "experts.swiglu_limit"}


@pytest.mark.parametrize("saved", FORMATS)
@pytest.mark.parametrize("built", FORMATS)
def test_another_format_does_not_load(saved: str, built: str) -> None:
    """Not even without strict, where a missing scale would go unnoticed."""
    state = random_layer(weight_format=saved).state_dict()
    layer = random_layer(weight_format=built)
    if saved == built:
        layer.load_state_dict(state)
        return
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=r"build the module with the format|size mismatch"):
            layer.load_state_dict(state, strict=False, assign=assign)


def test_a_checkpoint_of_another_floating_dtype_loads() -> None:
    state = {name: t.float() for name, t in random_layer().state_dict().items()}
    layer = FusedMoE(HIDDEN, INTERMEDIATE, EXPERTS, Routing(2), dtype=torch.bfloat16)
    layer.load_state_dict(state)
    assert torch.equal(layer(tokens()), random_layer()(tokens()))


def test_assigning_keeps_what_is_float32() -> None:
    """DeepSeek's checkpoints hold the router in bfloat16, and compute it in float32."""
    layer = random_layer("deepseek_v3", weight_format="int8")
    state = {
        name: t.bfloat16() if t.is_floating_point() else t for name, t in layer.state_dict().items()
    }
    loaded = random_layer("deepseek_v3", weight_format="int8", device="meta")
    loaded.load_state_dict(state, strict=True, assign=True)
    for name, tensor in layer.state_dict().items():
        found = loaded.state_dict()[name]
        assert found.dtype == tensor.dtype and torch.equal(found, state[name].to(tensor.dtype))
    assert loaded(tokens()).dtype == torch.bfloat16


def test_weights_of_other_modules() -> None:
    """Parameters that ask for gradients, as those of torch.nn.Linear do."""
    checkpoint = Checkpoint()

    def asking(weights: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.nn.Parameter(weight) for weight in weights]

    lists = (asking(checkpoint.w1), asking(checkpoint.w2), asking(checkpoint.w3))
    (router,) = asking([checkpoint.router])
    layer = FusedMoE.from_experts(router, *lists, Routing(2))
    assert not layer(tokens()).requires_grad
    assert torch.equal(layer(tokens()), fused()(tokens()))


def test_views_of_a_checkpoint_are_copied() -> None:
    """Both weights in one storage, which a module must not keep as a whole for each of them."""
    checkpoint = Checkpoint()
    gate_up, down = checkpoint.fused()
    one = torch.cat([gate_up.flatten(), down.flatten()])
    layer = FusedMoE.from_tensors(
        checkpoint.router,
        one[: gate_up.numel()].view(gate_up.shape),
        one[gate_up.numel() :].view(down.shape),
        Routing(2),
    )
    storages = [t.untyped_storage() for t in layer.state_dict().values()]
    assert len({s.data_ptr() for s in storages}) == 3
    assert [s.nbytes() for s in storages] == [t.nbytes for t in layer.state_dict().values()]
    whole = FusedMoE.from_tensors(checkpoint.router, gate_up, down, Routing(2))
    assert whole.experts.fc2_weight.data_ptr() == down.data_ptr(), "not copied without need"
    assert torch.equal(layer(tokens()), whole(tokens()))


@pytest.mark.parametrize("weight_format", FORMATS[1:])
def test_tensors_that_are_quantized_already(weight_format: str) -> None:
    layer = random_layer("gpt_oss").quantize(weight_format)
    e, r = layer.experts, layer.router
    assert e.fc1_scale is not None and e.fc2_scale is not None
    again = FusedMoE.from_tensors(
        r.weight,
        e.fc1_weight,
        e.fc2_weight,
        Routing(4),
        quant_scales=[e.fc1_scale, e.fc2_scale],
        weight_format=weight_format,
        fc1_bias=e.fc1_bias,
        fc2_bias=e.fc2_bias,
        router_bias=r.bias,
        activation=ActivationType.SwigluBias,
        swiglu_alpha=1.702,
        swiglu_beta=1.0,
        swiglu_limit=0.5,
    )
    assert again.experts.format == e.format
    assert torch.equal(again(tokens()), layer(tokens()))
    assert fused(weight_format=weight_format).experts.weight_format == weight_format


@pytest.mark.parametrize("weight_format", FORMATS)
def test_any_default_dtype(weight_format: str) -> None:
    """Serving programs set it to the model's; scales and swiglu parameters are float32."""
    checkpoint = Checkpoint()
    arguments: dict[str, Any] = {
        "activation": ActivationType.SwigluBias,
        "swiglu_alpha": 1.702,
        "swiglu_beta": 1,  # whole numbers, too
        "swiglu_limit": 7,
        "weight_format": weight_format,
    }
    gate_up, down = checkpoint.fused()
    expected = FusedMoE.from_gate_up(checkpoint.router, gate_up, down, Routing(2), **arguments)
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = FusedMoE.from_gate_up(checkpoint.router, gate_up, down, Routing(2), **arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in expected.state_dict().items():
        made = layer.state_dict()[name]
        assert made.dtype == tensor.dtype and torch.equal(made, tensor), name
    assert torch.equal(layer.experts.get_buffer("swiglu_alpha"), torch.full((EXPERTS,), 1.702))


def test_quantized_tensors_beside_a_float32_router() -> None:
    """DeepSeek-V3's: the dtype of the layer is that of the shared experts, not the router's."""
    layer = random_layer("deepseek_v3").quantize("int8")
    e, r, s = layer.experts, layer.router, layer.shared_experts
    again = FusedMoE.from_tensors(
        r.weight,
        e.fc1_weight,
        e.fc2_weight,
        r.routing,
        quant_scales=[e.fc1_scale, e.fc2_scale],
        weight_format="int8",
        correction_bias=r.correction_bias,
        shared_gate_up=s.gate_up_weight,
        shared_down=s.down_weight,
    )
    assert torch.equal(again(tokens()), layer(tokens()))
    assert again.half().router.weight.dtype == torch.float32


def test_materializing_what_was_built_on_meta() -> None:
    """to_empty and reset_parameters, as FSDP does it: nothing may be left as it was found."""
    layer = random_layer("gpt_oss", device="meta").to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(float("nan"))
    for part in (layer.router, layer.experts):
        part.reset_parameters()
    for name, expected in random_layer("gpt_oss").experts.named_buffers():
        assert torch.equal(layer.experts.get_buffer(name), expected), name
    assert layer(tokens()).isfinite().all()


def test_quantizing_in_inference_mode_leaves_ordinary_tensors() -> None:
    layer, other = random_layer(), random_layer(weight_format="int8")
    with torch.inference_mode():
        layer.quantize("int8")
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(tokens()), other(tokens()))


def test_conversions_keep_what_is_float32() -> None:
    layer = random_layer("deepseek_v3").quantize("int8")
    layer.router.correction_bias.copy_(1 + normal(EXPERTS, seed=1) / 4096)
    exact = layer.router.correction_bias.clone()
    scale = layer.experts.fc1_scale.clone()
    for converted in (layer.half(), layer.to(torch.bfloat16), copy.deepcopy(layer)):
        assert torch.equal(converted.router.correction_bias, exact)
        assert torch.equal(converted.experts.fc1_scale, scale)
        assert converted.router.weight.dtype == torch.float32
    assert layer.shared_experts.down_weight.dtype == torch.bfloat16
    layer(tokens())
    moved = layer.to("meta")
    assert all(t.is_meta for t in moved.state_dict().values())
    assert moved.experts.fc1_scale.dtype == torch.float32
    emptied = moved.to_empty(device="cpu")
    assert not any(t.is_meta for t in emptied.state_dict().values())
    plain = random_layer(dtype=torch.float32).half()
    assert plain.router.weight.dtype == plain.experts.fc1_weight.dtype == torch.float16


def test_a_router_of_another_dtype_keeps_it() -> None:
    checkpoint = Checkpoint()
    router = checkpoint.router.float() + 1e-4  # numbers that bfloat16 does not hold
    gate_up, down = checkpoint.fused()
    layer = FusedMoE.from_gate_up(router, gate_up, down, Routing(2))
    assert torch.equal(layer.router.weight, router)
    assert layer(tokens()).dtype == torch.bfloat16
    assert torch.equal(layer.to(torch.float16).router.weight, router)
    rounded = FusedMoE.from_gate_up(router, gate_up, down, Routing(2), router_dtype=torch.bfloat16)
    assert rounded.router.weight.dtype == torch.bfloat16


def test_no_gradients() -> None:
    layer, x = random_layer("qwen3_next"), tokens()
    expected = layer(x)
    assert not expected.requires_grad
    wanting = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"FusedMoE is for inference.*torch\.inference_mode"):
        layer(wanting)
    with torch.no_grad():
        assert torch.equal(layer(wanting), expected)
    for part in (layer.router.weight, layer.experts.fc2_weight, layer.shared_experts.down_weight):
        part.requires_grad_(True)
        with pytest.raises(RuntimeError, match="no gradient flows through it"):
            layer(x)
        part.requires_grad_(False)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)


ERRORS: dict[str, tuple[Any, str]] = {
    "format": (lambda: random_layer(weight_format="fp8"), "weight_format is 'fp8'; it must be one"),
    "group": (lambda: random_layer(weight_format="int4", group_size=48), "group_size is 48; with"),
    "no group": (lambda: random_layer(weight_format="int8", group_size=32), "it must be None"),
    "depth": (
        lambda: FusedMoE(64, 40, 8, Routing(2), weight_format="int8"),
        "sizes are (64, 40); with the weight_format int8 both must be positive multiples of 16",
    ),
    "experts": (
        lambda: random_layer(ep_size=3),
        "num_experts is 8; it must be a positive",
    ),
    "rank": (lambda: random_layer(ep_size=2, ep_rank=2), "ep_rank is 2"),
    "top_k": (lambda: FusedMoE(64, 32, 8, Routing(9)), "top_k is 9; it must be at most 8"),
    "shared": (
        lambda: random_layer(activation=ActivationType.SwigluStep, shared_intermediate_size=8),
        "the activation of the shared experts is SwigluStep",
    ),
    "twice": (lambda: random_layer().quantize("int8").quantize("int4"), "are int8 already"),
    "same": (lambda: random_layer().quantize("same"), "to quantize, it must be one of int8"),
    "meta": (lambda: random_layer(device="meta").quantize("int8"), "are on the meta device"),
    "x": (lambda: random_layer()(torch.zeros(3, 32)), "x has the shape [3, 32]; its last"),
    "dtype": (lambda: random_layer()(tokens().half()), "fc1_expert_weights is torch.bfloat16"),
    "shared dtype": (
        lambda: random_layer("qwen3_next").quantize("int8")(tokens().half()),
        "x is torch.float16, the shared experts' weights are torch.bfloat16",
    ),
    "routing": (lambda: random_layer(routing=2), "routing is 2; it must be a Routing"),
    "rank of gate_up": (lambda: fused(gate_up=torch.zeros(4, 4)), "gate_up has the shape [4, 4]"),
    "odd": (
        lambda: fused(gate_up=torch.zeros(8, 64, 7), transposed=True, interleaved=True),
        "gate_up has 7 rows an expert",
    ),
    "down": (lambda: fused(down=torch.zeros(8, 64, 48)), "fc1_weight has the shape [8, 192, 64]"),
    "bias": (
        lambda: fused(gate_up_bias=torch.zeros(8, 96)),
        "fc1_bias has the shape [8, 96]; it must be [8, 192]",
    ),
    "half a shared": (lambda: fused(shared_down=torch.zeros(64, 8)), "one of shared_gate_up and"),
    "shared down": (
        lambda: fused(shared_gate_up=torch.zeros(16, 64), shared_down=torch.zeros(64)),
        "shared_down has the shape [64]; it must have two dimensions, [64, I_s]",
    ),
    "scale gate": (
        lambda: fused(shared_scale_gate=torch.zeros(1, 64)),
        "shared_scale_gate is given without shared_gate_up and shared_down",
    ),
    "scale gate alone": (
        lambda: random_layer(shared_scale_gate=True),
        "shared_scale_gate is True with shared_intermediate_size 0",
    ),
    "integers": (
        lambda: fused(gate_up=torch.zeros(8, 192, 64).char()),
        "are no quant_scales",
    ),
    "scales": (
        lambda: FusedMoE.from_tensors(
            Checkpoint().router,
            torch.zeros(8, 192, 32, dtype=torch.uint8),
            torch.zeros(8, 64, 48, dtype=torch.uint8),
            Routing(2),
            quant_scales=[torch.ones(8, 192, 2), torch.ones(8, 64, 3)],
            weight_format="mxfp4",
        ),
        "quant_scales[0] is torch.float32; it must be torch.uint8",
    ),
    "one scale": (
        lambda: fused(quant_scales=[torch.ones(8, 192)], weight_format="int8"),
        "quant_scales has 1 tensors; it must have 2",
    ),
    "scales of floats": (
        lambda: fused(quant_scales=[torch.ones(8, 192), torch.ones(8, 64)]),
        "quant_scales are given with fc1_weight torch.bfloat16",
    ),
    "device": (lambda: fused(down_bias=torch.zeros(8, 64, device="meta")), "fc2_bias is on meta"),
    "lists": (
        lambda: FusedMoE.from_experts(
            Checkpoint().router, Checkpoint().w1, Checkpoint().w2[:3], None, Routing(2)
        ),
        "w2 has 3 tensors; it must have one for each of the 8 experts",
    ),
    "list": (
        lambda: FusedMoE.from_experts(
            Checkpoint().router, Checkpoint().w1, Checkpoint().w1, None, Routing(2)
        ),
        "w2[0] has the shape [96, 64]; it must be [64, 96]",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors(error: str) -> None:
    call, words = ERRORS[error]
    with pytest.raises((TypeError, ValueError)) as raised:
        call()
    assert words in str(raised.value)
