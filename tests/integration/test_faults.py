"""What happens on the way between a real client and a real server: tried again where it may pass, told where not."""

from __future__ import annotations

import time
import uuid

import pytest

import reshard
from reshard.storage import retrying_store
from tests import servers
from tests.proxy import Faults, proxied
from tests.torture.faults import CLIENTS, by_client, rounds, state, through

# Connections that are broken on purpose are left to the collector, by the proxy and by the client.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


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
def test_faults_that_pass_are_passed(seaweedfs: servers.Server, client: str, faults: Faults, met: str) -> None:
    assert rounds(3, seaweedfs, faults, client)[met] > 0


@pytest.mark.parametrize("client", CLIENTS)
def test_a_server_that_stops_answering_is_given_up_in_time(
    seaweedfs: servers.Server, monkeypatch: pytest.MonkeyPatch, client: str
) -> None:
    monkeypatch.setattr(retrying_store, "REQUEST_DEADLINE_S", 1.0)
    monkeypatch.setattr(retrying_store, "RETRY_FOR_S", 3.0)
    uri = seaweedfs.place(uuid.uuid4().hex)
    reshard.save(state(1), uri, storage_options=seaweedfs.options)
    with proxied(seaweedfs.endpoint, Faults(hang=1)) as (endpoint, _):
        begin = time.monotonic()
        with pytest.raises(reshard.errors.UnavailableError, match=r"cannot read 'manifest\.reshard'.* now"):
            reshard.load(state(0), uri, storage_options=by_client(client, through(seaweedfs, endpoint)))
        assert time.monotonic() - begin < 10


@pytest.mark.parametrize(("client", "words"), [("obstore", "Connection refused"), ("s3fs", "Could not connect")])
def test_a_server_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, client: str, words: str) -> None:
    monkeypatch.setattr(retrying_store, "RETRY_FOR_S", 0.5)
    (port,) = servers.free_ports(1)
    options = {"key": "a", "secret": "b", "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{port}"}}
    with pytest.raises(reshard.errors.UnavailableError, match=words):
        reshard.open("s3://bucket/x", storage_options=by_client(client, options))
