"""Deletes stay inside a checkpoint's folder: they follow no links, delete only its objects, and are all or nothing."""

from __future__ import annotations

import os
import pickle
import re
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from typer.testing import CliRunner

import reshard
from reshard.cli.app import app
from reshard.errors import ArgumentError, CorruptCheckpointError, StoreError
from reshard.storage.maintenance.catalog import find_removal
from reshard.storage.maintenance.gc import find_remains, remove_remains
from reshard.storage.runtime.threads import Pool, current_stop
from reshard.storage.stores import local
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.open import open_store
from reshard.storage.stores.retry import discard
from reshard.storage.stores.testing import Call, RecordingStore

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STATE = {"w": torch.arange(10)}
WRITTEN = f"data/{'0123456789abcdef' * 2}-00000.shard"


def save_linked(tmp_path: Path) -> tuple[Path, Path]:
    """Save a good checkpoint, and create another one whose data folder is a link into it."""
    good, evil = tmp_path / "good", tmp_path / "evil"
    reshard.save(STATE, good)
    evil.mkdir()
    (evil / "manifest.reshard").write_bytes((good / "manifest.reshard").read_bytes())
    (evil / "data").symlink_to("../good/data")
    return good, evil


def names_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def write_dcp(folder: Path, *names: str) -> Path:
    """Write metadata of DCP that names some objects, and the objects that do not exist yet."""
    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        f"w{at}": BytesStorageMetadata() for at in range(len(names))
    }
    storage_data = {MetadataIndex(f"w{at}"): _StorageInfo(name, 0, 1) for at, name in enumerate(names)}
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(entries, storage_data=storage_data)))
    for name in names:
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")
    return folder


@pytest.mark.parametrize(
    "call",
    [
        lambda folder: reshard.remove(folder),
        lambda folder: reshard.save({"w": torch.arange(3)}, folder, overwrite=True),
        lambda folder: reshard.save({"step": 3}, folder, overwrite=True),
        lambda folder: reshard.save({}, folder, overwrite=True),
        lambda folder: LocalStore(folder).delete(["manifest.reshard", *LocalStore(folder).list("data")]),
        lambda folder: open_store(f"file://{folder}").delete(LocalStore(folder).list("data")),
        lambda folder: open_store(f"simplecache::file://{folder}").delete(LocalStore(folder).list("data")),
        lambda folder: reshard.remove(f"simplecache::file://{folder}"),
    ],
)
def test_nothing_is_deleted_through_a_linked_folder(call: Callable[[Path], object], tmp_path: Path) -> None:
    good, evil = save_linked(tmp_path)
    before = names_below(tmp_path)
    with pytest.raises(StoreError, match="'data' is a symbolic link"):
        call(evil)
    assert names_below(tmp_path) == before
    assert reshard.open(good).verify() == reshard.open(evil).verify() == []


def test_nothing_is_written_into_a_linked_folder(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data").symlink_to(other)
    with pytest.raises(StoreError, match="is a symbolic link"):
        reshard.save(STATE, tmp_path / "run")
    assert names_below(tmp_path) == {"other", "run", "run/data"}


def test_the_folder_of_the_checkpoint_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "run"
    link.symlink_to("disk")
    reshard.save(STATE, link)
    reshard.save({"w": torch.arange(3)}, link, overwrite=True)
    assert len(list((tmp_path / "disk" / "data").iterdir())) == 1
    reshard.remove(link)
    assert names_below(tmp_path) == {"disk", "run"}


def test_removing_a_linked_object_keeps_the_target_of_the_link(tmp_path: Path) -> None:
    reshard.save(STATE, tmp_path / "run")
    (data,) = (tmp_path / "run" / "data").iterdir()
    data.rename(tmp_path / "kept")
    data.symlink_to(tmp_path / "kept")
    assert reshard.open(tmp_path / "run").verify() == []
    reshard.remove(tmp_path / "run")
    assert names_below(tmp_path) == {"kept"}


@pytest.mark.parametrize("scheme", ["", "file://", "simplecache::file://"])
def test_a_folder_instead_of_an_object_stops_a_removal_before_it_begins(scheme: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    reshard.save({f"layers.{i}": torch.arange(10) for i in range(3)}, folder)
    (data,) = (folder / "data").iterdir()
    data.unlink()
    (data / "mine").mkdir(parents=True)
    before = names_below(tmp_path)
    for call in (reshard.remove, lambda uri: reshard.save(STATE, uri, overwrite=True)):
        with pytest.raises(StoreError, match=rf"{re.escape(data.name)}.*is a folder"):
            call(f"{scheme}{folder}")
    assert names_below(tmp_path) == before


def test_a_folder_instead_of_a_data_file_of_dcp_stops_a_removal(tmp_path: Path) -> None:
    folder = write_dcp(tmp_path / "run", "__0_0.distcp", "__1_0.distcp")
    (folder / "__1_0.distcp").unlink()
    (folder / "__1_0.distcp").mkdir()
    with pytest.raises(StoreError, match="is a folder"):
        reshard.remove(folder)
    assert names_below(folder) == {".metadata", "__0_0.distcp", "__1_0.distcp"}


@pytest.mark.parametrize("name", ["../victim", "a/../../victim", "/etc/victim", "", ".", "a//b", "data/"])
def test_a_name_outside_of_the_root_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"x")
    store = LocalStore(tmp_path / "run")
    store.put("x", b"x", overwrite=True)
    for call in (
        lambda: store.delete(["x", name]),
        lambda: store.put(name, b"", overwrite=True),
        lambda: store.create(name).__enter__(),
    ):
        with pytest.raises(StoreError, match="cannot be the name of an object"):
            call()
    assert names_below(tmp_path) == {"victim", "run", "run/x"}


def test_a_folder_that_is_replaced_by_a_link_during_a_delete_is_not_followed(tmp_path: Path) -> None:
    """Another thread keeps replacing the folder by a link. Files outside must stay."""
    outside, inside = tmp_path / "outside", tmp_path / "run" / "data"
    names = [f"data/{number:04}.shard" for number in range(50)]
    outside.mkdir()
    inside.mkdir(parents=True)
    for name in names:
        (outside / Path(name).name).write_bytes(b"precious")
    (tmp_path / "run" / "link").symlink_to(outside)
    ended = threading.Event()

    def swap() -> None:
        while not ended.is_set():
            os.rename(inside, tmp_path / "run" / "aside")
            os.rename(tmp_path / "run" / "link", inside)
            os.rename(inside, tmp_path / "run" / "link")
            os.rename(tmp_path / "run" / "aside", inside)

    swapping = threading.Thread(target=swap)
    swapping.start()
    refused = 0
    try:
        until = time.monotonic() + 2
        while time.monotonic() < until:
            try:
                LocalStore(tmp_path / "run").delete(names)
            except StoreError:
                refused += 1
    finally:
        ended.set()
        swapping.join()
    assert refused
    assert len(list(outside.iterdir())) == len(names)


def test_a_link_created_between_the_check_and_the_delete_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, evil = tmp_path / "good", tmp_path / "evil"
    reshard.save(STATE, good)
    reshard.save(STATE, evil)
    (data,) = (evil / "data").iterdir()
    (good / "data" / data.name).write_bytes(b"precious")
    checks = LocalStore.check_delete

    def check(store: LocalStore, names: list[str]) -> None:
        checks(store, names)
        if f"data/{data.name}" in names:
            (evil / "data").rename(evil / "aside")
            (evil / "data").symlink_to(good / "data")

    monkeypatch.setattr(LocalStore, "check_delete", check)
    with pytest.raises(StoreError, match="is a symbolic link"):
        LocalStore(evil).delete([f"data/{data.name}"])
    assert (good / "data" / data.name).read_bytes() == b"precious"


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "link/precious.txt",
        "model.safetensors",
        "__0_0.distcp.bak",
        "__0.distcp",
        "a/__x_0.distcp",
        ".metadata",
    ],
)
def test_only_objects_that_dcp_writes_are_removed(name: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious.txt").write_bytes(b"x")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "link").symlink_to("../victim")
    write_dcp(folder, "__0_0.distcp", name)
    before = names_below(tmp_path)
    for call in (find_removal, reshard.remove):
        with pytest.raises(ArgumentError, match=f"DCP does not write.*{re.escape(repr(name))}"):
            call(folder)
    assert names_below(tmp_path) == before


@pytest.mark.parametrize("metadata", [".metadata", "__0.metadata"])
def test_objects_of_a_nested_checkpoint_are_not_removed(metadata: str, tmp_path: Path) -> None:
    dcp.save(STATE, checkpoint_id=tmp_path / "runs" / "step-1", no_dist=True)
    (tmp_path / "runs" / "step-1" / ".metadata").rename(tmp_path / "runs" / "step-1" / metadata)
    write_dcp(tmp_path / "runs", "step-1/__0_0.distcp")
    with pytest.raises(ArgumentError, match="belong to another checkpoint"):
        reshard.remove(tmp_path / "runs")
    assert reshard.open(tmp_path / "runs" / "step-1").read("w").equal(STATE["w"])


def test_no_object_of_dcp_is_removed_through_a_link(tmp_path: Path) -> None:
    dcp.save(STATE, checkpoint_id=tmp_path / "other", no_dist=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to("../other")
    write_dcp(tmp_path / "run", "link/__0_0.distcp")
    with pytest.raises(StoreError, match="'link' is a symbolic link"):
        reshard.remove(tmp_path / "run")
    assert reshard.open(tmp_path / "other").read("w").equal(STATE["w"])


def test_objects_of_dcp_with_prefixes_are_removed(tmp_path: Path) -> None:
    folder = write_dcp(tmp_path / "run", "__0_0.distcp", "10/epoch_5/__11_3.distcp", "model5__0_0.distcp")
    (folder / "__0.metadata").write_bytes((folder / ".metadata").read_bytes())
    (folder / "notes.txt").write_text("mine")
    removal = find_removal(folder)
    assert removal.unusual == ["10/epoch_5/__11_3.distcp", "model5__0_0.distcp"]
    assert sorted(reshard.remove(folder, expected=removal)) == sorted(removal.names)
    assert {name for name in names_below(folder) if (folder / name).is_file()} == {"notes.txt"}


def test_a_checkpoint_that_changed_since_find_removal_is_not_removed(tmp_path: Path) -> None:
    reshard.save(STATE, tmp_path / "run")
    removal = find_removal(tmp_path / "run")
    reshard.save(STATE, tmp_path / "run", overwrite=True)
    with pytest.raises(ArgumentError, match="has changed in the meantime"):
        reshard.remove(tmp_path / "run", expected=removal)
    assert reshard.open(tmp_path / "run").verify() == []


def call(*arguments: object, code: int = 0, answer: str | None = None) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), input=answer)
    assert result.exit_code == code, result.output
    return result.output


def test_rm_lists_the_objects_before_it_asks(tmp_path: Path) -> None:
    folder = write_dcp(tmp_path / "run", *(f"__{rank}_0.distcp" for rank in range(30)))
    shown = call("rm", folder, answer="n\n", code=1)
    assert shown.count(".distcp'") == 9
    assert "and 21 more" in shown
    assert "dcp checkpoint of 30 B, 31 objects" in shown
    names = [f"{rank}/__{rank}_0.distcp" for rank in range(30)]
    shown = call("rm", write_dcp(tmp_path / "prefixed", "__0_0.distcp", *names), answer="n\n", code=1)
    assert all(repr(name) in shown for name in names)
    hostile = write_dcp(tmp_path / "hostile", "\x1b[2J__0_0.distcp")
    assert "\x1b" not in call("rm", hostile, answer="n\n", code=1)
    call("rm", folder, answer="y\n")
    assert not folder.exists()


def test_gc_does_not_delete_through_a_link(tmp_path: Path) -> None:
    runs, victim = tmp_path / "runs", tmp_path / "victim"
    for folder in (runs / "step-1", victim):
        (folder / "data").mkdir(parents=True)
        (folder / WRITTEN).write_bytes(b"RESHARDD and more")
    found = find_remains(str(runs), older_than_s=0)
    (runs / "step-1").rename(runs / "aside")
    (runs / "step-1").symlink_to(victim)
    with pytest.raises(StoreError, match="'step-1' is a symbolic link"):
        remove_remains(found, older_than_s=0)
    assert (victim / WRITTEN).exists()
    assert find_remains(str(runs), older_than_s=0)[0].uri == str(runs / "aside"), "links are not searched either"


def test_gc_keeps_objects_that_are_committed_while_it_searches(tmp_path: Path) -> None:
    for method in ("read", "size", "modified"):
        folder = tmp_path / method
        reshard.save(STATE, folder)
        (data,) = (folder / "data").iterdir()
        manifest = folder / "manifest.reshard"
        manifest.rename(tmp_path / "aside")

        def commit(call: Call, method: str = method, manifest: Path = manifest, name: str = data.name) -> None:
            if call.method == method and call.name == f"data/{name}":
                (tmp_path / "aside").rename(manifest)

        from reshard.storage.maintenance.gc import _remains

        assert _remains(RecordingStore(LocalStore(folder), commit), [f"data/{data.name}"], 0) == {}
        assert reshard.open(folder).verify() == []


@pytest.mark.parametrize("method", ["read", "size", "modified"])
def test_gc_ignores_objects_that_vanish_while_it_searches(method: str, tmp_path: Path) -> None:
    from reshard.storage.maintenance.gc import _remains

    store = LocalStore(tmp_path)
    other = f"data/{'f' * 32}-00001.shard"
    for name in (WRITTEN, other):
        store.put(name, b"RESHARDD", overwrite=True)

    def vanish(call: Call) -> None:
        if call.method == method and call.name == other:
            store.delete([other])

    found = _remains(RecordingStore(store, vanish), [WRITTEN, other], 0)
    assert found == {WRITTEN: 8}


@pytest.mark.parametrize("hours", ["0", "0.5", "0.999", "-0"])
def test_gc_of_young_objects_requires_no_save_running(hours: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / WRITTEN).write_bytes(b"RESHARDD")
    assert "--no-save-running" in call("gc", tmp_path, "--older-than", hours, "--yes", code=2)
    assert (tmp_path / WRITTEN).exists()
    os.utime(tmp_path / WRITTEN, (0, 0))
    assert "1 object," in call("gc", tmp_path, "--older-than", hours, "--dry-run")
    call("gc", tmp_path, "--older-than", hours, "--yes", "--no-save-running")


def test_an_invalid_age_raises_argument_error(tmp_path: Path) -> None:
    for age in (-1.0, float("nan")):
        with pytest.raises(ArgumentError, match="older_than_s"):
            find_remains(str(tmp_path), older_than_s=age)
        with pytest.raises(ArgumentError, match="older_than_s"):
            remove_remains([], older_than_s=age)


TEMPORARIES = [
    f".manifest.reshard.{'0' * 32}.tmp",
    f"..metadata.{'1' * 32}.tmp",
    f".model.safetensors.index.json.{'2' * 32}.tmp",
    f"..reshard-convert.json.{'3' * 32}.tmp",
    f"..reshard-convert-000007.json.{'4' * 32}.tmp",
]
OTHERS = [".manifest.reshard.tmp", ".metadata.tmp", f".notes.txt.{'0' * 32}.tmp", f".manifest.reshard.{'0' * 31}.tmp"]


def test_gc_removes_temporary_files_of_killed_commits(tmp_path: Path) -> None:
    reshard.save(STATE, tmp_path / "run")
    (tmp_path / "alone").mkdir()
    for folder in (tmp_path / "run", tmp_path / "alone"):
        for name in TEMPORARIES + OTHERS:
            (folder / name).write_bytes(b"half")
    assert "no data" in call("gc", tmp_path)
    old = time.time() - 48 * 3600
    for folder in (tmp_path / "run", tmp_path / "alone"):
        for name in TEMPORARIES + OTHERS:
            os.utime(folder / name, (old, old))
    assert call("gc", tmp_path, "--yes").count("5 objects, 20 B") == 2
    for folder in (tmp_path / "run", tmp_path / "alone"):
        assert not names_below(folder).intersection(TEMPORARIES)
        assert names_below(folder).issuperset(OTHERS)
    assert reshard.open(tmp_path / "run").verify() == []


def test_a_commit_removes_its_old_temporary_files(tmp_path: Path) -> None:
    reshard.save(STATE, tmp_path)
    young = f".manifest.reshard.{'9' * 32}.tmp"
    for name in (*TEMPORARIES, young):
        (tmp_path / name).write_bytes(b"half")
    old = time.time() - local.OLD_S - 60
    for name in TEMPORARIES:
        os.utime(tmp_path / name, (old, old))
    reshard.save(STATE, tmp_path, overwrite=True)
    left = names_below(tmp_path)
    assert not left.intersection(TEMPORARIES[:1])
    assert left.issuperset([*TEMPORARIES[1:], young])


def test_a_conversion_removes_temporary_files_of_its_killed_commits(tmp_path: Path) -> None:
    reshard.save(STATE, tmp_path / "run")
    (tmp_path / "copy").mkdir()
    for name in TEMPORARIES:
        (tmp_path / "copy" / name).write_bytes(b"half")
    reshard.convert(tmp_path / "run", tmp_path / "copy", format="dcp")
    left = names_below(tmp_path / "copy").intersection(TEMPORARIES)
    assert left == {TEMPORARIES[0], TEMPORARIES[2]}, "those of commits of other formats"


def damaged(folder: Path) -> None:
    reshard.save({"w": torch.ones(10)}, folder)
    (folder / "manifest.reshard").write_bytes(b"")


def test_gc_leaves_a_damaged_checkpoint_and_cleans_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged(tmp_path / "a")
    reshard.save({"w": torch.ones(10)}, tmp_path / "b")
    (tmp_path / "b" / "manifest.reshard").unlink()
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0))
    (removed,) = reshard.gc(tmp_path)
    assert removed.folder == "b"
    assert "a is damaged, so nothing is removed there" in caplog.text
    assert list((tmp_path / "a" / "data").iterdir())


def test_a_checkpoint_with_a_damaged_manifest_is_removed(tmp_path: Path) -> None:
    damaged(tmp_path / "c")
    reshard.save({"w": torch.ones(10)}, tmp_path / "c" / "below")
    (tmp_path / "c" / "mine.txt").write_text("x")
    removed = reshard.remove(tmp_path / "c")
    assert removed[0] == "manifest.reshard"
    assert len(removed) == 2
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"below", "mine.txt"}
    assert reshard.open(tmp_path / "c" / "below").verify() == []


@pytest.mark.parametrize("format", ["reshard", "safetensors", "dcp"])
def test_an_unfinished_conversion_is_removed(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reshard.save({f"w{i}": torch.randn(100, 100) for i in range(9)}, tmp_path / "source")
    (data,) = (tmp_path / "source" / "data").iterdir()
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CorruptCheckpointError):
        reshard.convert(tmp_path / "source", tmp_path / "c", format=format)
    (tmp_path / "c" / "mine.txt").write_text("x")
    deleted: list[str] = []
    deleting = LocalStore.delete

    def delete(store: LocalStore, names: Iterable[str]) -> None:
        deleted.extend(names)
        deleting(store, names)

    monkeypatch.setattr(LocalStore, "delete", delete)
    assert find_removal(tmp_path / "c").format == "unfinished conversion"
    assert CliRunner().invoke(app, ["rm", str(tmp_path / "c"), "-y"]).exit_code == 0
    assert deleted[-1] == ".reshard-convert.json"
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["mine.txt"]
    reshard.save({"w": torch.ones(3)}, tmp_path / "c")


def test_files_of_the_user_beside_an_unfinished_conversion_stay(tmp_path: Path) -> None:
    for name in (".reshard-convert.json", ".reshard-convert-000001.json", "model-00001-of-00002.safetensors"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model-00002-of-00002.safetensors").symlink_to("nowhere")
    mine = {"optimizer.pt", "training_args.bin", "last.ckpt", "other.safetensors"}
    for name in mine:
        (tmp_path / name).write_text("x")
    reshard.remove(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == mine


class SlowStore(MemoryStore):
    def delete(self, names: Iterable[str]) -> None:
        with Pool(2, "slow") as pool:
            list(pool.map(lambda name: current_stop().wait(20), names))


def test_a_clean_up_after_a_failure_is_short() -> None:
    begin = time.monotonic()
    discard(SlowStore(), ["a", "b"])
    assert time.monotonic() - begin < 15
