# SPDX-License-Identifier: Apache-2.0
"""The small steps between the GEMMs of the serving engines' layers.

Sort by expert, SwiGLU, sum. The engines have them compiled; where their libraries load, theirs are
called (`Compiled`), else ours in Triton (`Substitutes`), which are fused the same way. Both have
the engines' conventions: [gate; up] rows, and `sorted_slots` padded with the number of slots.
"""

from __future__ import annotations

import pathlib
from typing import Any, Protocol

import torch
import triton

from peers import triton_kernels as kernels

_ONE_PROGRAM_SLOTS = 1024  # up to here one launch sorts
_CHUNK = 1024  # slots a program where there are more
_LIBRARIES = ("_moe_C_stable_libtorch.abi3.so", "_C_stable_libtorch.abi3.so")


class Pieces(Protocol):
    """The three steps."""

    note: str

    def align(
        self,
        ids: torch.Tensor,
        experts: int,
        block_m: int,
        sorted_slots: torch.Tensor,
        tile_experts: torch.Tensor,
        num_rows: torch.Tensor,
    ) -> None:
        """Writes slots by expert, each expert padded to whole tiles; each tile's expert; rows."""

    def silu_and_mul(self, out: torch.Tensor, h: torch.Tensor) -> None:
        """out [rows, I] = silu(h[:, :I]) * h[:, I:]."""

    def moe_sum(self, y: torch.Tensor, out: torch.Tensor) -> None:
        """out [M, H] = the sum of y [M, k, H] over k."""


def _power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


class Substitutes:
    """Ours, in Triton.

    options: further arguments of each launch. gate_first: the order of the activation's rows; the
    engines' are [gate; up], those of `cutlass_fused_moe` [up; gate].
    """

    note = "sort, activation and sum by this benchmark's Triton kernels"

    def __init__(self, options: dict[str, Any] | None = None, *, gate_first: bool = True) -> None:
        self._options = options or {}
        self._gate_first = gate_first

    def align(
        self,
        ids: torch.Tensor,
        experts: int,
        block_m: int,
        sorted_slots: torch.Tensor,
        tile_experts: torch.Tensor,
        num_rows: torch.Tensor,
    ) -> None:
        """One launch for few slots, four for many."""
        slots, bins = ids.numel(), _power_of_two(experts + 1)
        cursors = torch.empty(bins, dtype=torch.int32, device=ids.device)
        if slots <= _ONE_PROGRAM_SLOTS:
            kernels.align_few[(1,)](
                ids,
                sorted_slots,
                tile_experts,
                num_rows,
                cursors,
                slots,
                experts,
                BLOCK_M=block_m,
                SLOTS=_power_of_two(slots),
                BINS=bins,
                **self._options,
            )
            return
        counts = torch.zeros(bins, dtype=torch.int32, device=ids.device)
        chunks = (triton.cdiv(slots, _CHUNK),)
        kernels.count_slots[chunks](ids, counts, slots, SLOTS=_CHUNK, BINS=bins, **self._options)
        kernels.plan_tiles[(1,)](
            counts,
            sorted_slots,
            tile_experts,
            num_rows,
            cursors,
            slots,
            experts,
            BLOCK_M=block_m,
            BINS=bins,
            **self._options,
        )
        kernels.scatter_slots[chunks](
            ids, sorted_slots, cursors, slots, SLOTS=_CHUNK, **self._options
        )

    def silu_and_mul(self, out: torch.Tensor, h: torch.Tensor) -> None:
        """One launch."""
        rows, columns = out.shape
        block = min(1024, _power_of_two(columns))
        kernels.swiglu[(rows, triton.cdiv(columns, block))](
            h, out, columns, BLOCK=block, GATE_FIRST=self._gate_first, **self._options
        )

    def moe_sum(self, y: torch.Tensor, out: torch.Tensor) -> None:
        """One launch."""
        tokens, top_k, columns = y.shape
        block = min(1024, _power_of_two(columns))
        kernels.sum_slots[(tokens, triton.cdiv(columns, block))](
            y, out, columns, top_k, BLOCK=block, **self._options
        )


class Compiled:
    """vLLM's own, out of its wheel."""

    note = "sort, activation and sum by vLLM's compiled kernels"

    def align(
        self,
        ids: torch.Tensor,
        experts: int,
        block_m: int,
        sorted_slots: torch.Tensor,
        tile_experts: torch.Tensor,
        num_rows: torch.Tensor,
    ) -> None:
        """One or two launches."""
        torch.ops._moe_C.moe_align_block_size(
            ids, experts, block_m, sorted_slots, tile_experts, num_rows, None
        )

    def silu_and_mul(self, out: torch.Tensor, h: torch.Tensor) -> None:
        """One launch."""
        torch.ops._C.silu_and_mul(out, h)

    def moe_sum(self, y: torch.Tensor, out: torch.Tensor) -> None:
        """One launch."""
        torch.ops._moe_C.moe_sum(y, out, None, None)


_loaded: dict[pathlib.Path, str | None] = {}


def load_libraries(root: pathlib.Path) -> str | None:
    """Loads vLLM's compiled libraries once; says why not where they do not load."""
    if root not in _loaded:
        _loaded[root] = None
        for name in _LIBRARIES:
            try:
                torch.ops.load_library(str(root / "vllm" / name))
            except (OSError, RuntimeError) as error:
                _loaded[root] = f"{name} does not load: {error}".split("\n", 1)[0]
                break
    return _loaded[root]


def pieces(root: pathlib.Path) -> Any:
    """`Compiled` where the libraries load and the kernels run on this GPU, else `Substitutes`."""
    if not torch.cuda.is_available() or load_libraries(root):
        return Substitutes()
    compiled = Compiled()
    try:
        y = torch.ones(2, 2, 16, dtype=torch.bfloat16, device="cuda")
        out = torch.empty(2, 16, dtype=torch.bfloat16, device="cuda")
        compiled.moe_sum(y, out)
        compiled.silu_and_mul(out[:, :8].contiguous(), out)
        torch.cuda.synchronize()
    except RuntimeError as error:
        _loaded[root] = f"vLLM's compiled kernels do not run here: {error}".split("\n", 1)[0]
        return Substitutes()
    return compiled
