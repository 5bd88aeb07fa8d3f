"""torch.save files as checkpoints: their contents are read by byte ranges, or raise an error if that is impossible."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import _utils

import reshard
from reshard.errors import (
    CheckpointError,
    CorruptCheckpointError,
    DtypeError,
    UnsafeValueError,
    UnsupportedFormatError,
)
from reshard.planner.entries import ITEMSIZES
from reshard.storage.formats.torch_save import torch_save_source
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.testing import RecordingStore
from tests.dcp_checkpoints import torch_saved
from tests.samples import Runs, assert_holds, boxes, same, sample


def stored(data: bytes) -> MemoryStore:
    store = MemoryStore()
    store.content["model.pt"] = data
    return store


def opened(data: bytes) -> reshard.Checkpoint:
    return reshard.open(stored(data))


def read_all(checkpoint: reshard.Checkpoint) -> dict[str, Any]:
    values: dict[str, Any] = {name: checkpoint.read(name) for name in checkpoint.tensors}
    return values | {name: checkpoint.read_value(name) for name in checkpoint.value_names}


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", ITEMSIZES)
def test_every_dtype_round_trips(dtype: str, tmp_path: Path) -> None:
    tensors = {str(shape): sample(dtype, *shape) for shape in ((), (7,), (0, 3), (5, 8))}
    torch.save(tensors, tmp_path / "model.pt")
    assert_holds(reshard.open(tmp_path / "model.pt"), tensors)


def test_nested_state_has_the_names_of_dcp() -> None:
    state = {
        "model": collections.OrderedDict({"a.b": torch.ones(2), "c": torch.zeros(1)}),
        "optim": {"state": {0: {"exp_avg": torch.full((3,), 2.0), "step": 5}}, "groups": [{"betas": (0.9, 0.95)}]},
        "list": [torch.ones(1), "x"],
        "rng": torch.arange(5, dtype=torch.uint8),
        "nothing": None,
        "size": torch.Size((2, 3)),
        "dtype": torch.bfloat16,
    }
    checkpoint = opened(torch_saved(state))
    assert_holds(
        checkpoint,
        {
            "model.a.b": torch.ones(2),
            "model.c": torch.zeros(1),
            "optim.state.0.exp_avg": torch.full((3,), 2.0),
            "list.0": torch.ones(1),
            "rng": torch.arange(5, dtype=torch.uint8),
        },
    )
    assert {name: checkpoint.read_value(name) for name in checkpoint.value_names} == {
        "optim.state.0.step": 5,
        "optim.groups.0.betas": (0.9, 0.95),
        "list.1": "x",
        "nothing": None,
        "size": torch.Size((2, 3)),
        "dtype": torch.bfloat16,
    }


def test_model_and_optimizer_round_trip() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    model[2](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    checkpoint = opened(torch_saved({"model": model.state_dict(), "optim": optimizer.state_dict()}))
    for name, values in model.state_dict().items():
        assert same(checkpoint.read(f"model.{name}"), values)
    for key, state in optimizer.state_dict()["state"].items():
        for name, values in state.items():
            assert same(checkpoint.read(f"optim.state.{key}.{name}"), values)
    assert checkpoint.read_value("optim.param_groups.0.betas") == (0.9, 0.999)


WHOLE = torch.randn(10, 12)
LYING_OTHERWISE = {
    "rows": WHOLE[3:7],
    "transposed": WHOLE.t(),
    "rows transposed": WHOLE[3:7].t(),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "permuted": torch.randn(3, 4, 5).permute(2, 0, 1),
    "one column": WHOLE[:, :1].t()[:, 2:3],
    "parameter": torch.nn.Parameter(torch.randn(3, 2)),
    "requires grad": torch.randn(4, requires_grad=True),
}


def test_tensors_of_any_layout_in_the_file_round_trip() -> None:
    checkpoint = opened(torch_saved(LYING_OTHERWISE))
    assert_holds(checkpoint, LYING_OTHERWISE)
    for name, values in LYING_OTHERWISE.items():
        for box in boxes(tuple(values.shape)):
            assert same(checkpoint.read(name, box), values[box.slices]), (name, box)


def test_tied_weights_are_read_from_their_one_storage() -> None:
    values = torch.randn(100, 10)
    data = torch_saved({"in": values, "out": values, "part": values[50:]})
    assert len(data) < 6000
    assert_holds(opened(data), {"in": values, "out": values, "part": values[50:]})


CONJUGATE = torch.randn(3, dtype=torch.complex64).conj()
REFUSED = {
    "expanded": (torch.arange(3).expand(4, 3), r"with strides \(0, 1\) for its shape \(4, 3\)"),
    "every second": (torch.arange(10)[::2], r"with strides \(2,\) for its shape \(5,\)"),
    "columns": (WHOLE[:, 2:5], r"with strides \(12, 1\) for its shape \(10, 3\)"),
    "conjugate": (CONJUGATE, "as the conjugate or the negative of what is stored"),
    "negative": (torch.randn(3, dtype=torch.complex64).conj().imag, "as the conjugate or the negative"),
    "sparse": (torch.eye(3).to_sparse(), "as a Tensor of layout torch.sparse_coo"),
    "on meta": (torch.empty(3, device="meta"), "without values"),
    "in a tuple": ((1, torch.ones(2)), "as tensors inside a value that is neither a dict nor a list"),
    "in a list in a tuple": (({"x": [torch.ones(2)]},), "as tensors inside a value"),
    "storage": (torch.UntypedStorage(4), "as tensors inside a value"),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_byte_ranges_cannot_express_raise_when_read(case: str) -> None:
    value, message = REFUSED[case]
    checkpoint = opened(torch_saved({"odd": value, "w": torch.ones(3)}))
    read = checkpoint.read if "odd" in checkpoint.tensors else checkpoint.read_value
    with pytest.raises(UnsupportedFormatError, match=rf"'model\.pt' in memory has 'odd' {message}"):
        read("odd")
    assert checkpoint.read("w").equal(torch.ones(3))
    assert checkpoint.verify() == []
    state = {"w": torch.zeros(3)}
    reshard.load(state, stored(torch_saved({"odd": value, "w": torch.ones(3)})))
    assert state["w"].equal(torch.ones(3))


def quantized(kind: str) -> torch.Tensor:
    if kind == "per channel":
        scales, zeros = torch.tensor([0.1, 0.2]), torch.tensor([0, 0])
        return torch.quantize_per_channel(torch.ones(2, 3), scales, zeros, 0, torch.qint8)
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, getattr(torch, kind))


QUANTIZED = ("qint8", "quint8", "qint32", "per channel")


@pytest.mark.filterwarnings(
    "ignore:torch.quantize_per", "ignore:TypedStorage is deprecated", "ignore:.*Quantizer", "ignore:.*nested tensors"
)
@pytest.mark.parametrize("kind", [*QUANTIZED, "nested"])
def test_tensor_that_only_torch_can_load_does_not_hide_the_others(kind: str, tmp_path: Path) -> None:
    odd = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]) if kind == "nested" else quantized(kind)
    path = tmp_path / "model.pt"
    torch.save({"a": torch.ones(2), "deep": {"odd": odd}, "step": 3, "z": torch.zeros(4)}, path)
    checkpoint = reshard.open(path)
    assert_holds(checkpoint, {"a": torch.ones(2), "z": torch.zeros(4)})
    assert set(checkpoint.unreadable) == {"deep.odd"}
    assert checkpoint.damaged == ()
    assert checkpoint.verify() == []
    message = r"'model\.pt' in .* has 'deep\.odd' as a tensor of a kind that only torch\.load can read"
    with pytest.raises(UnsupportedFormatError, match=message):
        checkpoint.read("deep.odd")
    with pytest.raises(UnsupportedFormatError, match=message):
        checkpoint.state_dict()
    with pytest.raises(UnsupportedFormatError, match=message):
        reshard.load({"deep": {"odd": torch.ones(3)}}, path)
    assert checkpoint.state_dict(include="a")["a"].equal(torch.ones(2))
    with pytest.raises(UnsupportedFormatError, match=rf"{message}.*pass exclude='deep\.odd'"):
        reshard.convert(path, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    report = reshard.convert(path, tmp_path / "dst", include=["a", "z"])
    assert set(report.dropped) == {"deep.odd", "step"}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_sparse_tensor_does_not_affect_the_next_torch_load(layout: torch.layout) -> None:
    data = torch_saved({"odd": torch.eye(3).to_sparse(layout=layout), "w": torch.ones(3)})
    assert_holds(opened(data), {"w": torch.ones(3)})
    assert _utils._sparse_tensors_to_validate == []


@pytest.mark.parametrize("dtype", ["bits8", "bits16", "bits4x2"])
def test_unknown_dtype_does_not_hide_the_others(dtype: str) -> None:
    odd = torch.zeros(4, dtype=torch.uint8).view(getattr(torch, dtype))
    checkpoint = opened(torch_saved({"odd": odd, "w": torch.ones(3)}))
    assert_holds(checkpoint, {"w": torch.ones(3)})
    with pytest.raises(DtypeError, match=rf"'model\.pt' in memory has 'odd' of dtype torch\.{dtype}"):
        checkpoint.read("odd")


@pytest.mark.parametrize(
    ("value", "tensors"),
    [
        (torch.ones(3), {"value": torch.ones(3)}),
        ([torch.ones(1), torch.zeros(2)], {"value.0": torch.ones(1), "value.1": torch.zeros(2)}),
        ({}, {}),
    ],
)
def test_file_without_a_dict_has_one_entry_named_value(value: Any, tensors: dict[str, torch.Tensor]) -> None:
    assert_holds(opened(torch_saved(value)), tensors)


def test_file_of_a_number_has_one_entry_named_value() -> None:
    assert opened(torch_saved(5)).read_value("value") == 5


@pytest.mark.parametrize("value", [torch.nn.Linear(2, 2), {"m": torch.nn.Linear(2, 2)}, Runs(os.system, "touch RAN")])
def test_file_that_needs_more_of_pickle_raises_unsafe_error_and_runs_nothing(
    value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafeValueError, match=r"'model\.pt' in memory needs more of pickle .*(Linear|system)"):
        opened(torch_saved(value))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("protocol", [4, 5])
def test_protocols_that_torch_does_not_load_raise_unsafe_error(protocol: int) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2)}, buffer, pickle_protocol=protocol)
    with pytest.raises(UnsafeValueError, match="needs more of pickle"):
        opened(buffer.getvalue())


def test_format_before_torch_1_6_raises_unsupported_format_error() -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2)}, buffer, _use_new_zipfile_serialization=False)
    with pytest.raises(
        UnsupportedFormatError, match=r"'model\.pt' in memory was written before torch 1\.6.*save it again"
    ):
        opened(buffer.getvalue())


@pytest.mark.parametrize(
    "value",
    [{"a.b": torch.ones(1), "a": {"b": torch.ones(2)}}, {1: torch.ones(1), "1": torch.ones(2)}],
)
def test_two_values_with_the_same_name_raise(value: object) -> None:
    with pytest.raises(UnsupportedFormatError, match=r"'model\.pt' in memory .*two values .* have the name"):
        opened(torch_saved(value))


def test_state_that_contains_itself_raises_unsupported_format_error() -> None:
    state: dict[str, Any] = {"w": torch.ones(1)}
    state["itself"] = state
    rows: list[Any] = [torch.ones(1)]
    rows.append(rows)
    for value in (state, rows):
        with pytest.raises(UnsupportedFormatError, match=r"'model\.pt' in memory .* cannot be listed by name"):
            opened(torch_saved(value))


def test_deeply_nested_lists_raise_unsupported_format_error() -> None:
    with pytest.raises(UnsupportedFormatError, match=r"'model\.pt' in memory .* cannot be listed by name"):
        opened(zipped(data_pkl=b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."))


def test_containers_shared_a_few_hundred_times_are_read() -> None:
    config = {str(i): i for i in range(200)}
    shape = (1, 2, 3)
    state = {"layers": {str(i): {"config": config} for i in range(100)}, "shapes": [shape] * 20_000, "w": torch.ones(1)}
    checkpoint = opened(torch_saved(state))
    assert len(checkpoint.value_names) == 100 * 200 + 1
    assert checkpoint.read_value("shapes") == state["shapes"]
    assert checkpoint.read_value("layers.99.config.199") == 199


DATA = torch_saved({"w": torch.arange(6.0).reshape(2, 3), "v": torch.arange(4), "step": 3})


@pytest.mark.parametrize("length", [0, 1, 22, *range(100, len(DATA), 97), len(DATA) - 1])
def test_truncated_file_raises_corrupt_error(length: int) -> None:
    with pytest.raises(CorruptCheckpointError, match=r"'model\.pt' in memory"):
        opened(DATA[:length])


@pytest.mark.parametrize("more", [1, 7, 1000, 60_000])
def test_few_bytes_after_the_end_are_ignored_as_torch_does(more: int) -> None:
    assert opened(DATA + bytes(more)).read("w").equal(torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("more", [70_000, 500_000, 1_000_000])
def test_error_counts_many_bytes_after_the_end(more: int) -> None:
    with pytest.raises(CorruptCheckpointError, match=rf"{more} bytes too many follow its end at byte {len(DATA)}"):
        opened(DATA + bytes(more))


def test_file_truncated_after_opening_raises_corrupt_error() -> None:
    store = stored(DATA)
    checkpoint = reshard.open(store)
    store.content["model.pt"] = DATA[: DATA.index(torch.arange(6.0).numpy().tobytes()) + 23]
    with pytest.raises(CorruptCheckpointError, match=r"^'w': only 23 bytes are left of .* of object 'model\.pt'"):
        checkpoint.read("w")


def where_no_values_are() -> list[int]:
    """Return the positions of the bytes of DATA that are not values."""
    at = set(range(len(DATA)))
    for values in (torch.arange(6.0), torch.arange(4)):
        begin = DATA.index(values.numpy().tobytes())
        at -= set(range(begin, begin + values.nbytes))
    return sorted(at)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(where_no_values_are()), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes_raise_checkpoint_error_or_are_read(flips: list[tuple[int, int]]) -> None:
    data = bytearray(DATA)
    for at, by in flips:
        data[at] ^= by
    with contextlib.suppress(CheckpointError):
        read_all(opened(bytes(data)))


def zipped(method: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in records.items():
            archive.writestr(f"archive/{name.replace('__', '/').replace('data_pkl', 'data.pkl')}", data)
    return out.getvalue()


def tensor_pickle(*, offset: int = 0, size: int = 4, stride: int = 1, numel: int = 4, key: str = "0") -> bytes:
    """Return the pickle of {"w": a float32 tensor}, as torch.save writes it."""
    plain = pickle.dumps({"w": 0}, 2)
    pid = pickle.dumps(("storage", 0, key, "cpu", numel), 2)[2:-1].replace(b"K\x00", b"ctorch\nFloatStorage\n", 1)
    arguments = pickle.dumps((0, offset, (size,), (stride,), False, None), 2)[2:-1]
    arguments = arguments.replace(b"K\x00", pid + b"Q", 1)
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"
    return plain.replace(b"K\x00", tensor, 1)


def test_handmade_file_is_read() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    data = zipped(data_pkl=tensor_pickle(), version=b"3\n", data__0=values.numpy().tobytes())
    assert_holds(opened(data), {"w": values})
    assert torch.load(io.BytesIO(data), weights_only=True)["w"].equal(values)


NO_PICKLE = b"\x80\x02K\x01"
DEEP = b"\x80\x02})" + b"\x85" * 2_000_000 + b"K\x01s."


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (zipped(readme=b"x"), r"is a zip without data\.pkl: torch\.save did not write it"),
        (zipped(zipfile.ZIP_DEFLATED, data_pkl=tensor_pickle(), data__0=bytes(16)), "torch.save compresses none"),
        (zipped(data_pkl=b""), "of 0 bytes; it should have 1 to"),
        (zipped(data_pkl=NO_PICKLE), "cannot be read"),
        (zipped(data_pkl=DEEP), "tuples are nested"),
        (zipped(data_pkl=b"\x80\x02X\xff\xff\xff\x7f."), "cannot be read"),
        (zipped(data_pkl=tensor_pickle()), "does not have the values of 'w'"),
        (zipped(data_pkl=tensor_pickle(), data__0=bytes(15)), "does not have the values of 'w'"),
        (zipped(data_pkl=tensor_pickle(offset=1), data__0=bytes(16)), "does not have the values of 'w'"),
        (zipped(data_pkl=tensor_pickle(offset=-1), data__0=bytes(16)), "cannot be read"),
        (zipped(data_pkl=tensor_pickle(size=2**40, numel=2**40), data__0=bytes(16)), "does not have the values"),
        (zipped(data_pkl=tensor_pickle(size=2**62, numel=2**62), data__0=bytes(16)), "cannot be read|values"),
        (zipped(data_pkl=tensor_pickle(numel=-1), data__0=bytes(16)), "a storage '0' of -1 elements"),
        (zipped(data_pkl=tensor_pickle(numel=5), data__0=bytes(16)), "does not have the values"),
        (zipped(data_pkl=tensor_pickle(size=-4), data__0=bytes(16)), "cannot be read"),
        (zipped(data_pkl=tensor_pickle(key="../../x"), data__0=bytes(16)), "does not have the values"),
        (b"PK\x05\x06" + bytes(18), r"is a zip without data\.pkl"),
        (b"PK\x03\x04" + bytes(500), "is not a zip as torch.save writes it"),
        (b"not a zip at all", "is not a zip as torch.save writes it"),
        (b"", "is not a zip as torch.save writes it"),
    ],
)
def test_false_zip_raises_corrupt_error(data: bytes, message: str) -> None:
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        opened(data)
    assert "'model.pt' in memory" in str(caught.value)


def directory_of(data: bytes) -> int:
    """Return where the directory of a zip begins."""
    return int(struct.unpack_from("<I", data, data.rindex(b"PK\x05\x06") + 16)[0])


@pytest.mark.parametrize("value", [1, 2**31, 2**32 - 2])
@pytest.mark.parametrize("field", [20, 24, 42], ids=["compressed size", "size", "begin"])
def test_false_zip_directory_raises_corrupt_error(field: int, value: int) -> None:
    """The change is in the entry of the pickle, which is the first one in the directory."""
    data = bytearray(zipped(data_pkl=tensor_pickle(), data__0=bytes(16)))
    at = directory_of(bytes(data)) + field
    data[at : at + 4] = value.to_bytes(4, "little")
    with pytest.raises(CorruptCheckpointError, match=r"'model\.pt' in memory"):
        opened(bytes(data))


def test_other_byte_order_raises_unsupported_format_error() -> None:
    data = zipped(data_pkl=tensor_pickle(), byteorder=b"big", data__0=bytes(16))
    with pytest.raises(UnsupportedFormatError, match="has values of byte order b'big'"):
        opened(data)


@pytest.mark.slow
@pytest.mark.parametrize("tail_bytes", [0, 70_000, 100_000])
def test_directory_larger_than_the_first_read_is_completed(tail_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"layers.{i}": torch.full((2,), float(i)) for i in range(3000)}
    monkeypatch.setattr(torch_save_source, "TAIL_BYTES", tail_bytes)
    read = opened(torch_saved(tensors)).state_dict()
    assert read.keys() == tensors.keys()
    assert all(read[name].equal(tensor) for name, tensor in tensors.items())


def test_opening_reads_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_save_source, "TAIL_BYTES", 4096)
    values = torch.randn(1000, 1000)
    store = RecordingStore(stored(torch_saved({"w": values, "v": torch.ones(2)})))
    checkpoint = reshard.open(store)
    assert sum(call.stop - call.start for call in store.calls if call.name == "model.pt") < 2**17
    store.calls.clear()
    assert checkpoint.read("w", reshard.Box((500, 0), (3, 1000))).equal(values[500:503])
    assert sum(call.stop - call.start for call in store.calls) == 3 * 1000 * 4


def test_error_names_the_damaged_file_among_others(tmp_path: Path) -> None:
    path = tmp_path / "broken.pt"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(CorruptCheckpointError, match=re.escape(f"'broken.pt' in {tmp_path}")):
        reshard.open(path)
