"""Saves and loads through a network that fails: all come to the right values, by trying again."""

from __future__ import annotations

import collections
import uuid
from typing import Any

import torch

import reshard
from tests.proxy import Faults, proxied
from tests.servers import Server


def state(value: float) -> dict[str, Any]:
    """40 tensors, 800 kB: an answer is of a dozen pieces, each of which may be cut short."""
    return {f"layers.{i}.w": torch.full((100, 50), value + i) for i in range(40)}


def through(server: Server, endpoint: str) -> dict[str, Any]:
    """storage_options that lead through another endpoint, by a client and connections of their own."""
    return {**server.options, "client_kwargs": {"endpoint_url": endpoint}, "skip_instance_cache": True}


def rounds(count: int, server: Server, faults: Faults) -> collections.Counter[str]:
    """Save, load and verify `count` times through a proxy, and count the faults that were met.

    Raises AssertionError where a value is wrong, and the error where a call fails.
    """
    saved = state(1)
    with proxied(server.endpoint, faults) as (endpoint, proxy):
        for _ in range(count):
            uri = server.place(uuid.uuid4().hex)
            reshard.save(saved, uri, codec="none", storage_options=through(server, endpoint))
            loaded = state(0)
            reshard.load(loaded, uri, storage_options=through(server, endpoint))
            assert all(loaded[name].equal(value) for name, value in saved.items())
            assert reshard.open(uri, storage_options=through(server, endpoint)).verify() == []
    return proxy.counts
