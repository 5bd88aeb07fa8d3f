"""The writer process of `reshard.async_save` works in the environment of the trainer."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import reshard
from reshard.errors import ArgumentError, RankError, StoreError
from reshard.storage.stores.local import LocalStore, NodeLocalStore
from reshard.storage.stores.testing import Call, RecordingStore
from reshard.storage.writing import writer_process as writer_process_module
from reshard.storage.writing.writer_process import PickledStore, writer_process

pytestmark = pytest.mark.slow

CREDENTIAL = "RESHARD_TEST_CREDENTIAL"


@pytest.fixture(autouse=True, scope="module")
def end_of_the_writer_process() -> Iterator[None]:
    yield
    reshard.release_memory()


@dataclass
class NotesCredential:
    """Notes the credential of the process that writes, unless it is the trainer."""

    folder: str
    trainer: int

    def __call__(self, call: Call) -> None:
        if call.method == "write" and os.getpid() != self.trainer:
            Path(self.folder, "credential").write_text(str(os.environ.get(CREDENTIAL)))


@pytest.mark.parametrize("credentials", [("old", "new"), (None, "new"), ("old", None)], ids=str)
def test_the_writer_process_uses_credentials_that_were_set_after_it_started(
    credentials: tuple[str | None, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RecordingStore(LocalStore(tmp_path / "c"), NotesCredential(str(tmp_path), os.getpid()))
    pids = []
    for credential in credentials:
        monkeypatch.delenv(CREDENTIAL, raising=False)
        if credential is not None:
            monkeypatch.setenv(CREDENTIAL, credential)
        reshard.async_save({"w": torch.ones(3)}, store, overwrite=True, background="process").result()
        assert (tmp_path / "credential").read_text() == str(credential)
        pids.append(writer_process().pid)
    assert pids[0] == pids[1]


def test_the_writer_process_uses_the_umask_of_the_trainer(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        for mask in (0o022, 0o077, 0o027):
            os.umask(mask)
            path = tmp_path / f"{mask:o}"
            reshard.async_save({"w": torch.ones(3)}, path, background="process").result()
            files = [file for file in path.rglob("*") if file.is_file()]
            assert len(files) >= 2
            assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~mask}
            assert os.umask(mask) == mask
    finally:
        os.umask(before)


@pytest.mark.parametrize("background", ["thread", "process"])
def test_an_error_of_the_progress_callback_is_not_one_of_the_process(background: Any, tmp_path: Path) -> None:
    def fail(_: reshard.Progress) -> None:
        raise BrokenPipeError("nobody reads the progress")

    state = {"w": torch.ones(3)}
    with pytest.raises(RankError, match="BrokenPipeError: nobody reads the progress"):
        reshard.async_save(state, tmp_path / "c", background=background, progress=fail).result()
    reshard.async_save(state, tmp_path / "c", background=background).result()


def test_a_writer_process_that_is_stopped_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reshard.async_save({"w": torch.ones(3)}, tmp_path / "1", background="process").result()
    monkeypatch.setattr(writer_process_module, "WARN_AFTER_S", 0.2)
    pid = writer_process().pid
    os.kill(pid, signal.SIGSTOP)
    try:
        saving = reshard.async_save({"w": torch.ones(3)}, tmp_path / "2", background="process")
        deadline = time.monotonic() + 60
        while f"the writer process {pid} has written nothing for" not in caplog.text:
            assert not saving.done()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(pid, signal.SIGCONT)
    saving.result()
    assert reshard.open(tmp_path / "2").verify() == []


def test_a_working_directory_that_is_gone_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a relative path would be another one, and the objects would be written there."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    pickled = PickledStore.of("c", None)
    monkeypatch.setattr(PickledStore, "of", lambda *_: pickled)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").rmdir()
    with pytest.raises(StoreError, match=r"cannot change to .*/gone, the working directory of the trainer"):
        pickled.open()
    handle = reshard.async_save({"w": torch.ones(3)}, "c", background="process")
    with pytest.raises(StoreError, match=r"cannot change to .*/gone, the working directory of the trainer"):
        handle.result()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    reshard.async_save({"w": torch.ones(3)}, "c", background="process").result()
    assert reshard.open(tmp_path / "c").read("w").tolist() == [1, 1, 1]


def test_a_trainer_without_a_working_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ArgumentError, match=r"needs a working directory, but that of this process is gone.*os\.chdir"):
        reshard.async_save({"w": torch.ones(3)}, tmp_path / "c", background="process")
    reshard.async_save({"w": torch.ones(3)}, tmp_path / "c", background="thread").result()


def test_a_pickled_store_does_not_show_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CREDENTIAL, "hidden-value")
    pickled = PickledStore.of(tmp_path / "c", None)
    assert pickled.environment[CREDENTIAL] == "hidden-value"
    assert "hidden-value" not in repr(pickled)


@pytest.mark.parametrize("kind", [LocalStore, NodeLocalStore])
def test_a_pickled_store_keeps_its_class(kind: type[LocalStore], tmp_path: Path) -> None:
    store = kind(tmp_path / "c")
    opened = PickledStore.of(store, None).open()
    assert type(opened) is kind
    assert opened.location == store.location
    assert opened.capabilities.is_shared == store.capabilities.is_shared == (kind is LocalStore)
