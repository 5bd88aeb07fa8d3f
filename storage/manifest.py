"""The manifest: the index of a checkpoint as one small object, the only commit point of a save.

    magic, version, length | header, JSON | columns, little-endian | xxh3 of all before

The header names the tensors, objects and columns; the columns are those of CheckpointIndex, as they are in memory, so
that opening a checkpoint takes a small multiple of the manifest's bytes, whatever it claims. No pickle.
docs/FORMAT.md has it byte by byte.
"""

from __future__ import annotations

import json
import re
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..planner.errors import InvalidIndexError
from ..planner.grid import Grid
from ..planner.index import CheckpointIndex, Entry, Kind, Segments
from .checksums import checksum
from .errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    NotCommittedError,
    ObjectNotFoundError,
    UnsupportedVersionError,
)
from .store import Store

NAME = "manifest.reshard"
DATA_FOLDER = "data"
DATA_SUFFIX = ".shard"
MAGIC = b"RESHARD\n"
VERSION = 1
READ_BYTES = 64 * 1024 * 1024
"""How much of a large manifest each further request asks for."""
FIRST_READ_BYTES = 1024 * 1024
"""How much of the manifest the first request asks for; it fetches a small one whole."""
MAX_CHUNK_BYTES = 16 * 1024 * 1024
"""Of a chunk's values: what decoding one may take of memory, whatever the manifest claims."""

MAX_BYTES = 2**36

_DATA_NAME = re.compile(r"data/[0-9A-Za-z_-]+\.shard")
_CONTRADICTIONS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What Python raises where a header is not what it should be."""
_PREFIX = struct.Struct("<8sIIQ")
_CHECKSUM = struct.Struct("<Q")
_COLUMNS = (
    ("entries", "<i8"),
    ("objects", "<i8"),
    ("starts", "<i8"),
    ("offsets", "<i8"),
    ("sizes", "<i8"),
    ("checksums", "<u8"),
    ("lengths", "<u4"),
    ("streams", "|u1"),
    ("encodings", "|u1"),
)
_IN_SEGMENTS = frozenset(("entries", "streams", "encodings", "objects", "starts", "offsets", "sizes"))


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint is made of."""

    index: CheckpointIndex
    paths: dict[str, tuple[str | int, ...]]
    """Where each entry stands in the state dict that was saved: the keys and list positions that lead to it."""
    info: dict[str, Any]
    """By what it was written, and when."""
    nbytes: int
    """Size of the manifest in the store."""
    requests: int = 1
    """Reads that it took."""


def encode_manifest(index: CheckpointIndex, paths: dict[str, tuple[str | int, ...]], info: dict[str, Any]) -> bytes:
    """The manifest's bytes."""
    columns = {
        name: np.ascontiguousarray(getattr(index.segments if name in _IN_SEGMENTS else index, name), dtype)
        for name, dtype in _COLUMNS
    }
    header = json.dumps(
        {
            "info": info,
            "objects": index.objects,
            "entries": [
                [e.name, int(e.kind), e.dtype, e.grid.shape, e.grid.parts, paths.get(e.name)] for e in index.entries
            ],
            "columns": {name: len(column) for name, column in columns.items()},
        },
        separators=(",", ":"),
    ).encode()
    header += b" " * (-(len(header) + _PREFIX.size) % 8)
    body = header + b"".join(columns[name].tobytes() for name, _ in _COLUMNS)
    total = _PREFIX.size + len(body) + _CHECKSUM.size
    data = _PREFIX.pack(MAGIC, VERSION, len(header), total) + body
    return data + _CHECKSUM.pack(checksum(data))


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Read a manifest. Raises CorruptCheckpointError, UnsupportedVersionError."""
    _total(data, where)
    if _CHECKSUM.unpack_from(data, len(data) - _CHECKSUM.size)[0] != checksum(memoryview(data)[: -_CHECKSUM.size]):
        raise CorruptCheckpointError(f"the manifest {where} does not match its checksum")
    try:
        return _parse(data)
    except (*_CONTRADICTIONS, InvalidIndexError) as error:
        raise CorruptCheckpointError(f"the manifest {where} contradicts itself: {error}") from error


def _total(data: bytes, where: str) -> int:
    """The length that a manifest should have by its first bytes."""
    if len(data) < _PREFIX.size or not data.startswith(MAGIC):
        raise CorruptCheckpointError(f"{where} is not a manifest of reshard: it begins with {bytes(data[:8])!r}")
    _, version, _, total = _PREFIX.unpack_from(data)
    if version != VERSION:
        raise UnsupportedVersionError(
            f"the manifest {where} has format version {version}; this reshard reads version {VERSION}"
        )
    if total > MAX_BYTES:
        raise CorruptCheckpointError(f"the manifest {where} claims to have {total} bytes")
    return int(total)


def _parse(data: bytes) -> Manifest:
    _, _, header_bytes, _ = _PREFIX.unpack_from(data)
    at = _PREFIX.size + header_bytes
    header = json.loads(bytes(data[_PREFIX.size : at]))
    columns = {}
    for name, dtype in _COLUMNS:
        (count,) = _integers([header["columns"][name]])
        if count < 0:
            raise ValueError(f"column {name} has {count} rows")
        columns[name] = np.frombuffer(data, dtype, count, at)
        at += columns[name].nbytes
    if at != len(data) - _CHECKSUM.size:
        raise ValueError(f"the columns end at byte {at} of {len(data)}")
    entries = []
    paths = {}
    for name, kind, dtype, shape, parts, path in header["entries"]:
        entry = Entry(str(name), Kind(kind), dtype, Grid(_integers(shape), _integers(parts)))
        if entry.grid.cell_numel * entry.itemsize > MAX_CHUNK_BYTES:
            raise ValueError(f"the chunks of {name!r} are larger than {MAX_CHUNK_BYTES} bytes")
        entries.append(entry)
        if path is not None:
            paths[str(name)] = tuple(path)
    objects = tuple((_object_name(name), _integers([nbytes])[0]) for name, nbytes in header["objects"])
    segments = Segments(**{name: columns[name] for name in _IN_SEGMENTS})
    index = CheckpointIndex(tuple(entries), objects, segments, columns["lengths"], columns["checksums"])
    return Manifest(index, paths, dict(header["info"]), len(data))


def _integers(values: list[Any]) -> tuple[int, ...]:
    if any(type(value) is not int for value in values):
        raise ValueError(f"{values} should be integers")
    return tuple(values)


def _object_name(name: str) -> str:
    """A name that can only be that of a data object, inside the checkpoint's folder."""
    if not _DATA_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a data object")
    return name


def read_manifest(store: Store) -> Manifest:
    """Read the manifest of the checkpoint in a store, by one request where it is small.

    Raises CheckpointNotFoundError, NotCommittedError, CorruptCheckpointError, UnsupportedVersionError, StoreError.
    """
    where = f"{store.location}/{NAME}"
    try:
        data = bytes(store.read(NAME, 0, FIRST_READ_BYTES))
    except ObjectNotFoundError:
        raise _not_found(store) from None
    total = _total(data, where)
    requests = 1
    if len(data) < total and len(data) == FIRST_READ_BYTES:
        rest = [(at, min(at + READ_BYTES, total)) for at in range(len(data), total, READ_BYTES)]
        with ThreadPoolExecutor(min(8, len(rest)), "reshard-manifest") as pool:
            data += b"".join(bytes(part) for part in pool.map(lambda part: store.read(NAME, *part), rest))
        requests += len(rest)
    if len(data) != total:
        raise CorruptCheckpointError(f"the manifest {where} has {len(data)} bytes where it should have {total}")
    return replace(decode_manifest(data, where), requests=requests)


def _not_found(store: Store) -> CheckpointNotFoundError:
    remains = sum(1 for name in store.list(DATA_FOLDER) if _DATA_NAME.fullmatch(name))
    if remains:
        return NotCommittedError(
            f"the checkpoint at {store.location} was never committed: it has {remains} data objects but no {NAME}. "
            "The save was interrupted, or is still running"
        )
    return CheckpointNotFoundError(f"there is no checkpoint at {store.location}: it has no {NAME}")
