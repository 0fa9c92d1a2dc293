# SPDX-License-Identifier: Apache-2.0
"""Downloads the wheels of a lock file with pip and unpacks them into one site-packages tree.

    python3 fetch.py --lock FILE --destination FOLDER [--cuda-lock FILE] [--compile]

pip uses the index, proxy and certificate settings it is configured with, and accepts only wheels
whose SHA-256 the lock lists. With --cuda-lock, that lock follows if the PyTorch taken is not a CPU
build. Exits with one message that names the package, its version and the lock file.
"""

from __future__ import annotations

import argparse
import compileall
import importlib.util
import pathlib
import py_compile
import re
import subprocess
import sys
import tempfile
import zipfile

SUPPORTED = ((3, 10), (3, 13))


def fail(lock: str, what: str, log: str = "") -> None:
    """Ends the program, naming the lock file."""
    sys.exit(f"{log.strip()}\n\nfused_moe: {what} (lock file: {lock})")


def explain(lock: str, log: str) -> None:
    """Ends the program with what pip's output means."""
    text = pathlib.Path(lock).read_text()
    entries = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE))
    changed = re.search(r"^\s+([A-Za-z0-9._-]+)==([^\s;]+).*? from ", log, re.MULTILINE)
    if "DO NOT MATCH THE HASHES" in log:
        which = f"package {changed.group(1)} {changed.group(2)}" if changed else "a package"
        fail(lock, f"{which} has changed: its wheel's SHA-256 is not a locked one", log)
    if "after connection broken by" in log:
        what = "a package index does not answer pip, see above; CONTRIBUTING.md says under "
        fail(lock, what + "'Without a network' how to build without one", log)
    missing = re.search(r"No matching distribution found for ([A-Za-z0-9._-]+)==([^\s;(]+)", log)
    if missing:
        python = "{}.{}".format(*sys.version_info)
        what = f"package {missing.group(1)} {missing.group(2)} is missing"
        fail(lock, f"{what}: pip finds no wheel of it for Python {python} on this machine", log)
    names = ", ".join(f"{name} {version}" for name, version in entries.items())
    fail(lock, f"pip could not download all of: {names}", log)


def pip_download(
    lock: str | pathlib.Path, folder: pathlib.Path
) -> subprocess.CompletedProcess[str]:
    """Downloads the wheels of `lock` into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--progress-bar=off", "--disable-pip-version-check"]
    command += ["--dest", str(folder), "--requirement", str(lock)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def download(lock: str, folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the wheels of `lock`, downloaded into `folder`.

    PyTorch's CPU build is asked for by name first: between builds of one version pip prefers the
    one whose hash its index tells, and a folder of wheels tells none.
    """
    text = pathlib.Path(lock).read_text()
    wanted = pathlib.Path(lock)
    torch = re.search(r"^(torch==\S+)(.*\n(?: .*\n?)*)", text, re.MULTILINE)
    if torch:
        cpu = folder / "torch_cpu.txt"
        cpu.write_text(f"{torch[1]}+cpu{torch[2]}")
        if pip_download(cpu, folder).returncode == 0:
            wanted = folder / "others.txt"
            wanted.write_text(text.replace(torch[0], ""))
    result = pip_download(wanted, folder)
    if result.returncode != 0:
        # Of pip's warnings only the first of its vain tries to reach an index: there are dozens.
        lines = result.stderr.splitlines()
        tries = [line for line in lines if "after connection broken by" in line]
        errors = [line for line in lines if not line.startswith("WARNING")]
        explain(lock, "\n".join(tries[:1] + errors))
    return sorted(folder.glob("*.whl"))


def unpack(wheel: pathlib.Path, destination: pathlib.Path) -> None:
    """Unpacks one wheel, keeping the executable bits and flattening its library part."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            # NAME.data/purelib and platlib belong beside the packages; scripts go to bin/.
            name = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", entry.filename)
            name = re.sub(r"^[^/]+\.data/scripts/", "bin/", name)
            target = destination / name
            if entry.is_dir():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, target.open("wb") as copy:
                while block := source.read(1 << 20):
                    copy.write(block)
            executable = entry.external_attr >> 16 & 0o111 or name.startswith("bin/")
            target.chmod(0o755 if executable else 0o644)


def main() -> None:
    """Downloads, unpacks and, if asked to, compiles to bytecode."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lock", required=True)
    parser.add_argument("--cuda-lock")
    parser.add_argument("--destination", required=True, type=pathlib.Path)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--any-python", action="store_true")
    options = parser.parse_args()
    if not options.any_python and not SUPPORTED[0] <= sys.version_info[:2] <= SUPPORTED[1]:
        low, high = (".".join(map(str, version)) for version in SUPPORTED)
        python = f"{sys.executable} is Python {sys.version.split()[0]}"
        what = f"{python}; wheels are locked for {low} to {high}"
        fail(options.lock, f"{what}. To take the interpreter's own: MOE_PYTHON_PACKAGES=system")
    if importlib.util.find_spec("pip") is None:
        fail(options.lock, f"{sys.executable} has no pip; Debian: apt install python3-pip")
    with tempfile.TemporaryDirectory(dir=options.destination.parent) as folder:
        wheels = download(options.lock, pathlib.Path(folder))
        cpu = any(re.match(r"torch-[^-]*\+cpu-", wheel.name) for wheel in wheels)
        if options.cuda_lock and not cpu:
            wheels = download(options.cuda_lock, pathlib.Path(folder))
        for wheel in wheels:
            try:
                unpack(wheel, options.destination)
            except OSError as error:
                fail(options.lock, f"{wheel.name} cannot be unpacked: {error}")
            wheel.unlink()
    if options.compile:
        # The tree is read-only in Bazel's sandbox: without this each start would compile anew.
        compileall.compile_dir(
            options.destination,
            quiet=2,
            workers=0,
            rx=re.compile(r"/tests?/|/torch/(testing|distributed|onnx|ao)/"),
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )


if __name__ == "__main__":
    main()
