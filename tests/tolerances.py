# SPDX-License-Identifier: Apache-2.0
"""How far a result may be from the float32 reference, and how that is measured.

Every comparison of numbers in the tests uses this one table.

An error is relative and in norm: ||out - ref|| / ||ref||, over the whole output. Both sides
get the same rounded inputs (of quantized weights the reference uses what they mean, q * scale
in float32), so what is left is what the layer itself rounds. A 16-bit number of p significant
bits is off by up to 2^-p of its size, about 0.4 * 2^-p on average in norm:

    bfloat16, p = 8:  1.6e-3 a rounding;    float16, p = 11:  2.0e-4 a rounding

A backend rounds twice at least, the activation and the output, and up to five times where a
matrix product hands over 16-bit results: sqrt(5) * 1.6e-3 = 3.6e-3. The bounds leave a
factor of 1.4 above the worst case for bfloat16 and of 2.2 for float16, which also loses
bits in its subnormals. A wrong row, a missing slot or swapped halves are off by 1e-1 to 1.
"""

from __future__ import annotations

import torch

TOLERANCES: dict[torch.dtype, float] = {
    torch.bfloat16: 5e-3,
    torch.float16: 1e-3,
    # Only the order of float32 sums differs: sqrt(K) * 2^-24 at K = 16384, times ten.
    torch.float32: 8e-5,
}


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """||out - ref|| / ||ref|| in float64; NaN anywhere in `out` gives infinity.

    Where the reference is all zero, `out` has to be, too: any other value gives infinity.
    """
    assert out.shape == ref.shape, (out.shape, ref.shape)
    difference = float(torch.linalg.vector_norm(out.double() - ref.double()))
    scale = float(torch.linalg.vector_norm(ref.double()))
    if difference == 0:
        return 0.0
    error = difference / scale if scale > 0 else float("inf")
    return error if error == error else float("inf")


def assert_close(out: torch.Tensor, ref: torch.Tensor, dtype: torch.dtype) -> None:
    """Fails unless `out` is within the bound of `dtype`, the coarser of input and output."""
    error = relative_error(out, ref)
    assert error < TOLERANCES[dtype], (
        f"relative error {error:.2e}, allowed {TOLERANCES[dtype]:.0e} for {dtype}"
    )
