# SPDX-License-Identifier: Apache-2.0
"""How much scratch memory a call needs."""

from __future__ import annotations

import torch

from fused_moe import arguments, backends, refusals, scales, shapes
from fused_moe.activation import ActivationType


def cutlass_fused_moe_workspace_size(
    num_tokens: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    *,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype | None = None,
    output_dtype: torch.dtype | None = None,
    activation_type: int = ActivationType.Swiglu,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    min_latency_mode: bool = False,
    use_packed_weights: bool = False,
    use_fused_finalize: bool | None = None,
    group_size: int | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> int:
    """Returns the bytes that `workspace_buffer` must have for a call of `cutlass_fused_moe`.

    It is all the device memory that a call uses besides its arguments and its output: at
    most 2 * (I + 2H) bytes a slot, a slot being one of the num_tokens * top_k, plus 1 MiB.
    A buffer for the largest num_tokens serves every smaller one. 0 on the cpu backend. Asks
    no GPU where `backend` is given.

    Args:
        num_tokens: M, the most tokens of a call.
        hidden_size: H.
        intermediate_size: I of this rank, fc2_expert_weights.shape[2].
        num_experts: E, those of all ranks: a multiple of ep_size.
        top_k: k, experts a token.
        x_dtype: dtype of the input.
        weight_dtype: dtype of the weights; None is x_dtype. torch.uint8 with
            use_packed_weights is INT4, with use_w4_group_scaling MXFP4.
        output_dtype: None is x_dtype.
        activation_type, tp_size, tp_rank, ep_size, ep_rank, use_...: as in the call.
        group_size: how many INT4 weights of a row share a scale: 32, 64 or 128. None is enough
            for each that the sizes allow.
        device: where the call will run, if `backend` is None; None is the current CUDA
            device, or the CPU where there is none.
        backend: as in the call.

    Raises:
        ValueError: sizes or dtypes that `cutlass_fused_moe` would reject.
        NotImplementedError: a mode that the backend does not have.
        RuntimeError: the backend is not in this build.
    """
    weight_dtype = x_dtype if weight_dtype is None else weight_dtype
    output_dtype = x_dtype if output_dtype is None else output_dtype
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = backends.choose(backend, torch.device(device))
    refusals.check(
        name,
        input_dtype=x_dtype,
        fc1_dtype=weight_dtype,
        fc2_dtype=weight_dtype,
        output_dtype=output_dtype,
        use_deepseek_fp8_block_scale=use_deepseek_fp8_block_scale,
        use_w4_group_scaling=use_w4_group_scaling,
        use_mxfp8_act_scaling=use_mxfp8_act_scaling,
        use_packed_weights=use_packed_weights,
        min_latency_mode=min_latency_mode,
    )
    arguments.check_parallelism(tp_size, tp_rank, ep_size, ep_rank)
    weight_format = arguments.check_dtypes(
        name,
        x_dtype,
        weight_dtype,
        output_dtype,
        use_packed_weights=use_packed_weights,
        use_w4_group_scaling=use_w4_group_scaling,
    )
    arguments.check_multiples(hidden_size, intermediate_size, weight_format)
    groups = _groups_of(weight_format, (hidden_size, intermediate_size), group_size)
    for argument, value, least in (
        ("num_tokens", num_tokens, 0),
        ("num_experts", num_experts, 1),
        ("top_k", top_k, 1),
    ):
        if value < least:
            raise ValueError(f"{argument} is {value}; it must be {least} or more")
    if num_experts % ep_size:
        raise ValueError(
            f"num_experts is {num_experts}; it must be a multiple of ep_size, {ep_size}"
        )
    shapes.check_slots("num_tokens * top_k", num_tokens, top_k)
    num_local_experts = num_experts // ep_size
    shapes.check_local_experts("num_experts / ep_size", name, num_local_experts)
    plans = [
        arguments.plan_problem(
            name,
            shapes.activation_of(activation_type),
            x_dtype,
            output_dtype,
            weight_format,
            group_size=group,
            num_tokens=num_tokens,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_experts=num_experts,
            num_local_experts=num_local_experts,
            first_local_expert=ep_rank * num_local_experts,
            top_k=top_k,
        )
        for group in groups
    ]
    return max(nbytes for _, nbytes in plans)


def _groups_of(
    weight_format: int, depths: tuple[int, int], group_size: int | None
) -> tuple[int, ...]:
    """The group sizes that weights of this format, H and I deep, may have; (0,) without groups.

    Raises:
        ValueError: `group_size` is given and is not one of them.
    """
    groups: tuple[int, ...] = (0,)
    if weight_format in (arguments.WEIGHTS_INT4, arguments.WEIGHTS_MXFP4):
        mxfp4 = weight_format == arguments.WEIGHTS_MXFP4
        groups = scales.fitting_groups(depths, mxfp4=mxfp4)
    if group_size is None:
        return groups
    if group_size not in groups:
        raise ValueError(
            f"group_size is {group_size}; with these weights and sizes it must be one of "
            f"{list(groups)}, or None"
        )
    return (group_size,)
