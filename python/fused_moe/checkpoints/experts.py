# SPDX-License-Identifier: Apache-2.0
"""The experts of one layer, from a checkpoint's names to the arguments of the call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fused_moe.activation import ActivationType
from fused_moe.checkpoints.gpt_oss import mxfp4_from_gpt_oss, up_gate_from_interleaved
from fused_moe.checkpoints.int4 import (
    int4_from_awq,
    int4_from_compressed_tensors,
    int4_from_gptq,
)
from fused_moe.checkpoints.symmetric import regroup

# The tensors of a matrix: those it must have, and those it may have.
_TENSORS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "awq": (("qweight", "qzeros", "scales"), ()),
    "gptq": (("qweight", "qzeros", "scales"), ("g_idx",)),
    "gptq_v2": (("qweight", "qzeros", "scales"), ("g_idx",)),
    "compressed-tensors": (
        ("weight_packed", "weight_scale"),
        ("weight_shape", "weight_zero_point", "weight_g_idx"),
    ),
}

# How models name an expert's gate, up and down projections; the second is Mixtral's.
_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))

# SwigluBias's parameters in gpt-oss.
_GPT_OSS_SWIGLU = {"swiglu_alpha": 1.702, "swiglu_beta": 1.0, "swiglu_limit": 7.0}


@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """The experts of one layer in a 4-bit format.

    Attributes:
        fc1_weight: [E, 2I, H / 2] uint8, rows [up; gate].
        fc2_weight: [E, H, I / 2] uint8.
        fc1_scale: [E, 2I, H / g], float32 for INT4 and uint8 (E8M0) for MXFP4.
        fc2_scale: [E, H, I / g].
        format: "int4" or "mxfp4".
        further: other arguments of the call: biases, parameters of the activation.
    """

    fc1_weight: torch.Tensor
    fc2_weight: torch.Tensor
    fc1_scale: torch.Tensor
    fc2_scale: torch.Tensor
    format: str
    further: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def group_size(self) -> int:
        """How many weights of a row share a scale."""
        return 2 * self.fc1_weight.shape[2] // self.fc1_scale.shape[2]

    def arguments(self) -> dict[str, Any]:
        """What `cutlass_fused_moe` takes by name of all this."""
        flag = {"int4": "use_packed_weights", "mxfp4": "use_w4_group_scaling"}[self.format]
        return {
            "fc1_expert_weights": self.fc1_weight,
            "fc2_expert_weights": self.fc2_weight,
            "quant_scales": [self.fc1_scale, self.fc2_scale],
            flag: True,
            **self.further,
        }


def load_int4_experts(
    tensors: Mapping[str, torch.Tensor],
    prefix: str,
    num_experts: int,
    *,
    layout: str,
    experts: Iterable[int] | None = None,
) -> ExpertWeights:
    """The gated experts of a layer of an AWQ, GPTQ or compressed-tensors checkpoint.

    Args:
        tensors: by name, such as `{prefix}.{expert}.gate_proj.qweight`. The projections are
            gate_proj, up_proj and down_proj, or Mixtral's w1, w3 and w2.
        prefix: what stands before the number of an expert, such as
            "model.layers.0.mlp.experts".
        num_experts: E, those of the checkpoint.
        layout: "awq", "gptq", "gptq_v2" or "compressed-tensors".
        experts: which to load, in this order; None is all: range(first, last) for a rank.

    Returns:
        The weights of these experts, on the device of the tensors.

    Raises:
        KeyError: a tensor is missing; the text names it.
        ValueError: another layout, or weights that INT4 cannot hold exactly; the text names
            the tensor.
    """
    if layout not in _TENSORS:
        raise ValueError(f"layout is {layout!r}; it must be one of {list(_TENSORS)}")
    chosen = list(range(num_experts) if experts is None else experts)
    if not chosen or not all(0 <= expert < num_experts for expert in chosen):
        raise ValueError(f"experts is {chosen}; it must be one or more of 0 to {num_experts - 1}")
    names = _projections(tensors, f"{prefix}.{chosen[0]}", _TENSORS[layout][0][0])
    parts: list[list[torch.Tensor]] = [[], [], [], []]
    for expert in chosen:
        gate, up, down = (
            _matrix(tensors, f"{prefix}.{expert}.{projection}", layout) for projection in names
        )
        if gate[1].shape != up[1].shape:
            raise ValueError(
                f"{prefix}.{expert}: the scales of {names[0]} are {list(gate[1].shape)}, those of "
                f"{names[1]} {list(up[1].shape)}; they must be the same"
            )
        found = (torch.cat([up[0], gate[0]]), down[0], torch.cat([up[1], gate[1]]), down[1])
        for part, tensor in zip(parts, found, strict=True):
            part.append(tensor)
    fc1, fc2, fc1_scale, fc2_scale = (torch.stack(part) for part in parts)
    # One group size for both: the larger groups become several with the same scale.
    depths = 2 * fc1.shape[2], 2 * fc2.shape[2]
    group = min(depths[0] // fc1_scale.shape[2], depths[1] // fc2_scale.shape[2])
    fc1_scale, fc2_scale = (
        regroup(fc1_scale, depths[0], group),
        regroup(fc2_scale, depths[1], group),
    )
    return ExpertWeights(fc1, fc2, fc1_scale, fc2_scale, "int4")


def load_gpt_oss_experts(
    tensors: Mapping[str, torch.Tensor],
    prefix: str,
    *,
    experts: slice | None = None,
    bias_dtype: torch.dtype = torch.bfloat16,
) -> ExpertWeights:
    """The experts of a layer of a gpt-oss checkpoint: MXFP4, biases and SwigluBias.

    Args:
        tensors: by name: `{prefix}.gate_up_proj_blocks`, `..._scales`, `..._bias`, and
            down_proj's.
        prefix: such as "model.layers.0.mlp.experts".
        experts: which to load; None is all, slice(first, last) those of a rank.
        bias_dtype: of the biases, the output_dtype of the call.

    Returns:
        The weights on the device of the tensors; `arguments()` has the activation's
        parameters, too.

    Raises:
        KeyError: a tensor is missing; the text names it.
        ValueError: another shape or dtype.
    """
    which = slice(None) if experts is None else experts

    def part(name: str) -> torch.Tensor:
        return _find(tensors, f"{prefix}.{name}")[which]

    fc1, fc1_scale = mxfp4_from_gpt_oss(
        part("gate_up_proj_blocks"), part("gate_up_proj_scales"), gated=True
    )
    fc2, fc2_scale = mxfp4_from_gpt_oss(
        part("down_proj_blocks"), part("down_proj_scales"), gated=False
    )
    further: dict[str, Any] = {
        "fc1_expert_biases": up_gate_from_interleaved(part("gate_up_proj_bias")).to(bias_dtype),
        "fc2_expert_biases": part("down_proj_bias").to(bias_dtype).contiguous(),
        "activation_type": ActivationType.SwigluBias,
    }
    for name, value in _GPT_OSS_SWIGLU.items():
        further[name] = torch.full((fc1.shape[0],), value, dtype=torch.float32, device=fc1.device)
    return ExpertWeights(fc1, fc2, fc1_scale, fc2_scale, "mxfp4", further)


def _find(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in tensors:
        raise KeyError(f"the checkpoint has no tensor {name!r}; is the prefix right?")
    return tensors[name]


def _projections(
    tensors: Mapping[str, torch.Tensor], expert: str, tensor: str
) -> tuple[str, str, str]:
    for names in _PROJECTIONS:
        if f"{expert}.{names[0]}.{tensor}" in tensors:
            return names
    tried = " nor ".join(f"{expert}.{names[0]}.{tensor}" for names in _PROJECTIONS)
    raise KeyError(f"the checkpoint has neither {tried}; are the prefix and the layout right?")


def _matrix(
    tensors: Mapping[str, torch.Tensor], name: str, layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    required, optional = _TENSORS[layout]
    found = {part: _find(tensors, f"{name}.{part}") for part in required}
    found |= {part: tensors[f"{name}.{part}"] for part in optional if f"{name}.{part}" in tensors}
    try:
        if layout == "awq":
            return int4_from_awq(**found)
        if layout == "compressed-tensors":
            return int4_from_compressed_tensors(**found)
        return int4_from_gptq(**found, v2=layout == "gptq_v2")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
