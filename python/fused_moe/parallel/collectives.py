# SPDX-License-Identifier: Apache-2.0
"""The exchanges of this package: torch.distributed's, with errors that say what was being done.

NCCL's calls only enqueue: nothing is known of a rank that died until the group's timeout, when
PyTorch's watchdog ends the process. With TORCH_NCCL_BLOCKING_WAIT=1 there is no watchdog: the host
waits for each exchange instead and gets an exception that can be caught. PyTorch itself honours
that variable only for calls that hand out a handle to wait for, which is why they are made that way
under it; made the other way, they would wait for ever.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from fused_moe.cuda import capturing
from fused_moe.parallel.errors import exchange

# Newer PyTorch has other names for the same functions, and warns of the older ones.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _host_waits() -> bool:
    """Whether PyTorch was asked to let the host wait for NCCL, in the words it takes for yes."""
    older = os.environ.get("NCCL_BLOCKING_WAIT", "0")  # its former name still counts
    value = os.environ.get("TORCH_NCCL_BLOCKING_WAIT", older)
    return value.lower() in ("1", "t", "true", "y", "yes")


def _run(call: Any, *tensors: Any, what: str, kind: str, group: dist.ProcessGroup) -> None:
    waits = _host_waits()
    if waits and capturing(tensors[0].device):
        raise RuntimeError(
            "TORCH_NCCL_BLOCKING_WAIT is set, with which the host waits for each exchange, but the "
            "current stream is being captured in a CUDA graph, which cannot wait: unset it where "
            "graphs are captured; fused_moe.parallel.wait_for_device bounds the wait for a replay"
        )
    with exchange(what, kind, group):
        work = call(*tensors, group=group, async_op=waits)
        if work is not None:
            work.wait()


def all_reduce(x: torch.Tensor, what: str, kind: str, group: dist.ProcessGroup) -> None:
    """Sums x over the group, in place."""
    said = f"all-reduce of {what} {list(x.shape)}"
    _run(dist.all_reduce, x, what=said, kind=kind, group=group)


def reduce_scatter(x: torch.Tensor, what: str, kind: str, group: dist.ProcessGroup) -> torch.Tensor:
    """Sums x [n * rows, ...] over the n ranks; each gets its `rows` of the sum, in rank order."""
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    said = f"reduce-scatter of {what} {list(x.shape)}"
    _run(_reduce_scatter, out, x, what=said, kind=kind, group=group)
    return out


def all_gather(x: torch.Tensor, what: str, kind: str, group: dist.ProcessGroup) -> torch.Tensor:
    """Returns [n * rows, ...]: x [rows, ...] of all n ranks, in rank order."""
    out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    said = f"all-gather of {what} {list(x.shape)}"
    _run(_all_gather, out, x, what=said, kind=kind, group=group)
    return out


def all_to_all(
    out: torch.Tensor,
    x: torch.Tensor,
    what: str,
    kind: str,
    group: dist.ProcessGroup,
    received: Sequence[int] | None = None,
    sent: Sequence[int] | None = None,
) -> None:
    """Sends x's rows to the ranks, sent[r] of them to rank r; out gets received[r] from rank r.

    Without counts, every rank sends every other the same number.
    """
    _run(
        dist.all_to_all_single,
        out,
        x,
        None if received is None else list(received),
        None if sent is None else list(sent),
        what=f"all-to-all of {what}, {list(x.shape)} out, {list(out.shape)} in,",
        kind=kind,
        group=group,
    )
