# SPDX-License-Identifier: Apache-2.0
"""What a shared library asks of the machine it is loaded on, and the wheel tag that says so.

The layout of the file is the ELF specification's (64 bit, little endian) and, for symbol versions,
the Linux Standard Base's chapter on symbol versioning.
"""

from __future__ import annotations

import dataclasses
import pathlib
import struct
from collections.abc import Iterator

_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NEEDED, _DT_STRTAB, _DT_VERNEED, _DT_VERNEEDNUM = 1, 5, 0x6FFFFFFE, 0x6FFFFFFF
_MACHINES = {62: "x86_64", 183: "aarch64"}


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a shared library needs: libraries, and versions of their symbols.

    Attributes:
        machine: as in a wheel's tag.
        libraries: names of the libraries to load with it.
        versions: symbol versions, such as "GLIBC_2.34", that these must define.
    """

    machine: str
    libraries: frozenset[str]
    versions: frozenset[str]


class _Library:
    """An ELF file's bytes, addressed as the loader would."""

    def __init__(self, path: pathlib.Path) -> None:
        self._bytes = path.read_bytes()
        if self._bytes[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{path} must be a 64-bit little-endian ELF file")
        (machine,) = struct.unpack_from("<H", self._bytes, 18)
        if machine not in _MACHINES:
            raise ValueError(
                f"{path} is for ELF machine {machine}; it must be one of {sorted(_MACHINES)}"
            )
        self.machine = _MACHINES[machine]
        (table,) = struct.unpack_from("<Q", self._bytes, 32)
        size, count = struct.unpack_from("<HH", self._bytes, 54)
        self._segments: list[tuple[int, int, int]] = []  # address, size, place in the file
        dynamic = None
        for index in range(count):
            kind, _, offset, address, _, length, *_ = struct.unpack_from(
                "<IIQQQQQQ", self._bytes, table + index * size
            )
            if kind == _PT_LOAD:
                self._segments.append((address, length, offset))
            elif kind == _PT_DYNAMIC:
                dynamic = (offset, length)
        if dynamic is None:
            raise ValueError(f"{path} must be a shared library: it has no dynamic section")
        self.entries = [
            struct.unpack_from("<QQ", self._bytes, place)
            for place in range(dynamic[0], sum(dynamic), 16)
        ]
        self._strings = self._place(dict(self.entries)[_DT_STRTAB])

    def _place(self, address: int) -> int:
        """Returns where in the file the byte lies that is loaded at `address`."""
        for start, length, offset in self._segments:
            if start <= address < start + length:
                return address - start + offset
        raise ValueError(f"no segment of the ELF file holds the address {address:#x}")

    def string(self, index: int) -> str:
        """Returns an entry of the string table."""
        start = self._strings + index
        return self._bytes[start : self._bytes.index(b"\0", start)].decode()

    def versions(self) -> Iterator[str]:
        """Yields the symbol versions of all libraries (Elfxx_Verneed and Elfxx_Vernaux)."""
        named = dict(self.entries)
        if _DT_VERNEED not in named:
            return
        library = self._place(named[_DT_VERNEED])
        for _ in range(named[_DT_VERNEEDNUM]):
            _, count, _, first, following = struct.unpack_from("<HHIII", self._bytes, library)
            symbol = library + first
            for _ in range(count):
                _, _, _, name, step = struct.unpack_from("<IHHII", self._bytes, symbol)
                yield self.string(name)
                symbol += step
            library += following


def read(path: pathlib.Path) -> Needs:
    """Returns what the shared library `path` needs.

    Raises:
        ValueError: the file is none, or is for a machine that has no wheel tag here.
    """
    library = _Library(path)
    names = [library.string(value) for tag, value in library.entries if tag == _DT_NEEDED]
    return Needs(library.machine, frozenset(names), frozenset(library.versions()))


# Every distribution has these, and a manylinux wheel may load them (PEP 513, 571, 599, 600).
_EVERYWHERE = {
    "ld-linux-aarch64.so.1",
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
    "libstdc++.so.6",
}

# The newest symbol versions that the distributions with this glibc, or a newer one, all have: the
# releases that auditwheel's policies are drawn from.
_POLICIES = [
    {"GLIBC": (2, 17), "GLIBCXX": (3, 4, 19), "CXXABI": (1, 3, 7), "GCC": (4, 7, 0)},
    {"GLIBC": (2, 24), "GLIBCXX": (3, 4, 22), "CXXABI": (1, 3, 10), "GCC": (4, 7, 0)},
    {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)},
    {"GLIBC": (2, 31), "GLIBCXX": (3, 4, 28), "CXXABI": (1, 3, 12), "GCC": (7, 0, 0)},
    {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (7, 0, 0)},
    {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)},
    {"GLIBC": (2, 36), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)},
    {"GLIBC": (2, 38), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)},
    {"GLIBC": (2, 39), "GLIBCXX": (3, 4, 33), "CXXABI": (1, 3, 15), "GCC": (14, 0, 0)},
    {"GLIBC": (2, 41), "GLIBCXX": (3, 4, 33), "CXXABI": (1, 3, 15), "GCC": (14, 0, 0)},
]


def _allows(policy: dict[str, tuple[int, ...]], version: str) -> bool:
    """Whether a machine of this policy has the symbol version, such as "GLIBC_2.34"."""
    family, _, number = version.rpartition("_")
    parts = number.split(".")
    if family not in policy or not all(part.isdigit() for part in parts):
        return False  # GLIBC_PRIVATE, GLIBC_ABI_DT_RELR, another library's symbols
    return tuple(int(part) for part in parts) <= policy[family]


def platform_tag(needs: list[Needs]) -> str:
    """Returns the platform tag of a wheel with these shared libraries.

    It is the manylinux tag of the oldest glibc that serves, or, where a library or a symbol is
    needed that no such tag promises, "linux_MACHINE", which promises nothing.

    Raises:
        ValueError: there is no library, or they are for different machines.
    """
    machines = {need.machine for need in needs}
    if len(machines) != 1:
        raise ValueError(f"shared libraries for one machine are needed, not for {machines or 0}")
    machine = machines.pop()
    versions = {version for need in needs for version in need.versions}
    if all(need.libraries <= _EVERYWHERE for need in needs):
        for policy in _POLICIES:
            if all(_allows(policy, version) for version in versions):
                return "manylinux_{}_{}_{}".format(*policy["GLIBC"], machine)
    return f"linux_{machine}"
