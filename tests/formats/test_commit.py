"""The commit, and the checks before it: a save hides no other checkpoint, and reports which objects are missing."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

import reshard
from reshard.errors import (
    AccessDeniedError,
    CheckpointExistsError,
    CommitError,
    NotCommittedError,
    StoreError,
    UnavailableError,
)
from reshard.storage.formats.detect import CONVERSION
from reshard.storage.formats.native.commit import commit
from reshard.storage.formats.native.manifest import MANIFEST_NAME
from reshard.storage.stores import retry
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.testing import Call, RecordingStore
from tests.failing_s3 import failing_s3
from tests.torture.faults import CLIENTS, by_client

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STATE = {"w": torch.arange(12.0).reshape(4, 3)}


def of_dcp(folder: Path) -> None:
    dcp.save(STATE, checkpoint_id=folder)


def of_dcp_unfinished(folder: Path) -> None:
    of_dcp(folder)
    (folder / ".metadata").unlink()


def of_dcp_by_ranks(folder: Path) -> None:
    of_dcp(folder)
    (folder / ".metadata").rename(folder / "__0.metadata")


def of_safetensors(folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file(STATE, folder / "model.safetensors")


def of_hugging_face(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "model.safetensors.index.json").write_text("{}")


def of_torch_save(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        torch.save(STATE, folder / name)

    return write


def of_a_conversion(folder: Path) -> None:
    """Leave what a killed conversion leaves."""
    reshard.save(STATE, folder.parent / "source")

    def before(call: Call) -> None:
        if call.method == "put" and call.name.endswith(".index.json"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard.convert(folder.parent / "source", RecordingStore(LocalStore(folder), before), format="safetensors")
    for path in folder.glob("*.safetensors"):
        path.unlink()


OTHERS: dict[str, Callable[[Path], None]] = {
    ".metadata": of_dcp,
    "__0_0.distcp": of_dcp_unfinished,
    "__0.metadata": of_dcp_by_ranks,
    "model.safetensors": of_safetensors,
    "model.safetensors.index.json": of_hugging_face,
    "model.pt": of_torch_save("model.pt"),
    "x.pth": of_torch_save("x.pth"),
    "pytorch_model.bin": of_torch_save("pytorch_model.bin"),
    "last.ckpt": of_torch_save("last.ckpt"),
    CONVERSION: of_a_conversion,
}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", OTHERS)
def test_save_raises_instead_of_hiding_a_checkpoint_of_another_tool(name: str, tmp_path: Path) -> None:
    OTHERS[name](tmp_path / "x")
    before = content(tmp_path / "x")
    for overwrite in (False, True):
        with pytest.raises(CheckpointExistsError, match=f"it has '{name}'") as caught:
            reshard.save(STATE, tmp_path / "x", overwrite=overwrite)
        assert str(tmp_path / "x") in str(caught.value)
    with pytest.raises(CheckpointException, match=f"it has '{name}'"):
        dcp.save(STATE, storage_writer=reshard.StorageWriter(tmp_path / "x"))
    assert content(tmp_path / "x") == before


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("name", [".metadata", "model.safetensors", "x.bin", CONVERSION])
def test_save_to_a_bucket_raises_instead_of_hiding_a_checkpoint(name: str, client: str) -> None:
    with failing_s3(fails=lambda method, key: False, content={f"run/{name}": b"x"}) as server:
        options = by_client(client, server.options)
        with pytest.raises(CheckpointExistsError, match=f"it has '{name}'"):
            reshard.save(STATE, "s3://bucket/run", storage_options=options)
        assert set(server.content) == {f"run/{name}"}
        reshard.save(STATE, "s3://bucket", storage_options=options)


def test_save_ignores_unrelated_files(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    for name in (
        "config.json",
        "log.txt",
        "data/part.safetensors",
        "data/.metadata",
        "old/model.pt",
        "dir.pt/x",
        "metadata",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    for overwrite in (False, True):
        reshard.save(STATE, folder, overwrite=overwrite)
    assert reshard.open(folder).read("w").equal(STATE["w"])


def test_save_ignores_what_a_killed_save_left(tmp_path: Path) -> None:
    reshard.save(STATE, tmp_path / "x")
    (tmp_path / "x" / MANIFEST_NAME).unlink()
    with pytest.raises(NotCommittedError):
        reshard.open(tmp_path / "x")
    reshard.save(STATE, tmp_path / "x")


def test_overwrite_replaces_own_checkpoint_beside_foreign_files(tmp_path: Path) -> None:
    reshard.save(STATE, tmp_path / "native")
    of_dcp(tmp_path / "x")
    shutil.copytree(tmp_path / "native", tmp_path / "x", dirs_exist_ok=True)
    dcp.save({"w": torch.ones(2)}, storage_writer=reshard.StorageWriter(tmp_path / "x"))
    dcp.save({"w": torch.zeros(2)}, storage_writer=reshard.StorageWriter(tmp_path / "x"))
    assert reshard.open(tmp_path / "x").read("w").tolist() == [0, 0]
    with pytest.raises(CheckpointExistsError, match="overwrite=True"):
        reshard.save(STATE, tmp_path / "x")


def test_save_lists_the_folder_at_most_once(tmp_path: Path) -> None:
    for overwrite in (False, True):
        memory = MemoryStore()
        store = RecordingStore(memory)
        reshard.save(STATE, store, overwrite=overwrite)
        assert [call.name for call in store.calls if call.method == "list"] == ["", "data"]
    store = RecordingStore(memory)
    reshard.save(STATE, store, overwrite=True)
    assert [call.name for call in store.calls if call.method == "list"] == ["data"]


def named(*ranks: int) -> set[str]:
    return {f"data/{rank:032x}-{rank:05}.shard" for rank in ranks}


@pytest.mark.parametrize(
    ("written", "seen", "rank", "words"),
    [
        (
            (0, 1),
            (0,),
            0,
            r"rank 0 cannot see 1 data objects at memory that rank 1 wrote, such as 'data/0+1-00001\.shard'",
        ),
        ((0, 1, 2, 3), (0,), 0, r"rank 0 cannot see 3 data objects at memory that ranks 1, 2, 3 wrote"),
        ((0, 1, 2, 3), (), 2, r"rank 2 cannot see 4 data objects at memory that ranks 0, 1, 3 wrote"),
        (tuple(range(20)), (0,), 0, r"ranks 1, 2, 3, 4, 5, 6, 7, 8 and 11 more wrote"),
        ((0, 1), (1,), 0, r"1 data objects that were just written are gone from memory, .*: something else removes"),
    ],
)
def test_commit_names_the_ranks_whose_objects_are_missing(
    written: tuple[int, ...], seen: tuple[int, ...], rank: int, words: str
) -> None:
    store = MemoryStore()
    store.content = dict.fromkeys(named(*seen), b"")
    with pytest.raises(StoreError, match=words) as caught:
        commit(store, b"manifest", named(*written), overwrite=False, rank=rank)
    assert "was not committed" in str(caught.value)
    of_others = words.startswith("rank")
    assert ("all ranks must write to the same shared location" in str(caught.value)) is of_others
    assert MANIFEST_NAME not in store.content


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("status", "code"), [(410, "Gone"), (409, "ConditionalRequestConflict"), (409, "OperationAborted")]
)
def test_commit_is_retried_after_a_conflict(
    status: int, code: str, overwrite: bool, client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)
    failed: list[str] = []

    def fails(method: str, key: str) -> bool:
        if method == "PUT" and key.endswith(MANIFEST_NAME) and len(failed) < 2:
            failed.append(key)
            return True
        return False

    with failing_s3(fails=fails, answers=status, code=code) as server:
        options = by_client(client, server.options)
        reshard.save(STATE, "s3://bucket/run", storage_options=options, overwrite=overwrite)
        assert reshard.open("s3://bucket/run", storage_options=options).read("w").equal(STATE["w"])
    assert len(failed) == 2


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(("status", "code"), [(410, "Gone"), (409, "ConditionalRequestConflict")])
def test_stored_manifest_decides_the_outcome_of_a_conflict(
    status: int, code: str, client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a conflict the store has this manifest, that of another save, or none."""
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.3)
    there: list[bytes] = []

    def fails(method: str, key: str) -> bool:
        if method == "PUT" and key.endswith(MANIFEST_NAME):
            if there:
                server.content[key] = there[0] or server.requests[-1][3]
            return True
        return False

    with failing_s3(fails=fails, answers=status, code=code) as server:
        options = by_client(client, server.options)
        with pytest.raises(CommitError, match="may or may not have been written"):
            reshard.save(STATE, "s3://bucket/never", storage_options=options)
        there[:] = [b""]
        reshard.save(STATE, "s3://bucket/own", storage_options=options)
        assert reshard.open("s3://bucket/own", storage_options=options).read("w").equal(STATE["w"])
        there[:] = [b"another's"]
        with pytest.raises(CheckpointExistsError):
            reshard.save(STATE, "s3://bucket/other", storage_options=options)


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "ExpiredToken"),
        (401, "Unauthorized"),
        (403, "AccessDenied"),
        (404, "NoSuchBucket"),
        (501, "NotImplemented"),
    ],
)
def test_a_refused_manifest_is_not_committed_and_its_data_is_removed(status: int, code: str, client: str) -> None:
    with failing_s3(answers=status, code=code) as server:
        server.fails = lambda method, key: method == "PUT" and key.endswith(MANIFEST_NAME)
        with pytest.raises(StoreError, match="the manifest was not written, so nothing was committed") as found:
            reshard.save(STATE, "s3://bucket/run", storage_options=by_client(client, server.options), overwrite=True)
        assert not isinstance(found.value, CommitError)
        assert server.content == {}


def test_a_manifest_that_is_refused_after_a_lost_answer_may_have_been_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)
    answers = iter([UnavailableError("the connection was closed"), AccessDeniedError("the token has expired")])

    def fail(call: Call) -> None:
        if call.method == "put":
            raise next(answers)

    inner = MemoryStore()
    with pytest.raises(CommitError, match=r"may or may not have been written: .*the token has expired"):
        reshard.save(STATE, retry.RetryingStore(RecordingStore(inner, fail)))
    assert len(list(inner.list())) == 1


def test_a_full_disk_commits_nothing_and_keeps_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if MANIFEST_NAME in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    reshard.save(STATE, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match=r"the manifest was not written, .*No space left on device"):
            reshard.save({"w": torch.zeros(5)}, tmp_path, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("client", CLIENTS)
def test_a_server_that_refuses_conditional_writes_is_named(client: str) -> None:
    with failing_s3(refuses=lambda method, key, headers: 501 if "if-none-match" in headers else 0) as server:
        server.fails = lambda method, key: False
        options = by_client(client, server.options)
        with pytest.raises(StoreError, match=r"conditional writes cannot be checked: .* overwrite=True needs none"):
            reshard.save(STATE, "s3://bucket/run", storage_options=options)
        assert server.content == {}
        reshard.save(STATE, "s3://bucket/run", storage_options=options, overwrite=True)
        assert reshard.open("s3://bucket/run", storage_options=options).read("w").equal(STATE["w"])


def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the folders that are synced to disk are added."""
    found: list[str] = []
    fsync = os.fsync

    def recording(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isdir(path):
            found.append(path)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    return found


@pytest.mark.parametrize("depth", [0, 1, 4])
@pytest.mark.parametrize("format", ["save", "reshard", "dcp", "safetensors"])
def test_created_folders_are_synced_to_disk(
    format: str, depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reshard.save(STATE, tmp_path / "source")
    location = tmp_path.joinpath("new", *map(str, range(depth)))
    before = {path for path in tmp_path.rglob("*") if path.is_dir()}
    found = synced(monkeypatch)
    if format == "save":
        reshard.save(STATE, location)
    else:
        reshard.convert(tmp_path / "source", location, format=format)
    made = {path for path in tmp_path.rglob("*") if path.is_dir()} - before
    assert location in made
    for folder in made:
        assert str(folder.parent) in found, folder
        if any(path.is_file() for path in folder.iterdir()):
            assert str(folder) in found, folder


def test_existing_folders_are_not_created_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    found = synced(monkeypatch)
    reshard.save(STATE, tmp_path / "a" / "b" / "c")
    assert str(tmp_path / "a" / "b") in found
    assert str(tmp_path) not in found
