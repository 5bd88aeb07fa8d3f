"""What tests share: a pool of ranks, and a mocked S3, each started once."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest

from tests.ranks import RankPool

os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Real ranks: `ranks.run(world_size, function, *args)`."""
    with RankPool() as pool:
        yield pool


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of a mocked S3 on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str) -> tuple[str, dict[str, Any]]:
    """An empty place on the mocked S3: its URI, and storage_options."""
    options: dict[str, Any] = {
        "key": "testing",
        "secret": "testing",
        "client_kwargs": {"endpoint_url": s3_server},
    }
    bucket = f"bucket-{uuid.uuid4().hex}"
    fsspec.filesystem("s3", **options).mkdir(bucket)
    return f"s3://{bucket}/run/step-1", options
