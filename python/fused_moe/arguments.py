# SPDX-License-Identifier: Apache-2.0
"""The checks of `cutlass_fused_moe`'s arguments, none of which needs a GPU.

Nothing else checks what a user passes. Each error names the argument, what it got, what it
must be and, where that is not plain, what to do.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fused_moe import _extension, backends, refusals, scales, shapes
from fused_moe.activation import ActivationType
from fused_moe.signature import Signature

# How dtypes and formats of weights are coded for the extension.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SCALE_CODES = {**DTYPE_CODES, **dict.fromkeys(scales.E8M0, 3)}
WEIGHTS_AS_INPUT, WEIGHTS_INT8, WEIGHTS_UINT8, WEIGHTS_INT4, WEIGHTS_MXFP4 = range(5)

# What H and I must be multiples of, so that rows of weights are whole 16-byte pieces, and
# what the error calls the weights. Groups ask for more than 4-bit rows do.
_MULTIPLES = {
    WEIGHTS_AS_INPUT: (8, "16-bit"),
    WEIGHTS_INT8: (16, "8-bit"),
    WEIGHTS_UINT8: (16, "8-bit"),
    WEIGHTS_INT4: (32, "INT4"),
    WEIGHTS_MXFP4: (32, "MXFP4"),
}


@dataclasses.dataclass(frozen=True)
class MoeCall:
    """A call that passed every check that does not depend on addresses.

    Attributes:
        backend: "sm80" or "cpu".
        device: where all tensors lie.
        activation: with Swiglu already turned into SwigluBias where it has parameters.
        weight_format: one of the WEIGHTS_ numbers.
        group_size: how many weights of a row share a scale; 0 where it is the whole row, or
            there are none.
        weight_scale_dtype: the dtype code of both quant_scales; 0 without them.
        add_fc2_bias: whether this rank adds fc2_expert_biases.
        workspace_bytes: what the backend needs; 0 on the cpu backend.
        problem: the extension's view of all this; None on the cpu backend.
        nbytes: the size of each tensor argument that is given.
        tactics: the extension's numbers of GEMM 1's and GEMM 2's; None leaves the choice to it.
    """

    backend: str
    device: torch.device
    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_local_experts: int
    first_local_expert: int
    top_k: int
    activation: ActivationType
    input_dtype: torch.dtype
    output_dtype: torch.dtype
    weight_format: int
    group_size: int
    weight_scale_dtype: int
    add_fc2_bias: bool
    workspace_bytes: int
    problem: Any
    nbytes: dict[str, int]
    tactics: tuple[int, int] | None = None


def check_call(s: Signature) -> MoeCall:
    """Checks a call.

    Args:
        s: what it is made of, apart from addresses and contents.

    Raises:
        TypeError: a value of the wrong Python type.
        ValueError: tensors or numbers that do not fit.
        NotImplementedError: a mode the backend does not have.
        RuntimeError: the backend is not in this build.
    """
    _check_python_types(s)
    backend = backends.choose(s.backend, s.input.device)
    refusals.check(
        backend,
        input_dtype=s.input.dtype,
        fc1_dtype=s.fc1_expert_weights.dtype,
        fc2_dtype=s.fc2_expert_weights.dtype,
        output_dtype=s.output_dtype,
        has_input_sf=s.input_sf,
        use_deepseek_fp8_block_scale=s.use_deepseek_fp8_block_scale,
        use_w4_group_scaling=s.use_w4_group_scaling,
        use_mxfp8_act_scaling=s.use_mxfp8_act_scaling,
        use_packed_weights=s.use_packed_weights,
        min_latency_mode=s.min_latency_mode,
    )
    check_parallelism(s.tp_size, s.tp_rank, s.ep_size, s.ep_rank)
    _check_cluster(s)
    weight_format = check_dtypes(
        backend,
        s.input.dtype,
        s.fc1_expert_weights.dtype,
        s.output_dtype,
        use_packed_weights=s.use_packed_weights,
        use_w4_group_scaling=s.use_w4_group_scaling,
    )
    _check_tensor_dtypes(s)
    activation = shapes.effective_activation(s)
    four_bit = weight_format in (WEIGHTS_INT4, WEIGHTS_MXFP4)
    sizes = shapes.check_shapes(s, activation.is_gated, weights_a_byte=2 if four_bit else 1)
    shapes.check_local_experts("fc1_expert_weights.shape[0]", backend, sizes["num_local_experts"])
    check_multiples(sizes["hidden_size"], sizes["intermediate_size"], weight_format)
    group_size = 0
    if four_bit:
        depths = (sizes["hidden_size"], sizes["intermediate_size"])
        group_size = scales.check_group_scales(s, depths, mxfp4=weight_format == WEIGHTS_MXFP4)
    else:
        scales.check_quant_scales(s, quantized=weight_format != WEIGHTS_AS_INPUT)
    shapes.check_devices(s)
    backends.check_device(backend, s.input.device)
    shapes.check_contiguity(s)
    sizes["first_local_expert"] = s.ep_rank * sizes["num_local_experts"]
    problem, workspace_bytes = plan_problem(
        backend,
        activation,
        s.input.dtype,
        s.output_dtype,
        weight_format,
        num_experts=s.ep_size * sizes["num_local_experts"],
        group_size=group_size,
        **sizes,
    )
    shapes.check_workspace(s.workspace_buffer, workspace_bytes)
    return MoeCall(
        backend=backend,
        device=s.input.device,
        activation=activation,
        input_dtype=s.input.dtype,
        output_dtype=s.output_dtype,
        weight_format=weight_format,
        group_size=group_size,
        weight_scale_dtype=SCALE_CODES[s.quant_scales[0].dtype] if s.quant_scales else 0,
        add_fc2_bias=s.fc2_expert_biases is not None and s.tp_rank == 0,
        workspace_bytes=workspace_bytes,
        problem=problem,
        tactics=None,
        nbytes={name: meta.nbytes for name, meta in s.tensors().items()},
        **sizes,
    )


def plan_problem(
    backend: str,
    activation: ActivationType,
    input_dtype: torch.dtype,
    output_dtype: torch.dtype,
    weight_format: int,
    group_size: int = 0,
    **sizes: int,
) -> tuple[Any, int]:
    """Returns the extension's problem and its workspace in bytes; (None, 0) for cpu."""
    if backend == "cpu":
        return None, 0
    extension = _extension.require(backend)
    problem = extension.Problem(
        activation=int(activation),
        dtype=DTYPE_CODES[input_dtype],
        output_dtype=DTYPE_CODES[output_dtype],
        weight_format=weight_format,
        group_size=group_size,
        **sizes,
    )
    return problem, extension.workspace_size(backend, problem)


def check_parallelism(tp_size: int, tp_rank: int, ep_size: int, ep_rank: int) -> None:
    """Raises ValueError unless both ranks lie within their sizes."""
    for kind, size, rank in (("tp", tp_size, tp_rank), ("ep", ep_size, ep_rank)):
        if size < 1:
            raise ValueError(f"{kind}_size is {size}; it must be 1 or more")
        if not 0 <= rank < size:
            raise ValueError(
                f"{kind}_rank is {rank}; it must be from 0 to {kind}_size - 1 = {size - 1}"
            )


def check_multiples(hidden_size: int, intermediate_size: int, weight_format: int) -> None:
    """Raises ValueError unless rows of weights are whole numbers of 16-byte pieces."""
    multiple, weights = _MULTIPLES[weight_format]
    four_bit = " * 2" if multiple == 32 else ""
    for name, size in (
        ("hidden size (input.shape[1])", hidden_size),
        (f"intermediate size (fc2_expert_weights.shape[2]{four_bit})", intermediate_size),
    ):
        if size < multiple or size % multiple:
            raise ValueError(
                f"the {name} is {size}; with {weights} weights it must be a positive multiple of "
                f"{multiple}, so that rows are 16B-aligned: pad the weights with zeros"
            )


def _check_python_types(s: Signature) -> None:
    if not isinstance(s.output_dtype, torch.dtype):
        raise TypeError(
            f"output_dtype is {s.output_dtype!r}; it must be a torch.dtype: torch.float16 or "
            "torch.bfloat16"
        )
    for name in (
        "tp_size",
        "tp_rank",
        "ep_size",
        "ep_rank",
        "cluster_size",
        "cluster_rank",
        "tune_max_num_tokens",
    ):
        value = getattr(s, name)
        if not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}; it must be an int")
    if s.tune_max_num_tokens < 1:
        raise ValueError(f"tune_max_num_tokens is {s.tune_max_num_tokens}; it must be 1 or more")


def _check_cluster(s: Signature) -> None:
    if s.cluster_size != 1 or s.cluster_rank != 0:
        name, value = (
            ("cluster_size", s.cluster_size)
            if s.cluster_size != 1
            else ("cluster_rank", s.cluster_rank)
        )
        raise ValueError(
            f"{name} is {value}; only cluster_size=1, cluster_rank=0 is supported: shard experts "
            "with ep_size and ep_rank, or the intermediate size with tp_size and tp_rank"
        )


def _expect_dtype(name: str, dtype: torch.dtype, allowed: tuple[torch.dtype, ...]) -> None:
    if dtype not in allowed:
        raise ValueError(
            f"{name} is {dtype}; it must be {' or '.join(map(str, allowed))}"
            + (f": use {name}.to({allowed[0]})" if len(allowed) == 1 and name != "output" else "")
        )


def check_dtypes(
    backend: str,
    input_dtype: torch.dtype,
    weights: torch.dtype,
    output_dtype: torch.dtype,
    *,
    use_packed_weights: bool = False,
    use_w4_group_scaling: bool = False,
) -> int:
    """Returns the weight format; raises ValueError for dtypes that no mode has."""
    floating: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    if backend == "cpu":
        floating += (torch.float32,)
    _expect_dtype("input", input_dtype, floating)
    _expect_dtype("output_dtype", output_dtype, floating)
    _expect_dtype("fc1_expert_weights", weights, (input_dtype, torch.int8, torch.uint8))
    for name, flag, weight_format in (
        ("use_packed_weights", use_packed_weights, WEIGHTS_INT4),
        ("use_w4_group_scaling", use_w4_group_scaling, WEIGHTS_MXFP4),
    ):
        if flag and weights != torch.uint8:
            raise ValueError(
                f"{name} is True, which is for 4-bit weights, two a torch.uint8, but "
                f"fc1_expert_weights is {weights}; leave it False"
            )
        if flag:
            return weight_format
    return {torch.int8: WEIGHTS_INT8, torch.uint8: WEIGHTS_UINT8}.get(weights, WEIGHTS_AS_INPUT)


def _check_tensor_dtypes(s: Signature) -> None:
    weights = s.fc1_expert_weights.dtype
    if s.fc2_expert_weights.dtype != weights:
        raise ValueError(
            f"fc2_expert_weights is {s.fc2_expert_weights.dtype}; it must have the dtype of "
            f"fc1_expert_weights, {weights}"
        )
    for name, dtype in (
        ("token_selected_experts", torch.int32),
        ("token_final_scales", torch.float32),
        ("fc1_expert_biases", s.output_dtype),
        ("fc2_expert_biases", s.output_dtype),
        ("swiglu_alpha", torch.float32),
        ("swiglu_beta", torch.float32),
        ("swiglu_limit", torch.float32),
        ("output", s.output_dtype),
    ):
        meta = getattr(s, name)
        if meta is not None:
            _expect_dtype(name, meta.dtype, (dtype,))
