"""The lease of a run: how two managers that write to one run detect each other.

The manager that holds the lease renews an object in the run's folder every few seconds. The objects are numbered. A
manager takes over the lease by creating the object with the next number. If several try, only one succeeds, because a
store creates an object only once. A manager that sees a higher number than its own has lost the lease.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ...planner.errors import CheckpointError
from ..errors import CheckpointExistsError, ObjectNotFoundError, RunInUseError, StoreError, UnavailableError
from ..runtime.forks import after_fork_in_child
from ..runtime.logs import logger_of
from ..runtime.threads import Pool, cleaning_up, current_stop
from ..stores.base import Store
from ..stores.open import open_store

logger = logger_of(__name__)
FOLDER = ".reshard-manager"
RENEW_EVERY_S = 5.0
EXPIRES_AFTER_S = 30.0
"""A lease that was not renewed for this long is taken over. A pause of the holder must be shorter than this."""
LONG_AGO_S = 600.0
"""A lease whose time is older than this has probably expired, and a sign of life is awaited for a shorter time."""
SHORT_WAIT_S = 2.5 * RENEW_EVERY_S
"""How long a sign of life is awaited then: the clocks of the two machines may differ."""
TAKEOVER_MS = 120_000
"""How far the numbers of a new holder are above the time of the takeover, by the later of the two clocks. The old
holder may still run, and notices within 30 s that it has lost the lease."""
MAX_SAVES_BETWEEN_RENEWALS = 1000
"""How many numbers a holder may have used since it stored the last one."""
RELEASE_TIMEOUT_S = 2.0
"""How long a release waits for a renewal that runs."""
_NAME = re.compile(rf"{re.escape(FOLDER)}/(\d{{8,18}})\.json")
_MAX_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Holder:
    """The content of the object: who holds the lease."""

    id: str
    host: str
    pid: int
    process: str
    """Identifies the process on its machine, so that a manager on the same machine can check if it still runs."""
    renewals: int = 0
    time: float = 0.0
    sequence: int = 0
    """The largest number of a save that this holder has used, or may use next."""
    released: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True, slots=True)
class LeaseMark:
    """Identifies the object of a lease. A rank that reads it sees the same location as the holder."""

    name: str
    id: str

    def is_in(self, store: Store) -> bool:
        """Return whether a store has the object. Another one, of an earlier lease, may have its name."""
        holder = _holder_in(store, self.name)
        return holder is not None and holder.id == self.id


def _holder_in(store: Store, name: str) -> Holder | None:
    """Return the holder of a lease; None if the object is gone or cannot be understood."""
    try:
        found = json.loads(bytes(store.read(name, 0, _MAX_BYTES)))
        holder = Holder(**{field.name: found[field.name] for field in fields(Holder) if field.name in found})
        return replace(holder, time=float(holder.time), sequence=int(holder.sequence))
    except (ObjectNotFoundError, ValueError, TypeError, OverflowError):
        return None


def _sequence_after(holder: Holder | None) -> int:
    """Return a number for a save that a holder has not used and, even if it still runs, will not use."""
    if holder is None:  # its object cannot be understood
        return int(time.time() * 1000) + TAKEOVER_MS
    renewed = int(holder.time * 1000)
    if holder.released:
        return max(renewed, holder.sequence) + 1
    return max(max(renewed, int(time.time() * 1000)) + TAKEOVER_MS, holder.sequence + MAX_SAVES_BETWEEN_RENEWALS)


def last_mark(store: Store) -> LeaseMark | None:
    """Return what identifies the last lease at a location; None if there was none."""
    number = max(_numbers_in(store), default=0)
    holder = _holder_in(store, _name(number)) if number else None
    return None if holder is None else LeaseMark(_name(number), holder.id)


def _numbers_in(store: Store) -> list[int]:
    found = (_NAME.fullmatch(name) for name in store.list(FOLDER))
    return [int(name[1]) for name in found if name]


def _start_of(pid: int) -> str | None:
    """Return when a process started, in ticks since boot; None if there is no such process or it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else fields[19].decode()
    except (OSError, IndexError):
        return None


def _machine() -> str:
    """Identify the machine and its process namespace; empty if the system cannot."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _myself() -> Holder:
    machine = _machine()
    process = f"{machine} {os.getpid()} {_start_of(os.getpid())}" if machine else ""
    return Holder(uuid.uuid4().hex, socket.gethostname(), os.getpid(), process)


def _has_ended(holder: Holder) -> bool:
    """Return whether a process certainly no longer runs. False if it runs, or on another machine."""
    machine = _machine()
    if not machine or not holder.process.startswith(f"{machine} "):
        return False
    return holder.process != f"{machine} {holder.pid} {_start_of(holder.pid)}"


CLOSED = "it was closed"
_held: dict[str, Lease] = {}
"""The leases that this process holds, by id. A forked child holds none of them."""
after_fork_in_child(_held.clear)


class Lease:
    """The right to write to a run. Creating it takes the lease, or raises RunInUseError.

    Args:
        root: the location of the run.
        expires_after_s: how long to wait for the previous holder to renew the lease. Default: EXPIRES_AFTER_S.
        owner: the object that uses the lease. When it has been collected, another lease of this process may replace it.
    """

    def __init__(
        self,
        root: str,
        storage_options: Mapping[str, Any] | None = None,
        *,
        expires_after_s: float | None = None,
        renew_every_s: float = RENEW_EVERY_S,
        owner: object = None,
    ) -> None:
        self._owner = None if owner is None else weakref.ref(owner)
        self._store: Store = open_store(root, storage_options)
        self._lock = threading.Lock()
        self._is_closing = threading.Event()
        self._holder = _myself()
        self._lost = ""
        self._sequence = 0
        self.first_sequence = 0
        """The smallest number for a save that no earlier holder has used, or will use if it still runs."""
        self._number = self._acquire(EXPIRES_AFTER_S if expires_after_s is None else expires_after_s)
        _held[self._holder.id] = self
        self._pool = Pool(1, "reshard-lease")
        self._pool.submit(self._keep_renewing, renew_every_s)

    @property
    def mark(self) -> LeaseMark:
        """Identifies the object of this lease."""
        return LeaseMark(_name(self._number), self._holder.id)

    def check(self) -> None:
        """Check that this process still holds the lease. This lists the objects of the lease.

        Raises:
            RunInUseError: another manager has taken it over.
            StoreError: the object of the lease is gone, or the store cannot be read.
        """
        with self._lock:
            self._check(self._numbers())

    def note_sequence(self, number: int) -> None:
        """Note the number of a save. It is stored at the next renewal, so that the next holder uses larger ones."""
        self._sequence = max(self._sequence, number)

    def renew(self) -> None:
        """Show that the holder still runs. Raises what `check` raises."""
        with self._lock:
            self._renew()

    def release(self) -> None:
        """Give the lease back, so that the next manager need not wait. Log an error of the store."""
        if os.getpid() != self._holder.pid:  # a forked child, at its exit
            return
        self._is_closing.set()  # a renewal is not cancelled: a store could apply it after the release
        _held.pop(self._holder.id, None)
        self._pool.shutdown(wait=False)
        if not self._lock.acquire(timeout=RELEASE_TIMEOUT_S):  # a renewal is repeated, as the store does not answer
            logger.warning("the lease of %s is not released: the store does not answer", self._store.location)
            self._lost = self._lost or CLOSED
            return
        try:
            if self._lost:
                return
            self._lost = CLOSED
            with cleaning_up():  # a store that does not answer must not keep the process for long
                if max(self._numbers(), default=0) == self._number and self.mark.is_in(self._store):
                    released = replace(self._holder, released=True, time=time.time(), sequence=self._sequence)
                    self._write(self._number, released, overwrite=True)
        except CheckpointError as error:
            logger.warning("the lease of %s could not be released: %s", self._store.location, error)
        finally:
            self._lock.release()

    def _check(self, numbers: Sequence[int]) -> None:
        if self._lost or max(numbers, default=0) > self._number:
            self._lose(max(numbers, default=0))
        found = self._read(self._number)
        if found is not None and found.id != self._holder.id:  # the folder was removed, and another manager created it
            self._lose(self._number)
        if found is None and self._number not in numbers:
            raise StoreError(
                f"the manager's object {_name(self._number)} in {self._store.location} is gone: the folder was "
                "removed, replaced or unmounted. Make it available again, or close this manager and create a new one"
            )

    def _renew(self) -> None:
        numbers = self._numbers()
        self._check(numbers)
        renewals = self._holder.renewals + 1
        self._holder = replace(self._holder, renewals=renewals, time=time.time(), sequence=self._sequence)
        self._write(self._number, self._holder, overwrite=True)
        self._store.delete([_name(number) for number in numbers if number < self._number])

    def _lose(self, number: int) -> None:
        if self._lost == CLOSED:
            raise RunInUseError(f"the manager of {self._store.location} was closed, so nothing was committed")
        if not self._lost:
            other = self._read(number)
            self._lost = f"another manager has taken over this run, {other or 'an unknown process'}"
        raise RunInUseError(
            f"this manager may no longer save to {self._store.location}: {self._lost}. Stop one of the two jobs"
        )

    def _keep_renewing(self, every_s: float) -> None:
        stop = current_stop()
        has_failed = False
        while not self._is_closing.wait(every_s):
            with self._lock:
                if self._lost or stop.wait(0):
                    return
                try:
                    self._renew()
                    has_failed = False
                except RunInUseError as error:
                    logger.error("%s", error)
                    return
                except Exception as error:  # the next renewal may succeed
                    if not has_failed:
                        logger.warning("the lease of %s could not be renewed: %s", self._store.location, error)
                    has_failed = True

    def _is_abandoned(self) -> bool:
        return self._owner is not None and self._owner() is None

    def _acquire(self, expires_after_s: float) -> int:
        number = max(self._numbers(), default=0)
        holder = self._read(number) if number else None
        other = _held.get(holder.id) if holder is not None else None
        if other is not None and other._is_abandoned():
            other.release()  # its manager was not closed, and no longer exists
            return self._acquire(expires_after_s)
        if other is not None:
            raise RunInUseError(
                f"{self._store.location} is managed by another CheckpointManager of this process: close that one first"
            )
        if holder is not None and not self._has_released(holder):
            if time.time() - holder.time > LONG_AGO_S:
                expires_after_s = min(expires_after_s, SHORT_WAIT_S)
            logger.warning(
                "%s was managed by %s, which ended without closing its manager, or still runs: waiting up to %.0f s "
                "for a sign of life",
                self._store.location,
                holder,
                expires_after_s,
            )
            self._wait_for_silence(number, holder, expires_after_s)
        if number:
            self.first_sequence = _sequence_after(holder)
        self._sequence = self.first_sequence
        self._holder = replace(self._holder, time=time.time(), sequence=self._sequence)
        try:
            self._write(number + 1, self._holder, overwrite=False)
        except CheckpointExistsError:
            raise self._in_use(self._read(number + 1)) from None
        if max(self._numbers(), default=0) > number + 1:
            raise self._in_use(None)
        return number + 1

    def _has_released(self, holder: Holder) -> bool:
        """Return whether a holder has released the lease, or has certainly ended."""
        is_own = holder.process != "" and holder.process == self._holder.process  # but `_held` does not have it
        return holder.released or is_own or _has_ended(holder)

    def _wait_for_silence(self, number: int, holder: Holder, seconds: float) -> None:
        """Wait until a lease has not been renewed for some seconds. Raises RunInUseError if it is renewed."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, seconds / 10))
            if max(self._numbers(), default=0) > number:
                raise self._in_use(self._read(number + 1))
            now = self._read(number)
            if now is None or self._has_released(now):
                return
            if now.renewals != holder.renewals:
                raise self._in_use(now)

    def _in_use(self, holder: Holder | None) -> RunInUseError:
        return RunInUseError(
            f"{self._store.location} is managed by another CheckpointManager, {holder or 'an unknown process'}: stop "
            "that job, use another location, or pass read_only=True to restore without saving"
        )

    def _numbers(self) -> list[int]:
        return _numbers_in(self._store)

    def _read(self, number: int) -> Holder | None:
        """See `_holder_in`."""
        return _holder_in(self._store, _name(number))

    def _write(self, number: int, holder: Holder, *, overwrite: bool) -> None:
        data = json.dumps(asdict(holder)).encode()
        try:
            self._store.put(_name(number), data, overwrite=overwrite)
        except CheckpointExistsError:
            with contextlib.suppress(UnavailableError):  # a retried put, whose first answer was lost
                found = self._read(number)
                if found is not None and found.id == holder.id:
                    return
            raise


def _name(number: int) -> str:
    return f"{FOLDER}/{number:08}.json"
