# SPDX-License-Identifier: Apache-2.0
"""The table of bad calls: each one change of a good call, and what its error must say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fused_moe import ActivationType

Arguments = dict[str, Any]


class Bad(NamedTuple):
    """One bad call: what makes it so from a good one, and what the error must say."""

    name: str
    change: Callable[[Arguments], object]
    words: tuple[str, ...]
    error: type[Exception] = ValueError
    weights: str = "same"


def replace(**values: Any) -> Callable[[Arguments], object]:
    """Sets arguments."""
    return lambda arguments: arguments.update(values)


def edit(name: str, change: Callable[[torch.Tensor], object]) -> Callable[[Arguments], object]:
    """Puts a function of an argument in its place."""
    return lambda arguments: arguments.update({name: change(arguments[name])})


def scale(index: int, change: Callable[[torch.Tensor], object]) -> Callable[[Arguments], object]:
    """Changes one of the quant_scales."""

    def apply(arguments: Arguments) -> None:
        scales = list(arguments["quant_scales"])
        scales[index] = change(scales[index])
        arguments["quant_scales"] = scales

    return apply


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values and shape, with gaps between the elements."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, one element past an aligned address."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return flat.view(tensor.shape).copy_(tensor)


def sliced(size: int, dimension: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Keeps the first `size` of a dimension, contiguous."""
    return lambda tensor: tensor.narrow(dimension, 0, size).contiguous()


TENSORS = (
    "input",
    "token_selected_experts",
    "token_final_scales",
    "fc1_expert_weights",
    "fc2_expert_weights",
    "fc1_expert_biases",
    "fc2_expert_biases",
    "swiglu_alpha",
    "swiglu_beta",
    "swiglu_limit",
    "output",
    "workspace_buffer",
)
REQUIRED = ("input", "token_selected_experts", "fc1_expert_weights", "fc2_expert_weights")
# The shapes of the good call: 13 tokens, H = 64, I = 48, 4 experts, k = 2, gated. With INT4 in
# groups of 32 and MXFP4, I is 96; with INT4 in groups of 64, 192.
SHAPES = {
    "input": [13, 64],
    "token_selected_experts": [13, 2],
    "token_final_scales": [13, 2],
    "fc1_expert_weights": [4, 96, 64],
    "fc2_expert_weights": [4, 64, 48],
    "fc1_expert_biases": [4, 96],
    "fc2_expert_biases": [4, 64],
    "swiglu_alpha": [4],
    "swiglu_beta": [4],
    "swiglu_limit": [4],
    "output": [13, 64],
}
WRONG_DTYPE = {
    "input": (torch.float64, "torch.float16 or torch.bfloat16"),
    "token_selected_experts": (torch.int64, "use token_selected_experts.to(torch.int32)"),
    "token_final_scales": (torch.bfloat16, "use token_final_scales.to(torch.float32)"),
    "fc1_expert_weights": (torch.float16, "torch.bfloat16 or torch.int8 or torch.uint8"),
    "fc2_expert_weights": (torch.float16, "the dtype of fc1_expert_weights, torch.bfloat16"),
    "fc1_expert_biases": (torch.float32, "must be torch.bfloat16"),
    "fc2_expert_biases": (torch.float16, "must be torch.bfloat16"),
    "swiglu_alpha": (torch.bfloat16, "must be torch.float32"),
    "swiglu_beta": (torch.float64, "must be torch.float32"),
    "swiglu_limit": (torch.int32, "must be torch.float32"),
    "output": (torch.float32, "must be torch.bfloat16"),
    "workspace_buffer": (torch.float32, "torch.uint8 or torch.int8"),
}

GENERATED = [
    *(Bad(f"{n}-list", replace(**{n: [1.0]}), (n,), TypeError) for n in TENSORS),
    *(Bad(f"{n}-text", replace(**{n: "x"}), (f"{n} is a str",), TypeError) for n in TENSORS),
    *(Bad(f"{n}-none", replace(**{n: None}), (f"{n} is None",), TypeError) for n in REQUIRED),
    *(
        Bad(f"{n}-dtype", edit(n, lambda t, d=d: t.to(d)), (n, str(d), must))  # type: ignore[misc]
        for n, (d, must) in WRONG_DTYPE.items()
    ),
    *(
        Bad(f"{n}-device", edit(n, lambda t: t.to("meta")), (f"{n} is on meta", "of input, cpu"))
        for n in TENSORS
        if n != "input"
    ),
    *(
        Bad(f"{n}-rank", edit(n, lambda t: t.unsqueeze(0)), (n, str([1, *shape])))
        for n, shape in SHAPES.items()
    ),
    *(
        Bad(f"{n}-strided", edit(n, strided), (f"{n} is not contiguous", "must be contiguous"))
        for n in TENSORS
    ),
    *(
        Bad(f"{n}-misaligned", edit(n, misaligned), (f"{n} starts at", "16B-aligned"))
        for n in TENSORS
        if n.startswith(("input", "fc", "output"))
    ),
    *(
        Bad(f"{n}-sparse", edit(n, lambda t: t.to_sparse()), (f"{n} has the layout", "to_dense"))
        for n in REQUIRED
    ),
]

SHAPE_CASES = [
    Bad("input-hidden", edit("input", sliced(32, 1)), ("input", "[13, 32]", "must be 64")),
    Bad("ids-tokens", edit("token_selected_experts", sliced(12, 0)), ("[12, 2]", "[13, 2]")),
    Bad("scales-k", edit("token_final_scales", sliced(1, 1)), ("token_final_scales", "[13, 1]")),
    Bad("fc1-hidden", edit("fc1_expert_weights", sliced(32, 2)), ("fc1_expert_weights", "96, 64]")),
    Bad("fc1-not-2I", edit("fc1_expert_weights", sliced(48, 1)), ("fc1_expert_weights", "2 * in")),
    Bad("fc1-experts", edit("fc1_expert_weights", sliced(3, 0)), ("fc2_expert_weights", "[3, 64")),
    Bad("fc1-empty", edit("fc1_expert_weights", sliced(0, 0)), ("fc1_expert_weights", "no expert")),
    Bad("fc2-hidden", edit("fc2_expert_weights", sliced(32, 1)), ("fc2_expert_weights", "64, 48]")),
    Bad("fc2-experts", edit("fc2_expert_weights", sliced(3, 0)), ("fc2_expert_weights", "[4, 64")),
    Bad("no-k", edit("token_selected_experts", sliced(0, 1)), ("token_selected_experts", "1 or m")),
    Bad("bias1", edit("fc1_expert_biases", sliced(48, 1)), ("fc1_expert_biases", "[4, 96]")),
    Bad("bias2", edit("fc2_expert_biases", sliced(48, 1)), ("fc2_expert_biases", "[4, 64]")),
    Bad("alpha", edit("swiglu_alpha", sliced(3, 0)), ("swiglu_alpha", "[3]", "[4]")),
    Bad("limit", edit("swiglu_limit", sliced(1, 0)), ("swiglu_limit", "[1]", "[4]")),
    Bad("output-rows", edit("output", sliced(12, 0)), ("output", "[12, 64]", "[13, 64]")),
    Bad("output-columns", edit("output", sliced(32, 1)), ("output", "[13, 32]", "[13, 64]")),
]

NUMBER_CASES = [
    Bad("tp-size", replace(tp_size=0), ("tp_size is 0",)),
    Bad("tp-rank", replace(tp_size=2, tp_rank=2), ("tp_rank is 2", "tp_size - 1 = 1")),
    Bad("tp-negative", replace(tp_rank=-1), ("tp_rank is -1",)),
    Bad("ep-size", replace(ep_size=-1), ("ep_size is -1",)),
    Bad("ep-rank", replace(ep_size=4, ep_rank=4), ("ep_rank is 4", "ep_size - 1 = 3")),
    Bad("ep-float", replace(ep_size=2.5), ("ep_size is 2.5", "int"), TypeError),
    Bad("tp-list", replace(tp_rank=[0]), ("tp_rank is [0]", "int"), TypeError),
    Bad("cluster", replace(cluster_size=2), ("cluster_size is 2",)),
    Bad("cluster-rank", replace(cluster_rank=1), ("cluster_rank is 1",)),
    Bad("tune", replace(tune_max_num_tokens=0), ("tune_max_num_tokens is 0",)),
    Bad("activation", replace(activation_type=10), ("activation_type is 10", "Relu2 6")),
    Bad("output-dtype", replace(output_dtype=torch.int8), ("output_dtype is torch.int8",)),
    Bad("dtype-text", replace(output_dtype="bfloat16"), ("output_dtype", "torch.d"), TypeError),
    Bad("backend", replace(backend="sm70"), ("backend is 'sm70'", "sm80", "cpu")),
    Bad("geglu", replace(activation_type=ActivationType.Geglu), ("swiglu_alpha", "Geglu")),
    Bad("step", replace(activation_type=ActivationType.SwigluStep), ("swiglu_alpha", "SwigluS")),
    Bad("packed", replace(use_packed_weights=True), ("use_packed_weights", "4-bit")),
    Bad("group", replace(use_w4_group_scaling=True), ("use_w4_group_scaling", "4-bit")),
    Bad("packed8", replace(use_packed_weights=True), ("_packed_", "4-bit"), weights="int8"),
    Bad("group8", replace(use_w4_group_scaling=True), ("_w4_", "torch.int8"), weights="int8"),
    Bad("workspace-2d", edit("workspace_buffer", lambda t: t.view(2, -1)), ("workspace_buffer",)),
    Bad("workspace-at", edit("workspace_buffer", lambda t: t[8:]), ("workspace_buffer st", "64B")),
]

QUANT_CASES = [
    Bad("unwanted", replace(quant_scales=[torch.ones(4, 96)]), ("quant_scales has 1", "[] or No")),
    Bad("missing", replace(quant_scales=None), ("quant_scales has 0", "2"), weights="int8"),
    Bad("one", edit("quant_scales", lambda s: s[:1]), ("quant_scales has 1",), weights="uint8"),
    Bad("three", edit("quant_scales", lambda s: [*s, s[0]]), ("has 3",), weights="int8"),
    Bad("none", scale(1, lambda s: None), ("quant_scales[1] is None",), TypeError, "int8"),
    Bad("text", scale(1, lambda s: "x"), ("quant_scales[1] is a str",), TypeError, "int8"),
    Bad("tensor", edit("quant_scales", lambda s: s[0]), ("quant_scales",), TypeError, "int8"),
    Bad("rows", scale(0, sliced(48, 1)), ("quant_scales[0]", "[4, 96]"), weights="int8"),
    Bad("hidden", scale(1, sliced(48, 1)), ("quant_scales[1]", "[4, 64]"), weights="uint8"),
    Bad("rank", scale(1, lambda s: s.unsqueeze(2)), ("quant_scales[1]", "[4, 64]"), weights="int8"),
    Bad("float16", scale(0, lambda s: s.half()), ("quant_scales[0] is torch.f",), weights="int8"),
    Bad("mixed", scale(1, lambda s: s.bfloat16()), ("quant_scales[1]", "[0]"), weights="int8"),
    Bad("int", scale(0, lambda s: s.int()), ("quant_scales[0] is torch.int32",), weights="int8"),
    Bad("device", scale(1, lambda s: s.to("meta")), ("quant_scales[1] is on me",), weights="int8"),
    Bad("strided", scale(1, strided), ("quant_scales[1] is not contiguous",), weights="int8"),
    Bad("misaligned", scale(0, misaligned), ("quant_scales[0]", "16B-aligned"), weights="int8"),
]


def both(change: Callable[[torch.Tensor], object]) -> Callable[[Arguments], object]:
    """Changes both quant_scales."""

    def apply(arguments: Arguments) -> None:
        arguments["quant_scales"] = [change(scale) for scale in arguments["quant_scales"]]

    return apply


def joined(tensor: torch.Tensor) -> torch.Tensor:
    """Every other scale of a row, as if groups were twice as large."""
    return tensor[..., ::2].contiguous()


# INT4 and MXFP4: what holds for both, and then what does not.
FOUR_BIT_CASES = [
    bad._replace(name=f"{bad.name}-{weights}", weights=weights)
    for weights in ("int4_32", "mxfp4")
    for bad in (
        Bad("none", replace(quant_scales=None), ("quant_scales has 0", "must have 2")),
        Bad("one", edit("quant_scales", lambda s: s[:1]), ("quant_scales has 1", "group")),
        Bad("no-scale", scale(0, lambda s: None), ("quant_scales[0] is None",), TypeError),
        Bad("fc1-rows", scale(0, sliced(96, 1)), ("quant_scales[0]", "[4, 192, 2]", "hidden")),
        Bad("fc1-groups", scale(0, sliced(0, 2)), ("quant_scales[0]", "[4, 192, 2] (groups of 32")),
        Bad("fc2-groups", scale(1, sliced(2, 2)), ("quant_scales[1]", "[4, 64, 3] (groups of 32)")),
        Bad("fc2-experts", scale(1, sliced(3, 0)), ("quant_scales[1]", "[4, 64, 3]", "size 96")),
        Bad("channels", scale(0, lambda s: s[..., 0].contiguous()), ("[0] has", "[4, 192, 2]")),
        Bad("int32", both(lambda s: s.int()), ("quant_scales[0] is torch.int32",)),
        Bad("float64", scale(1, lambda s: s.double()), ("quant_scales[1] is torch.float64",)),
        Bad("strided", scale(1, strided), ("quant_scales[1] is not contiguous",)),
        Bad("misaligned", scale(0, misaligned), ("quant_scales[0] starts", "16B-aligned")),
        Bad("device", scale(1, lambda s: s.to("meta")), ("quant_scales[1] is on meta",)),
        Bad("fc1-16", edit("fc1_expert_weights", lambda w: w.bfloat16()), ("fc1_", "4-bit")),
        Bad("fc2-16", edit("fc2_expert_weights", lambda w: w.int()), ("fc2_", "the dtype of fc1")),
        Bad("fc1-half", edit("fc1_expert_weights", sliced(16, 2)), ("fc1_", "hidden / 2]")),
        Bad("fc1-not-2I", edit("fc1_expert_weights", sliced(96, 1)), ("fc1_", "[4, 192, 32]")),
        Bad("fc2-hidden", edit("fc2_expert_weights", sliced(32, 1)), ("fc2_", "intermediate / 2]")),
        Bad("fc2-rank", edit("fc2_expert_weights", lambda w: w[0]), ("fc2_", "intermediate / 2]")),
        Bad("input", edit("input", sliced(32, 1)), ("input", "[13, 32]", "must be 64")),
    )
] + [
    Bad("both", scale(1, lambda s: s.bfloat16()), ("quant_scales[1]", "[0]"), weights="int4_32"),
    Bad("float16", both(lambda s: s.half()), ("[0] is torch.float16",), weights="int4_32"),
    Bad("e8m0", both(lambda s: s.to(torch.uint8)), ("[0] is torch.uint8",), weights="int4_64"),
    Bad("float", both(lambda s: s.float()), ("[0] is torch.float32", "E8M0"), weights="mxfp4"),
    Bad("mxfp4-64", scale(0, joined), ("[4, 192, 1]", "[4, 192, 2] (groups"), weights="mxfp4"),
    Bad("two-groups", scale(0, joined), ("in groups of 32", "of 64"), weights="int4_32"),
    Bad("third", scale(1, sliced(2, 2)), ("[4, 64, 6]", " or [4, 64, 3]"), weights="int4_64"),
    Bad("unsaid", replace(use_packed_weights=False), ("use_packed_weights=T",), weights="int4_32"),
    Bad("mute", replace(use_w4_group_scaling=False), ("use_w4_group_scaling=",), weights="mxfp4"),
]

CALLS = [*GENERATED, *SHAPE_CASES, *NUMBER_CASES, *QUANT_CASES, *FOUR_BIT_CASES]
