"""Saves and loads through a faulty network: retries lead to the right values."""

from __future__ import annotations

import collections
import uuid
from typing import Any

import torch

import reshard
from tests.proxy import Faults, proxied
from tests.servers import Server

CLIENTS = ("obstore", "s3fs")


def state(value: float) -> dict[str, Any]:
    """Return 40 tensors of 800 kB in total. An answer has a dozen pieces, and each may be truncated."""
    return {f"layers.{i}.w": torch.full((100, 50), value + i) for i in range(40)}


def through(server: Server, endpoint: str) -> dict[str, Any]:
    """Return storage_options for another endpoint, with a new client and new connections."""
    return {**server.through(endpoint).options, "skip_instance_cache": True}


def by_client(client: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return storage_options that select a client. For s3fs they contain an option that obstore does not support."""
    return {**options, "config_kwargs": {"max_pool_connections": 32}} if client == "s3fs" else options


def rounds(count: int, server: Server, faults: Faults, client: str) -> collections.Counter[str]:
    """Save, load and verify `count` times through a proxy, and return the number of faults of each kind.

    Raises:
        AssertionError: A loaded value is wrong.
        CheckpointError: A call fails.
    """
    saved = state(1)
    with proxied(server.endpoint, faults) as (endpoint, proxy):
        options = by_client(client, through(server, endpoint))
        for _ in range(count):
            uri = server.place(uuid.uuid4().hex)
            reshard.save(saved, uri, codec="none", storage_options=options)
            loaded = state(0)
            reshard.load(loaded, uri, storage_options=options)
            assert all(loaded[name].equal(value) for name, value in saved.items())
            assert reshard.open(uri, storage_options=options).verify() == []
    return proxy.counts
