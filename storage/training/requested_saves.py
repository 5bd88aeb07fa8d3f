"""A save that one rank requests, and all ranks make in the same call: after a signal, or a call of `save_now`.

The ranks are not at the same step when a request arrives, and a collective in every step would make them wait for each
other. Instead, a thread of each rank watches for a request in torch's key-value store and answers with the number of
calls of `save` that its rank has begun. Rank 0 chooses the call after the largest of these numbers. A rank that has
answered waits for this choice when it makes its next call, so it cannot pass the chosen call. Without a request, a call
takes about a microsecond.

The connections of a rank that has died are closed. Rank 0 checks its connections to the ranks that have not answered.
They check theirs to rank 0.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import Any

import torch.distributed as dist

from ..errors import ArgumentError, RankError
from ..runtime.logs import logger_of
from ..runtime.lost_ranks import LOOK_EVERY_S, Lookout, Watch, client_of, new_key
from ..runtime.threads import Pool, current_stop

logger = logger_of(__name__)
POLL_EVERY_S = 0.5
"""How often each rank looks for a request of another rank."""
POLL_WHILE_PENDING_S = 0.02
"""How often each of up to RANKS_AT_ONCE ranks looks while a request is pending. More ranks look less often, because one
process serves the requests of all."""
RANKS_AT_ONCE = 64
MAX_WAIT_S = 600.0
"""How long a rank waits for the answers of the others. They answer even while they train."""
STUCK_S = 10.0
"""If the store does not answer a waiting rank for this long, it is considered lost."""
REPEATED_AFTER_S = 5.0
"""A signal that arrives again after this time is handled as without a manager. An earlier one is a duplicate: a
launcher and the system that it runs on may both send it."""
SAVE, STOP = "save", "stop"


class RequestedSaves:
    """Lets all ranks make a save that one of them requested in the same call of `save`.

    Args:
        process_group: the ranks, or None without a process group. All ranks must create their instances in the same
            order.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self._requests: SimpleQueue[str] = SimpleQueue()
        """Requests of this rank. Only `SimpleQueue.put` may be called in a signal handler."""
        self._changed = threading.Condition()
        self._calls = 0
        """How many calls this rank has begun."""
        self._round = 0
        """How many requested saves were made."""
        self._has_answered = False
        self._chosen: int | None = None
        """The call in which the requested save is made."""
        self._stops = False
        """Whether that save is the last one."""
        self._unserved: set[str] = set()
        """Requests of this rank that no save has served yet."""
        self._failure: Exception | None = None
        self._answers = 0
        """How many requests the store has answered."""
        self._known_answers = -1
        """The same, when this rank last looked."""
        self._last_look = 0.0
        self._silent_s = 0.0
        """How long this rank has waited since then. The time of a suspended process does not count."""
        self.should_stop = False
        self._world = 1 if process_group is None else dist.get_world_size(process_group)
        self._pool: Pool | None = None
        if process_group is not None and self._world > 1:
            self._rank = dist.get_rank(process_group)
            watch = Watch.of(process_group)
            self._lookout = Lookout(watch)
            self._key = new_key("requests", process_group)
            self._key_value_store = watch.store
            self._pool = Pool(1, "reshard-requests")
            self._pool.submit(self._run)

    def request(self, kind: str) -> None:
        """Request a save, or the last save, from any thread and from a signal handler.

        Args:
            kind: SAVE or STOP.
        """
        self._requests.put(kind)

    def begin_call(self) -> bool:
        """Count a call of `save`, and return whether the requested save is made in this call."""
        with self._changed:
            self._calls += 1
            if self._pool is None:
                self._take_requests()
                if self._unserved:
                    self._chosen, self._stops = self._calls, STOP in self._unserved
            else:
                if self._unserved or not self._requests.empty():
                    self._check()
                if self._has_answered and self._chosen is None:
                    self._wait_for_choice()
            return self._chosen is not None and self._calls >= self._chosen

    def end_save(self) -> None:
        """Record that the requested save was made."""
        with self._changed:
            self.should_stop = self.should_stop or self._stops
            self._unserved -= {SAVE, STOP} if self._stops else {SAVE}
            self._round += 1
            self._has_answered, self._chosen, self._stops = False, None, False

    def close(self) -> None:
        """End the thread. Log if a request of this rank was not served."""
        with self._changed:
            self._take_requests()
            if self._unserved:
                logger.warning("a save was requested, but `save` was not called again before the manager was closed")
        if self._pool is not None:
            self._pool.stop.set()
            self._requests.put("")
            self._pool.shutdown(wait=False)

    def _take_requests(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                if kind := self._requests.get_nowait():
                    self._unserved.add(kind)

    def _wait_for_choice(self) -> None:
        """Wait until rank 0 has chosen the call. The threads of all ranks answer, whatever the ranks do meanwhile."""
        deadline = time.monotonic() + MAX_WAIT_S
        while not self._changed.wait_for(lambda: self._chosen is not None, LOOK_EVERY_S):
            self._check()
            if time.monotonic() > deadline:
                raise RankError(
                    f"a save was requested, but some ranks did not answer within {MAX_WAIT_S:g} s: they were stopped, "
                    "or have no CheckpointManager any more"
                )

    def _check(self) -> None:
        """Raise RankError if the ranks cannot agree any more."""
        if self._failure is not None:
            raise RankError(f"a save was requested, but the ranks cannot agree on a step: {self._failure}")
        now = time.monotonic()
        if self._answers == self._known_answers:
            self._silent_s += min(now - self._last_look, STUCK_S / 4)
        else:
            self._known_answers, self._silent_s = self._answers, 0.0
        self._last_look = now
        if self._silent_s > STUCK_S:
            raise RankError("a save was requested, but the store of the process group does not answer")

    def _run(self) -> None:
        """Exchange requests, answers and choices with the other ranks."""
        stop = current_stop()
        pause = POLL_EVERY_S
        pause_while_pending = min(POLL_EVERY_S, POLL_WHILE_PENDING_S * max(1.0, self._world / RANKS_AT_ONCE))
        try:
            self._key_value_store = client_of(self._key_value_store)
            while not stop.wait(0):
                with contextlib.suppress(Empty):
                    if kind := self._requests.get(timeout=pause):
                        with self._changed:
                            self._unserved.add(kind)
                if stop.wait(0):
                    return
                pause = pause_while_pending if self._exchange() else POLL_EVERY_S
        except Exception as error:  # the store is gone, or a rank is lost
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _exchange(self) -> bool:
        """Make one step of the protocol. Return whether a request is pending."""
        with self._changed:
            now, unserved, answered, chosen = self._round, set(self._unserved), self._has_answered, self._chosen
        if chosen is not None:
            return False
        key = f"{self._key}/{now}"
        for kind in sorted(unserved):
            self._ask("set", f"{key}/{kind}", "")
            self._ask("set", f"{key}/any", "")
        if not unserved and not self._ask("check", [f"{key}/any"]):
            return False
        if not answered:
            with self._changed:
                self._has_answered = True
                calls = self._calls
            self._ask("set", f"{key}/calls/{self._rank}", str(calls))
        if self._rank == 0:
            self._choose(key)
        if self._ask("check", [f"{key}/choice"]):
            call, kind = self._ask("get", f"{key}/choice").decode().split()
            with self._changed:
                self._chosen, self._stops = int(call), kind == STOP
                self._changed.notify_all()
            return False
        self._lookout.check(self._key_value_store, lambda: self._silent_ranks(key))
        return True

    def _ask(self, method: str, *arguments: object) -> Any:
        """Call a method of the store, and count the answer."""
        found = getattr(self._key_value_store, method)(*arguments)
        self._answers += 1
        return found

    def _silent_ranks(self, key: str) -> list[int]:
        """Return the ranks whose answers this rank waits for."""
        if self._rank:
            return [0]
        return [rank for rank in range(1, self._world) if not self._ask("check", [f"{key}/calls/{rank}"])]

    def _choose(self, key: str) -> None:
        """Publish the chosen call, if all ranks have answered."""
        answers = [f"{key}/calls/{rank}" for rank in range(self._world)]
        if self._ask("check", answers):
            call = 1 + max(map(int, self._ask("multi_get", answers)))
            kind = STOP if self._ask("check", [f"{key}/{STOP}"]) else SAVE
            self._ask("set", f"{key}/choice", f"{call} {kind}")


def checked_signals(signals: Iterable[signal.Signals | int]) -> list[int]:
    """Return the numbers of signals that can be handled. Raises ArgumentError."""
    if isinstance(signals, int):
        raise ArgumentError(f"signals must be a sequence of signals, got {signals!r}: write signals=({signals!r},)")
    try:
        passed = [signals] if isinstance(signals, str) else list(signals)
    except TypeError:
        raise ArgumentError(f"signals must be a sequence of signals such as signal.SIGTERM, got {signals!r}") from None
    valid = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    for passed_signal in passed:
        if not isinstance(passed_signal, int) or isinstance(passed_signal, bool) or passed_signal not in valid:
            raise ArgumentError(
                f"signals must contain signals that a process can handle, such as signal.SIGTERM, got {passed_signal!r}"
            )
    return [int(passed_signal) for passed_signal in passed]


class StopSignals:
    """Calls a function when the process receives a signal, and restores the previous handlers afterwards.

    A child process that was forked handles the signals as if this had never been installed.

    Args:
        signals: the signals.
        received: called in the main thread, possibly while it holds any lock.
    """

    def __init__(self, signals: Iterable[signal.Signals | int], received: Callable[[], object]) -> None:
        self._received = received
        self._pid = os.getpid()
        self._is_closed = False
        self._previous: dict[int, Any] = {}
        self._received_at: dict[int, float] = {}
        """When each signal arrived first."""
        wanted = [int(number) for number in signals]
        if wanted and threading.current_thread() is not threading.main_thread():
            logger.warning(
                "signals are not handled, because Python allows that only in the main thread, and this manager was "
                "created in another one: call manager.save_now(stop=True) instead"
            )
            return
        for number in wanted:
            self._previous[number] = signal.signal(number, self._handle)

    def handles(self, number: int) -> bool:
        """Return whether this handles a signal."""
        return number in self._previous and not self._is_closed

    def _handler_below(self, number: int) -> Any:
        """Return the handler that this one replaced. Those of managers that were closed are left out."""
        previous = self._previous.get(number)
        owner = getattr(previous, "__self__", None)
        return owner._handler_below(number) if isinstance(owner, StopSignals) and owner._is_closed else previous

    def _handle(self, number: int, frame: Any) -> None:
        previous = self._handler_below(number)
        if self._is_closed and previous is signal.SIG_IGN:
            return
        if os.getpid() != self._pid or (self._is_closed and not callable(previous)):
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if not self._is_closed:
            self._received()
        if callable(previous):
            previous(number, frame)
        elif now - self._received_at.setdefault(number, now) >= REPEATED_AFTER_S:
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def close(self) -> list[int]:
        """Restore the previous handlers, which only the main thread can do.

        Otherwise, or if another handler calls this one, it passes signals on to the previous handler.

        Returns:
            The signals that arrived and that the previous handlers have not seen.
        """
        if os.getpid() != self._pid:
            return []
        self._is_closed = True
        may_restore = threading.current_thread() is threading.main_thread()
        unseen = []
        for number in self._previous:
            if signal.getsignal(number) == self._handle:
                if may_restore:
                    previous = self._handler_below(number)
                    signal.signal(number, previous if previous is not None else signal.SIG_DFL)
                if number in self._received_at:
                    unseen.append(number)
        return unseen
