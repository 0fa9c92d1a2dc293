# SPDX-License-Identifier: Apache-2.0
"""Expert weights as 4-bit checkpoints store them, turned into what `cutlass_fused_moe` takes.

A whole layer from a mapping of names to tensors, such as safetensors' `load_file` returns:

    from fused_moe.checkpoints import load_gpt_oss_experts, load_int4_experts

    experts = load_int4_experts(tensors, "model.layers.0.mlp.experts", 128, layout="awq")
    out = cutlass_fused_moe(x, ids, scales, output_dtype=x.dtype, **experts.arguments())

Single matrices by `int4_from_awq`, `int4_from_gptq` and `int4_from_compressed_tensors`. Nothing
is rounded: what our formats cannot hold exactly is refused, with the reason.
"""

from fused_moe.checkpoints.experts import ExpertWeights, load_gpt_oss_experts, load_int4_experts
from fused_moe.checkpoints.gpt_oss import mxfp4_from_gpt_oss, up_gate_from_interleaved
from fused_moe.checkpoints.int4 import (
    dequantize_awq,
    dequantize_gptq,
    int4_from_awq,
    int4_from_compressed_tensors,
    int4_from_gptq,
)

__all__ = [
    "ExpertWeights",
    "dequantize_awq",
    "dequantize_gptq",
    "int4_from_awq",
    "int4_from_compressed_tensors",
    "int4_from_gptq",
    "load_gpt_oss_experts",
    "load_int4_experts",
    "mxfp4_from_gpt_oss",
    "up_gate_from_interleaved",
]
