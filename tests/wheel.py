# SPDX-License-Identifier: Apache-2.0
"""The wheel of this configuration: its contents, and the package as pip installs it.

pip installs it, without an index, into a fresh virtual environment, which finds PyTorch and pytest
where this test does; there the CPU tests run on the installed package.
"""

from __future__ import annotations

import base64
import csv
import email
import hashlib
import io
import os
import pathlib
import re
import subprocess
import sys
import zipfile
from typing import Any

import pytest

import fused_moe
from fused_moe import _extension

TESTS = pathlib.Path(__file__).absolute().parent
PACKAGE = pathlib.Path(fused_moe.__file__).parent
# Where the test's own packages come from; the package under test is in none of them.
SITES = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]


def the_wheel() -> pathlib.Path:
    """The one file that //python:wheel makes."""
    (wheel,) = (TESTS.parent / "python" / "wheel").iterdir()
    return wheel


def contents() -> dict[str, bytes]:
    """The wheel's files by name."""
    with zipfile.ZipFile(the_wheel()) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def information(name: str) -> bytes:
    """A file of the wheel's .dist-info folder."""
    (found,) = [
        content for path, content in contents().items() if path.endswith(f".dist-info/{name}")
    ]
    return found


def expected_version() -> str:
    """The package's version and, unless this is the default build, what it is built for."""
    built_for = _extension.C.BUILT_FOR if _extension.C else "missing"
    local = "" if built_for == "sm80" else "+" + re.sub("[_+]", ".", built_for)
    return fused_moe.__version__ + local


def test_name_and_tags() -> None:
    name, version, *tags = the_wheel().stem.split("-")
    assert (name, version) == ("fused_moe", expected_version())
    lines = information("WHEEL").decode().splitlines()
    assert "Tag: " + "-".join(tags) in lines
    assert "Root-Is-Purelib: false" in lines
    supported = pytest.importorskip("packaging.tags").sys_tags()
    assert "-".join(tags) in {str(tag) for tag in supported}


def test_metadata() -> None:
    text = information("METADATA")
    message = email.message_from_bytes(text)
    assert message["Name"] == "fused-moe"
    assert message["Version"] == expected_version()
    assert message["Requires-Dist"].startswith("torch")
    assert "# fused_moe" in message.get_payload()
    built_for = _extension.C.BUILT_FOR if _extension.C else "missing"
    assert ("NVIDIA-CUDA" in message["License-Expression"]) == (built_for != "cpu")
    licenses = message.get_all("License-File", [])
    assert "LICENSE" in licenses
    for name in licenses:
        assert information(f"licenses/{name}").strip()
    metadata = pytest.importorskip("packaging.metadata")
    metadata.Metadata.from_email(text, validate=True)  # raises for any field that is not right


def test_the_whole_package_and_nothing_else_is_inside() -> None:
    ours = {
        f"fused_moe/{path.relative_to(PACKAGE).as_posix()}": path.read_bytes()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    inside = {name: data for name, data in contents().items() if name.startswith("fused_moe/")}
    assert inside == ours
    assert {"fused_moe/py.typed", "fused_moe/_C.pyi"} <= inside.keys()
    others = {name.split("/")[0] for name in contents()} - {"fused_moe"}
    assert others == {f"fused_moe-{expected_version()}.dist-info"}


def test_record_names_every_file_with_its_hash() -> None:
    files = contents()
    rows = {
        name: (digest, size)
        for name, digest, size in csv.reader(io.StringIO(information("RECORD").decode()))
    }
    assert rows.keys() == files.keys()
    for name, (digest, size) in rows.items():
        if name.endswith("/RECORD"):
            assert (digest, size) == ("", "")
            continue
        sha256 = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=")
        assert (digest, int(size)) == (f"sha256={sha256.decode()}", len(files[name]))


def test_nothing_of_the_machine_is_inside() -> None:
    with zipfile.ZipFile(the_wheel()) as archive:
        entries = archive.infolist()
    names = [entry.filename for entry in entries]
    about = [".dist-info/" in name for name in names]
    assert about == sorted(about), "the description belongs behind the package"
    for kind in (False, True):
        part = [name for name, is_about in zip(names, about, strict=True) if is_about is kind]
        part = [name for name in part if not name.endswith("/RECORD")]
        assert part == sorted(part)
    assert names[-1].endswith("/RECORD")
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {entry.external_attr >> 16 for entry in entries} == {0o100644, 0o100755}


def run(*command: str | pathlib.Path, **environment: str) -> str:
    """Runs a program with this environment and nothing else; returns what it printed."""
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"} | environment
    result = subprocess.run(
        list(map(str, command)),
        env=environment,
        text=True,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: Any) -> pathlib.Path:
    """The interpreter of a virtual environment in which pip has installed the wheel."""
    folder = tmp_path_factory.mktemp("wheel") / "environment"
    # Debian's Python cannot give an environment a pip of its own without another package.
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir"]
    locate = "import os, pip; print(os.path.dirname(os.path.dirname(pip.__file__)))"
    where = run(sys.executable, "-c", locate).strip()
    options = ["--no-index", "--no-deps", "--ignore-installed"]
    run(*pip, "install", *options, the_wheel(), PYTHONPATH=where)
    # It says which requirements are not met, also of packages that are none of ours.
    check = subprocess.run(
        [str(part) for part in (*pip, "check")],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join([where, *SITES])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.stdout and "fused-moe" not in check.stdout, check.stdout + check.stderr
    return python


def test_installed_package(installed: pathlib.Path) -> None:
    program = """
import importlib.metadata, pathlib, sys
import fused_moe
from fused_moe import _C
print(pathlib.Path(fused_moe.__file__).is_relative_to(sys.prefix))
print(pathlib.Path(_C.__file__).is_relative_to(sys.prefix), _C.BUILT_FOR)
distribution = importlib.metadata.distribution("fused-moe")
print(distribution.version, fused_moe.__version__)
print(*sorted(e.group for e in distribution.entry_points if callable(e.load())))
"""
    text = run(installed, "-c", program, PYTHONPATH=os.pathsep.join(SITES))
    built_for = _extension.C.BUILT_FOR if _extension.C else "missing"
    versions = f"{expected_version()} {fused_moe.__version__}"
    lines = ["True", f"True {built_for}", versions, "sglang.srt.plugins vllm.general_plugins"]
    assert text.splitlines()[-len(lines) :] == lines


def test_cpu_tests_pass_on_it(installed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    files = [TESTS / f"{name}.py" for name in ("api", "bad_input", "cpu_moe", "extension")]
    # torch.compile's own start takes longer than all the rest, and sees no difference.
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-k", "not compile"]
    paths = os.pathsep.join([*SITES, str(TESTS)])
    environment = {"PYTHONPATH": paths, "HOME": str(tmp_path)}
    text = run(installed, "-m", "pytest", "--color=no", *options, *files, **environment)
    assert re.search(r"\b[1-9]\d\d+ passed", text), text
