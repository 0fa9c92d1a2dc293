# SPDX-License-Identifier: Apache-2.0
"""Exchanges beside computation: a second stream on CUDA, plain sequence on the CPU.

With chunks 0, 1, 2 of the tokens, d dispatch, c compute, b bringing back:

    exchange stream   d0  d1      b0 d2     b1       b2
    caller's stream       c0 ---- c1 ------ c2 ----     (then waits for b2)

A chunk's tensors are allocated on one stream and used on the other. They stay referenced until
the two streams have met again, so that the allocator cannot hand their memory out in between.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Chunk(Protocol):
    """One part of the tokens; keeps what its steps hand on."""

    def dispatch(self) -> None:
        """Sends its rows and receives those that this rank computes."""

    def compute(self) -> None:
        """Runs the experts on what was received."""

    def bring_back(self) -> None:
        """Returns the results to where the tokens came from, and sums them there."""


def run_in_sequence(chunks: list[Chunk]) -> None:
    """All steps on the current stream."""
    for chunk in chunks:
        chunk.dispatch()
        chunk.compute()
        chunk.bring_back()


def run_overlapped(chunks: list[Chunk], side: torch.cuda.Stream) -> None:
    """Exchanges on the stream `side`, so that they run while another chunk is computed."""
    main = torch.cuda.current_stream(side.device)
    side.wait_stream(main)
    try:
        with torch.cuda.stream(side):
            chunks[0].dispatch()
            dispatched = side.record_event()
        for index, chunk in enumerate(chunks):
            arrived = dispatched
            if index + 1 < len(chunks):
                with torch.cuda.stream(side):
                    chunks[index + 1].dispatch()
                    dispatched = side.record_event()
            main.wait_event(arrived)
            chunk.compute()
            computed = main.record_event()
            with torch.cuda.stream(side):
                side.wait_event(computed)
                chunk.bring_back()
    finally:
        main.wait_stream(side)
