import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.planner.box import Box
from reshard.planner.grid import Grid
from reshard.storage.checksums import checksum
from reshard.storage.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    NotCommittedError,
    UnsupportedVersionError,
)
from reshard.storage.manifest import FIRST_READ_BYTES, NAME, decode_manifest, encode_manifest, read_manifest
from reshard.storage.testing import MemoryStore, RecordingStore
from tests.planner.indexes import Saved, index_of

HALVES = [Box((0, 0), (4, 8)), Box((4, 0), (4, 8))]
INDEX = index_of(
    Saved("a", Grid((8, 8), (2, 2)), HALVES, "float32", raw=False), Saved("b", Grid((8, 8), (2, 1)), HALVES)
)
DATA = encode_manifest(INDEX, {"a": ("a",), "b": ("list", 3)}, {"writer": "test"})


def resealed(header: bytes, *, old: bytes = DATA) -> bytes:
    """The manifest with another header, its lengths and checksum made right again."""
    _, version, length, _ = struct.unpack_from("<8sIIQ", old)
    body = header + old[24 + length : -8]
    data = struct.pack("<8sIIQ", b"RESHARD\n", version, len(header), 24 + len(body) + 8) + body
    return data + struct.pack("<Q", checksum(data))


def header() -> dict[str, object]:
    length = struct.unpack_from("<8sIIQ", DATA)[2]
    parsed: dict[str, object] = json.loads(DATA[24 : 24 + length])
    return parsed


def test_a_manifest_comes_back() -> None:
    manifest = decode_manifest(DATA, "here")
    assert manifest.index.entries == INDEX.entries
    assert manifest.index.objects == INDEX.objects
    assert manifest.index.lengths.tolist() == INDEX.lengths.tolist()
    assert manifest.index.checksums.tolist() == INDEX.checksums.tolist()
    assert manifest.index.shards_of(0) == HALVES
    assert manifest.paths == {"a": ("a",), "b": ("list", 3)}
    assert manifest.info == {"writer": "test"}
    assert manifest.nbytes == len(DATA)


@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_any_flipped_byte_is_found(at: int, by: int) -> None:
    damaged = bytearray(DATA)
    damaged[at] ^= by
    with pytest.raises((CorruptCheckpointError, UnsupportedVersionError)):
        decode_manifest(bytes(damaged), "here")


@given(st.integers(0, len(DATA) - 1))
def test_any_cut_is_found(length: int) -> None:
    store = MemoryStore()
    store.content[NAME] = DATA[:length]
    with pytest.raises(CorruptCheckpointError, match="manifest"):
        read_manifest(store)


def test_a_newer_version_says_so() -> None:
    newer = DATA[:8] + struct.pack("<I", 7) + DATA[12:]
    with pytest.raises(UnsupportedVersionError, match="format version 7; this reshard reads version 1"):
        decode_manifest(newer, "here")


@pytest.mark.parametrize(
    "change",
    [
        {"objects": [["../../etc/passwd", 1000], ["y", 1000]]},
        {"objects": [["/etc/passwd", 1000], ["y", 1000]]},
        {"objects": [["data/./x", 1000], ["y", 1000]]},
        {"objects": [["manifest.reshard", 1000], ["data/y.shard", 1000]]},
        {"objects": [["data/x.shard", float("inf")], ["data/y.shard", 1000]]},
        {"columns": {"lengths": float("inf")}},
        {"columns": {"lengths": 1e33}},
        {"objects": []},
        {"entries": []},
        {"entries": 3},
        {"entries": [["a", 0, "float32", [8, 8.5], [2, 2], None], ["b", 0, "bfloat16", [8, 8], [2, 1], None]]},
        {"entries": [["a", 9, "float32", [8, 8], [2, 2], None], ["b", 0, "bfloat16", [8, 8], [2, 1], None]]},
        {"entries": [["a", 0, "float32", [8, 8], [2**40, 2], None], ["b", 0, "bfloat16", [8, 8], [2, 1], None]]},
        {"entries": [["a", 0, "float32", [2**20, 2**10], [1, 1], None], ["b", 0, "bfloat16", [8, 8], [2, 1], None]]},
        {"columns": {}},
        {"columns": {"entries": -1}},
        {"columns": {"lengths": 10**12}},
        {"info": 4},
    ],
)
def test_a_manifest_that_lies_is_refused(change: dict[str, object]) -> None:
    """With a right checksum: whoever made it is not to be trusted, and no memory is taken on its word."""
    changed = header()
    for key, value in change.items():
        columns = changed[key]
        changed[key] = {**columns, **value} if isinstance(columns, dict) and isinstance(value, dict) else value
    if change == {"columns": {}}:
        changed["columns"] = {}
    with pytest.raises(CorruptCheckpointError, match="contradicts itself"):
        decode_manifest(resealed(json.dumps(changed).encode()), "here")


@pytest.mark.parametrize("total", [2**62, 2**64 - 1, 2**37])
def test_a_manifest_that_claims_to_be_huge_is_refused(total: int) -> None:
    store = MemoryStore()
    store.content[NAME] = struct.pack("<8sIIQ", b"RESHARD\n", 1, 100, total) + b"x" * FIRST_READ_BYTES
    with pytest.raises(CorruptCheckpointError, match=f"claims to have {total} bytes"):
        read_manifest(store)


def test_more_chunks_than_integers_can_count_are_refused() -> None:
    entries = [[f"{i}", 0, "uint8", [2**24, 2**24, 2**12], [2**24, 2**24, 2**12], None] for i in range(16)]
    columns = dict.fromkeys(header()["columns"], 0)  # type: ignore[call-overload]
    columns |= {"entries": 16, "objects": 16, "starts": 16, "offsets": 48, "sizes": 48, "streams": 16, "encodings": 16}
    text = json.dumps({"info": {}, "objects": [["data/x.shard", 9]], "entries": entries, "columns": columns}).encode()
    body = text + b"".join(struct.pack("<q", i) for i in range(16)) + bytes(8 * (16 + 16 + 48))
    body += struct.pack("<3q", 2**24, 2**24, 2**12) * 16 + bytes(32)
    data = struct.pack("<8sIIQ", b"RESHARD\n", 1, len(text), 24 + len(body) + 8) + body
    with pytest.raises(CorruptCheckpointError, match="chunks or more, but there are 0"):
        decode_manifest(data + struct.pack("<Q", checksum(data)), "here")


def test_a_header_that_is_no_json_is_refused() -> None:
    for nonsense in (b"{", b"[" * 100_000, b"\xff\xfe"):
        with pytest.raises(CorruptCheckpointError, match="contradicts itself"):
            decode_manifest(resealed(nonsense), "here")


def test_a_small_manifest_is_one_request_and_a_large_one_two() -> None:
    store = MemoryStore()
    recording = RecordingStore(store)
    store.content[NAME] = DATA
    read_manifest(recording)
    assert [(call.start, call.stop) for call in recording.calls] == [(0, FIRST_READ_BYTES)]

    store.content[NAME] = encode_manifest(INDEX, {}, {"padding": "x" * FIRST_READ_BYTES})
    recording.calls.clear()
    assert len(read_manifest(recording).info["padding"]) == FIRST_READ_BYTES
    assert len(recording.calls) == 2


def test_nothing_there_and_nothing_committed_are_told_apart() -> None:
    store = MemoryStore()
    with pytest.raises(CheckpointNotFoundError, match=r"there is no checkpoint at memory"):
        read_manifest(store)
    store.content["data/0.shard"] = b"x"
    with pytest.raises(NotCommittedError, match="never committed: it has 1 data objects"):
        read_manifest(store)
