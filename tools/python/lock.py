# SPDX-License-Identifier: Apache-2.0
"""Writes the lock files again, with pip alone.

    python3 tools/python/lock.py [GROUP ...]     (all groups, if none is named)

A lock lists, for each package and version, the SHA-256 of the wheels that CPython 3.10 to 3.13
take on x86-64 Linux (glibc 2.28 and newer). Versions are the newest that pip finds unless GROUPS
pins them. pip 23.2 or newer is needed; the index is the one that pip is configured with, and a
local CPU build of PyTorch, where pip finds one, is locked beside the default build.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import tempfile

from pip._vendor.packaging.markers import default_environment
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.specifiers import SpecifierSet

ROOT = pathlib.Path(__file__).resolve().parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
GLIBC_MINORS = range(5, 29)


@dataclasses.dataclass(frozen=True)
class Group:
    """One lock file: what it is for, what is asked for, and what it leaves to other locks.

    What a lock named in `upon` lists is left out, and names that match the expression `omitted`.
    """

    path: str
    purpose: str
    requirements: tuple[str, ...]
    upon: tuple[str, ...] = ()
    with_dependencies: bool = True
    omitted: str = "(?!)"


# What only PyTorch's default build needs; its CPU build has no such requirement.
CUDA_PACKAGES = r"(cuda|nvidia)-.*|triton"

GROUPS = {
    "packages": Group(
        "tools/python/locks/packages.txt",
        "PyTorch, and what the library, its tests and its benchmark import.",
        (
            "absl-py",
            "hypothesis",
            "numpy",
            "pytest",
            "torch==2.13.0",
            "tqdm",
        ),
        omitted=CUDA_PACKAGES,
    ),
    "torch_cuda": Group(
        "tools/python/locks/torch_cuda.txt",
        "The CUDA libraries of PyTorch's default build; not needed by its CPU build.",
        ("torch===2.13.0",),
        upon=("packages",),
    ),
    "pybind11": Group(
        "tools/python/locks/pybind11.txt",
        "The headers of the extension's binding; apart, so that building it needs no PyTorch.",
        ("pybind11",),
    ),
    "plotting": Group(
        "tools/python/locks/plotting.txt",
        "What the benchmark's --plot imports.",
        ("matplotlib",),
        upon=("packages",),
    ),
    "transformers": Group(
        "tools/python/locks/transformers.txt",
        "Hugging Face transformers, for the integration's tests and the examples.",
        ("safetensors", "transformers==5.17.0"),
        upon=("packages",),
    ),
    "toolkit": Group(
        "tools/cuda/locks/toolkit.txt",
        "The CUDA compiler, its headers and the static CUDA runtime.",
        (
            "nvidia-cuda-cccl==13.0.*",
            "nvidia-cuda-crt==13.0.88",
            "nvidia-cuda-cuobjdump==13.2.51",  # the oldest there is
            "nvidia-cuda-nvcc==13.0.88",
            "nvidia-cuda-nvdisasm==13.2.51",  # cuobjdump calls it
            "nvidia-cuda-runtime==13.0.*",
            "nvidia-nvvm==13.0.88",
        ),
        with_dependencies=False,
    ),
    "cutlass": Group(
        "tools/cuda/locks/cutlass.txt",
        "The CUTLASS and CuTe headers.",
        ("nvidia-cutlass==4.2.0.0",),
        with_dependencies=False,
    ),
}


@dataclasses.dataclass
class Resolved:
    """One package as pip resolved it for one interpreter."""

    name: str
    version: str
    sha256: str
    requires: list[str]
    requires_python: str


def normalized(name: str) -> str:
    """Returns the name as indexes spell it: lower case, runs of -_. as one hyphen."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(python: str, requirements: list[str], with_dependencies: bool) -> list[Resolved]:
    """Returns what pip would install into an empty environment; raises on a conflict."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--only-binary=:all:", "--target", folder]
        command += ["--python-version", python, "--implementation", "cp"]
        command += [f"--abi={abi}" for abi in (f"cp{python.replace('.', '')}", "abi3", "none")]
        command += [f"--platform=manylinux_2_{minor}_x86_64" for minor in reversed(GLIBC_MINORS)]
        command += [f"--platform=manylinux{old}_x86_64" for old in ("2014", "2010", "1")]
        command += ["--platform=linux_x86_64", "--report", str(report)]
        command += [] if with_dependencies else ["--no-deps"]
        subprocess.run([*command, *requirements], check=True)
        installs = json.loads(report.read_text())["install"]
    return [
        Resolved(
            name=normalized(item["metadata"]["name"]),
            # A local version ("+cpu") is another build of the same release: one lock entry.
            version=item["metadata"]["version"].partition("+")[0],
            sha256=item["download_info"]["archive_info"]["hashes"]["sha256"],
            requires=item["metadata"].get("requires_dist", []),
            requires_python=item["metadata"].get("requires_python", ""),
        )
        for item in installs
    ]


def missing_dependencies(python: str, packages: list[Resolved]) -> list[str]:
    """Returns requirements of `packages` that hold for `python` and that pip left out.

    With --python-version pip still judges environment markers by the interpreter that runs it.
    """
    environment = {str(key): str(value) for key, value in default_environment().items()}
    environment |= {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    present = {package.name for package in packages}
    missing = []
    for package in packages:
        for text in package.requires:
            requirement = Requirement(text)
            if requirement.marker is None or not requirement.marker.evaluate(environment):
                continue
            if normalized(requirement.name) not in present:
                missing.append(f"{requirement.name}{requirement.specifier}")
    return sorted(set(missing))


def resolve_fully(python: str, group: Group) -> list[Resolved]:
    """Returns the packages of `group` for `python`, markers judged by that interpreter."""
    requirements = list(group.requirements)
    while True:
        packages = resolve(python, requirements, group.with_dependencies)
        more = missing_dependencies(python, packages) if group.with_dependencies else []
        # An index page need not say which interpreters a wheel is for; its metadata does.
        for package in packages:
            if not SpecifierSet(package.requires_python).contains(f"{python}.0"):
                more.append(f"{package.name}!={package.version}")
        if not more:
            return packages
        requirements += more


def locked_names(path: pathlib.Path) -> set[str]:
    """Returns the names of the packages in a lock file."""
    return set(re.findall(r"^([a-z0-9-]+)==", path.read_text(), re.MULTILINE))


def write(group: Group) -> None:
    """Resolves `group` for each interpreter and writes its lock file."""
    elsewhere = {name for lock in group.upon for name in locked_names(ROOT / GROUPS[lock].path)}
    pythons: dict[tuple[str, str], list[str]] = {}
    hashes: dict[tuple[str, str], set[str]] = {}
    for python in PYTHONS:
        packages = resolve_fully(python, group)
        if "torch==2.13.0" in group.requirements:
            # The default build too, where pip prefers a local CPU build of the same release.
            packages += resolve(python, ["torch===2.13.0"], with_dependencies=False)
        for package in packages:
            key = (package.name, package.version)
            if package.name in elsewhere or re.fullmatch(group.omitted, package.name):
                continue
            if python not in pythons.setdefault(key, []):
                pythons[key].append(python)
            hashes.setdefault(key, set()).add(package.sha256)
    lines = [f"# {group.purpose}", "# Written by tools/python/lock.py."]
    for name, version in sorted(pythons):
        here = pythons[name, version]
        marker = ""
        if here != list(PYTHONS):
            marker = " ; " + " or ".join(f'python_version == "{python}"' for python in here)
        lines.append(f"{name}=={version}{marker} \\")
        lines.append(" \\\n".join(f"    --hash=sha256:{h}" for h in sorted(hashes[name, version])))
    path = ROOT / group.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    print(f"{group.path}: {len(pythons)} packages")


def main() -> None:
    """Writes the groups named on the command line, or all."""
    unknown = [name for name in sys.argv[1:] if name not in GROUPS]
    if unknown:
        sys.exit(f"lock.py: unknown group {unknown[0]!r}; there are: {', '.join(GROUPS)}")
    for name in sys.argv[1:] or list(GROUPS):
        write(GROUPS[name])


if __name__ == "__main__":
    main()
