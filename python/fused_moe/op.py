# SPDX-License-Identifier: Apache-2.0
"""`cutlass_fused_moe`, and the same thing as a PyTorch operator for torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fused_moe.activation import ActivationType
from fused_moe.execute import execute


def cutlass_fused_moe(
    input: torch.Tensor,
    token_selected_experts: torch.Tensor,
    token_final_scales: torch.Tensor | None,
    fc1_expert_weights: torch.Tensor,
    fc2_expert_weights: torch.Tensor,
    output_dtype: torch.dtype,
    quant_scales: Sequence[torch.Tensor] | None,
    fc1_expert_biases: torch.Tensor | None = None,
    fc2_expert_biases: torch.Tensor | None = None,
    input_sf: torch.Tensor | None = None,
    swiglu_alpha: torch.Tensor | None = None,
    swiglu_beta: torch.Tensor | None = None,
    swiglu_limit: torch.Tensor | None = None,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    cluster_size: int = 1,
    cluster_rank: int = 0,
    output: torch.Tensor | None = None,
    enable_alltoall: bool = False,
    use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    min_latency_mode: bool = False,
    use_packed_weights: bool = False,
    tune_max_num_tokens: int = 8192,
    enable_pdl: bool | None = None,
    activation_type: int = ActivationType.Swiglu,
    *,
    use_fused_finalize: bool | None = None,
    workspace_buffer: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """One Mixture-of-Experts layer: out[t] = sum over j of scale[t, j] * expert(input[t]).

    An expert is fc2[e] @ activation(fc1[e] @ x + fc1_bias[e]) + fc2_bias[e]. M is tokens, H
    hidden, I intermediate (of this rank), k experts a token, E_l experts of this rank, E =
    E_l * ep_size.

    **The gate is the second half of fc1's rows**: [up (linear, w3); gate (w1)]. Nothing can
    detect the wrong order, and results are then silently wrong: many checkpoints hold [gate;
    up], which `up_gate_from_gate_up` converts.

    Everything runs on the current stream of the tensors' device, can be captured in a CUDA
    graph and never waits for the GPU. Equal calls give equal bits. No gradients flow.

    Args:
        input: [M, H] float16 or bfloat16 (float32 on the cpu backend). Like all tensors here:
            contiguous, on one device, and 16B-aligned (ids, scales and swiglu parameters may
            start at any element).
        token_selected_experts: [M, k] int32, ids among all E experts. One that is outside
            this rank's range, negative, or E and above contributes exactly 0; any value is
            safe. Duplicates within a token are summed.
        token_final_scales: [M, k] float32; None is 1. Multiplies an expert's whole output.
        fc1_expert_weights: [E_l, 2I, H] for gated activations, [E_l, I, H] for others, in the
            dtype of input, or int8, or uint8 (which holds q + 128). 4-bit weights are uint8
            [E_l, 2I or I, H / 2], the even one of two in the low nibble: q + 8 with
            use_packed_weights, E2M1 with use_w4_group_scaling.
        fc2_expert_weights: [E_l, H, I], the dtype of fc1's; [E_l, H, I / 2] of 4 bits. H and I
            are multiples of 8; of 16 with 8-bit weights, of the group with 4-bit ones.
        output_dtype: float16 or bfloat16, need not be the input's (float32 on cpu).
        quant_scales: None or [] for 16-bit weights. For 8-bit weights [fc1's, fc2's], [E_l, 2I
            or I] and [E_l, H], both float32 or both of input's dtype; a weight is q * scale.
            For INT4 the same with one scale for each group of g neighbours in a row, [E_l, 2I
            or I, H / g] and [E_l, H, I / g]: g, 32, 64 or 128, is read off these shapes; kernels
            round these scales to the dtype of input. For MXFP4 g is 32 and a scale is E8M0,
            uint8 s or float8_e8m0fnu, which means 2^(s - 127).
        fc1_expert_biases: [E_l, 2I or I] output_dtype; either bias may be given alone.
        fc2_expert_biases: [E_l, H] output_dtype; added where tp_rank is 0, so that the sum over
            ranks holds it once.
        input_sf: block scales of FP4 activations: refused by every backend of this version.
        swiglu_alpha, swiglu_beta, swiglu_limit: [E_l] float32. Any of them turns Swiglu into
            SwigluBias (defaults 1, 0, infinity); SwigluStep takes swiglu_limit (default 7).
            With another activation they are an error, not ignored.
        tp_size, tp_rank: the weights are shards along I; the result is this rank's part of a
            sum that the caller takes.
        ep_size, ep_rank: this rank holds the experts [ep_rank * E_l, (ep_rank + 1) * E_l).
        cluster_size, cluster_rank: only 1 and 0.
        output: [M, H] output_dtype, written in place and returned; must overlap no argument.
        enable_alltoall: accepted, changes nothing: exchanging tokens is the caller's, and every
            row of the output is always written, rows without a local expert with 0.
        use_packed_weights: uint8 weights are INT4.
        use_w4_group_scaling: uint8 weights are MXFP4. Both flags together are W4A8, which no
            backend of this version has.
        use_deepseek_fp8_block_scale, use_mxfp8_act_scaling, min_latency_mode: modes that no
            backend of this version has; True raises NotImplementedError naming what there is.
        tune_max_num_tokens: the most tokens that `autotune` measures for; outside of it, nothing.
        enable_pdl: a permission to overlap launches; never changes a result, and Ampere cannot.
        activation_type: an `ActivationType`, or its number.
        use_fused_finalize: permits a faster last step with other bits from run to run. A
            permission, not a demand: this version always sums in one fixed order.
        workspace_buffer: [bytes] uint8 or int8, 128B-aligned (64B on the CPU), at least
            `cutlass_fused_moe_workspace_size` of them, in use until the call's kernels are
            done; None takes it from PyTorch's allocator.
        backend: "sm80" or "cpu"; None chooses by the device ("sm90" is not in this version).

    Returns:
        [M, H] output_dtype; `output` itself where given. Empty for M = 0. (FlashInfer returns a
        list that holds the tensor: drop the [0].)

    Raises:
        TypeError, ValueError: an argument that does not fit; the text names it. Nothing is
            written.
        NotImplementedError: a mode the backend does not have, whatever the device.
        RuntimeError: the backend is not in this build, or CUDA reports an error.
    """
    # The dispatcher costs as much again as the checks: only where it has to see the call.
    dispatched = torch.compiler.is_compiling() or (
        type(input) is not torch.Tensor and _is_subclass(input)
    )
    run: Callable[..., Any] = execute
    if dispatched:
        run = torch.ops.fused_moe.cutlass_fused_moe
        quant_scales = [] if quant_scales is None else list(quant_scales)
        activation_type = int(activation_type)
        if output is None:
            output = torch.empty(
                (input.shape[0], fc2_expert_weights.shape[1]),
                dtype=output_dtype,
                device=input.device,
            )
    result = run(
        input,
        token_selected_experts,
        token_final_scales,
        fc1_expert_weights,
        fc2_expert_weights,
        output_dtype,
        quant_scales,
        fc1_expert_biases,
        fc2_expert_biases,
        input_sf,
        swiglu_alpha,
        swiglu_beta,
        swiglu_limit,
        tp_size,
        tp_rank,
        ep_size,
        ep_rank,
        cluster_size,
        cluster_rank,
        output,
        use_deepseek_fp8_block_scale,
        use_w4_group_scaling,
        use_mxfp8_act_scaling,
        min_latency_mode,
        use_packed_weights,
        tune_max_num_tokens,
        activation_type,
        workspace_buffer,
        backend,
    )
    return output if dispatched else result


def _is_subclass(value: Any) -> bool:
    """Whether what is no plain tensor is one that only the dispatcher understands: fake ones."""
    kind = type(value)
    return kind is not torch.nn.Parameter and isinstance(value, torch.Tensor)


# The operator writes into a given output, because an operator may not return an argument;
# `cutlass_fused_moe` allocates where the caller gave none. It does all its checks when it runs.
_SCHEMA = (
    "(Tensor input, Tensor token_selected_experts, Tensor? token_final_scales, "
    "Tensor fc1_expert_weights, Tensor fc2_expert_weights, ScalarType output_dtype, "
    "Tensor[] quant_scales, Tensor? fc1_expert_biases, Tensor? fc2_expert_biases, "
    "Tensor? input_sf, Tensor? swiglu_alpha, Tensor? swiglu_beta, Tensor? swiglu_limit, "
    "int tp_size, int tp_rank, int ep_size, int ep_rank, int cluster_size, int cluster_rank, "
    "Tensor(a!) output, bool use_deepseek_fp8_block_scale, bool use_w4_group_scaling, "
    "bool use_mxfp8_act_scaling, bool min_latency_mode, bool use_packed_weights, "
    "int tune_max_num_tokens, int activation_type, Tensor(b!)? workspace_buffer, "
    "str? backend) -> ()"
)


@torch.library.custom_op(
    "fused_moe::cutlass_fused_moe",
    mutates_args=("output", "workspace_buffer"),
    schema=_SCHEMA,
)
def _operator(*arguments: Any) -> None:
    execute(*arguments)


@_operator.register_fake
def _fake(*arguments: Any) -> None:
    """Nothing to make up: the shape of the result is that of `output`, which exists."""
