"""Fixtures that tests share: a pool of ranks and object stores. Each starts once, when a test first needs it."""

from __future__ import annotations

import itertools
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings

from reshard.storage.formats import metadata_reader
from tests import servers
from tests.ranks import RankPool
from tests.torture.faults import by_client

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts background jobs like this
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("reshard", deadline=None)  # the time of a test depends on what else the machine does
settings.load_profile("reshard")
os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # gcsfs would call an API that the GCS server does not have

STORES = [
    "local",
    "memory",
    "moto",
    "moto by s3fs",
    "seaweedfs",
    "seaweedfs by s3fs",
    "gcs",
    "azurite",
    "rclone",
    "rclone by s3fs",
]
ENGINES = Path(__file__).parent / "engines"
Place = tuple[str, dict[str, Any]]
"""A URI and its storage_options."""
SLOW_FIXTURES = {"ranks", "moto", "seaweedfs", "gcs", "azurite", "rclone", "s3"}
"""The fixtures that start servers or processes."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignore tests/engines unless the command line names it. It needs another environment: `make test-engines`."""
    named = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    ignored = collection_path == ENGINES and not any(path.is_relative_to(ENGINES) for path in named)
    return ignored or None  # None lets other rules decide


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need a server or several ranks as slow. Other slow tests mark themselves."""
    for item in items:
        assert isinstance(item, pytest.Function)
        store = item.callspec.params.get("store_name", "local") if hasattr(item, "callspec") else "local"
        if SLOW_FIXTURES.intersection(item.fixturenames) or store not in ("local", "memory"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def constant_latency(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every small read appear to take a microsecond: which gaps are read over must not depend on the machine."""
    if SLOW_FIXTURES.isdisjoint(request.fixturenames):
        monkeypatch.setattr(metadata_reader, "time", SimpleNamespace(perf_counter=itertools.count(0, 1e-6).__next__))


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Real ranks: `ranks.run(world_size, function, *args)`."""
    with RankPool() as pool:
        yield pool


@pytest.fixture(scope="session")
def moto() -> Iterator[servers.Server]:
    with servers.moto() as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    with servers.seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    with servers.fake_gcs(tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    with servers.azurite(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    with servers.rclone(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture
def s3(moto: servers.Server) -> Place:
    """An empty location on the mocked S3."""
    return moto.place(uuid.uuid4().hex), moto.options


@pytest.fixture
def place(store_name: str, request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty location on the store of the parametrized test."""
    if store_name == "local":
        return str(tmp_path / "checkpoint"), {}
    if store_name == "memory":
        return f"memory://{uuid.uuid4().hex}/checkpoint", {}
    server_name, _, client = store_name.partition(" by ")
    server: servers.Server = request.getfixturevalue(server_name)
    options = by_client(client, server.options)
    return server.place(f"{uuid.uuid4().hex}/checkpoint"), options
