# SPDX-License-Identifier: Apache-2.0
"""Each check of the tree finds what it is for, and leaves alone what is fine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

import tree_checks

SPDX = tree_checks.SPDX
Check = Callable[[PurePosixPath, str], Iterator[str]]

CASES: list[tuple[Check, str, str, bool]] = [
    # (check, path, text, whether it is fine)
    (tree_checks.spdx_line, "a.py", f"# {SPDX}\n", True),
    (tree_checks.spdx_line, "a.py", f"#!/usr/bin/env python3\n# {SPDX}\n", True),
    (tree_checks.spdx_line, "a.py", f'"""Text."""\n# {SPDX}\n', False),
    (tree_checks.spdx_line, "a.cu", f"// {SPDX}\n", True),
    (tree_checks.spdx_line, "a.cu", f"# {SPDX}\n", False),
    (tree_checks.spdx_line, "x/BUILD.bazel", 'cc_library(name = "a")\n', False),
    (tree_checks.spdx_line, "run", "#!/usr/bin/env bash\ntrue\n", False),
    (tree_checks.spdx_line, "notes.md", "text\n", True),
    (tree_checks.length, "a.cuh", "\n" * tree_checks.MAX_LINES, True),
    (tree_checks.length, "a.cuh", "\n" * (tree_checks.MAX_LINES + 1), False),
    (tree_checks.length, "a.lock", "\n" * 1000, True),
    # Put together here, for the linter reads this file too.
    (tree_checks.addresses, "a.md", "https://example.com/a-1.0-py3-none-any" + ".whl\n", False),
    (tree_checks.addresses, "a.md", "https://example.com/a" + ".tar.gz\n", False),
    (tree_checks.addresses, "a.md", "https://py" + "pi.org/simple\n", False),
    (tree_checks.addresses, "a.txt", "https://down" + "load.pytorch.org/whl/cpu\n", False),
    (tree_checks.addresses, ".bazelrc", "--registry=https://bcr." + "bazel.build\n", False),
    (tree_checks.addresses, "a.sh", "npm --reg" + "istry=x\n", False),
    (tree_checks.addresses, "a.md", "https://semver.org/spec/v2.0.0.html, PyPI, npm\n", True),
    (tree_checks.addresses, "a.py", "path.name.endswith('.tar.gz')\n", True),
    (tree_checks.whitespace, "a.md", "text\n", True),
    (tree_checks.whitespace, "a.md", "", True),
    (tree_checks.whitespace, "a.md", "text", False),
    (tree_checks.whitespace, "a.md", "text\n\n", False),
    (tree_checks.whitespace, "a.md", "text \n", False),
    (tree_checks.whitespace, "a.md", "text\r\n", False),
]


@pytest.mark.parametrize(("check", "path", "text", "fine"), CASES)
def test_check(check: Check, path: str, text: str, fine: bool) -> None:
    messages = list(check(PurePosixPath(path), text))
    assert (not messages) == fine, messages


def test_machine_path() -> None:
    root = Path("/home/someone/fused_moe")
    assert list(tree_checks.machine_paths(root, f"ok\nsee {root}/moe\n")) == [
        f"2: a path of this machine: {root}"
    ]
    assert not list(tree_checks.machine_paths(root, "see moe/layer.cc\n"))


def test_binary_files_pass(tmp_path: Path) -> None:
    (tmp_path / "plot.png").write_bytes(b"\x89PNG\xff\xfe")
    assert not list(tree_checks.all_checks(tmp_path, PurePosixPath("plot.png")))
