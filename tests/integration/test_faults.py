"""Faults between a real client and a real server: transient ones are retried, others are reported."""

from __future__ import annotations

import datetime
import time
import uuid
from pathlib import Path

import fsspec
import pytest

import reshard
from reshard.storage.formats.native.manifest import MANIFEST_NAME
from reshard.storage.stores import obstore, retry
from tests import servers
from tests.proxy import Faults, proxied
from tests.torture.faults import CLIENTS, by_client, rounds, state, through

# The proxy and the client leave connections that are broken on purpose to the garbage collector.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]


@pytest.mark.parametrize(
    ("faults", "met"),
    [
        (Faults(reset=0.04), "reset"),
        (Faults(truncate=0.04), "truncate"),
        (Faults(slow_down=0.4), "slow_down"),
        (Faults(reset=0.02, truncate=0.02, slow_down=0.2, latency_s=0.002), "reset"),
    ],
    ids=["resets", "truncated bodies", "slow-downs", "all"],
)
@pytest.mark.parametrize("client", CLIENTS)
def test_saves_and_loads_survive_transient_faults(
    seaweedfs: servers.Server, client: str, faults: Faults, met: str
) -> None:
    assert rounds(3, seaweedfs, faults, client)[met] > 0


@pytest.mark.parametrize("client", CLIENTS)
def test_a_server_that_stops_answering_raises_unavailable_error_in_time(
    seaweedfs: servers.Server, monkeypatch: pytest.MonkeyPatch, client: str
) -> None:
    monkeypatch.setattr(retry, "REQUEST_DEADLINE_S", 1.0)
    monkeypatch.setattr(retry, "RETRY_FOR_S", 3.0)
    uri = seaweedfs.place(uuid.uuid4().hex)
    reshard.save(state(1), uri, storage_options=seaweedfs.options)
    with proxied(seaweedfs.endpoint, Faults(hang=1)) as (endpoint, _):
        begin = time.monotonic()
        with pytest.raises(reshard.errors.UnavailableError, match=r"cannot read 'manifest\.reshard'.* now"):
            reshard.load(state(0), uri, storage_options=by_client(client, through(seaweedfs, endpoint)))
        assert time.monotonic() - begin < 10


@pytest.mark.parametrize(("client", "words"), [("obstore", "Connection refused"), ("s3fs", "Could not connect")])
def test_a_missing_server_raises_unavailable_error(monkeypatch: pytest.MonkeyPatch, client: str, words: str) -> None:
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.5)
    (port,) = servers.free_ports(1)
    options = {"key": "a", "secret": "b", "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{port}"}}
    with pytest.raises(reshard.errors.UnavailableError, match=words):
        reshard.open("s3://bucket/x", storage_options=by_client(client, options))


@pytest.mark.parametrize("client", CLIENTS)
def test_expired_credentials_are_renewed(
    seaweedfs: servers.Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, client: str
) -> None:
    """All credentials are about to expire, so that every request needs new ones."""
    monkeypatch.setattr(obstore, "CREDENTIALS_FOR", datetime.timedelta(seconds=-1))
    asked = tmp_path / "asked"
    script = tmp_path / "credentials.sh"
    script.write_text(
        f"echo x >> {asked}\n"
        f"""echo '{{"Version": 1, "AccessKeyId": "{servers.KEY}", "SecretAccessKey": "{servers.SECRET}",'\n"""
        """date -u -d '+2 seconds' '+"Expiration": "%Y-%m-%dT%H:%M:%SZ"}'\n"""
    )
    (tmp_path / "config").write_text(f"[profile short]\ncredential_process = sh {script}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    options = {"profile": "short", "client_kwargs": {"endpoint_url": seaweedfs.endpoint}, "skip_instance_cache": True}
    options = by_client(client, options)
    uri = seaweedfs.place(uuid.uuid4().hex)
    reshard.save(state(1), uri, storage_options=options)
    before = len(asked.read_text().split())
    time.sleep(2)
    loaded = state(0)
    reshard.load(loaded, uri, storage_options=options)
    assert all(loaded[name].equal(value) for name, value in state(1).items())
    assert len(asked.read_text().split()) > before >= 2
    manifest = fsspec.filesystem("s3", **seaweedfs.options).cat(f"{uri}/{MANIFEST_NAME}")
    assert servers.SECRET.encode() not in manifest
