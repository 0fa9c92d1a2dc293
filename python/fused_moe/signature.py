# SPDX-License-Identifier: Apache-2.0
"""What the checks need to know of a call: everything but the contents and the addresses.

The checks of a call run once for each combination of shapes, dtypes, devices and flags; a
lookup replaces them after.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class Meta(NamedTuple):
    """One tensor argument."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    contiguous: bool

    @property
    def nbytes(self) -> int:
        """The bytes between the first and past the last element, if contiguous."""
        return self.shape.numel() * self.dtype.itemsize


class Signature(NamedTuple):
    """The arguments of `cutlass_fused_moe`; those that change no result are not here."""

    input: Meta
    token_selected_experts: Meta
    token_final_scales: Meta | None
    fc1_expert_weights: Meta
    fc2_expert_weights: Meta
    quant_scales: tuple[Meta, ...]
    fc1_expert_biases: Meta | None
    fc2_expert_biases: Meta | None
    input_sf: bool
    swiglu_alpha: Meta | None
    swiglu_beta: Meta | None
    swiglu_limit: Meta | None
    output: Meta | None
    workspace_buffer: Meta | None
    output_dtype: torch.dtype
    tp_size: int
    tp_rank: int
    ep_size: int
    ep_rank: int
    cluster_size: int
    cluster_rank: int
    use_deepseek_fp8_block_scale: bool
    use_w4_group_scaling: bool
    use_mxfp8_act_scaling: bool
    min_latency_mode: bool
    use_packed_weights: bool
    tune_max_num_tokens: int
    activation_type: int
    backend: str | None

    def tensors(self) -> dict[str, Meta]:
        """The tensors that are given, by the names of their arguments."""
        named = {
            "input": self.input,
            "token_selected_experts": self.token_selected_experts,
            "token_final_scales": self.token_final_scales,
            "fc1_expert_weights": self.fc1_expert_weights,
            "fc2_expert_weights": self.fc2_expert_weights,
            "fc1_expert_biases": self.fc1_expert_biases,
            "fc2_expert_biases": self.fc2_expert_biases,
            "swiglu_alpha": self.swiglu_alpha,
            "swiglu_beta": self.swiglu_beta,
            "swiglu_limit": self.swiglu_limit,
            "output": self.output,
            "workspace_buffer": self.workspace_buffer,
        }
        named.update({f"quant_scales[{i}]": meta for i, meta in enumerate(self.quant_scales)})
        return {name: meta for name, meta in named.items() if meta is not None}


_REQUIRED = frozenset(
    {"input", "token_selected_experts", "fc1_expert_weights", "fc2_expert_weights"}
)
_OPTIONAL = frozenset(
    {
        "token_final_scales",
        "fc1_expert_biases",
        "fc2_expert_biases",
        "swiglu_alpha",
        "swiglu_beta",
        "swiglu_limit",
        "output",
        "workspace_buffer",
    }
)


def sign(arguments: Mapping[str, Any]) -> Signature:
    """Returns the signature of a call.

    Args:
        arguments: those of `cutlass_fused_moe` by name; other names are ignored.

    Raises:
        TypeError, ValueError: an argument is not the kind of tensor, or list, that it must be.
    """
    tensors = _REQUIRED | _OPTIONAL
    _reject_non_tensors(
        {name: arguments[name] for name in arguments if name in tensors | {"quant_scales"}}
    )
    fields = {name: arguments[name] for name in Signature._fields}
    for name in tensors:
        if fields[name] is not None:
            fields[name] = Meta(*describe(fields[name]))
    scales = arguments["quant_scales"]
    fields["quant_scales"] = tuple([Meta(*describe(scale)) for scale in scales]) if scales else ()
    fields["input_sf"] = arguments["input_sf"] is not None
    return Signature(**fields)


def describe(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype, torch.device, bool]:
    """A tensor's `Meta` as a plain tuple, which is quicker to make."""
    return (tensor.shape, tensor.dtype, tensor.device, tensor.is_contiguous())


def _reject_non_tensors(arguments: dict[str, Any]) -> None:
    """Raises TypeError or ValueError, naming the argument, for what `describe` would fail on.

    Args:
        arguments: the tensor arguments by name; sequences of tensors are looked into.
    """
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, (list, tuple)):
            flat.update({f"{name}[{i}]": item for i, item in enumerate(value)})
        else:
            flat[name] = value
    for name, value in flat.items():
        if name == "quant_scales" and value is not None:
            raise TypeError(
                f"quant_scales is a {type(value).__name__}; it must be a list of tensors, or None"
            )
        if value is None and name not in _REQUIRED and "[" not in name:
            continue
        if not isinstance(value, torch.Tensor):
            kind = "None" if value is None else f"a {type(value).__name__}"
            raise TypeError(f"{name} is {kind}; it must be a torch.Tensor")
        if value.layout != torch.strided:
            raise ValueError(
                f"{name} has the layout {value.layout}; it must be strided: use {name}.to_dense()"
            )
