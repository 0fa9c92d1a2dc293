# SPDX-License-Identifier: Apache-2.0
"""What an experts module of transformers computes, and its weights in our order of rows.

transformers keeps the experts of a layer as two stacked parameters: `gate_up_proj`, [E, 2I, H]
with the gate's rows first (`up_proj`, [E, I, H], where there is no gate), and `down_proj`,
[E, H, I]. Some classes transpose both or let gate and up alternate, as gpt-oss does; attributes
that `use_experts_implementation` sets say which. Everything here works in place, a few experts at
a time, and keeps the parameter's shape: only the order of its numbers changes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch

from fused_moe.activation import ActivationType
from fused_moe.reference import reference_activation

# Bytes of weights rearranged at once: what the conversion needs beside the weights.
_BLOCK = 1 << 26
# Relative error of an activation that is the same formula in float32; another formula is off by
# 2e-4 or more in some row (gelu by erf against tanh, the nearest two, on the values probed).
_SAME_FORMULA = 5e-6


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a class stores its experts.

    Attributes:
        gated: the first weight holds gate and up.
        interleaved: gate and up alternate, the gate first; otherwise all of the gate comes first.
        transposed: weights are [E, K, N] instead of [E, N, K].
    """

    gated: bool
    interleaved: bool
    transposed: bool


@dataclasses.dataclass(frozen=True)
class Activation:
    """What lies between the two products; None where the activation has no such parameter."""

    kind: ActivationType
    alpha: float | None = None
    beta: float | None = None
    limit: float | None = None


def first_name(module: torch.nn.Module) -> str:
    """The name of the parameter that holds the first product's weights."""
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def _attribute(module: torch.nn.Module, *names: str) -> float | None:
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int | float):
            return float(value)
    return None


def _candidates(module: torch.nn.Module) -> Iterator[Activation]:
    """The activations that a gated module may have, by the parameters it holds."""
    for kind in (ActivationType.Swiglu, ActivationType.Geglu, ActivationType.GegluTanh):
        yield Activation(kind)
    limit = _attribute(module, "limit", "swiglu_limit")
    alpha = _attribute(module, "alpha", "swiglu_alpha")
    for beta in (1.0, 0.0):
        yield Activation(
            ActivationType.SwigluBias,
            1.0 if alpha is None else alpha,
            beta,
            math.inf if limit is None else limit,
        )
    if limit is not None:
        yield Activation(ActivationType.SwigluStep, limit=limit)


@torch.no_grad()
def recognize(module: torch.nn.Module) -> tuple[Activation, Layout]:
    """Finds out what `module` computes, by asking its own code.

    A class may replace the step between its products by any code (`_apply_gate`, `act_fn`). So
    that code runs on a few numbers here, and the result is compared with ours: what is not one
    of our activations cannot be taken for one.

    Raises:
        NotImplementedError: it is none of them.
    """
    transposed = bool(getattr(module, "is_transposed", False))
    device = getattr(module, first_name(module)).device
    device = torch.device("cpu") if device.type == "meta" else device  # not loaded yet
    draw = torch.Generator().manual_seed(0)
    # Named: transformers has "meta" and its own dtype as defaults while it builds a model.
    named: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    x = torch.rand(64, 64, generator=draw, **named) * 2 - 1
    # Small numbers tell curves apart, large ones show limits: each row reaches further.
    furthest = max(1024.0, 3 * (_attribute(module, "limit", "swiglu_limit") or 0.0))
    x = x * torch.logspace(2, math.log2(furthest), 64, base=2, **named).unsqueeze(1)
    if first_name(module) == "up_proj":
        theirs = module.act_fn(x.to(device)).cpu()
        for kind in ActivationType:
            if not kind.is_gated and _same(theirs, reference_activation(x, kind)):
                return Activation(kind), Layout(False, False, transposed)
        raise NotImplementedError(_unknown(module))
    theirs = module._apply_gate(x.to(device)).cpu()
    # Older versions do not say which order a class has.
    concatenated = getattr(module, "is_concatenated", None)
    for interleaved in (False, True) if concatenated is None else (not concatenated,):
        layout = Layout(True, interleaved, transposed)
        ordered = up_first(x, layout)
        for a in _candidates(module):
            ours = reference_activation(ordered, a.kind, a.alpha, a.beta, a.limit)
            if _same(theirs, ours):
                return a, layout
    raise NotImplementedError(_unknown(module))


def _same(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    """Whether all rows are equal but for rounding; each by itself, for their sizes differ."""
    if theirs.shape != ours.shape:
        return False
    difference = torch.linalg.vector_norm(theirs.float() - ours, dim=1)
    return bool((difference <= _SAME_FORMULA * torch.linalg.vector_norm(ours, dim=1)).all())


def _unknown(module: torch.nn.Module) -> str:
    name = type(module).__name__
    known = ", ".join(kind.name for kind in ActivationType)
    return (
        f"{name} computes an activation ({getattr(module, 'act_fn', 'its own _apply_gate')}) that "
        f"is none of ours ({known}); load the model with another experts_implementation"
    )


def up_first(block: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Gate and up along dimension 1, in the module's order, as [up; gate]: a copy."""
    if layout.interleaved:
        return torch.cat([block[:, 1::2], block[:, 0::2]], dim=1)
    gate, up = block.chunk(2, dim=1)
    return torch.cat([up, gate], dim=1)


def _gate_first(rows: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The inverse of `up_first`: a copy."""
    up, gate = rows.chunk(2, dim=1)
    if layout.interleaved:
        return torch.stack([gate, up], dim=2).flatten(1, 2)
    return torch.cat([gate, up], dim=1)


@torch.no_grad()
def _rewrite(tensor: torch.Tensor, *, gated: bool, layout: Layout, back: bool) -> None:
    """Puts a weight, or a bias [E, N], into our order, or `back` into the module's, in place.

    Of a distributed tensor this rank's part, which is all that a forward sees.
    """
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    transposed = layout.transposed and tensor.ndim == 3
    if not (gated or transposed):
        return
    size = max(1, tensor[0].numel() * tensor.element_size())
    for block in tensor.detach().split(max(1, _BLOCK // size)):
        new = block
        if back:
            if transposed:
                new = new.reshape(block.shape[0], block.shape[2], block.shape[1])
            new = _gate_first(new, layout) if gated else new
            new = new.transpose(1, 2) if transposed else new
        else:
            new = new.transpose(1, 2) if transposed else new
            new = up_first(new, layout) if gated else new
        # Where `new` is still a view of the block, it is a transposed one: contiguous() copies.
        block.view(-1).copy_(new.contiguous().view(-1))


def rewrite(module: torch.nn.Module, layout: Layout, *, back: bool) -> None:
    """Puts all tensors of `module` into our order, or `back` into the module's own."""
    first = first_name(module)
    _rewrite(getattr(module, first), gated=layout.gated, layout=layout, back=back)
    _rewrite(module.down_proj, gated=False, layout=layout, back=back)
    rewrite_bias(module, layout, back=back)


def rewrite_bias(module: torch.nn.Module, layout: Layout, *, back: bool) -> None:
    """Puts the first product's bias alone, if there is one, into our order, or `back`."""
    if getattr(module, "has_bias", False):
        bias = getattr(module, f"{first_name(module)}_bias")
        _rewrite(bias, gated=layout.gated, layout=layout, back=back)


def weight(module: torch.nn.Module, name: str, layout: Layout) -> torch.Tensor:
    """fc1 [E, 2I or I, H] or fc2 [E, H, I]: a view of a parameter that is in our order."""
    tensor: torch.Tensor = getattr(module, name)
    if layout.transposed:
        experts, depth, rows = tensor.shape
        tensor = tensor.view(experts, rows, depth)
    return tensor


def check(module: torch.nn.Module) -> None:
    """Refuses weights that the conversion in place cannot serve.

    Raises:
        NotImplementedError: the text says what, and what to do instead.
    """
    name = type(module).__name__
    tensors: dict[str, Any] = dict(module.named_parameters(recurse=False))
    for parameter in (first_name(module), "down_proj"):
        tensor = tensors.get(parameter)
        if tensor is None or tensor.ndim != 3:
            raise NotImplementedError(
                f"{name} has no parameter {parameter} of three dimensions: its experts are not "
                "stacked in the way of transformers' experts interface"
            )
        if not tensor.is_floating_point() or tensor.element_size() == 1:
            raise NotImplementedError(
                f"{name}.{parameter} is {tensor.dtype}: quantized already, in a format that is "
                "not ours; load the unquantized model, and let fused_moe_int8 quantize it"
            )
        if tensor.device.type == "cuda" and tensor.dtype == torch.float32:
            raise NotImplementedError(
                f"{name}.{parameter} is float32 on a GPU, where the layer takes 16-bit types: "
                "load the model with dtype=torch.bfloat16 or torch.float16"
            )
        if hasattr(tensor, "device_mesh"):
            raise NotImplementedError(
                f"{name}.{parameter} is a distributed tensor here; leave its conversion to the "
                "model's first forward, which sees this rank's part of it"
            )
        if tensor.device.type == "meta":
            raise NotImplementedError(
                f"{name}.{parameter} is offloaded; the layer needs its experts on the device: "
                "load the model with a device_map that offloads no experts"
            )


def check_class(module: torch.nn.Module) -> None:
    """Refuses a module whose computation or placement the layer has nothing for.

    Raises:
        NotImplementedError: the text says what, and what to do instead.
    """
    name = type(module).__name__
    if getattr(module, "has_post_expert_norm", False):
        raise NotImplementedError(
            f"{name} normalizes each expert's output, which the fused layer has no step for; "
            "load the model with another experts_implementation"
        )
    hook = getattr(module, "_hf_hook", None)
    if any(getattr(h, "offload", False) for h in getattr(hook, "hooks", [hook])):
        raise NotImplementedError(
            f"{name}'s weights are offloaded and copied anew for each call, which would undo their "
            "conversion; load the model with a device_map that offloads no experts"
        )
