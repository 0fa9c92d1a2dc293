# SPDX-License-Identifier: Apache-2.0
"""Every rank has all tokens and computes its part of every sum; one sum over the ranks follows.

That is tensor parallelism, the simple form of expert parallelism, and both at once: the operator
leaves out the experts of other ranks, and its shards of I give parts of the same sums.
"""

from __future__ import annotations

from typing import Literal

import torch

from fused_moe.op import cutlass_fused_moe
from fused_moe.parallel import collectives
from fused_moe.parallel.errors import reject_gradients
from fused_moe.parallel.experts import ExpertWeights
from fused_moe.parallel.groups import ParallelGroups

Reduction = Literal["all_reduce", "reduce_scatter", "none"]


def replicated_moe(
    input: torch.Tensor,
    token_selected_experts: torch.Tensor,
    token_final_scales: torch.Tensor | None,
    experts: ExpertWeights,
    groups: ParallelGroups,
    *,
    output_dtype: torch.dtype | None = None,
    reduction: Reduction = "all_reduce",
    backend: str | None = None,
) -> torch.Tensor:
    """The layer over tp x ep ranks that all have the same tokens.

    On CUDA nothing waits for the device, and a CUDA graph can capture the call with NCCL.

    The sum over ranks is torch.distributed's, of parts rounded to output_dtype, in the order of
    its algorithm: the same on every rank, and the same again for the same sizes and machines. A
    token whose experts are all on one rank gets what one process would compute.

    Args:
        input: [M, H], the same on every rank of the layer, as the next two.
        token_selected_experts: [M, k] int32 ids among all E experts.
        token_final_scales: [M, k] float32, or None for 1.
        experts: this rank's share, `ExpertWeights.shard(groups)`.
        groups: the ranks of the layer.
        output_dtype: None is input's.
        reduction: "all_reduce": every rank gets [M, H]. "reduce_scatter": of n = tp_size *
            ep_size ranks, number i = ep_rank * tp_size + tp_rank gets the rows [i * c, min((i +
            1) * c, M)) with c = ceil(M / n); that may be none. "none": this rank's part [M, H],
            for a caller that adds something of its own before it sums, such as a shared expert.
        backend: as `cutlass_fused_moe`'s.

    Returns:
        [M, H], or this rank's rows of it, in output_dtype.

    Raises:
        ParallelError: a rank died or made another call.
        RuntimeError: a tensor requires a gradient.
        ValueError: an unknown reduction; and what `cutlass_fused_moe` raises, before anything is
            exchanged: the other ranks then wait until their timeout.
    """
    if reduction not in ("all_reduce", "reduce_scatter", "none"):
        raise ValueError(
            f"reduction is {reduction!r}; it must be 'all_reduce', 'reduce_scatter' or 'none'"
        )
    reject_gradients(input=input, token_final_scales=token_final_scales, **experts.tensors())
    out = cutlass_fused_moe(
        input,
        token_selected_experts,
        token_final_scales,
        output_dtype=input.dtype if output_dtype is None else output_dtype,
        backend=backend,
        **experts.arguments(),
        **groups.ranks(),
    )
    if reduction == "reduce_scatter":
        return _scatter(out, groups)
    # All ranks have the same number of tokens: without any, none of them exchanges anything.
    if reduction == "all_reduce" and out.shape[0]:
        _sum(out, groups)
    return out


def _sum(out: torch.Tensor, groups: ParallelGroups) -> None:
    """Sums out over all ranks of the layer, in place."""
    if groups.layer is not None:
        collectives.all_reduce(out, "the output", "tensor- and expert", groups.layer)
        return
    if groups.tp is not None and groups.tp_size > 1:
        collectives.all_reduce(out, "the output", "tensor", groups.tp)
    if groups.ep is not None and groups.ep_size > 1:
        collectives.all_reduce(out, "the output", "expert", groups.ep)


def _scatter(out: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
    """Sums out [M, H] over all ranks; returns this rank's rows of the sum.

    Over the expert ranks first, then over the tensor ranks: that gives the order of rows that is
    documented, whatever the order of ranks in the group of all.
    """
    tokens = out.shape[0]
    ranks = groups.tp_size * groups.ep_size
    each = -(-tokens // ranks)
    if not tokens or ranks == 1:
        return out
    if each * ranks != tokens:
        out = torch.cat([out, out.new_zeros(each * ranks - tokens, out.shape[1])])
    if groups.ep is not None and groups.ep_size > 1:
        out = collectives.reduce_scatter(out, "the output", "expert", groups.ep)
    if groups.tp is not None and groups.tp_size > 1:
        out = collectives.reduce_scatter(out, "the output", "tensor", groups.tp)
    begin = (groups.ep_rank * groups.tp_size + groups.tp_rank) * each
    return out[: max(0, min(each, tokens - begin))]
