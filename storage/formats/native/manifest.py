"""The manifest: the index of a checkpoint in one object. Writing it commits the checkpoint.

    magic, version, lengths, checksum | header in JSON | blocks

The header lists the tensors, the objects and the blocks. A block has the columns of CheckpointIndex for consecutive
tensors, or for consecutive regions of one tensor, so that a rank reads only the blocks of a large manifest that its
boxes need (`native_source.py`). There is no pickle in it. docs/FORMAT.md describes it byte by byte.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ....planner.index import CheckpointIndex
from ...errors import CorruptCheckpointError, UnsupportedVersionError
from ...runtime.brief import text_of
from ...runtime.checksums import checksum
from ...runtime.forks import fork_safe_lock
from ...stores.base import Store
from ...stores.retry import read_whole
from ...tensors.state_dict import Path, path_to_json
from ...version import __version__
from ..metadata_reader import MALFORMED_ERRORS
from .manifest_blocks import MAX_MANIFEST_BYTES, encode_blocks

MANIFEST_NAME = "manifest.reshard"
DATA_FOLDER = "data"
DATA_SUFFIX = ".shard"
MAGIC = b"RESHARD\n"
VERSION = 5
READABLE_VERSIONS = (3, 4, 5)
"""In version 3, all keys in paths are strings, and the JSON of values has fewer type words."""
WHOLE_CHECKSUMS_SINCE = 5
"""Older versions have no checksums of whole raw chunks."""
FIRST_MANIFEST_READ_BYTES = 1024 * 1024
"""How many bytes of the manifest the first request reads. This covers small manifests as a whole."""
MAX_MANIFEST_HEADER_BYTES = 2**30
"""The largest size of a header. With a million tensors it has a tenth of this."""

DATA_NAME = re.compile(r"data/[0-9A-Za-z_-]+\.shard")
_PREFIX = struct.Struct("<8sIIQ")
_CHECKSUM = struct.Struct("<Q")
_HEADER_START = _PREFIX.size + _CHECKSUM.size


class ManifestBytes:
    """The bytes of a manifest. The first FIRST_MANIFEST_READ_BYTES are kept, the others are read when needed."""

    def __init__(self, store: Store) -> None:
        """Read the first bytes. Raise ObjectNotFoundError or StoreError."""
        self.store = store
        self.where = f"{store.location}/{MANIFEST_NAME}"
        self.first = bytes(store.read(MANIFEST_NAME, 0, FIRST_MANIFEST_READ_BYTES))
        if len(self.first) < min(_min_size(self.first), FIRST_MANIFEST_READ_BYTES):
            self.first = bytes(read_whole(store, MANIFEST_NAME, 0, FIRST_MANIFEST_READ_BYTES))
        self.bytes_read = len(self.first)
        self.requests = 1
        self._lock = fork_safe_lock()

    @property
    def header_checksum(self) -> int:
        """The checksum of the prefix and the header that the manifest contains."""
        return int(_CHECKSUM.unpack_from(self.first, _PREFIX.size)[0])

    def read(self, start: int, stop: int) -> memoryview:
        """Return a byte range. Raise CorruptCheckpointError if the manifest ends before `stop`."""
        data = self.first[start:stop]
        if stop > len(self.first) == FIRST_MANIFEST_READ_BYTES:
            rest = bytes(self.store.read(MANIFEST_NAME, start + len(data), stop))
            if len(rest) < stop - start - len(data):
                rest = bytes(read_whole(self.store, MANIFEST_NAME, start + len(data), stop))
            with self._lock:
                self.bytes_read += len(rest)
                self.requests += 1
            data += rest
        if len(data) != stop - start:
            raise CorruptCheckpointError(
                f"the manifest {self.where} ends at byte {start + len(data)}, but should have {stop} or more bytes"
            )
        return memoryview(data)


def _min_size(first: bytes) -> int:
    """Return a lower bound of the size of a manifest that begins with these bytes."""
    if len(first) < _HEADER_START:
        return _HEADER_START
    *_, total = _PREFIX.unpack_from(first)
    return int(total) if first.startswith(MAGIC) else 0


@dataclass(frozen=True, slots=True)
class ManifestHeader:
    """The header of a manifest, whose checksum is right."""

    version: int
    content: dict[str, Any]
    blocks_start: int
    """The byte where the header ends."""
    stop: int
    """The byte where the manifest should end."""


def read_header(source: ManifestBytes) -> ManifestHeader:
    """Read the header. Raise CorruptCheckpointError, UnsupportedVersionError or StoreError."""
    if not source.first.startswith(MAGIC[: len(source.first)]):
        raise CorruptCheckpointError(
            f"{source.where} is not a manifest of reshard: it begins with {source.first[:8]!r}"
        )
    if len(source.first) < _HEADER_START:
        raise CorruptCheckpointError(
            f"the manifest {source.where} is truncated: it has {len(source.first)} bytes, but should have at least "
            f"{_HEADER_START}; load a copy or an older checkpoint"
        )
    _, version, header_bytes, total = _PREFIX.unpack_from(source.first)
    if version not in READABLE_VERSIONS:
        if _is_of_readable_version(source, header_bytes, total):
            raise CorruptCheckpointError(
                f"the manifest {source.where} has the version {version}, which does not match its checksum: it is "
                "damaged"
            )
        readable = f"{READABLE_VERSIONS[0]} to {VERSION}"
        raise UnsupportedVersionError(
            f"the manifest {source.where} has format version {version}; this reshard reads versions {readable}"
        )
    if total > MAX_MANIFEST_BYTES or header_bytes > MAX_MANIFEST_HEADER_BYTES or _HEADER_START + header_bytes > total:
        raise CorruptCheckpointError(f"the manifest {source.where} claims to have {total} bytes")
    if len(source.first) < FIRST_MANIFEST_READ_BYTES and len(source.first) != total:
        raise CorruptCheckpointError(
            f"the manifest {source.where} has {len(source.first)} bytes, but should have {total}"
        )
    text = source.read(_HEADER_START, _HEADER_START + header_bytes)
    if source.header_checksum != checksum(source.first[: _PREFIX.size] + bytes(text)):
        raise CorruptCheckpointError(f"the header of the manifest {source.where} does not match its checksum")
    try:
        return ManifestHeader(version, json.loads(bytes(text)), _HEADER_START + header_bytes, int(total))
    except MALFORMED_ERRORS as error:
        raise contradiction(source.where, error) from error


def _is_of_readable_version(source: ManifestBytes, header_bytes: int, total: int) -> bool:
    """Return whether only the version field of a manifest is damaged: its checksum is right for another version."""
    if header_bytes > len(source.first):
        return False
    text = source.first[_HEADER_START : _HEADER_START + header_bytes]
    prefixes = (_PREFIX.pack(MAGIC, readable, header_bytes, total) for readable in READABLE_VERSIONS)
    return any(checksum(prefix + text) == source.header_checksum for prefix in prefixes)


def contradiction(where: str, error: Exception) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"the manifest {where} contradicts itself: {text_of(error)}")


def info_of_save(codec: str, **more: Any) -> dict[str, Any]:
    """Return the information about a save that the manifest contains.

    Args:
        more: further items.
    """
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    written_by = {"writer": f"reshard {__version__}", "torch": torch.__version__, "created": created}
    return {**written_by, "codec": codec, **more}


def encode_manifest(
    index: CheckpointIndex,
    paths: Mapping[str, Path],
    info: dict[str, Any],
    metadata: Mapping[str, Any] | None = None,
) -> bytes:
    """Return the bytes of a manifest.

    Args:
        index: the index of the checkpoint.
        paths: where entries were in the saved state dict.
        info: what wrote the checkpoint, and when.
        metadata: what the user stores with the checkpoint, as `plain_metadata` returns it.
    """
    parts, blocks, encoded = encode_blocks(index)
    found = {name: path_to_json(path) for name, path in paths.items()}
    entries = [
        [
            *(e.name, int(e.kind), e.dtype, e.grid.shape, e.grid.parts, found.get(e.name)),
            *sizes,
            of_one if math.prod(of_one) > 1 else None,
        ]
        for e, sizes, of_one in zip(index.entries, index.sizes, parts, strict=True)
    ]
    content: dict[str, Any] = {"info": info} | ({"metadata": metadata} if metadata else {})
    content |= {"objects": index.objects, "entries": entries, "blocks": blocks.to_json()}
    header = json.dumps(content, separators=(",", ":")).encode()
    header += b" " * (-(len(header) + _HEADER_START) % 8)
    prefix = _PREFIX.pack(MAGIC, VERSION, len(header), _HEADER_START + len(header) + sum(map(len, encoded)))
    return b"".join([prefix, _CHECKSUM.pack(checksum(prefix + header)), header, *encoded])
