"""What a user can observe: progress, logs, seconds per stage, and ranges of the profiler."""

from __future__ import annotations

import io
import logging
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._profiler import _ExperimentalConfig  # pyright: ignore[reportMissingModuleSource]
from torch.profiler import ProfilerActivity, profile

import reshard
from reshard import Progress
from reshard.storage.conversion.targets.dcp import DcpTarget
from reshard.storage.errors import UnavailableError
from reshard.storage.runtime import progress as progress_of
from reshard.storage.runtime.progress import Meter
from reshard.storage.stores.memory import MemoryStore
from tests.conftest import Place
from tests.ranks import RankPool

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

VALUES = torch.arange(4 << 20, dtype=torch.float32).reshape(1024, 4096).cos()
STATE = {"a": VALUES, "b": VALUES.bfloat16(), "n": 1}
NBYTES = VALUES.nbytes * 3 // 2 + 1


class RecordedProgress:
    """A progress callback that keeps its arguments."""

    def __init__(self, fail_at: float = 2.0) -> None:
        self.all: list[Progress] = []
        self.threads: set[int] = set()
        self._fail_at = fail_at

    def __call__(self, progress: Progress) -> None:
        self.all.append(progress)
        self.threads.add(threading.get_ident())
        if progress.done_bytes >= self._fail_at * max(progress.total_bytes, 1):
            raise ValueError("stopped by the callback")

    def check(self, task: str, location: str, total: int | None = None) -> None:
        done = [progress.done_bytes for progress in self.all]
        last = self.all[-1]
        assert done == sorted(done)
        assert last.done_bytes == last.total_bytes > 0
        assert total in (None, last.total_bytes)
        assert {(progress.task, progress.location, progress.rank) for progress in self.all} == {(task, location, 0)}
        assert self.threads == {threading.get_ident()}, "the callback runs in the thread of the call"


def test_every_call_reports_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_of, "SHOWN_EVERY_S", 0.0)
    location = str(tmp_path / "a")
    saved, loaded, verified, converted, of_rank = (RecordedProgress() for _ in range(5))
    reshard.save(STATE, location, progress=saved)
    saved.check("save", location, NBYTES)
    report = reshard.load({**STATE}, location, progress=loaded)
    loaded.check("load", location)
    stored = loaded.all[-1].total_bytes
    assert stored < report.total.bytes_fetched < stored + 10_000, "progress counts everything except the manifest"
    checkpoint = reshard.open(location)
    assert not checkpoint.verify(progress=verified)
    verified.check("verify", location, stored)
    assert len(verified.all) > 1
    reshard.convert(location, tmp_path / "b", format="dcp", progress=converted)
    converted.check("convert", str(tmp_path / "b"), NBYTES)
    assert len(converted.all) > 2
    checkpoint.load_rank(
        reshard.Layout(2, {"*": "colwise"}), rank=1, progress=lambda progress: of_rank.all.append(progress)
    )
    assert {progress.rank for progress in of_rank.all} == {1}


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_calls_on_s3_report_progress(codec: str, s3: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_of, "SHOWN_EVERY_S", 0.0)
    uri, options = s3
    saved, loaded = RecordedProgress(), RecordedProgress()
    reshard.save(STATE, uri, codec=codec, storage_options=options, progress=saved)
    saved.check("save", uri, NBYTES)
    reshard.load({**STATE}, uri, storage_options=options, progress=loaded)
    loaded.check("load", uri)


def test_error_of_a_callback_stops_the_call() -> None:
    store = MemoryStore()
    with pytest.raises(reshard.errors.RankError, match="stopped by the callback"):
        reshard.save(STATE, store, progress=RecordedProgress(fail_at=1.0))
    assert not [name for name in store.list() if name.endswith(".json")], "no checkpoint was committed"
    reshard.save(STATE, store, overwrite=True)
    with pytest.raises(reshard.errors.RankError, match="stopped by the callback"):
        reshard.load({**STATE}, store, progress=RecordedProgress(fail_at=1.0))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class ClosedTerminal(Terminal):
    def write(self, text: str, /) -> int:
        raise OSError("the terminal is closed")


def test_progress_bar_that_cannot_be_drawn_does_not_stop_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "400")  # or a long path would be cut
    monkeypatch.setattr("sys.stderr", ClosedTerminal())
    reshard.save(STATE, tmp_path / "a", progress=True)
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    reshard.save(STATE, f"{tmp_path}/a[/b][lr=1]", progress=True)
    assert "a[/b][lr=1]" in shown.getvalue()


def test_repeated_work_counts_once_in_the_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_of, "SHOWN_EVERY_S", 0.0)
    reshard.save(STATE, tmp_path / "a")
    real, failures = DcpTarget.write, [UnavailableError("injected")]

    def fails_once(*arguments: Any) -> Any:
        done = real(*arguments)
        if failures:
            raise failures.pop()
        return done

    monkeypatch.setattr(DcpTarget, "write", fails_once)
    meters: list[Meter] = []

    class RecordedMeter(Meter):
        def __enter__(self) -> RecordedMeter:
            meters.append(self)
            return self

    monkeypatch.setattr("reshard.storage.conversion.convert.Meter", RecordedMeter)
    reshard.convert(tmp_path / "a", tmp_path / "b", format="dcp", progress=RecordedProgress())
    assert not failures
    assert [meter.done for meter in meters] == [NBYTES]


def test_keyboard_interrupt_in_a_callback_is_raised(tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    for call in (reshard.save, reshard.load):
        with pytest.raises(KeyboardInterrupt):
            call({**STATE}, tmp_path / "a", progress=interrupt)
        reshard.save(STATE, tmp_path / "a", overwrite=True)


def save_and_load_on_a_rank(location: str) -> tuple[list[int], int]:
    seen: list[Progress] = []
    reshard.save({"a": torch.ones(1000), "b": torch.ones(1000)}, location, progress=seen.append)
    reshard.load({"a": torch.ones(1000)}, location, progress=seen.append)
    return [progress.rank for progress in seen], seen[-1].done_bytes


def test_every_rank_reports_its_own_progress(tmp_path: Path, ranks: RankPool) -> None:
    found = ranks.run(2, save_and_load_on_a_rank, str(tmp_path / "a"))
    assert [set(numbers) for numbers, _ in found] == [{0}, {1}]
    assert all(nbytes > 0 for _, nbytes in found)


@pytest.mark.parametrize("out", [io.StringIO, Terminal])
def test_progress_bar_is_shown_only_on_a_terminal(
    out: Callable[[], io.StringIO], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "400")  # or a long path would be cut
    shown = out()
    monkeypatch.setattr("sys.stderr", shown)
    reshard.save(STATE, tmp_path / "a", progress=True)
    if isinstance(shown, Terminal):
        assert "save " in shown.getvalue()
        assert "25.2/25.2 MB" in shown.getvalue()
    else:
        assert shown.getvalue() == ""
    meter = Meter("load", True, rank=1)
    assert meter._show is None, "only rank 0 shows a progress bar"
    assert pickle.loads(pickle.dumps(Meter("save", print)))._show is None  # noqa: S301


def test_report_has_seconds_per_stage(tmp_path: Path) -> None:
    saved = reshard.save(STATE, tmp_path / "a").local.seconds
    assert set(saved) == {"plan", "encode", "write", "commit", "total"}
    assert saved["plan"] + saved["commit"] < saved["total"]
    loaded = reshard.load({**STATE}, tmp_path / "a").local.seconds
    assert set(loaded) == {"open", "plan", "fetch", "verify", "decode", "total"}
    assert loaded["open"] + loaded["plan"] < loaded["total"]
    converted = reshard.convert(tmp_path / "a", tmp_path / "b", format="dcp").local.seconds
    assert set(converted) == {"plan", "fetch", "verify", "decode", "total"}
    measured = [*saved.items(), *loaded.items(), *converted.items()]
    assert all(seconds > 0 for stage, seconds in measured if stage != "verify")  # a local fetch also verifies


def test_log_records_are_from_reshard_and_have_the_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "reshard"):
        reshard.save(STATE, tmp_path / "a")
        reshard.load({**STATE}, tmp_path / "a")
        reshard.open(tmp_path / "a").verify()
        reshard.convert(tmp_path / "a", tmp_path / "b", format="dcp")
    ours = [record for record in caplog.records if record.name.split(".")[0] == "reshard"]
    for begin in ("saved to ", "loaded from ", "verified ", "converted "):
        assert any(record.getMessage().startswith(begin) for record in ours), begin
    assert {record.rank for record in ours} == {0}  # type: ignore[attr-defined]


def messages_of_a_rank(location: str) -> list[str]:
    found: list[str] = []

    class RecordingHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger = logging.getLogger("reshard")
    handler = RecordingHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        reshard.save({"a": torch.ones(8)}, location)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    return found


def test_log_messages_start_with_the_rank(tmp_path: Path, ranks: RankPool) -> None:
    for rank, messages in enumerate(ranks.run(2, messages_of_a_rank, str(tmp_path / "a"))):
        assert messages
        assert all(message.startswith(f"rank {rank}: ") for message in messages)


def test_profile_contains_the_stages(tmp_path: Path) -> None:
    config = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=config) as profiled:
        reshard.save(STATE, tmp_path / "a")
        reshard.load({**STATE}, tmp_path / "a")
    names = {str(event.key) for event in profiled.key_averages()}
    stages: dict[str, Any] = {"save": ("write",), "load": ("open", "plan", "read", "decode")}
    assert names >= {f"reshard.{stage}" for of_call in stages.values() for stage in of_call}
