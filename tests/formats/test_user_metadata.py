"""Metadata that a user stores with a checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import reshard
from reshard.errors import ArgumentError, CorruptCheckpointError
from reshard.storage.formats.native.manifest import MANIFEST_NAME, encode_manifest
from reshard.storage.formats.native.native_source import NativeSource
from reshard.storage.formats.native.write_records import assemble_index
from reshard.storage.formats.user_metadata import MAX_METADATA_BYTES
from reshard.testing import MemoryStore
from tests.ranks import RankPool

METADATA: dict[str, Any] = {
    "step": 1000,
    "loss": 2.25,
    "accuracy": math.inf,
    "worst": -math.inf,
    "is_best": True,
    "notes": None,
    "tags": ["a", 1, {"deep": [0.1]}],
    "$dollar": {"$tuple": [1]},
    "ü\ud800\n": "\x1b[2J",
    "big": 2**80,
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_metadata_is_stored_and_read_back() -> None:
    store = MemoryStore()
    reshard.save({"w": torch.ones(4)}, store, metadata=METADATA)
    assert reshard.open(store).metadata == METADATA
    by_dcp = MemoryStore()
    dcp.save({"w": torch.ones(4)}, storage_writer=reshard.StorageWriter(by_dcp, metadata=METADATA), no_dist=True)
    assert reshard.open(by_dcp).metadata == METADATA


def test_nan_is_read_back() -> None:
    store = MemoryStore()
    reshard.save({"w": torch.ones(4)}, store, metadata={"loss": math.nan})
    assert math.isnan(reshard.open(store).metadata["loss"])


def test_a_numpy_float_is_stored_as_a_float() -> None:
    store = MemoryStore()
    reshard.save({"w": torch.ones(4)}, store, metadata={"loss": np.float64(0.1)})
    found = reshard.open(store).metadata
    assert found == {"loss": 0.1}
    assert type(found["loss"]) is float


def test_checkpoints_without_metadata_have_none(tmp_path: Path) -> None:
    reshard.save({"w": torch.ones(4)}, tmp_path / "a")
    assert reshard.open(tmp_path / "a").metadata == {}
    assert b'"metadata"' not in (tmp_path / "a" / MANIFEST_NAME).read_bytes()
    old = Path(__file__).parents[1] / "checkpoints" / "v3-zstd"
    assert reshard.open(old).metadata == {}
    torch.save({"w": torch.ones(4)}, tmp_path / "b.pt")
    assert reshard.open(tmp_path / "b.pt").metadata == {}


def test_metadata_that_is_changed_after_it_was_read_changes_nothing_else() -> None:
    store = MemoryStore()
    reshard.save({"w": torch.ones(4)}, store, metadata={"a": [1]})
    checkpoint = reshard.open(store)
    checkpoint.metadata["a"].append(2)
    assert checkpoint.metadata == {"a": [1]}


def test_a_conversion_keeps_metadata(tmp_path: Path) -> None:
    reshard.save({"w": torch.ones(4)}, tmp_path / "a", metadata=METADATA)
    reshard.convert(tmp_path / "a", tmp_path / "b")
    assert reshard.open(tmp_path / "b").metadata == METADATA


def containing_itself() -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["a"] = made
    return made


REFUSED: dict[str, tuple[Any, str]] = {
    "list": ([("a", 1)], r"metadata must be a dict such as \{'step': 1000\}, or None, got \[\('a', 1\)\]"),
    "key": ({1: 2}, r"metadata has the key 1 of <class 'int'>: use strings as keys"),
    "inner key": ({"a": [{None: 2}]}, r"metadata\['a'\]\[0\] has the key None of <class 'NoneType'>"),
    "tensor": ({"loss": torch.ones(())}, r"metadata\['loss'\] is of <class 'torch.Tensor'>, .*: pass value.item\(\)"),
    "numpy": ({"loss": np.float32(1)}, r"metadata\['loss'\] is of <class 'numpy.float32'>, .*: pass value.item\(\)"),
    "tuple": ({"a": (1, 2)}, r"metadata\['a'\] is of <class 'tuple'>, which metadata cannot contain: use strings, num"),
    "bytes": ({"a": b""}, r"metadata\['a'\] is of <class 'bytes'>"),
    "itself": (containing_itself(), "metadata is nested too deeply, or contains itself"),
    "large": ({"a": "x" * MAX_METADATA_BYTES}, f"metadata takes {MAX_METADATA_BYTES + 8} bytes as JSON, but may take"),
    "digits": ({"a": 10**5000}, "metadata cannot be stored as JSON: Exceeds the limit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_metadata_that_would_change_is_refused(case: str) -> None:
    metadata, message = REFUSED[case]
    store = MemoryStore()
    with pytest.raises(ArgumentError, match=message):
        reshard.save({"w": torch.ones(4)}, store, metadata=metadata)
    assert not store.content
    with pytest.raises(ArgumentError, match=message):
        reshard.StorageWriter(store, metadata=metadata)


@pytest.mark.parametrize("stored", [[], 3, {"$unknown": 1}, {"$set": [1]}, {"a": {"$set": [1]}}], ids=repr)
def test_malformed_metadata_does_not_affect_the_tensors(stored: Any) -> None:
    store = MemoryStore()
    reshard.save({"w": torch.ones(4)}, store)
    manifest = NativeSource.find(store)
    assert manifest is not None
    data = encode_manifest(manifest.index(), manifest.paths, manifest.info, stored or {"$list": 1})
    store.put(MANIFEST_NAME, data, overwrite=True)
    checkpoint = reshard.open(store)
    assert checkpoint.read("w").tolist() == [1.0] * 4
    with pytest.raises(CorruptCheckpointError, match=r"the metadata in the manifest .* cannot be decoded"):
        _ = checkpoint.metadata


def save_with_other_metadata(folder: str) -> tuple[str, str, bool]:
    metadata = {"loss": float(dist.get_rank())}
    messages = []
    for save in (
        lambda: reshard.save({"w": torch.ones(4)}, folder, metadata=metadata),
        lambda: dcp.save({"w": torch.ones(4)}, storage_writer=reshard.StorageWriter(folder, metadata=metadata)),
    ):
        with pytest.raises((ArgumentError, CheckpointException), match="passed different metadata") as caught:
            save()
        messages.append(str(caught.value))
    reshard.save({"w": torch.ones(4)}, folder, metadata={"b": 1, "a": 2} if dist.get_rank() else {"a": 2, "b": 1})
    return messages[0], messages[1], reshard.open(folder).metadata == {"a": 2, "b": 1}


def test_ranks_with_different_metadata_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    for message, by_dcp, is_saved in ranks.run(3, save_with_other_metadata, str(tmp_path / "c")):
        assert "the ranks of one save passed different metadata: rank 0 '{\"loss\": 0.0}', rank 1 " in message
        assert "rank 1 " in by_dcp
        assert is_saved


def test_the_header_has_metadata_as_json() -> None:
    data = encode_manifest(assemble_index([]), {}, {}, {"step": 3})
    header = json.loads(data[32 : 32 + int.from_bytes(data[12:16], "little")])
    assert header["metadata"] == {"step": 3}
