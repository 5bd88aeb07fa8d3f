"""On a store that all ranks share, rank 0 reads the metadata for all of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, zeros

import reshard
from reshard.errors import ArgumentError, CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from reshard.storage.formats.foreign import FINGERPRINT_BYTES
from reshard.storage.formats.native import manifest, manifest_blocks
from reshard.storage.formats.native.manifest import MANIFEST_NAME
from reshard.storage.stores.base import Capabilities
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.testing import Call, RecordingStore
from tests.ranks import RankPool

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FORMATS = ["reshard", "dcp", "safetensors", "torch"]
METADATA_OBJECTS = (MANIFEST_NAME, ".metadata")


class SharedStore(RecordingStore):
    """A store that all ranks share, and that is read with `read`."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(concurrent_reads=4)


class Counter:
    """A Stateful value whose state_dict() is collective."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        dist.barrier()
        return {"count": 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def tensors() -> dict[str, torch.Tensor]:
    return {f"layers.{i}.weight": torch.arange(64 * 1024, dtype=torch.float32).reshape(256, 256) + i for i in range(4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("formats")
    reshard.save({**tensors(), "counter": {"count": 7}}, made / "reshard")
    dcp.save(tensors(), storage_writer=FileSystemWriter(made / "dcp", sync_files=False), no_dist=True)
    for format in ("safetensors", "torch"):
        (made / format).mkdir()
    save_file(tensors(), made / "safetensors" / "model.safetensors")
    torch.save(tensors(), made / "torch" / "model.pt")
    return made


def state_of(dim: int | None) -> dict[str, Any]:
    if dim is None:
        return {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: zeros(t.shape, device_mesh=mesh, placements=[Shard(dim)]) for name, t in tensors().items()}


def check(state: dict[str, Any]) -> None:
    for name, tensor in tensors().items():
        found = state[name]
        assert torch.equal(found.full_tensor() if hasattr(found, "full_tensor") else found, tensor), name


@contextmanager
def small_blocks() -> Iterator[None]:
    """Treat every manifest as a large one with many blocks."""
    with (
        patch.object(manifest, "FIRST_MANIFEST_READ_BYTES", 1024),
        patch.object(manifest_blocks, "MAX_BLOCK_BYTES", 512),
    ):
        yield


def load_recorded(location: str, dim: int | None, is_stateful: bool = False) -> tuple[list[Call], reshard.Report]:
    store, state = SharedStore(LocalStore(location)), state_of(dim)
    counter = Counter()
    report = reshard.load({**state, "counter": counter} if is_stateful else state, store, cooperative=False)
    check(state)
    if is_stateful:
        assert counter.state == {"count": 7}
    return store.calls, report


@pytest.mark.parametrize(("format", "is_stateful"), [*((format, False) for format in FORMATS), ("reshard", True)])
def test_only_rank_0_reads_metadata(ranks: RankPool, folder: Path, format: str, is_stateful: bool) -> None:
    (own, report), *others = ranks.run(4, load_recorded, str(folder / format), None, is_stateful)
    assert any(call.name in METADATA_OBJECTS or call.method == "list" for call in own)
    for calls, _ in others:
        assert not any(call.name in METADATA_OBJECTS or call.method == "list" for call in calls)
        assert not any(call.stop - call.start == FINGERPRINT_BYTES for call in calls)
        assert len(calls) < len(own)
    assert report.ranks[1].requests < report.ranks[0].requests
    assert 0 < report.ranks[1].bytes_fetched < report.ranks[0].bytes_fetched


def load_large(location: str, dim: int | None) -> list[Call]:
    with small_blocks():
        return load_recorded(location, dim)[0]


def test_rank_0_reads_the_blocks_of_a_large_manifest_that_several_ranks_need(ranks: RankPool, tmp_path: Path) -> None:
    with small_blocks():
        reshard.save(tensors(), tmp_path)
    own, *others = ranks.run(4, load_large, str(tmp_path), None)
    assert sum(call.name == MANIFEST_NAME for call in own) > 1
    assert not any(call.name == MANIFEST_NAME for calls in others for call in calls)


def load_one_each(location: str) -> tuple[int, int]:
    """Load a tensor of its own on each rank. Return the bytes of the manifest that were read, and how many it has."""
    at = 16 * dist.get_rank()
    store, state = SharedStore(LocalStore(location)), {f"{at}.weight": torch.zeros(64, 64)}
    with small_blocks():
        reshard.load(state, store, cooperative=False)
    assert torch.equal(state[f"{at}.weight"], torch.full((64, 64), float(at)))
    return sum(call.stop - call.start for call in store.calls if call.name == MANIFEST_NAME), store.size(MANIFEST_NAME)


def test_ranks_that_need_different_blocks_read_their_own(ranks: RankPool, tmp_path: Path) -> None:
    with small_blocks():
        reshard.save({f"{at}.weight": torch.full((64, 64), float(at)) for at in range(64)}, tmp_path)
    for nbytes, size in ranks.run(4, load_one_each, str(tmp_path)):
        assert 0 < nbytes < size


def load_error(locations: list[str]) -> tuple[str, str, list[Call]]:
    store = SharedStore(LocalStore(locations[dist.get_rank()]))
    try:
        reshard.load(state_of(None), store)
    except CheckpointError as error:
        return type(error).__name__, str(error), store.calls
    raise AssertionError("no error")


def test_all_ranks_raise_the_error_of_rank_0(ranks: RankPool, folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folder / "reshard", damaged)
    content = (damaged / MANIFEST_NAME).read_bytes()
    (damaged / MANIFEST_NAME).write_bytes(content[:100] + b"?" + content[101:])
    for location, kind in [(tmp_path / "none", CheckpointNotFoundError), (damaged, CorruptCheckpointError)]:
        found = ranks.run(3, load_error, [str(location)] * 3)
        assert {name for name, _, _ in found} == {kind.__name__}
        assert all(str(location) in text for _, text, _ in found)
        assert [bool(calls) for _, _, calls in found] == [True, False, False]


def test_ranks_with_different_locations_open_the_checkpoint_by_themselves(
    ranks: RankPool, folder: Path, tmp_path: Path
) -> None:
    same, other = tmp_path / "same", tmp_path / "other"
    shutil.copytree(folder / "reshard", same)
    reshard.save({name: tensor + 1 for name, tensor in tensors().items()}, other)
    assert all(ranks.run(2, load_from, [str(folder / "reshard"), str(same)]))
    for name, text, _ in ranks.run(2, load_error, [str(folder / "reshard"), str(other)]):
        assert name == ArgumentError.__name__
        assert "the ranks opened 2 different checkpoints" in text


def load_from(locations: list[str]) -> bool:
    calls, _ = load_recorded(locations[dist.get_rank()], 0)
    return any(call.name == MANIFEST_NAME for call in calls)
