# SPDX-License-Identifier: Apache-2.0
"""Turns a `Case` into tensors on the GPU, runs the layer on them and judges the result.

Weights are windows into one pool of random numbers, so that a case costs no time to set up
even where its weights are gigabytes. Every tensor of a case lies between guards: NaN around
what is read (a value from beyond an edge that takes part in a result shows), a bit pattern
around what is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cases import FOUR_BIT, MAX_WEIGHT_NUMBERS, Case
from fused_moe import ActivationType, cutlass_fused_moe, cutlass_fused_moe_workspace_size
from fused_moe import _extension as extension
from fused_moe.reference import reference_moe
from tolerances import TOLERANCES, assert_close

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

# Weights are normal with this standard deviation: with H and I from 64 to 16384 both products
# then have values between 0.1 and 2, where neither dtype overflows nor loses bits.
WEIGHT_DEVIATION = 1 / 64
# The root mean square of weights whose bits are drawn at random.
_DEVIATIONS = {"int8": 73.9, "uint8": 73.9, "int4": 4.64, "mxfp4": 2.93}
_GUARD = 64  # elements on each side
_GUARD_BYTE = 0xA5
_POOL_GAPS = 3 * 2 * _GUARD


def require_sm80() -> None:
    """Skips the test, with the reason, where the sm80 kernels cannot run.

    With MOE_REQUIRE_GPU=1 (--config=gpu) it fails instead.
    """
    reason = None
    if extension.C is None or "sm80" not in extension.C.BACKENDS:
        reason = "this build has no sm80 kernels (--config=cpu)"
    elif not torch.cuda.is_available():
        reason = "PyTorch sees no CUDA device here"
    elif torch.cuda.get_device_capability()[0] < 8:
        reason = f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    if reason is None:
        return
    if os.environ.get("MOE_REQUIRE_GPU") == "1":
        pytest.fail(f"MOE_REQUIRE_GPU=1, but {reason}")
    pytest.skip(f"needs a GPU and the sm80 kernels: {reason}")


class _WeightPool:
    """The one array of random weights that is alive: bfloat16, float16 or 8-bit numbers."""

    def __init__(self) -> None:
        self._kind: object = None
        self._numbers = torch.empty(0)

    def numbers(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        """At least `count` numbers of `dtype` (uint8 and int8 share their bytes)."""
        kind = torch.int8 if dtype == torch.uint8 else dtype
        if kind != self._kind or self._numbers.numel() < count:
            # Most of what the sample asks for, unless the GPU is a small one.
            memory = torch.cuda.get_device_properties(0).total_memory
            count = max(count, min(MAX_WEIGHT_NUMBERS + 4096, memory // 8 // kind.itemsize))
            self._kind, self._numbers = None, torch.empty(0)
            generator = torch.Generator("cuda").manual_seed(1234)
            fresh = torch.empty(count, dtype=kind, device="cuda")
            if kind == torch.int8:
                fresh.random_(-128, 128, generator=generator)
            else:
                fresh.normal_(0, WEIGHT_DEVIATION, generator=generator)
            self._kind, self._numbers = kind, fresh
        return self._numbers.view(dtype) if dtype == torch.uint8 else self._numbers


_pool = _WeightPool()


@contextlib.contextmanager
def _pool_weights(case: Case) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """fc1 and fc2 as windows of the pool, NaN before, between and after them meanwhile."""
    dtype = weight_dtype(case)
    shape1, shape2 = weight_shapes(case)
    count1, count2 = math.prod(shape1), math.prod(shape2)
    pool = _pool.numbers(dtype, count1 + count2 + _POOL_GAPS + 64)
    # 16 bytes is all the alignment that is promised: start at an odd multiple of it.
    odd = 16 // dtype.itemsize
    begin1 = _GUARD + odd
    end1 = begin1 + count1
    begin2 = -(-end1 // 64) * 64 + _GUARD + odd
    end2 = begin2 + count2
    gaps = [(begin1 - _GUARD, begin1), (end1, begin2), (end2, end2 + _GUARD)]
    saved = [pool[a:b].clone() for a, b in gaps]
    try:
        for a, b in gaps:
            pool[a:b] = float("nan") if dtype.is_floating_point else 127
        yield pool[begin1:end1].view(shape1), pool[begin2:end2].view(shape2)
    finally:
        for (a, b), values in zip(gaps, saved, strict=True):
            pool[a:b] = values


def guarded(values: torch.Tensor, alignment: int = 16) -> torch.Tensor:
    """A copy of `values` with NaN (or a large number) around it, `alignment` bytes aligned.

    Bytes are taken for E8M0 scales, whose NaN is 255.
    """
    fill = float("nan") if values.is_floating_point() else 0x5A5A5A5A
    if values.dtype == torch.uint8:
        fill = 255
    odd = alignment // values.element_size()  # past a multiple of 128 bytes
    flat = torch.full(
        (values.numel() + 2 * _GUARD + odd,), fill, dtype=values.dtype, device=values.device
    )
    window = flat[_GUARD + odd : _GUARD + odd + values.numel()]
    window.copy_(values.reshape(-1))
    return window.view(values.shape)


class GuardedBuffer:
    """Memory to be written: `tensor`, uint8 [size], between two guards of `guard` bytes.

    Its address is an odd multiple of `alignment`, which is a power of two up to 512. Without
    guards it is an allocation of just that size.
    """

    def __init__(self, size: int, alignment: int, guard: int = 1024) -> None:
        room = size + 2 * guard + 3 * alignment if guard else size
        self._all = torch.empty(room, dtype=torch.uint8, device="cuda")
        self._begin = 0
        if guard:
            self._begin = guard + alignment + -self._all.data_ptr() % (2 * alignment)
        self._end = self._begin + size
        self._all[: self._begin] = _GUARD_BYTE
        self._all[self._end :] = _GUARD_BYTE
        self.tensor = self._all[self._begin : self._end]

    def check(self, what: str) -> None:
        """Fails where a guard was written."""
        guards = torch.cat([self._all[: self._begin], self._all[self._end :]])
        assert bool((guards == _GUARD_BYTE).all()), f"{what}: written outside its bounds"


def route(case: Case) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Expert ids [M, k] int32 and scales [M, k] float32 or None, on the GPU."""
    m, k, total = case.tokens, case.top_k, case.experts * case.ep_size
    first = case.ep_rank * case.experts
    logits = torch.randn(m, total, device="cuda")
    scales = torch.softmax(torch.randn(m, k, device="cuda"), dim=1)
    if case.routing == "uniform":
        ids = logits.topk(k, dim=1).indices
    elif case.routing == "few_experts":
        few = max(1, case.experts // 4)
        ids = first + torch.randint(few, (m, k), device="cuda") * (case.experts // few)
    elif case.routing == "one_expert":
        ids = torch.full((m, k), first + case.experts // 2, device="cuda")
    else:
        ids = torch.randint(total, (m, k), device="cuda")
    if case.routing in ("outside", "garbage"):
        extremes = [-1, total, total + 1, -(2**31), 2**31 - 1, first - 1, first + case.experts]
        if case.routing == "garbage":
            other = torch.randint(-(2**31), 2**31, (m, k), device="cuda")
        else:
            pick = torch.randint(len(extremes), (m, k), device="cuda")
            other = torch.tensor(extremes, device="cuda")[pick]
        ids = torch.where(torch.rand(m, k, device="cuda") < 0.5, other, ids)
    return ids.to(torch.int32), None if case.scales == "none" else scales


@dataclasses.dataclass
class Layer:
    """The tensors of a case: `call` is what both the op and the reference take by name."""

    case: Case
    input: torch.Tensor
    ids: torch.Tensor
    scales: torch.Tensor | None
    fc1: torch.Tensor
    fc2: torch.Tensor
    quant_scales: list[torch.Tensor]
    optional: dict[str, Any]
    exact: bool = False

    @property
    def output_dtype(self) -> torch.dtype:
        """The dtype of the result."""
        return output_dtype(self.case)

    @property
    def parallel(self) -> dict[str, Any]:
        """The op's arguments on tensor and expert parallelism."""
        names = ("tp_size", "tp_rank", "ep_size", "ep_rank")
        return {name: getattr(self.case, name) for name in names}

    def run(self, **changes: Any) -> torch.Tensor:
        """Calls the op; `changes` are further arguments, such as output=."""
        return cutlass_fused_moe(
            self.input,
            self.ids,
            self.scales,
            self.fc1,
            self.fc2,
            self.output_dtype,
            self.quant_scales,
            activation_type=self.case.activation,
            **weight_flags(self.case),
            **self.optional,
            **self.parallel,
            **changes,
        )

    def reference(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [M or rows, H] by the plain reference, on the GPU."""
        picked = slice(None) if rows is None else rows
        return reference_moe(
            self.input[picked],
            self.ids[picked],
            None if self.scales is None else self.scales[picked],
            self.fc1,
            self.fc2,
            self.meant_scales(),
            **weight_flags(self.case),
            **self.optional,
            tp_rank=self.case.tp_rank,
            ep_rank=self.case.ep_rank,
            activation_type=self.case.activation,
        )

    def meant_scales(self) -> list[torch.Tensor]:
        """quant_scales as the kernels are documented to take them: INT4's in the input's dtype."""
        if not self.case.weights.startswith("int4"):
            return self.quant_scales
        return [scale.to(self.input.dtype).float() for scale in self.quant_scales]

    def workspace_bytes(self) -> int:
        """What the public query says."""
        return workspace_bytes(self.case)


def output_dtype(case: Case) -> torch.dtype:
    """The dtype of a case's result and biases."""
    if case.output_dtype == "same":
        return DTYPES[case.dtype]
    return torch.float16 if case.dtype == "bfloat16" else torch.bfloat16


def weight_dtype(case: Case) -> torch.dtype:
    """The dtype of a case's weights."""
    if case.weights in FOUR_BIT:
        return torch.uint8
    return DTYPES[case.dtype] if case.weights == "same" else getattr(torch, case.weights)


def weight_flags(case: Case) -> dict[str, Any]:
    """The arguments that say what uint8 weights are."""
    if case.weights == "mxfp4":
        return {"use_w4_group_scaling": True}
    return {"use_packed_weights": True} if case.weights in FOUR_BIT else {}


def weight_shapes(case: Case) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of fc1 and fc2."""
    packing = case.weights_a_byte
    return (
        (case.experts, case.rows, case.hidden // packing),
        (case.experts, case.hidden, case.intermediate // packing),
    )


def workspace_bytes(case: Case) -> int:
    """`cutlass_fused_moe_workspace_size` for a case; needs no GPU."""
    return cutlass_fused_moe_workspace_size(
        case.tokens,
        case.hidden,
        case.intermediate,
        case.experts * case.ep_size,
        case.top_k,
        x_dtype=DTYPES[case.dtype],
        weight_dtype=weight_dtype(case),
        output_dtype=output_dtype(case),
        activation_type=case.activation,
        tp_size=case.tp_size,
        tp_rank=case.tp_rank,
        ep_size=case.ep_size,
        ep_rank=case.ep_rank,
        group_size=case.group_size or None,
        backend="sm80",
        **weight_flags(case),
    )


def _optional_tensors(case: Case) -> dict[str, torch.Tensor]:
    """Biases and SwiGLU parameters, those that the case has."""
    tensors = {}
    for name, length in (("fc1", case.rows), ("fc2", case.hidden)):
        if case.biases in (name, "both"):
            bias = torch.randn(case.experts, length, device="cuda") * 0.5
            tensors[f"{name}_expert_biases"] = bias.to(output_dtype(case))
    # Ranges that make the clamps bite. `some` leaves the rest to their defaults.
    parameters = {"swiglu_alpha": (0.5, 2.0), "swiglu_beta": (-1, 1), "swiglu_limit": (0.5, 2.0)}
    if case.activation in (ActivationType.Swiglu, ActivationType.SwigluBias):
        wanted = {"defaults": [], "all": list(parameters), "some": ["swiglu_limit"]}[case.swiglu]
    elif case.activation == ActivationType.SwigluStep and case.swiglu != "defaults":
        wanted = ["swiglu_limit"]
    else:
        wanted = []
    for name in wanted:
        low, high = parameters[name]
        tensors[name] = torch.rand(case.experts, device="cuda") * (high - low) + low
    return tensors


def _own_weights(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """fc1 and fc2 in allocations of just their size."""
    shapes = weight_shapes(case)
    if case.weights == "same":
        fc1, fc2 = (torch.randn(s, device="cuda") * WEIGHT_DEVIATION for s in shapes)
        return fc1.to(DTYPES[case.dtype]), fc2.to(DTYPES[case.dtype])
    low, high = (-128, 128) if case.weights == "int8" else (0, 256)
    dtype = weight_dtype(case)
    fc1, fc2 = (torch.randint(low, high, s, dtype=dtype, device="cuda") for s in shapes)
    return fc1, fc2


def _quant_scales(case: Case) -> list[torch.Tensor]:
    """Scales, one a row or one a group, with which weights have about WEIGHT_DEVIATION."""
    if case.weights == "same":
        return []
    shapes: list[tuple[int, ...]] = [(case.experts, case.rows), (case.experts, case.hidden)]
    if case.group_size:
        depths = (case.hidden, case.intermediate)
        shapes = [(*s, d // case.group_size) for s, d in zip(shapes, depths, strict=True)]
    if case.weights == "mxfp4":
        # 2^-9, 2^-8 and 2^-7.
        return [torch.randint(118, 121, s, dtype=torch.uint8, device="cuda") for s in shapes]
    dtype = torch.float32 if case.weight_scales == "float32" else DTYPES[case.dtype]
    scale = WEIGHT_DEVIATION / _DEVIATIONS[case.weights.split("_")[0]]
    return [((torch.rand(s, device="cuda") + 0.5) * scale).to(dtype) for s in shapes]


@contextlib.contextmanager
def realized(case: Case, exact: bool = False) -> Iterator[Layer]:
    """The case's tensors, from a seed of its own.

    `exact` puts each into an allocation of just its size, without guards: compute-sanitizer
    sees an access beyond a tensor only where its allocation ends there.
    """
    torch.manual_seed(sum(map(ord, case.id)))
    dtype = DTYPES[case.dtype]

    def placed(tensor: torch.Tensor, alignment: int = 16) -> torch.Tensor:
        return tensor.clone() if exact else guarded(tensor, alignment)

    ids, scales = route(case)
    quant_scales = [placed(scale) for scale in _quant_scales(case)]
    optional = {
        name: placed(tensor, 4 if name.startswith("swiglu") else 16)
        for name, tensor in _optional_tensors(case).items()
    }
    with contextlib.ExitStack() as stack:
        fc1, fc2 = _own_weights(case) if exact else stack.enter_context(_pool_weights(case))
        yield Layer(
            case=case,
            input=placed(torch.randn(case.tokens, case.hidden, device="cuda").to(dtype)),
            ids=placed(ids, 4),
            scales=None if scales is None else placed(scales, 4),
            fc1=fc1,
            fc2=fc2,
            quant_scales=quant_scales,
            optional=optional,
            exact=exact,
        )


def run_poisoned(layer: Layer, poison: int, **changes: Any) -> torch.Tensor:
    """Runs with output= and workspace_buffer= full of a byte, between guards; returns a copy.

    0xFF is a NaN in both 16-bit dtypes and in float32, and -1 as an integer.
    """
    size = layer.input.shape[0] * layer.case.hidden * 2
    guard = 0 if layer.exact else 1024
    output = GuardedBuffer(size, 16, guard)
    workspace = GuardedBuffer(layer.workspace_bytes(), 128, guard)
    output.tensor.fill_(poison)
    workspace.tensor.fill_(poison)
    result = output.tensor.view(layer.output_dtype).view(layer.input.shape[0], layer.case.hidden)
    returned = layer.run(output=result, workspace_buffer=workspace.tensor, **changes)
    assert returned.data_ptr() == result.data_ptr(), "output= was not what came back"
    output.check("output")
    workspace.check("workspace_buffer")
    return result.clone()


def check(layer: Layer, out: torch.Tensor, rows: torch.Tensor | None = None) -> None:
    """Fails unless `out` is right as a whole, in every row and in every element.

    `rows` says which rows of the input `out` belongs to, where it is not all.
    """
    ref = layer.reference(rows)
    assert out.shape == ref.shape and out.dtype == layer.output_dtype
    # bfloat16 is the coarser of the two.
    dtypes = (layer.input.dtype, layer.output_dtype)
    dtype = torch.bfloat16 if torch.bfloat16 in dtypes else torch.float16
    assert_close(out, ref, dtype)
    if out.numel() == 0:
        return
    # A few wrong rows of thousands hide in the norm of all: each row, and each element, has a
    # wider bound of its own. The mean covers rows that are small by cancellation.
    difference = (out.float() - ref).abs()
    deviation = ref.square().mean(dim=1).sqrt()
    deviation = deviation + 0.1 * deviation.mean() + 1e-7
    row_error = difference.square().mean(dim=1).sqrt() / deviation
    worst = int(row_error.argmax())
    bound = 4 * TOLERANCES[dtype]
    assert float(row_error[worst]) < bound, f"row {worst}: error {float(row_error[worst]):.2e}"
    element_error = difference.amax(dim=1) / deviation
    worst = int(element_error.argmax())
    assert float(element_error[worst]) < 6 * bound, (
        f"row {worst}: an element is off by {float(element_error[worst]):.2e} of the row's rms"
    )
    first = layer.case.ep_rank * layer.case.experts
    ids = (layer.ids if rows is None else layer.ids[rows]).long()
    here = ((ids >= first) & (ids < first + layer.case.experts)).any(dim=1)
    assert not bool(out[~here].any()), "a token without an expert on this rank is not exactly 0"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two 16-bit tensors are equal bit for bit (NaN equals itself)."""
    return bool(torch.equal(a.view(torch.int16), b.view(torch.int16)))
