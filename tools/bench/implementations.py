# SPDX-License-Identifier: Apache-2.0
"""Which implementations there are, and how the benchmark gets them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from ours import Ours
from peers import foreign

# Name -> module, class, and what its constructor takes.
_PEERS = {
    "vllm": ("peers.vllm_moe", "VllmMoe", "files"),
    "sglang": ("peers.sglang_moe", "SglangMoe", "files"),
    "marlin": ("peers.marlin", "MarlinMoe", "files"),
    "triton": ("peers.triton_moe", "TritonMoe", "arch"),
    "torch_grouped_mm": ("peers.torch_grouped_mm", "TorchGroupedMm", ""),
}
FROM_FILES = tuple(name for name, (_, _, needs) in _PEERS.items() if needs == "files")
# Written in Triton: they have to be compiled, and do what triton_arch says.
IN_TRITON = ("vllm", "sglang", "triton", "triton_sm80")


def prepare_environment(triton_arch: str | None) -> None:
    """Before Triton and CUDA start: what Triton generates, and no kernel loaded before it is used.

    Loading everything at once would also look for what bring_peers.py left out of the libraries.
    """
    if triton_arch:
        os.environ["TRITON_OVERRIDE_ARCH"] = triton_arch
    else:
        os.environ.pop("TRITON_OVERRIDE_ARCH", None)
    os.environ["CUDA_MODULE_LOADING"] = "LAZY"


def is_ampere(name: str, triton_arch: str | None) -> bool:
    """Whether a peer runs Ampere code: Marlin always does, PyTorch's grouped_mm has Hopper's."""
    return name == "marlin" or (name in IN_TRITON and triton_arch == "sm80")


def make_peer(name: str, files: str, triton_arch: str | None) -> Any:
    """One peer.

    Args:
        name: one of the peers above.
        files: what bring_peers.py made, a folder or an archive.
        triton_arch: "sm80" for Ampere code, None for the GPU's own.

    Raises:
        ImportError: what it needs is not there.
    """
    module, factory, needs = _PEERS[name]
    make = getattr(importlib.import_module(module), factory)
    if needs == "files":
        return make(foreign.unpacked(files))
    return make(triton_arch) if needs == "arch" else make()


def load(
    names: Sequence[str], own: str, files: str, triton_arch: str | None
) -> tuple[list[Any], dict[str, str]]:
    """The implementations asked for.

    Args:
        names: backends of the library and peers; ["auto"] is the library's own backend and
            every peer, this benchmark's Triton one only where there are no files.
        own: the library's backend for this device.
        files, triton_arch: as make_peer takes them.

    Returns:
        The implementations, and under auto why a peer is missing, which is also said aloud.
    """
    auto = list(names) == ["auto"]
    if auto:
        names = [own]
        if own != "cpu":
            names += [*FROM_FILES, "torch_grouped_mm"] if files else ["triton", "torch_grouped_mm"]
    implementations: list[Any] = []
    absent: dict[str, str] = {}
    for name in names:
        if name not in _PEERS:
            implementations.append(Ours(name))
            continue
        try:
            implementations.append(make_peer(name, files, triton_arch))
        except ImportError as error:
            if not auto:
                raise
            absent[name] = str(error)
            print(f"without {name}: {error}", file=sys.stderr, flush=True)
    return implementations, absent
