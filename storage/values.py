"""The values of a source, piece by piece: read ahead of whoever takes them, small ones several at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import Any

import torch

from ..planner.box import Box
from ..planner.index import Kind
from ..planner.read_plan import Want
from .errors import UnsafeObjectError
from .objects import MOST_OBJECT_BYTES, encode_object
from .opaque import ZSTD_MAGIC, decompress
from .pieces import PIECE_BYTES, Item, Piece, in_groups
from .read import Blob, counting_metadata, read_boxes
from .reports import RankReport, added
from .resources import default_budget, give_back_memory
from .source import Source
from .threads import Pool
from .workers import Workers

MOST_READS = 8
"""Pieces that are read at once."""


class Values:
    """Reads pieces of a source, within half of the budget."""

    def __init__(self, source: Source, rank: int, budget_bytes: int | None, was_read: Callable[[int], None]) -> None:
        budget = default_budget() if budget_bytes is None else budget_bytes
        self._source = source
        self._lock = threading.Lock()
        # Each holds a piece twice: as it is stored, and as it is read.
        self._reads = max(1, min(MOST_READS, budget // (4 * PIECE_BYTES)))
        self._pool = Pool(self._reads, "reshard-convert")
        self._workers = Workers(source.store)
        self._report = RankReport(rank)
        self._was_read = was_read

    @property
    def report(self) -> RankReport:
        """What was read so far."""
        return counting_metadata(self._report, self._source)

    def close(self) -> None:
        """Stop the reads that nobody waits for any more."""
        self._pool.abandon()
        self._workers.__exit__(None, None, None)

    def stream(self, pieces: Iterable[Piece]) -> Iterator[torch.Tensor]:
        """The values of pieces of tensors, in their order, each in its item's dtype. Raises as `read_boxes`."""
        groups = in_groups(pieces, PIECE_BYTES)
        waiting: deque[Future[list[torch.Tensor]]] = deque()
        try:
            waiting += [self._pool.submit(self.read, group) for group in islice(groups, self._reads)]
            while waiting:
                tensors = waiting.popleft().result()
                waiting += [self._pool.submit(self.read, group) for group in islice(groups, 1)]
                give_back_memory()
                yield from tensors
        finally:
            for future in waiting:
                future.cancel()

    def read(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        """The values of pieces of tensors, at once. May be called from several threads. Raises as `read_boxes`."""
        tensors = [torch.empty(piece.box.sizes, dtype=piece.item.torch_dtype) for piece in pieces]
        full = [(piece, tensor) for piece, tensor in zip(pieces, tensors, strict=True) if piece.box.numel]
        wants = [Want(piece.item.source, piece.box) for piece, _ in full]
        report = read_boxes(
            self._source, wants, [tensor for _, tensor in full], budget_bytes=PIECE_BYTES, workers=self._workers
        )
        with self._lock:
            self._report = added(self._report, report)
        self._was_read(sum(piece.nbytes for piece in pieces))
        return tensors

    def object(self, item: Item) -> tuple[Kind, bytes, Any]:
        """An object: how it is encoded, its bytes, and its value; None where that needs more than a safe pickle."""
        blob = Blob(self._source, item.source)
        report = read_boxes(self._source, blob.wants, blob.tensors)
        with self._lock:
            self._report = added(self._report, report)
        self._was_read(Piece(item, Box.whole(item.shape)).nbytes)
        try:
            value = blob.value()
        except UnsafeObjectError:
            data = blob.data
            return blob.kind, decompress(data, MOST_OBJECT_BYTES) if data.startswith(ZSTD_MAGIC) else data, None
        return *encode_object(value), value
