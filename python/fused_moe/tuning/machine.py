# SPDX-License-Identifier: Apache-2.0
"""All that tuning asks of the machine it runs on; tests put another one in its place."""

from __future__ import annotations

import contextlib
import functools
import time

import torch

from fused_moe.tuning import timing
from fused_moe.tuning.keys import Chip
from fused_moe.tuning.search import Timer


class Machine:
    """The GPUs of this process."""

    def chip(self, device: torch.device) -> Chip:
        """What kind of chip a device is."""
        return _chip(0 if device.index is None else device.index)

    def chips(self) -> set[Chip]:
        """The kinds of chips that this process sees; none without a GPU."""
        if not torch.cuda.is_available():
            return set()
        return {_chip(index) for index in range(torch.cuda.device_count())}

    def capturing(self) -> bool:
        """Whether the current stream is being captured into a CUDA graph."""
        return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

    def timer(self, request: timing.Request) -> contextlib.AbstractContextManager[Timer]:
        """A timer of the request's call."""
        return timing.graph_timer(request)

    def release(self) -> None:
        """Gives memory back that only measuring needed."""
        torch.cuda.empty_cache()

    def clock(self) -> float:
        """Seconds."""
        return time.monotonic()


@functools.cache
def _chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    return Chip(
        name=properties.name,
        multiprocessors=properties.multi_processor_count,
        shared_memory_per_block=properties.shared_memory_per_block_optin,
        shared_memory_per_multiprocessor=properties.shared_memory_per_multiprocessor,
    )
