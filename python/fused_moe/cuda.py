# SPDX-License-Identifier: Apache-2.0
"""From a checked call to the kernels: workspace, stream, current device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fused_moe import _extension
from fused_moe.arguments import MoeCall


def _stream_of(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


# The same number without the Stream object around it, a microsecond sooner, where PyTorch
# has it (its own compiled code takes streams this way).
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _stream_of)


def launch(
    call: MoeCall,
    workspace_buffer: torch.Tensor | None,
    **addresses: int,
) -> None:
    """Puts the four steps on the current stream of the call's device; waits for nothing.

    Args:
        call: what was checked.
        workspace_buffer: the caller's, big enough, or None to take one from PyTorch's
            allocator, which keeps it from other streams until this one is done with it.
        addresses: those of the tensors under `_C.run`'s names, 0 where one is not given.

    Raises:
        RuntimeError: an error of the CUDA runtime.
    """
    extension = _extension.C
    assert extension is not None, "check_call finds the extension before anything gets here"
    if workspace_buffer is None:
        workspace_buffer = torch.empty(call.workspace_bytes, dtype=torch.uint8, device=call.device)
    index = call.device.index
    if torch.cuda.current_device() != index:
        with torch.cuda.device(index):
            launch(call, workspace_buffer, **addresses)
        return
    extension.run(
        call.backend,
        call.problem,
        stream=_raw_stream(index),
        weight_scale_dtype=call.weight_scale_dtype,
        workspace=workspace_buffer.data_ptr(),
        workspace_bytes=workspace_buffer.shape[0],
        add_fc2_bias=call.add_fc2_bias,
        **addresses,
    )
