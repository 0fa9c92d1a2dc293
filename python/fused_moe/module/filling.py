# SPDX-License-Identifier: Apache-2.0
"""Putting a checkpoint's tensors into a module that was built on the meta device."""

from __future__ import annotations

import torch

from fused_moe.module.tensors import owned


def fill(module: torch.nn.Module, given: dict[str, tuple[str, torch.Tensor | None]]) -> None:
    """Puts tensors into a module in place of its own, which are on the meta device.

    Args:
        module: whose whole state is `given`.
        given: by its name in the module's state, the name that the caller knows it by and the
            tensor; None where the module has none.

    Raises:
        ValueError: a shape or a dtype that is not the module's, or tensors of two devices.
    """
    wanted = module.state_dict()
    tensors = {state: (name, t) for state, (name, t) in given.items() if t is not None}
    device = next(iter(tensors.values()))[1].device
    filled = {}
    for state, (name, tensor) in tensors.items():
        own = wanted[state]
        if tensor.shape != own.shape:
            raise ValueError(
                f"{name} has the shape {list(tensor.shape)}; it must be {list(own.shape)}"
            )
        if tensor.device != device:
            raise ValueError(
                f"{name} is on {tensor.device}; it must be on {device}, where the others are"
            )
        if tensor.dtype != own.dtype and not (
            tensor.is_floating_point() and own.is_floating_point()
        ):
            raise ValueError(f"{name} is {tensor.dtype}; it must be {own.dtype}")
        filled[state] = owned(tensor.to(own.dtype))
    module.load_state_dict(filled, strict=True, assign=True)
