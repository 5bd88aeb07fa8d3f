"""The base class of sources of other formats: their shards are byte ranges of objects, without checksums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ...planner.box import Box, IntArray
from ...planner.chunk_reads import WantedBox
from ...planner.coalesce import FREE_GAP_BYTES, GapLimits
from ...planner.entries import ITEMSIZES, Encoding, Entry, Kind, Segments
from ...planner.errors import CheckpointError, InvalidIndexError
from ...planner.grid import Grid
from ...planner.index import CheckpointIndex, missing_tensor
from ...planner.request_costs import RequestCosts
from ..errors import CorruptCheckpointError, DtypeError, ObjectNotFoundError
from ..runtime.forks import fork_safe_lock
from ..stores.base import Store
from ..tensors.dtypes import torch_dtype
from ..tensors.state_dict import Path
from .metadata_reader import MetadataReader, Speed
from .source import RecordWithCrc, Unreadable, bounded
from .value_codec import encode_value

FINGERPRINT_OBJECTS = 4
"""How many objects a fingerprint reads. Metadata alone does not change if only values change."""
FINGERPRINT_BYTES = 4096
"""How many bytes of each object a fingerprint reads."""


@dataclass(slots=True, eq=False)
class Shards:
    """The shards of one tensor in columns. Row i is shard i."""

    offsets: IntArray
    """(n, ndim) the offsets of their boxes in the tensor."""
    sizes: IntArray
    """(n, ndim) the sizes of their boxes."""
    objects: IntArray
    """(n,) the positions of their objects in the source's `objects`."""
    starts: IntArray
    """(n,) their first bytes in their objects."""
    lengths: IntArray
    """(n,) their stored bytes."""
    encodings: npt.NDArray[np.uint8]
    """(n,) values of `Encoding`."""

    @classmethod
    def of(cls, rows: list[tuple[Box, int, int, int, Encoding]], ndim: int) -> Shards:
        """Return the shards of an `ndim`-dimensional tensor from rows of box, object, start, length and encoding."""
        boxes, *columns = zip(*rows, strict=True) if rows else ((),) * 5
        objects, starts, lengths = (np.array(column, np.int64) for column in columns[:3])
        offsets = np.array([box.offsets for box in boxes], np.int64).reshape(len(rows), ndim)
        sizes = np.array([box.sizes for box in boxes], np.int64).reshape(len(rows), ndim)
        return cls(offsets, sizes, objects, starts, lengths, np.array(columns[3], np.uint8))


def whole_tensor(dtype: str, shape: tuple[int, ...], at: int, start: int) -> Shards:
    """Return the shards of a tensor that is stored row-major as one byte range. A tensor without elements has none.

    Args:
        dtype: the planner's name of the dtype.
        shape: the shape of the tensor.
        at: the position of the object in the source's `objects`.
        start: the first byte of the values in the object.
    """
    box = Box.whole(shape)
    rows = [(box, at, start, box.numel * ITEMSIZES[dtype], Encoding.PLAIN)] if box.numel else []
    return Shards.of(rows, len(shape))


_NO_SHARDS = Shards.of([], 1)


class ForeignSource:
    """A checkpoint of another format. Subclasses add its tensors and values in `__init__`. Implements `Source`."""

    format = ""
    """The name of the format, as in `FORMATS`."""
    metadata: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, reader: MetadataReader, objects: Iterable[tuple[str, int]]) -> None:
        """Start without entries.

        Args:
            reader: reads the store.
            objects: name and size in bytes of each object with values.
        """
        self._reader = reader
        self.objects = tuple(objects)
        self.info: dict[str, Any] = {}
        self.paths: dict[str, Path] = {}
        self.inline: dict[str, bytes] = {}
        """The bytes of values that were read with the metadata. An index does not contain them."""
        self.unreadable: dict[str, Unreadable] = {}
        self.unindexed: tuple[str, ...] = ()
        self.records: list[RecordWithCrc] = []
        self._entries: dict[str, Entry] = {}
        self._shards: dict[str, Shards] = {}
        self._lock = fork_safe_lock()

    def add_tensor(
        self, name: str, dtype: str, shape: tuple[int, ...], shards: Shards, order: tuple[int, ...] | None = None
    ) -> None:
        """Add a tensor. It is unreadable if this version of torch lacks its dtype.

        Args:
            name: the name of the tensor.
            dtype: the planner's name of the dtype, such as "bfloat16".
            shape: the global shape.
            shards: where the shards are.
            order: the dimensions from the outermost to the innermost in the stored shards, if they are not row-major.

        Raises:
            CorruptCheckpointError: the name is taken, or there can be no such tensor.
        """
        entry = self.check(name, Kind.TENSOR, dtype, shape, order)
        try:
            torch_dtype(dtype)
        except DtypeError as error:
            self.refuse(name, DtypeError, f"{name!r} in {self.location} has the dtype {dtype}: {error}. Upgrade torch")
            return
        self._add_entry(entry, shards)

    def add_stored_value(self, name: str, nbytes: int, shards: Shards) -> None:
        """Add a value that an object stores as `torch.save` writes it.

        Args:
            name: the name of the value.
            nbytes: the number of its bytes.
            shards: where they are, as one shard.

        Raises:
            CorruptCheckpointError: the name is taken, or a value cannot have so many bytes.
        """
        self._add_entry(self.check(name, Kind.TORCH_SAVE, "uint8", (nbytes,)), shards)

    def add_value(self, name: str, value: object) -> None:
        """Add a value that has already been read. Raise CorruptCheckpointError if the name is taken."""
        kind, data = encode_value(value)
        self._add_entry(self.check(name, kind, "uint8", (len(data),)), _NO_SHARDS)
        self.inline[name] = data

    def _add_entry(self, entry: Entry, shards: Shards) -> None:
        if entry.name in self:
            raise self.contradiction(f"two tensors have the name {entry.name!r}")
        self._entries[entry.name], self._shards[entry.name] = entry, shards

    def check(
        self, name: str, kind: Kind, dtype: str, shape: tuple[int, ...], order: tuple[int, ...] | None = None
    ) -> Entry:
        """Return an entry. Raise CorruptCheckpointError if there can be no such entry."""
        try:
            return Entry(name, kind, dtype, Grid(shape, (1,) * len(shape)), order)
        except (InvalidIndexError, ValueError) as error:
            raise self.contradiction(error) from error

    def refuse(self, name: str, kind: type[CheckpointError], reason: str, object: str = "") -> None:
        """Add a name that cannot be read.

        Args:
            name: the name of the entry.
            kind: the class of the error that reading the name raises.
            reason: the message of that error.
            object: the object that should hold the values, if known.

        Raises:
            CorruptCheckpointError: the name is taken.
        """
        if name in self:
            raise self.contradiction(f"two tensors have the name {name!r}")
        self.unreadable[name] = Unreadable(kind, reason, object)

    def contradiction(self, what: object) -> CorruptCheckpointError:
        """Return the error for metadata that contradicts itself."""
        return CorruptCheckpointError(
            f"the {self.format} checkpoint at {self.store.location} contradicts itself: {what}"
        )

    @property
    def store(self) -> Store:
        return self._reader.store

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
    def speed(self) -> Speed:
        return self._reader.speed

    def use_store(self, store: Store, speed: Speed | None = None) -> None:
        self._reader.use_store(store, speed)

    @property
    def bytes_read(self) -> int:
        return self._reader.bytes_read

    @property
    def requests(self) -> int:
        return self._reader.requests

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
            with suppress(ObjectNotFoundError):  # a read of a tensor in it raises the error
                self._reader.whole(name, nbytes // 2, min(nbytes // 2 + FINGERPRINT_BYTES, nbytes))

        objects = [(name, nbytes) for name, nbytes in self.objects if nbytes][:FINGERPRINT_OBJECTS]
        if objects:
            self._reader.many(sample, *zip(*objects, strict=True))
        return f"{self._reader.digest:016x}"

    def observe(self, nbytes: int, seconds: float) -> None:
        self._reader.observe(nbytes, seconds)

    def gap_limits(self, max_over_read: float | None, costs: RequestCosts | None = None) -> GapLimits:
        limits = (costs or self._reader.costs).gap_limits(bounded(max_over_read))
        free_gap_bytes = min(FREE_GAP_BYTES, limits.max_gap_bytes) if max_over_read is None else 0
        return replace(limits, free_gap_bytes=free_gap_bytes)

    def index(self, wants: Iterable[WantedBox] | None = None) -> CheckpointIndex:
        wants = None if wants is None else list(wants)
        names = self._entries if wants is None else dict.fromkeys(want.name for want in wants)
        with self._lock:
            if wants is not None:
                self.locate(wants)
            return self._build([self.entry(name) for name in names if name not in self.inline])

    def locate(self, wants: list[WantedBox]) -> None:
        """Find out where the values for some reads are. Formats override this if their metadata does not contain it."""

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
