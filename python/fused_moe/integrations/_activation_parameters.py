# SPDX-License-Identifier: Apache-2.0
"""An activation's parameters, one number for a whole layer, as the tensors that our function takes.

vLLM and SGLang load models into memory whose contents they give up while a server sleeps, and
bring back parameters and buffers alone. So these tensors are made when a layer first runs, outside
of that memory, and kept: every layer with the same number shares one, whose address does not change
when weights are loaded again.
"""

from __future__ import annotations

import torch

from fused_moe.cuda import capturing

_made: dict[tuple[float, int, torch.device], torch.Tensor] = {}


def for_each_expert(value: float | None, experts: int, device: torch.device) -> torch.Tensor | None:
    """`value` as float32 [experts]; None where it is None."""
    if value is None:
        return None
    key = (float(value), experts, device)
    made = _made.get(key)
    if made is None:
        made = torch.full((experts,), float(value), dtype=torch.float32, device=device)
        # Inside a CUDA graph it exists when that graph runs, for that graph; under a tracer it
        # holds no numbers.
        if not capturing(device) and type(made) is torch.Tensor:
            _made[key] = made
    return made
