# SPDX-License-Identifier: Apache-2.0
"""The weights of a layer's experts in one value, and how a rank's share is cut from them.

                 fc1 [E, 2I, H]                     fc2 [E, H, I]
    tp           rows, the same of both halves:     columns
                 [up_0 up_1 | gate_0 gate_1]
    ep           experts                            experts

What belongs to fc1's rows (bias, scales) is cut like them. A scale for each of fc2's rows, and
fc2's bias, is whole on every rank: `cutlass_fused_moe` adds that bias on tp_rank 0 only. Scales
of groups along fc2's columns are cut with the columns, and so no cut may fall into a group.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fused_moe.activation import ActivationType
from fused_moe.parallel.groups import ParallelGroups

if TYPE_CHECKING:
    from fused_moe.module.experts import Experts


@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """Experts as `cutlass_fused_moe` takes them, all of a layer's or one rank's share.

    Attributes:
        fc1: [E, 2I, H] with the rows [up; gate] if the activation is gated, else [E, I, H]; in
            4-bit formats [.., H / 2] bytes.
        fc2: [E, H, I]; in 4-bit formats [E, H, I / 2] bytes.
        quant_scales: () for 16-bit weights; [E, 2I or I] and [E, H] for 8-bit ones; for 4-bit
            ones in groups of g [E, 2I or I, H / g] and [E, H, I / g].
        fc1_biases, fc2_biases: [E, 2I or I] and [E, H], either alone or none.
        swiglu_alpha, swiglu_beta, swiglu_limit: [E] float32.
        activation_type: an ActivationType.
        use_packed_weights, use_w4_group_scaling: uint8 weights are INT4, or MXFP4.
    """

    fc1: torch.Tensor
    fc2: torch.Tensor
    quant_scales: Sequence[torch.Tensor] = ()
    fc1_biases: torch.Tensor | None = None
    fc2_biases: torch.Tensor | None = None
    swiglu_alpha: torch.Tensor | None = None
    swiglu_beta: torch.Tensor | None = None
    swiglu_limit: torch.Tensor | None = None
    activation_type: int = ActivationType.Swiglu
    use_packed_weights: bool = False
    use_w4_group_scaling: bool = False

    @classmethod
    def of(cls, experts: Experts) -> ExpertWeights:
        """The tensors of `FusedMoE(...).experts`, all experts or one rank's; copies nothing.

        With them and `layer.router` a FusedMoE runs in any form of this package:
        `scales, ids = layer.router(x)`.
        """
        return cls(
            fc1=experts.fc1_weight.detach(),
            fc2=experts.fc2_weight.detach(),
            quant_scales=[s for s in (experts.fc1_scale, experts.fc2_scale) if s is not None],
            fc1_biases=None if experts.fc1_bias is None else experts.fc1_bias.detach(),
            fc2_biases=None if experts.fc2_bias is None else experts.fc2_bias.detach(),
            swiglu_alpha=experts.swiglu_alpha,
            swiglu_beta=experts.swiglu_beta,
            swiglu_limit=experts.swiglu_limit,
            activation_type=experts.activation,
            **experts.format.call_arguments,
        )

    @property
    def num_experts(self) -> int:
        """Experts that this value holds: E, or E_l of a share."""
        return int(self.fc1.shape[0])

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.fc2.shape[1])

    @property
    def intermediate_size(self) -> int:
        """I, or the I of a share."""
        return int(self.fc2.shape[2]) * self._weights_a_number

    @property
    def gated(self) -> bool:
        """Whether fc1 has the rows [up; gate]."""
        return ActivationType(self.activation_type).is_gated

    @property
    def group_size(self) -> int:
        """Weights along a row that share a scale; 0 where the scales are not of groups."""
        if len(self.quant_scales) != 2 or self.quant_scales[1].ndim != 3:
            return 0
        return self.intermediate_size // int(self.quant_scales[1].shape[2])

    @property
    def multiple(self) -> int:
        """What I must be a multiple of, in every share: the operator's rule, and whole groups."""
        if self.fc1.is_floating_point():
            return 8
        return math.lcm(32, self.group_size) if self._weights_a_number == 2 else 16

    @property
    def _weights_a_number(self) -> int:
        return 2 if self.use_packed_weights or self.use_w4_group_scaling else 1

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """Every tensor by its name here, quant_scales as quant_scales[0] and [1]."""
        named: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        scales = named.pop("quant_scales") or ()
        named.update({f"quant_scales[{index}]": scale for index, scale in enumerate(scales)})
        return {
            name: value
            for name, value in named.items()
            if value is None or isinstance(value, torch.Tensor)
        }

    def arguments(self) -> dict[str, Any]:
        """The arguments of `cutlass_fused_moe` that these weights are."""
        return {
            "fc1_expert_weights": self.fc1,
            "fc2_expert_weights": self.fc2,
            "quant_scales": list(self.quant_scales),
            "fc1_expert_biases": self.fc1_biases,
            "fc2_expert_biases": self.fc2_biases,
            "swiglu_alpha": self.swiglu_alpha,
            "swiglu_beta": self.swiglu_beta,
            "swiglu_limit": self.swiglu_limit,
            "activation_type": self.activation_type,
            "use_packed_weights": self.use_packed_weights,
            "use_w4_group_scaling": self.use_w4_group_scaling,
        }

    def shard(
        self, groups: ParallelGroups, *, device: torch.device | str | None = None
    ) -> ExpertWeights:
        """This rank's share of all experts, in memory of its own.

        The whole may lie anywhere, in a memory-mapped checkpoint for example: only the share is
        read.

        Args:
            groups: whose ep_rank chooses the experts, and tp_rank the part of I.
            device: where the share goes; None is where the whole lies.

        Raises:
            ValueError: E is no multiple of ep_size, or I cannot be cut into tp_size shares.
        """
        return shard_experts(self, **groups.ranks(), device=device)

    def _map(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> ExpertWeights:
        """The same with every tensor changed, given the name it has in `tensors`."""
        changed = {
            name: None if tensor is None else change(name, tensor)
            for name, tensor in self.tensors().items()
        }
        scales = tuple(
            changed.pop(name) for name in list(changed) if name.startswith("quant_scales[")
        )
        return dataclasses.replace(self, quant_scales=scales, **changed)  # type: ignore[arg-type]


def shard_experts(
    experts: ExpertWeights,
    *,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    device: torch.device | str | None = None,
) -> ExpertWeights:
    """`ExpertWeights.shard` by numbers: what rank (tp_rank, ep_rank) holds.

    Needs no process group, so that a converter can write every rank's share.

    Raises:
        ValueError: as `ExpertWeights.shard`, and ranks outside of their sizes.
    """
    for kind, size, rank in (("tp", tp_size, tp_rank), ("ep", ep_size, ep_rank)):
        if not 0 <= rank < size:
            raise ValueError(f"{kind}_rank is {rank}; it must be from 0 to {kind}_size - 1")
    _check(experts)
    if experts.num_experts % ep_size:
        raise ValueError(
            f"there are {experts.num_experts} experts; their number must be a multiple of ep_size "
            f"= {ep_size}, because every rank holds as many: take another ep_size, or add experts "
            "of zeros that no id names"
        )
    share, rest = divmod(experts.intermediate_size, tp_size)
    if tp_size > 1 and (rest or share % experts.multiple):
        groups = f" and whole groups of {experts.group_size}" if experts.group_size else ""
        raise ValueError(
            f"the intermediate size is {experts.intermediate_size}, which tp_size = {tp_size} "
            f"cuts into shares of {experts.intermediate_size / tp_size:g}; with weights of "
            f"{experts.fc1.dtype} a share must be a multiple of {experts.multiple}{groups}: take "
            "another tp_size, or pad with pad_intermediate(experts, "
            f"{tp_size * experts.multiple}) first"
        )
    local = experts.num_experts // ep_size

    def cut(name: str, tensor: torch.Tensor) -> torch.Tensor:
        piece = tensor.narrow(0, ep_rank * local, local)
        if tp_size > 1 and (name.startswith("fc1") or name == "quant_scales[0]"):
            halves = piece.chunk(2, dim=1) if experts.gated else (piece,)
            parts = [half.narrow(1, tp_rank * share, share) for half in halves]
        elif tp_size > 1 and piece.ndim == 3:  # fc2 or scales of groups along its columns
            columns = piece.shape[2] // tp_size
            parts = [piece.narrow(2, tp_rank * columns, columns)]
        else:
            parts = [piece]
        return _copy(parts, tensor.device if device is None else torch.device(device))

    return experts._map(cut)


def pad_intermediate(experts: ExpertWeights, multiple: int) -> ExpertWeights:
    """The same layer with I padded to a multiple: the added rows and columns are zeros.

    Exact: an added value of the intermediate is multiplied by zeros of fc2. It costs the share
    of time that it adds to I. For example gpt-oss, I = 2880 in MXFP4 groups of 32, on four ranks:
    `pad_intermediate(experts, 4 * 32)`.

    Raises:
        ValueError: `multiple` is not one of the format's own.
    """
    _check(experts)
    if multiple < 1 or multiple % experts.multiple:
        raise ValueError(
            f"multiple is {multiple}; with weights of {experts.fc1.dtype} it must be a multiple "
            f"of {experts.multiple}"
        )
    inter = experts.intermediate_size
    added = -inter % multiple
    if not added:
        return experts
    # What a weight of zero looks like: uint8 holds q + 128, a byte of INT4 two times q + 8.
    zero = 0
    if experts.fc1.dtype == torch.uint8 and not experts.use_w4_group_scaling:
        zero = 0x88 if experts.use_packed_weights else 128

    def pad(name: str, tensor: torch.Tensor) -> torch.Tensor:
        value = zero if name in ("fc1", "fc2") else 0
        if name.startswith("fc1") or name == "quant_scales[0]":
            halves = tensor.chunk(2, dim=1) if experts.gated else (tensor,)
            extra = tensor.new_full((tensor.shape[0], added, *tensor.shape[2:]), value)
            return torch.cat([part for half in halves for part in (half, extra)], dim=1)
        if tensor.ndim == 3:
            extra = tensor.new_full((*tensor.shape[:2], tensor.shape[2] * added // inter), value)
            return torch.cat([tensor, extra], dim=2)
        return tensor

    return experts._map(pad)


def _copy(parts: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The parts one after another along dimension 1, in new memory on the device."""
    shape = list(parts[0].shape)
    if len(parts) > 1:
        shape[1] = sum(part.shape[1] for part in parts)
    whole = torch.empty(shape, dtype=parts[0].dtype, device=device)
    begin = 0
    for part in parts:
        target = whole if len(parts) == 1 else whole.narrow(1, begin, part.shape[1])
        target.copy_(part.detach())
        begin += part.shape[1] if part.ndim > 1 else 0
    return whole


def _check(experts: ExpertWeights) -> None:
    """Raises ValueError, naming the tensor, unless all shapes fit each other."""
    if experts.fc1.ndim != 3 or experts.fc2.ndim != 3:
        raise ValueError(
            f"fc1 and fc2 have the shapes {list(experts.fc1.shape)} and {list(experts.fc2.shape)}; "
            "they must be [experts, rows, hidden] and [experts, hidden, intermediate]"
        )
    count, hidden, inter = experts.num_experts, experts.hidden_size, experts.intermediate_size
    rows = inter * (2 if experts.gated else 1)
    packed = experts._weights_a_number
    expected: dict[str, list[int]] = {
        "fc1": [count, rows, hidden // packed],
        "fc2": [count, hidden, inter // packed],
        "fc1_biases": [count, rows],
        "fc2_biases": [count, hidden],
        "swiglu_alpha": [count],
        "swiglu_beta": [count],
        "swiglu_limit": [count],
        "quant_scales[0]": [count, rows],
        "quant_scales[1]": [count, hidden],
    }
    if group := experts.group_size:
        expected["quant_scales[0]"] = [count, rows, hidden // group]
        expected["quant_scales[1]"] = [count, hidden, inter // group]
    if len(experts.quant_scales) not in (0, 2):
        raise ValueError(
            f"quant_scales has {len(experts.quant_scales)} tensors; it must have none or 2, "
            "fc1's and fc2's"
        )
    for name, tensor in experts.tensors().items():
        if tensor is not None and list(tensor.shape) != expected[name]:
            raise ValueError(
                f"{name} has the shape {list(tensor.shape)}; it must be {expected[name]}, with "
                f"{count} experts, hidden size {hidden}, intermediate size {inter} and activation "
                f"{ActivationType(experts.activation_type).name}"
            )
