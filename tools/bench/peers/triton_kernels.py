# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the peer in triton_moe.py.

    slots [M * k] --align--> slots by expert, each expert padded to whole tiles of BLOCK_M
    x [M, H]      --grouped_gemm (rows gathered)--> [slots, 2I] --swiglu--> [slots, I]
                  --grouped_gemm (scaled by the router)--> [slots, H] --sum_slots--> [M, H]

A slot is one (token, choice) pair. Row r of the padded order holds slot sorted_slots[r], or
num_slots where it is padding. Five launches for few slots, eight for many.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations of its own from the signatures.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _plan(
    counts, bins, sorted_slots, tile_experts, num_rows, cursors, num_slots, BLOCK_M: tl.constexpr
):
    """From slots an expert to padded row ranges, the tiles' experts, padding and cursors."""
    padded = (counts + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    starts = tl.cumsum(padded, 0) - padded
    tl.store(num_rows, tl.sum(padded, 0))
    tl.store(cursors + bins, starts)
    for tile in range(tl.max(padded, 0) // BLOCK_M):
        tl.store(tile_experts + starts // BLOCK_M + tile, bins, mask=tile * BLOCK_M < padded)
    for row in range(BLOCK_M):
        tl.store(sorted_slots + starts + counts + row, num_slots, mask=counts + row < padded)


@triton.jit(do_not_specialize=["num_slots", "num_experts"])
def align_few(
    ids,  # [slots] int32, each in [0, num_experts)
    sorted_slots,  # [padded rows] int32, written
    tile_experts,  # [tiles] int32, written
    num_rows,  # [1] int32, written: padded rows in use
    cursors,  # [BINS] int32, scratch
    num_slots,
    num_experts,
    BLOCK_M: tl.constexpr,
    SLOTS: tl.constexpr,  # a power of two, >= num_slots
    BINS: tl.constexpr,  # a power of two, > num_experts
):
    """One program sorts all slots by expert."""
    slots = tl.arange(0, SLOTS)
    valid = slots < num_slots
    # Lanes without a slot fall into the last bin, which is no expert's.
    experts = tl.load(ids + slots, mask=valid, other=BINS - 1)
    bins = tl.arange(0, BINS)
    counts = tl.where(bins < num_experts, tl.histogram(experts, BINS), 0)
    _plan(counts, bins, sorted_slots, tile_experts, num_rows, cursors, num_slots, BLOCK_M)
    tl.debug_barrier()  # the cursors are in memory for all threads
    row = tl.atomic_add(cursors + experts, 1, mask=valid)
    tl.store(sorted_slots + row, slots, mask=valid)


@triton.jit(do_not_specialize=["num_slots"])
def count_slots(ids, counts, num_slots, SLOTS: tl.constexpr, BINS: tl.constexpr):
    """Adds the histogram of SLOTS slots to counts [BINS], which is zero at first."""
    slots = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    experts = tl.load(ids + slots, mask=slots < num_slots, other=BINS - 1)
    histogram = tl.histogram(experts, BINS)
    tl.atomic_add(counts + tl.arange(0, BINS), histogram, mask=histogram > 0)


@triton.jit(do_not_specialize=["num_slots", "num_experts"])
def plan_tiles(
    counts,
    sorted_slots,
    tile_experts,
    num_rows,
    cursors,
    num_slots,
    num_experts,
    BLOCK_M: tl.constexpr,
    BINS: tl.constexpr,
):
    """One program turns counts into row ranges; the second of the three steps for many slots."""
    bins = tl.arange(0, BINS)
    totals = tl.where(bins < num_experts, tl.load(counts + bins), 0)
    _plan(totals, bins, sorted_slots, tile_experts, num_rows, cursors, num_slots, BLOCK_M)


@triton.jit(do_not_specialize=["num_slots"])
def scatter_slots(ids, sorted_slots, cursors, num_slots, SLOTS: tl.constexpr):
    """Puts each slot into its expert's next free row."""
    slots = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    valid = slots < num_slots
    experts = tl.load(ids + slots, mask=valid, other=0)
    row = tl.atomic_add(cursors + experts, 1, mask=valid)
    tl.store(sorted_slots + row, slots, mask=valid)


@triton.jit(do_not_specialize=["num_slots", "slots_per_row", "row_tiles"])
def grouped_gemm(
    a,  # [rows of a, K]: row of a slot is slot // slots_per_row
    b,  # [experts, N, K], the dtype of a or 8-bit
    c,  # [slots, N]
    b_scales,  # [experts, N] float32, read if WEIGHTS is not 0
    slot_scales,  # [slots] float32, read if SCALED
    sorted_slots,
    tile_experts,
    num_rows,
    N,
    K,
    num_slots,
    slots_per_row,
    row_tiles,  # upper bound, known without waiting for the device
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,  # row tiles that share a column of weights while it is in L2
    EVEN_K: tl.constexpr,
    SCALED: tl.constexpr,
    WEIGHTS: tl.constexpr,  # 0 as a, 1 int8, 2 uint8 with offset 128
):
    """c[slot] = a[slot // slots_per_row] @ b[expert of slot].T, times slot_scales if SCALED."""
    program = tl.program_id(0)
    column_tiles = tl.cdiv(N, BLOCK_N)
    in_group = GROUP_M * column_tiles
    first_m = program // in_group * GROUP_M
    group_m = tl.minimum(row_tiles - first_m, GROUP_M)
    tile_m = first_m + program % in_group % group_m
    tile_n = program % in_group // group_m
    if tile_m * BLOCK_M >= tl.load(num_rows):
        return
    slots = tl.load(sorted_slots + tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    valid = slots < num_slots
    expert = tl.load(tile_experts + tile_m).to(tl.int64)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    a_tile = a + (slots // slots_per_row)[:, None] * K + ks[None, :]
    # Columns past N wrap around: no mask in the loop, and none of them is stored.
    b_tile = b + expert * N * K + (columns % N).to(tl.int64)[None, :] * K + ks[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(tl.cdiv(K, BLOCK_K)):
        if EVEN_K:
            a_values = tl.load(a_tile, mask=valid[:, None], other=0.0)
            b_values = tl.load(b_tile)
        else:
            left = K - k * BLOCK_K
            a_values = tl.load(a_tile, mask=valid[:, None] & (ks[None, :] < left), other=0.0)
            b_values = tl.load(b_tile, mask=ks[:, None] < left, other=0)
        if WEIGHTS == 2:
            b_values = (b_values ^ 128).to(tl.int8, bitcast=True)
        total = tl.dot(a_values, b_values.to(a_values.dtype), total)
        a_tile += BLOCK_K
        b_tile += BLOCK_K
    if WEIGHTS != 0:
        total *= tl.load(b_scales + expert * N + columns % N)[None, :]
    if SCALED:
        total *= tl.load(slot_scales + slots, mask=valid, other=0.0)[:, None]
    c_tile = c + slots[:, None] * N + columns[None, :]
    tl.store(c_tile, total.to(c.dtype.element_ty), mask=valid[:, None] & (columns[None, :] < N))


@triton.jit
def swiglu(h, out, I, BLOCK: tl.constexpr, GATE_FIRST: tl.constexpr = False):
    """out[slot, i] = silu(gate) * up: h[slot] is [up; gate], or [gate; up] if GATE_FIRST."""
    slot = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(h + slot * 2 * I + i, mask=i < I, other=0.0).to(tl.float32)
    second = tl.load(h + slot * 2 * I + I + i, mask=i < I, other=0.0).to(tl.float32)
    gate = first if GATE_FIRST else second
    up = second if GATE_FIRST else first
    value = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + slot * I + i, value.to(out.dtype.element_ty), mask=i < I)


@triton.jit(do_not_specialize=["top_k"])
def sum_slots(y, out, H, top_k, BLOCK: tl.constexpr):
    """out[t] = the float32 sum of y[t * top_k + j] over j."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in range(top_k):
        row = y + (token * top_k + j) * H
        total += tl.load(row + columns, mask=columns < H, other=0.0).to(tl.float32)
    tl.store(out + token * H + columns, total.to(out.dtype.element_ty), mask=columns < H)
