import contextlib
import errno
import os
import pickle
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Iterable
from pathlib import Path

import pytest
from typing_extensions import Buffer

from reshard.storage.dcp_writer import StorageWriter
from reshard.storage.errors import AccessDeniedError, ObjectNotFoundError, StoreError, UnsupportedURIError
from reshard.storage.stores import base as store_module
from reshard.storage.stores import conditional_put, obstore
from reshard.storage.stores import testing as store_testing
from reshard.storage.stores.local import MIN_SYNC_BYTES, LocalStore
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.open import open_store
from reshard.storage.stores.retry import RetryingStore
from reshard.storage.stores.testing import RecordingStore, check_store
from tests import servers
from tests.conftest import STORES, Place


@pytest.mark.parametrize("store_name", STORES)
def test_every_store_keeps_the_contract(place: Place, store_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, options = place
    if "rclone" in store_name:  # it replaces an object in place: a read at this moment may find a mixture
        monkeypatch.setattr(store_testing, "_check_atomic_put", lambda store: None)
    store = open_store(uri, options)
    assert store.location == uri
    assert isinstance(store, RetryingStore if "://" in uri else LocalStore)
    check_store(store)


@pytest.mark.parametrize("store_name", STORES)
@pytest.mark.filterwarnings("ignore:Sending a large body")  # gcsfs warns about its own parts
def test_a_large_object_is_uploaded_in_parts(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_HELD_BYTES", 6 << 20)
    uri, options = place
    store = open_store(uri, options)
    mib = bytes(range(256)) * 4096
    with store.create("data/large") as out:
        for _ in range(25):
            out.write(mib)
    assert store.size("data/large") == 25 << 20
    assert bytes(store.read("data/large", (17 << 20) - 3, (17 << 20) + 3)) == mib[-3:] + mib[:3]

    def interrupted() -> None:
        with store.create("data/other") as out:
            for _ in range(25):
                out.write(mib)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert "data/other" not in set(store.list()) or isinstance(store, LocalStore)
    store.delete(["data/large", "data/other"])


def test_a_disk_without_hard_links_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    check_store(LocalStore(tmp_path / "x"))


def test_a_file_uri_keeps_the_contract(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/x")
    assert isinstance(store, LocalStore)
    check_store(store)


def test_the_testing_stores_keep_the_contract() -> None:
    check_store(MemoryStore())
    check_store(RecordingStore(MemoryStore()))


class PrefixList(MemoryStore):
    def list(self, folder: str = "") -> Iterable[str]:
        return [name for name in self.content if name.startswith(folder)]


class DeepestFolderList(MemoryStore):
    def list(self, folder: str = "") -> Iterable[str]:
        return [name for name in self.content if not folder or f"/{folder}/" in f"/{name}"]


class HalfPut(MemoryStore):
    """`put` replaces an object in two steps, and waits for a read in between."""

    def __init__(self) -> None:
        super().__init__()
        self.was_read = threading.Event()

    def read(self, name: str, start: int, stop: int) -> Buffer:
        data = super().read(name, start, stop)
        self.was_read.set()
        return data

    def put(self, name: str, data: bytes, *, overwrite: bool) -> None:
        if overwrite:
            self.content[name] = data[: len(data) // 2]
            self.was_read.clear()
            self.was_read.wait(0.2)
        super().put(name, data, overwrite=overwrite)


class DeletingPut(HalfPut):
    """`put` deletes an object and writes it again."""

    def read(self, name: str, start: int, stop: int) -> Buffer:
        try:
            return super().read(name, start, stop)
        finally:
            self.was_read.set()

    def put(self, name: str, data: bytes, *, overwrite: bool) -> None:
        if overwrite:
            self.content.pop(name, None)
            self.was_read.clear()
            self.was_read.wait(0.2)
        MemoryStore.put(self, name, data, overwrite=overwrite)


class ReplacingPut(MemoryStore):
    def put(self, name: str, data: bytes, *, overwrite: bool) -> None:
        super().put(name, data, overwrite=True)


class StrictRead(MemoryStore):
    def read(self, name: str, start: int, stop: int) -> Buffer:
        data = bytes(super().read(name, start, stop))
        if len(data) < stop - start < 2**60:
            raise StoreError("the object is too short")
        return data


class WrongSize(MemoryStore):
    def size(self, name: str) -> int:
        return super().size(name) + 1


class KeyErrorRead(MemoryStore):
    def read(self, name: str, start: int, stop: int) -> Buffer:
        return self.content[name][start:stop]


class KeepingDelete(MemoryStore):
    def delete(self, names: Iterable[str]) -> None:
        pass


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (PrefixList, r"list\('data'\), beside .* returned \['data.txt', 'data/a.shard', 'database/b'\] instead of"),
        (DeepestFolderList, r"list\('data'\), beside .* returned \['a/data/c', 'data/a.shard'\] instead of"),
        (HalfPut, r"put is not atomic: .* bytes that are neither the old nor the new object"),
        (DeletingPut, r"put is not atomic: .* ObjectNotFoundError"),
        (ReplacingPut, r"put with overwrite=False of an object that exists returned None"),
        (StrictRead, r"the object is too short"),
        (WrongSize, r"size of an object of 262144 bytes returned 262145"),
        (KeyErrorRead, r"read of an object that does not exist raised KeyError\('absent'\) instead of ObjectNotFound"),
        (KeepingDelete, r"list\(\) after delete returned"),
    ],
)
def test_check_store_describes_what_a_broken_store_does(broken: type[MemoryStore], message: str) -> None:
    with pytest.raises(StoreError if broken is StrictRead else AssertionError, match=message):
        check_store(broken())


def test_open_store_returns_a_store_unchanged() -> None:
    store = MemoryStore()
    assert open_store(store) is store


def test_obstore_opens_s3_if_it_supports_all_options(
    s3: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri, options = s3

    def client(**more: object) -> str:
        store = open_store(uri, {**options, **more})
        assert isinstance(store, RetryingStore)
        return type(store.inner).__name__

    assert client() == client(anon=True) == "ObstoreStore"
    assert client(config_kwargs={"max_pool_connections": 3}) == client(requester_pays=True) == "FsspecStore"
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    assert client() == "ObstoreStore", "a custom endpoint needs no region"
    for name, value in (("AWS_USE_FIPS_ENDPOINT", "true"), ("AWS_PROFILE", "none-of-this-name")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert client() == "FsspecStore"
    for path in ("a b", "a#b", "ü", "a//b", "..", "a%20b"):
        assert type(open_store(f"s3://bucket/{path}", options).inner).__name__ == "FsspecStore", path  # type: ignore[attr-defined]
    (tmp_path / "config").write_text(f"[default]\nendpoint_url = {options['client_kwargs']['endpoint_url']}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    keys = {"key": options["key"], "secret": options["secret"]}
    configured = open_store(uri, keys)
    assert type(configured.inner).__name__ == "ObstoreStore"  # type: ignore[attr-defined]
    check_store(configured)
    monkeypatch.setitem(sys.modules, "obstore", None)
    assert client() == "FsspecStore"


def test_a_session_token_of_the_environment_is_not_combined_with_explicit_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-another-user")
    options = {"key": "a", "secret": "b", "client_kwargs": {"region_name": "eu-west-1"}}
    config = obstore._config(options, obstore._session(None))
    assert config is not None
    assert set(config) == {"region", "skip_signature", "unsigned_payload", "credential_provider"}
    assert config["credential_provider"]()["token"] is None


@pytest.mark.parametrize(("endpoint", "unsigned"), [(None, True), ("https://host", True), ("http://host", False)])
def test_the_payload_is_signed_only_without_tls(endpoint: str | None, unsigned: bool) -> None:
    config = obstore._config(
        {"key": "a", "secret": "b", "endpoint_url": endpoint, "client_kwargs": {"region_name": "eu-west-1"}}, None
    )
    assert config is not None
    assert config["unsigned_payload"] is unsigned


@pytest.mark.parametrize(
    "configured",
    [
        "use_fips_endpoint = true",
        "use_dualstack_endpoint = true",
        "s3 =\n  addressing_style = virtual",
    ],
)
def test_obstore_is_not_used_if_botocore_is_configured_for_more(
    configured: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text(f"[default]\nregion = eu-west-1\n{configured}\n")
    keys = {"key": "a", "secret": "b"}
    assert obstore.open_s3("bucket/x", keys) is not None
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert obstore.open_s3("bucket/x", keys) is None


def test_an_error_of_obstore_does_not_show_the_answer_of_the_server(seaweedfs: servers.Server) -> None:
    """S3 answers a wrong signature with everything that was signed, including the session token."""
    store = open_store(seaweedfs.place("x"), {**seaweedfs.options, "secret": "wrong", "token": "a-token"})
    with pytest.raises(AccessDeniedError, match=r"SignatureDoesNotMatch|InvalidAccessKeyId") as caught:
        store.read("x", 0, 1)
    shown = "".join(traceback.format_exception(caught.value))
    assert "<Error>" not in shown
    assert "a-token" not in shown


def test_a_store_can_be_pickled(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("x", b"content", overwrite=True)
    writer = pickle.loads(pickle.dumps(StorageWriter(store)))  # noqa: S301
    assert bytes(writer._writer.store.read("x", 0, 7)) == b"content"


@pytest.mark.parametrize("uri", ["nosuchprotocol://x/y", "nosuch+protocol://x"])
def test_an_unknown_protocol_raises_unsupported_uri_error(uri: str) -> None:
    with pytest.raises(UnsupportedURIError, match="nosuch"):
        open_store(uri)


def test_the_error_names_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.registry import known_implementations

    monkeypatch.setitem(known_implementations, "abroad", {"class": "no_such_package.Files", "err": "install abroadfs"})
    with pytest.raises(UnsupportedURIError, match="install abroadfs"):
        open_store("abroad://x")


def test_reading_a_folder_raises_store_error(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(StoreError, match="'x'"):
        LocalStore(tmp_path).read("x", 0, 1)


def test_a_folder_is_not_an_object(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(ObjectNotFoundError, match="'x'"):
        LocalStore(tmp_path).size("x")


def test_files_are_closed_whether_or_not_a_write_fails(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for at in range(20):
        with contextlib.suppress(ValueError), store.create(f"{at}") as out:
            out.write(bytes(100))
            if at % 2:
                raise ValueError("injected")
        store.read("0", 0, 10)
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.parametrize("cold", [False, True])
def test_will_read_advises_the_kernel_only_about_uncached_bytes(
    cold: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(bytes(3_000_000))
    advised: list[tuple[int, int]] = []

    def preadv(descriptor: int, buffers: list[bytearray], offset: int, flags: int) -> int:
        assert flags == os.RWF_NOWAIT
        assert offset == 2_999_999
        if cold:
            raise BlockingIOError
        return len(buffers[0])

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "posix_fadvise", lambda _, at, nbytes, advice: advised.append((at, at + nbytes)))
    LocalStore(tmp_path).will_read("x", [(1_000, 3_000_000)])
    if cold:
        assert [start for start, _ in advised] == [1_000, *(stop for _, stop in advised[:-1])]
        assert advised[-1][1] == 3_000_000
    else:
        assert advised == []


def test_a_full_disk_raises_store_error(tmp_path: Path) -> None:
    """A limit on the file size simulates the full disk. The system reports it at the flush."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with (
            pytest.raises(StoreError, match=r"cannot write 'data/x.shard'"),
            LocalStore(tmp_path).create("data/x.shard") as out,
        ):
            out.write(b"x" * 4000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_failed_background_sync_is_raised_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system reports the failure only once, to the first sync, while the file is still being written."""

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fails)
    with (
        pytest.raises(StoreError, match=r"cannot write 'data/x.shard'.*Input/output error"),
        LocalStore(tmp_path).create("data/x.shard") as out,
    ):
        out.write(bytes(MIN_SYNC_BYTES))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to switch to a user without permission")
def test_a_read_without_permission_raises_access_denied_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    (tmp_path / "x").chmod(0)
    tmp_path.chmod(0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(AccessDeniedError, match="'x'"):
            LocalStore(tmp_path).read("x", 0, 1)
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("store_name", [name for name in STORES if name not in ("local", "memory")])
def test_a_store_that_ignores_conditions_is_reported_once(
    place: Place, store_name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditional_put, "_probed", set())
    store = open_store(*place)
    for name in ("a", "b"):
        store.put(name, b"x", overwrite=False)
    warned = [record.message for record in caplog.records if "ignores conditional writes" in record.message]
    assert len(warned) == (1 if "rclone" in store_name else 0)
    assert set(store.list()) == {"a", "b"}


def test_a_block_that_raises_leaves_no_object_on_s3(s3: Place) -> None:
    uri, options = s3
    store = open_store(uri, options)

    def write() -> None:
        with store.create("data/x") as out:
            out.write(b"half")
            raise KeyError("the caller's own")

    with pytest.raises(KeyError):
        write()
    with pytest.raises(ObjectNotFoundError):
        store.read("data/x", 0, 1)


def test_a_missing_bucket_raises_store_error(s3: Place) -> None:
    _, options = s3
    store = open_store("s3://no-such-bucket-anywhere/x", options)
    with pytest.raises(StoreError, match="bucket or folder"):
        store.put("manifest", b"x", overwrite=True)
