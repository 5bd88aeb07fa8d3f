"""The checksum of everything stored: XXH3 of 64 bits, fast enough (tens of GB/s) to cost nothing beside decoding."""

from __future__ import annotations

from collections.abc import Iterable

import xxhash
from typing_extensions import Buffer


def checksum(data: Buffer) -> int:
    """XXH3-64 of bytes, seed 0."""
    return xxhash.xxh3_64_intdigest(data)


def checksums(data: Buffer, begins: Iterable[int], ends: Iterable[int]) -> list[int]:
    """Those of parts of some bytes: [begin, end) each."""
    view, digest = memoryview(data), xxhash.xxh3_64_intdigest
    return [digest(view[begin:end]) for begin, end in zip(begins, ends, strict=True)]


def page_checksums(data: Buffer, page_bytes: int) -> list[int]:
    """The checksum of each page of a raw chunk."""
    begins = range(0, memoryview(data).nbytes, page_bytes)
    return checksums(data, begins, (begin + page_bytes for begin in begins))
