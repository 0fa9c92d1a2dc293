# SPDX-License-Identifier: Apache-2.0
"""From the layouts of checkpoints to fc1 [E, 2I, H] with rows [up; gate] and fc2 [E, H, I]."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fused_moe.quantization import up_gate_from_gate_up


def fc1_from_gate_up(gate_up: torch.Tensor, *, transposed: bool, interleaved: bool) -> torch.Tensor:
    """Fused gate and up weights as fc1's rows.

    Args:
        gate_up: [E, 2I, H]; [E, H, 2I] if `transposed`.
        transposed: whether the product is x @ W rather than x @ W.T.
        interleaved: whether gate and up alternate along 2I (gate, up, gate, up) rather than
            all of the gate standing before all of up.

    Returns:
        [E, 2I, H], rows [up; gate], a new contiguous tensor.
    """
    if gate_up.ndim != 3:
        raise ValueError(
            f"gate_up has the shape {list(gate_up.shape)}; it must have three dimensions, "
            f"{'[experts, hidden, 2I]' if transposed else '[experts, 2I, hidden]'}"
        )
    return _up_gate(gate_up.transpose(1, 2) if transposed else gate_up, interleaved)


def fc1_bias_from_gate_up(gate_up_bias: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Fused gate and up biases [E, 2I] as fc1's, [up, gate]: a new contiguous tensor."""
    if gate_up_bias.ndim != 2:
        raise ValueError(
            f"gate_up_bias has the shape {list(gate_up_bias.shape)}; it must be [experts, 2I]"
        )
    return _up_gate(gate_up_bias, interleaved)


def _up_gate(rows: torch.Tensor, interleaved: bool) -> torch.Tensor:
    if not interleaved:
        return up_gate_from_gate_up(rows)
    if rows.shape[1] % 2:
        raise ValueError(
            f"gate_up has {rows.shape[1]} rows an expert; gate and up are an even number"
        )
    return torch.cat([rows[:, 1::2], rows[:, 0::2]], dim=1)


@torch.no_grad()
def stack_experts(
    w1: Sequence[torch.Tensor], w2: Sequence[torch.Tensor], w3: Sequence[torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of each expert alone as fc1 and fc2.

    Args:
        w1: the gate of each expert, [I, H]; without w3 its only first weight.
        w2: down of each expert, [H, I].
        w3: up of each expert, [I, H]; None for activations that are not gated.

    Returns:
        fc1 [E, 2I, H], rows [up; gate] ([E, I, H] without w3), and fc2 [E, H, I], both new.
    """
    lists = {"w1": w1, "w2": w2} | ({} if w3 is None else {"w3": w3})
    for name, weights in lists.items():
        if len(weights) != len(w1) or not weights:
            raise ValueError(
                f"{name} has {len(weights)} tensors; it must have one for each of the "
                f"{len(w1)} experts of w1"
            )
        like = w1[0].shape if name != "w2" else w1[0].shape[::-1]
        for expert, weight in enumerate(weights):
            if weight.ndim != 2 or weight.shape != like:
                raise ValueError(
                    f"{name}[{expert}] has the shape {list(weight.shape)}; it must be "
                    f"{list(like)}, as w1[0] {list(w1[0].shape)} is "
                    f"{'[hidden, intermediate]' if name == 'w2' else '[intermediate, hidden]'}"
                )
    if w3 is None:
        return torch.stack(list(w1)), torch.stack(list(w2))
    fc1 = w1[0].new_empty(len(w1), 2 * w1[0].shape[0], w1[0].shape[1])
    for expert, (gate, up) in enumerate(zip(w1, w3, strict=True)):
        torch.cat([up, gate], out=fc1[expert])
    return fc1, torch.stack(list(w2))
