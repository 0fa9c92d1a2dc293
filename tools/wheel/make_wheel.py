# SPDX-License-Identifier: Apache-2.0
"""Packs a Python package with compiled extensions into a wheel (PEP 427, core metadata 2.4).

    python3 make_wheel.py --package FOLDER --metadata JSON --description README --output FOLDER
        [--license NAME=FILE ...]

The file's name, the version and the tags follow from the package: `__version__`, the suffix of the
extensions, the symbols these need. The same package gives the same bytes: entries are sorted, their
times and modes fixed.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import pathlib
import re
import zipfile
from typing import Any

import elf

# The oldest time that a zip archive can express.
_TIME = (1980, 1, 1, 0, 0, 0)
_GENERATOR = "fused_moe tools/wheel 1"


def version_of(package: pathlib.Path) -> str:
    """Returns the string that the package's __init__.py assigns to __version__.

    Raises:
        ValueError: it assigns none, or not as a plain string.
    """
    source = package / "__init__.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if "__version__" in names and isinstance(node.value.value, str):
                return node.value.value
    raise ValueError(f'{source} must hold a line `__version__ = "1.2.3"`')


def python_tags(extensions: list[pathlib.Path]) -> str:
    """Returns PYTHON-ABI, such as "cp311-cp311", from the extensions' names (PEP 425).

    Raises:
        ValueError: there is no extension, one is not for CPython, or they are for several Pythons.
    """
    tags = set()
    for extension in extensions:
        found = re.fullmatch(r"[^.]+\.cpython-(\d+)([a-z]*)-[^.]+\.so", extension.name)
        if not found:
            raise ValueError(f"{extension.name} must be named NAME.cpython-NNN-PLATFORM.so")
        tags.add(f"cp{found[1]}-cp{found[1]}{found[2]}")
    if len(tags) != 1:
        raise ValueError(f"extensions for one Python are needed, not for {sorted(tags) or 'none'}")
    return tags.pop()


def metadata_text(
    metadata: dict[str, Any], version: str, licenses: list[str], description: str
) -> str:
    """Returns METADATA: core metadata 2.4, the description as its body."""
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {metadata['name']}",
        f"Version: {version}",
        f"Summary: {metadata['summary']}",
        f"License-Expression: {metadata['license']}",
        *(f"License-File: {name}" for name in licenses),
        *(f"Classifier: {text}" for text in metadata["classifiers"]),
        f"Requires-Python: {metadata['requires_python']}",
        *(f"Requires-Dist: {text}" for text in metadata["requires"]),
    ]
    for extra, requirements in sorted(metadata["extras"].items()):
        lines.append(f"Provides-Extra: {extra}")
        lines += [f'Requires-Dist: {text} ; extra == "{extra}"' for text in requirements]
    lines.append("Description-Content-Type: text/markdown; charset=UTF-8")
    return "\n".join(lines) + "\n\n" + description


def entry_points_text(groups: dict[str, list[str]]) -> str:
    """Returns entry_points.txt, an INI file of a section for each group."""
    return "\n".join(
        "\n".join([f"[{group}]", *sorted(entries), ""]) for group, entries in sorted(groups.items())
    )


def record_line(name: str, content: bytes) -> str:
    """Returns RECORD's line for one file."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}\n"


def write_archive(path: pathlib.Path, entries: list[tuple[str, bytes]]) -> None:
    """Writes the entries in their order, with fixed times and modes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            entry = zipfile.ZipInfo(name, _TIME)
            entry.create_system = 3  # Unix: the upper half of external_attr is the mode
            entry.external_attr = (0o100755 if name.endswith(".so") else 0o100644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content, compresslevel=9)


def make_wheel(
    package: pathlib.Path,
    metadata: dict[str, Any],
    description: str,
    licenses: dict[str, bytes],
    output: pathlib.Path,
) -> pathlib.Path:
    """Writes the wheel into the folder `output` and returns its path.

    Args:
        package: the folder of the package, named as it is imported, extensions inside.
        metadata: name, local_version (may be empty), summary, license (SPDX), classifiers,
            requires_python, requires, extras (name to requirements), entry_points (group to lines).
        description: Markdown.
        licenses: path below the wheel's licenses/ to content.
        output: an existing folder.

    Raises:
        ValueError: the package says no version, or its extensions no tag.
    """
    files = sorted(path for path in package.rglob("*") if path.is_file())
    extensions = [path for path in files if path.suffix == ".so"]
    version = version_of(package)
    if metadata["local_version"]:
        version += "+" + metadata["local_version"]
    tag = f"{python_tags(extensions)}-{elf.platform_tag([elf.read(path) for path in extensions])}"
    # The escaping of the wheel specification; a version needs none.
    stem = re.sub(r"[-_.]+", "_", metadata["name"]).lower() + "-" + version
    information = f"{stem}.dist-info/"

    entries = [(path.relative_to(package.parent).as_posix(), path.read_bytes()) for path in files]
    about = {
        "METADATA": metadata_text(metadata, version, sorted(licenses), description).encode(),
        "WHEEL": (
            f"Wheel-Version: 1.0\nGenerator: {_GENERATOR}\nRoot-Is-Purelib: false\nTag: {tag}\n"
        ).encode(),
    }
    if metadata["entry_points"]:
        about["entry_points.txt"] = entry_points_text(metadata["entry_points"]).encode()
    about |= {f"licenses/{name}": content for name, content in licenses.items()}
    # What describes the wheel comes last, as the specification recommends.
    entries += [(information + name, content) for name, content in sorted(about.items())]
    record = "".join(record_line(name, content) for name, content in entries)
    entries.append((information + "RECORD", f"{record}{information}RECORD,,\n".encode()))

    wheel = output / f"{stem}-{tag}.whl"
    write_archive(wheel, entries)
    return wheel


def main() -> None:
    """Reads the arguments and writes the wheel."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--package", required=True, type=pathlib.Path)
    parser.add_argument("--metadata", required=True, type=pathlib.Path)
    parser.add_argument("--description", required=True, type=pathlib.Path)
    parser.add_argument("--license", action="append", default=[])
    parser.add_argument("--output", required=True, type=pathlib.Path)
    options = parser.parse_args()
    licenses = dict(argument.split("=", 1) for argument in options.license)
    make_wheel(
        options.package,
        json.loads(options.metadata.read_text(encoding="utf-8")),
        options.description.read_text(encoding="utf-8"),
        {name: pathlib.Path(path).read_bytes() for name, path in licenses.items()},
        options.output,
    )


if __name__ == "__main__":
    main()
