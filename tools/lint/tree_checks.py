# SPDX-License-Identifier: Apache-2.0
"""Checks of the files themselves that no off-the-shelf linter makes.

Each check is a function of (path relative to the root, text) that yields messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MAX_LINES = 450
SPDX = "SPDX-License-Identifier: Apache-2.0"

CPP = {".h", ".cuh", ".cc", ".cu"}
PYTHON = {".py", ".pyi"}
STARLARK_NAMES = {"BUILD", "BUILD.bazel", "WORKSPACE", "WORKSPACE.bazel", "MODULE.bazel"}

# A place to download from has no business in the tree: a name, a version and a hash say what is
# wanted, and the user's own pip, npm and apt know where to get it.
_ARCHIVE = re.compile(r"\w+://[^\s\"'<>)]+\.(?:whl|deb|tgz|tar\.\w+|zip)\b")
_REGISTRY = re.compile(
    r"(?:https?://|\b)[\w.-]*(?:\bpypi\.|pythonhosted|npmjs|\bdeb\.debian|archive\.ubuntu|"
    r"anaconda\.|\bbcr\.bazel|\bdownload\.|\bngc\.|\bregistry\.)[\w.-]*(?:build|com|io|net|org)\b"
)
_INDEX_OPTION = re.compile(r"--(?:extra-)?index-url|--find-links|--registry\b")


def is_cpp(path: PurePosixPath) -> bool:
    """Whether clang-format is responsible for this file."""
    return path.suffix in CPP


def is_python(path: PurePosixPath) -> bool:
    """Whether ruff and mypy are responsible for this file."""
    return path.suffix in PYTHON


def is_starlark(path: PurePosixPath) -> bool:
    """Whether buildifier is responsible for this file."""
    return path.suffix == ".bzl" or path.name in STARLARK_NAMES or path.name.endswith(".BUILD")


def is_shell(path: PurePosixPath, text: str) -> bool:
    """Whether this file is a shell script, by its name or its first line."""
    first = text.split("\n", 1)[0]
    return path.suffix == ".sh" or (first.startswith("#!") and first.rstrip().endswith("sh"))


def spdx_line(path: PurePosixPath, text: str) -> Iterator[str]:
    """A source file opens with the licence line, after `#!` where there is one."""
    if not (is_cpp(path) or is_python(path) or is_starlark(path) or is_shell(path, text)):
        return
    lines = text.split("\n", 2)
    first = lines[1] if lines[0].startswith("#!") and len(lines) > 1 else lines[0]
    mark = "//" if is_cpp(path) else "#"
    if first != f"{mark} {SPDX}":
        yield f"1: the first line must be `{mark} {SPDX}`"


def length(path: PurePosixPath, text: str) -> Iterator[str]:
    """A source file has at most MAX_LINES lines."""
    if not (is_cpp(path) or is_python(path) or is_starlark(path) or is_shell(path, text)):
        return
    lines = text.count("\n")
    if lines > MAX_LINES:
        yield f"{lines}: more than {MAX_LINES} lines; which two concepts does it hold?"


def addresses(path: PurePosixPath, text: str) -> Iterator[str]:
    """No file names a place to download packages from."""
    for number, line in enumerate(text.split("\n"), start=1):
        for pattern in (_ARCHIVE, _REGISTRY):
            found = pattern.search(line)
            if found:
                yield f"{number}: a download address: {found.group(0)}"
        # The linter itself and prose may name such an option; a script that uses one overrides
        # what the user has configured.
        if path.suffix in {".sh", ".bzl", ".lock", ".txt"} and _INDEX_OPTION.search(line):
            yield f"{number}: overrides the user's package index"


def whitespace(path: PurePosixPath, text: str) -> Iterator[str]:
    """Lines end without blanks, and the file with one newline."""
    if text and (not text.endswith("\n") or text.endswith("\n\n")):
        yield f"{text.count(chr(10))}: the file must end with exactly one newline"
    for number, line in enumerate(text.split("\n"), start=1):
        if line != line.rstrip():
            yield f"{number}: blanks or a carriage return at the end of the line"


def machine_paths(root: Path, text: str) -> Iterator[str]:
    """No file names the folder this checkout happens to lie in."""
    if len(root.parts) < 3:  # "/src" and the like may well stand in a text for another reason
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if str(root) in line:
            yield f"{number}: a path of this machine: {root}"


def all_checks(root: Path, path: PurePosixPath) -> Iterator[str]:
    """Runs every check on one file; yields `path:line: message`. Binary files pass."""
    try:
        text = (root / path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    if path.name == "LICENSE":
        return
    for check in (spdx_line, length, addresses, whitespace):
        for message in check(path, text):
            yield f"{path}:{message}"
    for message in machine_paths(root, text):
        yield f"{path}:{message}"
