# SPDX-License-Identifier: Apache-2.0
"""From a checked call to the kernels: workspace, stream, current device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fused_moe import _extension
from fused_moe.arguments import MoeCall


def _stream_of(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


# The same number without the Stream object around it, a microsecond sooner, where PyTorch
# has it (its own compiled code takes streams this way).
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _stream_of)

# Without a look at whether CUDA is initialised: tensors on a device say so.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def _empty_strided_public(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


# Memory of the current device. Again the way of PyTorch's compiled code, which takes it from
# the same allocator in half the time, as no dispatcher has to be asked.
_guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_empty_strided: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor] = getattr(
    _guards, "_empty_strided_cuda", _empty_strided_public
)


def capturing(device: torch.device) -> bool:
    """Whether what is enqueued now on the device goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def launch(
    call: MoeCall,
    output: torch.Tensor | None,
    workspace_buffer: torch.Tensor | None,
    input: int,
    experts: int,
    scales: int,
    fc1_weights: int,
    fc2_weights: int,
    fc1_scales: int,
    fc2_scales: int,
    fc1_bias: int,
    fc2_bias: int,
    swiglu_alpha: int,
    swiglu_beta: int,
    swiglu_limit: int,
) -> torch.Tensor:
    """Puts the steps on the current stream of the call's device; waits for nothing.

    Args:
        call: what was checked.
        output: where the result goes, or None to take memory from PyTorch's allocator.
        workspace_buffer: the caller's, big enough, or None to take one from PyTorch's
            allocator, which keeps it from other streams until this one is done with it.
        input, ...: the addresses of the tensors, in `_C.run`'s order and under its names; 0
            where one is not given.

    Returns:
        The output.

    Raises:
        RuntimeError: an error of the CUDA runtime.
    """
    extension = _extension.C
    assert extension is not None, "check_call finds the extension before anything gets here"
    index = call.device.index
    if _current_device() != index:
        with torch.cuda.device(index):
            return launch(
                call,
                output,
                workspace_buffer,
                *(input, experts, scales, fc1_weights, fc2_weights, fc1_scales, fc2_scales),
                *(fc1_bias, fc2_bias, swiglu_alpha, swiglu_beta, swiglu_limit),
            )
    if output is None:
        hidden_size = call.hidden_size
        output = _empty_strided((call.num_tokens, hidden_size), (hidden_size, 1), call.output_dtype)
    if workspace_buffer is None:
        workspace_bytes = call.workspace_bytes
        workspace_buffer = _empty_strided((workspace_bytes,), (1,), torch.uint8)
    else:
        workspace_bytes = workspace_buffer.shape[0]
    # By position: looking two dozen names up costs two microseconds.
    arguments = (
        call.backend,
        call.problem,
        _raw_stream(index),
        input,
        experts,
        scales,
        fc1_weights,
        fc2_weights,
        fc1_scales,
        fc2_scales,
        call.weight_scale_dtype,
        fc1_bias,
        fc2_bias,
        swiglu_alpha,
        swiglu_beta,
        swiglu_limit,
        output.data_ptr(),
        workspace_buffer.data_ptr(),
        workspace_bytes,
        call.add_fc2_bias,
    )
    if call.tactics is None:
        extension.run(*arguments)
    else:
        extension.run(*arguments, call.tactics)
    return output
