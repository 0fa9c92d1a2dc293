# SPDX-License-Identifier: Apache-2.0
"""Who computes what: the two process groups of a tensor x expert parallel layer."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclasses.dataclass(frozen=True)
class ParallelGroups:
    """The process groups this rank shares a layer with; None for a kind means a group of one.

    The ranks of a layer form a tp x ep mesh. `tp` joins those that hold parts of the same
    experts, `ep` those that hold the same part of different experts: with both, this rank is in
    one group of each kind. torch.distributed.group.WORLD is a group like others.

    Attributes:
        tp: holds a share of I each; rank tp_rank of it holds share tp_rank.
        ep: rank ep_rank of it holds experts [ep_rank * E_l, (ep_rank + 1) * E_l).
        layer: all tp_size * ep_size ranks, if there is such a group: lets a sum over both kinds
            be one exchange instead of two. Only its members matter, not their order.

    Make one value and use it for every layer: it keeps the stream that `chunks` need.

    Raises:
        ValueError: this process is not in a group it was given, or the groups are no mesh.
    """

    tp: dist.ProcessGroup | None = None
    ep: dist.ProcessGroup | None = None
    layer: dist.ProcessGroup | None = None
    _streams: dict[torch.device, torch.cuda.Stream] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for name in ("tp", "ep", "layer"):
            group = getattr(self, name)
            if group == dist.GroupMember.NON_GROUP_MEMBER:
                raise ValueError(
                    f"this process, rank {dist.get_rank()}, is not in the {name} group; it must "
                    "be: a layer runs on the ranks of its groups"
                )
        if self.layer is not None and self.layer.size() != self.tp_size * self.ep_size:
            raise ValueError(
                f"the layer group has {self.layer.size()} ranks; it must have tp_size * ep_size "
                f"= {self.tp_size} * {self.ep_size}"
            )
        ranks = {
            name: set(dist.get_process_group_ranks(group))
            for name, group in (("tp", self.tp), ("ep", self.ep), ("layer", self.layer))
            if group is not None
        }
        if len(both := ranks.get("tp", set()) & ranks.get("ep", set())) > 1:
            raise ValueError(
                f"the tp and the ep group share the ranks {sorted(both)}; they must share this one "
                f"alone, {dist.get_rank()}: two ranks either hold parts of the same experts, or "
                "hold other experts"
            )
        inside = ranks.get("tp", set()) | ranks.get("ep", set())
        if self.layer is not None and not inside <= ranks["layer"]:
            raise ValueError(
                f"the layer group has the ranks {sorted(ranks['layer'])}; it must have those of tp "
                f"and ep, {sorted(inside)}, among them"
            )

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh, *, tp: str = "tp", ep: str = "ep") -> ParallelGroups:
        """The groups of a DeviceMesh with named dimensions, as init_device_mesh makes it.

        The groups get the timeout of the default group, which is init_process_group's:
        init_device_mesh leaves them PyTorch's own of 10 minutes (NCCL) or 30, whatever that was.

        Args:
            mesh: its dimensions may be in any order, and there may be others (data parallel).
            tp, ep: the names of the two; one that the mesh does not have counts as size 1.

        Raises:
            ValueError: the mesh has neither.
        """
        names = mesh.mesh_dim_names or ()
        if tp not in names and ep not in names:
            raise ValueError(
                f"mesh has the dimensions {list(names)}; it must have {tp!r}, {ep!r} or both: "
                "name them with mesh_dim_names, or pass their names as tp= and ep="
            )
        tp_group = mesh.get_group(tp) if tp in names else None
        ep_group = mesh.get_group(ep) if ep in names else None
        for group in (tp_group, ep_group):
            if group is not None:
                _take_timeout_of_default_group(group, torch.device(mesh.device_type))
        layer = None
        if tp_group is not None and ep_group is not None:
            ranks = tp_group.size() * ep_group.size()
            layer = dist.group.WORLD if ranks == dist.get_world_size() else None
        return cls(tp_group, ep_group, layer)

    @property
    def tp_size(self) -> int:
        """Ranks that share each expert."""
        return 1 if self.tp is None else self.tp.size()

    @property
    def tp_rank(self) -> int:
        """Which share of I this rank holds."""
        return 0 if self.tp is None else self.tp.rank()

    @property
    def ep_size(self) -> int:
        """Ranks that the experts are spread over."""
        return 1 if self.ep is None else self.ep.size()

    @property
    def ep_rank(self) -> int:
        """Which experts this rank holds."""
        return 0 if self.ep is None else self.ep.rank()

    def ranks(self) -> dict[str, Any]:
        """The arguments of `cutlass_fused_moe` of these names."""
        return {
            "tp_size": self.tp_size,
            "tp_rank": self.tp_rank,
            "ep_size": self.ep_size,
            "ep_rank": self.ep_rank,
        }

    def exchange_stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream for exchanges beside computation, one for each CUDA device.

        Kept, because PyTorch's allocator keeps memory by stream. Not shared with other groups,
        whose exchanges other ranks may enqueue in another order: each would wait for the other.
        Its priority is high: an exchange's few blocks would else queue behind a whole grid.
        """
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device, priority=-1)
        return self._streams[device]


def _take_timeout_of_default_group(group: dist.ProcessGroup, device: torch.device) -> None:
    world = dist.group.WORLD
    assert world is not None, "a mesh has initialized it"
    # NCCL's and gloo's have options; what PyTorch cannot tell of another backend stays as it is.
    options = getattr(world._get_backend(device), "options", None)
    if options is not None and group != world:
        dist.distributed_c10d._set_pg_timeout(options._timeout, group)
