# SPDX-License-Identifier: Apache-2.0
"""Fused Mixture-of-Experts inference for NVIDIA GPUs from Ampere on, and for CPUs.

For example, with the weights of this rank's experts:

    from fused_moe import cutlass_fused_moe, topk_softmax

    scales, experts = topk_softmax(router_logits, k=2)
    out = cutlass_fused_moe(x, experts, scales, w_up_gate, w_down, x.dtype, None)

See `cutlass_fused_moe` for the order of the gated rows, which nothing can check.
"""

from fused_moe.activation import ActivationType
from fused_moe.module import FusedMoE
from fused_moe.op import cutlass_fused_moe
from fused_moe.quantization import (
    dequantize_int4,
    dequantize_mxfp4,
    quantize_int4,
    quantize_int8,
    quantize_mxfp4,
    up_gate_from_gate_up,
)
from fused_moe.routing import Routing, topk_softmax
from fused_moe.tuning import autotune
from fused_moe.workspace import cutlass_fused_moe_workspace_size

__version__ = "0.1.0"

__all__ = [
    "ActivationType",
    "FusedMoE",
    "Routing",
    "__version__",
    "autotune",
    "cutlass_fused_moe",
    "cutlass_fused_moe_workspace_size",
    "dequantize_int4",
    "dequantize_mxfp4",
    "quantize_int4",
    "quantize_int8",
    "quantize_mxfp4",
    "topk_softmax",
    "up_gate_from_gate_up",
]
