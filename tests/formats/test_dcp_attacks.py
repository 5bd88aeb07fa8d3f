"""False or damaged DCP checkpoints: each raises one clear error, and no code from it runs."""

from __future__ import annotations

import collections
import contextlib
import copy
import datetime
import enum
import fractions
import functools
import io
import os
import pathlib
import pickle
import re
import tracemalloc
import types
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

import reshard
from reshard.errors import CheckpointError, CorruptCheckpointError, DtypeError, UnsafeValueError
from reshard.planner.box import Box
from reshard.storage.stores.memory import MemoryStore
from tests.dcp_checkpoints import METADATA, put_together, rows, torch_saved
from tests.samples import Runs, running, same

W = torch.arange(24.0).reshape(6, 4)
V = torch.arange(24.0).reshape(6, 4) + 100
TENSORS = {"w": (W, rows(2, 6, 4)), "v": (V, rows(3, 6, 4))}
FIRST = MetadataIndex("w", (0, 0))


def whole(change: Callable[[Metadata], object] = lambda metadata: None) -> MemoryStore:
    return put_together(TENSORS, {"step": 7}, change)


def check_values(store: MemoryStore) -> None:
    checkpoint = reshard.open(store)
    assert same(checkpoint.read("w"), W)
    assert same(checkpoint.read("v"), V)
    assert checkpoint.read_value("step") == 7


@contextlib.contextmanager
def taking_at_most(nbytes: int) -> Iterator[None]:
    """Check that a block allocates at most `nbytes` of Python's memory."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < nbytes
    finally:
        tracemalloc.stop()


def test_undamaged_checkpoint_is_read() -> None:
    check_values(whole())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (os.system, ("touch RAN",)),
        (eval, ("open('RAN', 'w')",)),
        (exec, ("open('RAN', 'w')",)),
        (open, ("RAN", "w")),
        (torch.load, ("RAN",)),
        (np.save, ("RAN.npy", [1])),
        (getattr, (os, "getcwd")),
        (bytearray, (10**11,)),
    ],
)
def test_metadata_that_would_run_code_raises_unsafe_error(
    function: Any, arguments: tuple[Any, ...], protocol: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if function is getattr:
        arguments = ("os", "getcwd")
    store = whole()
    store.content[METADATA] = running(function, *arguments, protocol=protocol)
    with pytest.raises(UnsafeValueError, match=r"'\.metadata' in memory names .*: it was refused"):
        reshard.open(store)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("attribute", ["planner_data", "storage_meta", "version", "mcore_data"])
@pytest.mark.parametrize(
    "value",
    [
        Runs(os.system, "touch RAN"),
        {"a": Runs(os.system, "touch RAN"), "w": ("w",)},
        [Runs(eval, "open('RAN', 'w')")],
        {Runs(exec, "open('RAN', 'w')"): 1},
        {"f": Runs(getattr, Runs(__import__, "os"), "system")},
        Runs(functools.partial, os.system, "touch RAN"),
        Runs(functools.reduce, getattr, ["system"], "os"),
        Runs(torch.load, "RAN"),
        Runs(bytearray, 10**11),
        os.system,
    ],
    ids=[
        "value",
        "in a dict",
        "in a list",
        "as a key",
        "nested",
        "partial",
        "reduce",
        "torch.load",
        "memory",
        "function",
    ],
)
def test_code_beside_the_metadata_of_tensors_does_not_run(
    value: object, attribute: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with taking_at_most(32 * 2**20):
        check_values(whole(lambda metadata: setattr(metadata, attribute, value)))
    assert list(tmp_path.iterdir()) == []


class Colour(enum.Enum):
    RED = 1


class Named(NamedTuple):
    a: int


class Items(dict[str, int]):
    """A dict with a state in addition to its items."""


class Rows(list[int]): ...


@dataclass
class Options:
    colour: Colour = Colour.RED
    where: Any = None


def with_state(items: Any) -> Any:
    items.note = "x"
    return items


FOREIGN = {
    "a dataclass": Options(),
    "an enum": Colour.RED,
    "a member as a key": {Colour.RED: {"x": 1}},
    "a function": put_together,
    "a class": Options,
    "a builtin": len,
    "a named tuple": Named(3),
    "a dict of its own": with_state(Items(a=1)),
    "a list of its own": with_state(Rows([1, 2])),
    "an ordered dict with a state": with_state(collections.OrderedDict(a=1)),
    "a defaultdict": collections.defaultdict(list, {"a": [1]}),
    "a counter": collections.Counter("aab"),
    "a deque": collections.deque([1, 2], 5),
    "a device": torch.device("cuda", 3),
    "a dtype": torch.qint8,
    "a layout": torch.sparse_coo,
    "a size": torch.Size((-1, 2)),
    "a tensor": torch.ones(3),
    "an array": np.arange(5),
    "an array of objects": np.array([None, Options()], dtype=object),
    "a scalar": np.float32(1.0),
    "a date": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    "a path": pathlib.PurePosixPath("a/b"),
    "a fraction": fractions.Fraction(1, 3),
    "a set": {1, 2},
    "a frozenset": frozenset((1, frozenset((2, (3,))))),
    "a frozenset as a key": {frozenset((1, 2)): 3},
    "a bytearray": bytearray(b"xyz"),
    "a complex": 1 + 2j,
    "a slice": slice(1, 2),
    "a namespace": types.SimpleNamespace(a=1),
    "a partial": functools.partial(len, [1]),
    "an error": ValueError("x"),
    "a large number": 2**300,
}


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("case", FOREIGN)
def test_unknown_classes_beside_the_metadata_of_tensors_are_ignored(case: str, protocol: int) -> None:
    value = FOREIGN[case]

    made: list[Metadata] = []

    def change(metadata: Any) -> None:
        made.append(metadata)
        metadata.planner_data = {"step": ("step",), "other": value, "w": ("w",)}
        metadata.mcore_data = {"sharding": [value], "w": {"nested": (value, 1)}}
        metadata.storage_meta = value
        metadata.version = value

    store = whole(change)
    store.content[METADATA] = pickle.dumps(made[0], protocol)
    check_values(store)
    assert set(reshard.open(store).state_dict()) == {"w", "v", "step"}


@dataclass
class MCoreMetadata(Metadata):
    mcore_data: Any = None


def test_subclass_of_metadata_is_read() -> None:
    made: list[Metadata] = []
    store = whole(made.append)
    attributes = {field.name: getattr(made[0], field.name) for field in fields(Metadata)}
    store.content[METADATA] = pickle.dumps(MCoreMetadata(**attributes, mcore_data={"w": Options()}))
    check_values(store)


@pytest.mark.parametrize("state", [None, {}, {"state_dict_metadata": {}}, [1]])
def test_class_that_only_resembles_metadata_raises_unsafe_error(state: Any) -> None:
    store = whole()
    options = Options()
    options.__dict__.clear()
    options.__dict__["x"] = state
    if isinstance(state, dict):
        options.__dict__.update(state)
    store.content[METADATA] = pickle.dumps(options)
    with pytest.raises(UnsafeValueError, match=r"'\.metadata' in memory names .*Options"):
        reshard.open(store)


def test_defaultdict_of_tensors_is_read() -> None:
    def change(metadata: Any) -> None:
        metadata.state_dict_metadata = collections.defaultdict(list, metadata.state_dict_metadata)
        metadata.storage_data = collections.defaultdict(dict, metadata.storage_data)
        metadata.planner_data = collections.defaultdict(tuple, {"w": ("w",)})

    check_values(whole(change))


def placed(**changes: Any) -> Callable[[Metadata], None]:
    """Return a change of the metadata that moves the first shard of w."""
    return lambda metadata: metadata.storage_data.update({FIRST: replace(metadata.storage_data[FIRST], **changes)})


def index_of(metadata: Metadata, index: MetadataIndex, value: Any) -> None:
    metadata.storage_data[value] = metadata.storage_data.pop(index)


NAMED_BY_A_CLASS: Any = Options


def of_w(metadata: Metadata) -> Any:
    return metadata.state_dict_metadata["w"]


NEEDED: dict[str, Callable[[Any], object]] = {
    "its entry": lambda metadata: metadata.state_dict_metadata.update(w=Options()),
    "its properties": lambda metadata: setattr(of_w(metadata), "properties", Options()),
    "its size": lambda metadata: setattr(of_w(metadata), "size", Options()),
    "its chunks": lambda metadata: setattr(of_w(metadata), "chunks", Options()),
    "a chunk": lambda metadata: of_w(metadata).chunks.insert(1, Options()),
    "an offset": lambda metadata: setattr(of_w(metadata).chunks[1], "offsets", Options()),
    "the location of a shard": lambda metadata: metadata.storage_data.update({FIRST: Options()}),
    "the key of a shard": lambda metadata: index_of(metadata, FIRST, Options),
    "the name in a key": lambda metadata: index_of(metadata, FIRST, replace(FIRST, fqn=NAMED_BY_A_CLASS)),
    "the path of a shard": placed(relative_path=Options()),
    "the offset of a shard": placed(offset=Options()),
    "the transforms of a shard": placed(transform_descriptors=[Options()]),
    "code": lambda metadata: metadata.state_dict_metadata.update(w=Runs(os.system, "touch RAN")),
}


@pytest.mark.parametrize("case", NEEDED)
def test_only_the_tensor_whose_metadata_needs_an_unknown_class_is_unreadable(case: str) -> None:
    checkpoint = reshard.open(whole(NEEDED[case]))
    assert same(checkpoint.read("v"), V)
    assert checkpoint.read_value("step") == 7
    assert set(checkpoint.unreadable) == {"w"}
    message = r"'\.metadata' in memory describes 'w' by .*(Options|system), a class that reshard does not know"
    with pytest.raises(UnsafeValueError, match=message):
        checkpoint.read("w")
    with pytest.raises(UnsafeValueError, match=message):
        checkpoint.state_dict()
    assert not os.path.exists("RAN")


@pytest.mark.parametrize("dtype", [torch.qint8, torch.bits8, torch.bits16])
def test_only_the_tensor_of_an_unknown_dtype_is_unreadable(dtype: torch.dtype) -> None:
    checkpoint = reshard.open(whole(lambda metadata: setattr(of_w(metadata).properties, "dtype", dtype)))
    assert same(checkpoint.read("v"), V)
    with pytest.raises(DtypeError, match=rf"'w' in '\.metadata' in memory has the dtype {dtype}"):
        checkpoint.read("w")


@pytest.mark.parametrize("field", ["state_dict_metadata", "storage_data"])
def test_metadata_of_an_unknown_class_raises_unsafe_error(field: str) -> None:
    with pytest.raises(UnsafeValueError, match=r"'\.metadata' in memory names .*Options"):
        reshard.open(whole(lambda metadata: setattr(metadata, field, Options())))


def test_many_unknown_class_names_take_little_memory() -> None:
    names = b"".join(b"c%05d\nx\n" % number for number in range(99_999))
    store = whole()
    store.content[METADATA] = b"\x80\x02](" + names + b"e."
    with taking_at_most(32 * 2**20), pytest.raises(CorruptCheckpointError, match="is not metadata of DCP, but list"):
        reshard.open(store)


def test_code_in_a_shard_raises_corrupt_error_and_does_not_run() -> None:
    store = whole()
    data = torch_saved(Runs(os.system, "touch RAN"))
    store.content["__0_0.distcp"] = data + bytes(len(store.content["__0_0.distcp"]) - len(data))
    with pytest.raises(CorruptCheckpointError, match=r"^'w': chunk \[0:2, 0:4\] cannot be decoded"):
        reshard.open(store).read("w")
    assert not os.path.exists("RAN")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read"),
        (b"\x80", "cannot be read"),
        (b"garbage" * 10, "cannot be read"),
        (pickle.dumps({"a": 1}), "is not metadata of DCP, but dict"),
        (pickle.dumps(None), "is not metadata of DCP, but NoneType"),
        (b"\x80\x02Nr\xff\xff\xff\x0f.", "numbers a value 268435455"),
        (b"\x80\x02})" + b"\x85" * 3_000_000 + b"Ns.", "tuples are nested"),
        (b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b".", "cannot be read"),
        (b"\x80\x04\x8e" + (2**34).to_bytes(8, "little") + b".", "cannot be read"),
        (b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b".", "cannot be read"),
        (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".", r"opcode BYTEARRAY8 \(0x96\)"),
        (b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b".", "cannot be read"),
        (b"\x80\x04h\x05.", "cannot be read"),
        (b"\x80\x02})" + b"(0\x85" * 3_000_000 + b"Ns.", r"opcode POP \(0x30\)"),
        (b"(cos\nsystem\nS'true'\no.", r"opcode STRING \(0x53\)"),
        (b"cos\nsystem\n(S'true'\ntR.", r"opcode STRING \(0x53\)"),
        (b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".", "is not metadata of DCP, but list"),
    ],
)
def test_object_that_is_not_metadata_raises_corrupt_error(data: bytes, message: str) -> None:
    store = whole()
    store.content[METADATA] = data
    with (
        taking_at_most(32 * 2**20),
        pytest.raises(CorruptCheckpointError, match=message) as caught,
    ):
        reshard.open(store)
    assert "'.metadata' in memory" in str(caught.value)


def test_truncated_metadata_raises_corrupt_error() -> None:
    data = whole().content[METADATA]
    for length in range(0, len(data), 7):
        store = whole()
        store.content[METADATA] = data[:length]
        with pytest.raises(CorruptCheckpointError, match=r"'\.metadata' in memory"):
            reshard.open(store)


WHOLE = whole()


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE.content[METADATA]) - 1), st.integers(1, 255)), min_size=1, max_size=3)
)
def test_flipped_bytes_of_metadata_raise_checkpoint_error_or_are_read(flips: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE.content[METADATA])
    for at, by in flips:
        data[at] ^= by
    store = copy.copy(WHOLE)
    store.content = {**WHOLE.content, METADATA: bytes(data)}
    with contextlib.suppress(CheckpointError):
        checkpoint = reshard.open(store)
        for name in checkpoint.tensors:
            checkpoint.read(name)
        for name in checkpoint.value_names:
            checkpoint.read_value(name)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1023), st.integers(1, 255))
def test_flipped_byte_before_the_values_of_a_shard_raises_or_is_read_as_torch_does(at: int, by: int) -> None:
    data = bytearray(WHOLE.content["__2_0.distcp"])
    data[at % data.index(W[4:].numpy().tobytes())] ^= by
    store = copy.copy(WHOLE)
    store.content = {**WHOLE.content, "__2_0.distcp": bytes(data)}
    with contextlib.suppress(CheckpointError):
        found = reshard.open(store).read("w", Box((4, 0), (2, 4)))
        assert same(found, W[4:]) or same(found, torch.load(io.BytesIO(data), weights_only=True))


@pytest.mark.parametrize("change", [b"K\x01K\x02K\x04\x86", b"K\x04K\x02K\x04\x86"])
def test_values_outside_a_shard_are_not_read(change: bytes) -> None:
    """The pickle of the tensor claims that its values begin one or four elements after the start of the storage."""
    data = WHOLE.content["__2_0.distcp"]
    assert data.count(b"K\x00K\x02K\x04\x86") == 1
    store = copy.copy(WHOLE)
    store.content = {**WHOLE.content, "__2_0.distcp": data.replace(b"K\x00K\x02K\x04\x86", change)}
    with pytest.raises(CorruptCheckpointError, match=r"^'w': chunk \[4:6, 0:4\] cannot be decoded"):
        reshard.open(store).read("w", Box((4, 0), (2, 4)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            (placed(relative_path=path), "is not an object of this folder")
            for path in ("../x", "/etc/passwd", "a/../../x", "", ".", "a//b", "..\\x", 7, None, ["a"])
        ),
        *((placed(offset=n), "a size or an offset is invalid") for n in (-1, 2**60, 2**200, 1.0, "0", None, True)),
        *((placed(length=n), "a size or an offset is invalid") for n in (-1, 2**60, 2**200, 1.0, "0", None, True)),
        (placed(transform_descriptors=["stream.xz"]), "'stream.xz'.*but reshard only knows 'stream.zstd'"),
        (lambda metadata: metadata.storage_data.pop(FIRST), r"nothing says where 'w' is stored at \(0, 0\)"),
        (lambda metadata: metadata.storage_data.pop(MetadataIndex("step")), "nothing says where 'step' is stored"),
        (lambda metadata: setattr(metadata, "storage_data", None), "contradicts itself"),
        (lambda metadata: setattr(metadata, "state_dict_metadata", [1]), "contradicts itself"),
        (lambda metadata: metadata.state_dict_metadata.update({"w": None}), "contradicts itself"),
        (
            lambda metadata: metadata.state_dict_metadata.update({7: metadata.state_dict_metadata["w"]}),
            "a name is of int",
        ),
        (
            lambda metadata: setattr(metadata.state_dict_metadata["w"], "size", (6.0, 4)),
            "a size or an offset is invalid",
        ),
        (lambda metadata: setattr(metadata.state_dict_metadata["w"], "chunks", 3), "contradicts itself"),
        (lambda metadata: setattr(metadata.state_dict_metadata["w"], "properties", 3), "contradicts itself"),
        (lambda metadata: setattr(metadata.state_dict_metadata["w"], "size", (6, 4, 1)), "contradicts itself"),
        (lambda metadata: setattr(metadata.state_dict_metadata["w"], "size", (2**50, 4)), "impossible shape"),
    ],
)
def test_impossible_metadata_raises_corrupt_error(change: Callable[[Metadata], object], message: str) -> None:
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        reshard.open(whole(change))
    assert "memory" in str(caught.value)


def chunks(*parts: Box) -> Callable[[Metadata], None]:
    """Return a change of the metadata to other boxes of w. A new box gets the bytes of an existing shard."""

    def change(metadata: Metadata) -> None:
        entry: Any = metadata.state_dict_metadata["w"]
        entry.chunks = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in parts]
        for box in parts:
            metadata.storage_data.setdefault(MetadataIndex("w", box.offsets), metadata.storage_data[FIRST])

    return change


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([*rows(2, 6, 4)[:2]], "hold 16 elements, its shape"),
        ([Box((0, 0), (4, 4)), Box((2, 0), (4, 4))], "hold 32 elements, its shape"),
        ([Box((0, 0), (3, 4)), Box((2, 0), (3, 4))], "overlap"),
        ([Box((0, 0), (2, 4)), Box((2, 0), (2, 4)), Box((5, 0), (2, 4))], "is outside its shape"),
        ([Box((0, 0), (2, 4)), Box((2, 0), (2, 4)), Box((2**50, 0), (2, 4))], "is outside its shape"),
        ([], "hold 0 elements, its shape"),
    ],
)
def test_shards_that_do_not_tile_their_tensor_raise_corrupt_error(parts: list[Box], message: str) -> None:
    checkpoint = reshard.open(whole(chunks(*parts)))
    with pytest.raises(CorruptCheckpointError, match=rf"'w'.*{message}"):
        checkpoint.read("w")
    assert same(checkpoint.read("v"), V)


@pytest.mark.parametrize("offset", [0, 5, 2**59])
@pytest.mark.parametrize("length", [10**6, 2**59])
def test_shard_that_ends_after_its_object_allocates_no_memory(length: int, offset: int) -> None:
    checkpoint = reshard.open(whole(placed(length=length, offset=offset)))
    with pytest.raises(
        CorruptCheckpointError, match=r"'w': object '__0_0\.distcp' in memory has \d+ bytes, and should"
    ):
        checkpoint.read("w")
    assert same(checkpoint.read("v"), V)


def test_tensor_larger_than_its_objects_allocates_no_memory() -> None:
    def change(metadata: Metadata) -> None:
        entry: Any = metadata.state_dict_metadata["w"]
        entry.size = torch.Size((2**30, 2**20))
        entry.chunks = [ChunkStorageMetadata(torch.Size((0, 0)), entry.size)]
        metadata.storage_data[FIRST] = _StorageInfo("__0_0.distcp", 0, 2**52)

    checkpoint = reshard.open(whole(change))
    for box in (None, Box((5, 0), (2**25, 2**20))):
        with pytest.raises(CorruptCheckpointError, match="it was cut short, or the metadata is damaged"):
            checkpoint.read("w", box)


def test_value_larger_than_its_object_allocates_no_memory() -> None:
    store = whole(
        lambda metadata: metadata.storage_data.update({MetadataIndex("step"): _StorageInfo("__0_0.distcp", 0, 2**37)})
    )
    with pytest.raises(CorruptCheckpointError, match=r"^'step': object '__0_0\.distcp'"):
        reshard.open(store).read_value("step")


def test_empty_shard_raises_corrupt_error() -> None:
    with pytest.raises(CorruptCheckpointError, match="a chunk of 'w' has an impossible length"):
        reshard.open(whole(placed(length=0))).read("w")


def test_missing_object_raises_corrupt_error() -> None:
    store = whole()
    del store.content["__1_0.distcp"]
    checkpoint = reshard.open(store)
    with pytest.raises(CorruptCheckpointError, match=r"^'w': object '__1_0\.distcp' is missing in memory"):
        checkpoint.read("w")
    assert same(checkpoint.read("w", Box((4, 0), (2, 4))), W[4:])


def test_truncated_object_raises_corrupt_error() -> None:
    store = whole()
    data = store.content["__2_0.distcp"]
    for length in (0, 1, 100, len(data) - 1):
        store.content["__2_0.distcp"] = data[:length]
        with pytest.raises(CorruptCheckpointError, match=rf"^'w': object '__2_0\.distcp' in memory has {length} bytes"):
            reshard.open(store).read("w")


def replaced(value: object) -> MemoryStore:
    """Return a checkpoint whose first shard of w is a value, saved by torch."""
    data = value if isinstance(value, bytes) else torch_saved(value)
    store = whole(placed(relative_path="other.distcp", offset=0, length=len(data)))
    store.content["other.distcp"] = data
    return store


def of_pickle(pickled: bytes) -> bytes:
    """Return a torch.save file with a pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
    return out.getvalue()


def deflated(data: bytes) -> bytes:
    """Return a zip with compressed records."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        for info in archive.infolist():
            packed.writestr(info.filename, archive.read(info))
    return out.getvalue()


@pytest.mark.filterwarnings("ignore:Validating sparse")  # torch 2.14
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2, 5), r"expected a tensor of float32 \(2, 4\), got a tensor of torch.float32 \(2, 5\)"),
        (torch.ones(8), r"got a tensor of torch.float32 \(8,\)"),
        (torch.ones(2, 4, dtype=torch.int32), r"got a tensor of torch.int32 \(2, 4\)"),
        (torch.empty(2, 4, device="meta"), "torch.strided on meta"),
        (torch.ones(2, 4).to_sparse(), "torch.sparse_coo on cpu"),
        ([torch.ones(2, 4)], "got list"),
        (7, "got int"),
        (deflated(torch_saved(torch.ones(2, 4))), "is compressed; torch.save compresses none"),
        (of_pickle(b"\x80\x02})" + b"\x85" * 3_000_000 + b"K\x01s."), "tuples are nested"),
        (of_pickle(b"\x80\x02K"), "cannot be read"),
        (b"x" * 2000, "cannot be read"),
        (b"PK\x03\x04" + b"\xff" * 2000, "cannot be read"),
        (zstandard.compress(b"x"), "cannot be read"),
    ],
)
def test_shard_with_other_content_raises_corrupt_error(value: object, message: str) -> None:
    checkpoint = reshard.open(replaced(value))
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        checkpoint.read("w")
    assert "'w'" in str(caught.value)
    assert same(checkpoint.read("w", Box((2, 0), (2, 4))), W[2:4])


def test_swapped_shards_of_different_shapes_raise_corrupt_error() -> None:
    def change(metadata: Metadata) -> None:
        data, other = metadata.storage_data, MetadataIndex("v", (0, 0))
        data[FIRST], data[other] = data[other], data[FIRST]

    with pytest.raises(CorruptCheckpointError, match=re.escape("got a tensor of torch.float32 (3, 4)")):
        reshard.open(whole(change)).read("w")


@pytest.mark.parametrize("declared", [True, False])
def test_zstd_bomb_raises_corrupt_error_early(declared: bool) -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(2**27))
    assert len(bomb) < 2**15
    store = whole(
        placed(
            relative_path="bomb.distcp",
            offset=0,
            length=len(bomb),
            transform_descriptors=["stream.zstd/1"] if declared else None,
        )
    )
    store.content["bomb.distcp"] = bomb
    message = f"holds more than {32 + 65536} bytes"
    with taking_at_most(2**20), pytest.raises(CorruptCheckpointError, match=message):
        reshard.open(store).read("w")
