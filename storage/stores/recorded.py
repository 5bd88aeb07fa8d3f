"""Two stores with which one rank reads metadata for all: one records what it reads, the other one replays it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from typing_extensions import Buffer

from ..errors import ObjectNotFoundError
from .base import Capabilities, Store
from .wrapped import WrappedStore


@dataclass(slots=True)
class Listing:
    """The names of a listing that were used."""

    names: list[str] = field(default_factory=list)
    is_complete: bool = False
    """Whether there are no more names."""


@dataclass(slots=True)
class Record:
    """What a store answered."""

    reads: dict[tuple[str, int, int], bytes] = field(default_factory=dict)
    """By object, start and stop: the bytes, which are fewer than the range has if the object ends in it."""
    sizes: dict[str, int] = field(default_factory=dict)
    listings: dict[str, Listing] = field(default_factory=dict)
    """By folder."""
    missing: dict[str, str] = field(default_factory=dict)
    """The objects that do not exist, and the messages of their errors."""
    nbytes: int = 0
    """The size of everything that was read, in bytes."""


class _BulkReads(WrappedStore):
    """A store that forwards reads of bulk data, which use the optional methods of the inner store, unchanged."""

    @property
    def capabilities(self) -> Capabilities:
        return self.inner.capabilities


class RecordedStore(_BulkReads):
    """A store whose answers are recorded until `stop` is called.

    Args:
        inner: the store that answers.
    """

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self._record: Record | None = Record()

    def stop(self) -> Record:
        """Stop recording, and return the record."""
        with self._lock:
            record, self._record = self._record, None
        assert record is not None
        return record

    def read(self, name: str, start: int, stop: int) -> Buffer:
        try:
            data = self.inner.read(name, start, stop)
        except ObjectNotFoundError as error:
            self._note_missing(name, error)
            raise
        with self._lock:
            if self._record is not None:
                data = bytes(data)
                self._record.reads[name, start, stop] = data
                self._record.nbytes += len(data)
        return data

    def size(self, name: str) -> int:
        try:
            nbytes = self.inner.size(name)
        except ObjectNotFoundError as error:
            self._note_missing(name, error)
            raise
        with self._lock:
            if self._record is not None:
                self._record.sizes[name] = nbytes
        return nbytes

    def list(self, folder: str = "") -> Iterator[str]:
        listing = Listing()
        if self._record is not None:
            self._record.listings[folder] = listing
        for name in self.inner.list(folder):
            listing.names.append(name)
            yield name
        listing.is_complete = True

    def _note_missing(self, name: str, error: ObjectNotFoundError) -> None:
        with self._lock:
            if self._record is not None:
                self._record.missing[name] = str(error)


class ReplayedStore(_BulkReads):
    """A store that answers from a record, and forwards the calls that are not in it.

    Args:
        inner: the same store as the one that was recorded.
        record: the answers.
    """

    def __init__(self, inner: Store, record: Record) -> None:
        super().__init__(inner)
        self._record = record

    def read(self, name: str, start: int, stop: int) -> Buffer:
        self._check_exists(name)
        found = self._record.reads.get((name, start, stop))
        return self.inner.read(name, start, stop) if found is None else found

    def size(self, name: str) -> int:
        self._check_exists(name)
        found = self._record.sizes.get(name)
        return self.inner.size(name) if found is None else found

    def list(self, folder: str = "") -> Iterable[str]:
        known = self._record.listings.get(folder, Listing())
        yield from known.names
        if not known.is_complete:
            yield from islice(self.inner.list(folder), len(known.names), None)

    def _check_exists(self, name: str) -> None:
        if name in self._record.missing:
            raise ObjectNotFoundError(self._record.missing[name])
