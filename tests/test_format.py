"""docs/FORMAT.md is complete: a reader that was written from it, without any code of reshard, reads what was saved."""

from __future__ import annotations

import itertools
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import xxhash
import zstandard

import reshard
from reshard.storage.formats.native import manifest_blocks

pytestmark = pytest.mark.slow

Array = npt.NDArray[Any]
COLUMNS = {
    "offsets": ("<i8", 2), "sizes": ("<i8", 2), "starts": ("<i8", 1), "checksums": ("<u8", 4), "regions": ("<u4", 1),
    "objects": ("<u4", 1), "lengths": ("<u4", 3), "streams": ("u1", 1), "encodings": ("u1", 1),
}  # fmt: skip
"""For each column: the type of its values, and the position of its length among the counts of a block."""
ITEMSIZES = {"float32": 4, "bfloat16": 2, "int64": 8, "float16": 2, "complex64": 8, "uint8": 1}


class Reader:
    """Reads all tensors and values of a checkpoint, as bytes by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        data = (folder / "manifest.reshard").read_bytes()
        magic, version, header_bytes, total = struct.unpack_from("<8sIIQ", data)
        assert (magic, version, total) == (b"RESHARD\n", 5, len(data))
        at = 32 + header_bytes
        assert struct.unpack_from("<Q", data, 24)[0] == xxhash.xxh3_64_intdigest(data[:24] + data[32:at])
        self.header = json.loads(data[32:at])
        columns: dict[str, list[Array]] = {name: [] for name in COLUMNS}
        regions = 0
        for *counts, expected in self.header["blocks"]:
            assert at % 8 == 0
            begin = at
            for name, (dtype, count) in COLUMNS.items():
                values = np.frombuffer(data, dtype, counts[count], at)
                at += values.nbytes
                columns[name].append(values + np.uint32(regions) if name == "regions" else values)
            at += -at % 8
            regions += counts[0]
            assert int(expected, 16) == xxhash.xxh3_64_intdigest(data[begin:at])
        assert at == len(data)
        parts = [row[8] or [1] for row in self.header["entries"]]
        self.entry_of = [at for at, each in enumerate(parts) for _ in range(math.prod(each))]
        assert regions == len(self.entry_of)
        self.columns = {name: np.concatenate(parts) for name, parts in columns.items()}
        # The chunks and checksums read so far, and the heads whose tails follow, by entry and first element.
        self.chunk = self.checksum = 0
        self.heads: dict[tuple[int, ...], Array] = {}

    def read(self) -> dict[str, bytes]:
        found: dict[str, Array] = {}
        extent = 0
        for segment, region in enumerate(self.columns["regions"].tolist()):
            entry = self.entry_of[region]
            name, _, dtype, shape = self.header["entries"][entry][:4]
            whole = found.setdefault(name, np.zeros((*shape, ITEMSIZES[dtype]), np.uint8))
            offsets = self.columns["offsets"][extent : extent + len(shape)].tolist()
            sizes = self.columns["sizes"][extent : extent + len(shape)].tolist()
            extent += len(shape)
            self.read_segment(segment, entry, offsets, sizes, whole)
        assert (self.chunk, self.checksum) == (len(self.columns["lengths"]), len(self.columns["checksums"]))
        return {name: whole.tobytes() for name, whole in found.items()}

    def read_segment(self, segment: int, entry: int, offsets: list[int], sizes: list[int], whole: Array) -> None:
        """Read the chunks of a segment into the tensor `whole`, which has a last dimension of bytes."""
        _, _, dtype, shape, parts = self.header["entries"][entry][:5]
        itemsize = ITEMSIZES[dtype]
        object_name = self.header["objects"][self.columns["objects"][segment]][0]
        data = (self.folder / object_name).read_bytes()
        assert data[:8] == b"RESHARDD"
        at = int(self.columns["starts"][segment])
        for box in chunk_boxes(shape, parts, offsets, sizes):
            encoded = data[at : at + int(self.columns["lengths"][self.chunk])]
            self.chunk += 1
            at += len(encoded)
            if self.columns["encodings"][segment] == 0:
                page = page_bytes(shape, parts, itemsize)
                pages = [encoded[i : i + page] for i in range(0, len(encoded), page)]
                self.check(pages if len(pages) == 1 else [*pages, encoded])
                values = np.frombuffer(encoded, np.uint8)
            else:
                self.check([encoded])
                numel = math.prod(s.stop - s.start for s in box)
                key = (entry, *(s.start for s in box))
                values = self.decode_planes(encoded, int(self.columns["streams"][segment]), dtype, numel, key)
            whole[box] = values.reshape(*(s.stop - s.start for s in box), itemsize)

    def check(self, pieces: list[bytes]) -> None:
        """Compare the next checksums with those of pieces of data."""
        for piece in pieces:
            assert int(self.columns["checksums"][self.checksum]) == xxhash.xxh3_64_intdigest(piece)
            self.checksum += 1

    def decode_planes(self, encoded: bytes, stream: int, dtype: str, numel: int, key: tuple[int, ...]) -> Array:
        """Return the bytes of the values of a chunk; zeros for heads, whose values follow with their tails."""
        itemsize = ITEMSIZES[dtype]
        if stream == 1:
            self.heads[key] = bfloat16(planes(encoded, 2, numel)[0])
            return np.zeros(numel * itemsize, np.uint8)
        if stream == 2:
            return float32(self.heads[key], *planes(encoded, 2, numel)).view(np.uint8)
        if dtype == "bfloat16":
            return bfloat16(planes(encoded, 2, numel)[0]).view(np.uint8)
        width = 4 if dtype == "complex64" else itemsize
        split, rest = planes(encoded, width, numel * itemsize // width)
        assert not rest
        return np.stack(split, axis=-1).reshape(-1)


def chunk_boxes(shape: list[int], parts: list[int], offsets: list[int], sizes: list[int]) -> list[tuple[slice, ...]]:
    """Return the chunks of a segment in the order in which they are stored."""
    cuts = []
    for n, part, offset, size in zip(shape, parts, offsets, sizes, strict=True):
        edges = [(i * n // part, (i + 1) * n // part) for i in range(part)]
        inside = [(max(a, offset), min(b, offset + size)) for a, b in edges]
        cuts.append([slice(a, b) for a, b in inside if a < b])
    order = list(range(len(shape)))
    if len(shape) >= 2 and shape[-1] >= shape[-2]:
        order[-2:] = [order[-1], order[-2]]
    boxes = []
    for chosen in itertools.product(*(cuts[d] for d in order)):
        box = dict(zip(order, chosen, strict=True))
        boxes.append(tuple(box[d] for d in range(len(shape))))
    return boxes


def page_bytes(shape: list[int], parts: list[int], itemsize: int) -> int:
    cell = int(np.prod([-(-n // part) for n, part in zip(shape, parts, strict=True)])) * itemsize
    page = 16384
    while page < cell / 16:
        page *= 2
    return page


def planes(data: bytes, count: int, n: int) -> tuple[list[Array], bytes]:
    at = 4 * count
    split = []
    for head in struct.unpack_from(f"<{count}I", data):
        length = head % 2**31
        body = data[at : at + length]
        at += length
        if head >= 2**31:
            body = zstandard.ZstdDecompressor().decompress(body)
        assert len(body) == n
        split.append(np.frombuffer(body, np.uint8))
    return split, data[at:]


def bfloat16(split: list[Array]) -> Array:
    rotated: Array = split[0].astype(np.uint32) << 8 | split[1]
    bits: Array = ((rotated >> 1 | rotated << 15) & 0xFFFF).astype("<u2")
    return bits


def float32(heads: Array, split: list[Array], exceptions: bytes) -> Array:
    tails = (split[0] | split[1].astype(np.uint16) << 8).view(np.int16).astype(np.int64)
    bits: Array = ((heads.astype(np.int64) << 16) + tails) % 2**32
    for position, value in struct.iter_unpack("<II", exceptions):
        bits[position] = value
    values: Array = bits.astype("<u4")
    return values


@pytest.mark.parametrize("block_bytes", [manifest_blocks.MAX_BLOCK_BYTES, 256])
@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_a_reader_written_from_format_md_reads_what_was_saved(
    codec: str, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_blocks, "MAX_BLOCK_BYTES", block_bytes)
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**31), 2**31, (400, 300), generator=generator, dtype=torch.int64).to(torch.int32)
    state: dict[str, Any] = {
        "up": torch.randn(1030, 515, generator=generator).to(torch.bfloat16),
        "down": torch.randn(300, 700, generator=generator),
        "odd": odd.view(torch.float32),
        "experts": torch.randn(3, 200, 301, generator=generator).to(torch.float16),
        "phase": torch.randn(90, 1000, generator=generator, dtype=torch.complex64),
        "tokens": torch.randint(0, 50_000, (20_000,), generator=generator),
        "scalar": torch.tensor(2.5),
        "config": {"lr": 0.1},
        **{f"many.{i}": torch.tensor(i) for i in range(5000)},  # for several blocks
    }
    reshard.save(state, tmp_path, codec=codec)
    reader = Reader(tmp_path)
    is_cut = len(reader.entry_of) > len(reader.header["entries"])
    assert is_cut == (block_bytes == 256)
    found = reader.read()
    assert found.pop("config.lr") == b"0.1"
    assert sorted(found) == sorted(set(state) - {"config"})
    for name, content in found.items():
        assert content == state[name].reshape(-1).view(torch.uint8).numpy().tobytes(), name
