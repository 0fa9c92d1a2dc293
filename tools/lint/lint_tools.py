# SPDX-License-Identifier: Apache-2.0
"""Fetches the linters, pinned and hashed, through the package clients as they are configured.

Each set of tools lies in a cache folder named for the lock it came from, so a changed lock is a
new folder and an old checkout still finds its own. Nothing here names an address to fetch from:
pip and npm know where this machine gets its packages.
"""

from __future__ import annotations

import base64
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements.lock"
BUILDIFIER = HERE / "buildifier.lock"


class ToolMissing(Exception):
    """A linter could not be had; the message says which, why and what to do."""


@dataclass(frozen=True)
class PythonTools:
    """The folder that pip filled from requirements.lock."""

    folder: Path

    @property
    def clang_format(self) -> list[str]:
        """The command that runs clang-format: the binary itself, not the wheel's Python wrapper."""
        return [str(self.folder / "clang_format" / "data" / "bin" / "clang-format")]

    @property
    def ruff(self) -> list[str]:
        """The command that runs ruff."""
        return [str(self.folder / "bin" / "ruff")]

    @property
    def mypy(self) -> list[str]:
        """The command that runs mypy under this interpreter, finding mypy in the folder."""
        start = "import sys; sys.path.insert(0, sys.argv.pop(1)); from mypy.__main__ import "
        return [sys.executable, "-c", start + "console_entry as f; f()", str(self.folder)]


def cache_root() -> Path:
    """The folder that keeps fetched linters between runs, shared by all checkouts."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fused_moe_lint"


def _once(name: str, lock: Path, fill: Callable[[Path], None]) -> Path:
    """Returns the cache folder of a lock file, made by `fill` on first use.

    It is filled under another name and renamed when complete: an interrupted or parallel run
    never leaves half a tool behind.
    """
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()[:16]
    folder = cache_root() / f"{name}-{digest}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        filled = Path(scratch) / "filled"
        filled.mkdir()
        fill(filled)
        try:
            filled.rename(folder)
        except OSError:
            if not folder.is_dir():  # else a parallel run was first: its folder is the same
                raise
    return folder


def _run(what: str, lock: Path, command: list[str], folder: Path) -> str:
    """Runs a package client in `folder`; returns what it printed, or raises naming the lock."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ToolMissing(f"{what} of {lock.name} failed:\n{(done.stdout + done.stderr).strip()}")
    return done.stdout


def python_tools() -> PythonTools:
    """clang-format, ruff and mypy from requirements.lock; pip checks every hash."""

    def fill(folder: Path) -> None:
        probe = [sys.executable, "-m", "pip", "--version"]
        if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
            raise ToolMissing(
                f"{sys.executable} has no pip to fetch clang-format, ruff and mypy with: "
                "apt-get install python3-pip"
            )
        flags = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--quiet"]
        flags += ["--disable-pip-version-check", "--no-warn-script-location", "--target", "."]
        command = [*probe[:3], "install", *flags, "-r", str(REQUIREMENTS)]
        _run("pip install", REQUIREMENTS, command, folder)

    tag = f"{sys.implementation.cache_tag}-{platform.machine()}"
    return PythonTools(_once(f"python-{tag}", REQUIREMENTS, fill))


def buildifier() -> list[str]:
    """The command that runs buildifier, from npm's package, checked against buildifier.lock."""
    package, integrity = [
        line for line in BUILDIFIER.read_text().split("\n") if line and not line.startswith("#")
    ]
    machines = {"x86_64": "amd64", "aarch64": "arm64"}
    if platform.machine() not in machines:
        raise ToolMissing(f"{package} has no binary for {platform.machine()}")
    member = f"package/buildifier-linux_{machines[platform.machine()]}"

    def fill(folder: Path) -> None:
        if shutil.which("npm") is None:
            raise ToolMissing(
                f"npm is not installed, and buildifier comes as the npm package {package}: "
                "apt-get install npm, or pass --skip=starlark to go without the Starlark check"
            )
        _run("npm pack", BUILDIFIER, ["npm", "pack", "--silent", package], folder)
        (archive,) = folder.glob("*.tgz")
        algorithm, expected = integrity.split("-", 1)
        digest = hashlib.new(algorithm, archive.read_bytes()).digest()
        if base64.b64encode(digest).decode() != expected:
            raise ToolMissing(
                f"{package} is not the package that {BUILDIFIER.name} names: its {algorithm} is "
                f"{base64.b64encode(digest).decode()}, the lock says {expected}"
            )
        with tarfile.open(archive) as packed:
            source = packed.extractfile(member)
            if source is None:
                raise ToolMissing(f"{package} holds no file {member}")
            binary = folder / "buildifier"
            binary.write_bytes(source.read())
        binary.chmod(0o755)
        archive.unlink()

    return [str(_once(f"buildifier-{platform.machine()}", BUILDIFIER, fill) / "buildifier")]
