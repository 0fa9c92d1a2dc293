# SPDX-License-Identifier: Apache-2.0
"""Fat binaries inside a shared library: what they hold, and how to leave most of it out.

A library compiled by nvcc has a section .nv_fatbin, a row of fat binaries, one a source file. Each
is a header of 16 bytes (magic, version, header size, size of the rest) and entries, each a header
(kind, version, header size, payload size, ..., architecture at byte 28) and a payload, machine code
or PTX, usually compressed. There is no public description; this is what `fatbinary` of CUDA 13
writes, read with a hex dump.

A fat binary is replaced where it lies, by one that is no longer, and zeros up to its old end, so
that no address in the library changes.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator

PTX, ELF = 1, 2
_MAGIC = 0xBA55ED50
_HEADER = struct.Struct("<IHHQ")
_ENTRY = struct.Struct("<HHIQ")
_ARCH_OFFSET = 28


@dataclasses.dataclass(frozen=True)
class Entry:
    """One image: `kind` is PTX or ELF, `arch` such as 80; `number` counts its kind in the file.

    cuobjdump's lists and the names of the files it extracts count from 1 in the same order.
    """

    kind: int
    arch: int
    number: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Fatbin:
    """One fat binary at [start, end) of the file."""

    start: int
    end: int
    entries: tuple[Entry, ...]


def section(data: bytes, name: str) -> tuple[int, int]:
    """Where a section of a 64-bit ELF file lies: its first and its past-the-end offset.

    Raises:
        ValueError: no ELF file, or no such section.
    """
    if data[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF file")
    table, size, count, names = struct.unpack_from("<Q10xHHH", data, 40)
    headers = [struct.unpack_from("<IIQQQQ", data, table + size * i) for i in range(count)]
    strings = headers[names][4]
    for header in headers:
        begin = strings + header[0]
        if data[begin : data.index(b"\0", begin)].decode() == name:
            return header[4], header[4] + header[5]
    raise ValueError(f"no section {name}")


def fatbins(data: bytes) -> Iterator[Fatbin]:
    """The fat binaries of a library, in file order."""
    position, end = section(data, ".nv_fatbin")
    numbers = {PTX: 0, ELF: 0}
    while position + _HEADER.size <= end:
        magic, _, header_size, size = _HEADER.unpack_from(data, position)
        if magic != _MAGIC:
            position = position // 8 * 8 + 8  # padding between two
            continue
        start, position = position, position + header_size
        stop = position + size
        entries = []
        while position < stop:
            kind, _, entry_header, payload = _ENTRY.unpack_from(data, position)
            (arch,) = struct.unpack_from("<I", data, position + _ARCH_OFFSET)
            numbers[kind] = numbers.get(kind, 0) + 1
            following = position + entry_header + payload
            entries.append(Entry(kind, arch, numbers[kind], position, following))
            position = following
        if position != stop:
            raise ValueError(f"the fat binary at {start:#x} does not end where it says")
        yield Fatbin(start, stop, tuple(entries))


def replaced(data: bytes, choose: Callable[[Fatbin], bytes | list[Entry]]) -> bytes:
    """The library with each fat binary replaced.

    Args:
        data: the library.
        choose: what takes the place of one: a whole fat binary, or those of its entries to keep
            (which may be none).

    Raises:
        ValueError: a replacement is longer than what it replaces.
    """
    out = bytearray(data)
    for fatbin in fatbins(data):
        chosen = choose(fatbin)
        if not isinstance(chosen, bytes):
            payload = b"".join(data[entry.start : entry.end] for entry in chosen)
            _, version, header_size, _ = _HEADER.unpack_from(data, fatbin.start)
            chosen = _HEADER.pack(_MAGIC, version, header_size, len(payload)) + payload
        room = fatbin.end - fatbin.start
        if len(chosen) > room:
            raise ValueError(f"{len(chosen)} bytes do not fit into the {room} of {fatbin.start:#x}")
        out[fatbin.start : fatbin.end] = chosen + bytes(room - len(chosen))
    return bytes(out)
