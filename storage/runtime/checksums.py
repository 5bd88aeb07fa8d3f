"""The checksum of everything stored: XXH3 of 64 bits, fast enough (tens of GB/s) to cost nothing beside decoding."""

from __future__ import annotations

import xxhash
from typing_extensions import Buffer


def checksum(data: Buffer) -> int:
    """XXH3-64 of bytes, seed 0."""
    return xxhash.xxh3_64_intdigest(data)


def page_checksums(data: Buffer, page_bytes: int) -> list[int]:
    """The checksum of each page of a raw chunk, or of a part of one that begins with a page."""
    view = memoryview(data)
    return [xxhash.xxh3_64_intdigest(view[at : at + page_bytes]) for at in range(0, len(view), page_bytes)]
