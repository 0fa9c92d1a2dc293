# SPDX-License-Identifier: Apache-2.0
"""Which backend serves which device."""

from __future__ import annotations

import functools

import torch

NAMES = ("sm80", "sm90", "cpu")

# What this version has; the others are names kept for what is planned.
AVAILABLE = ("sm80", "cpu")


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def choose(requested: str | None, device: torch.device) -> str:
    """Names the backend for tensors on `device`.

    Args:
        requested: the caller's `backend` argument; None chooses by the device: CPU tensors
            get cpu; CUDA devices of compute capability 8 and above get sm80, newer chips
            through its PTX.
        device: where the input lies. Looked at only where `requested` is None.

    Raises:
        ValueError: an unknown name, a device that is neither CPU nor CUDA, or a CUDA device
            below compute capability 8.
        NotImplementedError: a backend that this version does not have.
    """
    if requested is None:
        if device.type == "cpu":
            return "cpu"
        check_device("sm80", device)
        return "sm80"
    if requested not in NAMES:
        raise ValueError(
            f"backend is {requested!r}; it must be one of {list(NAMES)}, or None to choose by "
            "the device"
        )
    if requested not in AVAILABLE:
        raise NotImplementedError(
            f"backend '{requested}' is not in this version, which has {list(AVAILABLE)}; use "
            "backend='sm80' or None: its kernels also run on newer chips"
        )
    return requested


def check_device(backend: str, device: torch.device) -> None:
    """Raises ValueError, naming the device, where `backend` cannot run on it."""
    if backend == "cpu":
        if device.type != "cpu":
            raise ValueError(
                f"input is on {device}; backend 'cpu' takes tensors on the CPU. Move them with "
                ".cpu(), or leave backend=None to run where they are"
            )
        return
    if device.type != "cuda":
        raise ValueError(
            f"input is on {device}; backend '{backend}' takes tensors on a CUDA device. Move "
            "them with .cuda(), or pass CPU tensors with backend='cpu' or None"
        )
    # An index is missing only in devices that no tensor has.
    index = torch.cuda.current_device() if device.index is None else device.index
    major, minor = _capability(index)
    if major < 8:
        raise ValueError(
            f"input is on {device}, {torch.cuda.get_device_name(index)}, which has compute "
            f"capability {major}.{minor}; the kernels need 8.0 or newer (A100, A30, A10, "
            "RTX 30 and later). Move the tensors to the CPU to use the cpu backend"
        )
