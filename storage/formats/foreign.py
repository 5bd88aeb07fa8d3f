"""What the sources of other formats have in common: shards that are byte ranges of objects, without checksums."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...planner.box import Box, IntArray
from ...planner.chunk_reads import Want
from ...planner.coalesce import GapLimits
from ...planner.entries import ITEMSIZES, Encoding, Entry, Kind, Segments
from ...planner.errors import CheckpointError, InvalidIndexError
from ...planner.grid import Grid
from ...planner.index import CheckpointIndex, missing_tensor
from ...planner.request_costs import RequestCosts
from ..errors import CorruptCheckpointError, DtypeError, ObjectNotFoundError
from ..runtime.forks import Lock
from ..stores.base import Store
from ..tensors.dtypes import torch_dtype
from ..tensors.state_dict import Path
from .metadata_reads import Reads
from .source import Unreadable, bounded
from .value_codec import encode_value

FINGERPRINT_OBJECTS = 4
FINGERPRINT_BYTES = 4096
"""Of each of these objects, what a fingerprint reads: metadata does not change where only values do."""


@dataclass(slots=True, eq=False)
class Shards:
    """The shards of one tensor, in columns."""

    offsets: IntArray
    """(n, ndim)"""
    sizes: IntArray
    objects: IntArray
    """(n,) positions in the source's objects."""
    starts: IntArray
    """(n,) the first byte of each in its object."""
    lengths: IntArray
    """(n,) in bytes."""
    encodings: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, rows: list[tuple[Box, int, int, int, Encoding]], ndim: int) -> Shards:
        """From rows of box, object, start, length and encoding."""
        boxes, *columns = zip(*rows, strict=True) if rows else ((),) * 5
        objects, starts, lengths = (np.array(column, np.int64) for column in columns[:3])
        offsets = np.array([box.offsets for box in boxes], np.int64).reshape(len(rows), ndim)
        sizes = np.array([box.sizes for box in boxes], np.int64).reshape(len(rows), ndim)
        return cls(offsets, sizes, objects, starts, lengths, np.array(columns[3], np.uint8))


def whole_tensor(dtype: str, shape: tuple[int, ...], at: int, start: int) -> Shards:
    """A tensor stored row-major, in one piece, from byte `start` of object `at` on; nothing of one without elements."""
    box = Box.whole(shape)
    rows = [(box, at, start, box.numel * ITEMSIZES[dtype], Encoding.PLAIN)] if box.numel else []
    return Shards.of(rows, len(shape))


_NO_SHARDS = Shards.of([], 1)


class ForeignSource:
    """A checkpoint of another format: a `Source`."""

    format = ""

    def __init__(self, reads: Reads, objects: Iterable[tuple[str, int]]) -> None:
        self._reads = reads
        self.objects = tuple(objects)
        self.info: dict[str, Any] = {}
        self.paths: dict[str, Path] = {}
        self.inline: dict[str, bytes] = {}
        self.unreadable: dict[str, Unreadable] = {}
        self.unindexed: tuple[str, ...] = ()
        self._entries: dict[str, Entry] = {}
        self._shards: dict[str, Shards] = {}
        self._unread: set[str] = set()
        """Names that are in no index: objects that are here."""
        self._lock = Lock()

    def add(
        self,
        name: str,
        kind: Kind,
        dtype: str,
        shape: tuple[int, ...],
        shards: Shards,
        order: tuple[int, ...] | None = None,
    ) -> None:
        """Add a tensor, or an object of the store.

        A tensor whose dtype this torch does not have becomes unreadable. Raises CorruptCheckpointError.
        """
        entry = self.check(name, kind, dtype, shape, order)
        if name in self:
            raise self.contradiction(f"two tensors have the name {name!r}")
        try:
            torch_dtype(dtype)
        except DtypeError as error:
            self.refuse(name, DtypeError, f"{name!r} in {self.location} has the dtype {dtype}: {error}. Upgrade torch")
            return
        self._entries[name], self._shards[name] = entry, shards

    def check(
        self, name: str, kind: Kind, dtype: str, shape: tuple[int, ...], order: tuple[int, ...] | None = None
    ) -> Entry:
        """Return the entry of these values. Raises CorruptCheckpointError if there can be none."""
        try:
            return Entry(name, kind, dtype, Grid(shape, (1,) * len(shape)), order)
        except (InvalidIndexError, ValueError) as error:
            raise self.contradiction(error) from error

    def refuse(self, name: str, kind: type[CheckpointError], reason: str, object: str = "") -> None:
        """Add a name that cannot be read. Raises CorruptCheckpointError if the name is taken."""
        if name in self:
            raise self.contradiction(f"two tensors have the name {name!r}")
        self.unreadable[name] = Unreadable(kind, reason, object)

    def add_value(self, name: str, value: object) -> None:
        """Another value that is no tensor, which is here already."""
        kind, data = encode_value(value)
        self.add(name, kind, "uint8", (len(data),), _NO_SHARDS)
        self.inline[name] = data
        self._unread.add(name)

    def contradiction(self, what: object) -> CorruptCheckpointError:
        """The error for metadata that cannot be true."""
        return CorruptCheckpointError(
            f"the {self.format} checkpoint at {self.store.location} contradicts itself: {what}"
        )

    @property
    def store(self) -> Store:
        return self._reads.store

    @property
    def location(self) -> str:
        return self.store.location

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(self._entries.values())

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return tuple(
            (1, len(self.inline[name])) if name in self.inline else (len(shards.starts), int(shards.lengths.sum()))
            for name, shards in self._shards.items()
        )

    @property
    def bytes_read(self) -> int:
        return self._reads.bytes_read

    @property
    def requests(self) -> int:
        return self._reads.requests

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name in self.unreadable

    def entry(self, name: str) -> Entry:
        if name in self.unreadable:
            raise self.unreadable[name].error()
        if name not in self._entries:
            raise missing_tensor(name, self._entries)
        return self._entries[name]

    def fingerprint(self) -> str:
        def sample(name: str, nbytes: int) -> None:
            with suppress(ObjectNotFoundError):  # reading a tensor in it will raise the error
                self._reads.whole(name, nbytes // 2, min(nbytes // 2 + FINGERPRINT_BYTES, nbytes))

        objects = [(name, nbytes) for name, nbytes in self.objects if nbytes][:FINGERPRINT_OBJECTS]
        if objects:
            self._reads.many(sample, *zip(*objects, strict=True))
        return f"{self._reads.digest:016x}"

    def observe(self, nbytes: int, seconds: float) -> None:
        self._reads.observe(nbytes, seconds)

    def gap_limits(self, max_over_read: float | None, costs: RequestCosts | None = None) -> GapLimits:
        bound = None if max_over_read is None else bounded(max_over_read)
        return (costs or self._reads.costs).gap_limits(bound)

    def index(self, wants: Iterable[Want] | None = None) -> CheckpointIndex:
        wants = None if wants is None else list(wants)
        names = self._entries if wants is None else dict.fromkeys(want.name for want in wants)
        with self._lock:
            if wants is not None:
                self.locate(wants)
            return self._build([self.entry(name) for name in names if name not in self._unread])

    def locate(self, wants: list[Want]) -> None:
        """Find out where the values are that some reads need. For formats whose metadata does not tell."""

    def _build(self, entries: list[Entry]) -> CheckpointIndex:
        shards = [self._shards[entry.name] for entry in entries]

        def column(name: str, dtype: type[np.generic] = np.int64) -> npt.NDArray[Any]:
            parts = [getattr(part, name).reshape(-1) for part in shards]
            return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False)

        segments = Segments(
            entries=np.repeat(np.arange(len(shards)), [len(part.starts) for part in shards]),
            streams=np.zeros(sum(len(part.starts) for part in shards), np.uint8),
            encodings=column("encodings", np.uint8),
            objects=column("objects"),
            starts=column("starts"),
            offsets=column("offsets"),
            sizes=column("sizes"),
        )
        try:
            return CheckpointIndex(tuple(entries), self.objects, segments, column("lengths"), np.empty(0, np.uint64))
        except InvalidIndexError as error:
            raise self.contradiction(error) from error
