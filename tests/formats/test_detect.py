"""Detection of formats: by the objects of a folder, by the name or first bytes of a file, or by `format`."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save as as_safetensors
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemWriter

import reshard
from reshard.errors import (
    ArgumentError,
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    MissingTensorError,
    NotCommittedError,
    UnsupportedFormatError,
)
from reshard.storage.formats import detect as module
from reshard.storage.formats.detect import FORMATS, open_source
from reshard.storage.formats.native.manifest import MANIFEST_NAME
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.testing import RecordingStore
from tests.dcp_checkpoints import METADATA, put_together, rows

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

VALUES = torch.arange(12.0).reshape(4, 3)
STATE = {"w": VALUES}


def native(folder: Path) -> None:
    reshard.save(dict(STATE), folder)


def by_dcp(folder: Path) -> None:
    dcp.save(dict(STATE), storage_writer=FileSystemWriter(folder, sync_files=False))


def by_dcp_without_collectives(folder: Path) -> None:
    writer = FileSystemWriter(folder, sync_files=False)
    dcp.save(dict(STATE), storage_writer=writer, use_collectives=False)


def safetensors(folder: Path) -> None:
    folder.mkdir()
    save_file(STATE, folder / "model.safetensors")


def torch_file(folder: Path) -> None:
    folder.mkdir()
    torch.save(STATE, folder / "pytorch_model.bin")


FOLDERS: dict[str, list[Callable[[Path], None]]] = {
    "reshard": [native],
    "dcp": [by_dcp, by_dcp_without_collectives],
    "safetensors": [safetensors],
    "torch": [torch_file],
}
CASES = [(format, save) for format, saves in FOLDERS.items() for save in saves]


def test_samples_cover_all_formats() -> None:
    assert tuple(FOLDERS) == FORMATS


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("format", "save"), CASES)
def test_folder_is_detected(
    format: str, save: Callable[[Path], None], named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "step.1"
    save(folder)
    monkeypatch.chdir(tmp_path)
    for target in (folder, str(folder), f"{folder}/", f"file://{folder}", "step.1", LocalStore(folder)):
        source = open_source(target, format=format if named else None)
        assert source.format == format
        assert reshard.open(target, format=format if named else None).read("w").equal(VALUES)
        state = {"w": torch.zeros(4, 3)}
        reshard.load(state, target, format=format if named else None)
        assert state["w"].equal(VALUES)


@pytest.mark.parametrize(("format", "save"), CASES)
def test_folder_with_a_file_suffix_is_detected(format: str, save: Callable[[Path], None], tmp_path: Path) -> None:
    for suffix in (".pt", ".safetensors", ".ckpt"):
        folder = tmp_path / f"step{suffix}"
        save(folder)
        assert open_source(folder).format == format


@pytest.mark.parametrize(
    ("save", "other"), [(save, other) for format, save in CASES for other in FORMATS if other != format]
)
def test_folder_of_another_format_than_given_raises(save: Callable[[Path], None], other: str, tmp_path: Path) -> None:
    save(tmp_path / "x")
    with pytest.raises(CheckpointNotFoundError, match=rf"no checkpoint of format '{other}' at {tmp_path}/x"):
        reshard.open(tmp_path / "x", format=other)


FILES = {
    "model.safetensors": "safetensors",
    "model.pt": "torch",
    "model.pth": "torch",
    "model.bin": "torch",
    "model.ckpt": "torch",
}


def file_of(format: str, path: Path) -> None:
    if format == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path)


@pytest.mark.parametrize(
    ("name", "format"),
    [*FILES.items(), *((name, format) for name in ("bare", "blob.1") for format in ("safetensors", "torch"))],
)
@pytest.mark.parametrize("named", [False, True])
def test_file_is_detected(name: str, format: str, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file_of(format, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for target in (tmp_path / name, str(tmp_path / name), f"file://{tmp_path / name}", name):
        checkpoint = reshard.open(target, format=format if named else None)
        assert checkpoint.location == f"{tmp_path}/{name}"
        assert checkpoint.read("w").equal(VALUES)


def test_file_among_others_is_opened_alone(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    save_file({"v": torch.ones(2)}, tmp_path / "b.safetensors")
    torch.save({"u": torch.ones(2)}, tmp_path / "c.pt")
    assert list(reshard.open(tmp_path / "a.safetensors").tensors) == ["w"]
    assert list(reshard.open(tmp_path / "c.pt").tensors) == ["u"]
    assert set(reshard.open(tmp_path).tensors) == {"v", "w"}


@pytest.mark.parametrize(
    ("holds", "named", "message"),
    [
        ("torch", "safetensors", "has no header"),
        ("safetensors", "torch", r"is not a zip as torch\.save writes it"),
        ("torch", "dcp", "no checkpoint of format 'dcp'"),
        ("torch", "reshard", "no checkpoint of format 'reshard'"),
        ("safetensors", "dcp", "no checkpoint of format 'dcp'"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".pt", ".safetensors"])
def test_file_of_another_format_than_given_raises(
    holds: str, named: str, message: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"model{suffix}"
    file_of(holds, path)
    with pytest.raises((CheckpointNotFoundError, CorruptCheckpointError), match=message) as caught:
        reshard.open(path, format=named)
    assert str(tmp_path) in str(caught.value)
    assert "model" in str(caught.value)


@pytest.mark.parametrize("format", ["DCP", "", "pickle"])
def test_unknown_format_raises_argument_error(format: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"format must be one of \('reshard', 'dcp', 'safetensors', 'torch'\)"):
        reshard.open(tmp_path, format=format)


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize("name", ["", "absent", "absent/deeper", "absent.pt", "absent.safetensors"])
def test_missing_location_raises_not_found_error(name: str, format: str | None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint") as caught:
        reshard.open(tmp_path / name, format=format)
    assert not isinstance(caught.value, NotCommittedError)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(CheckpointNotFoundError):
        reshard.open(MemoryStore(), format=format)


def test_unrelated_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for format in (None, "dcp", "reshard"):
        with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint"):
            reshard.open(tmp_path / "file", format=format)


def test_folder_of_unrelated_files_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("README.md", "config.json", "metadata", "deep/model.safetensors", "deep/.metadata", "x.distcp.txt"):
        (tmp_path / name).write_bytes(b"{}" * 20)
    with pytest.raises(CheckpointNotFoundError, match=r"there is no checkpoint at .*: it has no manifest\.reshard"):
        reshard.open(tmp_path)


def test_several_torch_save_files_raise_instead_of_guessing(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save(STATE, tmp_path / name)
    with pytest.raises(
        CheckpointNotFoundError, match=r"has 2 torch\.save files: open one of them, for example '[ab]\.pt'"
    ):
        reshard.open(tmp_path)


def test_remains_of_a_failed_native_save_raise_not_committed_error(tmp_path: Path) -> None:
    native(tmp_path / "x")
    (tmp_path / "x" / MANIFEST_NAME).unlink()
    for format in (None, "reshard"):
        with pytest.raises(NotCommittedError, match="was never committed: it has 1 data objects"):
            reshard.open(tmp_path / "x", format=format)
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint of format 'dcp'"):
        reshard.open(tmp_path / "x", format="dcp")


def test_remains_of_a_failed_dcp_save_raise_not_committed_error(tmp_path: Path) -> None:
    by_dcp(tmp_path / "x")
    (tmp_path / "x" / METADATA).rename(tmp_path / "x" / f"{METADATA}.tmp")
    for format in (None, "dcp"):
        with pytest.raises(NotCommittedError, match=r"x was never finished: it has no \.metadata"):
            reshard.open(tmp_path / "x", format=format)
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint of format 'torch'"):
        reshard.open(tmp_path / "x", format="torch")


def test_native_format_is_preferred(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    by_dcp(tmp_path / "x")
    save_file({"other": VALUES}, tmp_path / "x" / "model.safetensors")
    torch.save({"other": VALUES}, tmp_path / "x" / "model.pt")
    assert open_source(tmp_path / "x").format == "dcp"
    native(tmp_path / "native")
    shutil.copytree(tmp_path / "native", tmp_path / "x", dirs_exist_ok=True)
    assert "the one of format 'dcp' is read, but there is also 'model.safetensors'" in caplog.text
    caplog.clear()
    assert open_source(tmp_path / "x").format == "reshard"
    assert "the one of format 'reshard' is read, but there is also '.metadata'" in caplog.text
    caplog.clear()
    for format in FORMATS:
        assert open_source(tmp_path / "x", format=format).format == format
    native(tmp_path / "alone")
    torch.save({"beside": VALUES}, tmp_path / "alone" / "rng_state.pth")
    assert open_source(tmp_path / "alone").format == "reshard"
    assert not caplog.text


def test_native_checkpoint_is_opened_with_one_request(tmp_path: Path) -> None:
    native(tmp_path / "x")
    store = RecordingStore(LocalStore(tmp_path / "x"))
    reshard.open(store)
    assert [(call.method, call.name) for call in store.calls] == [("read", MANIFEST_NAME)]


def test_metadata_among_many_files_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OBJECTS_SEARCHED", 3)
    whole = put_together({"w": (VALUES, rows(1, 4, 3))})
    store = MemoryStore()
    store.content = {**{name: data for name, data in whole.content.items() if name != METADATA}}
    store.content[METADATA] = whole.content[METADATA]
    assert list(store.list())[3:] == ["__3_0.distcp", METADATA]
    assert reshard.open(store).read("w").equal(VALUES)


def test_missing_name_raises_missing_tensor_error_in_every_format(tmp_path: Path) -> None:
    by_dcp(tmp_path / "x")
    checkpoint = reshard.open(tmp_path / "x")
    with pytest.raises(MissingTensorError, match="the checkpoint has no 'ww'"):
        checkpoint.read("ww")
    with pytest.raises(CheckpointError, match="is a tensor"):
        checkpoint.read_value("w")


def test_argument_that_is_not_a_location_raises() -> None:
    with pytest.raises(ArgumentError, match="expected a path, a URI or a Store"):
        reshard.open(io.BytesIO())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


class Ranges(BaseHTTPRequestHandler):
    """Serves one file, also by byte ranges."""

    content = b""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        if not self.path.endswith("/model.safetensors"):
            self.send_error(404)
            return
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        begin, end = (int(byte_range[1]), int(byte_range[2]) + 1) if byte_range else (0, len(self.content))
        data = self.content[begin:end]
        self.send_response(206 if byte_range else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        if byte_range:
            self.send_header("Content-Range", f"bytes {begin}-{begin + len(data) - 1}/{len(self.content)}")
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None: ...


def test_file_is_read_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.randn(64, 32)
    monkeypatch.setattr(Ranges, "content", as_safetensors({"w": weights}))
    with ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}/a/model.safetensors"
        checkpoint = reshard.open(uri)
        assert checkpoint.location == uri
        assert checkpoint.read("w", reshard.Box((3, 0), (7, 32))).equal(weights[3:10])
        server.shutdown()


def test_unfinished_conversion_raises_not_committed_error(tmp_path: Path) -> None:
    save_file({"w": VALUES}, tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / ".reshard-convert.json").write_text("{}")
    with pytest.raises(NotCommittedError, match=r"its conversion was interrupted: it has \.reshard-convert\.json"):
        open_source(tmp_path)


def test_folder_with_too_many_objects_raises_instead_of_guessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A truncated listing may lack files of a model."""
    monkeypatch.setattr(module, "MAX_OBJECTS_SEARCHED", 3)
    store = MemoryStore()
    store.content = {f"logs/{i}": b"" for i in range(5)} | {"model.safetensors": as_safetensors({"w": VALUES})}
    with pytest.raises(CheckpointNotFoundError, match="more than 3 objects"):
        open_source(store)
    store.content["model.safetensors.index.json"] = b'{"weight_map": {"w": "model.safetensors"}}'
    assert reshard.open(store).read("w").equal(VALUES)


def test_model_is_found_beside_other_files_of_a_trainer(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    torch.save({"lr": 1}, tmp_path / "training_args.bin")
    assert reshard.open(tmp_path).read("w").equal(VALUES)


BIN_INDEX = "pytorch_model.bin.index.json"
PARTS = [{"a": torch.ones(4, 2), "n": 3}, {"b": torch.zeros(2), "deep": {"c": torch.arange(5)}}]


def bin_files(folder: Path, prefix: str = "pytorch_model", suffix: str = ".bin", **index: str) -> list[str]:
    """Save a model in two files, with an index unless it is empty, and return the names of the files."""
    folder.mkdir(exist_ok=True)
    names = [f"{prefix}-{number:05}-of-00002{suffix}" for number in (1, 2)]
    for name, state in zip(names, PARTS, strict=True):
        torch.save(state, folder / name)
    if index:
        (folder / BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return names


FIRST, SECOND = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
WHOLE = {"a": FIRST, "n": FIRST, "b": SECOND, "deep.c": SECOND}


@pytest.mark.parametrize("with_index", [True, False])
def test_sharded_bin_folder_is_one_checkpoint(with_index: bool, tmp_path: Path) -> None:
    bin_files(tmp_path / "m", **(WHOLE if with_index else {}))
    torch.save({"lr": 1}, tmp_path / "m" / "training_args.bin")
    checkpoint = reshard.open(tmp_path / "m")
    assert (checkpoint.format, checkpoint.location) == ("torch", str(tmp_path / "m"))
    state = checkpoint.state_dict()
    assert state["a"].equal(torch.ones(4, 2))
    assert state["deep"]["c"].equal(torch.arange(5))
    assert state["n"] == 3
    assert checkpoint.verify() == []
    assert checkpoint.read("a", reshard.Box((1, 0), (2, 2))).equal(torch.ones(2, 2))
    rank = checkpoint.load_rank(reshard.Layout({"tp": 2}, {"a": "colwise"}), 1)
    assert rank["a"].equal(torch.ones(2, 2))
    loaded = {"a": torch.zeros(4, 2), "b": torch.ones(2)}
    reshard.load(loaded, tmp_path / "m")
    assert loaded["a"].equal(torch.ones(4, 2))
    assert loaded["b"].equal(torch.zeros(2))
    reshard.convert(tmp_path / "m", tmp_path / "dst", format="safetensors")
    assert reshard.open(tmp_path / "dst").read("deep.c").equal(torch.arange(5))


def test_sharded_bin_folder_is_read_by_byte_ranges(tmp_path: Path) -> None:
    bin_files(tmp_path, **WHOLE)
    store = RecordingStore(LocalStore(tmp_path))
    checkpoint = reshard.open(store)
    store.calls.clear()
    checkpoint.read("a", reshard.Box((1, 0), (2, 2)))
    assert [(call.name, call.stop - call.start) for call in store.calls] == [(FIRST, 16)]


def test_index_of_a_bin_folder_decides_which_file_is_read(tmp_path: Path) -> None:
    bin_files(tmp_path, a="newer.bin", b=SECOND)
    torch.save({"a": torch.full((4, 2), 9.0), "x": torch.ones(1)}, tmp_path / "newer.bin")
    torch.save({"a": torch.full((4, 2), 7.0)}, tmp_path / "pytorch_model.bin")
    checkpoint = reshard.open(tmp_path)
    assert set(checkpoint.tensors) == {"a", "b"}
    assert checkpoint.read("a").equal(torch.full((4, 2), 9.0))
    assert checkpoint.unindexed == ("deep.c", "x")


def test_missing_file_of_a_bin_folder_does_not_hide_the_other_tensors(tmp_path: Path) -> None:
    bin_files(tmp_path, **WHOLE, lost=FIRST)
    (tmp_path / SECOND).unlink()
    checkpoint = reshard.open(tmp_path)
    assert checkpoint.read("a").equal(torch.ones(4, 2))
    assert set(checkpoint.damaged) == {"b", "deep.c", "lost"}
    for name, why in (
        ("b", f"'b' is in '{SECOND}', which is missing"),
        ("lost", f"in '{FIRST}', which does not have it"),
    ):
        with pytest.raises(CorruptCheckpointError, match=why):
            checkpoint.read(name)
    with pytest.raises(CorruptCheckpointError, match="2 more names cannot be read"):
        checkpoint.state_dict()


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, r"names no tensors\. The folder also has the weight files 'pytorch_model-00001-of-00002\.bin'"),
        ([], "is not an index of weights.*The folder also has the weight files"),
        (None, "is not an index of weights"),
        ({"a": "../x.bin"}, "is not an index of weights"),
        ({"a": "gone.bin"}, r"a file that is missing: 'gone\.bin'"),
    ],
)
def test_false_index_of_a_bin_folder_raises_corrupt_error(weight_map: object, message: str, tmp_path: Path) -> None:
    bin_files(tmp_path)
    (tmp_path / BIN_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CorruptCheckpointError, match=message):
        reshard.open(tmp_path)


@pytest.mark.parametrize("beside", [[], ["training_args.bin"], ["optimizer.pt", "scheduler.pt"]])
@pytest.mark.parametrize(("prefix", "suffix"), [("pytorch_model", ".bin"), ("x", ".pt"), ("a-b", ".pth")])
@pytest.mark.parametrize("lost", [0, 1])
def test_bin_folder_without_a_numbered_file_raises_corrupt_error(
    lost: int, prefix: str, suffix: str, beside: list[str], tmp_path: Path
) -> None:
    names = bin_files(tmp_path, prefix, suffix)
    for name in beside:
        torch.save({"lr": 1}, tmp_path / name)
    assert set(reshard.open(tmp_path).tensors) == {"a", "b", "deep.c"}
    (tmp_path / names[lost]).unlink()
    with pytest.raises(CorruptCheckpointError, match=rf"is incomplete: of 2 files, '{names[lost]}' (is|are) missing"):
        reshard.open(tmp_path)
    assert reshard.open(tmp_path / names[1 - lost]).tensors


def test_tensor_in_two_numbered_files_raises_corrupt_error(tmp_path: Path) -> None:
    names = bin_files(tmp_path)
    torch.save(PARTS[0], tmp_path / names[1])
    with pytest.raises(
        CorruptCheckpointError, match=rf"two files have the tensor 'a': '{FIRST}' and '{SECOND}'\. Open"
    ):
        reshard.open(tmp_path)


@pytest.mark.parametrize("name", ["model", "model.pt", "model.bin", "epoch.7", "ckpt.model"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("format", [None, "torch"])
def test_file_from_before_torch_1_6_raises_unsupported_format_error(
    name: str, protocol: int, format: str | None, tmp_path: Path
) -> None:
    path = tmp_path / name
    torch.save({"w": VALUES}, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    with pytest.raises(
        UnsupportedFormatError, match=rf"'{name}' in {tmp_path} was written before torch 1\.6.*save it again"
    ):
        reshard.open(path, format=format)
