# SPDX-License-Identifier: Apache-2.0
"""Converters of checkpoints, against packers written from the formats' descriptions.

The packers work on plain Python integers, a word at a time, and share nothing with the converters.
They follow AutoAWQ's WQLinear_GEMM, GPTQModel's formats "gptq" and "gptq_v2", and "pack-quantized"
of compressed-tensors. gpt-oss's checkpoints are in checkpoints_gpt_oss.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cpu_layer import make_layer, reference, run
from fused_moe import (
    dequantize_int4,
    quantize_int4,
)
from fused_moe.checkpoints import (
    dequantize_awq,
    dequantize_gptq,
    int4_from_awq,
    int4_from_compressed_tensors,
    int4_from_gptq,
    load_int4_experts,
)
from fused_moe.quantization import unpack_nibbles
from tolerances import assert_close

Grid = list[list[int]]
Tensors = dict[str, torch.Tensor]


def word(codes: list[int]) -> int:
    """Eight codes, the first in the lowest 4 bits, as a signed 32-bit number."""
    assert len(codes) == 8 and all(0 <= code < 16 for code in codes)
    value = sum(code << 4 * i for i, code in enumerate(codes))
    return value - 2**32 if value >= 2**31 else value


def along_rows(grid: Grid, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """[R, C] codes to int32 [R, C / 8]: eight neighbours of a row a word, in this order."""
    return torch.tensor(
        [[word([row[c + i] for i in order]) for c in range(0, len(row), 8)] for row in grid],
        dtype=torch.int32,
    )


def transposed(grid: Grid) -> Grid:
    """The columns as rows."""
    return [list(column) for column in zip(*grid, strict=True)]


def along_columns(grid: Grid) -> torch.Tensor:
    """[R, C] codes to int32 [R / 8, C]: eight neighbours of a column a word."""
    return along_rows(transposed(grid)).T.contiguous()


class Matrix:
    """Random codes u [N, K], zero points and scales [N, K / g], and what they mean."""

    def __init__(self, rows: int, depth: int, group: int, zeros: int | None, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        groups = depth // group
        self.codes = torch.randint(0, 16, (rows, depth), generator=draw)
        self.zeros = torch.full((rows, groups), 0 if zeros is None else zeros)
        if zeros is None:
            self.zeros = torch.randint(0, 16, (rows, groups), generator=draw)
        self.scales = (torch.rand(rows, groups, generator=draw) + 0.5).half() / 16
        spread = [t.repeat_interleave(group, dim=1) for t in (self.zeros, self.scales.float())]
        self.numbers = (self.codes - spread[0]) * spread[1]

    def awq(self) -> Tensors:
        """AutoAWQ: K rows; a word holds columns 0, 2, 4, 6, 1, 3, 5, 7 from its low bits up."""
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {
            "qweight": along_rows(self.codes.T.tolist(), order),
            "qzeros": along_rows(self.zeros.T.tolist(), order),
            "scales": self.scales.T.contiguous(),
        }

    def gptq(self, v2: bool = False) -> Tensors:
        """GPTQ: words along K; zero points along N, less one in the first version."""
        stored = self.zeros if v2 else (self.zeros - 1) % 16
        groups = self.codes.shape[1] // self.zeros.shape[1]
        return {
            "qweight": along_columns(self.codes.T.tolist()),
            "qzeros": along_rows(stored.T.tolist()),
            "scales": self.scales.T.contiguous(),
            "g_idx": torch.arange(self.codes.shape[1], dtype=torch.int32) // groups,
        }

    def compressed_tensors(self, symmetric: bool = True) -> Tensors:
        """compressed-tensors: words along K; zero points, if any, along N."""
        tensors = {
            "weight_packed": along_rows(self.codes.tolist()),
            "weight_scale": self.scales,
            "weight_shape": torch.tensor(self.codes.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = along_columns(self.zeros.tolist())
        return tensors

    def stored(self, layout: str) -> Tensors:
        """The tensors of a layout."""
        if layout == "awq":
            return self.awq()
        if layout == "compressed-tensors":
            return self.compressed_tensors()
        return self.gptq(v2=layout == "gptq_v2")


CONVERTERS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "awq": int4_from_awq,
    "gptq": int4_from_gptq,
    "gptq_v2": lambda **tensors: int4_from_gptq(**tensors, v2=True),
    "compressed-tensors": int4_from_compressed_tensors,
}


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("layout", list(CONVERTERS))
def test_symmetric(layout: str, group: int) -> None:
    matrix = Matrix(24, 256, group, zeros=8)
    packed, scale = CONVERTERS[layout](**matrix.stored(layout))
    assert packed.dtype == torch.uint8 and packed.shape == (24, 128) and packed.is_contiguous()
    assert scale.dtype == torch.float32 and scale.shape == (24, 256 // group)
    assert scale.is_contiguous()
    assert torch.equal(unpack_nibbles(packed).long(), matrix.codes)
    assert torch.equal(scale, matrix.scales.float())
    assert torch.equal(dequantize_int4(packed, scale), matrix.numbers)


def test_awq_by_hand() -> None:
    """Column 1 stands in bits 16 to 19 of its word, column 2 in bits 4 to 7."""
    qweight = torch.full((32, 1), -0x77777778, dtype=torch.int32)  # 8 everywhere: zeros
    qweight[0, 0] = 0x0F8C9A21  # columns 0, 2, 4, 6, 1, 3, 5, 7 from the right
    qzeros = torch.full((1, 1), -0x77777778, dtype=torch.int32)
    packed, scale = int4_from_awq(qweight, qzeros, torch.ones(1, 8, dtype=torch.float16))
    first = dequantize_int4(packed, scale)[:, 0] + 8
    assert first.tolist() == [0x1, 0xC, 0x2, 0x8, 0xA, 0xF, 0x9, 0x0]
    assert not dequantize_int4(packed, scale)[:, 1:].any()


def test_gptq_by_hand() -> None:
    """Row k of a column stands in bits 4k of its word; a zero point of 8 is stored as 7."""
    qweight = torch.full((4, 8), -0x77777778, dtype=torch.int32)
    qweight[0, 3] = 0x76543210
    scales = torch.ones(1, 8, dtype=torch.float16)
    qzeros = torch.full((1, 1), 0x77777777, dtype=torch.int32)
    packed, scale = int4_from_gptq(qweight, qzeros, scales)
    assert packed[3, :4].tolist() == [0x10, 0x32, 0x54, 0x76]
    assert dequantize_int4(packed, scale)[3, :8].tolist() == [-8, -7, -6, -5, -4, -3, -2, -1]
    same, _ = int4_from_gptq(qweight, qzeros + 0x11111111 - 2**32, scales, v2=True)
    assert torch.equal(same, packed)


def test_compressed_tensors_by_hand() -> None:
    """Weight k of a row stands in bits 4k of its word, as q + 8."""
    packed_words = torch.full((1, 4), -0x77777778, dtype=torch.int32)
    packed_words[0, 0] = 0x76543210
    packed, scale = int4_from_compressed_tensors(packed_words, torch.full((1, 1), 0.5))
    assert packed[0].tolist() == [0x10, 0x32, 0x54, 0x76, *[0x88] * 12]
    assert dequantize_int4(packed, scale)[0, :8].tolist() == [x / 2 for x in range(-8, 0)]


@pytest.mark.parametrize("layout", ["awq", "gptq", "gptq_v2"])
def test_zero_point_7_is_exact_by_the_sign_of_the_scale(layout: str) -> None:
    matrix = Matrix(16, 64, 32, zeros=7)
    packed, scale = CONVERTERS[layout](**matrix.stored(layout))
    assert torch.equal(dequantize_int4(packed, scale), matrix.numbers)
    assert (scale < 0).any(), "codes of 15 need a weight of 8"


def test_zero_points_that_no_code_makes_use_of_are_exact() -> None:
    matrix = Matrix(16, 64, 32, zeros=5)
    matrix.codes.clamp_(max=12)  # u - 5 is in -5..7 then
    matrix.numbers = (matrix.codes - 5) * matrix.scales.float().repeat_interleave(32, dim=1)
    packed, scale = int4_from_awq(**matrix.awq())
    assert torch.equal(dequantize_int4(packed, scale), matrix.numbers)


@pytest.mark.parametrize("layout", ["awq", "gptq", "gptq_v2", "compressed-tensors"])
def test_other_zero_points_are_refused(layout: str) -> None:
    matrix = Matrix(16, 64, 32, zeros=8)
    matrix.zeros[3, 1] = 11
    matrix.zeros[9, 0] = 2
    tensors = matrix.stored(layout)
    if layout == "compressed-tensors":
        tensors = matrix.compressed_tensors(symmetric=False)
    words = r"group 1 of row 3 has the zero point 11, .* 2 of 32 groups .*\[2, 11\].*quantize_int8"
    with pytest.raises(ValueError, match=words):
        CONVERTERS[layout](**tensors)


@pytest.mark.parametrize("zero", [zero for zero in range(16) if zero not in (7, 8)])
def test_no_other_zero_point_is_exact_with_all_codes(zero: int) -> None:
    matrix = Matrix(8, 32, 32, zeros=zero)
    matrix.codes = torch.arange(32).expand(8, 32) % 16
    with pytest.raises(ValueError, match=f"group 0 of row 0 has the zero point {zero}, "):
        int4_from_awq(**matrix.awq())


def test_compressed_tensors_with_the_zero_point_8() -> None:
    matrix = Matrix(16, 64, 32, zeros=8)
    packed, scale = int4_from_compressed_tensors(**matrix.compressed_tensors(symmetric=False))
    assert torch.equal(dequantize_int4(packed, scale), matrix.numbers)


@pytest.mark.parametrize("v2", [False, True])
def test_dequantize_with_any_zero_points(v2: bool) -> None:
    matrix = Matrix(24, 256, 64, zeros=None)
    assert torch.equal(dequantize_awq(**matrix.awq()), matrix.numbers)
    tensors = matrix.gptq(v2)
    assert torch.equal(dequantize_gptq(**tensors, v2=v2), matrix.numbers)
    del tensors["g_idx"]
    assert torch.equal(dequantize_gptq(**tensors, v2=v2), matrix.numbers)


def test_dequantize_in_the_order_of_activations() -> None:
    matrix = Matrix(16, 64, 32, zeros=None)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    tensors = matrix.gptq()
    # Row i is what row order[i] was, with its group.
    shuffled = Matrix(16, 64, 32, zeros=None)
    shuffled.codes = matrix.codes[:, order]
    mixed = {**shuffled.gptq(), "g_idx": tensors["g_idx"][order]}
    assert torch.equal(dequantize_gptq(**mixed), matrix.numbers[:, order])
    first = tensors["g_idx"][order].tolist().index(1)
    with pytest.raises(ValueError, match=rf"g_idx\[{first}\] is 1; it must be 0.*desc_act"):
        int4_from_gptq(**mixed)
    with pytest.raises(ValueError, match=r"g_idx has the shape \[63\]; it must be \[64\]"):
        dequantize_gptq(**{**mixed, "g_idx": mixed["g_idx"][1:]})
    ours = {"weight_packed": along_rows(shuffled.codes.tolist()), "weight_scale": shuffled.scales}
    with pytest.raises(ValueError, match=r"weight_g_idx\[\d+\] is 1; .*actorder"):
        int4_from_compressed_tensors(**ours, weight_g_idx=mixed["g_idx"])
    for in_order in (torch.full_like(mixed["g_idx"], -1), tensors["g_idx"]):
        int4_from_compressed_tensors(**ours, weight_g_idx=in_order)


@pytest.mark.parametrize(
    ("depth", "group", "ours"), [(256, 256, 128), (192, 192, 64), (96, 96, 32), (512, 256, 128)]
)
@pytest.mark.parametrize("layout", list(CONVERTERS))
def test_larger_groups_become_several(layout: str, depth: int, group: int, ours: int) -> None:
    matrix = Matrix(8, depth, group, zeros=8)
    packed, scale = CONVERTERS[layout](**matrix.stored(layout))
    assert scale.shape == (8, depth // ours)
    assert torch.equal(dequantize_int4(packed, scale), matrix.numbers)


GOOD = Matrix(16, 64, 32, zeros=8)
BAD: list[tuple[str, dict[str, torch.Tensor], str]] = [
    ("awq", {"qweight": torch.zeros(64, 2)}, r"qweight is a torch\.float32 tensor"),
    ("awq", {"qweight": GOOD.gptq()["qweight"]}, r'qweight has the shape \[8, 16\].*"GEMM"'),
    ("awq", {"qzeros": torch.zeros(3, 2, dtype=torch.int32)}, r"qzeros .* must be \[2, 2\]"),
    ("awq", {"qzeros": torch.zeros(2, 2)}, r"qzeros is a torch\.float32 tensor"),
    ("awq", {"qweight": torch.zeros(4, 2, 2, dtype=torch.int32)}, r"int32 tensor of shape \[4, 2,"),
    ("gptq", {"qweight": torch.zeros(8, 16)}, r"qweight is a torch\.float32 tensor"),
    ("gptq", {"qzeros": torch.zeros(2, 2)}, r"qzeros is a torch\.float32 tensor"),
    ("gptq", {"qweight": GOOD.awq()["qweight"]}, r"qweight has the shape \[64, 2\]"),
    ("gptq", {"qzeros": torch.zeros(2, 4, dtype=torch.int32)}, r"\[2, 4\]; it must be \[2, 2\]"),
    ("gptq", {"g_idx": torch.zeros(32, dtype=torch.int32)}, r"g_idx has .* must be \[64\]"),
    ("gptq", {"scales": torch.ones(2, 8).half()}, r"qweight has the shape \[8, 16\] and scales"),
    ("compressed-tensors", {"weight_packed": torch.zeros(16, 8)}, "weight_packed is a torch.flo"),
    ("compressed-tensors", {"weight_shape": torch.tensor([16, 32])}, "num_bits"),
    ("compressed-tensors", {"weight_scale": torch.ones(8, 2)}, r"must be \[16, 2\]"),
    ("compressed-tensors", {"weight_scale": torch.ones(16, 4)}, "multiple of 32"),
    ("compressed-tensors", {"weight_scale": torch.ones(16, 3)}, "the scales are 3 for 64 weights"),
    ("compressed-tensors", {"weight_scale": torch.ones(16, 0)}, "the scales are 0 for 64 weights"),
    (
        "compressed-tensors",
        {
            "weight_packed": torch.zeros(16, 41, dtype=torch.int32),
            "weight_scale": torch.ones(16, 10),
            "weight_shape": torch.tensor([16, 328]),
        },
        "the scales are 10 for 328 weights",
    ),
    ("compressed-tensors", {"weight_zero_point": torch.zeros(2, 2)}, "zero_point is a torch.flo"),
    (
        "compressed-tensors",
        {"weight_zero_point": torch.zeros(2, 1, dtype=torch.int32)},
        r"weight_zero_point has .* must be \[2, 2\]",
    ),
]


@pytest.mark.parametrize(("layout", "change", "words"), BAD)
def test_what_does_not_fit(layout: str, change: Tensors, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CONVERTERS[layout](**{**GOOD.stored(layout), **change})


def stored_experts(layout: str, group: int, **how: Any) -> tuple[Tensors, dict[str, torch.Tensor]]:
    """Three experts as a checkpoint stores them, and what they mean. H = 64, I = 96 if unsaid."""
    tensors: Tensors = {}
    fc1, fc2 = [], []
    names = how.get("names", ("gate_proj", "up_proj", "down_proj"))
    hidden, inter = how.get("sizes", (64, 96))
    for expert in range(3):
        sizes = ((inter, hidden), (inter, hidden), (hidden, inter))
        matrices = [
            Matrix(rows, depth, min(group, depth), how.get("zeros", 8), seed=10 * expert + i)
            for i, (rows, depth) in enumerate(sizes)
        ]
        for name, matrix in zip(names, matrices, strict=True):
            for part, tensor in matrix.stored(layout).items():
                tensors[f"model.experts.{expert}.{name}.{part}"] = tensor
        gate, up, down = (matrix.numbers for matrix in matrices)
        fc1.append(torch.cat([up, gate]))
        fc2.append(down)
    meaning = {"fc1_expert_weights": torch.stack(fc1), "fc2_expert_weights": torch.stack(fc2)}
    return tensors, meaning


@pytest.mark.parametrize("sizes", [(64, 96), (96, 64)])
@pytest.mark.parametrize("group", [32, 1000])
@pytest.mark.parametrize("layout", list(CONVERTERS))
def test_a_layer(layout: str, group: int, sizes: tuple[int, int]) -> None:
    """The whole way from a checkpoint's tensors to the layer's result."""
    tensors, meaning = stored_experts(layout, group, sizes=sizes)
    experts = load_int4_experts(tensors, "model.experts", 3, layout=layout)
    assert experts.group_size == 32 and experts.format == "int4"
    layer = make_layer(hidden=sizes[0], intermediate=sizes[1], experts=3)
    out = run({**layer, **experts.arguments()})
    # The reference takes the float32 weights: nothing is lost on the way.
    assert_close(out, reference({**layer, **meaning}), torch.bfloat16)


def test_a_layer_of_mixtral() -> None:
    tensors, meaning = stored_experts("gptq", 32, names=("w1", "w3", "w2"))
    experts = load_int4_experts(tensors, "model.experts", 3, layout="gptq")
    numbers = dequantize_int4(experts.fc1_weight, experts.fc1_scale)
    assert torch.equal(numbers, meaning["fc1_expert_weights"])


def test_experts_of_a_rank() -> None:
    tensors, meaning = stored_experts("awq", 32)
    experts = load_int4_experts(tensors, "model.experts", 3, layout="awq", experts=range(1, 3))
    numbers = dequantize_int4(experts.fc2_weight, experts.fc2_scale)
    assert torch.equal(numbers, meaning["fc2_expert_weights"][1:])


def test_errors_name_the_tensor() -> None:
    tensors, _ = stored_experts("awq", 32)
    with pytest.raises(KeyError, match=r"model\.wrong\.0\.gate_proj\.qweight nor .*w1"):
        load_int4_experts(tensors, "model.wrong", 3, layout="awq")
    with pytest.raises(ValueError, match="layout is 'marlin'"):
        load_int4_experts(tensors, "model.experts", 3, layout="marlin")
    with pytest.raises(ValueError, match=r"experts is .* 0 to 2"):
        load_int4_experts(tensors, "model.experts", 3, layout="awq", experts=[3])
    with pytest.raises(ValueError, match=r"experts is \[\]; it must be one or more of 0 to 2"):
        load_int4_experts(tensors, "model.experts", 3, layout="awq", experts=[])
    with pytest.raises(ValueError, match=r"model\.experts\.0\.gate_proj: qweight has the shape"):
        load_int4_experts(tensors, "model.experts", 3, layout="gptq")
    del tensors["model.experts.2.down_proj.scales"]
    with pytest.raises(KeyError, match=r"no tensor 'model\.experts\.2\.down_proj\.scales'"):
        load_int4_experts(tensors, "model.experts", 3, layout="awq")
    asymmetric, _ = stored_experts("awq", 32, zeros=3)
    with pytest.raises(ValueError, match=r"experts\.0\.gate_proj: .* zero point 3"):
        load_int4_experts(asymmetric, "model.experts", 3, layout="awq")


def test_what_may_be_there_is_looked_at() -> None:
    tensors, _ = stored_experts("gptq", 32)
    tensors["model.experts.1.up_proj.g_idx"] = tensors["model.experts.1.up_proj.g_idx"].flip(0)
    with pytest.raises(ValueError, match=r"experts\.1\.up_proj: g_idx\[0\] is 1; .*desc_act"):
        load_int4_experts(tensors, "model.experts", 3, layout="gptq")


def test_gate_and_up_in_different_groups() -> None:
    tensors, _ = stored_experts("awq", 32)
    for part, tensor in Matrix(96, 64, 64, zeros=8).awq().items():
        tensors[f"model.experts.1.up_proj.{part}"] = tensor
    words = r"model\.experts\.1: the scales of gate_proj are \[96, 2\], those of up_proj \[96, 1\]"
    with pytest.raises(ValueError, match=words):
        load_int4_experts(tensors, "model.experts", 3, layout="awq")


def test_a_checkpoint_of_ours_survives_its_own_format() -> None:
    """quantize_int4's codes in a compressed-tensors checkpoint are the same bytes."""
    weight = torch.randn(1, 16, 128, generator=torch.Generator().manual_seed(2))
    packed, scale = quantize_int4(weight, 64)
    stored = along_rows(unpack_nibbles(packed[0]).tolist())
    again, scale_again = int4_from_compressed_tensors(stored, scale[0])
    assert torch.equal(again, packed[0]) and torch.equal(scale_again, scale[0])
