# SPDX-License-Identifier: Apache-2.0
"""The wheel tool on packages made here; //tests:wheel is the same for the real one."""

from __future__ import annotations

import importlib.machinery
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from typing import Any

import pytest

import elf
import make_wheel

METADATA: dict[str, Any] = {
    "classifiers": ["Typing :: Typed"],
    "entry_points": {"b.group": ["two = p:two", "one = p:one"], "a.group": ["x = p.sub:x"]},
    "extras": {"more": ["numpy>=2"]},
    "license": "Apache-2.0",
    "local_version": "",
    "name": "p-q",
    "requires": ["torch>=2.4"],
    "requires_python": ">=3.10",
    "summary": "A package",
}


def libraries() -> list[pathlib.Path]:
    """Shared libraries of the standard library; some need nothing, not even the C library."""
    folder = pathlib.Path(sysconfig.get_paths()["platstdlib"]) / "lib-dynload"
    return sorted(folder.glob("*.so"))[:30]


def write_package(root: pathlib.Path, order: int) -> pathlib.Path:
    """Writes the package `p`, its files in an order of their own and with modes of their own."""
    package = root / "p"
    names = ["__init__.py", "sub/__init__.py", "sub/z.py", "a.py", "py.typed"]
    random.Random(order).shuffle(names)
    for name in names:
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('__version__ = "1.2.3"\n' if name == "__init__.py" else f"# {name}\n")
        path.chmod(0o600 + 0o44 * order)
        os.utime(path, (1e9 * (order + 1), 1e9 * (order + 1)))
    shutil.copy(libraries()[0], package / "_C.cpython-311-x86_64-linux-gnu.so")
    return package


def make(root: pathlib.Path, order: int = 0, **changes: Any) -> pathlib.Path:
    """Makes the wheel of `write_package`, with changed metadata."""
    output = root / "out"
    output.mkdir(parents=True)
    licenses = {"third_party/x/LICENSE": b"x", "LICENSE": b"ours"}
    package = write_package(root, order)
    return make_wheel.make_wheel(package, METADATA | changes, "# Title\n", licenses, output)


def test_the_same_package_gives_the_same_bytes(tmp_path: pathlib.Path) -> None:
    wheels = [make(tmp_path / str(order), order) for order in (0, 1)]
    assert wheels[0].name == wheels[1].name
    assert wheels[0].read_bytes() == wheels[1].read_bytes()


def test_entries(tmp_path: pathlib.Path) -> None:
    wheel = make(tmp_path)
    assert wheel.name.startswith("p_q-1.2.3-cp311-cp311-")
    with zipfile.ZipFile(wheel) as archive:
        names = [
            "p/_C.cpython-311-x86_64-linux-gnu.so",
            "p/__init__.py",
            "p/a.py",
            "p/py.typed",
            "p/sub/__init__.py",
            "p/sub/z.py",
            "p_q-1.2.3.dist-info/METADATA",
            "p_q-1.2.3.dist-info/WHEEL",
            "p_q-1.2.3.dist-info/entry_points.txt",
            "p_q-1.2.3.dist-info/licenses/LICENSE",
            "p_q-1.2.3.dist-info/licenses/third_party/x/LICENSE",
            "p_q-1.2.3.dist-info/RECORD",
        ]
        assert archive.namelist() == names
        assert archive.read("p_q-1.2.3.dist-info/entry_points.txt").decode() == (
            "[a.group]\nx = p.sub:x\n\n[b.group]\none = p:one\ntwo = p:two\n"
        )
        lines = archive.read("p_q-1.2.3.dist-info/METADATA").decode().split("\n")
        assert lines[:4] == ["Metadata-Version: 2.4", "Name: p-q", "Version: 1.2.3", lines[3]]
        assert 'Requires-Dist: numpy>=2 ; extra == "more"' in lines
        assert lines[-3:] == ["", "# Title", ""]


def test_no_entry_points_and_a_local_version(tmp_path: pathlib.Path) -> None:
    wheel = make(tmp_path, entry_points={}, local_version="cpu")
    assert wheel.name.startswith("p_q-1.2.3+cpu-cp311-cp311-")
    with zipfile.ZipFile(wheel) as archive:
        assert "p_q-1.2.3+cpu.dist-info/METADATA" in archive.namelist()
        assert not [name for name in archive.namelist() if "entry_points" in name]


@pytest.mark.parametrize(
    ("text", "version"), [('__version__ = "0.1.0"', "0.1.0"), ('x = 1\n__version__ = "2"', "2")]
)
def test_version(tmp_path: pathlib.Path, text: str, version: str) -> None:
    (tmp_path / "__init__.py").write_text(text)
    assert make_wheel.version_of(tmp_path) == version


@pytest.mark.parametrize("text", ["", "__version__ = 1", "import v\n__version__ = v.x", "v = '1'"])
def test_no_version(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "__init__.py").write_text(text)
    with pytest.raises(ValueError, match=r"__init__\.py must hold a line `__version__ = "):
        make_wheel.version_of(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "tags"),
    [
        (".cpython-310-x86_64-linux-gnu.so", "cp310-cp310"),
        (".cpython-313t-x86_64-linux-gnu.so", "cp313-cp313t"),
        (".cpython-312d-x86_64-linux-gnu.so", "cp312-cp312d"),
    ],
)
def test_python_tags(suffix: str, tags: str) -> None:
    assert make_wheel.python_tags([pathlib.Path("_C" + suffix), pathlib.Path("D" + suffix)]) == tags


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["_C.so"],
        ["_C.abi3.so"],
        ["_C.pypy310-pp73-x86_64-linux-gnu.so"],
        ["_C.cpython-310-x86_64-linux-gnu.so", "_C.cpython-311-x86_64-linux-gnu.so"],
    ],
)
def test_no_python_tag(names: list[str]) -> None:
    with pytest.raises(ValueError, match=r"must be named|one Python are needed"):
        make_wheel.python_tags([pathlib.Path(name) for name in names])


def test_the_interpreters_own_tag() -> None:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    tag = "cp{}{}".format(*sys.version_info[:2])
    assert make_wheel.python_tags([pathlib.Path("_C" + suffix)]).startswith(tag + "-" + tag)


def test_reading_libraries() -> None:
    needs = [elf.read(path) for path in libraries()]
    assert {need.machine for need in needs} == {os.uname().machine}
    of_c = [need for need in needs if "libc.so.6" in need.libraries]
    assert any(version.startswith("GLIBC_2.") for need in of_c for version in need.versions)


@pytest.mark.skipif(not shutil.which("objdump"), reason="no objdump (binutils) to compare with")
def test_reading_as_binutils_does() -> None:
    for path in libraries():
        text = subprocess.run(
            ["objdump", "-p", str(path)], capture_output=True, text=True, check=True
        ).stdout
        needs = elf.read(path)
        assert needs.libraries == set(re.findall(r"NEEDED +(\S+)", text))
        asked = text.partition("Version References:")[2]
        assert needs.versions == set(re.findall(r"0x\w+ 0x\w+ \d+ (\S+)", asked))


def test_not_a_library(tmp_path: pathlib.Path) -> None:
    (tmp_path / "_C.so").write_bytes(b"\x7fELF\x01" + bytes(100))
    with pytest.raises(ValueError, match="must be a 64-bit little-endian ELF file"):
        elf.read(tmp_path / "_C.so")


@pytest.mark.parametrize(
    ("libraries", "versions", "tag"),
    [
        ({"libc.so.6"}, set(), "manylinux_2_17_x86_64"),
        ({"libc.so.6"}, {"GLIBC_2.2.5", "GLIBC_2.17"}, "manylinux_2_17_x86_64"),
        ({"libc.so.6"}, {"GLIBC_2.18"}, "manylinux_2_24_x86_64"),
        ({"libc.so.6", "libstdc++.so.6"}, {"GLIBCXX_3.4.29"}, "manylinux_2_34_x86_64"),
        ({"libc.so.6"}, {"GLIBC_2.34", "CXXABI_1.3.15"}, "manylinux_2_39_x86_64"),
        ({"libc.so.6"}, {"GLIBC_2.99"}, "linux_x86_64"),
        ({"libc.so.6"}, {"GLIBC_PRIVATE"}, "linux_x86_64"),
        ({"libc.so.6"}, {"GLIBC_ABI_DT_RELR"}, "linux_x86_64"),
        ({"libc.so.6", "libcudart.so.13"}, {"GLIBC_2.17"}, "linux_x86_64"),
    ],
)
def test_platform_tag(libraries: set[str], versions: set[str], tag: str) -> None:
    quiet = elf.Needs("x86_64", frozenset({"libc.so.6"}), frozenset())
    needs = elf.Needs("x86_64", frozenset(libraries), frozenset(versions))
    assert elf.platform_tag([quiet, needs]) == tag


def test_no_platform_tag() -> None:
    needs = [elf.Needs(m, frozenset(), frozenset()) for m in ("x86_64", "aarch64")]
    for wrong in ([], needs):
        with pytest.raises(ValueError, match="for one machine are needed"):
            elf.platform_tag(wrong)
