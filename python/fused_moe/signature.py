# SPDX-License-Identifier: Apache-2.0
"""What the checks need to know of a call: everything but the contents and the addresses.

A call's signature is a plain tuple that can be hashed, so that the checks of a call run once
for each combination of shapes, dtypes, devices and flags, and a lookup replaces them after.
"""

from __future__ import annotations

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


def from_plain(key: tuple[Any, ...]) -> Signature:
    """Gives names to a signature built from plain tuples, which are quicker to make."""

    def named(name: str, field: Any) -> Any:
        if name == "quant_scales":
            return tuple(None if meta is None else Meta._make(meta) for meta in field)
        return Meta._make(field) if type(field) is tuple and len(field) == 4 else field

    return Signature._make(map(named, Signature._fields, key))


def describe(tensor: torch.Tensor | None) -> tuple[Any, ...] | None:
    """A tensor's `Meta` as a plain tuple."""
    if tensor is None:
        return None
    return (tensor.shape, tensor.dtype, tensor.device, tensor.is_contiguous())


def reject_non_tensors(arguments: dict[str, Any], required: frozenset[str]) -> None:
    """Raises TypeError or ValueError, naming the argument, for what `describe` failed on.

    Args:
        arguments: the tensor arguments by name; sequences of tensors are looked into.
        required: the names that cannot be None.
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
        if value is None and name not in required and "[" not in name:
            continue
        if not isinstance(value, torch.Tensor):
            kind = "None" if value is None else f"a {type(value).__name__}"
            raise TypeError(f"{name} is {kind}; it must be a torch.Tensor")
        if value.layout != torch.strided:
            raise ValueError(
                f"{name} has the layout {value.layout}; it must be strided: use {name}.to_dense()"
            )
