"""Notes of a conversion that an attacker has changed: the next run refuses them and commits nothing."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import reshard
from reshard.errors import CorruptCheckpointError, StoreError
from reshard.storage.runtime.checksums import checksum
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.testing import Call, RecordingStore
from tests.conversion.samples import COMMITS, KIB, cut_small, save_native

FORMATS = ("reshard", "dcp", "safetensors")
CLAIM = ".reshard-convert.json"
Note = dict[str, Any]


@pytest.fixture
def src(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    state = {"large": torch.randn(400, 250), "layers": {str(i): torch.randn(100, 100) for i in range(8)}}
    save_native(state, tmp_path / "src")
    cut_small(monkeypatch, unit=100 * KIB)
    return tmp_path / "src"


def interrupted(src: Path, format: str) -> MemoryStore:
    """Return a store with a conversion that was interrupted just before its commit."""
    store = MemoryStore()

    def before(call: Call) -> None:
        if call.method == "put" and call.name == COMMITS[format]:
            raise StoreError("the store is gone")

    with pytest.raises(StoreError):
        reshard.convert(src, RecordingStore(store, before), format=format)
    assert COMMITS[format] not in store.content
    return store


def notes_of(store: MemoryStore) -> dict[str, Note]:
    return {
        name: json.loads(data)
        for name, data in store.content.items()
        if name.startswith(".reshard-convert-") and name != CLAIM
    }


def assert_refused(src: Path, store: MemoryStore, format: str) -> None:
    before = dict(store.content)
    with pytest.raises(
        CorruptCheckpointError, match=r"[Rr]emove (what is|all objects) there|Remove the destination|is missing"
    ):
        reshard.convert(src, store, format=format)
    assert COMMITS[format] not in store.content
    assert store.content.keys() == before.keys()


def no_objects(unit: Note) -> None:
    unit.update(files=[], objects=[], slices=[], tensors=[])


def half(unit: Note) -> None:
    for key in ("slices", "tensors"):
        unit[key] = unit.get(key, [])[1:]
    for found in unit.get("objects", []):
        found["shards"] = found["shards"][1:]


def other_names(unit: Note) -> None:
    for found in unit.get("objects", []):
        for shard in found["shards"]:
            shard["name"] += "x"
    for piece in unit.get("slices", []):
        piece["name"] += "x"
    unit["tensors"] = [name + "x" for name in unit.get("tensors", [])]


def other_shapes(unit: Note) -> None:
    for found in unit.get("objects", []):
        for shard in found["shards"]:
            shard["dtype"] = "int32"
    for piece in unit.get("slices", []):
        piece["sizes"] = [1, *piece["sizes"][1:]]
    unit["tensors"] = unit.get("tensors", [])[:-1]


def outside(unit: Note) -> None:
    for found in unit.get("objects", []):
        found["name"] = "../../elsewhere.shard"
    if "objects" not in unit:
        no_objects(unit)


def nonsense(unit: Note) -> None:
    unit.update(objects=5, slices="x", tensors=[[1]])


def without_files(unit: Note) -> None:
    unit.clear()


def files_of_numbers(unit: Note) -> None:
    unit["files"] = [5, None]


def larger(unit: Note) -> None:
    for found in unit.get("objects", []):
        found["nbytes"] += 1000
    if "objects" not in unit:
        no_objects(unit)


FORGERIES = (no_objects, half, other_names, other_shapes, outside, nonsense, larger, without_files, files_of_numbers)


@pytest.mark.parametrize("forge", FORGERIES)
@pytest.mark.parametrize("format", FORMATS)
def test_forged_notes_are_refused(forge: Callable[[Note], None], format: str, src: Path) -> None:
    store = interrupted(src, format)
    for name, note in notes_of(store).items():
        for _, unit in note["units"]:
            forge(unit)
        store.content[name] = json.dumps(note).encode()
    assert_refused(src, store, format)


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_files_are_refused(format: str, src: Path) -> None:
    store = interrupted(src, format)
    for name in store.content:
        if not name.startswith("."):
            store.content[name] = store.content[name][:50]
    assert_refused(src, store, format)


@pytest.mark.parametrize("format", FORMATS)
def test_unchanged_notes_are_accepted(format: str, src: Path) -> None:
    store = interrupted(src, format)
    reshard.convert(src, store, format=format)
    expected = reshard.open(src)
    found = reshard.open(store)
    assert sorted(found.tensors) == sorted(expected.tensors)
    assert all(found.read(name).equal(expected.read(name)) for name in expected.tensors)


@pytest.mark.parametrize("format", FORMATS)
def test_forged_checkpoint_is_not_accepted_as_the_result(format: str, src: Path) -> None:
    store = interrupted(src, format)
    other = MemoryStore()
    reshard.save({"other": torch.ones(2)}, other)
    forged = {
        "reshard": other.content["manifest.reshard"],
        "dcp": pickle.dumps({}),
        "safetensors": json.dumps({"weight_map": {}}).encode(),
    }[format]
    claim = json.loads(store.content[CLAIM])
    store.content[CLAIM] = json.dumps({**claim, "commit": f"{checksum(forged):016x}"}).encode()
    store.content |= {**other.content, COMMITS[format]: forged}
    with pytest.raises(CorruptCheckpointError, match="remove what is there"):
        reshard.convert(src, store, format=format)
