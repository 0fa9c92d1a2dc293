# SPDX-License-Identifier: Apache-2.0
"""Buckets of tokens, the file of results, and the routings that are measured on."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from fused_moe.tuning import samples, storage
from fused_moe.tuning.keys import Chip, Entry, Key, Layer, default_buckets, entry_for, nearest

A100 = Chip("NVIDIA A100-SXM4-80GB", 108, 166912, 167936)
A10 = Chip("NVIDIA A10", 72, 101376, 102400)
LAYER = Layer(
    backend="sm80",
    hidden_size=4096,
    intermediate_size=14336,
    experts=8,
    local_experts=8,
    top_k=2,
    activation="Swiglu",
    input="bfloat16",
    output="bfloat16",
    weights="int4",
    weight_scales="float32",
    group_size=64,
)
ENTRY = Entry(("16x64x128", "16x128x128"), ("16x64x128", "32x128x128"), 31.2, 33.0, "given")
RESULTS = {
    Key(A100, "0.1.0", LAYER): {1: ENTRY, 64: dataclasses.replace(ENTRY, routing="skewed")},
    Key(A10, "0.1.0", LAYER): {8: ENTRY},
    Key(A100, "0.2.0", dataclasses.replace(LAYER, weights="same")): {4096: ENTRY},
}


def test_default_buckets() -> None:
    assert default_buckets(1) == (1,)
    assert default_buckets(8192) == tuple(2**i for i in range(14))
    assert default_buckets(100) == (1, 2, 4, 8, 16, 32, 64, 100)


def test_nearest() -> None:
    buckets = [1, 64, 128]
    assert nearest(64, buckets) == [64]
    assert nearest(65, buckets) == [64, 128]
    assert nearest(2, buckets) == [1, 64]
    # By ratio: 91 is nearer to 128, though not by difference.
    assert nearest(91, buckets) == [128, 64]
    assert nearest(100000, buckets) == [128]
    assert nearest(5, []) == []


def test_what_a_layer_is_called() -> None:
    words = "8 experts of 4096x14336, top 2, bfloat16, weights int4/64"
    assert LAYER.describe() == words
    plain = dataclasses.replace(LAYER, weights="same", group_size=0)
    assert plain.describe() == words.replace("int4/64", "same")


def test_entry_for() -> None:
    low = Entry(("a", "b"), ("c", "c"), 1, 2, "given")
    high = Entry(("d", "d"), ("e", "e"), 1, 2, "given")
    entries = {64: low, 128: high}
    # On a bucket the result holds, whatever the choice without tuning is by now.
    assert entry_for(64, ("x", "y"), entries) is low
    # Between them: the nearer one, if it was compared with what it would replace.
    assert entry_for(70, ("c", "c"), entries) is low
    assert entry_for(70, ("e", "e"), entries) is high
    assert entry_for(70, ("x", "y"), entries) is None
    assert entry_for(100000, ("e", "e"), entries) is high
    assert entry_for(100000, ("c", "c"), entries) is None


def test_round_trip(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tactics.json"
    storage.merge(str(path), RESULTS)
    assert storage.read(str(path)) == RESULTS
    text = path.read_text()
    storage.merge(str(path), RESULTS)
    assert path.read_text() == text, "the order is not fixed"
    json.loads(text)
    (line,) = (line for line in text.splitlines() if line.strip().startswith('"4096"'))
    assert "16x128x128" in line and "31.2" in line, "one line for each number of tokens"
    assert [p.name for p in tmp_path.iterdir()] == ["tactics.json"]


def test_who_may_read_the_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tactics.json"
    mask = os.umask(0o027)
    try:
        storage.merge(str(path), RESULTS)
    finally:
        left = os.umask(mask)
    assert left == 0o027, "the process would make other files with another mode"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640, "not as other files are"


def test_merging_keeps_the_rest(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "tactics.json")
    storage.merge(path, RESULTS)
    key = Key(A100, "0.1.0", LAYER)
    newer = dataclasses.replace(ENTRY, microseconds=29.0)
    storage.merge(path, {key: {64: newer, 2: newer}})
    assert storage.read(path) == {**RESULTS, key: {1: ENTRY, 2: newer, 64: newer}}


def test_a_file_that_cannot_be_replaced(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tactics.json"
    storage.merge(str(path), RESULTS)
    text = path.read_text()

    def full(source: str, target: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        storage.merge(str(path), {Key(A10, "0.3.0", LAYER): {1: ENTRY}})
    assert path.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["tactics.json"], "half a file was left"


def test_merging_at_once_loses_nothing(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "tactics.json")
    parts = [{Key(A100, "0.1.0", LAYER): {tokens: ENTRY}} for tokens in range(1, 41)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda part: storage.merge(path, part), parts))
    assert sorted(storage.read(path)[Key(A100, "0.1.0", LAYER)]) == list(range(1, 41))


def changed(*path: Any, to: Any) -> str:
    """The text of a good file with one thing changed, or removed where `to` is `...`."""
    document = json.loads(storage.text_of({Key(A100, "0.1.0", LAYER): {1: ENTRY}}))
    at = document
    for step in path[:-1]:
        at = at[step]
    if to is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = to
    return json.dumps(document)


BAD_FILES = {
    "empty": ("", "not JSON"),
    "half": (storage.text_of(RESULTS)[:-50], "not JSON.*line"),
    "list": ("[]", r"the file is \[\]; it must be an object"),
    "other": ("{}", r'"format" is None; it must be 1'),
    "format": (changed("format", to=2), r'"format" is 2; it must be 1.*tune again'),
    "results": (changed("results", to={}), r"the file.results is {}; it must be a list"),
    "no chip": (changed("results", 0, "chip", to=...), r'results\[0\] has no "chip"'),
    "chip": (
        changed("results", 0, "chip", "multiprocessors", to="many"),
        r"results\[0\].chip.multiprocessors is 'many'; it must be a whole number",
    ),
    "bool": (changed("results", 0, "layer", "top_k", to=True), r"layer.top_k is True"),
    "unknown": (changed("results", 0, "layer", "color", to="red"), r"layer has \['color'\]"),
    "block": (changed("results", 0, to=7), r"results\[0\] is 7; it must be an object"),
    "entry": (
        changed("results", 0, "tokens", "1", to="16x64x128"),
        r"tokens\[1\] is '16x64x128'; it must be an object",
    ),
    "words": (changed("results", 0, "tokens", to={"many": {}}), "tokens has the key 'many'"),
    "digits": (changed("results", 0, "tokens", to={"\u0663": {}}), r"tokens has the key '\u0663'"),
    "tokens": (
        changed("results", 0, "tokens", to={"0": {}}),
        r"results\[0\].tokens has the key '0'; it must be 1 or more",
    ),
    "one tactic": (
        changed("results", 0, "tokens", "1", "tactics", to=["16x64x128"]),
        r"tokens\[1\].tactics is \['16x64x128'\]; it must be the names of two",
    ),
    "indices": (changed("results", 0, "tokens", "1", "tactics", to=[1, 2]), "names of two tactics"),
    "routing": (changed("results", 0, "tokens", "1", "routing", to="fair"), r"routing is 'fair'"),
    "time": (
        changed("results", 0, "tokens", "1", "microseconds", to="fast"),
        r"microseconds is 'fast'; it must be a number",
    ),
}


@pytest.mark.parametrize("name", list(BAD_FILES))
def test_bad_files(tmp_path: pathlib.Path, name: str) -> None:
    text, words = BAD_FILES[name]
    path = tmp_path / "tactics.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        storage.read(str(path))
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match=words):
        storage.merge(str(path), RESULTS)
    assert path.read_text() == text, "what is no file of results must be left alone"
    assert len(list(tmp_path.iterdir())) == 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("skewed", [False, True])
def test_random_ids(skewed: bool) -> None:
    experts = samples.Experts(total=64, first=0, local=64)
    before = torch.random.get_rng_state()
    ids = samples.random_ids(4000, 8, experts, skewed, generator())
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random numbers moved"
    assert ids.shape == (4000, 8) and ids.dtype == torch.int32 and ids.is_contiguous()
    assert int(ids.min()) >= 0 and int(ids.max()) < 64
    assert all(row.unique().numel() == 8 for row in ids[:100])
    assert torch.equal(ids, samples.random_ids(4000, 8, experts, skewed, generator()))
    counts = ids.flatten().bincount(minlength=64).sort(descending=True).values / 500
    if skewed:
        # Zipf's weights for 64 experts: the first alone has 21% of them, the last 0.3%.
        assert counts[0] > 5 and counts[-1] < 0.4
    else:
        assert counts[0] < 1.25 and counts[-1] > 0.75


def test_more_choices_than_experts() -> None:
    ids = samples.random_ids(100, 6, samples.Experts(4, 0, 4), False, generator())
    assert ids.shape == (100, 6) and set(ids.flatten().tolist()) == {0, 1, 2, 3}
    ids = samples.random_ids(100, 4, samples.Experts(4, 0, 4), True, generator())
    assert all(set(row) == {0, 1, 2, 3} for row in ids.tolist()), "as many are distinct"


def test_given_ids() -> None:
    experts = samples.Experts(total=32, first=8, local=16)
    ids = samples.random_ids(100, 4, samples.Experts(32, 0, 32), True, generator())
    ids[::7] = -1
    parts = [samples.given_ids(ids, 50, number, 4, experts) for number in range(4)]
    rows = (torch.arange(50) * 2, torch.arange(50) * 2 + 1)
    assert torch.equal(parts[0], ids[rows[0]]), "the first sample is the caller's own"
    local = (ids[rows[1]] >= 8) & (ids[rows[1]] < 24)
    assert torch.equal(parts[1][~local], ids[rows[1]][~local]), "other ranks' ids must stay"
    assert torch.equal((parts[1][local] - 8 + 16 - 4) % 16, ids[rows[1]][local] - 8)
    for part in parts:
        assert part.shape == (50, 4) and part.dtype == torch.int32 and part.is_contiguous()
    whole = samples.given_ids(ids, 100, 0, 1, experts)
    assert torch.equal(whole, ids)
    assert samples.touched(ids, experts) == 16
    two = samples.given_ids(ids, 100, 1, 8, samples.Experts(total=32, first=8, local=2))
    assert torch.equal(two == 8, ids.roll(-1, 0) == 9), "few experts are changed for others, too"
    one = samples.given_ids(ids[1:2], 1, 0, 8, experts)
    assert samples.touched(one, experts) <= 4
