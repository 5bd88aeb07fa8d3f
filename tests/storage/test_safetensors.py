"""safetensors files as checkpoints: what the library writes comes back, and headers that lie are refused."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

import reshard
from reshard.errors import CheckpointError, CorruptCheckpointError, DtypeError
from reshard.storage.sources.safetensors import NAMES
from reshard.storage.testing import MemoryStore, RecordingStore
from tests.storage.samples import assert_holds, boxes, same, sample

ROW = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
INDEX = "model.safetensors.index.json"


def file_of(header: object, data: bytes = bytes(24)) -> bytes:
    """A safetensors file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def opened(**files: object) -> reshard.Checkpoint:
    """A checkpoint of these files: bytes, or JSON."""
    store = MemoryStore()
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        store.content[INDEX if name == "index" else f"{name}.safetensors"] = data
    return reshard.open(store)


@pytest.mark.parametrize("dtype", NAMES)
def test_every_dtype_of_the_format_comes_back(dtype: str, tmp_path: Path) -> None:
    tensors = {"matrix": sample(dtype, 5, 8), "cube": sample(dtype, 2, 3, 4), "empty": sample(dtype, 0, 2)}
    if dtype != "float4_e2m1fn_x2":  # two values a byte: a scalar has no byte of its own
        tensors["scalar"] = sample(dtype)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"by": "a test"})
    checkpoint = reshard.open(tmp_path / "model.safetensors")
    assert_holds(checkpoint, tensors)
    assert checkpoint.info["by"] == "a test"
    assert checkpoint.objects == ()


@pytest.mark.parametrize("shape", [(), (7,), (6, 5), (4, 3, 5)])
def test_boxes_are_parts_of_the_whole(shape: tuple[int, ...], tmp_path: Path) -> None:
    values = torch.randn(shape)
    save_file({"before": torch.zeros(3), "w": values}, tmp_path / "model.safetensors")
    checkpoint = reshard.open(tmp_path)
    for box in boxes(shape):
        assert same(checkpoint.read("w", box), values[box.slices]), box


def test_one_read_opens_a_file_and_one_reads_rows_of_it() -> None:
    values = torch.randn(100, 10)
    memory = MemoryStore()
    memory.content["model.safetensors"] = save({"w": values})
    store = RecordingStore(memory)
    checkpoint = reshard.open(store)
    size = memory.size("model.safetensors")
    read = [(call.start, call.stop) for call in store.calls if call.name == "model.safetensors" and call.stop]
    assert read == [(0, size)]
    store.calls.clear()
    assert checkpoint.read("w", reshard.Box((90, 0), (5, 10))).equal(values[90:95])
    assert [(call.start, call.stop) for call in store.calls] == [(size - 400, size - 200)]


def test_a_header_larger_than_the_first_read_is_read_on() -> None:
    tensors = {f"layers.{i}.weight": torch.full((2,), float(i)) for i in range(2000)}
    store = MemoryStore()
    store.content["model.safetensors"] = save(tensors)
    recording = RecordingStore(store)
    checkpoint = reshard.open(recording)
    assert checkpoint.tensors.keys() == tensors.keys()
    assert checkpoint.read("layers.1999.weight").equal(tensors["layers.1999.weight"])
    reads = [call for call in recording.calls if call.method == "read" and call.name.endswith(".safetensors")]
    assert len(reads) == 3


@pytest.mark.parametrize("with_index", [True, False])
def test_a_folder_of_hugging_face(with_index: bool, tmp_path: Path) -> None:
    parts = [{"a": torch.randn(4, 3), "b": torch.randn(2)}, {"c": torch.randn(3).to(torch.bfloat16)}]
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(parts, start=1):
        name = f"model-{number:05}-of-00002.safetensors"
        save_file(tensors, tmp_path / name)
        weight_map |= dict.fromkeys(tensors, name)
    (tmp_path / "config.json").write_text("{}")
    if with_index:
        (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 62}, "weight_map": weight_map}))
    checkpoint = reshard.open(tmp_path)
    assert_holds(checkpoint, {**parts[0], **parts[1]})
    assert checkpoint.info["files"] == 2
    assert checkpoint.location == str(tmp_path)


def test_files_that_the_index_does_not_name_are_left_alone(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "older.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert_holds(reshard.open(tmp_path), {"a": torch.ones(2)})


def test_shards_that_torchs_writer_saved_for_each_rank(tmp_path: Path) -> None:
    """Each rank's file, as HuggingFaceStorageWriter writes it, says of which part of the tensor it is."""
    whole = torch.randn(5, 4)
    for number, rows in enumerate((slice(0, 3), slice(3, 5)), start=1):
        tensor = whole[rows].contiguous()
        sharding = {"w": {"saved_offsets": [rows.start, 0]}}
        name = f"shard-{number:05}-model-00001-of-00001.safetensors"
        save_file({"w": tensor}, tmp_path / name, metadata={"DCP_SHARDING_INFO": json.dumps(sharding)})
    checkpoint = reshard.open(tmp_path)
    assert_holds(checkpoint, {"w": whole})
    for box in boxes((5, 4)):
        assert same(checkpoint.read("w", box), whole[box.slices]), box


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("distributed", [True, False])
def test_what_torchs_writer_writes_in_one_process(distributed: bool, tmp_path: Path) -> None:
    tensors = {"w": torch.randn(5, 4), "scalar": torch.tensor(2.0), "ids": torch.arange(7)}
    writer = HuggingFaceStorageWriter(str(tmp_path), save_distributed=distributed)
    dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
    assert_holds(reshard.open(tmp_path), tensors)


HEADERS: dict[str, tuple[bytes, str]] = {
    "a size beyond the file": ((10**6).to_bytes(8, "little") + b'{"a":1}', "has no header"),
    "a size beyond all files": ((2**63).to_bytes(8, "little") + b"{" + bytes(90), "has no header"),
    "no header": (b"", "has no header: it begins with b'', and has 0 bytes"),
    "less than a size": (b"\x01\x00", "has no header"),
    "a header of nothing": (bytes(8), "has no header"),
    "a list": (file_of([1, 2]), "has no header"),
    "a list in spaces": (file_of(b" [1]"), "has no header"),
    "half a header": (file_of(b'{"a": {"dtype"'), "a header that is none"),
    "no text": (file_of(b'{"\xff\xfe": 1}'), "a header that is none"),
    "depth": (file_of(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "a header that is none"),
    "a number of 5000 digits": (file_of(b'{"a":' + b"9" * 5000 + b"}"), "a header that is none"),
    "one name twice": (file_of(b'{"a":%b,"a":%b}' % ((json.dumps(ROW).encode(),) * 2)), "the same name"),
    "a gap": (file_of({"a": {**ROW, "data_offsets": [8, 32]}}, bytes(32)), "a gap or an overlap at byte 8"),
    "an overlap": (file_of({"a": ROW, "b": {**ROW, "data_offsets": [20, 44]}}, bytes(44)), "overlap at byte 20"),
    "two in one place": (file_of({"a": ROW, "b": ROW}), "overlap at byte 0"),
    "bytes beyond the end": (file_of({"a": ROW}, bytes(23)), "was cut short"),
    "a byte more": (file_of({"a": ROW}, bytes(25)), "is not what it was"),
    "sharding that is none": (file_of({"__metadata__": {"DCP_SHARDING_INFO": "{"}, "a": ROW}), "header that is none"),
    "metadata that is none": (file_of({"__metadata__": [], "a": ROW}), "a header that is none"),
    **{
        f"{key} = {value!r:.40}": (file_of({"a": {**ROW, key: value}}), "a header that is none")
        for key, value in (
            ("data_offsets", [-24, 0]),
            ("data_offsets", [24, 0]),
            ("data_offsets", [0]),
            ("data_offsets", [0, 12, 24]),
            ("data_offsets", [0.0, 24.0]),
            ("data_offsets", [False, 24]),
            ("data_offsets", ["0", "24"]),
            ("data_offsets", "024"),
            ("data_offsets", None),
            ("shape", [2, 4]),
            ("shape", [-2, -3]),
            ("shape", [2.0, 3.0]),
            ("shape", [True, 6]),
            ("shape", "23"),
            ("shape", 6),
            ("shape", [2**62, 0]),
            ("shape", [2**40, 2**40]),
            ("shape", [1] * 40 + [6]),
            ("dtype", ["F32"]),
            ("dtype", {}),
        )
    },
    **{
        f"half bytes in {shape}": (
            file_of({"a": {"dtype": "F4", "shape": shape, "data_offsets": [0, 1]}}, bytes(1)),
            "a header that is none",
        )
        for shape in ([], [3], [True])
    },
    **{
        f"a tensor that is {row!r}": (file_of({"a": row}), "a header that is none")
        for row in list[object]((None, 1, "x", [], {}, {"dtype": "F32"}))
    },
    **{
        f"a shard at {offsets!r}": (
            file_of({"__metadata__": {"DCP_SHARDING_INFO": json.dumps({"a": {"saved_offsets": offsets}})}, "a": ROW}),
            "a header that is none",
        )
        for offsets in ([0], [0, 0, 0], [-1, 0], [2**80, 0], ["0", "0"], [0.5, 0], None)
    },
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(case: str) -> None:
    data, message = HEADERS[case]
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        opened(bad=data)
    assert "'bad.safetensors' in memory" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_header_larger_than_the_format_allows_is_not_read() -> None:
    size = 100_000_001
    store = MemoryStore()
    store.content["bad.safetensors"] = size.to_bytes(8, "little") + b"{" + bytes(size)
    recording = RecordingStore(store)
    with pytest.raises(CorruptCheckpointError, match="has no header"):
        reshard.open(recording)
    assert max(call.stop - call.start for call in recording.calls if call.name == "bad.safetensors") <= 64 * 1024


def test_a_dtype_that_is_not_known_is_named_with_its_file() -> None:
    with pytest.raises(DtypeError, match=r"'bad\.safetensors' in memory: 'a' has the dtype 'F6_E3M2'"):
        opened(bad=file_of({"a": {**ROW, "dtype": "F6_E3M2"}}))


def test_a_tensor_that_two_files_have_is_refused() -> None:
    with pytest.raises(CorruptCheckpointError, match="two files have the tensor 'a'"):
        opened(one=file_of({"a": ROW}), two=file_of({"a": ROW}))


def shard(row: dict[str, Any], *offsets: int) -> bytes:
    return file_of({"__metadata__": {"DCP_SHARDING_INFO": json.dumps({"a": {"saved_offsets": offsets}})}, "a": row})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (shard({**ROW, "dtype": "I32"}, 2, 0), "the shards of 'a' do not fit each other"),
        (shard({**ROW, "shape": [6]}, 2), "the shards of 'a' do not fit each other"),
        (shard(ROW, 1, 0), "the shards of 'a' hold 12 elements, its shape"),
        (shard(ROW, 3, 0), "the shards of 'a' hold 12 elements, its shape"),
        (shard(ROW, 2**59, 0), "impossible shape"),
        (file_of({"a": ROW}), "two files have the tensor 'a'"),
    ],
)
def test_shards_that_do_not_make_a_tensor_are_refused(other: bytes, message: str) -> None:
    with pytest.raises(CorruptCheckpointError, match=message):
        opened(one=shard(ROW, 0, 0), two=other).read("a")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../x.safetensors"}}, r"is no index of safetensors.*'\.\./x\.safetensors'"),
        ({"weight_map": {"a": "/etc/x.safetensors"}}, "is no index of safetensors.*'/etc/x.safetensors'"),
        ({"weight_map": {"a": "sub\\x.safetensors"}}, "is no index of safetensors"),
        ({"weight_map": {"a": ".."}}, "is no index of safetensors"),
        ({"weight_map": {"a": ""}}, "is no index of safetensors"),
        ({"weight_map": {"a": 1}}, "is no index of safetensors"),
        ({"weight_map": ["a"]}, "is no index of safetensors"),
        ({"weight_map": None}, "is no index of safetensors"),
        ({}, "is no index of safetensors"),
        ([], "is no index of safetensors"),
        (b"{", "is no index of safetensors"),
        (b"\xff", "is no index of safetensors"),
        (b"[" * 100_000, "is no index of safetensors"),
        ({"weight_map": {"a": "two.safetensors"}}, "tensors are in a file that is missing.*'two.safetensors'"),
        ({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}, "'b' is in 'one.safetensors', which does"),
    ],
)
def test_an_index_that_lies_is_refused(index: object, message: str) -> None:
    with pytest.raises(CorruptCheckpointError, match=message):
        opened(one=file_of({"a": ROW}), index=index)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_that_is_a_byte_too_short_or_too_long_is_refused(change: int) -> None:
    data = save({"w": torch.ones(10)})
    changed = data[:change] if change < 0 else data + bytes(change)
    with pytest.raises(CorruptCheckpointError, match=re.escape(f"has {len(changed)} bytes where its header tells of")):
        opened(one=changed)


def test_a_file_that_was_cut_after_it_was_opened_is_told(tmp_path: Path) -> None:
    save_file({"w": torch.ones(10)}, tmp_path / "model.safetensors")
    checkpoint = reshard.open(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(CorruptCheckpointError, match=r"^'w': only 39 bytes are left of .*'model\.safetensors'"):
        checkpoint.read("w")


SAMPLE = save({"a": torch.ones(4, 2), "b": torch.arange(3)}, metadata={"DCP_SHARDING_INFO": "{}"})
HEADER_BYTES = 8 + int.from_bytes(SAMPLE[:8], "little")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes_of_a_header_are_refused_or_read(flips: list[tuple[int, int]]) -> None:
    data = bytearray(SAMPLE)
    for at, by in flips:
        data[at] ^= by
    with contextlib.suppress(CheckpointError):
        checkpoint = opened(one=bytes(data))
        for name in checkpoint.tensors:
            checkpoint.read(name)
