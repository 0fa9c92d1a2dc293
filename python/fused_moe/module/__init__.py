# SPDX-License-Identifier: Apache-2.0
"""The layer as PyTorch modules: `FusedMoE` and what it is made of.

layer.py    FusedMoE: router, experts and shared experts, and constructors from checkpoints
router.py   Router: the product that makes logits, and a `Routing`
experts.py  Experts: the weights of this rank's experts in any format
shared.py   SharedExperts: the dense part that every token goes through
formats.py  how each weight format is stored
layouts.py  from the layouts of checkpoints to ours
tensors.py  what all of them have in common
"""

from fused_moe.module.experts import Experts
from fused_moe.module.layer import FusedMoE
from fused_moe.module.router import Router
from fused_moe.module.shared import SharedExperts

__all__ = ["Experts", "FusedMoE", "Router", "SharedExperts"]
