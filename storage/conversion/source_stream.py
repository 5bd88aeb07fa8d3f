"""The values of a source, piece by piece: read ahead of whoever takes them, small ones several at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from itertools import groupby, islice
from typing import Any

import torch

from ...planner.box import Box
from ...planner.chunk_reads import Want
from ...planner.entries import Kind
from ...planner.request_costs import UNBOUNDED_OVER_READ
from ..errors import CorruptCheckpointError, UnsafeValueError
from ..formats.source import Source
from ..formats.torch_save.safe_load import ZSTD_MAGIC, decompress
from ..formats.value_codec import MAX_VALUE_BYTES, encode_value
from ..reading.read_tensors import ReadOptions, counting_metadata, read_boxes
from ..reading.value_reads import ValueRead
from ..reading.workers import Workers
from ..runtime.brief import reason
from ..runtime.limits import default_budget, give_back_memory
from ..runtime.process_group import CHECK_EVERY_S, Interrupt, never
from ..runtime.reports import RankReport, added
from ..runtime.threads import Pool
from ..tensors.splitting import PIECE_BYTES, group_by_bytes
from .work_items import Item, Piece

MAX_GROUP_BYTES = 256 * 1024 * 1024
"""Values that are read at once, at most."""
SMALL_READ_BYTES = 1024 * 1024
"""Of less than this together, whatever lies between is read over: it costs less than requests."""
READ_PARTS = 6
"""A group takes this part of the budget: one is used, another is read, and its bytes arrive in as much memory."""


class SourceStream:
    """Reads pieces of a source, within half of the budget.

    Pieces are small, so that what is written can be cut; but chunks of a file lie in another order than the pieces, and
    each piece alone would need a request for every few KiB. So consecutive pieces are read as one box.
    """

    def __init__(
        self,
        source: Source,
        rank: int,
        budget_bytes: int | None,
        was_read: Callable[[int], None],
        interrupt: Interrupt = never,
    ) -> None:
        budget = default_budget() if budget_bytes is None else budget_bytes
        self._source = source
        self._lock = threading.Lock()
        self.group_bytes = max(PIECE_BYTES, min(MAX_GROUP_BYTES, budget // READ_PARTS))
        """Values that are read at once."""
        self._pool = Pool(1, "reshard-convert")
        self._workers = Workers(source.store)
        self._report = RankReport(rank)
        self._was_read = was_read
        self._interrupt = interrupt

    @property
    def report(self) -> RankReport:
        """What was read so far."""
        return counting_metadata(self._report, self._source)

    def close(self) -> None:
        """Stop the reads that nobody waits for any more."""
        self._pool.abandon()
        self._workers.__exit__(None, None, None)

    def stream(self, pieces: Iterable[Piece]) -> Iterator[torch.Tensor]:
        """The values of pieces of tensors, in their order, each in its item's dtype; they may be parts of one tensor.

        Raises as `read_boxes`.
        """
        groups = group_by_bytes(pieces, self.group_bytes)
        waiting: deque[Future[list[torch.Tensor]]] = deque()
        try:
            waiting += [self._pool.submit(self.read, group) for group in islice(groups, 1)]
            while waiting:
                tensors = self._result(waiting.popleft())
                waiting += [self._pool.submit(self.read, group) for group in islice(groups, 1)]
                give_back_memory()
                yield from tensors
        finally:
            for future in waiting:
                future.cancel()

    def _result(self, future: Future[list[torch.Tensor]]) -> list[torch.Tensor]:
        """What a read gives. Raises as `read_boxes`, and what interrupts the waiting."""
        while not future.done():
            wait([future], CHECK_EVERY_S)
            self._interrupt()
        return future.result()

    def read(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        """The values of pieces of tensors, at once. May be called from several threads. Raises as `read_boxes`."""
        boxes = [whole for group in _of_one_item(pieces) for whole in _joined(group)]
        tensors = [torch.empty(box.sizes, dtype=item.torch_dtype, device="cpu") for item, box, _ in boxes]
        full = [at for at, (_, box, _) in enumerate(boxes) if box.numel]
        nbytes = sum(piece.nbytes for piece in pieces)
        report = read_boxes(
            self._source,
            [Want(boxes[at][0].source, boxes[at][1]) for at in full],
            [tensors[at] for at in full],
            options=self._options(UNBOUNDED_OVER_READ if nbytes < SMALL_READ_BYTES else None),
        )
        self._note(report, nbytes)
        return [
            tensor[piece.box.relative_to(box).slices]
            for tensor, (_, box, parts) in zip(tensors, boxes, strict=True)
            for piece in parts
        ]

    def objects(self, pieces: Iterable[Piece]) -> Iterator[tuple[Kind, bytes, Any]]:
        """The objects of pieces, in their order: how each is encoded, its bytes, and its value.

        The value is None where that needs more than a safe pickle. Raises as `read_boxes`.
        """
        for group in group_by_bytes(pieces, self.group_bytes):
            self._source.index([Want(piece.item.source, Box.whole(piece.item.shape)) for piece in group])
            blobs = [ValueRead(self._source, piece.item.source) for piece in group]
            report = read_boxes(self._source, [], [], blobs, self._options(UNBOUNDED_OVER_READ))
            self._note(report, sum(piece.nbytes for piece in group))
            yield from map(_decode_value, blobs)

    def _options(self, max_over_read: float | None) -> ReadOptions:
        return ReadOptions(budget_bytes=self.group_bytes, max_over_read=max_over_read, workers=self._workers)

    def _note(self, report: RankReport, nbytes: int) -> None:
        with self._lock:
            self._report = added(self._report, report)
        self._was_read(nbytes)


def _decode_value(blob: ValueRead) -> tuple[Kind, bytes, Any]:
    try:
        value = blob.value()
    except UnsafeValueError:
        data = blob.data
        return blob.kind, decompress(data, MAX_VALUE_BYTES) if data.startswith(ZSTD_MAGIC) else data, None
    try:
        return *encode_value(value), value
    except Exception as error:  # a value with attributes that no save has given it
        raise CorruptCheckpointError(f"object {blob.name!r} cannot be written anew: {reason(error)}") from error


def _of_one_item(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Consecutive pieces of one tensor."""
    for _, group in groupby(pieces, lambda piece: piece.item.name):
        yield list(group)


def _joined(pieces: Sequence[Piece]) -> list[tuple[Item, Box, Sequence[Piece]]]:
    """Pieces of one tensor, which do not overlap, as one box if they make up one; else each as its own."""
    item = pieces[0].item
    ndim = len(item.shape)
    low = tuple(min(piece.box.offsets[d] for piece in pieces) for d in range(ndim))
    high = tuple(max(piece.box.offsets[d] + piece.box.sizes[d] for piece in pieces) for d in range(ndim))
    around = Box(low, tuple(stop - start for start, stop in zip(low, high, strict=True)))
    if around.numel == sum(piece.box.numel for piece in pieces):
        return [(item, around, pieces)]
    return [(item, piece.box, [piece]) for piece in pieces]
