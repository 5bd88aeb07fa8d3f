"""After a signal or `save_now`, all ranks make a save in the same call."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import reshard
from reshard.storage.training.requested_saves import SAVE, RequestedSaves, StopSignals
from tests.ranks import RankPool

ROOT = Path(__file__).parents[2]


def state(value: float) -> dict[str, Any]:
    return {"w": torch.full((20, 30), float(value)), "step": value}


def train(folder: str, request_on: list[int], at: int, kind: str, asynchronous: bool) -> tuple[list[int], int, bool]:
    """Train in lock step, as FSDP does, until `should_stop` or step 2000. Return the steps that were saved."""
    rank, rng = dist.get_rank(), random.Random(dist.get_rank())
    saved: list[int] = []
    with reshard.CheckpointManager(
        folder, save_every=10_000, asynchronous=asynchronous, background="thread", signals=[signal.SIGUSR1]
    ) as manager:
        step = 0
        while step < 2000 and not manager.should_stop and not (saved and kind == "save"):
            step += 1
            dist.all_reduce(torch.ones(3))
            time.sleep(rng.random() / 500)
            if step == at and rank in request_on:
                if kind == "signal":
                    os.kill(os.getpid(), signal.SIGUSR1)
                elif kind == "save":
                    threading.Thread(target=manager.save_now).start()
                else:
                    threading.Thread(target=manager.save_now, kwargs={"stop": True}).start()
            if manager.save(step, state(step)):
                saved.append(step)
        return saved, step, manager.should_stop


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("request_on", [[0], [2], [0, 1, 2]], ids=["rank 0", "rank 2", "all"])
@pytest.mark.parametrize("kind", ["signal", "save", "stop"])
def test_all_ranks_save_the_same_step_after_a_request(
    ranks: RankPool, tmp_path: Path, kind: str, request_on: list[int], asynchronous: bool
) -> None:
    results = ranks.run(3, train, str(tmp_path), request_on, 20, kind, asynchronous)
    (saved,), step, stops = results[0]
    assert results == [([saved], step, stops)] * 3
    assert saved == step >= 20
    assert stops == (kind != "save")
    with reshard.CheckpointManager(tmp_path, read_only=True) as manager:
        loaded = state(0)
        assert manager.restore(loaded) == saved == loaded["step"]


def request_many(folder: str) -> list[int]:
    """Request saves from all ranks at random times, and return the steps that were saved."""
    rng = random.Random(dist.get_rank())
    saved: list[int] = []
    with reshard.CheckpointManager(folder, save_every=10_000, asynchronous=False, signals=()) as manager:
        for step in range(1, 301):
            dist.all_reduce(torch.ones(3))
            time.sleep(0.003)
            if rng.random() < 0.02:
                manager.save_now()
            if manager.save(step, state(step)):
                saved.append(step)
    return saved


def test_many_requests_of_all_ranks_are_served_together(ranks: RankPool, tmp_path: Path) -> None:
    results = ranks.run(3, request_many, str(tmp_path))
    assert len(results[0]) > 1
    assert results == [results[0]] * 3


def request_in_group(folder: str) -> list[int]:
    group = dist.new_group([2, 0], sort_ranks=False)
    if dist.get_rank() == 1:
        return []
    assert isinstance(group, dist.ProcessGroup)
    saved: list[int] = []
    with reshard.CheckpointManager(
        folder, save_every=10_000, asynchronous=True, background="thread", process_group=group, signals=()
    ) as manager:
        for step in range(1, 1001):
            dist.all_reduce(torch.ones(3), group=group)
            time.sleep(0.002)
            if step == 5 and dist.get_rank() == 0:
                manager.save_now()
            if manager.save(step, state(step)):
                saved.append(step)
                break
        manager.wait()
        assert manager.steps() == saved
        loaded = state(0)
        assert manager.restore(loaded) == saved[0] == loaded["step"]
    return saved


def test_ranks_of_a_subgroup_agree(ranks: RankPool, tmp_path: Path) -> None:
    first, second, third = ranks.run(3, request_in_group, str(tmp_path))
    assert second == []
    assert len(first) == 1
    assert first == third


def test_signal_saves_once_and_is_then_handled_as_before(tmp_path: Path) -> None:
    received: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        with reshard.CheckpointManager(
            tmp_path, save_every=100, asynchronous=False, signals=[signal.SIGUSR1]
        ) as manager:
            assert not manager.save(1, state(1))
            os.kill(os.getpid(), signal.SIGUSR1)
            assert received == [signal.SIGUSR1]
            assert not manager.should_stop
            assert manager.save(2, state(2))
            assert manager.should_stop
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not manager.save(3, state(3))
        assert len(received) == 2
        assert manager.should_stop
    finally:
        signal.signal(signal.SIGUSR1, previous)


def run_process(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_signal_that_no_save_served_ends_the_process_when_the_manager_is_closed(tmp_path: Path) -> None:
    code = """
        import os, signal, sys, reshard
        with reshard.CheckpointManager(sys.argv[1], asynchronous=False) as manager:
            manager.save(1, {"step": 1})
            os.kill(os.getpid(), signal.SIGTERM)
            print("closing", flush=True)
        print("closed", flush=True)
    """
    done = run_process(tmp_path, code)
    assert (done.stdout.split(), done.returncode) == (["closing"], -signal.SIGTERM), done.stderr
    reshard.CheckpointManager(tmp_path).close()


@pytest.mark.slow
def test_signal_that_is_repeated_ends_the_process(tmp_path: Path) -> None:
    code = """
        import os, signal, sys, reshard
        from reshard.storage.training import requested_saves
        manager = reshard.CheckpointManager(sys.argv[1], asynchronous=False)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        print("duplicate", flush=True)
        requested_saves.REPEATED_AFTER_S = 0
        os.kill(os.getpid(), signal.SIGTERM)
        print("repeated", flush=True)
    """
    done = run_process(tmp_path, code)
    assert (done.stdout.split(), done.returncode) == (["duplicate"], -signal.SIGTERM), done.stderr


def test_request_that_no_save_served_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with reshard.CheckpointManager(tmp_path, save_every=100, signals=()) as manager:
        manager.save(1, state(1))
        manager.save_now()
    assert "a save was requested, but `save` was not called again" in caplog.text


def test_closing_restores_the_signal_handler(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with reshard.CheckpointManager(tmp_path):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_requested_save_of_a_step_that_exists_counts(tmp_path: Path) -> None:
    with reshard.CheckpointManager(tmp_path, save_every=2, asynchronous=False, signals=()) as manager:
        assert manager.save(2, state(2))
        manager.save_now(stop=True)
        assert not manager.save(2, state(2))
        assert manager.should_stop


def test_failed_save_is_requested_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with reshard.CheckpointManager(tmp_path, save_every=100, asynchronous=False, signals=()) as manager:
        manager.save_now(stop=True)
        with pytest.raises(reshard.errors.UnsupportedValueError):
            manager.save(1, {"f": torch.ones(3).to_sparse()})
        assert not manager.should_stop
        assert manager.save(2, state(2))
        assert manager.should_stop


@pytest.mark.slow
def test_child_process_is_ended_by_the_signal(tmp_path: Path) -> None:
    """A forked child, such as a worker of a data loader, inherits the handler, but not its meaning."""
    code = """
        import os, signal, sys, time, warnings
        import reshard
        manager = reshard.CheckpointManager(sys.argv[1])
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks with threads
        child = os.fork()
        if not child:
            time.sleep(600)
            os._exit(3)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else f"exit {status}")
        os.kill(os.getpid(), signal.SIGTERM)
        print(manager.save(1, {"step": 1}), manager.should_stop)
        manager.close()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["15", "True", "True"], done.stderr
    assert done.returncode == -signal.SIGTERM


def test_calls_that_do_not_save_use_no_collective(ranks: RankPool, tmp_path: Path) -> None:
    """One rank makes all its calls while the others wait."""
    ranks.run(2, call_alone, str(tmp_path))


def call_alone(folder: str) -> None:
    with reshard.CheckpointManager(folder, save_every=10_000, signals=()) as manager:
        for turn in range(2):
            if dist.get_rank() == turn:
                assert not any(manager.save(step, {}) for step in range(1, 100))
            dist.barrier()


def test_rank_that_has_answered_cannot_pass_the_chosen_call() -> None:
    """Without a group, the next call saves."""
    requested = RequestedSaves(None)
    assert not requested.begin_call()
    requested.request(SAVE)
    assert requested.begin_call()
    requested.end_save()
    assert not requested.begin_call()


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 2, 1), (1, 0, 2)])
def test_managers_that_are_closed_in_any_order_restore_the_signal_handler(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    original = signal.getsignal(signal.SIGUSR1)
    try:
        managers = [reshard.CheckpointManager(tmp_path / str(at), signals=[signal.SIGUSR1]) for at in sorted(order)]
        for at in order:
            managers[at].close()
            os.kill(os.getpid(), signal.SIGUSR1)
        assert len(seen) == len(order)
        assert signal.getsignal(signal.SIGUSR1) is original
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_signal_ends_a_process_whose_managers_are_closed(tmp_path: Path) -> None:
    code = """
        import os, signal, sys, time, reshard
        managers = [reshard.CheckpointManager(f"{sys.argv[1]}/{at}") for at in range(2)]
        between = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *arguments: between(*arguments))  # of another library
        for manager in managers:
            manager.close()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, timeout=50, check=False).returncode == -signal.SIGTERM


@pytest.mark.parametrize("below", [signal.SIG_IGN, None])
def test_signals_that_another_thread_closed_are_passed_on(below: Any) -> None:
    seen: list[int] = []
    received: list[int] = []
    others: list[int] = []
    before = signal.signal(signal.SIGUSR1, below or (lambda number, _: seen.append(number)))
    try:
        signals = StopSignals([signal.SIGUSR1], lambda: received.append(1))
        between: Any = signal.getsignal(signal.SIGUSR1)

        def of_another_library(*arguments: Any) -> None:
            others.append(1)
            between(*arguments)

        signal.signal(signal.SIGUSR1, of_another_library)
        closing = threading.Thread(target=signals.close)
        closing.start()
        closing.join()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert (len(others), len(seen), received) == (3, 0 if below else 3, [])
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("order", ["signal first", "close first"])
def test_signal_ends_a_process_whose_manager_another_thread_closes(tmp_path: Path, order: str) -> None:
    code = """
        import os, signal, sys, threading, time, reshard
        manager = reshard.CheckpointManager(sys.argv[1])
        closing = threading.Thread(target=manager.close)
        if sys.argv[2] == "close first":
            closing.start()
            closing.join()
        os.kill(os.getpid(), signal.SIGTERM)
        if sys.argv[2] == "signal first":
            closing.start()
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), order]
    assert subprocess.run(command, cwd=ROOT, timeout=50, check=False).returncode == -signal.SIGTERM
