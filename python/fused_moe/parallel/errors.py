# SPDX-License-Identifier: Apache-2.0
"""What goes wrong between processes, said in one place; and what inference code must not be given.

torch.distributed reports a peer that died in many ways: gloo at once or at its timeout, by a
RuntimeError that speaks of sockets; NCCL, whose calls only enqueue, at its timeout, by the
watchdog thread. What every report lacks is which exchange of which layer it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist


class ParallelError(RuntimeError):
    """An exchange between ranks failed: a rank died, or the ranks did not make the same call.

    The text says which exchange, of which rank in which group, and the error of torch.distributed
    is the `__cause__`; `wait_for_device` knows neither. The process group is not usable afterwards.
    """


@contextlib.contextmanager
def exchange(what: str, kind: str, group: dist.ProcessGroup) -> Iterator[None]:
    """Turns an error of the exchange made inside into a ParallelError.

    Args:
        what: the exchange, such as "all-reduce of the output [64, 2048]".
        kind: "tensor" or "expert": which ranks the group is of.
        group: that makes it.
    """
    try:
        yield
    except RuntimeError as error:  # the errors of torch.distributed are all RuntimeErrors
        raise ParallelError(
            f"{what} failed on rank {group.rank()} of the {group.size()} {kind}-parallel ranks "
            f"{dist.get_process_group_ranks(group)} (this is global rank {dist.get_rank()}): "
            "another rank ended, failed, or did not make the same call within the process "
            f"group's timeout; the error of torch.distributed: {error}"
        ) from error


def reject_gradients(**tensors: torch.Tensor | None) -> None:
    """Raises RuntimeError, naming it, for a tensor that autograd would want gradients of."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{name} requires a gradient, but this is inference: there is no backward. Call "
                f"under torch.no_grad() or torch.inference_mode(), or pass {name}.detach()"
            )
