"""Ranks that died: how the others notice, and how all of them learn which rank it was.

The key-value store of the process group has keys for each group. `pulse/{rank}` changes every second while the rank is
in a collective call of reshard. `lost` names the ranks that died. The first rank that notices writes it, and all others
find it within a second. It is never removed, since a group that has lost a rank is of no use any more. `pinged/{rank}`
and `replaced/{rank}` count pings.

Each rank watches the next one, so that the store serves a constant number of requests for each rank. A process that
died has closed its connections. A process that was stopped, or whose machine is lost, has no pulse, and does not answer
a ping. A process that is in a call of C code for long has no pulse either, but it answers: see `Connections.ping`. So
does a process that has not made the call yet. It may be busy with something else for hours, so it is pinged ever less
often, down to once per minute.

A thread per process reads and writes these keys. No other thread waits for the store, which may be lost, too.

- `Poller`: that thread, one for each store. It serves all objects that are `Polled`.
- `Watch`: one for each process group. It knows which ranks are lost.
- `Lookout`: for a thread that waits for other ranks outside a collective call. It asks the `Watch`.

`neighbour.py` has what a rank knows about the next one.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..errors import RankError
from .connections import PINGS, Connections
from .forks import after_fork_in_child
from .neighbour import CLOSED_BEATS, PINGED_BEATS, SILENT_BEATS, Absence, Silence, is_of_call
from .threads import run_bounded

TICK_S = 0.5
"""How often the keys are read."""
TICKS_PER_BEAT = 2
SILENT_S = float(SILENT_BEATS)
"""A store is considered lost if it has not answered for this long."""
PINGS_IN_CALL = 64
"""How many pings are left for ranks that have shown a pulse in the call."""
REPLACE_PINGS_S = 60.0
"""How often a rank replaces the pings that it has answered."""
LOOK_EVERY_S = 1.0
"""How often `Lookout` looks."""
DIED = "died or left"
STEP_S = 1.0
"""How long a rank waits for a message before it looks whether a rank is lost."""
EXIT_S = 1.0
"""How long the interpreter waits at exit for the thread."""
LINGER_S = 1.5
"""How long rank 0, whose process usually serves the store, stays so that the others can read which rank is lost."""
STORE_S = 3.0
"""How long a rank that has found a broken connection waits for an answer of the store."""


class Polled(Protocol):
    """Something that reads keys of the store regularly."""

    def poll(self, store: Any) -> None: ...


class Poller:
    """A thread that calls `poll` of objects every TICK_S, with a client of a store that only it uses.

    A client of torch's TCPStore serves one request after the other, and a thread that waits for a key blocks it. The
    client is only opened for calls that take longer than TICK_S.

    Args:
        store: the store of the process group.
    """

    _running: ClassVar[dict[int, Poller]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, store: Any) -> None:
        self._store = store
        self._polled: weakref.WeakSet[Any] = weakref.WeakSet()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reshard-pulse", daemon=True)
        self.rounds = 0
        """How many rounds are complete. If it does not grow, the store does not answer."""
        self.error: Exception | None = None
        """The error of the store, if the last two rounds failed."""

    @classmethod
    def add(cls, polled: Polled, store: Any) -> Poller | None:
        """Poll an object until it is removed. Return the thread, or None if no thread can start."""
        with cls._lock:
            found = cls._running.get(id(store))
            if found is None:
                found = cls(store)
                try:
                    found._thread.start()
                except RuntimeError:  # there are too many threads, or the interpreter is exiting
                    return None
                cls._running[id(store)] = found
            found._polled.add(polled)
            return found

    def remove(self, polled: Polled) -> None:
        """Stop polling an object."""
        with self._lock:
            self._polled.discard(polled)

    @property
    def is_running(self) -> bool:
        """Whether the thread runs. It does not in a forked child, nor when the interpreter exits."""
        return self._thread.is_alive() and not self._stop.is_set()

    def _run(self) -> None:
        client: Any = None
        error: Exception | None = None
        while not self._stop.wait(TICK_S):
            with self._lock:
                polled = list(self._polled)
                if not polled:
                    del self._running[id(self._store)]
                    return
            try:
                client = client or client_of(self._store)
                for one in polled:
                    one.poll(client)
                error = self.error = None
            except Exception as raised:
                error, self.error = raised, error and raised
            self.rounds += 1
            del polled

    @classmethod
    def stop_all(cls) -> None:
        """End all threads. A thread that returns from the store after the interpreter ended aborts the process."""
        with cls._lock:
            pollers = list(cls._running.values())
        deadline = time.monotonic() + EXIT_S
        for poller in pollers:
            poller._stop.set()
        for poller in pollers:
            poller._thread.join(max(0.0, deadline - time.monotonic()))

    @classmethod
    def forget_threads(cls) -> None:
        """Forget the threads of the parent process, in a forked child."""
        cls._lock, cls._running = threading.Lock(), {}


atexit.register(Poller.stop_all)
after_fork_in_child(Poller.forget_threads)


_made_keys: weakref.WeakKeyDictionary[dist.ProcessGroup, Counter[str]] = weakref.WeakKeyDictionary()


def new_key(kind: str, group: dist.ProcessGroup) -> str:
    """Return a new key of the store. It is the same on all ranks of a group that make their n-th key of a kind."""
    made = _made_keys.setdefault(group, Counter())
    made[kind] += 1
    return f"reshard/{kind}/{group.group_name}/{made[kind]}"


def client_of(store: Any) -> Any:
    """Return another client of a store, for another thread. A thread that waits for a key blocks its client."""
    try:
        return store.clone()
    except (AttributeError, NotImplementedError):
        return store


class Watch:
    """Watches the ranks of a group while they are in collective calls.

    Args:
        group: the group.
    """

    _made: ClassVar[weakref.WeakKeyDictionary[dist.ProcessGroup, Watch]] = weakref.WeakKeyDictionary()

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.store: Any = distributed_c10d._get_default_store()
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._prefix = f"reshard/{group.group_name}"
        self._lock = threading.Lock()
        self._poller: Poller | None = None
        self._calls = 0
        """How many calls have begun. It is the same number on all ranks that are in the same call."""
        self._active = 0
        self._polls = 0
        self._has_pulse = False
        self._beat = 0.0, -1
        """When this rank showed its last pulse, and in which call."""
        self._next = Silence()
        self._absence = Absence()
        self._pings_replaced = 0
        """How many of the pings that this rank has answered while it was absent have been replaced."""
        self._replaced_at = time.monotonic()
        self.connections: Connections | None = None
        self._rounds = 0
        """The number of rounds of the poller at the last check; -1 if this call has not checked yet."""
        self._checked = 0.0
        self._waited_s = 0.0
        """How long the poller has been in the same round. The time of a suspended process does not count."""
        self.lost: str | None = None
        """Which ranks are lost, in words."""
        self._lingers = dist.get_rank() == 0

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Watch:
        """Return the watch of a group. It is created by the first call."""
        found = cls._made.get(group)
        if found is None:
            found = cls._made[group] = cls(group)
        return found

    def connect(self, messages: Any) -> Connections:
        """Return the connections of the gloo group that the ranks send messages through. All calls share them."""
        if self.connections is None or not self.connections.belong_to(messages):
            self.connections = Connections(messages, self.rank, self.size)
            self._forget_earlier_group()
            self.connections.allow_pings((self.rank - 1) % self.size, PINGS)
            self._absence = Absence()
            self._absence.answer = self.connections.ping((self.rank + 1) % self.size)
        return self.connections

    def _forget_earlier_group(self) -> None:
        """Reset the keys of this rank. A store may outlive a group, and the next group may have its name."""
        self._pings_replaced = 0
        with contextlib.suppress(RuntimeError):
            self.store.set(self._pulse_key(self.rank), "")
            self.store.set(f"{self._prefix}/replaced/{self.rank}", "0")
            self.store.set(f"{self._prefix}/pinged/{(self.rank + 1) % self.size}", "0")

    @contextlib.contextmanager
    def in_call(self) -> Iterator[None]:
        """Show the other ranks that this rank is in a collective call, while the block runs.

        Raises:
            RankError: a rank was lost in an earlier call.
        """
        if self.lost is not None:  # the poller may keep the lock, because it waits for a store that does not answer
            raise self.broken()
        with self._lock:
            self._calls += 1
            self._active += 1
            poller = Poller.add(self, self.store)
            if poller is not self._poller or self._active == 1:
                self._rounds = -1  # the first check of a call begins to count
                self._absence.begin_call()
            self._poller = poller
            is_due = time.monotonic() - self._replaced_at > REPLACE_PINGS_S
            self._replaced_at = time.monotonic() if is_due else self._replaced_at
        try:
            if is_due:
                with contextlib.suppress(Exception):  # the store may be lost
                    run_bounded(self._replace_pings, STORE_S)
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        # Without the lock if the poller keeps it, because it waits for a store that does not answer.
        has_lock = self._lock.acquire(timeout=0 if self.lost else STORE_S)
        self._active -= 1
        if not self._active:
            if self._poller is not None:
                self._poller.remove(self)
            if self._has_pulse and has_lock and not self.lost:
                self._has_pulse = False
                with contextlib.suppress(RuntimeError):
                    self.store.set(self._pulse_key(self.rank), f"{self._calls} left")
        if has_lock:
            self._lock.release()

    def check(self) -> None:
        """Raise RankError if a rank is lost, or if the store does not answer."""
        poller = self._poller
        if poller is None or not poller.is_running:
            return
        now = time.monotonic()
        if poller.rounds == self._rounds:
            self._waited_s += min(now - self._checked, STEP_S)
        else:
            self._rounds, self._waited_s = poller.rounds, 0.0
        self._checked = now
        if self.lost is None and poller.error is not None:
            self.lost = f"because its store cannot be reached: {poller.error}"
        if self.lost is None and self._waited_s > SILENT_S:
            self.lost = "because its store does not answer"
        if self.lost is not None:
            raise self.broken()

    def broken(self) -> RankError:
        """Return the error of the group, which is broken."""
        if self._lingers:
            self._lingers = False
            time.sleep(LINGER_S)
        error = RankError(f"the process group broke, {self.lost}")
        error.group_is_broken = True
        return error

    def announce(self, lost: Sequence[int], reason: str, store: Any = None) -> None:
        """Tell all ranks which ranks are lost, unless another rank has done so: then `lost` is what that one wrote.

        Args:
            lost: the ranks. May be empty.
            reason: what happened to them.
            store: the client to use. Default: the one of the process group, in another thread.
        """
        own = json.dumps([list(lost), reason])
        found = [own]

        def write() -> None:
            found[0] = (store or self.store).compare_set(f"{self._prefix}/lost", "", own).decode()

        if store is not None:
            write()
        else:
            with contextlib.suppress(Exception):  # the store may be lost, too
                run_bounded(write, STORE_S)
        self._accept(found[0])

    def absent(self) -> list[int]:
        """Return the ranks that have not begun the call that this rank is in."""
        found: list[int] = []

        def read() -> None:
            found.extend(rank for rank in range(self.size) if rank != self.rank and not self._is_in_call(rank))

        with contextlib.suppress(Exception):
            run_bounded(read, STORE_S)
        return found

    def poll(self, store: Any) -> None:
        """Read what the other ranks wrote, and show them that this rank is alive. The poller calls this."""
        self._polls += 1
        if self._polls % TICKS_PER_BEAT:
            return
        self.hear(store)
        with self._lock:
            if not self._active or self.lost is not None:
                return
            self._has_pulse = True
            self._let_ping()
            store.set(self._pulse_key(self.rank), f"{self._calls} {self._polls}")
        self._listen(store)

    def hear(self, store: Any) -> None:
        """Read which ranks are lost, if another rank has noticed it."""
        if self.lost is None and store.check([f"{self._prefix}/lost"]):
            self._accept(store.get(f"{self._prefix}/lost").decode())

    def _let_ping(self) -> None:
        """Let the previous rank ping this one once more after each silence."""
        now, call = time.monotonic(), self._calls
        before, of_call = self._beat
        self._beat = now, call
        if self.connections is not None and of_call == call and now - before > PINGED_BEATS:
            self.connections.allow_pings((self.rank - 1) % self.size, 1)

    def _listen(self, store: Any) -> None:
        """Accuse the next rank if its connection is closed, or if it does not respond."""
        if self.connections is None:
            return
        silence, rank = self._next, (self.rank + 1) % self.size
        pulse, is_closed = self._pulse(store, rank), self.connections.is_closed(rank)
        silence.listen(pulse, self._calls, is_closed=is_closed)
        if not is_closed and not is_of_call(pulse, self._calls) and not self._is_after_call(pulse):
            self._listen_to_absent(self.connections, rank, store)
        if silence.closed >= CLOSED_BEATS:
            self.announce([at for at in self.connections.closed() if not self._has_left(store, at)], DIED, store)
        elif silence.beats == SILENT_BEATS - PINGED_BEATS:
            silence.answer = self.connections.ping(rank)
            silence.others = self._pulses(store)
        elif silence.beats and silence.answer is not None and silence.answer[0]:
            silence.beats, silence.answer = 0, None
        elif silence.beats >= SILENT_BEATS:  # if a machine is lost, all its ranks are silent
            lost = [at for at, pulse in self._pulses(store).items() if silence.others.get(at) == pulse]
            self.announce(lost, f"did not respond for {SILENT_BEATS} s", store)

    def _listen_to_absent(self, connections: Connections, rank: int, store: Any) -> None:
        """Ping the next rank, which shows no pulse in this call, from time to time. Accuse it if it does not answer."""
        absence = self._absence
        absence.listen()
        if absence.is_due() and absence.pings < PINGS - PINGS_IN_CALL + self._number(store, "replaced", rank):
            absence.ping(connections.ping(rank))
            store.set(f"{self._prefix}/pinged/{rank}", str(absence.pings))
        elif absence.is_lost():
            self.announce([rank], f"did not respond for {SILENT_BEATS} s", store)

    def _replace_pings(self) -> None:
        """Let the previous rank ping this one as often again as it has while this rank was absent."""
        pinged = self._number(self.store, "pinged", self.rank)
        if self.connections is not None and pinged > self._pings_replaced:
            self.connections.allow_pings((self.rank - 1) % self.size, pinged - self._pings_replaced)
            self._pings_replaced = pinged
            self.store.set(f"{self._prefix}/replaced/{self.rank}", str(pinged))

    def _number(self, store: Any, kind: str, rank: int) -> int:
        key = f"{self._prefix}/{kind}/{rank}"
        return int(store.get(key)) if store.check([key]) else 0

    def _pulses(self, store: Any) -> dict[int, str]:
        """Return the pulses of the other ranks that are in the same call."""
        pulses = {rank: self._pulse(store, rank) for rank in range(self.size) if rank != self.rank}
        return {rank: pulse for rank, pulse in pulses.items() if is_of_call(pulse, self._calls)}

    def _has_left(self, store: Any, rank: int) -> bool:
        """Return whether a rank has ended the call that this rank is in."""
        return self._is_after_call(self._pulse(store, rank))

    def _is_after_call(self, pulse: str) -> bool:
        """Return whether a pulse shows that its rank has ended the call that this rank is in."""
        number, _, beat = pulse.partition(" ")
        return bool(number) and (int(number) > self._calls or (int(number) == self._calls and beat == "left"))

    def _pulse(self, store: Any, rank: int) -> str:
        key = self._pulse_key(rank)
        found: bytes = store.get(key) if store.check([key]) else b""
        return found.decode()

    def _is_in_call(self, rank: int) -> bool:
        pulse = self._pulse(self.store, rank)
        return bool(pulse) and int(pulse.split()[0]) >= self._calls

    def _pulse_key(self, rank: int) -> str:
        return f"{self._prefix}/pulse/{rank}"

    def _accept(self, text: str) -> None:
        lost, reason = json.loads(text)
        if not lost:
            self.lost = f"probably because a rank died: {reason}"
        else:
            ranks = f"rank {lost[0]}" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))}"
            self.lost = f"because {ranks} {reason}"


class Lookout:
    """Finds ranks that died while this rank waits for them outside a collective call.

    Args:
        watch: the watch of the group.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._closed: Counter[int] = Counter()
        """In how many checks the connection of a rank was closed."""
        self._looked = 0.0

    def check(self, store: Any, awaited: Callable[[], Iterable[int]]) -> None:
        """Raise RankError if a rank is lost, and tell the other ranks. Once per LOOK_EVERY_S; more calls do nothing.

        Args:
            store: the client of the store to use.
            awaited: returns the ranks that this rank waits for.
        """
        connections = self._watch.connections
        if connections is None or time.monotonic() - self._looked < LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        self._watch.hear(store)
        if self._watch.lost is None:
            closed = {rank: self._closed[rank] + 1 for rank in awaited() if connections.is_closed(rank)}
            self._closed = Counter(closed)
            if lost := [rank for rank, count in closed.items() if count >= CLOSED_BEATS]:
                self._watch.announce(lost, DIED, store)
        if self._watch.lost is not None:
            raise self._watch.broken()
