"""Decodes chunks on a device, and writes them to destinations there.

What a device can decode is copied to it as soon as it has been verified, unchanged: raw chunks, chunks of other
formats, and with nvCOMP also compressed ones. Other chunks stay on the host until they are placed. Then the host
decompresses their planes, and the device joins them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, islice

import numpy as np
import torch

from ....planner.chunk_reads import ChunkReads
from ....planner.entries import Encoding
from ....planner.errors import CheckpointError
from ...errors import CorruptCheckpointError
from ...formats.native.codec import Planes, exceptions_of
from ...tensors.dtypes import torch_dtype
from ..blocks import Block
from ..decode import (
    MakeError,
    arrived_streams,
    damaged_chunk,
    decode_block,
    decode_chunk,
    parts_of,
    place_chunk_batch,
    undecodable,
)
from ..destination import BlockWriter
from ..stream_bytes import Exceptions, StreamBytes, StreamOnDevice
from ..tasks import ChunkBatch, Request, TensorProgress
from .device import Device, Moved
from .frames import Frames, UndecodableFrameError
from .join import join_bfloat16, join_float32, join_planes
from .ring import Slot

MAX_COPIED_BYTES = 4 * 1024 * 1024
"""The most decoded bytes that a worker copies from the host, joins and writes at once."""
MAX_JOINED_BYTES = 16 * 1024 * 1024
"""The most decoded bytes that are joined at once on a device. This needs about four times as much memory there."""
MIN_DECOMPRESSED_BYTES = 64 * 1024 * 1024
"""If fewer bytes of frames may be decompressed with one call, the host is faster (see `frames.MIN_FRAMES`)."""


_Piece = tuple[torch.Tensor | None, int]
"""Where one plane of one chunk is: the memory, and the position in it. No memory: in what is decompressed."""


class PlacingError(Exception):
    """The values of a tensor cannot be written. The cause is what torch or the device raised."""

    def __init__(self, tensor: TensorProgress) -> None:
        super().__init__(tensor.name)
        self.tensor = tensor


def assign_devices(batches: Sequence[ChunkBatch], *, may_decompress: bool) -> dict[str, int]:
    """Decide where the chunks of each batch are decoded.

    Args:
        may_decompress: whether a device may also decompress.

    Returns:
        Their stored bytes by what decodes them. Empty if the host decodes all of them.
    """
    if all(batch.destination is None or batch.destination.device is None for batch in batches):
        return {}
    decoded_by: dict[str, int] = {}
    for request in (request for batch in batches for request in batch.requests):
        request.on_host = False
    for batch in batches:
        device = None if batch.destination is None else batch.destination.device
        path = "host"
        if device is not None:
            _assign(batch, device, may_decompress=may_decompress)
            path = f"{device.device} with nvCOMP" if batch.frames else str(device.device)
            path = path if batch.device is not None else f"host and {path}"
        decoded_by[path] = decoded_by.get(path, 0) + int(batch.read.fetched_bytes(batch.rows).sum())
        for request in batch.requests:
            request.on_host |= batch.device is None
            request.device = request.device or batch.device
    return decoded_by


def _assign(batch: ChunkBatch, device: Device, *, may_decompress: bool) -> None:
    """Let a device decode the chunks of a batch from the bytes that are stored, if it can."""
    encodings = batch.blocks.encodings[batch.block_rows]
    has_planes = encodings == Encoding.PLANES
    able = (encodings == Encoding.RAW) | (encodings == Encoding.PLAIN)
    if may_decompress and device.decompressor is not None:
        able |= has_planes
    if bool(able.all()):
        batch.device = device
        chunks = batch.blocks.counts[batch.block_rows].prod(axis=1)
        batch.frames = int(chunks[has_planes].sum()) * len(batch.requests)


def move(request: Request, data: memoryview, slot: Slot | None, make_error: MakeError) -> None:
    """Start to copy the bytes of a request to the devices that decode them.

    Args:
        data: its bytes, which have been verified.
        slot: the slot of the ring that contains them. If it is None, they are copied into the ring.

    Raises:
        CorruptCheckpointError: the bytes cannot be decoded.
    """
    moved: dict[Device, Moved] = {}
    for batch, stream in request.parts:
        device = batch.device
        if device is None:
            continue
        if device not in moved and slot is None:
            moved[device] = device.upload([data], request.start)
        elif device not in moved:
            assert slot is not None
            moved[device] = device.send(slot, slot.position(data), len(data), request.start)
        batch.on_device[stream] = _describe(batch, stream, data, moved[device], make_error)


def _describe(batch: ChunkBatch, stream: int, data: memoryview, moved: Moved, make_error: MakeError) -> StreamOnDevice:
    """Read the tables of the planes of a stream on the host."""
    found = StreamBytes.of(batch.read, batch.rows, stream, batch.requests[stream].start, data)
    planes_of: dict[int, Planes] = {}
    exceptions: dict[int, dict[int, Exceptions]] = {}

    def describe(block: Block) -> None:
        planes = found.planes(batch.read, block)
        planes.check_frames()
        if stream == 1:
            exceptions[block.row] = exceptions_of(planes, found.ends[found.rows(block)])
        planes_of[block.row] = replace(planes, data=memoryview(b""))

    for block in batch.blocks.select(batch.block_rows):
        if block.encoding == Encoding.PLANES:
            try:
                describe(block)
            except CorruptCheckpointError as error:
                raise damaged_chunk(batch, block, describe, error, make_error) from error
    return StreamOnDevice(moved.data, moved.copied, replace(found, data=memoryview(b"")), planes_of, exceptions)


def place(batches: Sequence[ChunkBatch], make_error: MakeError, max_bytes: int) -> None:
    """Decode batches whose bytes have arrived, and write them to their destinations.

    Args:
        batches: one batch, or several with frames on a device.
        make_error: returns the error to raise for a tensor and a message.
        max_bytes: the most bytes of frames that are decompressed with one call.

    Raises:
        CorruptCheckpointError: a chunk cannot be decoded.
        PlacingError: torch or the device failed.
    """
    on_device: dict[Device, list[ChunkBatch]] = {}
    for batch in batches:
        assert batch.destination is not None
        if batch.device is not None:
            on_device.setdefault(batch.device, []).append(batch)
        elif batch.destination.device is not None:
            _place_from_host(batch.destination.device, batch, make_error)
        else:
            with _naming_tensor(batch):
                place_chunk_batch(batch, make_error)
    for device, members in on_device.items():
        _place_on_device(device, members, max_bytes, make_error)


@contextlib.contextmanager
def _naming_tensor(batch: ChunkBatch) -> Iterator[None]:
    """Name the tensor of a batch in the errors of torch and of the device that the block raises."""
    try:
        yield
    except (CheckpointError, PlacingError):
        raise
    except Exception as error:
        raise PlacingError(batch.tensor) from error


def _place_on_device(device: Device, batches: Sequence[ChunkBatch], max_bytes: int, make_error: MakeError) -> None:
    """Decode batches whose bytes are on a device, and write them to their destinations. Wait until this is done."""
    copied = [stream.copied for batch in batches for stream in batch.on_device.values()]
    with device.working(copied, decompresses=any(batch.frames for batch in batches)):
        planes = _PlanesToPlace(device, make_error)
        for batch in batches:
            with _naming_tensor(batch):
                for block in batch.blocks.select(batch.block_rows):
                    writer = batch.open(block)
                    if block.encoding != Encoding.PLANES:
                        _write(batch, writer, (), _decoded(batch.read, block, batch.on_device[0]))
                        continue
                    for index, chunks in _parts(batch.read, block, min(MAX_JOINED_BYTES, max_bytes // 4)):
                        planes.add(_PartOfBlock(batch, block, writer, index, chunks))
                        if planes.frames.value_bytes >= max_bytes:
                            planes.place()
        planes.place()
    for batch in batches:
        batch.on_device.clear()


def _place_from_host(device: Device, batch: ChunkBatch, make_error: MakeError) -> None:
    """Decompress the planes of a batch on the host, join them on the device and write them to their destination."""
    streams = arrived_streams(batch)
    for block in batch.blocks.select(batch.block_rows):
        writer = batch.open(block)
        try:
            with _naming_tensor(batch):
                for index, copied, values in _values_from_host(device, batch.read, block, streams):
                    with device.working([copied]):
                        _write(batch, writer, index, values())
        except CorruptCheckpointError as error:
            raise damaged_chunk(batch, block, partial(decode_chunk, batch.read, streams), error, make_error) from error


def _write(batch: ChunkBatch, writer: BlockWriter, index: tuple[int | slice, ...], values: torch.Tensor) -> None:
    batch.tensor.overwritten = True
    writer.write_tensor(index, values)


def _values_from_host(
    device: Device, read: ChunkReads, block: Block, streams: list[StreamBytes]
) -> Iterator[tuple[tuple[int | slice, ...], torch.cuda.Event | None, Callable[[], torch.Tensor]]]:
    """Yield the parts of a block: an index into its directions, and a function that returns the values.

    The function must be called in a `working` block of the device, after the event and before the next part.
    """
    if block.encoding != Encoding.PLANES:
        for decoded in decode_block(read, block, streams, [block.count]):
            moved = device.upload([decoded.view(np.uint8).data])
            yield (), moved.copied, partial(moved.data.view, _stored_dtype(read))
        return
    planes = [stream.planes(read, block) for stream in streams]
    exceptions = exceptions_of(planes[1], streams[1].ends[streams[1].rows(block)]) if len(planes) == 2 else {}
    iterators = [found.parts(plane) for found in planes for plane in range(found.starts.shape[1])]
    for index, chunks in _parts(read, block, MAX_COPIED_BYTES):
        count = chunks.stop - chunks.start
        moved = device.upload([part for iterator in iterators for part in islice(iterator, count)])
        listed = _in_part(exceptions, chunks, planes[0].numel)
        yield index, moved.copied, partial(_joined, read, moved.data.view(len(iterators), -1).unbind(), listed)


@dataclass(frozen=True, slots=True)
class _PartOfBlock:
    """Some chunks of a block whose planes are on a device."""

    batch: ChunkBatch
    block: Block
    writer: BlockWriter
    index: tuple[int | slice, ...]
    """An index into the directions of the block."""
    chunks: slice
    """The chunks, counted in the block."""


class _PlanesToPlace:
    """Parts of blocks whose planes are on a device, and the frames among these planes.

    Args:
        make_error: returns the error to raise for a tensor and a message.
    """

    def __init__(self, device: Device, make_error: MakeError) -> None:
        self._device = device
        self._make_error = make_error
        self._clear()

    def _clear(self) -> None:
        self._parts: list[tuple[_PartOfBlock, list[list[_Piece]]]] = []
        """The parts. For each plane of a part, the pieces of all its chunks."""
        self.frames = Frames()
        self._chunks: list[tuple[ChunkBatch, int]] = []
        """The chunk of each frame: a batch and a row."""

    def add(self, part: _PartOfBlock) -> None:
        """Add a part of a block, and its compressed planes to `frames`."""
        batch, pieces = part.batch, []
        rows = range(part.block.row + part.chunks.start, part.block.row + part.chunks.stop)
        for stream in map(batch.on_device.__getitem__, range(len(batch.requests))):
            planes = stream.planes[part.block.row]
            for plane in range(planes.starts.shape[1]):
                columns = (planes.compressed, planes.starts, planes.stops)
                found = zip(*(column[part.chunks, plane].tolist() for column in columns), rows, strict=True)
                pieces.append([self._piece(part, stream, planes.numel, *chunk) for chunk in found])
        self._parts.append((part, pieces))

    def _piece(
        self, part: _PartOfBlock, stream: StreamOnDevice, numel: int, packed: bool, start: int, stop: int, row: int
    ) -> _Piece:
        if not packed:
            return stream.data, start
        self._chunks.append((part.batch, row))
        return None, self.frames.add(stream.data[start:stop], numel)

    def place(self) -> None:
        """Decompress the frames, join the planes of all parts and write the values."""
        try:
            decompressed = self._decompressed() if self._chunks else None
            for part, pieces in self._parts:
                with _naming_tensor(part.batch):
                    self._place(part, pieces, decompressed)
        finally:  # an error would keep the memory of the device
            self._clear()

    def _decompressed(self) -> torch.Tensor:
        assert self._device.decompressor is not None
        try:
            with _naming_tensor(self._chunks[0][0]):
                return self.frames.decompress(self._device.decompressor)
        except PlacingError as error:
            if not isinstance(error.__cause__, UndecodableFrameError):
                raise
            batch, row = self._chunks[error.__cause__.number]
            raise undecodable(batch, row, error.__cause__.cause, self._make_error) from error

    @staticmethod
    def _place(part: _PartOfBlock, pieces: list[list[_Piece]], decompressed: torch.Tensor | None) -> None:
        streams = [part.batch.on_device[stream] for stream in range(len(part.batch.requests))]
        numel = streams[0].planes[part.block.row].numel
        exceptions = [
            listed
            for stream in streams
            for listed in _in_part(stream.exceptions.get(part.block.row, {}), part.chunks, numel)
        ]
        planes = []
        for of_plane in pieces:
            slices = []
            for stored, start in of_plane:
                memory = decompressed if stored is None else stored
                assert memory is not None
                slices.append(memory[start : start + numel])
            planes.append(slices[0] if len(slices) == 1 else torch.cat(slices))
        _write(part.batch, part.writer, part.index, _joined(part.batch.read, planes, exceptions))


def _decoded(read: ChunkReads, block: Block, stream: StreamOnDevice) -> torch.Tensor:
    """Return the values of chunks that are raw or of another format."""
    data = stream.data[stream.ranges.range_of(block)]
    if block.encoding == Encoding.RAW or block.count > 1:
        nbytes, skipped = block.count * block.numel * read.itemsize, int(read.skipped[block.row])
        if len(data) < nbytes:  # a chunk that was read in part: its other values are not used
            whole = torch.empty(nbytes, dtype=torch.uint8, device=data.device)
            whole[skipped : skipped + len(data)] = data
            data = whole
    else:
        assert read.runs is not None
        nbytes, count = int(read.runs.nbytes[block.row]), int(read.runs.counts[block.row])
        if len(data) != count * nbytes:  # without the bytes between the byte runs
            strides = (int(read.runs.strides[block.row]), 1)
            data = data.as_strided((count, nbytes), strides, data.storage_offset()).reshape(-1)
        if read.entry.order is not None:
            order = read.entry.order
            sizes = [block.sizes[d] for d in order]
            back = [order.index(d) for d in range(len(order))]
            data = data.view(*sizes, read.itemsize).permute(*back, len(order)).reshape(-1)
    if data.storage_offset() % read.itemsize:
        data = data.clone()
    return data.view(_stored_dtype(read))


def _joined(read: ChunkReads, planes: Sequence[torch.Tensor], exceptions: Sequence[Exceptions]) -> torch.Tensor:
    if len(planes) == 4 and read.starts.shape[1] == 2:
        return join_float32(planes[:2], planes[2:], exceptions)
    return join_bfloat16(*planes) if read.heads_only else join_planes(planes, read.entry.dtype)


def _in_part(exceptions: dict[int, Exceptions], chunks: slice, numel: int) -> list[Exceptions]:
    """Return the exceptions of some chunks, with positions in these chunks together."""
    return [
        (positions + (at - chunks.start) * numel, bits)
        for at, (positions, bits) in exceptions.items()
        if chunks.start <= at < chunks.stop
    ]


def _parts(read: ChunkReads, block: Block, max_bytes: int) -> Iterator[tuple[tuple[int | slice, ...], slice]]:
    """Split a block into parts of about `max_bytes`: an index into its directions, and the chunks."""
    indexes, counts = parts_of(block.counts, max(1, max_bytes // max(1, block.numel * read.itemsize)))
    ends = [0, *accumulate(counts)]
    return zip(indexes, map(slice, ends, ends[1:]), strict=False)


def _stored_dtype(read: ChunkReads) -> torch.dtype:
    return torch.bfloat16 if read.heads_only else torch_dtype(read.entry.dtype)
