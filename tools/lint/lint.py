# SPDX-License-Identifier: Apache-2.0
"""Runs every linter over the tree: `./bazelw run //tools/lint`, and `-- --fix` to format.

Without Bazel, from anywhere in the checkout: `python3 tools/lint/lint.py [--fix]`.
It looks at the files git tracks and at new ones it does not ignore. Exit status 0 means that
every check ran and found nothing; a check that could not run is a failure unless --skip names it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import lint_tools
import tree_checks

Files = list[PurePosixPath]

# module-docstring: BUILD files need none. unnamed-macro: a macro for a WORKSPACE declares
# repositories, whose names are not the caller's to choose.
STARLARK_WARNINGS_OFF = "-module-docstring,-unnamed-macro"


def repository() -> Path:
    """The checkout to look at: where `bazel run` was called, else where this file lies."""
    start = os.environ.get("BUILD_WORKSPACE_DIRECTORY") or str(Path(__file__).resolve().parent)
    command = ["git", "-C", start, "rev-parse", "--show-toplevel"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"lint: {start} is not in a git checkout: {done.stderr.strip()}")
    return Path(done.stdout.strip())


def tree_files(root: Path) -> Files:
    """Every file git tracks or would track, as it is in the working tree; links are left out."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others"]
    out = subprocess.run([*command, "--exclude-standard"], capture_output=True, check=True).stdout
    names = sorted(set(out.decode().split("\0")) - {""})
    return [
        PurePosixPath(name)
        for name in names
        if (root / name).is_file() and not (root / name).is_symlink()
    ]


class Lint:
    """One run over the tree; each method is a check that returns whether it found nothing."""

    def __init__(self, root: Path, files: Files, fix: bool) -> None:
        self.root = root
        self.files = files
        self.fix = fix

    def _call(self, command: list[str], files: Files) -> bool:
        """Runs one linter on the files from the root, its output going straight to the user."""
        if not files:
            return True
        sys.stdout.flush()
        whole = [*command, *map(str, files)]
        return subprocess.run(whole, cwd=self.root, check=False).returncode == 0

    def _only(self, wanted: Callable[[PurePosixPath], bool]) -> Files:
        return [path for path in self.files if wanted(path)]

    def tree(self) -> bool:
        """Licence line, length, addresses, blanks, machine paths."""
        clean = True
        for path in self.files:
            for message in tree_checks.all_checks(self.root, path):
                print(message)
                clean = False
        return clean

    def cpp(self) -> bool:
        """clang-format over C++ and CUDA."""
        files = self._only(tree_checks.is_cpp)
        command = lint_tools.python_tools().clang_format
        if self.fix or not files:
            return self._call([*command, "-i"], files)
        # Its own report is three lines for each blank; a line number for each place says as much.
        command = [*command, "--dry-run", "--Werror", *map(str, files)]
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=False)
        places: dict[str, list[str]] = {}
        for name, line in re.findall(r"^(\S+?):(\d+):\d+: ", done.stderr, re.MULTILINE):
            if line not in places.setdefault(name, []):
                places[name].append(line)
        for name, lines in places.items():
            print(f"{name}: not formatted at line {', '.join(lines[:12])}; --fix does it")
        if done.returncode != 0 and not places:
            print(done.stderr)
        return done.returncode == 0

    def python(self) -> bool:
        """Ruff, its linter and its formatter."""
        files = self._only(tree_checks.is_python)
        ruff = lint_tools.python_tools().ruff
        check = [*ruff, "check", "--quiet", "--no-cache", *(["--fix"] if self.fix else [])]
        form = [*ruff, "format", "--quiet", "--no-cache", *([] if self.fix else ["--diff"])]
        found = [self._call(command, files) for command in (check, form)]
        return all(found)

    def types(self) -> bool:
        """Mypy over all Python files at once."""
        command = [*lint_tools.python_tools().mypy, "--no-error-summary"]
        command += ["--config-file", "pyproject.toml", "--cache-dir", os.devnull]
        files = self._only(tree_checks.is_python)
        if not files:
            return True
        whole = [*command, *map(str, files)]
        done = subprocess.run(whole, cwd=self.root, capture_output=True, text=True, check=False)
        # Its notes list every overload of subprocess.run; the error before them is enough.
        lines = [line for line in done.stdout.splitlines() if ": note: " not in line]
        print("\n".join([*lines, *done.stderr.splitlines()]), end="\n" if done.returncode else "")
        return done.returncode == 0

    def starlark(self) -> bool:
        """buildifier, its formatter and its warnings."""
        mode = ["-mode=fix"] if self.fix else ["-mode=diff"]
        lint = ["-lint=warn", f"-warnings={STARLARK_WARNINGS_OFF}"]
        command = [*lint_tools.buildifier(), *mode, *lint]
        return self._call(command, self._only(tree_checks.is_starlark))

    def shell(self) -> bool:
        """Bash parses every script."""
        clean = True
        for path in self.files:
            if path.suffix in {"", ".sh"} and self._is_script(path):
                clean = self._call(["bash", "-n"], [path]) and clean
        return clean

    def _is_script(self, path: PurePosixPath) -> bool:
        try:
            text = (self.root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return False
        return tree_checks.is_shell(path, text)


CHECKS = ("tree", "cpp", "python", "types", "starlark", "shell")


def main() -> int:
    """Runs the checks asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--fix", action="store_true", help="format the files in place")
    parser.add_argument("--skip", action="append", default=[], choices=CHECKS, metavar="CHECK")
    parser.add_argument("--only", action="append", default=[], choices=CHECKS, metavar="CHECK")
    parser.add_argument("paths", nargs="*", help="only the files at or below these paths")
    args = parser.parse_args()

    root = repository()
    files = tree_files(root)
    if args.paths:
        below = {name: PurePosixPath(name) for name in args.paths}
        found = {
            name: [path for path in files if path == top or top in path.parents]
            for name, top in below.items()
        }
        for name in found:
            if not found[name]:
                raise SystemExit(f"lint: no file of the tree lies at or below {name}, from {root}")
        files = sorted({path for paths in found.values() for path in paths})
    run = Lint(root, files, args.fix)
    outcome = {}
    for name in CHECKS:
        if name in args.skip or (args.only and name not in args.only):
            outcome[name] = "not run"
            continue
        try:
            outcome[name] = "ok" if getattr(run, name)() else "FAILED"
        except lint_tools.ToolMissing as missing:
            print(f"lint: {missing}")
            outcome[name] = "FAILED: could not run"
    for name, word in outcome.items():
        print(f"{name:9} {word}")
    return 1 if any(word.startswith("FAILED") for word in outcome.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
