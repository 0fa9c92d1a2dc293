# SPDX-License-Identifier: Apache-2.0
"""The file of tuning results: JSON that a person can read, edit and merge.

    {"format": 1,
     "results": [
      {"chip": {"name": "NVIDIA A100-SXM4-80GB", "multiprocessors": 108, ...},
       "version": "0.1.0",
       "layer": {"backend": "sm80", "hidden_size": 4096, ..., "weights": "int4", ...},
       "tokens": {
        "1": {"tactics": [..], "untuned": [..], "microseconds": 31.2, ...},
        "64": ...
       }},
      ...
     ]}

A file may hold results of any chips and versions; each process uses its own and keeps the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from fused_moe.tuning.keys import ROUTINGS, Chip, Entry, Key, Layer, Names

FORMAT = 1

Results = dict[Key, dict[int, Entry]]

_Record = TypeVar("_Record", Chip, Layer)


def read(path: str) -> Results:
    """Returns what a file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file of tuning results; the text says where and why.
    """
    with open(path, encoding="utf-8") as file:
        try:
            document = json.load(file)
        except ValueError as error:
            raise ValueError(f"tuning file {path} is not JSON: {error}") from None
    try:
        return _parse(document)
    except ValueError as error:
        raise ValueError(f"tuning file {path}: {error}") from None


def merge(path: str, results: Mapping[Key, Mapping[int, Entry]]) -> None:
    """Adds results to a file, in place of those for the same key and number of tokens.

    The file is replaced as a whole, so that a reader never sees half of it. Processes that
    merge at once wait for one another where the file system has locks.

    Raises:
        OSError: it cannot be written.
        ValueError: what is there is no file of tuning results; it is left alone.
    """
    folder = os.path.dirname(os.path.abspath(path))
    with _locked(folder):
        merged = read(path) if os.path.exists(path) else {}
        for key, entries in results.items():
            merged.setdefault(key, {}).update(entries)
        handle, temporary = tempfile.mkstemp(prefix=os.path.basename(path), dir=folder)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text_of(merged))
            # mkstemp makes it the owner's alone; others may read what they could have made.
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def text_of(results: Mapping[Key, Mapping[int, Entry]]) -> str:
    """The file's text: one line for each number of tokens, in a fixed order."""
    blocks = []
    for key in sorted(results):
        lines = ",\n".join(
            f'    "{tokens}": {json.dumps(dataclasses.asdict(entry))}'
            for tokens, entry in sorted(results[key].items())
        )
        blocks.append(
            f'  {{"chip": {json.dumps(dataclasses.asdict(key.chip))},\n'
            f'   "version": {json.dumps(key.version)},\n'
            f'   "layer": {json.dumps(dataclasses.asdict(key.layer))},\n'
            f'   "tokens": {{\n{lines}\n   }}}}'
        )
    return f'{{"format": {FORMAT},\n "results": [\n' + ",\n".join(blocks) + "\n ]}\n"


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Holds the folder's lock; some network file systems have none, and then nothing is held."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _parse(document: Any) -> Results:
    what = "the file"
    _expect(what, document, dict)
    if document.get("format") != FORMAT:
        raise ValueError(
            f'"format" is {document.get("format")!r}; it must be {FORMAT}, which this version of '
            "the library reads and writes: tune again into another file"
        )
    results: Results = {}
    for number, block in enumerate(_field(what, document, "results", list)):
        what = f"results[{number}]"
        _expect(what, block, dict)
        key = Key(
            chip=_record(f"{what}.chip", _field(what, block, "chip", dict), Chip),
            version=_field(what, block, "version", str),
            layer=_record(f"{what}.layer", _field(what, block, "layer", dict), Layer),
        )
        entries = results.setdefault(key, {})
        for tokens, fields in _field(what, block, "tokens", dict).items():
            if not tokens.isascii() or not tokens.isdigit() or int(tokens) < 1:
                raise ValueError(f"{what}.tokens has the key {tokens!r}; it must be 1 or more")
            entries[int(tokens)] = _entry(f"{what}.tokens[{tokens}]", fields)
    return results


def _entry(what: str, fields: Any) -> Entry:
    _expect(what, fields, dict)
    routing = _field(what, fields, "routing", str)
    if routing not in ROUTINGS:
        raise ValueError(f"{what}.routing is {routing!r}; it must be one of {list(ROUTINGS)}")
    return Entry(
        tactics=_names(what, fields, "tactics"),
        untuned=_names(what, fields, "untuned"),
        microseconds=float(_field(what, fields, "microseconds", (int, float))),
        untuned_microseconds=float(_field(what, fields, "untuned_microseconds", (int, float))),
        routing=routing,
    )


def _names(what: str, fields: dict[str, Any], name: str) -> Names:
    pair = _field(what, fields, name, list)
    if len(pair) != 2 or not all(isinstance(item, str) for item in pair):
        raise ValueError(f"{what}.{name} is {pair!r}; it must be the names of two tactics")
    return pair[0], pair[1]


def _record(what: str, fields: dict[str, Any], kind: type[_Record]) -> _Record:
    """A Chip or a Layer from exactly its fields."""
    types = {field.name: str if field.type == "str" else int for field in dataclasses.fields(kind)}
    if unknown := fields.keys() - types.keys():
        raise ValueError(f"{what} has {sorted(unknown)}, which this version does not know")
    return kind(**{name: _field(what, fields, name, wanted) for name, wanted in types.items()})


def _field(what: str, fields: dict[str, Any], name: str, kind: Any) -> Any:
    if name not in fields:
        raise ValueError(f'{what} has no "{name}"')
    _expect(f"{what}.{name}", fields[name], kind)
    return fields[name]


def _expect(what: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        names = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}
        raise ValueError(f"{what} is {value!r:.60}; it must be {names.get(kind, 'a number')}")
