# SPDX-License-Identifier: Apache-2.0
"""Every bad input gets an error that names the argument, and nothing is written."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from bad_calls import CALLS, TENSORS, Arguments, Bad, edit, misaligned, scale, sliced
from cpu_layer import FOUR_BIT, WEIGHTS, make_layer
from fused_moe import backends, cutlass_fused_moe, cutlass_fused_moe_workspace_size


def good(weights: str = "same") -> Arguments:
    """A call with every tensor given, the output full of NaN."""
    arguments = make_layer(
        weights=weights, biases=("fc1", "fc2"), swiglu=("alpha", "beta", "limit")
    )
    arguments["output"] = torch.full_like(arguments["input"], float("nan"))
    arguments["workspace_buffer"] = torch.empty(1024, dtype=torch.uint8)
    return arguments


def rejects(arguments: Arguments, error: type[Exception], words: tuple[str, ...]) -> None:
    """Fails unless the call raises just this, with these words, and writes nothing."""
    output = arguments["output"]
    before = output.clone() if isinstance(output, torch.Tensor) else None
    with pytest.raises(error) as caught:
        cutlass_fused_moe(**arguments)
    assert caught.type is error, "a subclass, such as NotImplementedError, says something else"
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    if before is not None and output.device.type == "cpu" and output.layout == torch.strided:
        assert torch.equal(output.isnan(), before.isnan()), "the output was written"


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_good_call_is_good(weights: str) -> None:
    assert cutlass_fused_moe(**good(weights)).isfinite().all()


def test_the_least_that_is_allowed() -> None:
    layer = make_layer(tokens=1, experts=1, top_k=1)
    assert cutlass_fused_moe(**layer, tune_max_num_tokens=1).isfinite().all()


@pytest.mark.parametrize("bad", CALLS, ids=lambda bad: bad.name)
def test_bad(bad: Bad) -> None:
    arguments = good(bad.weights)
    bad.change(arguments)
    rejects(arguments, bad.error, bad.words)


@pytest.mark.parametrize(
    ("weights", "change"),
    [
        ("same", edit("fc1_expert_weights", sliced(32, 2))),
        ("uint8", edit("fc1_expert_weights", sliced(48, 1))),
        ("int4_32", edit("fc1_expert_weights", sliced(96, 1))),
    ],
)
def test_4_bits_are_mentioned_only_where_they_may_be_meant(
    weights: str, change: Callable[[Arguments], object]
) -> None:
    arguments = good(weights)
    change(arguments)
    with pytest.raises(ValueError, match=r"fc1_expert_weights has the shape") as caught:
        cutlass_fused_moe(**arguments)
    assert "4-bit" not in str(caught.value)


VECTORS = [name for name in TENSORS if name.startswith(("input", "fc"))]


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        *itertools.product(VECTORS, WEIGHTS),
        *itertools.product(("quant_scales[0]", "quant_scales[1]"), WEIGHTS[1:]),
    ],
)
def test_misaligned_where_memory_is_allocated(name: str, weights: str) -> None:
    quantized = name.startswith("quant_scales")
    arguments = good(weights)
    arguments["output"] = arguments["workspace_buffer"] = None
    change = scale(int(name[-2]), misaligned) if quantized else edit(name, misaligned)
    change(arguments)
    rejects(arguments, ValueError, (f"{name} starts at", "16B-aligned"))


def at_odd_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same values from memory of the caller's own, 2 bytes past an address for 8."""
    size = tensor.numel() * tensor.element_size()
    memory = bytearray(size + 16)
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    flat = torch.frombuffer(
        memory, dtype=tensor.dtype, count=tensor.numel(), offset=(2 - start) % 8
    )
    return flat.view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("given", [True, False], ids=["given", "allocated"])
@pytest.mark.parametrize("name", [n for n in TENSORS if n.startswith(("token", "swiglu"))])
def test_elements_out_of_place(name: str, given: bool) -> None:
    arguments = good()
    if not given:
        arguments["output"] = arguments["workspace_buffer"] = None
    edit(name, at_odd_bytes)(arguments)
    rejects(arguments, ValueError, (f"{name} starts at", "4B-aligned"))


@pytest.mark.parametrize("weights", ["same", "int8"])
@pytest.mark.parametrize("which", ["hidden", "intermediate"])
@pytest.mark.parametrize("excess", [4, 8, 12])
def test_multiples(which: str, excess: int, weights: str) -> None:
    sizes: Arguments = {which: 64 + excess}
    arguments = make_layer(**sizes, weights=weights)
    arguments["output"] = torch.full_like(arguments["input"], float("nan"))
    if excess == 8 and weights == "same":
        assert cutlass_fused_moe(**arguments).isfinite().all()
    else:
        multiple = "8" if weights == "same" else "16"
        name = {"hidden": "input.shape[1]", "intermediate": "fc2_expert_weights.shape[2]"}[which]
        words = (f"the {which} size ({name}) is {64 + excess}", f"positive multiple of {multiple}")
        rejects(arguments, ValueError, words)


@pytest.mark.parametrize("weights", FOUR_BIT)
@pytest.mark.parametrize("which", ["hidden", "intermediate"])
@pytest.mark.parametrize("excess", [2, 8, 16, 24, 33])
def test_multiples_of_4_bit_weights(which: str, excess: int, weights: str) -> None:
    """Rows are whole 16-byte pieces: whether they are whole groups too, the scales tell."""
    arguments = make_layer(weights=weights)
    hidden, intermediate = arguments["input"].shape[1], 2 * arguments["fc2_expert_weights"].shape[2]
    if which == "hidden":
        hidden += excess
    else:
        intermediate += excess // 2 * 2  # two a byte: no shape means an odd one
    arguments["input"] = torch.zeros(13, hidden, dtype=torch.bfloat16)
    arguments["output"] = torch.full_like(arguments["input"], float("nan"))
    for name, shape in (
        ("fc1_expert_weights", (4, 2 * intermediate, hidden // 2)),
        ("fc2_expert_weights", (4, hidden, intermediate // 2)),
    ):
        arguments[name] = torch.zeros(shape, dtype=torch.uint8)
    name = {"hidden": "input.shape[1]", "intermediate": "fc2_expert_weights.shape[2] * 2"}[which]
    words = (f"the {which} size ({name}) is", "positive multiple of 32")
    if excess == 33 and which == "intermediate":
        words = ("quant_scales[0] has the shape", "(groups of 32)")
    rejects(arguments, ValueError, words)


@pytest.mark.parametrize("name", ["input", "token_final_scales", "fc2_expert_weights"])
@pytest.mark.parametrize("written", ["output", "workspace_buffer"])
def test_overlap(written: str, name: str) -> None:
    arguments = {**good(), "output": None, "workspace_buffer": None}
    shared = torch.zeros(1 << 17, dtype=torch.uint8)
    tensor = arguments[name]
    size = tensor.numel() * tensor.element_size()
    first = 1 << 12
    own = shared[first : first + size].view(tensor.dtype).view(tensor.shape)
    arguments[name] = own.copy_(tensor)
    inside = first + (size - 1) // 64 * 64  # the last bytes of it
    if written == "output":
        memory = shared[inside : inside + 13 * 64 * 2].view(torch.bfloat16).view(13, 64)
    else:
        memory = shared[inside : inside + 1024]
    arguments[written] = memory
    rejects(arguments, ValueError, (f"{written} overlaps {name}",))
    needed = memory.numel() * memory.element_size()
    for beside in (first - needed, first + -(-size // 64) * 64):
        clear = shared[beside : beside + needed]
        arguments[written] = clear.view(memory.dtype).view(memory.shape)
        assert cutlass_fused_moe(**arguments).isfinite().all(), "side by side is no overlap"


def test_output_and_workspace_overlap() -> None:
    arguments = good()
    arguments["workspace_buffer"] = arguments["output"].view(torch.uint8).view(-1)
    rejects(arguments, ValueError, ("output overlaps workspace_buffer",))


def test_slices_of_tokens_are_good() -> None:
    layer = make_layer(top_k=1)
    whole = cutlass_fused_moe(**layer)
    for name in ("input", "token_selected_experts", "token_final_scales"):
        layer[name] = layer[name][5:]
    assert torch.equal(cutlass_fused_moe(**layer), whole[5:])


def test_an_error_is_not_remembered() -> None:
    arguments = good()
    bad = {**arguments, "tp_rank": 1}
    for _ in range(2):
        rejects(bad, ValueError, ("tp_rank is 1",))
        assert cutlass_fused_moe(**arguments).isfinite().all()


def test_too_many_slots() -> None:
    def plan(tokens: int, top_k: int) -> int:
        return cutlass_fused_moe_workspace_size(
            tokens, 64, 64, num_experts=8, top_k=top_k, x_dtype=torch.float16, backend="cpu"
        )

    with pytest.raises(ValueError, match=r"num_tokens \* top_k is 2147483648.*split the tokens"):
        plan(2**28, 8)
    # Routing rounds rows up to whole tiles, in 32 bits: 2^31 - 1 of an expert overflowed.
    with pytest.raises(ValueError, match=r"num_tokens \* top_k is 2147482625.*at most 2147482624"):
        plan(2**31 - 1023, 1)
    assert plan(2**31 - 1024, 1) >= 0


def test_too_many_slots_of_a_call() -> None:
    call = make_layer(tokens=1, top_k=4)
    for name in ("input", "token_selected_experts", "token_final_scales"):
        call[name] = call[name].to("meta").expand(2**29, -1)  # no memory behind it
    with pytest.raises(ValueError, match=r"size of token_selected_experts is 2147483648.*split"):
        cutlass_fused_moe(**call, backend="cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_tokens": -1}, r"num_tokens is -1; it must be 0 or more"),
        ({"num_experts": 0}, r"num_experts is 0; it must be 1 or more"),
        ({"top_k": 0}, r"top_k is 0; it must be 1 or more"),
        ({"ep_size": 3}, r"num_experts is 8; it must be a multiple of ep_size, 3"),
        ({"ep_size": 2, "ep_rank": 2}, r"ep_rank is 2; it must be from 0 to ep_size - 1 = 1"),
        ({"tp_rank": 1}, r"tp_rank is 1"),
        ({"hidden_size": 0}, r"hidden size .* is 0; .* positive multiple of 8"),
        ({"intermediate_size": -16}, r"intermediate size .* is -16; .* positive multiple of 8"),
        ({"activation_type": -1}, r"activation_type is -1; .*Gelu 0"),
        ({"output_dtype": torch.float64}, r"output_dtype is torch\.float64"),
        (
            {"num_experts": 8196, "ep_size": 4, "backend": "sm80"},
            r"num_experts / ep_size is 2049; it must be at most 2048",
        ),
    ],
    ids=str,
)
def test_bad_workspace_queries(changes: Arguments, words: str) -> None:
    sizes = {"num_tokens": 13, "hidden_size": 64, "intermediate_size": 48}
    query = {**sizes, "num_experts": 8, "top_k": 2, "x_dtype": torch.bfloat16, "backend": "cpu"}
    assert cutlass_fused_moe_workspace_size(**query) == 0
    with pytest.raises(ValueError, match=words):
        cutlass_fused_moe_workspace_size(**{**query, **changes})


def test_a_workspace_query_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cutlass_fused_moe_workspace_size(13, 64, 48, 8, 2, x_dtype=torch.float32) == 0


def test_old_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_capability", lambda index: (7, 5) if index == 1 else (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    assert backends.choose(None, torch.device("cuda", 0)) == "sm80"
    device = torch.device("cuda", 1)
    words = r"cuda:1, Tesla T4, .*7\.5.*8\.0 or newer"
    with pytest.raises(ValueError, match=words):
        backends.choose(None, device)
    with pytest.raises(ValueError, match=words):
        backends.check_device("sm80", device)


@pytest.mark.parametrize(
    ("device", "backend"), [("meta", None), ("meta", "cpu"), ("meta", "sm80"), ("cpu", "sm80")]
)
def test_devices_without_the_backend(device: str, backend: str | None) -> None:
    layer = {
        name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in make_layer().items()
    }
    with pytest.raises(ValueError, match=f"input is on {device}"):
        cutlass_fused_moe(**layer, backend=backend)
