"""Two managers that save to one run detect each other."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import reshard
from reshard import errors
from reshard.storage.training import lease as lease_module
from reshard.storage.training.lease import FOLDER, Lease
from tests.conftest import Place

ROOT = Path(__file__).parents[2]


def holder_of(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(max((root / FOLDER).iterdir()).read_text())
    return found


def change_holder(root: Path, **fields: Any) -> None:
    path = max((root / FOLDER).iterdir())
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def of_another_machine(root: Path) -> None:
    change_holder(root, host="other", process="other", time=time.time())


def test_a_release_does_not_wait_for_a_store_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lease = Lease(str(tmp_path), renew_every_s=0.01)
    is_renewing, may_end = threading.Event(), threading.Event()

    def hang(*_: Any, **__: Any) -> None:
        is_renewing.set()
        assert may_end.wait(60)

    monkeypatch.setattr(lease, "_write", hang)
    assert is_renewing.wait(60)
    monkeypatch.setattr(lease_module, "RELEASE_TIMEOUT_S", 0.1)
    lease.release()
    assert "is not released: the store does not answer" in caplog.text
    may_end.set()
    with pytest.raises(errors.RunInUseError, match="was closed, so nothing was committed"):
        lease.check()


@pytest.fixture
def abandoned(tmp_path: Path) -> Path:
    """A run whose manager ended without releasing the lease."""
    lease = Lease(str(tmp_path), renew_every_s=3600)
    lease._lost = "the test ended it"
    lease_module._held.clear()
    return tmp_path


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process with a manager of the run at `tmp_path`."""
    code = """
        import sys, time, torch, reshard
        manager = reshard.CheckpointManager(sys.argv[1], asynchronous=False)
        manager.save(1, {"w": torch.ones(3)})
        print("ready", flush=True)
        time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("calls", [(), ("check", "renew"), ("renew",)])
def test_a_manager_in_a_folder_that_was_created_again_is_detected(tmp_path: Path, calls: tuple[str, ...]) -> None:
    """The objects of both leases have the same name."""
    old = Lease(str(tmp_path), renew_every_s=3600)
    shutil.rmtree(tmp_path / FOLDER)
    new = Lease(str(tmp_path), renew_every_s=3600)
    assert old.mark.name == new.mark.name
    for call in calls:
        with pytest.raises(errors.RunInUseError, match="another manager has taken over this run"):
            getattr(old, call)()
    new.renew()
    old.release()
    assert not holder_of(tmp_path)["released"]
    new.release()


def test_a_damaged_object_of_a_lease_is_written_again(tmp_path: Path) -> None:
    lease = Lease(str(tmp_path), renew_every_s=3600)
    (path,) = (tmp_path / FOLDER).iterdir()
    path.write_bytes(b"")
    lease.check()
    lease.renew()
    assert holder_of(tmp_path)["pid"] == os.getpid()
    lease.release()


@pytest.mark.parametrize(("field", "value"), [("time", "x"), ("time", None), ("sequence", "x"), ("sequence", [])])
def test_a_lease_with_a_field_of_another_type_is_taken_over(abandoned: Path, field: str, value: Any) -> None:
    change_holder(abandoned, **{field: value})
    lease = Lease(str(abandoned))
    assert lease.first_sequence > time.time() * 1000
    lease.release()


def test_a_lease_of_a_later_version_is_understood(tmp_path: Path) -> None:
    lease = Lease(str(tmp_path), renew_every_s=3600)
    change_holder(tmp_path, new_field=1)
    lease.check()
    lease.release()
    later = Lease(str(tmp_path))
    assert later.first_sequence <= time.time() * 1000  # it was not taken over
    later.release()


def test_second_manager_in_one_process_is_refused(tmp_path: Path) -> None:
    message = "another CheckpointManager of this process: close that one"
    with reshard.CheckpointManager(tmp_path), pytest.raises(errors.RunInUseError, match=message):
        reshard.CheckpointManager(tmp_path)
    reshard.CheckpointManager(tmp_path).close()


@pytest.mark.slow
def check_taken_over_at_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager_of(root, expires_after_s=3600).close()
    assert "waiting up to" not in caplog.text


def manager_of(root: Path, *, expires_after_s: float, **options: Any) -> reshard.CheckpointManager:
    with patch.object(lease_module, "EXPIRES_AFTER_S", expires_after_s):
        return reshard.CheckpointManager(root, **options)


def test_manager_of_a_process_that_runs_is_refused(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    with pytest.raises(errors.RunInUseError, match=f"is managed by another CheckpointManager, process {other.pid} on"):
        reshard.CheckpointManager(tmp_path)


@pytest.mark.slow
def test_run_of_a_killed_process_is_taken_over_at_once(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    """Also while the killed process is a zombie."""
    other.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    with manager_of(tmp_path, expires_after_s=3600) as manager:
        assert manager.restore({"w": torch.zeros(3)}) == 1


def test_lease_of_another_machine_is_taken_over_when_it_is_not_renewed(
    abandoned: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of_another_machine(abandoned)
    manager_of(abandoned, expires_after_s=0.2).close()
    assert "ended without closing its manager, or still runs: waiting up to" in caplog.text


@pytest.mark.parametrize("is_behind_s", [0, 3600])
def test_lease_of_another_machine_is_respected_when_it_is_renewed(
    is_behind_s: int, abandoned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the other machine may be behind."""
    of_another_machine(abandoned)
    change_holder(abandoned, time=time.time() - is_behind_s)
    reading = Lease._read

    def read(lease: Lease, number: int) -> Any:
        change_holder(abandoned, renewals=holder_of(abandoned)["renewals"] + 1)
        return reading(lease, number)

    monkeypatch.setattr(Lease, "_read", read)
    with pytest.raises(errors.RunInUseError, match=r"process \d+ on other"):
        manager_of(abandoned, expires_after_s=60)


def test_lease_that_expired_long_ago_is_taken_over_after_a_short_wait(
    abandoned: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "SHORT_WAIT_S", 0.2)
    change_holder(abandoned, host="other", process="other", time=time.time() - 3600)
    manager_of(abandoned, expires_after_s=3600).close()
    assert "waiting up to 0 s for a sign of life" in caplog.text


def test_process_id_that_was_reused_does_not_hold_the_lease(abandoned: Path, caplog: pytest.LogCaptureFixture) -> None:
    *machine, pid, start = holder_of(abandoned)["process"].split(" ")
    change_holder(abandoned, process=" ".join([*machine, pid, f"{int(start) - 1}"]))
    check_taken_over_at_once(abandoned, caplog)


def test_lease_that_cannot_be_understood_is_taken_over(abandoned: Path, caplog: pytest.LogCaptureFixture) -> None:
    max((abandoned / FOLDER).iterdir()).write_text("{")
    check_taken_over_at_once(abandoned, caplog)


@pytest.mark.parametrize("is_checked", [True, False])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_save_that_ends_after_the_lease_was_lost_does_not_hide_those_of_the_new_manager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool, is_checked: bool
) -> None:
    """Also if the check before the commit comes just before the lease is lost."""
    options: dict[str, Any] = {"asynchronous": asynchronous, "background": "thread", "keep": [reshard.latest(3)]}
    first = reshard.CheckpointManager(tmp_path, **options)
    for step in (10, 20):
        first.save(step, {"w": torch.full((3,), float(step))})
    first.wait()
    checking = Lease.check
    checks: list[int] = []

    def take_over(lease: Lease) -> None:
        """Let a new manager take over, restore and save, before the commit of the first one."""
        checks.append(1)
        if len(checks) < 2:
            checking(lease)
            return
        monkeypatch.setattr(Lease, "check", checking)
        of_another_machine(tmp_path)
        lease_module._held.clear()
        with manager_of(tmp_path, expires_after_s=0.1, **{**options, "asynchronous": False}) as second:
            state = {"w": torch.zeros(3)}
            assert second.restore(state) == 20
            second.save(22, {"w": torch.full((3,), 22.0)})
        if is_checked:
            checking(lease)

    monkeypatch.setattr(Lease, "check", take_over)
    try:
        first.save(30, {"w": torch.full((3,), 30.0)})
        first.wait()
    except errors.RunInUseError:
        assert is_checked
    with contextlib.suppress(errors.RunInUseError):
        first.close()
    assert (tmp_path / "step-00000030" / "manifest.reshard").exists() != is_checked
    with reshard.CheckpointManager(tmp_path, **options) as third:
        assert third.steps() == [10, 20, 22]
        state = {"w": torch.zeros(3)}
        assert third.restore(state) == 22
        assert state["w"].eq(22).all()
        third.save(31, state)
    assert (tmp_path / "step-00000022").exists()


def test_manager_that_lost_its_lease_neither_saves_nor_removes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = reshard.CheckpointManager(tmp_path, asynchronous=False, keep=[reshard.latest(1)])
    first.save(1, {"w": torch.ones(3)})
    of_another_machine(tmp_path)  # so that it is not refused as one of this process
    lease_module._held.clear()
    with manager_of(tmp_path, asynchronous=False, expires_after_s=0.1) as second:
        second.save(2, {"w": torch.ones(3)})
        with pytest.raises(errors.RunInUseError, match="another manager has taken over this run, process"):
            first.save(3, {"w": torch.ones(3)})
        first._controller.root.refresh()  # type: ignore[union-attr]
        first._controller.root.remove_not_kept()  # type: ignore[union-attr]
        first._controller.root.wait()  # type: ignore[union-attr]
        assert "RunInUseError" in caplog.text
        assert second.restore({"w": torch.zeros(3)}, step=1) == 1
        first.close()
        assert second.save(4, {"w": torch.ones(3)})


def test_only_one_of_two_managers_takes_over(abandoned: Path) -> None:
    change_holder(abandoned, released=True)
    leases: list[Any] = []
    listing = Lease._numbers

    def numbers(lease: Lease) -> list[int]:
        found = listing(lease)
        if not leases:
            leases.append(None)
            leases[0] = Lease(str(abandoned))  # between the listing and the creation of the other one
        return found

    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(Lease, "_numbers", numbers)
        with pytest.raises(errors.RunInUseError):
            Lease(str(abandoned))
    leases[0].check()
    leases[0].release()


def test_lease_is_renewed_and_old_ones_are_removed(tmp_path: Path) -> None:
    Lease(str(tmp_path)).release()
    lease = Lease(str(tmp_path), renew_every_s=0.01)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (
        not holder_of(tmp_path)["renewals"] or len([*(tmp_path / FOLDER).iterdir()]) > 1
    ):
        time.sleep(0.01)
    lease.release()
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["00000002.json"]
    assert holder_of(tmp_path)["renewals"] > 0
    assert holder_of(tmp_path)["released"]


@pytest.mark.parametrize("store_name", ["memory", "moto", "seaweedfs", "gcs", "azurite"])
def test_lease_works_on_stores(place: Place) -> None:
    uri, options = place
    first = Lease(uri, options, renew_every_s=3600)
    with pytest.raises(errors.RunInUseError):
        Lease(uri, options)
    first.check()
    first.release()
    second = Lease(uri, options, renew_every_s=3600)
    second.check()
    with pytest.raises(errors.RunInUseError):
        first.check()
    second.release()
    assert reshard.find_checkpoints(uri, options) == []


def test_manager_that_was_lost_in_this_process_is_taken_over(abandoned: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_taken_over_at_once(abandoned, caplog)


def test_manager_that_was_dropped_is_taken_over_in_the_same_process(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    manager = reshard.CheckpointManager(tmp_path, asynchronous=False)
    manager.save(1, {"w": torch.ones(3)})
    assert signal.getsignal(signal.SIGTERM) != before
    del manager
    gc.collect()
    assert signal.getsignal(signal.SIGTERM) == before
    with manager_of(tmp_path, asynchronous=False, expires_after_s=3600) as manager:
        assert manager.save(2, {"w": torch.ones(3)})
        assert manager.steps() == [1, 2]


@pytest.mark.slow
def test_dropped_manager_releases_its_lease_at_exit(tmp_path: Path) -> None:
    code = "import sys, reshard; manager = reshard.CheckpointManager(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    assert holder_of(tmp_path)["released"]


@pytest.mark.parametrize("parent", ["keeps", "closes"])
def test_forked_child_may_have_a_manager_when_its_parent_has_closed_its_own(tmp_path: Path, parent: str) -> None:
    manager = reshard.CheckpointManager(tmp_path, signals=())
    go, closed = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        code = 3
        try:
            os.read(go, 1)
            lease_module.EXPIRES_AFTER_S = 2.0
            Lease(str(tmp_path), expires_after_s=40.0).release()
            code = 0
        except errors.RunInUseError as error:
            code = 1 if "of this process" in str(error) else 2
        finally:
            os._exit(code)
    if parent == "closes":
        manager.close()
    os.write(closed, b"x")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    manager.close()
    assert code == (0 if parent == "closes" else 2)


def test_lost_lease_ends_its_thread(tmp_path: Path) -> None:
    lease = Lease(str(tmp_path), renew_every_s=3600)
    threads = list(lease._pool.threads)
    lease._lost = "the test ended it"
    lease.release()
    for thread in threads:
        thread.join(30)
    assert [thread for thread in threads if thread.is_alive()] == []
