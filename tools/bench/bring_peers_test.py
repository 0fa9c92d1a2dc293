# SPDX-License-Identifier: Apache-2.0
"""Cutting libraries down and importing parts of a package, on small ones made here."""

from __future__ import annotations

import importlib
import pathlib
import struct
import sys
import tarfile
from collections.abc import Iterator
from typing import Any

import pytest

import bring_peers
import fatbin
from peers import foreign

_MAGIC = 0xBA55ED50


def entry(kind: int, arch: int, payload: bytes) -> bytes:
    header = struct.pack("<HHIQ12xI", kind, 0x101, 64, len(payload), arch)
    return header.ljust(64, b"\0") + payload


def fat(*entries: bytes) -> bytes:
    return struct.pack("<IHHQ", _MAGIC, 1, 16, sum(map(len, entries))) + b"".join(entries)


def library(content: bytes) -> bytes:
    """An ELF file with the content in .nv_fatbin, and nothing that could run."""
    names = b"\0.nv_fatbin\0.shstrtab\0"
    at = 64
    name_at = at + len(content)
    table = name_at + len(names)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack("<HHIQQQ", 3, 62, 1, 0, 0, table)
    header += struct.pack("<IHHHHHH", 0, 64, 0, 0, 64, 3, 2)
    sections = [(0, 0, 0, 0), (1, 1, at, len(content)), (12, 3, name_at, len(names))]
    rows = b"".join(
        struct.pack("<IIQQQQ", name, kind, 0, 0, offset, size).ljust(64, b"\0")
        for name, kind, offset, size in sections
    )
    return header + content + names + rows


def test_the_entries_of_fat_binaries() -> None:
    first = fat(entry(2, 80, b"A" * 8), entry(1, 80, b"P" * 16), entry(2, 90, b"B" * 24))
    data = library(first + bytes(8) + fat(entry(2, 90, b"C" * 8)))
    found = list(fatbin.fatbins(data))
    assert [[(e.kind, e.arch, e.number) for e in f.entries] for f in found] == [
        [(fatbin.ELF, 80, 1), (fatbin.PTX, 80, 1), (fatbin.ELF, 90, 2)],
        [(fatbin.ELF, 90, 3)],
    ]
    assert data[found[0].entries[2].start + 64 : found[0].entries[2].end] == b"B" * 24


def test_replacing_moves_nothing() -> None:
    data = library(
        fat(entry(2, 80, b"A" * 8), entry(2, 90, b"B" * 24)) + fat(entry(2, 80, b"C" * 8))
    )
    cut = fatbin.replaced(data, lambda f: [e for e in f.entries if e.arch == 90])
    assert len(cut) == len(data)
    first, second = fatbin.fatbins(cut)
    starts = [f.start for f in fatbin.fatbins(data)]
    assert [first.start, second.start] == starts
    assert [(e.arch, cut[e.end - 24 : e.end]) for e in first.entries] == [(90, b"B" * 24)]
    assert second.entries == ()
    assert b"A" * 8 not in cut and b"C" * 8 not in cut
    whole = fat(entry(2, 90, b"D"))
    replaced = fatbin.replaced(data, lambda f: whole if f.start == starts[0] else list(f.entries))
    assert [[e.arch for e in f.entries] for f in fatbin.fatbins(replaced)] == [[90], [80]]
    with pytest.raises(ValueError, match="do not fit"):
        fatbin.replaced(data, lambda f: bytes(1000))


def test_what_is_no_library_is_refused() -> None:
    with pytest.raises(ValueError, match="ELF"):
        list(fatbin.fatbins(b"nothing of the kind"))
    with pytest.raises(ValueError, match="no section"):
        fatbin.section(library(b""), ".other")


def test_ptx_is_reduced_to_the_wanted_kernels() -> None:
    text = ".version 9.0\n.extern .shared x[];\n\n"
    kernels = ["_Z3fooILi1EEv", "_Z3barv", "_Z3fooILi2EEv"]
    text += "".join(f".visible .entry {name}(\n.param a\n)\n{{ ret; }}\n" for name in kernels)
    kept = bring_peers.wanted_ptx(text, ("foo",))
    assert kept is not None
    assert kept.startswith(".version 9.0\n.extern")
    assert kept.count(".visible .entry") == 2 and "bar" not in kept
    assert bring_peers.wanted_ptx(text, ("fooILi2E",)) == text.split(".visible")[0] + (
        ".visible .entry _Z3fooILi2EEv(\n.param a\n)\n{ ret; }\n"
    )
    assert bring_peers.wanted_ptx(text, ("none",)) is None


@pytest.fixture
def engine(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A package of which one file is to be had."""
    (tmp_path / "engine_x" / "deep").mkdir(parents=True)
    (tmp_path / "engine_x" / "__init__.py").write_text("raise RuntimeError('too much')\n")
    (tmp_path / "engine_x" / "deep" / "real.py").write_text(
        "import engine_x.settings as settings\n"
        "from engine_x import tools\n"
        "from engine_x.heavy import Base, FLAG\n"
        "class Child(Base):\n"
        "    pass\n"
        "def value(default=Base()):\n"
        "    return settings.NUMBER + tools.twice(1)\n"
    )
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] == "engine_x"]:
        del sys.modules[name]


def test_one_file_of_a_package_is_imported(engine: pathlib.Path) -> None:
    known: dict[str, dict[str, Any]] = {
        "engine_x.settings": {"NUMBER": 40},
        "engine_x.tools": {"twice": lambda x: 2 * x},
    }
    foreign.install(engine, "engine_x", ["engine_x.deep.real"], known)
    real = importlib.import_module("engine_x.deep.real")
    assert real.value() == 42
    assert issubclass(real.Base, foreign.Placeholder)
    with pytest.raises(AttributeError, match="left out"):
        real.Base().anything()
    known["engine_x.settings"]["NUMBER"] = 1
    foreign.install(engine, "engine_x", ["engine_x.deep.real"], known)
    assert importlib.import_module("engine_x.deep.real").value() == 3


def test_a_missing_file_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ImportError, match=r"gone\.py is missing"):
        foreign.install(tmp_path, "engine_x", ["engine_x.gone"], {})


def test_an_installed_package_is_not_mixed_with(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ImportError, match="json is installed"):
        importlib.import_module("json")
        foreign.install(tmp_path, "json", [], {})


def test_the_archive_is_unpacked_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign.tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    (tmp_path / "file").write_text("text")
    with tarfile.open(tmp_path / "peers.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "file", "a/file")
        archive.add(tmp_path / "file", "../escaped")
    folder = foreign.unpacked(str(tmp_path / "peers.tar.xz"))
    assert (folder / "a" / "file").read_text() == "text"
    assert not (folder.parent / "escaped").exists()
    assert foreign.unpacked(str(tmp_path / "peers.tar.xz")) == folder
    assert foreign.unpacked(str(folder)) == folder
    with pytest.raises(ImportError, match="bring_peers"):
        foreign.unpacked(str(tmp_path / "none"))
