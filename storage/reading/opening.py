"""Opening a checkpoint on many ranks: rank 0 reads the metadata, and sends it to the others.

All ranks of a job open the same checkpoint at the same moment. If each of them read the metadata, a store that limits
its requests would be the bottleneck. On a disk each rank reads by itself: it is as fast, and another machine may have
another checkpoint at the same path.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch.distributed as dist

from ...planner.chunk_reads import WantedBox
from ..errors import ArgumentError
from ..formats.detect import open_source
from ..formats.metadata_reader import Speed
from ..formats.native.native_source import NativeSource
from ..formats.source import Source
from ..runtime.process_group import is_distributed, rank_of
from ..stores.base import Store
from ..stores.open import open_store
from ..stores.recorded import Record, RecordedStore, ReplayedStore

MAX_SENT_BYTES = 256 * 1024 * 1024
"""Ranks read metadata by themselves if it is larger: each rank would hold all of it."""
MIN_READERS = 2
"""Rank 0 sends blocks of a manifest if, on average, at least this many ranks need each of them."""

ManifestBlocks: TypeAlias = dict[int, bytes]
"""Blocks of a manifest, by their number."""


@dataclass(frozen=True, slots=True)
class OpenedCheckpoint:
    """The checkpoint that a rank opened."""

    location: str
    fingerprint: str


def are_different(opened: Iterable[OpenedCheckpoint]) -> bool:
    """Return whether ranks opened different checkpoints."""
    return len({one.fingerprint for one in opened}) > 1


def check_same_checkpoint(opened: Sequence[OpenedCheckpoint]) -> None:
    """Check that all ranks opened the same checkpoint. Their locations may differ.

    Raises:
        ArgumentError: the fingerprints differ.
    """
    if are_different(opened):
        ranks: dict[str, list[int]] = {}
        for rank, found in enumerate(opened):
            ranks.setdefault(found.fingerprint, []).append(rank)
        opened_by = "; ".join(
            f"{'rank' if len(some) == 1 else 'ranks'} {', '.join(map(str, some[:8]))}{', …' if len(some) > 8 else ''}: "
            f"{opened[some[0]].location} ({fingerprint})"
            for fingerprint, some in ranks.items()
        )
        raise ArgumentError(
            f"the ranks opened {len(ranks)} different checkpoints: {opened_by}. Pass one shared location on all ranks; "
            "if it is the same location already, it was overwritten in the meantime: load again"
        )


@dataclass(frozen=True, slots=True)
class SentMetadata:
    """The metadata that rank 0 has read."""

    records: dict[str, Record]
    """What the stores answered, by their location."""
    speed: Speed


@dataclass(frozen=True, slots=True)
class BegunOpening:
    """What a rank sends to the others when it begins to open a checkpoint."""

    opened: OpenedCheckpoint
    opened_alone: bool
    """Whether the rank has opened the checkpoint by itself, without rank 0."""
    sent: SentMetadata | None = None
    """What rank 0 has read for all ranks."""


class Opening:
    """One rank's part in opening a checkpoint.

    Args:
        uri, storage_options, format: see `open_source`.
        group: the ranks that open it, or None for the default group.

    Raises:
        UnsupportedURIError, ArgumentError, StoreError: the store cannot be opened.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str] | Store,
        storage_options: Mapping[str, Any] | None,
        format: str | None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._open = partial(open_source, uri, storage_options, format)
        store = open_store(uri, storage_options)
        self._location = store.location
        self._is_alone = not is_distributed() or dist.get_world_size(group) == 1
        self._is_together = _is_remote(store) and not self._is_alone
        self._rank = rank_of(group)
        self._source: Source | None = None
        self._fingerprint = ""

    @property
    def source(self) -> Source:
        """The open checkpoint."""
        assert self._source is not None
        return self._source

    @property
    def opened(self) -> OpenedCheckpoint:
        """What this rank has opened."""
        return OpenedCheckpoint(self._location, self._fingerprint)

    def begin(self) -> BegunOpening:
        """Open the checkpoint, unless rank 0 does it for this rank. Raise what `open_source` raises."""
        if not self._is_together:
            self._open_alone()
            return BegunOpening(self.opened, opened_alone=True)
        sent = self._open_for_all() if self._rank == 0 else None
        return BegunOpening(OpenedCheckpoint(self._location, ""), opened_alone=False, sent=sent)

    def finish(self, begun: Sequence[BegunOpening]) -> None:
        """Open the checkpoint with the metadata from rank 0, if this has not been done.

        Ranks whose locations differ open the checkpoint by themselves. Raise what `open_source` raises.

        Args:
            begun: what `begin` returned on each rank.
        """
        if self._source is not None:
            return
        sent = begun[0].sent if len({one.opened.location for one in begun}) == 1 else None
        if sent is None:
            self._open_alone()
            return
        stores: list[ReplayedStore] = []

        def wrap(store: Store) -> Store:
            stores.append(ReplayedStore(store, sent.records.get(store.location, Record())))
            return stores[-1]

        self._source = self._open(wrap=wrap)
        self._fingerprint = self._source.fingerprint()
        self._source.use_store(_inner(self._source.store), sent.speed)

    def _open_alone(self) -> None:
        self._source = self._open()
        self._fingerprint = "" if self._is_alone else self._source.fingerprint()

    def _open_for_all(self) -> SentMetadata | None:
        """Open the checkpoint, and return the metadata, or None if it is too large for the other ranks."""
        stores: list[RecordedStore] = []

        def wrap(store: Store) -> Store:
            stores.append(RecordedStore(store))
            return stores[-1]

        self._source = self._open(wrap=wrap)
        self._fingerprint = self._source.fingerprint()  # the other ranks read what this reads
        self._source.use_store(_inner(self._source.store))
        records = {store.location: store.stop() for store in stores}
        if sum(record.nbytes for record in records.values()) > MAX_SENT_BYTES:
            return None
        return SentMetadata(records, self._source.speed)


def _is_remote(store: Store) -> bool:
    """Return whether all ranks see the same objects, and requests are expensive."""
    return store.capabilities.is_shared and not store.capabilities.is_local


def _inner(store: Store) -> Store:
    assert isinstance(store, (RecordedStore, ReplayedStore))
    return store.inner


def manifest_blocks_to_read(source: Source, wants: Sequence[WantedBox]) -> list[int]:
    """Return the blocks of a manifest that this rank would have to read, and that rank 0 may read for all ranks."""
    if isinstance(source, NativeSource) and _is_remote(source.store):
        return source.blocks_to_read(wants)
    return []


def read_manifest_blocks(source: Source, wanted: Sequence[Sequence[int]], budget_bytes: int) -> ManifestBlocks:
    """Read on rank 0 the blocks that ranks need. Return none if it is better that each rank reads its own.

    Args:
        wanted: the blocks that each rank needs.
        budget_bytes: the memory that a rank may use.
    """
    blocks = np.unique(np.fromiter(chain.from_iterable(wanted), np.int64))
    if sum(map(len, wanted)) < MIN_READERS * len(blocks) or not len(blocks):
        return {}
    assert isinstance(source, NativeSource)
    if source.block_bytes(blocks.tolist()) > min(MAX_SENT_BYTES, budget_bytes // 2):
        return {}
    return source.read_blocks(blocks.tolist())


def keep_manifest_blocks(source: Source, blocks: ManifestBlocks) -> None:
    """Keep the blocks that rank 0 has read."""
    if isinstance(source, NativeSource):
        source.keep_blocks(blocks)
