# SPDX-License-Identifier: Apache-2.0
"""Brings the released packages whose kernels the benchmark compares with.

    python3 tools/bench/bring_peers.py            # writes .peers/peers.tar.xz, about 5 MB

Downloads the wheels that peers.lock names, by version and hash, and packs what the benchmark
imports: the Python files of the fused layers, their tables of tuned configurations, and two
compiled libraries of vLLM. Nothing of it is committed. The benchmark takes the archive with
--peers=FILE, so it can be carried to a machine without a network.

The libraries are cut down: of their machine code the archive keeps that for the chip (--arch), and
only of the files with the kernels in KERNELS. Marlin is released as machine code for sm_80 and
PTX, which the driver would compile on first use, minutes for kernels nobody asks for. So the PTX of
the kernels that the benchmark uses, unchanged, is assembled here instead (ptxas, fatbinary and
cuobjdump of CUDA 13, found by --cuda).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile

import fatbin

_HERE = pathlib.Path(__file__).resolve().parent
_LOCK = _HERE / "peers.lock"

_VLLM_LAYERS = "vllm/model_executor/layers/fused_moe"
_SGLANG_RUNNER = "sglang/srt/layers/moe/moe_runner/triton_utils"
# Files to keep, as regular expressions of whole paths.
FILES = (
    "vllm/scalar_type.py",
    f"{_VLLM_LAYERS}/(activation|fused_moe|moe_align_block_size).py",
    f"{_VLLM_LAYERS}/experts/marlin_moe.py",
    f"{_VLLM_LAYERS}/configs/[^/]*device_name=NVIDIA_(A100|H200)[^/]*.json",
    "sglang/kernels/ops/moe/(fused_moe_triton_kernels|moe_align_small_numel).py",
    f"{_SGLANG_RUNNER}/(fused_moe|fused_moe_triton_config|moe_align_block_size).py",
    f"{_SGLANG_RUNNER}/configs/.*device_name=NVIDIA_(A100|H200)[^/]*.json",
    "(vllm|sglang)-[^/]*.dist-info/(METADATA|licenses/.*[^/])",
)
LIBRARIES = ("vllm/_moe_C_stable_libtorch.abi3.so", "vllm/_C_stable_libtorch.abi3.so")
# Machine code of a source file is kept if it has one of these names in it.
KERNELS = (
    b"3moe27moe_align_block_size_kernel",
    b"3moe18moe_sum_vec_kernel",
    b"21moe_wna16_gemm_kernel",
    b"4vllm18act_and_mul_kernel",
)
# Kernels to assemble from PTX: the names of vLLM's scalar types are numbers in them. Marlin takes
# the type of A, of B, of C and of the scales, sizes, and the group in units of 16 (-1: a channel).
_BF16, _U4B8, _U8B128, _E2M1, _E8M0 = (
    "Ll1125899906909960E",
    "Ll1125899907892224E",
    "Ll1125899923621888E",
    "Ll562949953487106E",
    "Ll[0-9]+E",
)
PTX_KERNELS = (
    f"marlin_moe_wna166MarlinI{_BF16}{_U4B8}{_BF16}{_BF16}\\w*Li8ELb0EEEv",
    f"marlin_moe_wna166MarlinI{_BF16}{_U8B128}{_BF16}{_BF16}\\w*Lin1ELb0EEEv",
    f"marlin_moe_wna166MarlinI{_BF16}{_E2M1}{_BF16}{_E8M0}\\w*Li2ELb0EEEv",
    "marlin_moe_wna1613MarlinDefault",
    "marlin_moe_wna1619permute_cols_kernel",
    "marlin25gptq_marlin_repack_kernel",
)


def download(folder: pathlib.Path) -> list[pathlib.Path]:
    """The wheels of peers.lock, for x86-64 Linux and Python 3.12, checked against its hashes."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in (34, 28, 17)]
    platforms += ["manylinux2014_x86_64", "linux_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", "--require-hashes"]
    command += [f"--platform={platform}" for platform in platforms]
    subprocess.run([*command, "-r", str(_LOCK), "-d", str(folder)], check=True)
    return sorted(folder.glob("*.whl"))


# What takes the place of a fat binary of which nothing is kept: the library registers each of them,
# and one without any image might be refused.
_NOTHING = """.version 7.8
.target sm_80
.address_size 64
.visible .entry nothing() { ret; }
"""


def wanted_ptx(text: str, kernels: tuple[str, ...] = PTX_KERNELS) -> str | None:
    """The module with the wanted kernels alone, unchanged otherwise; None if it has none."""
    head, *parts = re.split(r"(?m)^(?=\.visible \.entry )", text)
    pattern = re.compile(rf"\.visible \.entry \w*(?:{'|'.join(kernels)})")
    kept = [part for part in parts if pattern.match(part)]
    return head + "".join(kept) if kept else None


class Cutter:
    """Cuts a library down with the tools of a CUDA toolkit."""

    def __init__(self, cuda: pathlib.Path, arch: int, scratch: pathlib.Path) -> None:
        """`arch`: compute capability, as 90. `scratch`: a folder for what is extracted."""
        self._tools = {}
        for tool in ("cuobjdump", "ptxas", "fatbinary"):
            found = shutil.which(tool, path=str(cuda / "bin")) or shutil.which(tool)
            if found is None:
                raise FileNotFoundError(f"no {tool} in {cuda}/bin or on the PATH; pass --cuda")
            self._tools[tool] = found
        self._arch, self._scratch = arch, scratch

    def _run(self, tool: str, *arguments: str, folder: pathlib.Path) -> None:
        command = [self._tools[tool], *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")

    def _assemble(self, ptx: str, folder: pathlib.Path) -> bytes:
        (folder / "k.ptx").write_text(ptx, encoding="utf-8")
        self._run("ptxas", f"-arch=sm_{self._arch}", "-O3", "k.ptx", "-o", "k.cubin", folder=folder)
        image = f"--image3=kind=elf,sm={self._arch},file=k.cubin"
        self._run("fatbinary", "--create=k.fatbin", "-64", image, "--compress-all", folder=folder)
        return (folder / "k.fatbin").read_bytes()

    def cut(self, library: pathlib.Path) -> tuple[bytes, list[str]]:
        """The library with the wanted machine code alone, and a line for each part kept."""
        folder = self._scratch / library.stem
        folder.mkdir()
        arch = f"sm_{self._arch}"
        for option, which in (("-xelf", f".{arch}.cubin"), ("-xptx", ".ptx")):
            self._run("cuobjdump", option, which, str(library), folder=folder)
        images: dict[tuple[int, int], pathlib.Path] = {}
        for path in folder.iterdir():
            number = int(path.name.split(".")[-3])
            images[fatbin.PTX if path.suffix == ".ptx" else fatbin.ELF, number] = path
        notes: list[str] = []
        nothing = self._assemble(_NOTHING, folder)

        def choose(whole: fatbin.Fatbin) -> bytes | list[fatbin.Entry]:
            kept = []
            for entry in whole.entries:
                path = images.get((entry.kind, entry.number))
                if path is None:
                    continue
                if entry.kind == fatbin.PTX:
                    ptx = wanted_ptx(path.read_text(encoding="utf-8"))
                    if ptx:
                        count = ptx.count("\n.visible .entry ")
                        notes.append(f"{library.name}: {count} kernels of {path.name} assembled")
                        return self._assemble(ptx, folder)
                elif entry.arch == self._arch:
                    code = path.read_bytes()
                    names = [name.decode() for name in KERNELS if name in code]
                    if names:
                        kept.append(entry)
                        notes.append(f"{library.name}: {path.name} kept for {', '.join(names)}")
            return kept or nothing

        return fatbin.replaced(library.read_bytes(), choose), notes


def pack(wheels: list[pathlib.Path], target: pathlib.Path, cutter: Cutter) -> dict[str, object]:
    """Writes the archive and returns what is in it: wheels with hashes, files, notes."""
    pattern = re.compile("|".join(f"(?:{name})" for name in FILES))
    manifest: dict[str, object] = {
        "wheels": {w.name: hashlib.sha256(w.read_bytes()).hexdigest() for w in wheels}
    }
    notes: list[str] = []
    count = 0
    with (
        tarfile.open(target, "w:xz", preset=6) as archive,
        tempfile.TemporaryDirectory() as scratch,
    ):

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            archive.addfile(info, io.BytesIO(data))

        for wheel in wheels:
            with zipfile.ZipFile(wheel) as files:
                for name in sorted(files.namelist()):
                    if name in LIBRARIES:
                        data, found = cutter.cut(pathlib.Path(files.extract(name, scratch)))
                        add(name, data)
                        notes += found
                    elif pattern.fullmatch(name):
                        add(name, files.read(name))
                    else:
                        continue
                    count += 1
        manifest |= {"files": count, "notes": notes}
        add("MANIFEST.json", json.dumps(manifest, indent=1).encode())
    return manifest


def main() -> None:
    """Downloads, cuts, packs, says what is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default=".peers", help="Folder to write to (default: .peers).")
    parser.add_argument("--wheels", help="Folder with the wheels, where they are there already.")
    parser.add_argument("--cuda", default="/usr/local/cuda", help="A CUDA toolkit, 13.0 or newer.")
    parser.add_argument("--arch", type=int, default=90, help="Compute capability of the GPU: 90.")
    options = parser.parse_args()
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        cutter = Cutter(pathlib.Path(options.cuda), options.arch, pathlib.Path(scratch))
        if options.wheels:
            wheels = sorted(pathlib.Path(options.wheels).glob("*.whl"))
            _check(wheels)
        else:
            wheels = download(pathlib.Path(scratch))
        manifest = pack(wheels, out / "peers.tar.xz", cutter)
    size = (out / "peers.tar.xz").stat().st_size / 1e6
    print(json.dumps(manifest, indent=1))
    print(f"{out / 'peers.tar.xz'}: {size:.1f} MB")


def _check(wheels: list[pathlib.Path]) -> None:
    """Raises ValueError unless the wheels are those of peers.lock."""
    hashes = set(re.findall(r"sha256:([0-9a-f]{64})", _LOCK.read_text(encoding="utf-8")))
    found = {hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels}
    if found != hashes:
        raise ValueError(f"the wheels {[w.name for w in wheels]} are not those of {_LOCK.name}")


if __name__ == "__main__":
    main()
