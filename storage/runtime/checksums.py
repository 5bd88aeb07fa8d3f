"""The checksum of all stored data: XXH3 with 64 bits. At tens of GB/s it is much faster than decoding."""

from __future__ import annotations

from collections.abc import Callable

import xxhash
from typing_extensions import Buffer

checksum: Callable[[Buffer], int] = xxhash.xxh3_64_intdigest
"""Returns the XXH3-64 checksum of bytes, with seed 0."""


def raw_checksums(chunk: Buffer, page_bytes: int) -> list[int]:
    """Return the checksum of each page of a raw chunk and, if it has several pages, of all its bytes."""
    view = memoryview(chunk)
    pages = [checksum(view[at : at + page_bytes]) for at in range(0, len(view), page_bytes)]
    return pages if len(pages) == 1 else [*pages, checksum(view)]
