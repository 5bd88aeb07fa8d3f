"""Conversion in one process: every pair of formats keeps every entry, and torch and safetensors load the result."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import reshard
from reshard.errors import DtypeError, UnavailableError, UnsafeValueError
from reshard.planner.entries import ITEMSIZES
from reshard.storage.formats.detect import open_source
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.testing import Call, RecordingStore
from tests.conversion.samples import (
    KIB,
    SOURCES,
    UNSAFE,
    assert_clean,
    assert_converted,
    assert_equal,
    by_name,
    cut_small,
    names_in,
    save_native,
    tensors_of,
    values_of,
)
from tests.samples import same, sample

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return one state dict saved in every format."""
    root, state = tmp_path_factory.mktemp("sources"), {**tensors_of(), **values_of()}
    return {name: save(state, root / name) for name, save in SOURCES.items()}


def expected_of(source: str, target: str) -> dict[str, Any]:
    state: dict[str, Any] = dict(tensors_of())
    if "safetensors" not in (source, target):
        state |= values_of()
    if source == "torch.save":
        state = {key: value for key, value in state.items() if key not in UNSAFE}
    return by_name(state)


@pytest.mark.parametrize("budget_bytes", [None, 16 * KIB])
@pytest.mark.parametrize("target", ["reshard", "dcp", "safetensors"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_pair_of_formats_keeps_every_value(
    source: str,
    target: str,
    budget_bytes: int | None,
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut_small(monkeypatch)
    dst = tmp_path / "dst"
    report = reshard.convert(sources[source], dst, format=target, max_file_bytes=200 * KIB, budget_bytes=budget_bytes)
    expected = expected_of(source, target)
    assert_converted(dst, expected, target)
    assert_clean(names_in(dst), dst, target)
    there = open_source(sources[source])
    left_out = {entry.name for entry in there.entries} - expected.keys()
    assert set(report.dropped) == left_out
    if target != "safetensors" and there.paths:
        assert open_source(dst).paths == there.paths
    tensors = sum(value.nbytes for value in expected.values() if isinstance(value, torch.Tensor))
    assert report.total.bytes_needed >= tensors
    assert report.total.bytes_written == sum(path.stat().st_size for path in dst.rglob("*") if path.is_file())


@pytest.mark.parametrize("store_kind", [LocalStore, MemoryStore])
def test_large_tensors_are_cut_into_several_units(
    store_kind: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch)
    state = {"large": torch.randn(1000, 300), "small": {f"b{i}": torch.randn(20) for i in range(50)}}
    src = save_native(state, tmp_path / "src")
    units = {}
    for format in ("reshard", "dcp", "safetensors"):
        memory = store_kind(tmp_path / format) if store_kind is LocalStore else store_kind()
        store = RecordingStore(memory)
        reshard.convert(src, store, format=format, max_file_bytes=100 * KIB)
        units[format] = sum(call.method == "create" for call in store.calls)
        assert_converted(memory, by_name(state), format)
    assert units["reshard"] == units["dcp"] >= 4
    assert units["safetensors"] == 2


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", ITEMSIZES)
def test_every_dtype_is_converted_or_refused_before_anything_is_written(dtype: str, tmp_path: Path) -> None:
    state = {"matrix": sample(dtype, 5, 6), "scalar": sample(dtype), "empty": sample(dtype, 2, 0)}
    src = save_native(state, tmp_path / "src")
    for format in ("reshard", "dcp"):
        reshard.convert(src, tmp_path / format, format=format)
        assert_converted(tmp_path / format, state, format)
    if dtype in ("complex32", "complex128", "float4_e2m1fn_x2"):
        with pytest.raises(DtypeError, match=r"which safetensors does not have|safetensors has no shape for it"):
            reshard.convert(src, tmp_path / "safetensors", format="safetensors")
        assert not (tmp_path / "safetensors").exists()
        with pytest.raises(DtypeError, match=r"Leave it out with exclude= \(--exclude\)") as caught:
            reshard.convert(src, tmp_path / "safetensors", format="safetensors")
        assert ("cast it to complex64" in str(caught.value)) == (dtype == "complex128")
        if dtype == "float4_e2m1fn_x2":
            reshard.convert(src, tmp_path / "part", format="safetensors", exclude="scalar")
            assert set(reshard.open(tmp_path / "part").tensors) == {"matrix", "empty"}
    else:
        reshard.convert(src, tmp_path / "safetensors", format="safetensors")
        assert_converted(tmp_path / "safetensors", state, "safetensors")


@pytest.mark.parametrize("source", ["native", "dcp"])
def test_dcp_load_reads_a_converted_checkpoint_into_a_nested_state_dict(
    source: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch)
    dst = tmp_path / "dst"
    reshard.convert(sources[source], dst, format="dcp")
    saved: dict[str, Any] = {**tensors_of(), **values_of()}
    state: dict[str, Any] = {**tensors_of(), **dict.fromkeys(values_of())}
    state["groups"] = [{"params": None, "name": None}]
    for value in by_name(state).values():
        if isinstance(value, torch.Tensor):
            value.view(torch.uint8).zero_() if value.dim() else value.fill_(0)
    dcp.load(state, storage_reader=FileSystemReader(dst))
    assert by_name(state).keys() == by_name(saved).keys()
    for name, value in by_name(saved).items():
        assert_equal(by_name(state)[name], value)
    dcp_to_torch_save(dst, tmp_path / "state.pt")
    nested = torch.load(tmp_path / "state.pt", weights_only=False)
    assert nested.keys() == saved.keys()
    assert_equal(nested["layers"][1], saved["layers"][1])
    assert nested["groups"] == saved["groups"]


def test_safetensors_library_loads_a_converted_checkpoint(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch)
    most = 150 * KIB
    reshard.convert(sources["native"], tmp_path / "dst", format="safetensors", max_file_bytes=most)
    index = json.loads((tmp_path / "dst" / INDEX).read_text())
    expected = by_name(tensors_of())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
    assert index["weight_map"].keys() == expected.keys()
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 3
    for file in files:
        with safe_open(tmp_path / "dst" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            here = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        assert {name for name, at in index["weight_map"].items() if at == file} == here.keys()
        assert sum(value.nbytes for value in here.values()) <= most or len(here) == 1
        for name, value in here.items():
            assert_equal(value, expected[name])


def test_tensors_in_safetensors_files_are_aligned_to_their_itemsize(tmp_path: Path) -> None:
    state = {"a": sample("uint8", 3), "b": sample("float32", 2), "c": sample("float16", 1), "d": sample("float64", 1)}
    reshard.convert(save_native(state, tmp_path / "src"), tmp_path / "dst", format="safetensors")
    data = (tmp_path / "dst" / "model-00001-of-00001.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for name, value in state.items():
        assert (8 + length + header[name]["data_offsets"][0]) % value.itemsize == 0, name


@pytest.mark.parametrize("format", ["reshard", "dcp"])
def test_compressed_value_that_needs_unsafe_pickle_is_kept(format: str, tmp_path: Path) -> None:
    state = {"w": torch.randn(3, 4), **values_of()}
    writer = FileSystemWriter(tmp_path / "src", sync_files=False, _extensions=[ZStandard()])
    dcp.save(dict(state), storage_writer=writer)
    report = reshard.convert(tmp_path / "src", tmp_path / "dst", format=format)
    assert_converted(tmp_path / "dst", by_name(state), format)
    refused = set()
    for name in reshard.open(tmp_path / "dst").value_names:
        try:
            reshard.open(tmp_path / "dst").read_value(name)
        except UnsafeValueError:
            refused.add(name)
    assert refused == set(report.pickled) != set()
    if format == "dcp":
        loaded: dict[str, Any] = {"third": None}
        dcp.load(loaded, storage_reader=FileSystemReader(tmp_path / "dst"))
        assert loaded["third"] == state["third"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("format", ["reshard", "dcp", "safetensors"])
def test_dtype_casts_floats_only(
    dtype: torch.dtype, format: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch)
    groups = ("dtypes", "large", "empty")
    reshard.convert(sources["native"], tmp_path / "dst", format=format, dtype=dtype, include=groups)
    expected = {
        name: value.to(dtype) if value.is_floating_point() and "_x2" not in str(value.dtype) else value
        for name, value in by_name(tensors_of()).items()
        if name.partition(".")[0] in groups
    }
    assert {value.dtype for value in expected.values()} > {dtype, torch.int64, torch.bool, torch.complex64}
    assert_converted(tmp_path / "dst", expected, format)


def test_cast_from_float32_to_bfloat16_reads_only_heads(tmp_path: Path) -> None:
    state = {"w": torch.randn(2000, 500)}
    reshard.save(dict(state), tmp_path / "src")
    report = reshard.convert(tmp_path / "src", tmp_path / "dst", dtype=torch.bfloat16)
    assert report.total.bytes_fetched < 0.45 * state["w"].nbytes
    assert_converted(tmp_path / "dst", {"w": state["w"].to(torch.bfloat16)}, "reshard")


@pytest.mark.parametrize("format", ["reshard", "dcp", "safetensors"])
def test_unit_is_written_again_after_a_temporary_error(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write of an object fails once."""
    cut_small(monkeypatch)
    state = {"large": torch.randn(300, 300), "small": torch.randn(20), "step": 3}
    src = save_native(state, tmp_path / "src")
    expected = {name: value for name, value in state.items() if format != "safetensors" or name != "step"}
    for at in range(8):
        left = at

        def fail_once(call: Call) -> None:
            nonlocal left
            if call.method == "write":
                left -= 1
                if left == -1:
                    raise UnavailableError("injected")

        memory = MemoryStore()
        reshard.convert(src, RecordingStore(memory, fail_once), format=format)
        assert left < 0 or at > 2
        assert_converted(memory, expected, format)
        assert_clean(set(memory.content), memory, format)


@pytest.mark.parametrize("format", ["reshard", "dcp", "safetensors"])
def test_empty_checkpoint_is_converted(format: str, tmp_path: Path) -> None:
    reshard.save({}, tmp_path / "src")
    reshard.convert(tmp_path / "src", tmp_path / "dst", format=format)
    assert_converted(tmp_path / "dst", {}, format)


OF_MANY_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "square": {"w": (4096, 2048)},
    "wide": {"w": (512, 16384)},
    "tall": {"w": (16384, 512)},
    "cube": {"w": (8, 1024, 1024)},
    "several": {**{f"layers.{i}.up": (1024, 512) for i in range(4)}, **{f"layers.{i}.norm": (512,) for i in range(4)}},
    "large and small": {"embed": (8192, 512), **{f"layers.{i}.down": (512, 1024) for i in range(4)}, "scale": ()},
}


def reads_of(store: RecordingStore) -> int:
    """Return the number of reads of data objects."""
    suffixes = (".shard", ".safetensors", ".distcp", ".pt")
    return sum(call.method == "read" and call.name.endswith(suffixes) for call in store.calls)


@pytest.mark.parametrize("shapes", OF_MANY_SHAPES)
@pytest.mark.parametrize("source", ["none", "zstd", "dcp", "safetensors", "torch"])
def test_conversion_needs_no_more_requests_than_a_load(source: str, shapes: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in OF_MANY_SHAPES[shapes].items()}
    location = MemoryStore()
    if source == "torch":
        torch.save(state, tmp_path / "model.pt")
        location.content["model.pt"] = (tmp_path / "model.pt").read_bytes()
    elif source in ("none", "zstd"):
        reshard.save(dict(state), location, codec=source)
    else:
        native = MemoryStore()
        reshard.save(dict(state), native)
        reshard.convert(native, location, format=source)
    store = RecordingStore(location)
    reshard.load({name: torch.zeros_like(values) for name, values in state.items()}, store)
    load = reads_of(store)
    files = sum(not name.startswith((".", "model.safetensors.index", "manifest")) for name in location.content)
    samples = 0 if source in ("none", "zstd") else 4 * files  # they show whether the source has been overwritten
    for format in ("reshard", "dcp", "safetensors"):
        for target in (MemoryStore(), tmp_path / format):
            store = RecordingStore(location)
            reshard.convert(store, target, format=format)
            assert reads_of(store) <= load + samples, (format, type(target))
            found = reshard.open(target).state_dict()
            assert all(same(value, state[name]) for name, value in by_name(found).items())


def test_many_values_are_read_with_few_requests() -> None:
    location = MemoryStore()
    reshard.save(
        {f"layers.{i}": {"extra": torch.Size((i, i)), "step": i, "w": torch.ones(2)} for i in range(200)}, location
    )
    for format in ("reshard", "dcp"):
        store = RecordingStore(location)
        reshard.convert(store, MemoryStore(), format=format)
        assert reads_of(store) < 10


def test_dcp_shard_does_not_contain_the_storage_of_its_tensor(tmp_path: Path) -> None:
    """Several shards are read as one tensor."""
    location = MemoryStore()
    reshard.save({"w": torch.randn(4096, 4096)}, location, codec="none")
    reshard.convert(location, tmp_path / "dst", format="dcp")
    assert sum(path.stat().st_size for path in (tmp_path / "dst").iterdir()) < 1.01 * 4 * 4096 * 4096


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_tensors_of_unsupported_dtypes_can_be_left_out(tmp_path: Path) -> None:
    state = {"a": torch.ones(3, dtype=torch.complex128), "b": torch.ones(2), "c": torch.ones(1, dtype=torch.complex32)}
    src = save_native(state, tmp_path / "src")
    with pytest.raises(
        DtypeError, match=r"'a' has dtype complex128, .*nor those of 1 more tensors\). Leave it out with exclude="
    ):
        reshard.convert(src, tmp_path / "dst", format="safetensors")
    report = reshard.convert(src, tmp_path / "dst", format="safetensors", include="b")
    assert report.dropped == ("a", "c")
    assert_converted(tmp_path / "dst", {"b": state["b"]}, "safetensors")
