# SPDX-License-Identifier: Apache-2.0
"""One call, from arguments to launch. Written for speed: it runs at every layer of a model.

The checks that depend on shapes, dtypes, devices and flags only are looked up by those; what
is left for each call is to read the addresses and look at their alignment.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fused_moe import cpu, cuda, shapes
from fused_moe.arguments import MoeCall, check_call, check_call_cached
from fused_moe.signature import describe, reject_non_tensors

_REQUIRED = frozenset(
    {"input", "token_selected_experts", "fc1_expert_weights", "fc2_expert_weights"}
)
_TENSORS = _REQUIRED | {
    "token_final_scales",
    "quant_scales",
    "fc1_expert_biases",
    "fc2_expert_biases",
    "input_sf",
    "swiglu_alpha",
    "swiglu_beta",
    "swiglu_limit",
    "output",
    "workspace_buffer",
}


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
        key = (
            describe(input),
            describe(token_selected_experts),
            describe(token_final_scales),
            describe(fc1_expert_weights),
            describe(fc2_expert_weights),
            tuple([describe(scale) for scale in quant_scales]) if quant_scales else (),
            describe(fc1_expert_biases),
            describe(fc2_expert_biases),
            input_sf is not None,
            describe(swiglu_alpha),
            describe(swiglu_beta),
            describe(swiglu_limit),
            describe(output),
            describe(workspace_buffer),
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
        scales_address = _address(token_final_scales)
        fc1_address = fc1_expert_weights.data_ptr()
        fc2_address = fc2_expert_weights.data_ptr()
        fc1_bias_address = _address(fc1_expert_biases)
        fc2_bias_address = _address(fc2_expert_biases)
        alpha_address = _address(swiglu_alpha)
        beta_address = _address(swiglu_beta)
        limit_address = _address(swiglu_limit)
    except (AttributeError, RuntimeError, TypeError):
        arguments = {name: value for name, value in locals().items() if name in _TENSORS}
        reject_non_tensors(arguments, _REQUIRED)
        raise
    try:
        call: MoeCall | None = check_call_cached(key)
    except TypeError:
        call = None
    if call is None:
        # A value that cannot be hashed fits no argument: this says which.
        call = check_call(key)

    fc1_scales, fc2_scales = quant_scales if quant_scales else (None, None)
    fc1_scales_address = _address(fc1_scales)
    fc2_scales_address = _address(fc2_scales)
    given = output is not None or workspace_buffer is not None
    if output is None:
        output = torch.empty(
            (call.num_tokens, call.hidden_size), dtype=output_dtype, device=call.device
        )
    output_address = output.data_ptr()
    if (
        given
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
                "output": output_address,
                "workspace_buffer": _address(workspace_buffer),
            },
        )
    if call.num_tokens == 0:
        return output
    if call.backend == "cpu":
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
    else:
        cuda.launch(
            call,
            workspace_buffer,
            input=input_address,
            experts=experts_address,
            scales=scales_address,
            fc1_weights=fc1_address,
            fc2_weights=fc2_address,
            fc1_scales=fc1_scales_address,
            fc2_scales=fc2_scales_address,
            fc1_bias=fc1_bias_address,
            fc2_bias=fc2_bias_address,
            swiglu_alpha=alpha_address,
            swiglu_beta=beta_address,
            swiglu_limit=limit_address,
            output=output_address,
        )
    return output


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check_addresses(call: MoeCall, addresses: dict[str, int]) -> None:
    """Checks alignment, and that nothing that is written overlaps anything else."""
    given = {name: address for name, address in addresses.items() if name in call.nbytes}
    shapes.check_alignment(given, call.device.type)
    for written in ("output", "workspace_buffer"):
        if written in given:
            shapes.check_overlap(written, given, call.nbytes)
