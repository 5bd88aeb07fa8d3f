"""Plan a save on rank 0: compare what the ranks hold, and choose which rank writes each shard.

Each rank describes its entries and shards in columns (`HeldShards`). Ranks that hold the same entries send the same
bytes for them, and rank 0 decodes these once. So planning takes few operations per rank (`benchmarks/many_ranks.py`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ...planner.box import Box, IntArray, concat_ranges, first_elements
from ...planner.entries import ITEMSIZES
from ...planner.index_checks import tile
from ...planner.text import quoted
from ..errors import ArgumentError
from ..runtime.logs import logger_of
from .agreement import EntryDescription, agreed_paths, pack_descriptions, uneven_lists, unpack_descriptions

logger = logger_of(__name__)

SMALL_REPLICA_BYTES = 64 * 1024
"""Replicas up to this size are written by the lowest rank that has them. So entries that belong together come from one
rank, for example the parts of a random state, or mean and variance of a BatchNorm. Larger ones are spread over the
ranks."""


@dataclass(frozen=True, slots=True)
class HeldShards:
    """The shards that one rank holds, as it sends them to rank 0. A value is a shard of shape ()."""

    entries: bytes
    """The descriptions of the entries, packed."""
    shards: bytes
    """The number of shards of each entry, then the offsets and sizes of all shards, packed."""
    digests: bytes
    """Of each shard that other ranks may hold too: the position of its entry, the position of its first element in the
    tensor, and the checksum of its bytes, or of a sample if it is large."""

    @classmethod
    def of(
        cls,
        described: Mapping[str, EntryDescription],
        boxes: Sequence[Sequence[Box]],
        digests: Sequence[tuple[int, Box, int]],
    ) -> HeldShards:
        """Pack what a rank holds.

        Args:
            described: the entries by name.
            boxes: for each entry, its shards.
            digests: position of the entry, shard and checksum of the shards that other ranks may hold too.
        """
        counts = np.array([len(of_entry) for of_entry in boxes], "<i8")
        extents = [n for of_entry in boxes for box in of_entry for n in (*box.offsets, *box.sizes)]
        shapes = [value.shape for value in described.values()]
        rows = [(at, box.first_element(shapes[at]), digest) for at, box, digest in digests]
        table = np.array(rows, np.uint64).reshape(-1, 3)
        packed = zlib.compress(counts.tobytes() + np.array(extents, "<i8").tobytes(), 1)
        return cls(pack_descriptions(described), packed, table.astype("<u8").tobytes())

    def holds_the_same_as(self, other: HeldShards) -> bool:
        """Return whether both are the same shards of the same entries. Their bytes may differ."""
        return (self.entries, self.shards) == (other.entries, other.shards)


@dataclass(frozen=True, slots=True, eq=False)
class GlobalPlan:
    """What all ranks write together."""

    entries: dict[str, EntryDescription]
    """The entries to save, with their paths."""
    masks: list[bytes]
    """For each rank, one bit for each shard that it holds: whether it writes the shard."""
    ids: list[IntArray]
    """For each rank, the positions in `entries` of the entries that it holds; -1 for one that is not saved."""
    largest_sizes: list[bytes]
    """For each rank, the sizes of the largest shard of each entry that it holds, packed."""

    def differing(self, digests: Sequence[bytes]) -> list[str]:
        """Return the names of entries that several ranks hold, but not with the same checksum.

        Args:
            digests: for each rank, `HeldShards.digests`.
        """
        tables = [np.frombuffer(of_rank, "<u8").reshape(-1, 3) for of_rank in digests]
        ids = np.concatenate([of[table[:, 0].astype(np.int64)] for of, table in zip(self.ids, tables, strict=True)])
        starts, sums = (np.concatenate([table[:, column] for table in tables]) for column in (1, 2))
        order = np.lexsort((starts, ids))
        ids, starts, sums = ids[order], starts[order], sums[order]
        differ = (ids[1:] == ids[:-1]) & (starts[1:] == starts[:-1]) & (sums[1:] != sums[:-1]) & (ids[1:] >= 0)
        names = list(self.entries)
        return [names[at] for at in np.unique(ids[1:][differ]).tolist()]


def plan_save(held: Sequence[HeldShards]) -> GlobalPlan:
    """Compare what the ranks hold, and assign each replica to one of them.

    Args:
        held: what each rank holds.

    Raises:
        ArgumentError: two ranks disagree about an entry, the shards of a tensor overlap or leave gaps, or no rank
            holds a part of an entry.
    """
    first_ranks: dict[bytes, int] = {}
    for rank, of_rank in enumerate(held):
        first_ranks.setdefault(of_rank.entries, rank)
    tables = {packed: unpack_descriptions(packed) for packed in first_ranks}
    paths = agreed_paths({rank: tables[packed] for packed, rank in first_ranks.items()})
    if uneven := uneven_lists(list(tables.values())):
        logger.warning(
            "%d lists have different lengths on different ranks, and a load returns the longest to all: %s. If a list "
            "belongs to one rank only, give it another name on each rank",
            len(uneven),
            quoted(uneven),
        )
    known = {name: value for table in reversed(tables.values()) for name, value in table.items()}
    entries = {name: known[name] for name in paths}
    positions = {name: at for at, name in enumerate(entries)}
    ids = {packed: np.array([positions.get(name, -1) for name in table], np.int64) for packed, table in tables.items()}
    shards = _Shards.of(held, ids, list(entries.values()))
    _check_held(entries, shards)
    chosen = _choose_writers(shards, len(held))
    _check_coverage(entries, shards, chosen)
    bounds = np.searchsorted(shards.ranks[chosen], np.arange(len(held) + 1)).tolist()
    masks = [_mask(shards.positions[chosen[begin:end]]) for begin, end in pairwise(bounds)]
    largest = _pack_largest_sizes(entries, shards, chosen, ids)
    return GlobalPlan(
        entries,
        masks,
        [ids[of_rank.entries] for of_rank in held],
        [largest[of_rank.entries] for of_rank in held],
    )


def _pack_largest_sizes(
    entries: Mapping[str, EntryDescription], shards: _Shards, chosen: IntArray, ids: Mapping[bytes, IntArray]
) -> dict[bytes, bytes]:
    """Return the sizes of the largest shard of each entry, packed for ranks that hold the same entries."""
    largest = np.zeros((len(entries), shards.sizes.shape[1]), np.int64)
    np.maximum.at(largest, shards.ids[chosen], shards.sizes[chosen])
    ndims = np.array([len(entry.shape) for entry in entries.values()], np.int64)

    def packed(of_rank: IntArray) -> bytes:
        kept = of_rank[of_rank >= 0]
        cells = np.repeat(kept, ndims[kept]), concat_ranges(0, ndims[kept])
        return zlib.compress(largest[cells].astype("<i8").tobytes(), 1)

    return {key: packed(of_rank) for key, of_rank in ids.items()}


def unpack_largest_sizes(packed: bytes, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the sizes of the largest shard of each entry.

    Args:
        packed: an item of `GlobalPlan.largest_sizes`.
        shapes: the shapes of the entries that the rank holds.
    """
    values = np.frombuffer(zlib.decompress(packed), "<i8").tolist()
    bounds = np.cumsum([0, *map(len, shapes)]).tolist()
    return [tuple(values[begin:end]) for begin, end in pairwise(bounds)]


def _mask(positions: IntArray) -> bytes:
    """Return bits that are 1 at these positions."""
    bits = np.zeros(int(positions.max(initial=-1)) + 1, np.uint8)
    bits[positions] = 1
    return np.packbits(bits).tobytes()


@dataclass(frozen=True, slots=True, eq=False)
class _Shards:
    """The shards of all ranks in columns, rank after rank. Boxes have as many dimensions as the largest one."""

    ids: IntArray
    """(n,) the position of the entry."""
    ranks: IntArray
    positions: IntArray
    """(n,) the position among the shards of the rank."""
    shapes: IntArray
    offsets: IntArray
    sizes: IntArray
    """(n, ndim) global shape of the tensor, offsets and sizes; 1, 0 and 1 in the dimensions that it does not have."""
    nbytes: IntArray

    @classmethod
    def of(
        cls, held: Sequence[HeldShards], ids: Mapping[bytes, IntArray], entries: Sequence[EntryDescription]
    ) -> _Shards:
        """Unpack the shards of all ranks. Leave out those of entries that are not saved."""
        ndims = np.array([len(entry.shape) for entry in entries], np.int64)
        itemsizes = np.array([ITEMSIZES.get(entry.dtype, 0) for entry in entries], np.int64)
        most = int(ndims.max(initial=0))
        table = np.ones((len(entries), most), np.int64)
        for at, entry in enumerate(entries):
            table[at, : len(entry.shape)] = entry.shape
        owners, positions, extents = [], [], []
        for of_rank in held:
            of_entries = ids[of_rank.entries]
            values = np.frombuffer(zlib.decompress(of_rank.shards), "<i8")
            owner = np.repeat(of_entries, values[: len(of_entries)])
            found = values[len(of_entries) :]
            kept = owner >= 0  # an entry that is not saved is a value, and its shards have no extents
            owners.append(owner[kept])
            positions.append(np.flatnonzero(kept))
            extents.append(found)
        counts = [len(owner) for owner in owners]
        owned, flat = np.concatenate(owners), np.concatenate(extents)
        ndim = ndims[owned]
        begins = np.cumsum(2 * ndim) - 2 * ndim
        offsets, sizes = np.zeros((len(owned), most), np.int64), np.ones((len(owned), most), np.int64)
        cells = np.repeat(np.arange(len(owned)), ndim), concat_ranges(0, ndim)
        offsets[cells] = flat[concat_ranges(begins, ndim)]
        sizes[cells] = flat[concat_ranges(begins + ndim, ndim)]
        nbytes = sizes.prod(axis=1) * itemsizes[owned]
        ranks = np.repeat(np.arange(len(held)), counts)
        return cls(owned, ranks, np.concatenate(positions), table[owned], offsets, sizes, nbytes)

    @property
    def starts(self) -> IntArray:
        """(n,) the position of the first element in the tensor."""
        return first_elements(self.offsets, self.shapes)


def _check_held(entries: Mapping[str, EntryDescription], shards: _Shards) -> None:
    """Check that each entry with elements is on a rank, and that all shards are inside their tensors.

    Raises:
        ArgumentError: an entry is on no rank, or a shard is not inside its tensor.
    """
    names = list(entries)
    absent = np.bincount(shards.ids, minlength=len(entries)) == 0
    absent &= np.fromiter((0 not in entry.shape for entry in entries.values()), np.bool_, len(entries))
    if bool(absent.any()):
        raise ArgumentError(
            f"no rank of the process group holds a part of {names[int(np.argmax(absent))]!r}, so it would not be "
            "saved: save from the ranks that hold it, or leave it out"
        )
    outside = (shards.offsets + shards.sizes > shards.shapes).any(axis=1) & (shards.sizes > 0).all(axis=1)
    if bool(outside.any()):
        at = int(np.argmax(outside))
        name = names[int(shards.ids[at])]
        ndim = len(entries[name].shape)
        raise ArgumentError(
            f"{name!r} has shape {[*entries[name].shape]}, but rank {int(shards.ranks[at])} holds a shard of shape "
            f"{shards.sizes[at, :ndim].tolist()} at {shards.offsets[at, :ndim].tolist()}: all ranks need the same mesh "
            "and placements"
        )


def _choose_writers(shards: _Shards, world_size: int) -> IntArray:
    """Return the shards to write, ascending: one of each set of replicas. Empty shards are not written."""
    filled = np.flatnonzero((shards.sizes > 0).all(axis=1))
    ids, starts = shards.ids[filled], shards.starts[filled]
    order = np.lexsort((starts, ids))  # stable: the ranks of replicas ascend
    by_key, ids, starts = filled[order], ids[order], starts[order]
    sizes = shards.sizes[by_key]  # boxes of different sizes at one position are no replicas: `_check_coverage` fails
    differs = (ids[1:] != ids[:-1]) | (starts[1:] != starts[:-1]) | (sizes[1:] != sizes[:-1]).any(axis=1)
    opens = np.concatenate(([True], differs))[: len(ids)]
    firsts = np.flatnonzero(opens)
    counts = np.diff(np.append(firsts, len(ids)))
    is_spread = (counts > 1) & (shards.nbytes[by_key[firsts]] > SMALL_REPLICA_BYTES)
    chosen = by_key[firsts]
    settled = chosen[~is_spread]
    loads = np.bincount(shards.ranks[settled], shards.nbytes[settled], world_size).astype(np.int64)
    spread = np.flatnonzero(is_spread)
    for at in spread[np.argsort(chosen[spread], kind="stable")].tolist():
        holders = by_key[firsts[at] : firsts[at] + counts[at]]
        best = holders[np.argmin(loads[shards.ranks[holders]])]
        loads[shards.ranks[best]] += shards.nbytes[best]
        chosen[at] = best
    return np.sort(chosen)


def _check_coverage(entries: Mapping[str, EntryDescription], shards: _Shards, chosen: IntArray) -> None:
    """Check that the ranks together write every entry completely.

    Raises:
        ArgumentError: the shards of a tensor overlap or leave gaps, for example because the placements of the ranks
            differ.
    """
    by_entry = chosen[np.argsort(shards.ids[chosen], kind="stable")]
    bounds = np.searchsorted(shards.ids[by_entry], np.arange(len(entries) + 1)).tolist()
    volumes = np.concatenate(([0], np.cumsum(shards.sizes[by_entry].prod(axis=1))))[bounds]
    held = np.diff(volumes).tolist()
    for at, (name, entry) in enumerate(entries.items()):
        mine, ndim = by_entry[bounds[at] : bounds[at + 1]], len(entry.shape)
        numel = math.prod(entry.shape)
        if held[at] != numel or (
            len(mine) > 1 and not tile(entry.shape, shards.offsets[mine, :ndim], shards.sizes[mine, :ndim])
        ):
            raise ArgumentError(
                f"the ranks hold {held[at]} elements of {name!r}, which has {numel}: its shards overlap or leave gaps. "
                "All ranks of the process group must save it, with the same mesh and placements"
            )
