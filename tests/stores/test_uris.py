"""Which location a path or a URI means. Nothing is written to another location than the one that was passed."""

import dataclasses
import json
import logging
import os
import re
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from typer.testing import CliRunner

import reshard
from reshard import errors
from reshard.cli.app import app
from reshard.errors import (
    AccessDeniedError,
    ArgumentError,
    CheckpointError,
    CheckpointNotFoundError,
    StoreError,
    UnsupportedURIError,
)
from reshard.storage.maintenance.gc import find_remains
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.open import open_store
from reshard.storage.stores.uris import folder_below, is_local, join_location, last_name, split_file
from reshard.storage.training import lease as lease_module
from reshard.storage.training.lease import Lease
from tests.conftest import Place
from tests.failing_s3 import failing_s3
from tests.torture.faults import CLIENTS, by_client
from tests.training.test_lease import change_holder

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
HIDDEN_BY_DCP = "metadata is None"
"""`dcp.load` of torch before 2.13 raises this instead of the error of the reader."""

STATE = {"w": torch.arange(12.0).reshape(4, 3)}
OPTIONS = {"key": "a"}
LOST: list[str | os.PathLike[str]] = [
    Path("s3://bucket/run"),
    "s3:/bucket/run",
    "s3:bucket",
    "s3:",
    "s3:/",
    "S3:/bucket",
    "Gs:bucket/run",
    "gs:/bucket/run",
    Path("gcs://bucket"),
    Path("abfss://container/x"),
    Path("az://container/x"),
    Path("memory://x"),
    "memory:x",
    Path("https://host/model.safetensors"),
    "http:host/x.pt",
    Path("hf://org/model"),
    "sftp:/host/x",
    Path("simplecache::s3://bucket/x"),
    Path("zip://x::file:///y.zip"),
    "s3:/bucket/a::b",
    "FILE:/x",
    "Local:x",
    Path("r2://bucket/x"),
    Path("wasbs://container/x"),
]
LOCAL = [
    "a::b",
    "a::c/d",
    "zip::b",
    "s3::b",
    "b::zip",
    "a::",
    "::a",
    "a::b::c",
    "x:y",
    "C:/x",
    "./s3:/bucket",
    "./memory:x",
]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def saved(folder: Path) -> Path:
    reshard.save(STATE, folder)
    return folder


def calls(location: Any, folder: Path) -> list[Callable[[], object]]:
    """Return every call of the API that takes a location."""
    return [
        lambda: reshard.save(STATE, location),
        lambda: reshard.save(STATE, location, overwrite=True),
        lambda: reshard.load(dict(STATE), location),
        lambda: reshard.open(location),
        lambda: reshard.open(location, format="reshard"),
        lambda: reshard.open(location, format="torch"),
        lambda: reshard.convert(location, folder / "copy"),
        lambda: reshard.convert(folder / "c", location),
        lambda: reshard.convert(folder / "c", location, format="safetensors"),
        lambda: reshard.find_checkpoints(location),
        lambda: reshard.remove(location),
        lambda: find_remains(os.fspath(location)),
        lambda: open_store(location),
    ]


@pytest.mark.parametrize("location", LOST, ids=str)
def test_a_uri_that_lost_a_slash_is_refused(
    location: str | os.PathLike[str], tmp_path: Path, empty_folder: Path
) -> None:
    saved(tmp_path / "c")
    for call in calls(location, tmp_path):
        with pytest.raises(UnsupportedURIError, match=r"pass the URI as a string, '[a-z0-9:]+://") as caught:
            call()
        assert repr(os.fspath(location)) in str(caught.value)
    assert list(empty_folder.iterdir()) == []
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("location", LOST[:6], ids=str)
def test_dcp_does_not_write_to_a_uri_that_lost_a_slash(location: Any, empty_folder: Path) -> None:
    for kind in (reshard.StorageWriter, reshard.StorageReader):
        assert not kind.validate_checkpoint_id(location)
    with pytest.raises(CheckpointException, match="pass the URI as a string, 's3://") as caught:
        dcp.save(STATE, storage_writer=reshard.StorageWriter(location))
    assert "UnsupportedURIError" in str(caught.value)
    with pytest.raises(CheckpointException, match=f"pass the URI as a string, 's3://|{HIDDEN_BY_DCP}"):
        dcp.load(dict(STATE), storage_reader=reshard.StorageReader(location))
    with pytest.raises(CheckpointException, match="pass the URI as a string, 's3://"):
        dcp.save(STATE, checkpoint_id=location, storage_writer=reshard.StorageWriter("elsewhere"))
    assert list(empty_folder.iterdir()) == []


def commands(location: str, folder: Path) -> list[list[str]]:
    there = str(folder / "c")
    return [
        ["inspect", location],
        ["plan", location],
        ["verify", location],
        ["convert", location, str(folder / "copy")],
        ["convert", there, location],
        ["diff", location, there],
        ["diff", there, location],
        ["ls", location],
        ["rm", location, "--yes"],
        ["gc", location, "--yes"],
        ["demo", "--uri", location],
    ]


@pytest.mark.parametrize("location", ["s3:/bucket/run", "gs:bucket"])
def test_every_command_refuses_a_uri_that_lost_a_slash(location: str, tmp_path: Path, empty_folder: Path) -> None:
    saved(tmp_path / "c")
    for command in commands(location, tmp_path):
        with pytest.raises(UnsupportedURIError, match="pass the URI as a string"):
            CliRunner().invoke(app, command, catch_exceptions=False)
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize("location", LOCAL)
def test_a_local_path_with_colons_is_a_folder(location: str, empty_folder: Path, tmp_path: Path) -> None:
    saved(tmp_path / "c")
    reshard.save(STATE, location)
    assert (empty_folder / location / "manifest.reshard").is_file()
    assert {path.parts[0] for path in (p.relative_to(empty_folder) for p in empty_folder.iterdir())} == {
        Path(location).parts[0]
    }
    for form in (location, Path(location) if not location.startswith("./") else location, empty_folder / location):
        assert reshard.open(form).read("w").equal(STATE["w"])
        assert [found.is_complete for found in reshard.find_checkpoints(form)] == [True]
    loaded = {"w": torch.zeros(4, 3)}
    reshard.load(loaded, location)
    assert loaded["w"].equal(STATE["w"])
    reshard.remove(location)
    reshard.convert(tmp_path / "c", location, format="safetensors")
    assert {path.suffix for path in (empty_folder / location).iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize(
    ("uri", "instead"),
    [
        ("file://localhost/a/b", "'file:///a/b'"),
        ("file://data/run", "'file:///data/run', or 'data/run' for a path in the current folder"),
        ("local://run", "'local:///run'"),
        ("simplecache::file://data/run", "'file:///data/run'"),
        ("zip://c::file://y.zip", "'file:///y.zip'"),
        ("file://a::x", "'file:///a'"),
        ("file://", "pass 'file:///' and an absolute path, or a path without 'file://'"),
        ("file://./x", "or a path without 'file://'"),
        ("file://user:secret@host/x", "'file://***@host/x' has no absolute path: pass 'file:///' and"),
    ],
)
def test_a_file_uri_without_an_absolute_path_is_refused(uri: str, instead: str, empty_folder: Path) -> None:
    for call in (
        lambda: reshard.save(STATE, uri),
        lambda: reshard.open(uri),
        lambda: reshard.find_checkpoints(uri),
        lambda: reshard.CheckpointManager(uri),
    ):
        with pytest.raises(UnsupportedURIError, match=re.escape(instead)):
            call()
    assert not list(empty_folder.iterdir())


@pytest.mark.parametrize("name", ["a::b", "a:", "s3:", "x::y/z::", "zip::b"])
def test_a_file_uri_may_contain_colons(name: str, empty_folder: Path) -> None:
    reshard.save(STATE, f"file://{empty_folder}/{name}")
    assert reshard.open(empty_folder / name).read("w").equal(STATE["w"])


def test_two_paths_with_colons_are_two_checkpoints() -> None:
    for i, location in enumerate(("a::b", "a::c", "a:", "a")):
        reshard.save({"w": torch.full((2,), i)}, location)
    for i, location in enumerate(("a::b", "a::c", "a:", "a")):
        assert reshard.open(location).read("w").tolist() == [i, i]


@pytest.mark.parametrize("name", ["a::b.safetensors", "zip::x.safetensors", "d::e/f::g.safetensors"])
def test_a_file_name_may_contain_colons(name: str) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    save_file(STATE, name)
    assert reshard.open(name).read("w").equal(STATE["w"])


def test_a_chain_of_fsspec_still_works(tmp_path: Path) -> None:
    import zipfile

    saved(tmp_path / "c")
    save_file(STATE, tmp_path / "c" / "model.safetensors")
    with zipfile.ZipFile(tmp_path / "y.zip", "w") as file:
        for path in (tmp_path / "c").rglob("*"):
            file.write(path, path.relative_to(tmp_path))
    for uri in (
        f"zip://c::file://{tmp_path}/y.zip",
        f"zip://c::{tmp_path}/y.zip",
        f"zip://c/model.safetensors::file://{tmp_path}/y.zip",
        f"simplecache::file://{tmp_path}/c",
        f"simplecache::file://{tmp_path}/c/model.safetensors",
        f"simplecache::zip://c/model.safetensors::file://{tmp_path}/y.zip",
    ):
        assert reshard.open(uri).read("w").equal(STATE["w"]), uri


def test_a_key_with_colons_is_not_a_chain(s3: Place) -> None:
    uri, options = s3
    reshard.save(STATE, f"{uri}/a::b", storage_options=options)
    assert reshard.open(f"{uri}/a::b", storage_options=options).read("w").equal(STATE["w"])
    assert [found.uri for found in reshard.find_checkpoints(uri, options)] == [f"{uri}/a::b"]
    reshard.save(STATE, "memory://colons/a::b")
    assert reshard.open("memory://colons/a::b").location == "memory://colons/a::b"


@pytest.mark.parametrize(
    ("uri", "folder", "name"),
    [
        ("/a/m.pt", "/a", "m.pt"),
        ("/m.pt", "/", "m.pt"),
        ("file:///a/m.pt", "/a", "m.pt"),
        ("s3://bucket/a/m.pt", "s3://bucket/a", "m.pt"),
        ("s3://bucket.pt", "s3://bucket.pt", ""),
        ("https://host/a/m.pt?sig=x/y.safetensors", "https://host/a?sig=x/y.safetensors", "m.pt"),
        ("https://host?a/b", "https://host?a/b", ""),
        ("s3://bucket/a?b/m.pt", "s3://bucket/a?b", "m.pt"),
        ("zip://m.pt::file:///y.zip", "zip://::file:///y.zip", "m.pt"),
        ("simplecache::s3://b/a/m.pt", "simplecache::s3://b/a", "m.pt"),
    ],
)
def test_split_file_returns_folder_and_name(uri: str, folder: str, name: str) -> None:
    assert split_file(uri) == (folder, name)
    assert is_local(uri) == uri.startswith(("/", "file:"))


@pytest.mark.parametrize(
    ("location", "joined"),
    [
        ("/a", "/a/b/c"),
        ("/a/", "/a/b/c"),
        ("/", "/b/c"),
        (".", "./b/c"),
        ("file:///a", "file:///a/b/c"),
        ("file:///", "file:///b/c"),
        ("s3://bucket", "s3://bucket/b/c"),
        ("s3://bucket/a/", "s3://bucket/a/b/c"),
        ("memory://", "memory://b/c"),
        ("memory://a", "memory://a/b/c"),
        ("https://host/a?sig=x/y", "https://host/a/b/c?sig=x/y"),
        ("zip://::run.zip", "zip://b/c::run.zip"),
        ("zip://a::file:///y.zip", "zip://a/b/c::file:///y.zip"),
        ("zip::s3://bucket/y.zip", "zip://b/c::s3://bucket/y.zip"),
        ("simplecache::s3://bucket", "simplecache::s3://bucket/b/c"),
        ("simplecache::zip://::file:///y.zip", "simplecache::zip://b/c::file:///y.zip"),
    ],
)
def test_a_folder_is_joined_to_a_location(location: str, joined: str) -> None:
    assert join_location(location, "b/c") == joined
    assert folder_below(location, joined) == "b/c"
    assert join_location(location, "") == location


def test_checkpoints_are_found_and_managed_at_the_root_of_a_filesystem() -> None:
    fsspec.filesystem("memory").store.clear()
    with reshard.CheckpointManager("memory://", asynchronous=False, keep=[reshard.latest(1)]) as manager:
        for step in (1, 2):
            assert manager.save(step, {"w": torch.full((3,), float(step))})
    assert [(found.uri, found.state) for found in reshard.find_checkpoints("memory://")] == [
        ("memory://step-00000002", "complete")
    ]
    assert reshard.gc("memory://") == []
    state = {"w": torch.zeros(3)}
    with reshard.CheckpointManager("memory://", read_only=True) as manager:
        assert manager.restore(state) == 2
    assert state["w"].eq(2).all()
    fsspec.filesystem("memory").store.clear()


def test_checkpoints_in_an_archive_are_found(tmp_path: Path) -> None:
    import zipfile

    for folder in ("step-1", "step-2"):
        saved(tmp_path / folder)
    with zipfile.ZipFile(tmp_path / "run.zip", "w") as file:
        for path in tmp_path.glob("step-*/**/*"):
            file.write(path, path.relative_to(tmp_path))
    uri = f"zip://::file://{tmp_path}/run.zip"
    found = reshard.find_checkpoints(uri)
    assert [one.state for one in found] == ["complete", "complete"]
    for one in found:
        assert reshard.open(one.uri).read("w").equal(STATE["w"])
    assert reshard.gc(uri, dry_run=True) == []


@pytest.mark.parametrize("cache", ["simplecache", "filecache"])
def test_a_cache_of_files_does_not_hide_that_a_checkpoint_was_replaced(cache: str, tmp_path: Path) -> None:
    folder, uri = tmp_path / "run", f"{cache}::file://{tmp_path}/run"
    saved(folder)
    assert reshard.open(uri).read("w").equal(STATE["w"])
    reshard.save({"w": -STATE["w"]}, folder, overwrite=True)
    assert reshard.open(uri).read("w").equal(-STATE["w"])
    for path in folder.rglob("*"):
        os.utime(path, (0, 0))
    assert reshard.gc(uri) == []
    assert reshard.open(folder).verify() == []


def test_a_cache_of_files_does_not_hide_that_a_lease_is_renewed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lease = Lease(str(tmp_path / "run"), renew_every_s=0.05)
    lease_module._held.clear()
    change_holder(tmp_path / "run", host="another machine", process="another process")
    lease._holder = dataclasses.replace(lease._holder, host="another machine", process="another process")
    with pytest.raises(errors.RunInUseError):
        Lease(f"simplecache::file://{tmp_path}/run", expires_after_s=1.0)
    lease.release()


@pytest.mark.parametrize("suffix", ["", "/"])
def test_the_step_of_a_checkpoint_is_the_last_number_of_its_folder(suffix: str, tmp_path: Path) -> None:
    saved(tmp_path / "run-7" / "step-00000005")
    (found,) = reshard.find_checkpoints(f"{tmp_path}/run-7/step-00000005{suffix}")
    assert found.step == 5
    for location, name in (
        ("s3://bucket/run/step-1/", "step-1"),
        ("zip://step-12::file:///x/run.zip", "step-12"),
        ("https://host/step-1?sig=a/b", "step-1"),
        ("simplecache::s3://bucket/step-2", "step-2"),
    ):
        assert last_name(location) == name


@pytest.mark.parametrize("client", CLIENTS)
def test_a_missing_bucket_is_named(client: str, s3: Place) -> None:
    options = by_client(client, s3[1])
    for uri in ("s3://no-such-bucket", "s3://no-such-bucket/run"):
        for call in (reshard.find_checkpoints, reshard.gc):
            with pytest.raises(StoreError, match="there is no such bucket"):
                call(uri, options)
    with pytest.raises(UnsupportedURIError, match="has no bucket"):
        reshard.open("s3://", storage_options=options)


@pytest.mark.parametrize("store_name", ["gcs", "azurite"])
def test_a_missing_bucket_is_named_by_other_stores(place: Place) -> None:
    uri, options = place
    protocol = uri.partition("://")[0]
    for missing in (f"{protocol}://no-such-bucket", f"{protocol}://no-such-bucket/run"):
        calls: list[Callable[[], object]] = [
            lambda: reshard.find_checkpoints(missing, options),  # noqa: B023
            lambda: reshard.gc(missing, options),  # noqa: B023
            lambda: reshard.save(dict(STATE), missing, storage_options=options),  # noqa: B023
            lambda: reshard.open(missing, storage_options=options),  # noqa: B023
            lambda: reshard.CheckpointManager(missing, storage_options=options, read_only=True).restore({}),  # noqa: B023
        ]
        for call in calls:
            with pytest.raises(StoreError, match="there is no such bucket"):
                call()
    assert reshard.find_checkpoints(f"{uri}/nothing", options) == []
    reshard.save(dict(STATE), f"{uri}/new", storage_options=options)


def test_a_relative_path_in_a_folder_that_is_gone_raises_store_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    calls: list[Callable[[], object]] = [
        lambda: reshard.save(dict(STATE), "c"),
        lambda: reshard.load(dict(STATE), "c"),
        lambda: reshard.open("c"),
        lambda: reshard.find_checkpoints("."),
        lambda: reshard.CheckpointManager("run"),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="is relative to the working directory of this process, which has been"):
            call()


@pytest.mark.parametrize("form", ["{}", "file://{}", "local://{}", "file:{}"])
def test_storage_options_for_a_local_path_raise_argument_error(form: str, tmp_path: Path) -> None:
    saved(tmp_path / "c")
    there, new = form.format(tmp_path / "c"), form.format(tmp_path / "new")
    for call in (
        lambda: reshard.save(STATE, new, storage_options=OPTIONS),
        lambda: reshard.load(dict(STATE), there, storage_options=OPTIONS),
        lambda: reshard.open(there, storage_options=OPTIONS),
        lambda: reshard.convert(there, new, src_options=OPTIONS),
        lambda: reshard.convert(there, new, dst_options=OPTIONS),
        lambda: reshard.find_checkpoints(there, OPTIONS),
        lambda: reshard.remove(there, OPTIONS),
    ):
        with pytest.raises(ArgumentError, match="is a local path, which takes no storage_options, got 'key'"):
            call()
    writer = reshard.StorageWriter(new, storage_options=OPTIONS)
    with pytest.raises(CheckpointException, match="takes no storage_options"):
        dcp.save(STATE, storage_writer=writer)
    reader = reshard.StorageReader(there, storage_options=OPTIONS)
    with pytest.raises(CheckpointException, match=f"takes no storage_options|{HIDDEN_BY_DCP}"):
        dcp.load(dict(STATE), storage_reader=reader)
    assert not (tmp_path / "new").exists()
    empty: dict[str, Any] = {}
    for nothing in (None, empty):
        assert reshard.open(there, storage_options=nothing).read("w").equal(STATE["w"])
    reshard.save(STATE, new, storage_options=empty)


def test_storage_options_for_an_open_store_raise_argument_error(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"storage_options 'key' were passed for .*, which is an open Store"):
        reshard.save(STATE, LocalStore(tmp_path / "x"), storage_options=OPTIONS)
    assert not (tmp_path / "x").exists()
    with pytest.raises(ArgumentError, match="storage_options must be a mapping"):
        open_store("memory://x", "key=a")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArgumentError, match="expected a path, a URI or a Store"):
        open_store(b"x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def run(*command: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(part) for part in command], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def as_arguments(option: str, options: dict[str, Any]) -> list[str]:
    flat = {key: value for key, value in options.items() if not isinstance(value, dict)}
    flat |= {
        f"{key}.{name}": value
        for key, inner in options.items()
        if isinstance(inner, dict)
        for name, value in inner.items()
    }
    return [part for key, value in flat.items() for part in (option, f"{key}={value}")]


def test_commands_pass_storage_options_to_remote_locations(s3: Place, tmp_path: Path) -> None:
    uri, options = s3
    local = saved(tmp_path / "c")
    given = as_arguments("-o", options)
    run("convert", local, f"{uri}/a", *given)
    run("convert", local, f"{uri}/b", *as_arguments("--dst-option", options))
    run("convert", f"{uri}/a", tmp_path / "back", *given)
    run("convert", f"{uri}/a", f"{uri}/d", *given)
    run("convert", f"{uri}/a", f"{uri}/e", *given, *as_arguments("--dst-option", options))
    for name in "abde":
        assert reshard.open(f"{uri}/{name}", storage_options=options).read("w").equal(STATE["w"])
    assert reshard.open(tmp_path / "back").read("w").equal(STATE["w"])
    for pair in ((f"{uri}/a", local), (local, f"{uri}/a"), (f"{uri}/a", f"{uri}/b")):
        assert "no difference" in run("diff", *pair, *given)


def test_commands_refuse_storage_options_for_local_paths(tmp_path: Path) -> None:
    saved(tmp_path / "c")
    there, new = tmp_path / "c", tmp_path / "new"
    for command in commands(str(there), tmp_path):
        if command[0] != "demo":
            with pytest.raises(ArgumentError, match="takes no storage_options"):
                run(*command, "-o", "key=a")
    with pytest.raises(ArgumentError, match="takes no storage_options"):
        run("convert", there, new, "--dst-option", "key=a")
    with pytest.raises(ArgumentError, match="takes no storage_options"):
        run("convert", there, "memory://new", "-o", "key=a", "--dst-option", "x=1")
    with pytest.raises(ArgumentError, match="takes no storage_options"):
        run("demo", "-o", "key=a")
    run("plan", there, "--save", tmp_path / "plan.json")
    run("plan", tmp_path / "plan.json", "-o", "key=a", code=2)
    assert not new.exists()
    assert not (tmp_path / "copy").exists()


class Signed(BaseHTTPRequestHandler):
    """Serves byte ranges of files to requests with the right signature, like a store. By default it allows only GET."""

    folder: Path
    secret = "X-Amz-Credential=AKIA%2F2026%2Fs3&X-Amz-Signature=5ec2e7"
    takes_head = False

    def do_HEAD(self) -> None:
        if self.takes_head:
            self.do_GET()
        else:
            self.send_error(403)  # the URL was signed for GET

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        file = self.folder / path.lstrip("/")
        if query != self.secret:
            self.send_error(403)
        elif not file.is_file():
            self.send_error(404)
        else:
            content = file.read_bytes()
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            begin, end = (int(asked[1]), min(int(asked[2]) + 1, len(content))) if asked else (0, len(content))
            self.send_response(206 if asked else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(end - begin))
            if asked:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[begin:end])

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = tmp_path / "served"
    (folder / "deep").mkdir(parents=True)
    save_file(STATE, folder / "deep" / "model.safetensors")
    torch.save(STATE, folder / "deep" / "model.pt")
    reshard.save(STATE, folder / "native")
    monkeypatch.setattr(Signed, "folder", folder, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Signed) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("takes_head", [False, True])
@pytest.mark.parametrize("file", ["deep/model.safetensors", "deep/model.pt", "native"])
def test_a_signed_url_is_read(
    file: str, takes_head: bool, signed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(Signed, "takes_head", takes_head)
    caplog.set_level(logging.DEBUG, "reshard")
    url = f"{signed}/{file}?{Signed.secret}"
    checkpoint = reshard.open(url)
    assert checkpoint.location == f"{signed}/{file}"
    assert checkpoint.read("w", reshard.Box((1, 0), (2, 3))).equal(STATE["w"][1:3])
    loaded = {"w": torch.zeros(4, 3)}
    reshard.load(loaded, url)
    assert loaded["w"].equal(STATE["w"])
    reshard.convert(url, tmp_path / "copy")
    assert reshard.open(tmp_path / "copy").read("w").equal(STATE["w"])
    assert checkpoint.verify() == []
    texts = [*caplog.messages, repr(checkpoint), json.dumps([p.read_text() for p in tmp_path.glob("copy/*.json")])]
    assert not any("5ec2e7" in text for text in texts)


@pytest.mark.parametrize("file", ["deep/model.safetensors", "deep/model.pt", "deep/absent.pt", "native"])
@pytest.mark.parametrize("query", ["X-Amz-Signature=5ec2e7", "sig=5ec2e7%2Fx&a=b/c.safetensors"])
def test_no_error_shows_the_signature_of_a_url(file: str, query: str, signed: str, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG, "reshard")
    with pytest.raises(AccessDeniedError) as caught:
        reshard.open(f"{signed}/{file}?{query}")
    shown = "".join(traceback.format_exception(caught.value)) + "".join(caplog.messages)
    assert "5ec2e7" not in shown.replace(repr(query), "")
    assert file.rpartition("/")[2] in str(caught.value)


def test_a_missing_checkpoint_at_a_signed_url_is_reported_without_the_signature(signed: str) -> None:
    with pytest.raises(CheckpointNotFoundError) as caught:
        reshard.open(f"{signed}/deep/absent.pt?{Signed.secret}", format="reshard")
    assert "5ec2e7" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("size", [7, 300_000])
def test_s3fs_sends_no_checksums_by_default(size: int) -> None:
    """Some servers refuse the headers and trailers that botocore adds by default."""
    unknown = ("x-amz-checksum-", "x-amz-sdk-checksum", "x-amz-trailer")

    def refuses(method: str, key: str, headers: dict[str, str]) -> int:
        trailing = headers.get("content-encoding") == "aws-chunked" or "TRAILER" in headers.get(
            "x-amz-content-sha256", ""
        )
        return 400 if trailing or any(name.startswith(unknown) for name in headers) else 0

    with failing_s3(fails=lambda method, key: False, refuses=refuses) as server:
        by_s3fs = {**server.options, "config_kwargs": {"max_pool_connections": 5}, "skip_instance_cache": True}
        state = {"w": torch.randn(size // 4 + 1)}
        reshard.save(state, "s3://bucket/run", storage_options=by_s3fs)
        assert reshard.open("s3://bucket/run", storage_options=by_s3fs).read("w").equal(state["w"])
        wanted = {**by_s3fs, "config_kwargs": {"request_checksum_calculation": "when_supported"}}
        with pytest.raises(CheckpointError, match="refused for its headers"):
            reshard.save(state, "s3://bucket/other", storage_options=wanted)


@pytest.mark.parametrize("uri", ["s3://bucket//x", "s3a://bucket///x/y", "gs://bucket//x"])
def test_two_slashes_after_the_bucket_are_refused(uri: str) -> None:
    with pytest.raises(UnsupportedURIError, match="two slashes after the bucket"):
        open_store(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "az://bucket/a/../b",
        "abfs://bucket/../b",
        "abfss://bucket/a/./b",
        "az://bucket/a\\b",
        "filecache::az://bucket/./b",
    ],
)
def test_names_that_azure_does_not_keep_are_refused(uri: str) -> None:
    for call in (lambda: reshard.save({"w": torch.ones(1)}, uri), lambda: reshard.open(uri)):
        with pytest.raises(UnsupportedURIError, match="Azure changes such names"):
            call()


def test_an_empty_location_is_refused(empty_folder: Path) -> None:
    for call in (lambda: reshard.save(STATE, ""), lambda: reshard.open("")):
        with pytest.raises(ArgumentError, match="the path or URI is empty"):
            call()
    assert not list(empty_folder.iterdir())


def test_a_folder_name_that_ends_with_a_colon_is_local(empty_folder: Path) -> None:
    (empty_folder / "notes:").mkdir()
    reshard.save(STATE, "notes:/run")
    assert (empty_folder / "notes:" / "run" / "manifest.reshard").exists()
