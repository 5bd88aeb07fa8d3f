"""Conversions that are killed (SIGKILL) at a call of their store. The next run continues and cleans up."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import reshard
from reshard.errors import CheckpointExistsError, StoreError
from reshard.storage.conversion import journal
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.testing import Call, RecordingStore
from tests.conversion.samples import (
    COMMITS,
    KIB,
    assert_clean,
    assert_converted,
    by_name,
    cut_small,
    names_in,
    save_native,
)
from tests.ranks import PRELOADED

pytestmark = pytest.mark.slow

UNIT = 100 * KIB
NOTE = ".reshard-convert-"
OPTIONS: dict[str, dict[str, Any]] = {
    "reshard": {"codec": "none"},
    "dcp": {},
    "safetensors": {"max_file_bytes": 200 * KIB},
}


@pytest.fixture
def state() -> dict[str, Any]:
    torch.manual_seed(0)
    return {"large": torch.randn(400, 250), "layers": {str(i): torch.randn(100, 100) for i in range(8)}}


def survives(work: Callable[..., object], *arguments: object) -> bool:
    """Call a function in a new process. Return whether it was not killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def convert(src: Path, store: Any, format: str) -> reshard.Report:
    return reshard.convert(src, store, format=format, **OPTIONS[format])


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def convert_and_die(src: Path, dst: Path, format: str, kill_at: int) -> None:
    """Convert, and die before the nth call of the store."""
    left = kill_at

    def before(call: Call) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            kill()

    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch, unit=UNIT)
        convert(src, RecordingStore(LocalStore(dst), before), format)


def convert_and_die_in_a_put(src: Path, dst: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", kill)
        convert(src, dst, "reshard")


def convert_and_die_before_the_commit(src: Path, dst: Path, format: str) -> None:
    def before(call: Call) -> None:
        if call.method == "put" and call.name == COMMITS[format]:
            kill()

    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch, unit=UNIT)
        convert(src, RecordingStore(LocalStore(dst), before), format)


@pytest.mark.parametrize("format", OPTIONS)
def test_conversion_continues_after_a_kill_at_any_call(
    format: str, state: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch, unit=UNIT)
    src = save_native(state, tmp_path / "src")
    ended = after_commit = continued = 0
    for kill_at in range(0, 200, 3):
        dst = tmp_path / f"dst-{kill_at}"
        finished = survives(convert_and_die, src, dst, format, kill_at)
        before = names_in(dst) if dst.exists() else set()
        notes = {name for name in before if name.startswith(NOTE)}
        if not finished:
            committed = COMMITS[format] in before
            store = RecordingStore(LocalStore(dst))
            report = convert(src, store, format)
            noted = {call.name for call in store.calls if call.method == "put" and call.name.startswith(NOTE)}
            assert not noted & notes
            assert (report.total.bytes_needed == 0) == (committed or bool(notes and not noted))
            after_commit += committed
            continued += bool(notes) and bool(noted)
        assert_converted(dst, by_name(state), format)
        assert_clean(names_in(dst), dst, format)
        with pytest.raises(CheckpointExistsError, match="there is already a checkpoint"):
            convert(src, dst, format)
        if finished:
            ended += 1
            break
    assert ended == 1
    assert after_commit > 0
    assert continued > 2


def test_temporary_file_of_a_killed_put_is_removed(state: dict[str, Any], tmp_path: Path) -> None:
    """On a local disk, `put` writes a temporary file first."""
    src, dst = save_native(state, tmp_path / "src"), tmp_path / "dst"
    assert not survives(convert_and_die_in_a_put, src, dst)
    assert [name for name in names_in(dst) if name.endswith(".tmp")]
    convert(src, dst, "reshard")
    assert_converted(dst, by_name(state), "reshard")
    assert_clean(names_in(dst), dst, "reshard")


@pytest.mark.parametrize("format", OPTIONS)
def test_unit_with_missing_objects_is_written_again(
    format: str, state: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch, unit=UNIT)
    src = save_native(state, tmp_path / "src")
    dst = tmp_path / "dst"
    assert not survives(convert_and_die_before_the_commit, src, dst, format)
    objects = sorted(name for name in names_in(dst) if not name.startswith("."))
    assert len(objects) > 2
    (dst / objects[1]).unlink()
    recording = RecordingStore(LocalStore(dst))
    convert(src, recording, format)
    assert sum(call.method == "create" for call in recording.calls) == 1
    assert_converted(dst, by_name(state), format)
    assert_clean(names_in(dst), dst, format)


def count_notes(calls: list[Call]) -> int:
    return sum(call.method == "put" and call.name.startswith(NOTE) for call in calls)


@pytest.mark.parametrize("format", OPTIONS)
def test_many_small_units_share_a_note(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, piece=4 * KIB, unit=4 * KIB)
    src = save_native({f"{i:03}": torch.full((1024,), float(i)) for i in range(60)}, tmp_path / "src")
    store = RecordingStore(LocalStore(tmp_path / "dst"))
    begin = time.monotonic()
    reshard.convert(src, store, format=format, **{**OPTIONS[format], "max_file_bytes": 4 * KIB})
    assert sum(call.method == "create" for call in store.calls) == 60
    assert count_notes(store.calls) <= 2 + (time.monotonic() - begin)
    assert len(reshard.open(tmp_path / "dst").tensors) == 60
    assert_clean(names_in(tmp_path / "dst"), tmp_path / "dst", format)


def test_each_slow_unit_has_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, piece=4 * KIB, unit=4 * KIB)
    monkeypatch.setattr(journal, "NOTE_EVERY_S", 0.0)
    src = save_native({f"{i:03}": torch.full((1024,), float(i)) for i in range(20)}, tmp_path / "src")
    store = RecordingStore(LocalStore(tmp_path / "dst"))
    reshard.convert(src, store, codec="none")
    assert count_notes(store.calls) == 20


@pytest.mark.parametrize("failing_at", [1, 7, 19])
def test_failed_conversion_writes_a_note_of_finished_units(
    failing_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch, piece=4 * KIB, unit=4 * KIB)
    src = save_native({f"{i:03}": torch.full((1024,), float(i)) for i in range(20)}, tmp_path / "src")
    created = 0

    def fail(call: Call) -> None:
        nonlocal created
        created += call.method == "create"
        if call.method == "create" and created == failing_at + 1:
            raise StoreError("injected")

    with pytest.raises(StoreError, match="injected"):
        reshard.convert(src, RecordingStore(LocalStore(tmp_path / "dst"), fail), format="dcp")
    store = RecordingStore(LocalStore(tmp_path / "dst"))
    reshard.convert(src, store, format="dcp")
    assert sum(call.method == "create" for call in store.calls) == 20 - failing_at
    assert len(reshard.open(tmp_path / "dst").tensors) == 20
