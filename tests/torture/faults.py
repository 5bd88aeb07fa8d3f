"""Saves and loads through a network that fails: all come to the right values, by trying again."""

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
    """40 tensors, 800 kB: an answer is of a dozen pieces, each of which may be cut short."""
    return {f"layers.{i}.w": torch.full((100, 50), value + i) for i in range(40)}


def through(server: Server, endpoint: str) -> dict[str, Any]:
    """storage_options that lead through another endpoint, by a client and connections of their own."""
    return {**server.through(endpoint).options, "skip_instance_cache": True}


def by_client(client: str, options: dict[str, Any]) -> dict[str, Any]:
    """storage_options for one of the clients: s3fs takes what obstore does not understand."""
    return {**options, "config_kwargs": {"max_pool_connections": 32}} if client == "s3fs" else options


def rounds(count: int, server: Server, faults: Faults, client: str) -> collections.Counter[str]:
    """Save, load and verify `count` times through a proxy, and count the faults that were met.

    Raises AssertionError where a value is wrong, and the error where a call fails.
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
