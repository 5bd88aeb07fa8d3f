"""safetensors files as checkpoints: output of the safetensors library round-trips, and false headers raise errors."""

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
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

import reshard
from reshard.errors import CheckpointError, CorruptCheckpointError, DtypeError
from reshard.storage.formats.safetensors_source import SAFETENSORS_DTYPES
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.testing import RecordingStore
from tests.samples import assert_holds, boxes, same, sample

ROW = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
INDEX = "model.safetensors.index.json"


def file_of(header: object, data: bytes = bytes(24)) -> bytes:
    """Return a safetensors file with a header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def opened(**files: object) -> reshard.Checkpoint:
    """Return a checkpoint of files, given as bytes or JSON."""
    store = MemoryStore()
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        store.content[INDEX if name == "index" else f"{name}.safetensors"] = data
    return reshard.open(store)


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES)
def test_every_dtype_of_the_format_round_trips(dtype: str, tmp_path: Path) -> None:
    tensors = {"matrix": sample(dtype, 5, 8), "cube": sample(dtype, 2, 3, 4), "empty": sample(dtype, 0, 2)}
    if dtype != "float4_e2m1fn_x2":  # two values share a byte, so a scalar cannot be stored
        tensors["scalar"] = sample(dtype)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"by": "a test"})
    checkpoint = reshard.open(tmp_path / "model.safetensors")
    assert_holds(checkpoint, tensors)
    assert checkpoint.info["by"] == "a test"
    assert checkpoint.value_names == ()


@pytest.mark.parametrize("shape", [(), (7,), (6, 5), (4, 3, 5)])
def test_reading_a_box_equals_slicing_the_tensor(shape: tuple[int, ...], tmp_path: Path) -> None:
    values = torch.randn(shape)
    save_file({"before": torch.zeros(3), "w": values}, tmp_path / "model.safetensors")
    checkpoint = reshard.open(tmp_path)
    for box in boxes(shape):
        assert same(checkpoint.read("w", box), values[box.slices]), box


def test_one_request_opens_a_file_and_one_reads_rows() -> None:
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


def test_header_larger_than_the_first_read_is_completed() -> None:
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
def test_folder_of_hugging_face_is_one_checkpoint(with_index: bool, tmp_path: Path) -> None:
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


def test_files_that_the_index_does_not_name_are_not_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "older.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert_holds(reshard.open(tmp_path), {"a": torch.ones(2)})


def test_shards_that_torchs_writer_saved_for_each_rank_form_tensors(tmp_path: Path) -> None:
    """HuggingFaceStorageWriter notes in the file of each rank which part of the tensor it contains."""
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
def test_output_of_torchs_writer_in_one_process_is_read(distributed: bool, tmp_path: Path) -> None:
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
    "half a header": (file_of(b'{"a": {"dtype"'), "a malformed header"),
    "no text": (file_of(b'{"\xff\xfe": 1}'), "a malformed header"),
    "depth": (file_of(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "a malformed header"),
    "a number of 5000 digits": (file_of(b'{"a":' + b"9" * 5000 + b"}"), "a malformed header"),
    "one name twice": (file_of(b'{"a":%b,"a":%b}' % ((json.dumps(ROW).encode(),) * 2)), "the same name"),
    "a gap": (file_of({"a": {**ROW, "data_offsets": [8, 32]}}, bytes(32)), "a gap or an overlap at byte 8"),
    "an overlap": (file_of({"a": ROW, "b": {**ROW, "data_offsets": [20, 44]}}, bytes(44)), "overlap at byte 20"),
    "two with the same bytes": (file_of({"a": ROW, "b": ROW}), "overlap at byte 0"),
    "bytes beyond the end": (file_of({"a": ROW}, bytes(23)), "was cut short"),
    "a byte more": (file_of({"a": ROW}, bytes(25)), "so the file was changed"),
    "malformed sharding": (file_of({"__metadata__": {"DCP_SHARDING_INFO": "{"}, "a": ROW}), "a malformed header"),
    "malformed metadata": (file_of({"__metadata__": [], "a": ROW}), "a malformed header"),
    **{
        f"{key} = {value!r:.40}": (file_of({"a": {**ROW, key: value}}), "a malformed header")
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
            "a malformed header",
        )
        for shape in ([], [3], [True])
    },
    **{
        f"a tensor that is {row!r}": (file_of({"a": row}), "a malformed header")
        for row in list[object]((None, 1, "x", [], {}, {"dtype": "F32"}))
    },
    **{
        f"a shard at {offsets!r}": (
            file_of({"__metadata__": {"DCP_SHARDING_INFO": json.dumps({"a": {"saved_offsets": offsets}})}, "a": ROW}),
            "a malformed header",
        )
        for offsets in ([0], [0, 0, 0], [-1, 0], [2**80, 0], ["0", "0"], [0.5, 0], None)
    },
}


@pytest.mark.parametrize("case", HEADERS)
def test_false_header_raises_corrupt_error(case: str) -> None:
    data, message = HEADERS[case]
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        opened(bad=data)
    assert "'bad.safetensors' in memory" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_header_larger_than_the_format_allows_is_not_read() -> None:
    size = 100_000_001
    store = MemoryStore()
    store.content["bad.safetensors"] = size.to_bytes(8, "little") + b"{" + bytes(size)
    recording = RecordingStore(store)
    with pytest.raises(CorruptCheckpointError, match="has no header"):
        reshard.open(recording)
    assert max(call.stop - call.start for call in recording.calls if call.name == "bad.safetensors") <= 64 * 1024


WITH_UNKNOWN = {
    "a": {"dtype": "F6_E3M2", "shape": [4, 4], "data_offsets": [0, 12]},
    "b": {**ROW, "data_offsets": [12, 36]},
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("dtype", ["F6_E3M2", "F6_E2M3", "U4", "C128", ""])
def test_unknown_dtype_does_not_hide_the_other_tensors(dtype: str, tmp_path: Path) -> None:
    header = {**WITH_UNKNOWN, "a": {**WITH_UNKNOWN["a"], "dtype": dtype}}
    path = tmp_path / "bad.safetensors"
    path.write_bytes(file_of(header, bytes(36)))
    checkpoint = reshard.open(path)
    assert_holds(checkpoint, {"b": torch.zeros(2, 3)})
    message = rf"'bad\.safetensors' in {tmp_path}: 'a' has the dtype '{dtype}'"
    assert re.search(message, checkpoint.unreadable["a"])
    assert checkpoint.damaged == ()
    layout = reshard.Layout({"tp": 2})
    for ask in (
        lambda: checkpoint.read("a"),
        lambda: checkpoint.read_value("a"),
        lambda: checkpoint.state_dict(),
        lambda: checkpoint.state_dict(include="a"),
        lambda: checkpoint.load_rank(layout, 0),
        lambda: checkpoint.plan(layout),
        lambda: checkpoint.shards_of("a"),
        lambda: reshard.load({"a": torch.zeros(4, 4)}, path),
        lambda: reshard.convert(path, tmp_path / "dst"),
        lambda: reshard.convert(path, tmp_path / "dst", rename={"a": "x"}),
        lambda: dcp.load({"a": torch.zeros(4, 4)}, storage_reader=reshard.StorageReader(path), no_dist=True),
    ):
        with pytest.raises((DtypeError, CheckpointException), match=message):
            ask()
    assert not (tmp_path / "dst").exists()
    assert checkpoint.state_dict(include="b")["b"].equal(torch.zeros(2, 3))
    assert checkpoint.load_rank(layout, 1, include="b")["b"].equal(torch.zeros(2, 3))
    assert len(checkpoint.plan(layout, include="b")) == 2
    assert checkpoint.verify() == []
    state = {"b": torch.ones(2, 3)}
    assert reshard.load(state, path).unexpected_keys == ()
    assert state["b"].equal(torch.zeros(2, 3))
    dcp.load({"b": state["b"]}, storage_reader=reshard.StorageReader(path), no_dist=True)
    assert reshard.convert(path, tmp_path / "dst", include="b").dropped == ("a",)


def test_rank_that_does_not_need_the_unreadable_tensor_loads_the_others() -> None:
    header = {"layers.0.w": {**WITH_UNKNOWN["a"]}, "layers.1.w": {**ROW, "data_offsets": [12, 36]}}
    checkpoint = opened(bad=file_of(header, bytes(36)))
    layout = reshard.Layout({"pp": 2}, stages={"layers.0.w": 0, "layers.1.w": 1})
    assert set(checkpoint.load_rank(layout, 1)) == {"layers.1.w"}
    with pytest.raises(DtypeError, match=r"'layers\.0\.w' has the dtype"):
        checkpoint.load_rank(layout, 0)


def test_dtype_missing_in_this_torch_does_not_hide_the_other_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    data = save({"a": sample("float8_e8m0fnu", 4), "b": torch.ones(3)})
    monkeypatch.delattr(torch, "float8_e8m0fnu")
    checkpoint = opened(one=data)
    assert_holds(checkpoint, {"b": torch.ones(3)})
    with pytest.raises(
        DtypeError, match=r"'a' in memory/one\.safetensors .* float8_e8m0fnu: this torch .* has no dtype"
    ):
        checkpoint.read("a")


def test_tensor_in_two_files_raises_corrupt_error() -> None:
    message = (
        r"two files have the tensor 'a': 'one\.safetensors' and 'two\.safetensors'\. "
        r"Open one of them, for example 'memory/one\.safetensors'"
    )
    with pytest.raises(CorruptCheckpointError, match=message):
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
def test_shards_that_do_not_form_a_tensor_are_unreadable(other: bytes, message: str) -> None:
    with pytest.raises(CorruptCheckpointError, match=message):
        opened(one=shard(ROW, 0, 0), two=other).read("a")


def save_ranks(folder: Path, state: dict[str, torch.Tensor], ranks: int, *, files: int = 1) -> None:
    """Save rows of tensors in files as HuggingFaceStorageWriter writes them on each rank."""
    folder.mkdir(exist_ok=True)
    for rank in range(ranks):
        parts: dict[str, torch.Tensor] = {}
        offsets: dict[str, Any] = {}
        for name, whole in state.items():
            rows = -(-len(whole) // ranks)
            part = whole[rank * rows : (rank + 1) * rows]
            if len(part):
                parts[name] = part.contiguous()
                offsets[name] = {"saved_offsets": [rank * rows, *(0 for _ in whole.shape[1:])]}
        path = folder / f"shard-{rank + 1:05}-model-{files:05}-of-{files:05}.safetensors"
        save_file(parts, path, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})


REMAIN = "files of another save remain in the folder, or a file is missing. Remove the files of the other save"


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 1), (6, 3), (3, 2), (8, 5)])
def test_files_left_by_an_export_with_more_ranks_make_tensors_unreadable(
    before: int, after: int, tmp_path: Path
) -> None:
    old = {"w": torch.zeros(16, 3), "b": torch.zeros(16)}
    new = {"w": torch.ones(16, 3), "b": torch.ones(16)}
    save_ranks(tmp_path / "m", old, before)
    assert_holds(reshard.open(tmp_path / "m"), old)
    save_ranks(tmp_path / "m", new, after)
    checkpoint = reshard.open(tmp_path / "m")
    assert set(checkpoint.damaged) == {"b", "w"}
    message = rf"the shards of 'w' hold \d+ elements, its shape \(16, 3\) has 48: 'shard-00001-.*{REMAIN}"
    for ask in (
        lambda: checkpoint.read("w"),
        lambda: checkpoint.state_dict(include="w"),
        lambda: reshard.load({"w": torch.zeros(16, 3)}, tmp_path / "m"),
        lambda: reshard.convert(tmp_path / "m", tmp_path / "dst", include="w"),
    ):
        with pytest.raises(CorruptCheckpointError, match=message):
            ask()
    with pytest.raises(CorruptCheckpointError, match=f"'shard-{before:05}-model-00001-of-00001.safetensors' holds"):
        checkpoint.read("b")
    assert {damage.tensor for damage in checkpoint.verify()} == {"b", "w"}
    for rank in range(after, before):
        (tmp_path / "m" / f"shard-{rank + 1:05}-model-00001-of-00001.safetensors").unlink()
    assert_holds(reshard.open(tmp_path / "m"), new)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_missing_file_of_a_rank_makes_tensors_unreadable(lost: int, tmp_path: Path) -> None:
    save_ranks(tmp_path / "m", {"w": torch.ones(9, 2)}, 3)
    (tmp_path / "m" / f"shard-{lost + 1:05}-model-00001-of-00001.safetensors").unlink()
    if lost == 2:  # nothing shows that there were more rows
        assert reshard.open(tmp_path / "m").read("w").shape == (6, 2)
        return
    with pytest.raises(CorruptCheckpointError, match=rf"the shards of 'w' hold 12 elements, .*{REMAIN}"):
        reshard.open(tmp_path / "m").read("w")


def test_two_exports_of_the_same_ranks_are_not_mixed(tmp_path: Path) -> None:
    """Files with other names contain the same boxes, and nothing shows which of them to use."""
    for files, value in ((1, 0.0), (2, 1.0)):
        save_ranks(tmp_path / "m", {"w": torch.full((8, 2), value)}, 2, files=files)
    names = sorted(path.name for path in (tmp_path / "m").iterdir())
    for name in names:
        if "of-00002" in name:
            save_file({"other": torch.ones(1)}, tmp_path / "m" / name.replace("-00002-of", "-00001-of"))
    with pytest.raises(
        CorruptCheckpointError, match=rf"the shards of 'w' hold 32 elements, .* has 16.*{REMAIN}|two files"
    ):
        reshard.open(tmp_path / "m").read("w")


def test_ranks_may_lack_files_of_some_numbers(tmp_path: Path) -> None:
    """A rank only writes files for its own shards. Together the ranks write all files."""
    for rank, number, name in ((1, 1, "a"), (1, 2, "b"), (2, 2, "b")):
        rows = slice(0, 2) if rank == 1 else slice(2, 4)
        whole = torch.arange(8.0).reshape(4, 2)
        part = whole if name == "a" else whole[rows].contiguous()
        sharding = {name: {"saved_offsets": [0 if name == "a" else rows.start, 0]}}
        path = tmp_path / f"shard-{rank:05}-model-{number:05}-of-00002.safetensors"
        save_file({name: part}, path, metadata={"DCP_SHARDING_INFO": json.dumps(sharding)})
    assert_holds(reshard.open(tmp_path), {"a": whole, "b": whole})
    (tmp_path / "shard-00001-model-00001-of-00002.safetensors").unlink()
    with pytest.raises(
        CorruptCheckpointError, match=r"of 2 files, 'shard-\*-model-00001-of-00002\.safetensors' is missing"
    ):
        reshard.open(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../x.safetensors"}}, r"is not an index of safetensors.*'\.\./x\.safetensors'"),
        ({"weight_map": {"a": "/etc/x.safetensors"}}, "is not an index of safetensors.*'/etc/x.safetensors'"),
        ({"weight_map": {"a": "sub\\x.safetensors"}}, "is not an index of safetensors"),
        ({"weight_map": {"a": ".."}}, "is not an index of safetensors"),
        ({"weight_map": {"a": ""}}, "is not an index of safetensors"),
        ({"weight_map": {"a": 1}}, "is not an index of safetensors"),
        ({"weight_map": ["a"]}, "is not an index of safetensors"),
        ({"weight_map": None}, "is not an index of safetensors"),
        ({}, "is not an index of safetensors"),
        ([], "is not an index of safetensors"),
        (b"{", "is not an index of safetensors"),
        (b"\xff", "is not an index of safetensors"),
        (b"[" * 100_000, "is not an index of safetensors"),
        ({"weight_map": {"a": "two.safetensors"}}, "names a file that is missing.*'two.safetensors'"),
        (
            {"weight_map": {"a": "two.safetensors", "b": "x.safetensors"}},
            "files that are all missing: 'two.*', 'x.safe",
        ),
        ({"weight_map": {}}, r"names no tensors\. The folder also has the weight files 'one\.safetensors'"),
        (
            {"weight_map": []},
            r"is not an index of safetensors.*The folder also has the weight files 'one\.safetensors'",
        ),
        ({"weight_map": "one.safetensors"}, r"is not an index of safetensors.*The folder also has the weight files"),
    ],
)
def test_false_index_raises_corrupt_error(index: object, message: str) -> None:
    with pytest.raises(CorruptCheckpointError, match=message):
        opened(one=file_of({"a": ROW}), index=index)


@pytest.mark.parametrize("change", [-40, -1, 1, 7, 100_000])
def test_file_of_the_wrong_size_raises_corrupt_error(change: int) -> None:
    data = save({"w": torch.ones(10)})
    changed = data[:change] if change < 0 else data + bytes(change)
    why = "it was cut short" if change < 0 else f"{change} bytes too many follow the last tensor"
    message = f"has {len(changed)} bytes, but its header describes {len(data)}: {why}"
    with pytest.raises(CorruptCheckpointError, match=re.escape(message)):
        opened(one=changed)


def test_index_decides_which_of_two_copies_is_read(tmp_path: Path) -> None:
    base = {"a": torch.zeros(3), "b": torch.ones(2), "c": torch.full((2,), 2.0)}
    newer = {"a": torch.full((3,), 5.0), "c": torch.full((2,), 7.0)}
    save_file(base, tmp_path / "model.safetensors")
    save_file(newer, tmp_path / "overlay.safetensors")
    index = {"a": "overlay.safetensors", "b": "model.safetensors", "c": "model.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    expected = {"a": newer["a"], "b": base["b"], "c": base["c"]}
    checkpoint = reshard.open(tmp_path)
    assert_holds(checkpoint, expected)
    assert checkpoint.unindexed == ()
    assert checkpoint.verify() == []
    state = {name: torch.empty_like(value) for name, value in expected.items()}
    reshard.load(state, tmp_path)
    assert all(state[name].equal(value) for name, value in expected.items())
    reshard.convert(tmp_path, tmp_path / "dst")
    assert_holds(reshard.open(tmp_path / "dst"), expected)


def test_index_of_the_model_is_preferred_to_other_indexes() -> None:
    one, two = file_of({"a": ROW}, bytes(24)), file_of({"a": ROW}, bytes([1]) * 24)
    store = MemoryStore()
    store.content = {
        "one.safetensors": one,
        "two.safetensors": two,
        "model.fp16.safetensors.index.json": b'{"weight_map": {"a": "two.safetensors"}}',
        INDEX: b'{"weight_map": {"a": "one.safetensors"}}',
    }
    assert reshard.open(store).read("a").equal(torch.zeros(2, 3))
    store.content["other.safetensors.index.json"] = store.content.pop(INDEX)
    with pytest.raises(
        CheckpointError, match=r"has 2 indexes, 'model\.fp16\.safe.*', 'other\.safe.*': open one of them"
    ):
        reshard.open(store)


def test_index_is_opened_by_its_own_path(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        save_file({"a": torch.full((2,), value)}, tmp_path / f"{name}.safetensors")
        index = {"weight_map": {"a": f"{name}.safetensors"}}
        (tmp_path / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    for name, value in (("one", 1.0), ("two", 2.0)):
        assert_holds(reshard.open(tmp_path / f"{name}.safetensors.index.json"), {"a": torch.full((2,), value)})


@pytest.mark.parametrize("gone", ["tensor", "file", "both"])
def test_missing_file_of_an_index_does_not_hide_the_other_tensors(gone: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "one.safetensors")
    index = {"a": "one.safetensors", "b": "one.safetensors"}
    messages = {
        "lost": r"the index 'model.*json' in .* says that 'lost' is in 'one\.safetensors', which does not have it",
        "far.w": r"says that 'far\.w' is in 'gone\.safetensors', which is missing",
    }
    index |= {"lost": "one.safetensors"} if gone != "file" else {}
    index |= {"far.w": "gone.safetensors"} if gone != "tensor" else {}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    checkpoint = reshard.open(tmp_path)
    assert_holds(checkpoint, {"a": torch.ones(2), "b": torch.zeros(3)})
    missing = sorted(index.keys() - {"a", "b"})
    assert sorted(checkpoint.damaged) == missing
    assert sorted((damage.tensor, damage.object) for damage in checkpoint.verify()) == [(n, index[n]) for n in missing]
    for name in missing:
        for ask in (
            lambda name=name: checkpoint.read(name),
            lambda name=name: checkpoint.state_dict(include=name),
            lambda name=name: reshard.load({name: torch.ones(1)}, tmp_path, strict=False),
            lambda name=name: reshard.convert(tmp_path, tmp_path / "dst", include=name),
        ):
            with pytest.raises(CorruptCheckpointError, match=messages[name]):
                ask()
    for everything in (checkpoint.state_dict, lambda: reshard.convert(tmp_path, tmp_path / "dst")):
        with pytest.raises(CorruptCheckpointError, match=messages[missing[0]] + "|" + messages[missing[-1]]):
            everything()
    assert not (tmp_path / "dst").exists()
    state = {"a": torch.zeros(2)}
    reshard.load(state, tmp_path)
    assert state["a"].equal(torch.ones(2))
    report = reshard.convert(tmp_path, tmp_path / "dst", include=["a", "b"])
    assert sorted(report.dropped) == missing


def test_tensors_that_the_index_does_not_name_are_listed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.zeros(3), "c": torch.ones(1)}, tmp_path / "one.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    checkpoint = reshard.open(tmp_path)
    assert_holds(checkpoint, {"a": torch.ones(2)})
    assert checkpoint.unindexed == ("b", "c")
    assert reshard.convert(tmp_path, tmp_path / "dst").dropped == ("b", "c")


@pytest.mark.parametrize("prefix", ["model", "pytorch_model", "diffusion_pytorch_model", "a.b-c", ""])
@pytest.mark.parametrize(
    ("first", "lost"), [(0, [1]), (0, [2]), (0, [1, 2]), (1, [0]), (1, [1]), (1, [2]), (1, [0, 1]), (1, [1, 2])]
)
def test_folder_without_some_numbered_files_raises_corrupt_error(
    prefix: str, first: int, lost: list[int], tmp_path: Path
) -> None:
    names = [f"{prefix}-{first + i:05}-of-00003.safetensors".removeprefix("-") for i in range(3)]
    for number, name in enumerate(names):
        save_file({f"t{number}": torch.ones(2)}, tmp_path / name)
    assert set(reshard.open(tmp_path).tensors) == {"t0", "t1", "t2"}
    for number in lost:
        (tmp_path / names[number]).unlink()
    wanted = ", ".join(re.escape(repr(names[number])) for number in lost)
    with pytest.raises(CorruptCheckpointError, match=rf"is incomplete: of 3 files, {wanted} (is|are) missing"):
        reshard.open(tmp_path)
    with pytest.raises(CorruptCheckpointError, match="is incomplete"):
        reshard.convert(tmp_path, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    left = next(name for number, name in enumerate(names) if number not in lost)
    assert len(reshard.open(tmp_path / left).tensors) == 1


def test_numbered_files_of_two_models_are_counted_separately() -> None:
    files: dict[str, object] = {
        f"{prefix}-{i:05}-of-0000{count}": file_of({f"{prefix}{i}": ROW})
        for prefix, count in (("text", 2), ("image", 3))
        for i in range(1, count + 1)
    }
    assert len(opened(**files).tensors) == 5
    del files["image-00003-of-00003"]
    with pytest.raises(CorruptCheckpointError, match=r"of 3 files, 'image-00003-of-00003\.safetensors' is missing"):
        opened(**files)


def test_file_truncated_after_opening_raises_corrupt_error(tmp_path: Path) -> None:
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
def test_flipped_bytes_of_a_header_raise_checkpoint_error_or_are_read(flips: list[tuple[int, int]]) -> None:
    data = bytearray(SAMPLE)
    for at, by in flips:
        data[at] ^= by
    with contextlib.suppress(CheckpointError):
        checkpoint = opened(one=bytes(data))
        for name in checkpoint.tensors:
            checkpoint.read(name)


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00002.fp16.safetensors",
        "diffusion_model_00001-of-00002.safetensors",
        "model.00001-of-00002.safetensors",
        "model-00001_of_00002.safetensors",
        "model_1_of_2.safetensors",
    ],
)
def test_missing_files_are_noticed_with_other_numbering_schemes(name: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(CorruptCheckpointError, match=r"of 2 files, .* is missing"):
        reshard.open(tmp_path)
    save_file({"b": torch.ones(2)}, tmp_path / name.replace("1_of", "2_of").replace("1-of", "2-of"))
    assert sorted(reshard.open(tmp_path).tensors) == ["a", "b"]


def test_index_may_name_files_in_subfolders(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "m.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "sub" / "m.safetensors")
    index = {"a": "./m.safetensors", "b": "sub/m.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    assert_holds(reshard.open(tmp_path), {"a": torch.ones(2), "b": torch.zeros(2)})
    for outside in ("../m.safetensors", "/m.safetensors", "sub/../../m.safetensors", "sub//m.safetensors", ".", ""):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(CorruptCheckpointError, match="it names files outside its folder"):
            reshard.open(tmp_path)
