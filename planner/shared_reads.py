"""Plan which rank reads which bytes, if several ranks need the same bytes or parts of the same rows.

Each rank describes the byte ranges that it needs (`Needs`). From the descriptions of all ranks, `ReadDivision` computes
which bytes are read once (`Unit`), by which rank, and what that rank sends to the others. Every rank computes the same
result, so that the ranks need not communicate about it. All ranks read, send and receive units in the same order.

Units are made from atoms. Byte ranges that overlap form an atom, which is never cut. For example, rank 0 needs
[0, 100) and rank 1 needs [60, 200) and [200, 300) of an object. Its atoms are [0, 200), which both need, and
[200, 300), which only rank 1 needs. The first becomes a unit. Rank 1 reads the second by itself.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .box import IntArray, concat
from .chunk_reads import ChunkReads
from .coalesce import MAX_REQUEST_BYTES, GapLimits, Requests, cut_runs, reach
from .index import CheckpointIndex
from .read_plan import Exchange, ReadPlan, find_chunks, join_ranges, row_column
from .request_costs import REMOTE_COSTS

MAX_UNIT_BYTES = 8 * 1024 * 1024
"""The maximum number of bytes that are read and sent together. A single chunk may be larger."""
MIN_UNIT_BYTES = 32 * 1024
"""Fewer bytes are read by each rank that needs them: a message would cost more."""
MAX_UNIT_GAP_BYTES = 16 * 1024
"""The largest gap between byte ranges of one unit. Its bytes are read and not used."""
REQUEST_COST_BYTES = REMOTE_COSTS.gap_bytes
"""The bytes that take as long as another request. Neighbouring byte ranges that different ranks need are read together
if each has fewer bytes."""
MIN_UNITS_PER_RANK = 16
"""The minimum number of units that each rank reads in a large read, so that all read about the same number of bytes."""
MIN_LARGE_UNIT_BYTES = 256 * 1024
"""The minimum size of the units of a large read."""
EXCHANGE_BYTES_PER_S = 1e9
"""An estimate of how fast a rank sends and receives."""
MAX_TIME_FRACTION = 0.9
"""With "auto", a read is shared only if its estimated time is at most this fraction of the time of separate reads."""
MIN_USED_FRACTION = 0.8
"""The minimum fraction of a unit that ranks must need. Parts of rows are shared only if most of the row is needed."""


@dataclass(frozen=True, slots=True, eq=False)
class Needs:
    """The byte ranges that one rank needs, in columns. Row i is a chunk or a slab of its plan."""

    names: tuple[str, ...]
    """Names of objects."""
    objects: IntArray
    """(n,) the object: a position in `names`."""
    starts: IntArray
    stops: IntArray
    """(n,) the byte range [start, stop)."""
    tensors: IntArray
    """(n,) the position of the tensor among those of the checkpoint."""
    counts: IntArray
    """(n,) the number of byte runs that are needed in the range; 1 if all of it is needed."""
    nbytes: IntArray
    """(n,) the bytes of each run."""
    strides: IntArray
    """(n,) the distance of the runs."""

    @classmethod
    def of(cls, reads: Sequence[ChunkReads], names: Sequence[str], tensors: Sequence[int]) -> Needs:
        """Return what some reads need.

        Args:
            reads: the reads of a plan with NO_GAPS and aligned slabs.
            names: the names of the objects of its index.
            tensors: for each read, the position of its tensor among those of the checkpoint.
        """
        starts, stops = row_column(reads, "starts"), row_column(reads, "stops")
        counts, nbytes, strides = np.ones(len(starts), np.int64), stops - starts, stops - starts
        first = 0
        for read in reads:
            if read.runs is not None:
                at = np.flatnonzero(read.runs.sparse)
                rows = first + at
                counts[rows], nbytes[rows], strides[rows] = (
                    read.runs.counts[at],
                    read.runs.nbytes[at],
                    read.runs.strides[at],
                )
            first += read.objects.size
        of_tensors = np.repeat(np.array(tensors, np.int64), [read.objects.size for read in reads])
        used, objects = np.unique(row_column(reads, "objects"), return_inverse=True)
        known = tuple(names[at] for at in used.tolist())
        return cls(known, objects.astype(np.int64), starts, stops, of_tensors, counts, nbytes, strides)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def bytes_needed(self) -> IntArray:
        """(n,) the bytes of each row that are needed."""
        return self.counts * self.nbytes

    def pack(self) -> bytes:
        """Return the needs as compressed bytes."""
        columns = [getattr(self, name) for name in _COLUMNS]
        kept = columns[:4] if bool((self.counts == 1).all()) else columns
        deltas = b"".join(np.diff(column, prepend=0).astype("<i8").tobytes() for column in kept)
        return zlib.compress(json.dumps([len(kept), *self.names]).encode() + b"\0" + deltas, 1)

    @classmethod
    def unpack(cls, data: bytes) -> Needs:
        """Return the needs from the result of `pack`."""
        header, _, deltas = zlib.decompress(data).partition(b"\0")
        kept, *names = json.loads(header)
        values = np.frombuffer(deltas, "<i8").astype(np.int64)
        columns = list(np.cumsum(values.reshape(kept, len(values) // kept), axis=1))
        if kept == 4:
            spans = columns[2] - columns[1]
            columns += [np.ones(len(spans), np.int64), spans, spans]
        return cls(tuple(names), *columns)


_COLUMNS = [field.name for field in fields(Needs)][1:]


@dataclass(frozen=True, slots=True, order=True)
class UnitPart:
    """Bytes of a unit that one rank needs: `count` runs of `nbytes` bytes, `stride` bytes apart."""

    start: int
    """The first byte, in the object."""
    count: int
    nbytes: int
    stride: int

    @property
    def stop(self) -> int:
        return self.start + (self.count - 1) * self.stride + self.nbytes

    @property
    def size(self) -> int:
        """The number of bytes that are sent."""
        return self.count * self.nbytes


@dataclass(frozen=True, slots=True)
class Unit:
    """Bytes of an object that one rank reads for several."""

    number: int
    """Its position in the order in which all ranks process units."""
    tensor: int
    """The position of its first tensor. Units are in the order of their tensors."""
    name: str
    """The name of the object."""
    start: int
    stop: int
    reader: int
    parts: dict[int, tuple[UnitPart, ...]]
    """What ranks need, ascending. The reader knows it for all ranks that need something; others know it for
    themselves."""


@dataclass(frozen=True, slots=True, eq=False)
class RankShare:
    """What one rank reads, sends and receives."""

    units: tuple[Unit, ...]
    """The units that the rank needs, in order. It may be their reader."""
    unit_of_row: IntArray
    """(n,) for each row of its `Needs`, the position in `units`; -1 if the rank reads the row by itself."""
    rank: int

    @property
    def units_read(self) -> list[Unit]:
        """The units that the rank reads."""
        return [unit for unit in self.units if unit.reader == self.rank]

    @property
    def bytes_sent(self) -> int:
        """The bytes that the rank sends."""
        sizes = {unit.number: {rank: _size(parts) for rank, parts in unit.parts.items()} for unit in self.units_read}
        return sum(size for of_rank in sizes.values() for rank, size in of_rank.items() if rank != self.rank)

    @property
    def bytes_received(self) -> int:
        """The bytes that the rank receives."""
        return sum(_size(unit.parts[self.rank]) for unit in self.units if unit.reader != self.rank)


def _size(parts: Sequence[UnitPart]) -> int:
    return sum(part.size for part in parts)


def digest(data: bytes) -> bytes:
    """Return a hash that differs for different packed needs."""
    return hashlib.blake2b(data, digest_size=16).digest()


@dataclass(frozen=True, slots=True, eq=False)
class ReadDivision:
    """How ranks divide the reading of bytes that several of them need."""

    loads: IntArray
    """(ranks,) the bytes that each rank reads from the store."""
    together: IntArray
    """(ranks,) the cost of these reads, in bytes. A gap between rows that the rank reads by itself costs its bytes, or
    those that another request costs. Units are large: only their bytes count."""
    separate: IntArray
    """(ranks,) the cost if each rank read what it needs by itself."""
    exchanged: IntArray
    """(ranks,) the bytes that each rank needs and does not read alone. It sends or receives about as many."""
    _rows: _Rows
    _units: _Units
    _ranks_of: Sequence[Sequence[int]]
    _readers: list[int]
    """The rank that reads each unit."""

    @classmethod
    def of(
        cls, needs: Sequence[Needs], ranks_of: Sequence[Sequence[int]], budget_bytes: int | None = None
    ) -> ReadDivision:
        """Divide the reading.

        Args:
            needs: the needs of the ranks. Ranks with the same needs share one item.
            ranks_of: for each item, the ranks that have these needs.
            budget_bytes: the memory that each rank may use.
        """
        total, ranks = sum(int(one.bytes_needed.sum()) for one in needs), sum(map(len, ranks_of))
        max_bytes = MAX_UNIT_BYTES if budget_bytes is None else min(MAX_UNIT_BYTES, budget_bytes // 32)
        balanced = total // (MIN_UNITS_PER_RANK * ranks)
        return cls.in_units(needs, ranks_of, max(MIN_LARGE_UNIT_BYTES, min(max_bytes, balanced)))

    @classmethod
    def in_units(cls, needs: Sequence[Needs], ranks_of: Sequence[Sequence[int]], max_unit_bytes: int) -> ReadDivision:
        """Divide the reading into units of at most so many bytes."""
        rows = _Rows.of(needs)
        alone = np.zeros(len(rows.starts), bool)
        while True:  # a tensor whose parts of rows nobody else needs is planned by its rank alone
            units = _find_units(rows, alone, np.array([len(ranks) for ranks in ranks_of], np.int64), max_unit_bytes)
            stray = (units.of_row < 0) & (rows.counts > 1) & ~alone
            if not bool(stray.any()):
                break
            keys = rows.groups * (int(rows.tensors.max()) + 1) + rows.tensors
            alone |= np.isin(keys, keys[stray])
        is_alone, needed = units.of_row < 0, rows.counts * rows.nbytes
        loads = _bytes_of_ranks(rows, ranks_of, needed * is_alone)
        together = _read_costs(rows, ranks_of, is_alone)
        readers = _choose_readers(units, ranks_of, loads)
        np.add.at(together, readers, units.stops - units.starts)
        separate = _read_costs(rows, ranks_of, np.ones(len(is_alone), bool))
        exchanged = _bytes_of_ranks(rows, ranks_of, needed * ~is_alone)
        return cls(loads, together, separate, exchanged, rows, units, ranks_of, readers)

    def saves_time(
        self, bytes_per_s: float, exchanged_per_s: float = EXCHANGE_BYTES_PER_S, fraction: float = MAX_TIME_FRACTION
    ) -> bool:
        """Return whether sharing is estimated to take at most a fraction of the time of separate reads.

        Args:
            bytes_per_s: how fast one rank reads from the store.
            exchanged_per_s: how fast one rank sends and receives.
            fraction: the fraction.
        """
        separate = int(self.separate.max(initial=0)) / bytes_per_s
        together = int(self.together.max(initial=0)) / bytes_per_s
        together += int(self.exchanged.max(initial=0)) / exchanged_per_s
        return bool((self.exchanged > 0).any()) and together <= fraction * separate

    def share_of(self, rank: int) -> RankShare:
        """Return what one rank reads, sends and receives."""
        rows, units, ranks_of = self._rows, self._units, self._ranks_of
        group = next(at for at, ranks in enumerate(ranks_of) if rank in ranks)
        in_units = np.flatnonzero(units.of_row >= 0)
        by_unit = in_units[np.argsort(units.of_row[in_units], kind="stable")]
        bounds = np.searchsorted(units.of_row[by_unit], np.arange(len(units.starts) + 1)).tolist()
        found: list[Unit] = []
        position = np.full(len(units.starts) + 1, -1, np.int64)
        columns = (column.tolist() for column in (units.tensors, units.objects, units.starts, units.stops))
        for number, (tensor, of_object, start, stop, (begin, end)) in enumerate(
            zip(*columns, pairwise(bounds), strict=True)
        ):
            groups, reader = units.group_sets[number].tolist(), self._readers[number]
            if group in groups:
                wanted = groups if reader == rank else [group]
                of_group = {at: _parts_of(rows, by_unit[begin:end], at) for at in wanted}
                parts = {one: of_group[at] for at in wanted for one in ranks_of[at]}
                position[number] = len(found)
                found.append(Unit(number, tensor, rows.names[of_object], start, stop, reader, parts))
        mine = rows.groups == group
        unit_of_row = np.full(int(mine.sum()), -1, np.int64)
        unit_of_row[rows.positions[mine]] = position[units.of_row[mine]]
        return RankShare(tuple(found), unit_of_row, rank)


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The rows of several `Needs`, sorted by object and first byte."""

    names: tuple[str, ...]
    groups: IntArray
    """(n,) the item of `needs` that a row comes from."""
    positions: IntArray
    """(n,) its row there."""
    objects: IntArray
    starts: IntArray
    stops: IntArray
    tensors: IntArray
    counts: IntArray
    nbytes: IntArray
    strides: IntArray

    @classmethod
    def of(cls, needs: Sequence[Needs]) -> _Rows:
        names = tuple(sorted({name for item in needs for name in item.names}))
        at = {name: position for position, name in enumerate(names)}
        known = [np.array([at[name] for name in item.names], np.int64) for item in needs]
        objects = concat(of[item.objects] for of, item in zip(known, needs, strict=True))
        groups = concat(np.full(len(item), group) for group, item in enumerate(needs))
        positions = concat(np.arange(len(item)) for item in needs)
        columns = {name: concat(getattr(item, name) for item in needs) for name in _COLUMNS[1:]}
        order = np.lexsort((groups, columns["stops"], columns["starts"], objects))
        sorted_columns = [column[order] for column in (groups, positions, objects, *columns.values())]
        return cls(names, *sorted_columns)


@dataclass(frozen=True, slots=True, eq=False)
class _Units:
    """Units in columns, in their order."""

    tensors: IntArray
    objects: IntArray
    starts: IntArray
    stops: IntArray
    of_row: IntArray
    """(n,) the unit of each row of `_Rows`, or -1 for a row that is in no unit."""
    group_sets: list[IntArray]
    """The groups that need each unit."""


@dataclass(frozen=True, slots=True, eq=False)
class _Atoms:
    """Byte ranges that are never cut, in columns: rows that overlap form an atom."""

    objects: IntArray
    starts: IntArray
    stops: IntArray
    first: IntArray
    """(n,) the first row of each atom."""
    of_row: IntArray
    """(m,) the atom of each row."""
    pair_atoms: IntArray
    pair_groups: IntArray
    """(k,) the atom and the group of each distinct pair of them, sorted."""
    keys: npt.NDArray[np.uint64]
    """(n,) numbers that are equal if and only if the same groups need the atoms."""

    @classmethod
    def of(cls, objects: IntArray, starts: IntArray, stops: IntArray, groups: IntArray, group_count: int) -> _Atoms:
        """Find the atoms of (m,) rows, which are sorted by object and start."""
        is_other = objects[1:] != objects[:-1]
        opens = np.concatenate(([True], is_other | (starts[1:] >= reach(objects, stops)[:-1])))
        first, of_row = np.flatnonzero(opens), np.cumsum(opens) - 1
        pairs = np.unique(of_row * group_count + groups)
        atoms, of_pairs = pairs // group_count, pairs % group_count
        keys = np.add.reduceat(_set_hashes(group_count)[of_pairs], np.searchsorted(atoms, np.arange(len(first))))
        return cls(
            objects[first], starts[first], np.maximum.reduceat(stops, first), first, of_row, atoms, of_pairs, keys
        )


def _find_units(rows: _Rows, alone: npt.NDArray[np.bool_], group_sizes: IntArray, max_unit_bytes: int) -> _Units:
    """Find the bytes that several ranks need.

    Consecutive atoms that the same ranks need form a unit, and so do small atoms that different ranks need.
    """
    kept = np.flatnonzero(~alone)
    of_row = np.full(len(alone), -1, np.int64)
    empty = np.empty(0, np.int64)
    if not len(kept):
        return _Units(empty, empty, empty, empty, of_row, [])
    atoms = _Atoms.of(rows.objects[kept], rows.starts[kept], rows.stops[kept], rows.groups[kept], len(group_sizes))
    begins, ends, keys = atoms.starts, atoms.stops, atoms.keys
    is_dense = np.add.reduceat((rows.counts * rows.nbytes)[kept], atoms.first) >= MIN_USED_FRACTION * (ends - begins)
    is_shared = is_dense & (np.bincount(atoms.pair_atoms, group_sizes[atoms.pair_groups]) > 1)

    is_near = (atoms.objects[1:] == atoms.objects[:-1]) & (begins[1:] - ends[:-1] <= MAX_UNIT_GAP_BYTES)
    is_same = is_near & (keys[1:] == keys[:-1])
    is_small = is_dense & (_spans(begins, ends, is_same) <= REQUEST_COST_BYTES)
    follows = (is_same & is_shared[1:] & is_shared[:-1]) | (is_near & is_small[1:] & is_small[:-1])
    cuts = cut_runs(begins, follows, max_unit_bytes)
    first, unit_of_atom = np.flatnonzero(cuts), np.cumsum(cuts) - 1
    starts, stops = begins[first], np.maximum.reduceat(ends, first)

    pairs = np.unique(unit_of_atom[atoms.pair_atoms] * len(group_sizes) + atoms.pair_groups)
    groups = pairs % len(group_sizes)
    bounds = np.searchsorted(pairs // len(group_sizes), np.arange(len(first) + 1))
    members = np.add.reduceat(group_sizes[groups], bounds[:-1])
    good = is_dense[first] & (members > 1) & (stops - starts >= MIN_UNIT_BYTES)
    tensors = np.minimum.reduceat(np.minimum.reduceat(rows.tensors[kept], atoms.first), first)
    order = np.lexsort((starts, atoms.objects[first], tensors))
    order = order[good[order]]
    number = np.full(len(first), -1, np.int64)
    number[order] = np.arange(len(order))
    of_row[kept] = number[unit_of_atom[atoms.of_row]]
    sets = [groups[bounds[at] : bounds[at + 1]] for at in order.tolist()]
    return _Units(tensors[order], atoms.objects[first][order], starts[order], stops[order], of_row, sets)


def _spans(begins: IntArray, ends: IntArray, joined: npt.NDArray[np.bool_]) -> IntArray:
    """Return for each range the bytes of the run of ranges that it belongs to.

    Args:
        begins, ends: (n,) the ranges.
        joined: (n - 1,) whether a range is in the run of the one before it.
    """
    first = np.flatnonzero(np.concatenate(([True], ~joined)))
    spans = np.maximum.reduceat(ends, first) - begins[first]
    return np.repeat(spans, np.diff(np.append(first, len(begins))))


def _set_hashes(count: int) -> npt.NDArray[np.uint64]:
    """Return a random-looking number for each group, the same on all ranks. A set of groups has a sum of its own."""
    values = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


def _choose_readers(units: _Units, ranks_of: Sequence[Sequence[int]], loads: IntArray) -> list[int]:
    """Choose the reader of each unit so that all ranks read about the same number of bytes.

    Args:
        loads: (ranks,) the bytes that each rank reads by itself. The bytes of its units are added in place.
    """
    sets: dict[bytes, IntArray] = {}
    readers = []
    for groups, nbytes in zip(units.group_sets, (units.stops - units.starts).tolist(), strict=True):
        key = groups.tobytes()
        if key not in sets:
            sets[key] = np.sort(np.concatenate([np.array(ranks_of[at], np.int64) for at in groups.tolist()]))
        members = sets[key]
        reader = int(members[np.argmin(loads[members])])
        loads[reader] += nbytes
        readers.append(reader)
    return readers


def _read_costs(rows: _Rows, ranks_of: Sequence[Sequence[int]], kept: npt.NDArray[np.bool_]) -> IntArray:
    """Return the (ranks,) costs of reading rows from an object store separately, in bytes.

    A gap between the byte runs of a row, or between rows, costs its bytes, or those that another request costs.
    """
    most = REQUEST_COST_BYTES
    costs = rows.counts * rows.nbytes + (rows.counts - 1) * np.minimum(rows.strides - rows.nbytes, most)
    order = np.argsort(rows.groups, kind="stable")
    order = order[kept[order]]
    groups, objects, starts, stops = (c[order] for c in (rows.groups, rows.objects, rows.starts, rows.stops))
    gaps = np.full(len(order), most, np.int64)
    same = (groups[1:] == groups[:-1]) & (objects[1:] == objects[:-1])
    gaps[1:][same] = np.clip(starts[1:] - stops[:-1], 0, most)[same]
    found = np.zeros(len(kept), np.int64)
    found[order] = costs[order] + gaps
    return _bytes_of_ranks(rows, ranks_of, found)


def _bytes_of_ranks(rows: _Rows, ranks_of: Sequence[Sequence[int]], nbytes: IntArray) -> IntArray:
    """Return the (ranks,) sums of the bytes of the rows that each rank needs."""
    sums = np.bincount(rows.groups, nbytes, len(ranks_of)).astype(np.int64)
    found = np.zeros(sum(map(len, ranks_of)), np.int64)
    for ranks, of_group in zip(ranks_of, sums.tolist(), strict=True):
        found[list(ranks)] = of_group
    return found


def _parts_of(rows: _Rows, members: IntArray, group: int) -> tuple[UnitPart, ...]:
    """Return what a group needs of a unit: its rows, with adjacent dense ones joined."""
    mine = members[rows.groups[members] == group]
    parts: list[UnitPart] = []
    columns = (rows.starts[mine], rows.counts[mine], rows.nbytes[mine], rows.strides[mine])
    for start, count, nbytes, stride in sorted(set(zip(*(column.tolist() for column in columns), strict=True))):
        last = parts[-1] if parts else None
        if count == 1 and last is not None and last.count == 1 and start <= last.stop:
            size = max(last.stop, start + nbytes) - last.start
            parts[-1] = UnitPart(last.start, 1, size, size)
        else:
            parts.append(UnitPart(start, count, nbytes, stride))
    return tuple(parts)


def shared_plan(
    index: CheckpointIndex,
    reads: Sequence[ChunkReads],
    tensors: Sequence[int],
    share: RankShare,
    gap_limits: GapLimits,
    max_request_bytes: int = MAX_REQUEST_BYTES,
) -> ReadPlan:
    """Return the plan of a rank that shares some of its reads.

    Args:
        index: the index of the checkpoint.
        reads: the reads of a plan with NO_GAPS and aligned slabs, from which the needs of the rank were made.
        tensors: for each read, the position of its tensor.
        share: the part of the rank.
        gap_limits: the limits for what the rank reads by itself.
        max_request_bytes: the most bytes of a request that the rank makes by itself.
    """
    bounds = np.cumsum([0, *(read.objects.size for read in reads)]).tolist()
    unit_columns = [share.unit_of_row[begin:end] for begin, end in pairwise(bounds)]
    alone = [at for at, column in enumerate(unit_columns) if bool((column < 0).all())]
    again = find_chunks(index, [reads[at].want for at in alone], gap_limits)
    mixed = list(reads)
    for at, read in zip(alone, again, strict=True):
        mixed[at] = read
        unit_columns[at] = np.full(read.objects.size, -1)
    units = np.concatenate([*unit_columns, np.empty(0, np.int64)])
    of_tensor = np.repeat(np.array(tensors, np.int64), [read.objects.size for read in mixed])
    own = join_ranges(mixed, gap_limits, max_request_bytes, units < 0)

    request_of_range = np.empty(len(units), np.int64)
    request_of_range[units < 0] = own.request_of_range
    request_tensors = np.full(len(own), np.iinfo(np.int64).max)
    np.minimum.at(request_tensors, own.request_of_range, of_tensor[units < 0])
    added = _Requests.of(mixed, np.flatnonzero(units >= 0), units, share, len(own))
    request_of_range[units >= 0] = added.of_row
    keys = np.concatenate([request_tensors, added.tensors])
    numbers = np.concatenate([np.full(len(own), -1), added.numbers])
    requests = Requests(
        np.concatenate([own.objects, added.objects]),
        np.concatenate([own.starts, added.starts]),
        np.concatenate([own.stops, added.stops]),
        request_of_range,
        own.sparse | added.sparse,
    )
    return ReadPlan(tuple(mixed), requests, gap_limits, np.lexsort((numbers, keys)), _exchange(index, share, numbers))


def _exchange(index: CheckpointIndex, share: RankShare, numbers: IntArray) -> Exchange:
    """Return what a rank reads for several ranks, sends and receives. Request i is part of the unit `numbers[i]`."""
    positions = {name: at for at, (name, _) in enumerate(index.objects)}
    ranges = [(positions[unit.name], unit.start, unit.stop) for unit in share.units_read]
    table = np.array(ranges, np.int64).reshape(-1, 3)
    return Exchange(table[:, 0], table[:, 1], table[:, 2], numbers >= 0, share.bytes_sent, share.bytes_received)


@dataclass(frozen=True, slots=True, eq=False)
class _Requests:
    """One request for each part that a rank needs of a unit, in columns."""

    objects: IntArray
    starts: IntArray
    stops: IntArray
    tensors: IntArray
    numbers: IntArray
    """(n,) the number of the unit."""
    sparse: dict[int, tuple[int, int, int]]
    of_row: IntArray
    """(m,) the request of each row."""

    @classmethod
    def of(
        cls, reads: Sequence[ChunkReads], rows: IntArray, units: IntArray, share: RankShare, first: int
    ) -> _Requests:
        """Make the requests.

        Args:
            rows: (m,) the rows that are in units.
            first: the number of the first request.
        """
        objects, starts, stops = (row_column(reads, name)[rows].tolist() for name in ("objects", "starts", "stops"))
        counts = np.concatenate([*map(_run_counts, reads), np.empty(0, np.int64)])
        made: list[tuple[int, int, int, int, int]] = []
        sparse: dict[int, tuple[int, int, int]] = {}
        known: dict[tuple[int, UnitPart], int] = {}
        of_row = []
        columns = zip(units[rows].tolist(), objects, starts, stops, counts[rows].tolist(), strict=True)
        for unit_at, of_object, start, stop, count in columns:
            unit = share.units[unit_at]
            part = _containing(unit.parts[share.rank], start, stop, count)
            number = known.setdefault((unit_at, part), first + len(known))
            if number == first + len(made):
                made.append((of_object, part.start, part.stop, unit.tensor, unit.number))
                if part.count > 1:
                    sparse[number] = part.count, part.nbytes, part.stride
            of_row.append(number)
        table = np.array(made, np.int64).reshape(-1, 5)
        of_requests = (table[:, 0], table[:, 1], table[:, 2], table[:, 3], table[:, 4])
        return cls(*of_requests, sparse, np.array(of_row, np.int64))


def _run_counts(read: ChunkReads) -> IntArray:
    """Return the number of byte runs of each row, 1 for a row that is read as one byte range."""
    if read.runs is None:
        return np.ones(read.objects.size, np.int64)
    counts: IntArray = np.where(read.runs.sparse, read.runs.counts, 1)
    return counts


def _containing(parts: Sequence[UnitPart], start: int, stop: int, count: int) -> UnitPart:
    """Return the part that has the bytes of a row."""
    for part in parts:
        is_inside = part.count == count == 1 and part.start <= start and stop <= part.stop
        if is_inside or (part.start, part.stop, part.count) == (start, stop, count):
            return part
    raise AssertionError(f"no part has bytes [{start}, {stop})")
