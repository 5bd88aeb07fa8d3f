"""Streams the tensors and values of a source, piece by piece. It reads ahead, and reads small pieces together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any

import torch

from ...planner.box import Box
from ...planner.chunk_reads import WantedBox
from ...planner.entries import Kind
from ...planner.request_costs import UNBOUNDED_OVER_READ
from ..errors import CorruptCheckpointError, UnsafeValueError
from ..formats.source import Source
from ..formats.torch_save.safe_load import ZSTD_MAGIC, decompress
from ..formats.value_codec import MAX_VALUE_BYTES, encode_value
from ..reading.read_tensors import ReadOptions, counting_metadata, read_boxes
from ..reading.value_buffers import ValueBuffer
from ..reading.workers import Workers
from ..runtime.brief import reason
from ..runtime.limits import budget_of, give_back_memory
from ..runtime.process_group import CHECK_EVERY_S, Interrupt, never
from ..runtime.reports import RankReport, added
from ..runtime.threads import Pool
from ..tensors.splitting import MAX_PIECE_BYTES, group_by_bytes
from .work_items import Item, Piece

MAX_GROUP_BYTES = 256 * 1024 * 1024
"""The most bytes of values that are read together."""
SMALL_READ_BYTES = 1024 * 1024
"""A read of less than this may over-read without a limit, because the bytes cost less than more requests."""
READ_PARTS = 6
"""A group takes this part of the budget. One group is in use and one is being read, which takes its size twice."""


class SourceStream:
    """Reads pieces of a source, within half of the budget.

    Pieces are small so that the output can be cut. But the chunks of a file have another order than the pieces, and a
    single piece would need a request for every few KiB. So consecutive pieces are read as one box (a group). See the
    conversions in `benchmarks/foreign.py`.

    Args:
        rank: the rank that the report names.
        was_read: called with the bytes of values after each read.
        interrupt: called regularly while waiting. If it raises an error, waiting stops with this error.
    """

    def __init__(
        self,
        source: Source,
        rank: int,
        budget_bytes: int | None,
        was_read: Callable[[int], None],
        interrupt: Interrupt = never,
    ) -> None:
        budget = budget_of(budget_bytes)
        self._source = source
        self._lock = threading.Lock()
        self.group_bytes = max(MAX_PIECE_BYTES, min(MAX_GROUP_BYTES, budget // READ_PARTS))
        """The bytes of values that are read together."""
        self._pool = Pool(1, "reshard-convert")
        self._workers = Workers(source.store)
        self._report = RankReport(rank)
        self._was_read = was_read
        self._interrupt = interrupt

    @property
    def report(self) -> RankReport:
        """The report of all reads so far."""
        return counting_metadata(self._report, self._source)

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.abandon()
        self._workers.__exit__(None, None, None)

    def tensors(self, pieces: Iterable[Piece]) -> Iterator[torch.Tensor]:
        """Yield the values of pieces of tensors, in order, in the dtype of their item.

        Several of the tensors may be views of one larger tensor.

        Raises:
            CheckpointError: as `read_boxes`.
        """
        groups = group_by_bytes(pieces, self.group_bytes)
        waiting: deque[Future[list[torch.Tensor]]] = deque()
        try:
            waiting += [self._pool.submit(self.read, group) for group in islice(groups, 1)]
            while waiting:
                tensors = self._wait(waiting.popleft())
                waiting += [self._pool.submit(self.read, group) for group in islice(groups, 1)]
                give_back_memory()
                yield from tensors
        finally:
            for future in waiting:
                future.cancel()

    def _wait(self, future: Future[list[torch.Tensor]]) -> list[torch.Tensor]:
        """Wait for a read, and call `interrupt` regularly."""
        while not future.done():
            wait([future], CHECK_EVERY_S)
            self._interrupt()
        return future.result()

    def read(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        """Read pieces of tensors together. Several threads may call this.

        Raises:
            CheckpointError: as `read_boxes`.
        """
        boxes = [whole for group in _group_by_item(pieces) for whole in _join(group)]
        tensors = [torch.empty(box.sizes, dtype=item.torch_dtype, device="cpu") for item, box, _ in boxes]
        full = [at for at, (_, box, _) in enumerate(boxes) if box.numel]
        nbytes = sum(piece.nbytes for piece in pieces)
        report = read_boxes(
            self._source,
            [WantedBox(boxes[at][0].source, boxes[at][1]) for at in full],
            [tensors[at] for at in full],
            options=self._options(UNBOUNDED_OVER_READ if nbytes < SMALL_READ_BYTES else None),
        )
        self._add(report, nbytes)
        return [
            tensor[piece.box.relative_to(box).slices]
            for tensor, (_, box, parts) in zip(tensors, boxes, strict=True)
            for piece in parts
        ]

    def values(self, pieces: Iterable[Piece]) -> Iterator[tuple[Kind, bytes, Any]]:
        """Yield the values of pieces, in order.

        Returns:
            For each value, its kind of encoding, its encoded bytes, and the value. The value is None if decoding it
            needs a pickle that is not safe.

        Raises:
            CheckpointError: as `read_boxes`.
        """
        for group in group_by_bytes(pieces, self.group_bytes):
            reads = ValueBuffer.of(self._source, [piece.item.source for piece in group])
            report = read_boxes(self._source, [], [], reads, self._options(UNBOUNDED_OVER_READ))
            self._add(report, sum(piece.nbytes for piece in group))
            for piece, read in zip(group, reads, strict=True):
                encoded = _encode_again(read)
                if not encoded.is_safe:
                    with self._lock:
                        self._report = replace(self._report, pickled=(*self._report.pickled, piece.item.name))
                yield encoded.kind, encoded.data, encoded.value

    def _options(self, max_over_read: float | None) -> ReadOptions:
        return ReadOptions(budget_bytes=self.group_bytes, max_over_read=max_over_read, workers=self._workers)

    def _add(self, report: RankReport, nbytes: int) -> None:
        with self._lock:
            self._report = added(self._report, report)
        self._was_read(nbytes)


@dataclass(frozen=True, slots=True)
class _Encoded:
    kind: Kind
    data: bytes
    value: Any
    is_safe: bool = True
    """Whether it can be read without `allow_pickle`. If not, `value` is None."""


def _encode_again(read: ValueBuffer) -> _Encoded:
    """Decode a value and encode it as a save would. A value that needs an unsafe pickle keeps its bytes."""
    try:
        value = read.value()
    except UnsafeValueError:
        data = read.data
        whole = decompress(data, MAX_VALUE_BYTES) if data.startswith(ZSTD_MAGIC) else data
        return _Encoded(read.kind, whole, None, is_safe=False)
    try:
        return _Encoded(*encode_value(value), value)
    except Exception as error:  # an attribute of the value may be anything, if reshard did not save it
        raise CorruptCheckpointError(f"value {read.name!r} cannot be encoded again: {reason(error)}") from error


def _group_by_item(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield consecutive pieces of one item."""
    for _, group in groupby(pieces, lambda piece: piece.item.name):
        yield list(group)


def _join(pieces: Sequence[Piece]) -> list[tuple[Item, Box, Sequence[Piece]]]:
    """Join pieces of one tensor that do not overlap into one box, if they fill it. Otherwise each is a box."""
    item = pieces[0].item
    ndim = len(item.shape)
    low = tuple(min(piece.box.offsets[d] for piece in pieces) for d in range(ndim))
    high = tuple(max(piece.box.offsets[d] + piece.box.sizes[d] for piece in pieces) for d in range(ndim))
    around = Box(low, tuple(stop - start for start, stop in zip(low, high, strict=True)))
    if around.numel == sum(piece.box.numel for piece in pieces):
        return [(item, around, pieces)]
    return [(item, piece.box, [piece]) for piece in pieces]
