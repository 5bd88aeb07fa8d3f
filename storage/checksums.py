"""The checksum of everything stored: XXH3 of 64 bits, fast enough (tens of GB/s) to cost nothing beside decoding."""

from __future__ import annotations

import xxhash
from typing_extensions import Buffer

from ..planner.index import PAGE_BYTES


def checksum(data: Buffer) -> int:
    """XXH3-64 of bytes, seed 0."""
    return xxhash.xxh3_64_intdigest(data)


def page_checksums(data: Buffer) -> list[int]:
    """The checksum of each page of a raw chunk, or of a part of one that begins with a page."""
    view = memoryview(data)
    return [xxhash.xxh3_64_intdigest(view[at : at + PAGE_BYTES]) for at in range(0, len(view), PAGE_BYTES)]
