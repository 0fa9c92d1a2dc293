# SPDX-License-Identifier: Apache-2.0
"""The built extension holds the machine code it should: read back with cuobjdump, without a GPU.

sm80 means code for sm_80 and the PTX of compute_80, which newer chips compile for themselves;
sm80_on_sm90 means the same kernels as code for sm_90. Every GEMM kernel multiplies with the
tensor cores (HMMA) and fills shared memory by cp.async (LDGSTS), the kernels for few tokens do
without shared memory, and no kernel of the extension keeps anything in local memory, which is where
spilled registers go.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from fused_moe import _extension as extension

pytestmark = pytest.mark.skipif(
    extension.C is None or "sm80" not in extension.C.BACKENDS,
    reason="this build has no sm80 kernels (--config=cpu): no machine code to look at",
)

# What a kernel's mangled name holds: a GEMM in tiles, and the whole layer for few tokens.
_GEMM = "GroupedGemmKernel"
_DECODE = "DecodeLayerKernel"

# Kernels of a tactic: two dtypes, four kinds of weights, with a gate and without. INT4 has one more
# of each, for groups of 128, for few tokens and in tiles of few rows.
_PER_TACTIC = 2 * 4 * 2
_WITH_GROUPS_OF_128 = 2 * 5 * 2
_ROWS_OF_A_LOW_TILE = 64  # or fewer


def _tool() -> str:
    """cuobjdump: among the test's files, else on PATH. nvdisasm, which it calls, lies beside it."""
    candidates = pathlib.Path(os.environ.get("TEST_SRCDIR", "/nonexistent")).glob("*/bin/cuobjdump")
    found = next((str(path) for path in candidates), None) or shutil.which("cuobjdump")
    assert found, "cuobjdump is neither among the test's files nor on PATH"
    return found


def _lines(*arguments: str) -> Iterator[str]:
    """What cuobjdump prints about the extension, line by line: the SASS is long."""
    assert extension.C is not None and extension.C.__file__
    tool = _tool()
    path = f"{pathlib.Path(tool).parent}:{os.environ.get('PATH', '')}"
    process = subprocess.Popen(
        [tool, *arguments, extension.C.__file__],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PATH": path},
    )
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        last = line
        yield line
    assert process.wait() == 0, f"cuobjdump {arguments} failed: {last}"


@dataclasses.dataclass(frozen=True)
class Resources:
    """One kernel's, as `cuobjdump -res-usage` has them."""

    architecture: str
    name: str
    registers: int
    stack: int
    local: int


@functools.cache
def resources() -> list[Resources]:
    """Of every kernel in the extension."""
    kernels = []
    architecture = name = ""
    for line in _lines("-res-usage"):
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (.*):$", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            registers, stack, local = map(int, match.groups())
            kernels.append(Resources(architecture, name, registers, stack, local))
    return kernels


@functools.cache
def opcodes() -> dict[tuple[str, str], collections.Counter[str]]:
    """How often each instruction appears, by architecture and kernel, modifiers left out."""
    counts: dict[tuple[str, str], collections.Counter[str]] = {}
    architecture = ""
    current: collections.Counter[str] = collections.Counter()
    instruction = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)")
    for line in _lines("-sass"):
        if match := instruction.match(line):
            current[match[1]] += 1
        elif match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            current = counts.setdefault((architecture, match[1]), collections.Counter())
    return counts


def expected_architectures() -> set[str]:
    """What the build setting asks for: of sm80, sm80_on_sm90 and others joined by commas."""
    assert extension.C is not None
    built_for = re.split(r"[,+]", extension.C.BUILT_FOR)
    return {"sm_90" if part == "sm80_on_sm90" else part.replace("sm", "sm_") for part in built_for}


def test_the_extension_has_machine_code_for_what_it_was_built_for() -> None:
    found = {
        match[1] for line in _lines("-lelf") if (match := re.search(r"\.(sm_\w+)\.cubin", line))
    }
    assert found == expected_architectures()
    assert {kernel.architecture for kernel in resources()} == found


def test_sm80_code_comes_with_its_ptx() -> None:
    assert extension.C is not None
    if extension.C.BUILT_FOR != "sm80":
        pytest.skip(f"built for {extension.C.BUILT_FOR}, which holds no PTX by intention")
    cubins = sum(".cubin" in line for line in _lines("-lelf"))
    ptx = [line for line in _lines("-lptx") if ".ptx" in line]
    assert len(ptx) == cubins > 0, f"{len(ptx)} PTX files for {cubins} of machine code"
    assert all(".sm_80." in line for line in ptx), ptx[:3]


def test_every_tactic_has_its_kernels() -> None:
    assert extension.C is not None
    wanted = {_GEMM: 0, _DECODE: 0}
    for tactic in extension.C.tactics("sm80"):
        if tactic.whole_layer or tactic.tile_m <= _ROWS_OF_A_LOW_TILE:
            wanted[_DECODE if tactic.whole_layer else _GEMM] += _WITH_GROUPS_OF_128
        else:
            wanted[_GEMM] += _PER_TACTIC
    for name, kernels in wanted.items():
        found = {
            (kernel.architecture, kernel.name) for kernel in resources() if name in kernel.name
        }
        assert len(found) == kernels * len(expected_architectures()) > 0, name


def test_the_extension_is_small() -> None:
    assert extension.C is not None and extension.C.__file__
    megabytes = os.path.getsize(extension.C.__file__) / 1e6
    assert megabytes < 40 * len(expected_architectures()), f"{megabytes:.1f} MB"


def test_no_kernel_has_local_memory() -> None:
    assert len(resources()) > 0
    wrong = [k for k in resources() if k.stack or k.local]
    listed = "\n".join(f"{k.architecture} {k.name}: {k.stack} bytes of stack" for k in wrong)
    assert not wrong, f"{len(wrong)} kernels with a stack or local memory:\n{listed}"


def test_no_kernel_spills() -> None:
    """STL and LDL store to and load from local memory."""
    assert len(opcodes()) == len(resources())
    wrong = {key: count for key, count in opcodes().items() if count["STL"] or count["LDL"]}
    listed = "\n".join(
        f"{architecture} {name}: {count['STL']} stores, {count['LDL']} loads"
        for (architecture, name), count in wrong.items()
    )
    assert not wrong, f"{len(wrong)} kernels spill:\n{listed}"


def test_every_gemm_uses_tensor_cores_and_asynchronous_copies() -> None:
    gemms = {key: count for key, count in opcodes().items() if _GEMM in key[1]}
    assert gemms
    for key, count in gemms.items():
        assert count["HMMA"] >= 8, f"{key}: {count['HMMA']} HMMA instructions"
        assert count["LDGSTS"] >= 2, f"{key}: {count['LDGSTS']} LDGSTS instructions"
        assert count["LDSM"] >= 1, f"{key}: no LDSM, the matrix load from shared memory"
        # A Hopper instruction in code made for Ampere would mean that it was not.
        assert not count["HGMMA"] and not count["UTMALDG"], key


def test_gemms_shuffle_only_where_all_lanes_are() -> None:
    """A warp's place in a tile is asked by a shuffle, which waits for every lane of the warp.

    It belongs to the few places where none is missing. Inlined into the epilogue's loops over rows
    and columns it was there dozens of times, and where a tile's edge parted the lanes it hung.
    """
    gemms = {key: count for key, count in opcodes().items() if _GEMM in key[1]}
    assert gemms
    for key, count in gemms.items():
        assert count["SHFL"] <= 5, f"{key}: {count['SHFL']} SHFL instructions"


def test_few_tokens_stream_weights_into_registers() -> None:
    """HMMA on what LDG brings in 16 bytes; no copy of the weights in shared memory."""
    layers = {key: count for key, count in opcodes().items() if _DECODE in key[1]}
    assert layers
    for key, count in layers.items():
        assert count["HMMA"] >= 8, f"{key}: {count['HMMA']} HMMA instructions"
        assert count["LDG"] >= 8, f"{key}: {count['LDG']} LDG instructions"
        assert not count["LDGSTS"] and not count["LDSM"], key
