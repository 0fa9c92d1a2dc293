# SPDX-License-Identifier: Apache-2.0
"""One call, from arguments to launch. Written for speed: it runs at every layer of a model.

The checks that depend on shapes, dtypes, devices and flags only are looked up by those; what
is left for each call is to read the addresses and look at their alignment. Hence the plain
code: a function call, a tuple or a name of an argument costs more here than what it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fused_moe import cpu, cuda, shapes
from fused_moe.arguments import MoeCall, check_call
from fused_moe.signature import describe, sign
from fused_moe.tuning import tuner

# The calls that passed their checks. Signatures repeat: a serving process has a few hundred. A
# bound, because M may vary freely.
_passed: dict[tuple[Any, ...], MoeCall] = {}
_MOST_PASSED = 4096

# What tuning finds, calls pick up when they are looked at anew.
tuner.on_change = lambda: _passed.clear()


def execute(
    input: torch.Tensor,
    token_selected_experts: torch.Tensor,
    token_final_scales: torch.Tensor | None,
    fc1_expert_weights: torch.Tensor,
    fc2_expert_weights: torch.Tensor,
    output_dtype: torch.dtype,
    quant_scales: Sequence[torch.Tensor] | None,
    fc1_expert_biases: torch.Tensor | None,
    fc2_expert_biases: torch.Tensor | None,
    input_sf: torch.Tensor | None,
    swiglu_alpha: torch.Tensor | None,
    swiglu_beta: torch.Tensor | None,
    swiglu_limit: torch.Tensor | None,
    tp_size: int,
    tp_rank: int,
    ep_size: int,
    ep_rank: int,
    cluster_size: int,
    cluster_rank: int,
    output: torch.Tensor | None,
    use_deepseek_fp8_block_scale: bool,
    use_w4_group_scaling: bool,
    use_mxfp8_act_scaling: bool,
    min_latency_mode: bool,
    use_packed_weights: bool,
    tune_max_num_tokens: int,
    activation_type: int,
    workspace_buffer: torch.Tensor | None,
    backend: str | None,
) -> torch.Tensor:
    """Checks and runs a call; the arguments are those of `cutlass_fused_moe`."""
    try:
        device = input.device
        # What every good call has in common is not in the key. All other calls are checked in
        # full, whether a like one passed or not.
        usual = (
            input.is_contiguous()
            and token_selected_experts.is_contiguous()
            and fc1_expert_weights.is_contiguous()
            and fc2_expert_weights.is_contiguous()
            and token_selected_experts.device == device
            and fc1_expert_weights.device == device
            and fc2_expert_weights.device == device
            and input_sf is None
        )
        key = (
            device,
            input.shape,
            input.dtype,
            token_selected_experts.shape,
            token_selected_experts.dtype,
            fc1_expert_weights.shape,
            fc1_expert_weights.dtype,
            fc2_expert_weights.shape,
            fc2_expert_weights.dtype,
            None if token_final_scales is None else describe(token_final_scales),
            tuple([describe(scale) for scale in quant_scales]) if quant_scales else (),
            None if fc1_expert_biases is None else describe(fc1_expert_biases),
            None if fc2_expert_biases is None else describe(fc2_expert_biases),
            None if swiglu_alpha is None else describe(swiglu_alpha),
            None if swiglu_beta is None else describe(swiglu_beta),
            None if swiglu_limit is None else describe(swiglu_limit),
            None if output is None else describe(output),
            None if workspace_buffer is None else describe(workspace_buffer),
            output_dtype,
            tp_size,
            tp_rank,
            ep_size,
            ep_rank,
            cluster_size,
            cluster_rank,
            use_deepseek_fp8_block_scale,
            use_w4_group_scaling,
            use_mxfp8_act_scaling,
            min_latency_mode,
            use_packed_weights,
            tune_max_num_tokens,
            activation_type,
            backend,
        )
        input_address = input.data_ptr()
        experts_address = token_selected_experts.data_ptr()
        scales_address = 0 if token_final_scales is None else token_final_scales.data_ptr()
        fc1_address = fc1_expert_weights.data_ptr()
        fc2_address = fc2_expert_weights.data_ptr()
        fc1_bias_address = 0 if fc1_expert_biases is None else fc1_expert_biases.data_ptr()
        fc2_bias_address = 0 if fc2_expert_biases is None else fc2_expert_biases.data_ptr()
        alpha_address = 0 if swiglu_alpha is None else swiglu_alpha.data_ptr()
        beta_address = 0 if swiglu_beta is None else swiglu_beta.data_ptr()
        limit_address = 0 if swiglu_limit is None else swiglu_limit.data_ptr()
    except (AttributeError, RuntimeError, TypeError):
        sign(locals())  # says which argument is none that has a shape and an address
        raise
    try:
        call = _passed.get(key) if usual else None
    except TypeError:
        # A value that cannot be hashed fits no argument: the checks say which.
        call, usual = None, False
    first = call is None
    if call is None:
        call = check_call(sign(locals()))

    fc1_scales = fc2_scales = None
    fc1_scales_address = fc2_scales_address = 0
    if quant_scales:
        fc1_scales, fc2_scales = quant_scales
        fc1_scales_address = fc1_scales.data_ptr()
        fc2_scales_address = fc2_scales.data_ptr()
    if (
        output is not None
        or workspace_buffer is not None
        or (
            input_address
            | fc1_address
            | fc2_address
            | fc1_scales_address
            | fc2_scales_address
            | fc1_bias_address
            | fc2_bias_address
        )
        & 15
        or (experts_address | scales_address | alpha_address | beta_address | limit_address) & 3
    ):
        _check_addresses(
            call,
            {
                "input": input_address,
                "token_selected_experts": experts_address,
                "token_final_scales": scales_address,
                "fc1_expert_weights": fc1_address,
                "fc2_expert_weights": fc2_address,
                "quant_scales[0]": fc1_scales_address,
                "quant_scales[1]": fc2_scales_address,
                "fc1_expert_biases": fc1_bias_address,
                "fc2_expert_biases": fc2_bias_address,
                "swiglu_alpha": alpha_address,
                "swiglu_beta": beta_address,
                "swiglu_limit": limit_address,
                "output": 0 if output is None else output.data_ptr(),
                "workspace_buffer": (
                    0 if workspace_buffer is None else workspace_buffer.data_ptr()
                ),
            },
        )
    if first:
        generation: int | None = tuner.generation
        if call.backend != "cpu" and call.num_tokens:
            call, generation = tuner.settle(call, locals())
        if usual:
            if len(_passed) >= _MOST_PASSED:
                _passed.clear()
            _passed[key] = call
            if generation != tuner.generation:  # another thread tuned meanwhile
                _passed.pop(key, None)
    if call.backend != "cpu" and call.num_tokens:
        return cuda.launch(
            call,
            output,
            workspace_buffer,
            input_address,
            experts_address,
            scales_address,
            fc1_address,
            fc2_address,
            fc1_scales_address,
            fc2_scales_address,
            fc1_bias_address,
            fc2_bias_address,
            alpha_address,
            beta_address,
            limit_address,
        )
    if output is None:
        output = torch.empty(
            (call.num_tokens, call.hidden_size), dtype=output_dtype, device=call.device
        )
    if call.num_tokens:
        cpu.run(
            call,
            input,
            token_selected_experts,
            token_final_scales,
            fc1_expert_weights,
            fc2_expert_weights,
            fc1_scales,
            fc2_scales,
            fc1_expert_biases,
            fc2_expert_biases,
            swiglu_alpha,
            swiglu_beta,
            swiglu_limit,
            output,
        )
    return output


def _check_addresses(call: MoeCall, addresses: dict[str, int]) -> None:
    """Checks alignment, and that nothing that is written overlaps anything else."""
    given = {name: address for name, address in addresses.items() if name in call.nbytes}
    shapes.check_alignment(given, call.device.type)
    for written in ("output", "workspace_buffer"):
        if written in given:
            shapes.check_overlap(written, given, call.nbytes)
