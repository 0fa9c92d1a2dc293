# SPDX-License-Identifier: Apache-2.0
"""Imports a few files of a large framework without the rest of it.

The kernels worth comparing with live in packages that import a whole serving engine. Here a finder
answers for such a package: the files named as real are loaded from the unpacked wheel, everything
else under the package's name becomes a stand-in module, with the attributes given for it, and a
placeholder class for any other name. A placeholder may be imported, subclassed, or be in a
signature; using it in a call fails loudly.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import pathlib
import sys
import tarfile
import tempfile
import types
from collections.abc import Mapping, Sequence
from typing import Any


class Placeholder:
    """What an attribute that nobody needs is replaced by; `Missing.name` are placeholders too."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Takes what it is given, for default arguments."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} of a part that was left out: {type(self).__name__}")


class _StandIn(types.ModuleType):
    """A module of which only some attributes are known."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        finder: _Finder = self.__spec__.loader  # type: ignore[assignment,union-attr]
        if finder.knows(full):
            return importlib.import_module(full)
        found = type(name, (Placeholder,), {"__module__": self.__name__})
        setattr(self, name, found)
        return found


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(
        self, root: pathlib.Path, package: str, real: Sequence[str], known: Mapping[str, Any]
    ) -> None:
        self.package, self._root, self._real, self._known = package, root, set(real), known

    def knows(self, name: str) -> bool:
        """Whether there is more behind the name than a placeholder."""
        return any(n == name or n.startswith(name + ".") for n in (*self._real, *self._known))

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The real file, or a stand-in for anything else of the package."""
        if fullname.split(".")[0] != self.package:
            return None
        if fullname in self._real:
            file = self._root.joinpath(*fullname.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(fullname, file)
        spec = importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        spec.submodule_search_locations = []
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """An empty stand-in."""
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Gives it the attributes that are known."""
        vars(module).update(self._known.get(module.__name__, {}))


def install(
    root: pathlib.Path, package: str, real: Sequence[str], known: Mapping[str, Mapping[str, Any]]
) -> None:
    """Makes `package` importable from now on; again with another root replaces what was.

    Args:
        root: the folder with the unpacked package.
        package: its top name, such as "vllm".
        real: full names of the modules to load from files.
        known: attributes of stand-ins, by module name.

    Raises:
        ImportError: a file is missing, or the package itself is installed here.
    """
    present = sys.modules.get(package)
    if present is not None and not isinstance(present, _StandIn):
        raise ImportError(f"{package} is installed and imported here: it would be mixed with ours")
    for name in real:
        file = root.joinpath(*name.split(".")).with_suffix(".py")
        if not file.exists():
            raise ImportError(f"{file} is missing: unpack what tools/bench/bring_peers.py made")
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        del sys.modules[name]
    sys.meta_path[:] = [
        finder
        for finder in sys.meta_path
        if not (isinstance(finder, _Finder) and finder.package == package)
    ]
    sys.meta_path.insert(0, _Finder(root, package, real, known))


class QuietLogger(logging.Logger):
    """A logger with the methods that serving engines add; says nothing below an error."""

    def __init__(self, name: str = "foreign") -> None:
        """Logs errors alone."""
        super().__init__(name, logging.ERROR)

    def info_once(self, *args: object, **kwargs: object) -> None:
        """Nothing."""

    def warning_once(self, *args: object, **kwargs: object) -> None:
        """Nothing."""


def unpacked(path: str) -> pathlib.Path:
    """The folder that --peers names; an archive is unpacked among the temporary files, once.

    Raises:
        ImportError: there is no such folder or archive.
    """
    place = pathlib.Path(path)
    if place.is_dir():
        return place
    if not place.is_file():
        raise ImportError(
            f"there is no {path!r}: make it with tools/bench/bring_peers.py and pass --peers"
        )
    # Named after size and time: a new archive is unpacked anew.
    status = place.stat()
    name = f"fused_moe_peers-{status.st_size}-{int(status.st_mtime)}"
    folder = pathlib.Path(tempfile.gettempdir()) / name
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        whole = pathlib.Path(scratch) / name
        with tarfile.open(place) as archive:
            for member in archive:
                data = archive.extractfile(member)
                if data is None or ".." in pathlib.PurePosixPath(member.name).parts:
                    continue
                target = whole / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data.read())
        whole.rename(folder)
    return folder
