# SPDX-License-Identifier: Apache-2.0
"""Shows that a build is reproducible: two checkouts, two output roots, the same bytes.

    ./bazelw run //tools/repro                      one kernel object, the CPU extension and wheel
    ./bazelw run //tools/repro -- TARGET ...        these targets, in the default configuration

The tree as it is (tracked files and new ones that git does not ignore) is copied to two folders
of different depth, each is built with an output root of its own, and the files of the targets are
compared. Prints their SHA-256; exit status 1 where two differ.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

# (options, targets): a kernel that is quick to compile, all C++ of the CPU extension, its wheel.
Work = list[tuple[list[str], list[str]]]
DEFAULT: Work = [
    ([], ["//moe:routing"]),
    (["--config=cpu"], ["//python/binding:_C.so", "//python:wheel"]),
]
COMPARED = (".o", ".so", ".a", ".lo", ".whl")
FOLDERS = ("first", "second/and/deeper")


def git(folder: pathlib.Path, *arguments: str) -> str:
    """Returns what git prints when run in `folder`."""
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def checkout() -> pathlib.Path:
    """Returns the root of the checkout this was started in."""
    start = os.environ.get("BUILD_WORKSPACE_DIRECTORY") or pathlib.Path(__file__).parent
    return pathlib.Path(git(pathlib.Path(start), "rev-parse", "--show-toplevel").strip())


def copy_tree(source: pathlib.Path, destination: pathlib.Path) -> None:
    """Copies what git tracks or would track."""
    text = git(source, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in sorted(set(text.split("\0")) - {""}):
        if (source / name).is_file():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, destination / name)


def bazel(tree: pathlib.Path, output_base: pathlib.Path, *arguments: str) -> str:
    """Runs Bazel in `tree` with an output root of its own; returns its standard output."""
    command = [str(tree / "bazelw"), f"--output_base={output_base}", *arguments]
    result = subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"repro: {' '.join(arguments)} failed in {tree}")
    return result.stdout


def outputs(
    tree: pathlib.Path, output_base: pathlib.Path, options: list[str], targets: list[str]
) -> dict[str, str]:
    """Builds `targets` and returns the SHA-256 of each of their files, by path.

    Raises:
        SystemExit: a target has no file that could be compared, or does not build.
    """
    # No cache that both builds could share.
    options = [*options, "--disk_cache=", "--remote_cache=", "--noshow_progress"]
    bazel(tree, output_base, "build", *options, "--", *targets)
    root = pathlib.Path(bazel(tree, output_base, "info", "execution_root").strip())
    found = {}
    for target in targets:
        # Every version of Bazel can list the outputs of a target's own actions this way.
        text = bazel(tree, output_base, "aquery", *options, target)
        lists = re.findall(r"^ *Outputs: \[(.*)\]$", text, re.MULTILINE)
        paths = [root / name.split(" (")[0] for names in lists for name in names.split(", ")]
        # A wheel lies in a folder that is the target's output, a "(TreeArtifact)".
        files = [f for path in paths for f in (path.rglob("*") if path.is_dir() else [path])]
        files = [file for file in files if file.suffix in COMPARED and file.is_file()]
        if not files:
            raise SystemExit(f"repro: {target} has none of {', '.join(COMPARED)} to compare")
        for file in files:
            name = str(file.relative_to(root))
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def compare(first: dict[str, str], second: dict[str, str]) -> int:
    """Prints each file and whether both builds agree on it; returns how many do not."""
    different = 0
    for name in sorted(first.keys() | second.keys()):
        one, two = first.get(name, "absent"), second.get(name, "absent")
        different += one != two
        print(f"{'same     ' if one == two else 'DIFFERENT'} {one[:64]}  {name}")
    return different


def main() -> None:
    """Builds twice and compares."""
    work = DEFAULT if len(sys.argv) == 1 else [([], sys.argv[1:])]
    source = checkout()
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    cache.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory(dir=cache, prefix="fused_moe_repro_") as scratch:
        for folder in FOLDERS:
            tree = pathlib.Path(scratch) / folder / "tree"
            output_base = pathlib.Path(scratch) / folder / "output"
            copy_tree(source, tree)
            found: dict[str, str] = {}
            try:
                for options, targets in work:
                    found |= outputs(tree, output_base, options, targets)
            finally:
                bazel(tree, output_base, "shutdown")
                # Bazel leaves read-only folders.
                subprocess.run(["chmod", "-R", "u+w", str(output_base)], check=False)
            results.append(found)
    different = compare(*results)
    print(f"{len(results[0])} files built twice, {different} of them different")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
