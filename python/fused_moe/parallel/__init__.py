# SPDX-License-Identifier: Apache-2.0
"""One layer on several GPUs, or processes, by torch.distributed.

mesh = init_device_mesh("cuda", (2, 2), mesh_dim_names=("ep", "tp"))
groups = ParallelGroups.from_mesh(mesh)
mine = ExpertWeights(fc1, fc2).shard(groups, device="cuda")     # once, when loading

out = replicated_moe(x, ids, scales, mine, groups)     # all ranks have the same tokens
out = dispatched_moe(x, ids, scales, mine, groups)     # each expert rank has its own
"""

from fused_moe.parallel.device import wait_for_device
from fused_moe.parallel.dispatched import dispatched_moe
from fused_moe.parallel.errors import ParallelError
from fused_moe.parallel.experts import ExpertWeights, pad_intermediate, shard_experts
from fused_moe.parallel.groups import ParallelGroups
from fused_moe.parallel.replicated import replicated_moe

__all__ = [
    "ExpertWeights",
    "ParallelError",
    "ParallelGroups",
    "dispatched_moe",
    "pad_intermediate",
    "replicated_moe",
    "shard_experts",
    "wait_for_device",
]
