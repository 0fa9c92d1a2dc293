# SPDX-License-Identifier: Apache-2.0
"""A wait for a CUDA device that ends."""

from __future__ import annotations

import datetime
import time

import torch

from fused_moe.parallel.errors import ParallelError


def wait_for_device(
    timeout: datetime.timedelta, device: torch.device | str | int | None = None
) -> None:
    """Waits until all that the current stream was given is done, but no longer than `timeout`.

    For replays of CUDA graphs that hold exchanges: of those PyTorch knows nothing, neither its
    watchdog nor TORCH_NCCL_BLOCKING_WAIT, and torch.cuda.synchronize() has no timeout, so that a
    host which waits for a rank that died would do so for ever.

    Args:
        timeout: counted from this call.
        device: whose current stream; None is the current device.

    Raises:
        ParallelError: it was not done in time. The exchange goes on waiting on the device: end this
            process, by os._exit if ending in order waits as well.
    """
    until = time.monotonic() + timeout.total_seconds()
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    pause = 10e-6  # of a step's size first, then of a host's that has time
    while not done.query():
        if time.monotonic() >= until:
            raise ParallelError(
                f"the device did not finish within {timeout.total_seconds():g} s: another rank "
                "ended, failed, or did not make the same calls, or the work itself takes longer"
            )
        time.sleep(pause)
        pause = min(2 * pause, 1e-3)
