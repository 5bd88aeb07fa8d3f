"""Checkpoints that torch.distributed.checkpoint writes: all their contents are read, by byte ranges."""

from __future__ import annotations

import datetime
import io
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed._shard.sharded_tensor.metadata as old_home
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

import reshard
from reshard.errors import CorruptCheckpointError, UnsafeValueError
from reshard.planner.chunk_reads import WantedBox
from reshard.planner.coalesce import GapLimits
from reshard.planner.entries import ITEMSIZES
from reshard.planner.read_plan import plan_reads
from reshard.storage.formats.detect import open_source
from reshard.storage.formats.torch_save.zip_layout import MAX_PREAMBLE_BYTES, locate_values
from reshard.storage.reading.executor import execute
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.testing import RecordingStore
from tests.dcp_checkpoints import METADATA, OfRank, put_together, rows
from tests.samples import assert_holds, boxes, same, sample

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

WRITER_OPTIONS: dict[str, dict[str, Any]] = {
    "as by default": {},
    "a file for each tensor": {"single_file_per_rank": False},
    "three threads": {"thread_count": 3},
    "safetensors": {"serialization_format": SerializationFormat.SAFETENSORS},
    "zstd": {"_extensions": [ZStandard()]},
}


def save(state: dict[str, Any], folder: Path, **options: Any) -> str:
    dcp.save(state, storage_writer=FileSystemWriter(folder, sync_files=False, **options))
    return str(folder)


def read_box(checkpoint: str, name: str, box: reshard.Box, dtype: torch.dtype, max_over_read: float) -> torch.Tensor:
    """Read a box with a bound on over-reads."""
    source = open_source(checkpoint)
    index = source.index([WantedBox(name, box)])
    out = torch.empty(box.sizes, dtype=dtype)
    gap_limits = GapLimits(10**9 if max_over_read else 0, max_over_read)
    execute(plan_reads(index, [WantedBox(name, box)], gap_limits=gap_limits), index, source.store, [out])
    return out


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("options", WRITER_OPTIONS)
def test_every_dtype_and_shape_round_trips(options: str, tmp_path: Path) -> None:
    known = set(ITEMSIZES) - ({"complex32", "complex128"} if options == "safetensors" else set())
    tensors = {
        f"{dtype} {shape}": sample(dtype, *shape)
        for dtype, shape in itertools.product(sorted(known), ((), (7,), (0, 3), (5, 8)))
        if not (options == "safetensors" and dtype == "float4_e2m1fn_x2" and shape == ())
    }
    assert_holds(reshard.open(save(dict(tensors), tmp_path / "x", **WRITER_OPTIONS[options])), tensors)


IMAGES = torch.randn(2, 3, 4, 5)
STORED_OTHERWISE = {
    "transposed": torch.randn(6, 4).t(),
    "channels last": IMAGES.to(memory_format=torch.channels_last),
    "permuted": torch.randn(3, 4, 5).permute(2, 0, 1),
    "rows of another": torch.randn(10, 4)[3:7],
    "columns of another": torch.randn(10, 8)[:, 2:5],
    "every second": torch.randn(20)[::2],
    "expanded": torch.arange(3).expand(4, 3),
    "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
    "parameter": torch.nn.Parameter(torch.randn(3, 2)),
    "requires grad": torch.randn(4, requires_grad=True),
}


@pytest.mark.slow
# The safetensors writer only accepts contiguous tensors.
@pytest.mark.parametrize("options", [options for options in WRITER_OPTIONS if options != "safetensors"])
def test_tensors_of_any_memory_layout_round_trip(options: str, tmp_path: Path) -> None:
    uri = save(dict(STORED_OTHERWISE), tmp_path / "x", **WRITER_OPTIONS[options])
    assert_holds(reshard.open(uri), STORED_OTHERWISE)
    for name in ("transposed", "channels last", "conjugate"):
        for box in boxes(tuple(STORED_OTHERWISE[name].shape)):
            assert same(reshard.open(uri).read(name, box), STORED_OTHERWISE[name][box.slices]), (name, box)


class Pickled:
    def __init__(self, value: int) -> None:
        self.value = value


@pytest.mark.parametrize("options", WRITER_OPTIONS)
def test_values_that_are_not_tensors_round_trip(options: str, tmp_path: Path) -> None:
    state = {
        "step": 7,
        "rate": 0.5,
        "name": "x",
        "nothing": None,
        "nested": {"betas": (0.9, 0.95), "list": [1, [2, 3]], "bytes": b"\x00\xff"},
        "when": datetime.timedelta(seconds=3),
        "pickled": Pickled(5),
        "w": torch.ones(3),
    }
    checkpoint = reshard.open(save(state, tmp_path / "x", **WRITER_OPTIONS[options]))
    assert checkpoint.read("w").equal(torch.ones(3))
    found = {name: checkpoint.read_value(name) for name in checkpoint.value_names if name not in ("when", "pickled")}
    assert found == {
        "step": 7, "rate": 0.5, "name": "x", "nothing": None, "nested.betas": (0.9, 0.95),
        "nested.list": [1, [2, 3]], "nested.bytes": b"\x00\xff",
    }  # fmt: skip
    for name in ("when", "pickled"):
        with pytest.raises(UnsafeValueError, match=f"'{name}'"):
            checkpoint.read_value(name)
    assert checkpoint.read_value("when", allow_pickle=True) == state["when"]
    assert checkpoint.read_value("pickled", allow_pickle=True).value == 5


def test_nested_state_has_the_names_of_dcp_and_round_trips(tmp_path: Path) -> None:
    state = {"model": {"a.b": torch.ones(2)}, "list": [torch.zeros(1), {"x": 1}], "optim": {3: torch.ones(1)}}
    source = open_source(save(state, tmp_path / "x"))
    assert dict(source.paths) == {
        "model.a.b": ("model", "a.b"),
        "list.0": ("list", 0),
        "list.1.x": ("list", 1, "x"),
        "optim.3": ("optim", "3"),
    }
    again: dict[str, Any] = {
        "model": {"a.b": torch.zeros(2)},
        "list": [torch.ones(1), {"x": 0}],
        "optim": {"3": torch.zeros(1)},
    }
    dcp.load(again, storage_reader=reshard.StorageReader(str(tmp_path / "x")))
    assert again["model"]["a.b"].equal(torch.ones(2))
    assert again["list"][1] == {"x": 1}


@pytest.mark.parametrize("over_read", [0.0, 1e9])
@pytest.mark.parametrize("shape", [(), (9,), (8, 7), (5, 4, 6)])
@pytest.mark.parametrize("options", ["as by default", "safetensors", "zstd"])
def test_reading_a_box_equals_slicing_the_tensor(
    options: str, shape: tuple[int, ...], over_read: float, tmp_path: Path
) -> None:
    values = torch.randn(shape)
    uri = save({"before": torch.ones(3), "w": values}, tmp_path / "x", **WRITER_OPTIONS[options])
    for box in boxes(shape):
        assert same(read_box(uri, "w", box, values.dtype, over_read), values[box.slices]), box


@pytest.mark.parametrize("over_read", [0.0, 1e9])
@pytest.mark.parametrize(
    "parts",
    [
        rows(3, 10, 6),
        [reshard.Box((0, 0), (10, 2)), reshard.Box((0, 2), (10, 4))],
        [
            reshard.Box((0, 0), (4, 5)),
            reshard.Box((0, 5), (4, 1)),
            reshard.Box((4, 0), (6, 1)),
            reshard.Box((4, 1), (6, 5)),
        ],
    ],
)
def test_reading_a_box_across_shards_equals_slicing_the_tensor(
    parts: list[reshard.Box], over_read: float, tmp_path: Path
) -> None:
    values = torch.randn(10, 6)
    for name, data in put_together({"w": (values, parts)}).content.items():
        (tmp_path / name).write_bytes(data)
    for box in boxes((10, 6)):
        assert same(read_box(str(tmp_path), "w", box, values.dtype, over_read), values[box.slices]), box


def test_only_needed_shards_are_located(tmp_path: Path) -> None:
    tensors = {"v": torch.randn(400, 64), "w": torch.randn(400, 64)}
    parts = {name: (values, rows(100, 400, 64)) for name, values in tensors.items()}
    for name, data in put_together(parts).content.items():
        (tmp_path / name).write_bytes(data)
    store = RecordingStore(LocalStore(tmp_path))
    checkpoint = reshard.open(store)
    assert {call.name for call in store.calls if call.method in ("read", "size")} == {METADATA, "manifest.reshard"}
    store.calls.clear()
    box = reshard.Box((110, 0), (30, 64))
    assert checkpoint.read("w", box).equal(tensors["w"][110:140])
    assert {call.name for call in store.calls} == {"__1_0.distcp"}
    head, values = [(call.start, call.stop) for call in store.calls if call.method == "read"]
    assert head[1] - head[0] == 1024
    assert values[1] - values[0] == 30 * 64 * 4
    store.calls.clear()
    assert checkpoint.read("w", box).equal(tensors["w"][110:140])
    assert len(store.calls) == 1, "what was found out is kept"


def test_save_without_collectives_is_read_from_the_metadata_of_each_rank(tmp_path: Path) -> None:
    dcp.save({"step": 1}, storage_writer=FileSystemWriter(tmp_path / "torch"), use_collectives=False)
    assert reshard.open(tmp_path / "torch").read_value("step") == 1
    for rank in range(12):
        state = {f"of rank {rank}": torch.full((3,), float(rank)), "shared": torch.ones(2), "step": rank}
        dcp.save(state, storage_writer=OfRank(str(tmp_path / "x"), rank), use_collectives=False)
    assert not (tmp_path / "x" / METADATA).exists()
    checkpoint = reshard.open(tmp_path / "x")
    expected = {f"of rank {rank}": torch.full((3,), float(rank)) for rank in range(12)}
    assert_holds(checkpoint, {**expected, "shared": torch.ones(2)})
    assert checkpoint.read_value("step") == 0


def test_metadata_of_ranks_that_contradict_each_other_raises_corrupt_error(tmp_path: Path) -> None:
    for rank, values in enumerate((torch.ones(3), torch.ones(4))):
        dcp.save({"w": values}, storage_writer=OfRank(str(tmp_path), rank), use_collectives=False)
    with pytest.raises(CorruptCheckpointError, match=r"'__1\.metadata' in .* another as float32 \(4,\)"):
        reshard.open(tmp_path)


def without_new_fields(metadata: Metadata) -> None:
    for name in ("version", "storage_meta", "planner_data"):
        del metadata.__dict__[name]


def with_paths(metadata: Metadata) -> None:
    assert metadata.storage_meta is not None
    metadata.storage_meta.checkpoint_id = Path("/some/where")


def with_strings(metadata: Metadata) -> None:
    assert metadata.storage_meta is not None
    metadata.storage_meta.checkpoint_id = "/some/where"


def with_properties_of_old(metadata: Metadata) -> None:
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            entry.properties = old_home.TensorProperties(dtype=entry.properties.dtype)  # type: ignore[assignment]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("change", [without_new_fields, with_paths, with_strings, with_properties_of_old])
def test_metadata_of_other_torch_versions_is_read(change: Any, protocol: int, tmp_path: Path) -> None:
    save({"w": torch.randn(3), "step": 4}, tmp_path)
    metadata = pickle.loads((tmp_path / METADATA).read_bytes())  # noqa: S301
    change(metadata)
    (tmp_path / METADATA).write_bytes(pickle.dumps(metadata, protocol))
    checkpoint = reshard.open(tmp_path)
    assert checkpoint.tensors["w"].shape == (3,)
    assert checkpoint.read_value("step") == 4


def test_many_tensors_in_few_files_round_trip(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": torch.full((2, 3), float(i)) for i in range(1500)}
    checkpoint = reshard.open(save(dict(tensors), tmp_path / "x"))
    state = {name: torch.empty(2, 3) for name in tensors}
    report = reshard.load(dict(state), tmp_path / "x")
    assert all(state[name].equal(values) for name, values in tensors.items())
    assert report.local.bytes_needed == 1500 * 24
    assert checkpoint.info["files"] == 1


def test_the_pickle_of_a_tensor_may_contain_the_magic_of_a_zip() -> None:
    shape = (int.from_bytes(b"PK\3\4", "little"),)
    data = io.BytesIO()
    torch.save(torch.zeros(1, dtype=torch.uint8).expand(shape).clone(), data)
    begin = locate_values(data.getvalue()[:MAX_PREAMBLE_BYTES], len(data.getvalue()), "uint8", shape)
    assert begin is not None
    assert begin + shape[0] <= len(data.getvalue())
