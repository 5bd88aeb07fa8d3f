import json
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reshard
from reshard.planner.box import Box
from reshard.planner.chunk_reads import WantedBox
from reshard.planner.entries import Encoding
from reshard.planner.errors import InvalidIndexError, MissingTensorError
from reshard.planner.grid import Grid
from reshard.planner.index import CheckpointIndex
from reshard.storage.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DtypeError,
    NotCommittedError,
    UnsupportedVersionError,
)
from reshard.storage.formats.detect import open_source
from reshard.storage.formats.native import manifest_blocks
from reshard.storage.formats.native.manifest import FIRST_MANIFEST_READ_BYTES, MANIFEST_NAME, VERSION, encode_manifest
from reshard.storage.formats.source import Source
from reshard.storage.runtime.checksums import checksum, raw_checksums
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.testing import RecordingStore
from tests.planner.indexes import Saved, chunks_read, index_of
from tests.samples import sample

HALVES = [Box((0, 0), (4, 8)), Box((4, 0), (4, 8))]
INDEX = index_of(
    Saved("a", Grid((8, 8), (2, 2)), HALVES, "float32", raw=False), Saved("b", Grid((8, 8), (2, 1)), HALVES)
)
DATA = encode_manifest(INDEX, {"a": ("a",), "b": ("list", 3)}, {"writer": "test"})


def opened(data: bytes) -> Source:
    """Open a manifest and read all its blocks."""
    store = MemoryStore()
    store.content[MANIFEST_NAME] = data
    manifest = open_source(store)
    manifest.index()
    return manifest


def sealed(header: bytes, body: bytes) -> bytes:
    """Return a manifest with a header and blocks, with correct lengths and a correct checksum of the header."""
    prefix = struct.pack("<8sIIQ", b"RESHARD\n", VERSION, len(header), 32 + len(header) + len(body))
    return prefix + struct.pack("<Q", checksum(prefix + header)) + header + body


def header_and_body() -> tuple[dict[str, Any], bytes]:
    length = struct.unpack_from("<8sIIQ", DATA)[2]
    return json.loads(DATA[32 : 32 + length]), DATA[32 + length :]


def test_manifest_round_trips() -> None:
    manifest = opened(DATA)
    assert manifest.index() == INDEX
    assert manifest.entries == INDEX.entries
    assert manifest.objects == INDEX.objects
    assert manifest.sizes == tuple(INDEX.sizes)
    assert [chunks for chunks, _ in INDEX.sizes] == [4, 2]
    assert manifest.paths == {"a": ("a",), "b": ("list", 3)}
    assert manifest.info == {"writer": "test"}
    assert (manifest.bytes_read, manifest.requests) == (len(DATA), 1)


@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_any_flipped_byte_raises_corrupt_error(at: int, by: int) -> None:
    damaged = bytearray(DATA)
    damaged[at] ^= by
    with pytest.raises(CorruptCheckpointError):
        opened(bytes(damaged))


@given(st.integers(0, len(DATA) - 1))
def test_any_truncation_raises_corrupt_error(length: int) -> None:
    store = MemoryStore()
    store.content[MANIFEST_NAME] = DATA[:length]
    with pytest.raises(CorruptCheckpointError, match="manifest"):
        open_source(store)


def test_newer_version_raises_unsupported_version_error() -> None:
    prefix = DATA[:8] + struct.pack("<I", 7) + DATA[12:24]
    (header_bytes,) = struct.unpack_from("<I", DATA, 12)
    newer = prefix + struct.pack("<Q", checksum(prefix + DATA[32 : 32 + header_bytes])) + DATA[32:]
    with pytest.raises(UnsupportedVersionError, match="format version 7; this reshard reads versions 3 to 5"):
        opened(newer)


A = ["a", 0, "float32", [8, 8], [2, 2], None]
B = ["b", 0, "bfloat16", [8, 8], [2, 1], None, 2, 128, None]


@pytest.mark.parametrize(
    "change",
    [
        {"objects": [["../../etc/passwd", 1000], ["y", 1000]]},
        {"objects": [["/etc/passwd", 1000], ["y", 1000]]},
        {"objects": [["data/./x", 1000], ["y", 1000]]},
        {"objects": [["manifest.reshard", 1000], ["data/y.shard", 1000]]},
        {"objects": [["data/x.shard", float("inf")], ["data/y.shard", 1000]]},
        {"objects": []},
        {"entries": []},
        {"entries": 3},
        {"entries": [A, B]},
        {"entries": [[*A, -7, 0, None], B]},
        {"entries": [[*A, 10**30, 0, None], B]},
        {"entries": [[*A, 4, 1, None], B]},
        {"entries": [[*A, 4, INDEX.sizes[0][1], None, 0], B]},
        {"entries": [B, B]},
        {
            "entries": [
                ["a", 0, "float32", [8, 8.5], [2, 2], None, 8, 9, None],
                ["b", 0, "bfloat16", [8, 8], [2, 1], None, 4, 9, None],
            ]
        },
        {
            "entries": [
                ["a", 9, "float32", [8, 8], [2, 2], None, 8, 9, None],
                ["b", 0, "bfloat16", [8, 8], [2, 1], None, 4, 9, None],
            ]
        },
        {
            "entries": [
                ["a", 0, "float32", [8, 8], [2**40, 2], None, 8, 9, None],
                ["b", 0, "bfloat16", [8, 8], [2, 1], None, 4, 9, None],
            ]
        },
        {
            "entries": [
                ["a", 0, "float32", [2**20, 2**10], [1, 1], None, 8, 9, None],
                ["b", 0, "bfloat16", [8, 8], [2, 1], None, 4, 9, None],
            ]
        },
        {"blocks": []},
        {"blocks": [[1, 4, 8, 8, 8, "00"]]},
        {"blocks": [[2, float("inf"), 12, 12, 12, "00"]]},
        {"blocks": [[2, 1e33, 12, 12, 12, "00"]]},
        {"blocks": [[2, -1, 12, 12, 12, "00"]]},
        {"blocks": [[2, 10**12, 12, 12, 12, "00"]]},
        {"blocks": [[2, 2**60, 2**60, 2**60, 2**60, "00"]]},
        {"blocks": [[2, 6, 12, 12, 12, "no hexadecimal"]]},
        {"blocks": [[]]},
        {"blocks": 5},
        {"info": 4},
    ],
)
def test_false_manifest_raises_corrupt_error(change: dict[str, Any]) -> None:
    """The checksum is correct, so its author is hostile. Its claims must not cause memory to be allocated."""
    header, body = header_and_body()
    with pytest.raises(CorruptCheckpointError, match="contradicts itself"):
        opened(sealed(json.dumps(header | change).encode(), body))


LARGE = ["a", 0, "float32", [2**23], [1], None, 2, 2**25, None]


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([[*A, -7, 0, None], B], r"\(-7, 0\) chunks and bytes"),
        ([[*A, 4.5, 1, None], B], r"\[4\.5, 1\] should be integers"),
        ([[*A, True, 1, None], B], r"\[True, 1\] should be integers"),
        ([[5, *A[1:], 4, 1, None], B], "5 has the dtype 'float32'"),
        ([["a", 0, ["float32"], *A[3:], 4, 1, None], B], "'a' has the dtype "),
        ([B, B], "two tensors have the same name"),
        ([LARGE, B], "the chunks of 'a' are larger than 16777216 bytes"),
    ],
)
def test_each_false_claim_about_entries_is_named(entries: list[Any], problem: str) -> None:
    header, body = header_and_body()
    with pytest.raises(CorruptCheckpointError, match=f"contradicts itself.*{problem}"):
        opened(sealed(json.dumps(header | {"entries": entries}).encode(), body))


def test_segments_that_share_bytes_are_refused() -> None:
    store = MemoryStore()
    reshard.save({"a": torch.zeros(1000), "b": torch.zeros(1000)}, store, codec="none")
    source = open_source(store)
    index = source.index()
    starts = np.full_like(index.segments.starts, index.segments.starts[0])
    same = replace(index.segments, starts=starts)
    false = CheckpointIndex(index.entries, index.objects, same, index.lengths, index.checksums)
    with pytest.raises(CorruptCheckpointError, match="'a' and 'b' share bytes of object 'data/"):
        opened(encode_manifest(false, source.paths, dict(source.info)))


def test_segments_without_checksums_are_refused() -> None:
    encodings = np.full_like(INDEX.segments.encodings, Encoding.PLAIN)
    false = CheckpointIndex(
        INDEX.entries,
        INDEX.objects,
        replace(INDEX.segments, encodings=encodings),
        INDEX.lengths,
        np.empty(0, np.uint64),
    )
    with pytest.raises(CorruptCheckpointError, match="a segment has the encoding of another format"):
        opened(encode_manifest(false, {}, {}))


def test_a_raw_chunk_that_is_too_short_for_its_box_is_refused() -> None:
    """Its other values would be whatever is in the memory."""
    store = MemoryStore()
    reshard.save({"a": torch.arange(1000.0)}, store, codec="none")
    source = open_source(store)
    index = source.index()
    start, nbytes = int(index.segments.starts[0]), int(index.lengths[0]) - 400
    data = store.read(index.objects[0][0], start, start + nbytes)
    checksums = np.array(raw_checksums(memoryview(data), index.entries[0].page_bytes), np.uint64)
    false = CheckpointIndex(index.entries, index.objects, index.segments, np.array([nbytes], np.uint32), checksums)
    store.put(MANIFEST_NAME, encode_manifest(false, source.paths, dict(source.info)), overwrite=True)
    loaded = {"a": torch.zeros(1000)}
    with pytest.raises(InvalidIndexError, match="chunk of 'a' does not have as many bytes as its box"):
        reshard.load(loaded, store)
    assert loaded["a"].eq(0).all()


@pytest.mark.parametrize("total", [2**62, 2**64 - 1, 2**37, 100])
def test_manifest_with_an_impossible_length_raises_corrupt_error(total: int) -> None:
    store = MemoryStore()
    store.content[MANIFEST_NAME] = struct.pack("<8sIIQ", b"RESHARD\n", 3, 100, total) + b"x" * FIRST_MANIFEST_READ_BYTES
    with pytest.raises(CorruptCheckpointError, match=f"claims to have {total} bytes"):
        open_source(store)


def test_integer_overflow_of_chunk_counts_raises_corrupt_error() -> None:
    entries = [[f"{i}", 0, "uint8", [2**24, 2**24, 2**12], [2**24, 2**24, 2**12], None, 0, 0, None] for i in range(16)]
    body = bytes(8 * 48) + struct.pack("<3q", 2**24, 2**24, 2**12) * 16 + bytes(8 * 16)
    body += struct.pack("<16I", *range(16)) + bytes(4 * 16 + 16 + 16)
    rows = [[16, 16, 48, 0, 0, f"{checksum(body):x}"]]
    parts = {"info": {}, "objects": [["data/x.shard", 9]], "entries": entries, "blocks": rows}
    with pytest.raises(CorruptCheckpointError, match="chunks, but the index has 0"):
        opened(sealed(json.dumps(parts).encode(), body))


def test_header_that_is_not_json_raises_corrupt_error() -> None:
    for nonsense in (b"{", b"[" * 100_000, b"\xff\xfe"):
        with pytest.raises(CorruptCheckpointError, match="contradicts itself"):
            opened(sealed(nonsense, b""))


def test_small_manifest_takes_one_request_and_large_header_takes_two() -> None:
    store = MemoryStore()
    recording = RecordingStore(store)
    store.content[MANIFEST_NAME] = DATA
    open_source(recording).index()
    assert [(call.start, call.stop) for call in recording.calls] == [(0, FIRST_MANIFEST_READ_BYTES)]

    store.content[MANIFEST_NAME] = encode_manifest(INDEX, {}, {"padding": "x" * FIRST_MANIFEST_READ_BYTES})
    recording.calls.clear()
    manifest = open_source(recording)
    assert len(manifest.info["padding"]) == FIRST_MANIFEST_READ_BYTES
    assert len(recording.calls) == 2
    assert manifest.index() == INDEX
    assert manifest.requests == len(recording.calls) == 3
    assert manifest.bytes_read == len(store.content[MANIFEST_NAME])


def test_only_needed_blocks_of_a_large_manifest_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_blocks, "MAX_BLOCK_BYTES", 300)
    tensors = [Saved(f"t{i:03}", Grid((8, 8), (2, 2)), HALVES, "float32", raw=i % 2 == 0) for i in range(200)]
    store = MemoryStore()
    store.content[MANIFEST_NAME] = encode_manifest(index_of(*tensors), {}, {"padding": "x" * FIRST_MANIFEST_READ_BYTES})
    recording = RecordingStore(store)
    manifest = open_source(recording)
    recording.calls.clear()
    index = manifest.index(WantedBox(name, Box((), ())) for name in ["t010", "t011", "t100"])
    assert len(recording.calls) in (2, 3)
    assert sum(call.stop - call.start for call in recording.calls) < 3000
    assert len(index.entries) < 20
    whole = index_of(*tensors)
    for name in ("t010", "t011", "t100"):
        got, want = index.position(name), whole.position(name)
        assert index.shards_of(got) == whole.shards_of(want)
        assert index.lengths[index.chunks_of(got)].tolist() == whole.lengths[whole.chunks_of(want)].tolist()
    recording.calls.clear()
    assert manifest.index(WantedBox(name, Box((), ())) for name in ["t100"]) is index
    assert recording.calls == []
    assert manifest.index() == whole
    with pytest.raises(MissingTensorError, match=r"no 'u'"):
        manifest.index(WantedBox(name, Box((), ())) for name in ["u"])


@pytest.mark.parametrize("raw", [True, False])
def test_only_regions_that_overlap_a_box_are_read(raw: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_blocks, "MAX_BLOCK_BYTES", 4096)
    rows = [Box((at, 0), (4, 512)) for at in range(0, 512, 4)]
    tensors = [Saved(name, Grid((512, 512), (64, 64)), rows, "float32", raw) for name in "abc"]
    store = MemoryStore()
    store.content[MANIFEST_NAME] = encode_manifest(index_of(*tensors), {}, {"padding": "x" * FIRST_MANIFEST_READ_BYTES})
    recording = RecordingStore(store)
    manifest = open_source(recording)
    total, opening = len(store.content[MANIFEST_NAME]) - manifest.bytes_read, manifest.bytes_read
    whole = index_of(*tensors)
    wants = [WantedBox("a", Box((0, 128), (512, 64))), WantedBox("c", Box((64, 0), (64, 512)))]
    index = manifest.index(wants)
    assert [entry.name for entry in index.entries] == ["a", "c"]
    assert manifest.bytes_read - opening < total / 7
    for want in wants:
        assert chunks_read(index, want) == chunks_read(whole, want)
    recording.calls.clear()
    assert manifest.index([WantedBox("a", Box((100, 130), (50, 20)))]) is index
    assert recording.calls == []
    assert manifest.index([WantedBox("b", Box((0, 0), (512, 512)))]).sizes[0][1] == whole.sizes[1][1]
    for name, box in (("b", Box((3, 3), (0, 5))), ("b", Box((0, 0), (513, 1)))):  # empty, and too large
        assert name in manifest.index([WantedBox(name, box)])
    assert manifest.index().sizes == whole.sizes


def test_false_region_raises_corrupt_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_blocks, "MAX_BLOCK_BYTES", 300)
    rows = [Box((at, 0), (1, 64)) for at in range(64)]
    data = encode_manifest(index_of(Saved("t", Grid((64, 64), (16, 16)), rows, raw=False)), {}, {})
    length = struct.unpack_from("<8sIIQ", data)[2]
    header, body = json.loads(data[32 : 32 + length]), data[32 + length :]
    assert header["entries"][0][8] == [16, 2]
    assert len(opened(data).index().regions) == 32
    for parts in ([2, 16], [16, 1], [16, 4], [3, 2], [16], [16, 0], [2.0, 16], [2**40, 2], 7):
        lying = json.loads(json.dumps(header))
        lying["entries"][0][8] = parts
        with pytest.raises(CorruptCheckpointError, match="contradicts itself"):
            opened(sealed(json.dumps(lying).encode(), body))


@pytest.mark.parametrize(
    ("shape", "regions", "rows"),
    [
        ([2**12], [2**12], [[2**12 * 100, 1, 1, 1, 1, "00"]]),
        ([2**12], [2**12], [[100, 0, 0, 0, 0, "00"] for _ in range(2**12)]),
        ([0, 2**12], [1, 2**12], [[2**12 * 100, 1, 1, 1, 1, "00"]]),
        ([2**16], [2**16], [[2**16 * 100, 1, 1, 1, 1, "00"]]),
    ],
)
def test_regions_without_segments_allocate_no_memory(
    shape: list[int], regions: list[int], rows: list[list[Any]]
) -> None:
    entries = [[f"{i}", 0, "uint8", shape, [max(n, 1) for n in shape], None, 0, 0, regions] for i in range(100)]
    parts = {"info": {}, "objects": [["data/x.shard", 9]], "entries": entries, "blocks": rows}
    with pytest.raises(CorruptCheckpointError, match=r"more regions than it can have|cannot be cut into .* regions"):
        opened(sealed(json.dumps(parts).encode(), bytes(48)))


def test_blocks_larger_than_a_manifest_raise_corrupt_error() -> None:
    header, body = header_and_body()
    header["blocks"] = [[1, 2**36, 2**36, 2**36, 2**36, "00"]] * 100
    with pytest.raises(CorruptCheckpointError, match="a block has impossible counts"):
        opened(sealed(json.dumps(header).encode(), body))


def test_regions_out_of_order_raise_corrupt_error() -> None:
    header, body = header_and_body()
    [(_, segments, extents, _, checksums, _)] = header["blocks"]
    at = 8 * (2 * extents + segments + checksums)
    owners = struct.unpack_from(f"<{segments}I", body, at)
    assert owners == tuple(sorted(owners))
    body = body[:at] + struct.pack(f"<{segments}I", *reversed(owners)) + body[at + 4 * segments :]
    header["blocks"][0][-1] = f"{checksum(body):016x}"
    with pytest.raises(CorruptCheckpointError, match="a segment belongs to no tensor"):
        opened(sealed(json.dumps(header).encode(), body))


def test_missing_and_uncommitted_checkpoints_raise_different_errors() -> None:
    store = MemoryStore()
    with pytest.raises(CheckpointNotFoundError, match=r"there is no checkpoint at memory"):
        open_source(store)
    store.content["data/0.shard"] = b"x"
    with pytest.raises(NotCommittedError, match="never committed: it has 1 data objects"):
        open_source(store)


def test_ranks_load_with_parts_of_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_blocks, "MAX_BLOCK_BYTES", 200)
    monkeypatch.setattr("reshard.storage.formats.native.manifest.FIRST_MANIFEST_READ_BYTES", 1000)
    state = {name: torch.randn(shape) for name, shape in (("up", (2048, 512)), ("down", (512, 2048)), ("norm", (512,)))}
    reshard.save(state, tmp_path)
    layout = reshard.Layout({"tp": 4}, {"up": "colwise", "down": "rowwise"})
    for rank in range(4):
        recording = RecordingStore(LocalStore(str(tmp_path)))
        loaded = reshard.open(recording).load_rank(layout, rank)
        assert loaded["up"].equal(state["up"][512 * rank : 512 * (rank + 1)])
        assert loaded["down"].equal(state["down"][:, 512 * rank : 512 * (rank + 1)])
        assert loaded["norm"].equal(state["norm"])
        read = sum(call.stop - call.start for call in recording.calls if call.name == MANIFEST_NAME)
        assert read < 0.8 * (tmp_path / MANIFEST_NAME).stat().st_size
    assert reshard.open(tmp_path).shards_of("down")[0] == [Box((0, 0), (512, 2048))]
    assert not reshard.open(tmp_path).verify()


def renamed_dtype(store: MemoryStore, name: str, dtype: str) -> None:
    """Change the dtype of a tensor in the manifest of a checkpoint."""
    data = store.content[MANIFEST_NAME]
    length = struct.unpack_from("<8sIIQ", data)[2]
    header, body = json.loads(data[32 : 32 + length]), data[32 + length :]
    for row in header["entries"]:
        row[2] = dtype if row[0] == name else row[2]
    text = json.dumps(header).encode()
    store.content[MANIFEST_NAME] = sealed(text + b" " * (-len(text) % 8), body)


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize(
    ("stored", "dtype"), [("float16", "posit16"), ("float64", "float64_x"), ("uint8", "float6_e3m2")]
)
@pytest.mark.parametrize("shape", [(), (7,), (0, 3), (600, 500)])
def test_unknown_dtype_does_not_hide_the_other_tensors(
    codec: str, stored: str, dtype: str, shape: tuple[int, ...]
) -> None:
    odd, w = sample(stored, *shape), torch.randn(300, 200)
    store = MemoryStore()
    reshard.save({"m": {"odd": odd, "w": w}, "step": 5}, store, codec=codec)
    renamed_dtype(store, "m.odd", dtype)
    checkpoint = reshard.open(store)
    assert set(checkpoint.tensors) == {"m.w"}
    assert checkpoint.read("m.w").equal(w)
    assert checkpoint.read_value("step") == 5
    message = rf"'m\.odd' in memory/manifest\.reshard has the dtype '{dtype}': this torch .* has no dtype {dtype}"
    assert re.search(message, checkpoint.unreadable["m.odd"])
    for ask in (
        lambda: checkpoint.read("m.odd"),
        lambda: checkpoint.state_dict(),
        lambda: checkpoint.plan(reshard.Layout({"tp": 2})),
        lambda: checkpoint.load_rank(reshard.Layout({"tp": 2}), 0, include="m"),
        lambda: reshard.load({"m": {"odd": odd.clone(), "w": w}}, store),
        lambda: reshard.convert(store, MemoryStore(), format="dcp"),
    ):
        with pytest.raises(DtypeError, match=message):
            ask()
    assert checkpoint.state_dict(include="m.w")["m"]["w"].equal(w)
    assert len(checkpoint.plan(reshard.Layout({"tp": 2}), include="m.w")) == 2
    assert reshard.load({"m": {"w": torch.zeros(300, 200)}}, store).unexpected_keys == ("m.odd",)
    assert reshard.convert(store, MemoryStore(), include=["m.w", "step"]).dropped == ("m.odd",)
    metadata = reshard.StorageReader(store).read_metadata()
    assert set(metadata.state_dict_metadata) == {"m.odd", "m.w", "step"}
    assert checkpoint.verify() == []
    (name,) = (name for name in store.content if name.startswith("data/"))
    store.content[name] = bytes(len(store.content[name]))
    assert {damage.tensor for damage in checkpoint.verify()} == {"m.w", "step", *(["m.odd"] if odd.numel() else [])}


def test_dtype_missing_in_this_torch_does_not_hide_the_other_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    reshard.save({"a": sample("float8_e5m2", 9), "b": torch.ones(3)}, store)
    monkeypatch.delattr(torch, "float8_e5m2")
    checkpoint = reshard.open(store)
    assert checkpoint.state_dict(include="b")["b"].equal(torch.ones(3))
    with pytest.raises(
        DtypeError, match=r"'a' in memory/manifest\.reshard .*'float8_e5m2': this torch .* has no dtype"
    ):
        checkpoint.read("a")
    assert checkpoint.verify() == []


@pytest.mark.parametrize("dtype", [3, None, ["float32"]])
def test_dtype_that_is_not_a_string_raises_corrupt_error(dtype: Any) -> None:
    store = MemoryStore()
    reshard.save({"a": torch.ones(3)}, store)
    renamed_dtype(store, "a", dtype)
    with pytest.raises(CorruptCheckpointError, match="contradicts itself"):
        reshard.open(store)
