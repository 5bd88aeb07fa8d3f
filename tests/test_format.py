"""docs/FORMAT.md is enough: a reader written from it alone, with nothing of reshard, gives what was saved."""

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

Array = npt.NDArray[Any]
COLUMNS = {
    "offsets": ("<i8", 2), "sizes": ("<i8", 2), "starts": ("<i8", 1), "checksums": ("<u8", 4), "regions": ("<u4", 1),
    "objects": ("<u4", 1), "lengths": ("<u4", 3), "streams": ("u1", 1), "encodings": ("u1", 1),
}  # fmt: skip
"""Types, and which of a block's counts says how many values there are."""
ITEMSIZES = {"float32": 4, "bfloat16": 2, "int64": 8, "float16": 2, "complex64": 8, "uint8": 1}


class Reader:
    """All of a checkpoint, as bytes by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        data = (folder / "manifest.reshard").read_bytes()
        magic, version, header_bytes, total = struct.unpack_from("<8sIIQ", data)
        assert (magic, version, total) == (b"RESHARD\n", 4, len(data))
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

    def read(self) -> dict[str, bytes]:
        found: dict[str, Array] = {}
        extent = chunk = check = 0
        heads: dict[tuple[int, ...], Array] = {}
        for segment, region in enumerate(self.columns["regions"].tolist()):
            entry = self.entry_of[region]
            name, _, dtype, shape, parts, _, _, _, _ = self.header["entries"][entry]
            itemsize = ITEMSIZES[dtype]
            whole = found.setdefault(name, np.zeros((*shape, itemsize), np.uint8))
            offsets = self.columns["offsets"][extent : extent + len(shape)].tolist()
            sizes = self.columns["sizes"][extent : extent + len(shape)].tolist()
            extent += len(shape)
            object_name = self.header["objects"][self.columns["objects"][segment]][0]
            data = (self.folder / object_name).read_bytes()
            assert data[:8] == b"RESHARDD"
            at = int(self.columns["starts"][segment])
            for box in chunk_boxes(shape, parts, offsets, sizes):
                length = int(self.columns["lengths"][chunk])
                chunk += 1
                raw = data[at : at + length]
                at += length
                numel = int(np.prod([s.stop - s.start for s in box]))
                key = (entry, *(s.start for s in box))
                if self.columns["encodings"][segment] == 0:
                    page = page_bytes(shape, parts, itemsize)
                    pieces = [raw[i : i + page] for i in range(0, len(raw), page)]
                    values = np.frombuffer(raw, np.uint8)
                else:
                    pieces = [raw]
                    if self.columns["streams"][segment] == 1:
                        heads[key] = bfloat16(planes(raw, 2, numel)[0])
                        values = np.zeros(numel * itemsize, np.uint8)
                    elif self.columns["streams"][segment] == 2:
                        values = float32(heads[key], *planes(raw, 2, numel)).view(np.uint8)
                    elif dtype == "bfloat16":
                        values = bfloat16(planes(raw, 2, numel)[0]).view(np.uint8)
                    else:
                        width = 4 if dtype == "complex64" else itemsize
                        split, rest = planes(raw, width, numel * itemsize // width)
                        assert not rest
                        values = np.stack(split, axis=-1).reshape(-1)
                for piece in pieces:
                    assert int(self.columns["checksums"][check]) == xxhash.xxh3_64_intdigest(piece)
                    check += 1
                whole[box] = values.reshape(*(s.stop - s.start for s in box), itemsize)
        assert (chunk, check) == (len(self.columns["lengths"]), len(self.columns["checksums"]))
        return {name: whole.tobytes() for name, whole in found.items()}


def chunk_boxes(shape: list[int], parts: list[int], offsets: list[int], sizes: list[int]) -> list[tuple[slice, ...]]:
    """In the order of the file."""
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
    turned: Array = split[0].astype(np.uint32) << 8 | split[1]
    bits: Array = ((turned >> 1 | turned << 15) & 0xFFFF).astype("<u2")
    return bits


def float32(heads: Array, split: list[Array], exceptions: bytes) -> Array:
    tails = (split[0] | split[1].astype(np.uint16) << 8).view(np.int16).astype(np.int64)
    bits: Array = ((heads.astype(np.int64) << 16) + tails) % 2**32
    for position, value in struct.iter_unpack("<II", exceptions):
        bits[position] = value
    values: Array = bits.astype("<u4")
    return values


@pytest.mark.parametrize("block_bytes", [manifest_blocks.BLOCK_BYTES, 256])
@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_a_reader_written_from_the_document(
    codec: str, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_blocks, "BLOCK_BYTES", block_bytes)
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
