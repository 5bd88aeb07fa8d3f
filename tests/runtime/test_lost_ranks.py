"""A rank that is killed, or stopped, is named on all other ranks, whatever they do at that time.

The timeout of the process group is much longer than these tests may take.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import reshard
from reshard.errors import RankError
from reshard.storage.formats.native.manifest import MANIFEST_NAME
from reshard.storage.runtime import lost_ranks, process_group
from reshard.storage.runtime.connections import PINGS
from reshard.storage.runtime.lost_ranks import Watch
from reshard.storage.runtime.neighbour import SILENT_BEATS, Absence
from reshard.storage.runtime.process_group import Collectives, on_all_ranks
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.testing import Call, RecordingStore
from tests.ranks import RankFailed, RankPool

pytestmark = pytest.mark.slow

WORLD = 4
LONG_S = 300


def long_group() -> Any:
    return dist.new_group(timeout=timedelta(minutes=30))


def state_on(group: Any, value: float) -> dict[str, Any]:
    mesh = DeviceMesh.from_group(group, "cpu")
    return {"w": DTensor.from_local(torch.full((16, 8), value), mesh, [Shard(0)]), "step": int(value)}


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_first(folder: str) -> None:
    reshard.save(state_on(dist.group.WORLD, 1), folder)


def run_call(call: str, state: dict[str, Any], store: reshard.Store, group: Any) -> None:
    if call == "save":
        reshard.save(state, store, process_group=group, overwrite=True)
    elif call == "load":
        reshard.load(state, store, process_group=group)
    elif call == "async_save":
        reshard.async_save(state, store, process_group=group, overwrite=True, background="thread").result()
    elif call == "cooperative_load":
        reshard.load(state, store, process_group=group, cooperative=True)
    else:
        with reshard.open(store).lazy(process_group=group) as weights:
            torch.empty(64, 8).copy_(weights["w"])


def lose(folder: str, dying: int, moment: str, call: str) -> None:
    """Save or load, while a rank is killed: before it calls, while all ranks work, or while it waits for the others."""
    group = long_group()
    is_dying = dist.get_rank() == dying
    dist.barrier()

    def before(made: Call) -> None:
        if made.method not in ("read", "write") or made.name == MANIFEST_NAME:
            return
        if moment == "working" and is_dying:
            kill_this_process()
        if moment == "working" or (moment == "waiting" and not is_dying):
            time.sleep(LONG_S)

    if is_dying and moment == "before":
        time.sleep(2)
        kill_this_process()
    if is_dying and moment == "waiting":
        threading.Timer(2, kill_this_process).start()
    store, state = RecordingStore(LocalStore(folder), before), state_on(group, 5)
    with pytest.raises(RankError) as caught:
        run_call(call, state, store, group)
    assert caught.value.group_is_broken
    dist.destroy_process_group()
    raise AssertionError(f"found: {caught.value}")


def ones_everywhere() -> float:
    found = torch.ones(1)
    dist.all_reduce(found)
    return float(found)


MOMENTS = ("before", "working", "waiting")
CALLS = ("save", "load", "async_save", "lazy")
DYING = (0, 1, WORLD - 1)
CASES = [
    (call, DYING[(i + j) % len(DYING)], moment) for i, call in enumerate(CALLS) for j, moment in enumerate(MOMENTS)
]


@pytest.mark.parametrize(("call", "dying", "moment"), CASES)
def test_every_rank_names_the_rank_that_was_killed(tmp_path: Path, call: str, dying: int, moment: str) -> None:
    with RankPool() as pool:
        pool.run(WORLD, save_first, str(tmp_path))
        with pytest.raises(RankFailed) as failed:
            pool.run(WORLD, lose, str(tmp_path), dying, moment, call, timeout_s=60)
        named = f"found: the process group broke, because rank {dying} died or left"
        assert str(failed.value).count(named) == WORLD - 1, str(failed.value)
        assert pool.run(2, ones_everywhere) == [2, 2]
    assert reshard.open(tmp_path).read("w").eq(1).all()


def lose_while_a_group_is_created(folder: str, dying: int, call: str) -> None:
    """Kill a rank that does not join the new group that the call creates, while the others wait for it in C code."""
    group = long_group()
    dist.barrier()
    if dist.get_rank() == dying:
        process_group._new_gloo_group = lambda _: kill_this_process()  # type: ignore[assignment,return-value]
    with pytest.raises(RankError) as caught:
        run_call(call, state_on(group, 5), LocalStore(folder), group)
    assert caught.value.group_is_broken
    raise AssertionError(f"found: {caught.value}")


@pytest.mark.parametrize(("call", "dying"), [("async_save", 0), ("async_save", 2), ("cooperative_load", 1)])
def test_every_rank_names_the_rank_that_dies_while_a_group_is_created(tmp_path: Path, call: str, dying: int) -> None:
    with RankPool() as pool:
        pool.run(WORLD, save_first, str(tmp_path))
        with pytest.raises(RankFailed) as failed:
            pool.run(WORLD, lose_while_a_group_is_created, str(tmp_path), dying, call, timeout_s=60)
    named = f"found: the process group broke, because rank {dying} died or left"
    assert str(failed.value).count(named) == WORLD - 1, str(failed.value)


def stop_a_rank(folder: str, stopped: int) -> None:
    """Stop the process of a rank. Its connections stay open, as those of a machine that is lost."""
    group = long_group()
    pids: list[Any] = [None] * WORLD
    dist.all_gather_object(pids, os.getpid())

    def before(made: Call) -> None:
        if made.method == "read" and made.name != MANIFEST_NAME:
            time.sleep(2)  # so that the rank has shown a pulse
            if dist.get_rank() == stopped:
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(LONG_S if dist.get_rank() == 0 else 0)

    load_until_it_breaks(group, RecordingStore(LocalStore(folder), before), pids[stopped])


def load_until_it_breaks(group: Any, store: reshard.Store, stopped_pid: int) -> None:
    """Load, and raise an AssertionError with the error of the load. Kill the process that was stopped."""
    with pytest.raises(RankError) as caught:
        reshard.load(state_on(group, 5), store, process_group=group)
    with contextlib.suppress(ProcessLookupError):  # another rank was faster
        os.kill(stopped_pid, signal.SIGKILL)
    dist.destroy_process_group()
    raise AssertionError(f"found: {caught.value}")


@pytest.mark.parametrize("stopped", [0, 2])
def test_every_rank_names_the_rank_that_does_not_respond(tmp_path: Path, stopped: int) -> None:
    check_that_all_name_it(stop_a_rank, tmp_path, stopped)


def check_that_all_name_it(stop: Callable[[str, int], None], folder: Path, stopped: int) -> None:
    """Check that all other ranks name a rank whose process is stopped."""
    with RankPool() as pool:
        pool.run(WORLD, save_first, str(folder))
        with pytest.raises(RankFailed) as failed:
            pool.run(WORLD, stop, str(folder), stopped, timeout_s=60)
    named = f"found: the process group broke, because rank {stopped} did not respond for 8 s"
    assert str(failed.value).count(named) == WORLD - 1, str(failed.value)


def stop_a_rank_early(folder: str, stopped: int) -> None:
    """Stop the process of a rank as soon as it is in the call: it has shown no pulse, like a rank that is elsewhere."""
    group = long_group()
    pids: list[Any] = [None] * WORLD
    dist.all_gather_object(pids, os.getpid())
    reshard.load(state_on(group, 5), folder, process_group=group)  # it answers a first ping

    def before(made: Call) -> None:
        if dist.get_rank() == stopped:
            os.kill(os.getpid(), signal.SIGSTOP)

    load_until_it_breaks(group, RecordingStore(LocalStore(folder), before), pids[stopped])


@pytest.mark.parametrize("stopped", [1, 3])  # rank 0 serves the store
def test_every_rank_names_the_rank_that_stops_before_its_first_pulse(tmp_path: Path, stopped: int) -> None:
    check_that_all_name_it(stop_a_rank_early, tmp_path, stopped)


def arrive_late(seconds: int) -> list[int]:
    """Keep the others waiting outside the call: in Python, and in a call of C code that blocks the interpreter."""
    group = long_group()
    on_all_ranks(dist.get_rank, group)
    if dist.get_rank() == 1:
        time.sleep(seconds)
        ctypes.PyDLL(None).sleep(seconds)
    return on_all_ranks(dist.get_rank, group)


def test_rank_that_is_late_is_not_lost(ranks: RankPool) -> None:
    assert ranks.run(3, arrive_late, 14) == [[0, 1, 2]] * 3


def test_a_rank_is_pinged_less_often_while_it_is_absent() -> None:
    absence, pinged = Absence(), list[int]()
    absence.answer = torch.ones(1)  # the first ping
    for beat in range(300):
        absence.listen()
        if absence.is_due():
            absence.ping(torch.ones(1))
            pinged.append(beat)
        assert not absence.is_lost()
    assert pinged == [2, 11, 44, 105, 166, 227, 288]
    absence.ping(torch.zeros(1))
    for _ in range(SILENT_BEATS - 1):
        absence.listen()
        assert not absence.is_lost()
    absence.listen()
    assert absence.is_lost()


def wait_often(waits: int) -> int:
    """Let rank 0 wait for the others, which are late for each call. Return how many pings it sent."""
    group = long_group()
    with patch.multiple(lost_ranks, TICK_S=0.05, REPLACE_PINGS_S=0.2, PINGS_IN_CALL=PINGS - 2):
        on_all_ranks(dist.get_rank, group)
        for _ in range(waits):
            if dist.get_rank():
                time.sleep(0.8)
            on_all_ranks(dist.get_rank, group)
    return Watch.of(group)._absence.pings


def test_pings_that_a_late_rank_has_answered_are_replaced(ranks: RankPool) -> None:
    sent = ranks.run(2, wait_often, 8)
    assert sent[0] > 4, "two pings, and those that were replaced"


def test_a_rank_that_has_never_answered_is_not_accused() -> None:
    absence = Absence()
    absence.answer = torch.zeros(1)
    for _ in range(1000):
        absence.listen()
        assert not absence.is_due()
        assert not absence.is_lost()


def keep_the_interpreter_busy(seconds: int, calls_before: int) -> list[int]:
    group = long_group()
    for _ in range(calls_before):
        on_all_ranks(lambda: time.sleep(2.5), group)

    def task() -> int:
        time.sleep(2)
        if dist.get_rank() == 1:
            ctypes.PyDLL(None).sleep(seconds)  # no other thread of Python runs
        return dist.get_rank()

    return on_all_ranks(task, group)


@pytest.mark.parametrize("calls_before", [0, 2])
def test_rank_whose_interpreter_is_busy_is_not_lost(ranks: RankPool, calls_before: int) -> None:
    """A pickle of many objects, for example, does not let other threads of Python run."""
    assert ranks.run(3, keep_the_interpreter_busy, 20, calls_before) == [[0, 1, 2]] * 3


def interrupt_a_rank() -> str:
    group = long_group()

    def interrupt() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def task() -> None:
        if dist.get_rank() == 1:
            threading.Timer(1, interrupt).start()
        else:
            time.sleep(4)

    with pytest.raises(KeyboardInterrupt if dist.get_rank() == 1 else RankError) as caught:
        on_all_ranks(task, group)
    return str(caught.value)


def test_interrupted_rank_does_not_leave_the_others_waiting(ranks: RankPool) -> None:
    assert ranks.run(3, interrupt_a_rank) == [
        "the process group broke, because rank 1 was interrupted: KeyboardInterrupt",
        "",
        "the process group broke, because rank 1 was interrupted: KeyboardInterrupt",
    ]


def call_late() -> list[str]:
    """Call after the timeout of the group on one rank, and work longer than that on another one."""
    group: Any = dist.new_group(timeout=timedelta(seconds=4))
    if dist.get_rank() == 1:
        time.sleep(10)
    with pytest.raises(RankError) as caught:
        on_all_ranks(dist.get_rank, group)
    return [str(caught.value)]


def test_rank_that_calls_too_late_is_named(ranks: RankPool) -> None:
    expected = "the process group broke, because rank 1 did not make the same call within the timeout of the process"
    for [message] in ranks.run(3, call_late):
        assert message.startswith(expected)


def call_without_gloo() -> list[Any]:
    """Use a group that is only for devices: the ranks talk over another one."""
    group: Any = dist.new_group(backend="cuda:gloo")
    found = [on_all_ranks(dist.get_rank, group) for _ in range(2)]
    return [*found, Collectives(group).through_rank_0(dist.get_rank, lambda ranks: ranks[::-1])]


def test_group_without_gloo_on_the_cpu(ranks: RankPool) -> None:
    for rank, found in enumerate(ranks.run(3, call_without_gloo)):
        assert found == [[0, 1, 2], [0, 1, 2], 2 - rank]


def make_short_calls() -> None:
    """Make calls that end before the thread that watches the ranks has read anything. An hour passes between them."""
    watch = Watch.of(dist.group.WORLD)  # type: ignore[arg-type]
    for hour in range(20):
        with patch.object(time, "monotonic", lambda hour=hour: 3600.0 * hour), watch.in_call():
            watch.check()
    assert watch.lost is None


def test_many_short_calls_do_not_add_up_to_a_store_that_is_silent(ranks: RankPool) -> None:
    ranks.run(1, make_short_calls)


def end_a_group(*, is_long: bool) -> bool:
    group: Any = dist.new_group()
    on_all_ranks(lambda: time.sleep(2.5 * is_long), group)  # a long call shows pulses, and lets ranks ping each other
    found = weakref.ref(group)
    dist.barrier()
    dist.destroy_process_group(group)
    del group
    gc.collect()
    return found() is None


@pytest.mark.parametrize("is_long", [False, True])
def test_a_destroyed_group_is_freed(ranks: RankPool, is_long: bool) -> None:
    assert ranks.run(2, partial(end_a_group, is_long=is_long)) == [True, True]
