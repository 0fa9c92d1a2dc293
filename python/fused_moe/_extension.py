# SPDX-License-Identifier: Apache-2.0
"""The one place that imports the compiled extension `fused_moe._C`.

The cpu backend, the reference and every check work without it, so its absence is an error
only where a kernel is asked for.
"""

from __future__ import annotations

from types import ModuleType

C: ModuleType | None
_reason: str
try:
    from fused_moe import _C as C

    _reason = ""
except ImportError as error:
    C = None
    _reason = str(error)


def require(backend: str) -> ModuleType:
    """Returns the extension, which has `backend` compiled in.

    Raises:
        RuntimeError: there is no extension, it does not load, or it lacks this backend.
    """
    if C is None:
        raise RuntimeError(
            f"backend '{backend}' needs the compiled extension fused_moe._C, which cannot be "
            f"imported ({_reason}). Build it with Bazel (--config=sm80), or pass CPU tensors to "
            "use the cpu backend, which needs no extension."
        )
    if backend not in C.BACKENDS:
        raise RuntimeError(
            f"backend '{backend}' is not in this build of fused_moe, which was made for "
            f"'{C.BUILT_FOR}' and has the kernel backends {list(C.BACKENDS)}. Build with "
            f"--config={backend}, or pass CPU tensors to use the cpu backend."
        )
    return C
