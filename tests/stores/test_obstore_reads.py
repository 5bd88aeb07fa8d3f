"""Reads through obstore for the filesystems of Google Cloud Storage and Azure."""

from __future__ import annotations

import datetime
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from adlfs import AzureBlobFileSystem
from azure.storage.blob import AccountSasPermissions, ResourceTypes, generate_account_sas
from gcsfs import GCSFileSystem
from google.oauth2.credentials import Credentials

import reshard
from reshard.storage.errors import AccessDeniedError, ObjectNotFoundError, StoreError, UnavailableError
from reshard.storage.stores import obstore_reads, retry
from reshard.storage.stores.base import Store
from reshard.storage.stores.fsspec import FsspecStore
from reshard.storage.stores.obstore_reads import ObstoreReads
from reshard.storage.stores.open import open_store
from reshard.storage.stores.retry import RetryingStore
from tests import servers
from tests.proxy import Faults, proxied
from tests.torture.faults import state, through

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sending a large body"),  # gcsfs and adlfs warn about their own writes
    # The proxy leaves connections that are broken on purpose to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]
CLOUDS = ["gcs", "azurite"]
DATA = bytes(range(256)) * 4


@pytest.fixture
def cloud(store_name: str, request: pytest.FixtureRequest) -> servers.Server:
    server: servers.Server = request.getfixturevalue(store_name)
    return server


def fsspec_store(store: Store) -> FsspecStore:
    assert isinstance(store, RetryingStore)
    assert isinstance(store.inner, FsspecStore)
    return store.inner


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, kind: type[Any], method: str) -> Iterator[list[str]]:
    """Collect the first argument of each call of an asynchronous method."""
    calls: list[str] = []
    original = getattr(kind, method)

    async def counting(self: Any, first: str, *arguments: Any, **options: Any) -> Any:
        calls.append(first)
        return await original(self, first, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(kind, method, counting)
        yield calls


@contextmanager
def reads_by_filesystem(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect the paths that gcsfs and adlfs read."""
    with (
        counted(monkeypatch, GCSFileSystem, "_cat_file") as of_gcsfs,
        counted(monkeypatch, AzureBlobFileSystem, "_cat_file") as of_adlfs,
    ):
        found: list[str] = []
        yield found
    found += of_gcsfs + of_adlfs


@pytest.mark.parametrize("store_name", CLOUDS)
def test_a_load_reads_through_obstore(cloud: servers.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, saved, loaded = cloud.place(uuid.uuid4().hex), state(1), state(0)
    reshard.save(saved, uri, storage_options=cloud.options)
    with (
        reads_by_filesystem(monkeypatch) as by_filesystem,
        counted(monkeypatch, ObstoreReads, "read") as by_obstore,
    ):
        reshard.load(loaded, uri, storage_options=cloud.options)
    assert not by_filesystem
    assert any(name.endswith(".shard") for name in by_obstore)
    assert all(loaded[name].equal(value) for name, value in saved.items())


@pytest.mark.parametrize("store_name", CLOUDS)
def test_reads_return_what_the_object_has(cloud: servers.Server) -> None:
    store = open_store(cloud.place(uuid.uuid4().hex), cloud.options)
    assert fsspec_store(store)._reads is not None
    for name in ("plain.bin", "folder/with space é.bin", "100%.bin", ".hidden"):
        store.put(name, DATA, overwrite=True)
        for start, stop in [(0, 1024), (1, 2), (1000, 2000), (1024, 1030), (5000, 5001)]:
            assert bytes(store.read(name, start, stop)) == DATA[start:stop]
    with pytest.raises(ObjectNotFoundError, match=r"has no object 'absent\.bin'"):
        store.read("absent.bin", 0, 1)


@pytest.mark.parametrize("error", [StoreError("this API does not support the bucket"), ObjectNotFoundError("no a")])
@pytest.mark.parametrize("store_name", CLOUDS)
def test_the_filesystem_reads_what_obstore_cannot_read(
    cloud: servers.Server, error: StoreError, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(cloud.place(uuid.uuid4().hex), cloud.options)
    store.put("a", DATA, overwrite=False)

    async def refused(self: ObstoreReads, name: str, start: int, stop: int) -> bytes:
        raise error

    monkeypatch.setattr(ObstoreReads, "read", refused)
    with caplog.at_level(logging.INFO, "reshard"), reads_by_filesystem(monkeypatch) as by_filesystem:
        assert bytes(store.read("a", 3, 9)) == DATA[3:9]
        assert bytes(store.read("a", 5, 9)) == DATA[5:9]
    assert len(by_filesystem) == 2
    assert caplog.text.count("obstore is not used any more") == 1
    assert fsspec_store(store).capabilities.async_reads is not None


@pytest.mark.parametrize("store_name", CLOUDS)
def test_the_error_of_the_filesystem_is_raised_if_it_cannot_read_either(
    cloud: servers.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(cloud.place(uuid.uuid4().hex), cloud.options)

    async def refused(self: ObstoreReads, name: str, start: int, stop: int) -> bytes:
        raise AccessDeniedError("no access")

    monkeypatch.setattr(ObstoreReads, "read", refused)
    with pytest.raises(ObjectNotFoundError, match="has no object 'a'"):
        store.read("a", 0, 1)
    reads = fsspec_store(store)._reads
    assert reads is not None
    assert reads.can_read("a", 0, 1), "the filesystem could not read it, so nothing is known about obstore"


def test_loads_survive_transient_faults(azurite: servers.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, saved = azurite.place(uuid.uuid4().hex), state(1)
    reshard.save(saved, uri, codec="none", storage_options=azurite.options)
    faults = Faults(reset=0.02, truncate=0.02, slow_down=0.2)
    with (
        counted(monkeypatch, ObstoreReads, "read") as by_obstore,
        proxied(azurite.endpoint, faults) as (endpoint, proxy),
    ):
        for _ in range(3):
            loaded = state(0)
            reshard.load(loaded, uri, storage_options=through(azurite, endpoint))
            assert all(loaded[name].equal(value) for name, value in saved.items())
    assert sum(proxy.counts.values()) > 0
    assert by_obstore


def by_token(server: servers.Server) -> dict[str, Any]:
    return {"token": Credentials("of-a-test"), "endpoint_url": server.endpoint}  # type: ignore[no-untyped-call]


def by_signature(server: servers.Server) -> dict[str, Any]:
    signature = generate_account_sas(
        servers.AZURE_ACCOUNT,
        servers.AZURE_KEY,
        ResourceTypes(service=True, container=True, object=True),
        AccountSasPermissions(read=True, write=True, list=True, create=True, delete=True),
        datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1),
    )
    return {"connection_string": f"BlobEndpoint={server.endpoint};SharedAccessSignature={signature}"}


@pytest.mark.parametrize(("store_name", "options"), [("gcs", by_token), ("azurite", by_signature)])
def test_credentials_of_the_filesystem_are_used(
    cloud: servers.Server, options: Callable[[servers.Server], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = cloud.place(uuid.uuid4().hex)
    saved = {"w": torch.arange(10)}
    reshard.save(saved, uri, storage_options=options(cloud))
    with counted(monkeypatch, ObstoreReads, "read") as by_obstore, reads_by_filesystem(monkeypatch) as by_filesystem:
        assert reshard.open(uri, storage_options=options(cloud)).read("w").equal(saved["w"])
    assert by_obstore
    assert not by_filesystem


@pytest.mark.parametrize(
    ("store_name", "more"),
    [("gcs", {"requester_pays": True}), ("gcs", {"version_aware": True}), ("azurite", {"version_aware": True})],
)
def test_the_filesystem_reads_if_obstore_lacks_an_option(cloud: servers.Server, more: dict[str, Any]) -> None:
    store = open_store(cloud.place(uuid.uuid4().hex), {**cloud.options, **more})
    assert fsspec_store(store)._reads is None


@pytest.mark.parametrize("store_name", CLOUDS)
def test_the_filesystem_reads_if_obstore_is_not_installed(
    cloud: servers.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obstore_reads, "find_spec", lambda name: None)
    store = open_store(cloud.place(uuid.uuid4().hex), cloud.options)
    assert fsspec_store(store)._reads is None
    store.put("a", DATA, overwrite=False)
    assert bytes(store.read("a", 1, 5)) == DATA[1:5]


def test_wrong_keys_of_azure_are_denied(azurite: servers.Server) -> None:
    wrong = azurite.options["connection_string"].replace("Eby8", "AAAA")
    store = open_store(azurite.place("x"), {"connection_string": wrong})
    with pytest.raises(AccessDeniedError, match="refused to read 'a'") as caught:
        store.read("a", 0, 1)
    assert "AAAA" not in str(caught.value)
    with pytest.raises(AccessDeniedError, match="refused to write 'a'"):
        store.put("a", b"", overwrite=True)


def test_a_busy_azure_is_a_transient_failure() -> None:
    from azure.core.exceptions import HttpResponseError, ServiceRequestError

    from reshard.storage.stores.client_errors import translated

    busy = HttpResponseError("The server is busy.\nRequestId:1")
    busy.status_code, busy.error_code = 503, "ServerBusy"  # type: ignore[attr-defined]
    found = translated(busy, "read", "a", "abfs://c")
    assert isinstance(found, UnavailableError)
    assert str(found) == "cannot read 'a' in abfs://c now: HttpResponseError: The server is busy."
    assert isinstance(translated(ServiceRequestError("lost"), "write", "a", "abfs://c"), UnavailableError)


@pytest.mark.parametrize("endpoint", ["http://host.invalid:80", "https://127.0.0.1:{port}"])
def test_the_error_says_why_there_is_no_connection(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second server does not understand TLS."""
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = {"endpoint_url": endpoint.format(port=server.server_port), "region_name": "us-east-1"}
        store = open_store("s3://bucket/x", {"key": "a", "secret": "b", "client_kwargs": client})
        with pytest.raises(UnavailableError, match="check the host of the endpoint, and whether it uses http or https"):
            store.read("a", 0, 1)
        server.shutdown()


OTHER_VARIABLES = {
    "AZURE_STORAGE_USE_EMULATOR": "true",
    "AZURE_STORAGE_TOKEN": "of-another-login",
    "AZURE_STORAGE_SAS_KEY": "sv=1&sig=x",
    "AZURE_SKIP_SIGNATURE": "true",
    "GOOGLE_BEARER_TOKEN": "of-another-login",
    "GOOGLE_SKIP_SIGNATURE": "true",
    "GOOGLE_BASE_URL": "http://127.0.0.1:9",
}


@pytest.mark.parametrize("store_name", CLOUDS)
@pytest.mark.parametrize("variable", OTHER_VARIABLES)
def test_variables_that_only_obstore_knows_have_no_effect(
    cloud: servers.Server, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, saved = cloud.place(uuid.uuid4().hex), {"w": torch.arange(10)}
    monkeypatch.setenv(variable, OTHER_VARIABLES[variable])
    reshard.save(saved, uri, storage_options=cloud.options)
    with counted(monkeypatch, ObstoreReads, "read") as by_obstore, reads_by_filesystem(monkeypatch) as by_filesystem:
        assert reshard.open(uri, storage_options=cloud.options).read("w").equal(saved["w"])
    assert by_obstore
    assert not by_filesystem


@pytest.mark.parametrize("anonymous", [True, False])
def test_only_the_credentials_of_gcsfs_are_sent(anonymous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "of-another-login")
    with answering(lambda path: (404, b"")) as (endpoint, headers):
        token = "anon" if anonymous else Credentials("of-a-test")  # type: ignore[no-untyped-call]
        store = open_store("gs://bucket/x", {"token": token, "endpoint_url": endpoint})
        with pytest.raises(ObjectNotFoundError):
            store.read("a", 0, 1)
    assert len(headers) == 2, "of obstore and of gcsfs"
    assert {header.get("Authorization") for header in headers} == {None if anonymous else "Bearer of-a-test"}


@contextmanager
def answering(answer: Callable[[str], tuple[int, bytes]]) -> Iterator[tuple[str, list[Any]]]:
    """Serve what a function returns for each path. Yield the endpoint, and a list of the headers of all requests."""
    headers: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers.append(self.headers)
            status, body = answer(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"1"')
            self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", headers
    finally:
        server.shutdown()
        server.server_close()


def test_a_page_that_is_sent_instead_of_an_object_is_not_read() -> None:
    """The server has the JSON API that gcsfs uses, and a page for all other paths."""

    def answer(path: str) -> tuple[int, bytes]:
        return (206, DATA[3:9]) if "/o/" in path and "alt=media" in path else (200, b"<html>please log in</html>")

    with answering(answer) as (endpoint, _):
        store = open_store("gs://bucket/x", {"token": "anon", "endpoint_url": endpoint})
        assert bytes(store.read("model.safetensors", 3, 9)) == DATA[3:9]
        assert bytes(store.read("model.safetensors", 0, 6)) == DATA[3:9]


def test_a_proxy_that_only_obstore_uses_is_not_needed(gcs: servers.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, saved = gcs.place(uuid.uuid4().hex), state(1)
    reshard.save(saved, uri, storage_options=gcs.options)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    loaded = state(0)
    with reads_by_filesystem(monkeypatch) as by_filesystem:
        reshard.load(loaded, uri, storage_options={**gcs.options, "skip_instance_cache": True})
    assert by_filesystem
    assert all(loaded[name].equal(value) for name, value in saved.items())


def test_an_empty_range_does_not_stop_obstore(gcs: servers.Server) -> None:
    store = open_store(gcs.place(uuid.uuid4().hex), gcs.options)
    store.put("a", DATA, overwrite=False)
    assert bytes(store.read("a", 5, 5)) == b""
    assert fsspec_store(store)._reads is not None


@pytest.mark.parametrize("store_name", CLOUDS)
def test_a_server_that_stops_answering_raises_unavailable_error_in_time(
    cloud: servers.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "REQUEST_DEADLINE_S", 1.0)
    monkeypatch.setattr(retry, "RETRY_FOR_S", 3.0)
    with proxied(cloud.endpoint, Faults(hang=1)) as (endpoint, _):
        begin = time.monotonic()
        with pytest.raises(UnavailableError, match=r"cannot read 'manifest\.reshard'.* now"):
            reshard.open(cloud.place("x"), storage_options=through(cloud, endpoint))
        assert time.monotonic() - begin < 20


def test_a_read_that_obstore_does_not_end_raises_unavailable_error(
    moto: servers.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obstore_reads, "call_deadline_s", lambda: 0.2)
    with proxied(moto.endpoint, Faults(hang=1)) as (endpoint, _):
        store = open_store(moto.place("x"), through(moto, endpoint))
        assert isinstance(store, RetryingStore)
        with pytest.raises(UnavailableError, match=r"cannot read 'a'.* now: TimeoutError"):
            store.inner.read("a", 0, 5)
