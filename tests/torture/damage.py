"""Damage of every kind to a saved checkpoint: whatever is done to it, a load gives the right values, or an error.

Two kinds. Accidents (bytes flipped, cut, swapped, objects replaced): no wrong value may pass. And malice: a manifest
that was changed and sealed again with a right checksum, whose values nobody can vouch for; it must not crash the
reader, nor make it take memory that neither the manifest nor the tensors justify.
"""

from __future__ import annotations

import collections
import json
import random
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import reshard
from reshard.planner.box import Box
from reshard.planner.chunk_reads import Want
from reshard.planner.read_plan import plan_reads
from reshard.storage.formats.detect import open_source
from reshard.storage.formats.native.manifest import MANIFEST_NAME
from reshard.storage.runtime.checksums import checksum
from reshard.storage.stores.base import Capabilities
from reshard.storage.stores.testing import MemoryStore
from reshard.storage.writing import object_layout

Content = dict[str, bytes]
MAX_MEMORY = 64 * 1024 * 1024
"""More than a load of the small checkpoint takes, and what one decoded chunk may."""


def checkpoint(codec: str, seed: int) -> tuple[Content, dict[str, Any]]:
    """A small checkpoint of several dtypes and data objects, and what was saved."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Any] = {
        "w": torch.randn(120, 300, generator=generator),
        "h": torch.randn(200, 400, generator=generator).to(torch.bfloat16),
        "i": torch.randint(0, 1000, (50, 40), generator=generator),
        "scalar": torch.tensor(float(seed)),
        "step": seed,
        "config": {"name": f"run {seed}", "betas": (0.9, 0.95)},
    }
    store = MemoryStore()
    store.capabilities = Capabilities(buffers_objects=True)
    least, object_layout.MIN_OBJECT_BYTES = object_layout.MIN_OBJECT_BYTES, 50_000
    try:
        reshard.save(state, store, codec=codec)
    finally:
        object_layout.MIN_OBJECT_BYTES = least
    return store.content, state


def outcome(content: Content, state: dict[str, Any]) -> str:
    """ "right", or the name of reshard's error. Raises AssertionError for wrong values, and whatever else comes."""
    store = MemoryStore()
    store.content = content
    loaded: dict[str, Any] = {
        name: torch.full_like(value, 7) if isinstance(value, torch.Tensor) else None for name, value in state.items()
    }
    loaded["config"] = {"name": None, "betas": None}
    try:
        reshard.load(loaded, store)
        checkpoint = reshard.open(store)
        for name in checkpoint.tensors:
            checkpoint.read(name)
        for name in checkpoint.value_names:
            checkpoint.read_value(name)
        assert checkpoint.verify() == []
    except reshard.errors.RankError as error:
        raise AssertionError("what is not of reshard was raised") from error
    except reshard.errors.CheckpointError as error:
        return type(error).__name__
    for name, value in state.items():
        same = loaded[name].equal(value) if isinstance(value, torch.Tensor) else loaded[name] == value
        assert same, f"{name} is wrong, and nothing said so"
    return "right"


def data_of(content: Content) -> list[str]:
    return [name for name in content if name != MANIFEST_NAME]


def flip(rng: random.Random, content: Content, other: Content) -> None:
    name = rng.choice(list(content))
    damaged = bytearray(content[name])
    for _ in range(rng.choice((1, 1, 3, 50))):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    content[name] = bytes(damaged)


def cut(rng: random.Random, content: Content, other: Content) -> None:
    name = rng.choice(list(content))
    content[name] = content[name][: rng.randrange(len(content[name]))]


def grow(rng: random.Random, content: Content, other: Content) -> None:
    name = rng.choice(list(content))
    content[name] += rng.randbytes(rng.randint(1, 100))


def blank(rng: random.Random, content: Content, other: Content) -> None:
    """A page of zeros, as a disk that lost power leaves."""
    name = rng.choice(list(content))
    at = rng.randrange(len(content[name]))
    size = min(rng.choice((512, 4096)), len(content[name]) - at)
    content[name] = content[name][:at] + bytes(size) + content[name][at + size :]


def swap_chunks(rng: random.Random, content: Content, other: Content) -> None:
    store = MemoryStore()
    store.content = content
    index = open_source(store).index()
    name = rng.choice(data_of(content))
    data = bytearray(content[name])
    plan = plan_reads(index, [Want(entry.name, Box.whole(entry.shape)) for entry in index.entries])
    starts, stops, objects = (
        np.concatenate([getattr(read, column).ravel() for read in plan.reads])
        for column in ("starts", "stops", "objects")
    )
    here = objects == [found for found, _ in index.objects].index(name)
    starts, stops = starts[here], stops[here]
    if len(starts) < 2:
        return
    a, b = rng.sample(range(len(starts)), 2)
    size = int(min(stops[a] - starts[a], stops[b] - starts[b]))
    first, second = (slice(int(starts[i]), int(starts[i]) + size) for i in (a, b))
    data[first], data[second] = data[second], data[first]
    content[name] = bytes(data)


def drop(rng: random.Random, content: Content, other: Content) -> None:
    del content[rng.choice(list(content))]


def foreign_data(rng: random.Random, content: Content, other: Content) -> None:
    """The data of another checkpoint, under this one's name."""
    content[rng.choice(data_of(content))] = other[rng.choice(data_of(other))]


def foreign_manifest(rng: random.Random, content: Content, other: Content) -> None:
    """The manifest of an older save, whose data is gone."""
    content[MANIFEST_NAME] = other[MANIFEST_NAME]


def swap_objects(rng: random.Random, content: Content, other: Content) -> None:
    """Two objects, each under the other's name; the manifest may be one of them."""
    a, b = rng.sample(list(content), 2)
    content[a], content[b] = content[b], content[a]


ACCIDENTS: list[Callable[[random.Random, Content, Content], None]] = [
    flip, flip, flip, cut, grow, blank, swap_chunks, drop, foreign_data, foreign_manifest, swap_objects,
]  # fmt: skip


def lie(rng: random.Random, manifest: bytes) -> bytes:
    """A manifest that claims something else, sealed again with a right checksum."""
    _, version, length, _ = struct.unpack_from("<8sIIQ", manifest)
    header = json.loads(manifest[32 : 32 + length])
    columns = bytearray(manifest[32 + length :])
    if rng.random() < 0.5:
        for _ in range(rng.choice((1, 1, 4))):
            at = rng.randrange(len(columns) // 8) * 8
            columns[at : at + 8] = struct.pack(
                "<q", rng.choice((-1, 0, 1, 2**31, 2**62, -(2**63), rng.getrandbits(40)))
            )
        header["blocks"][0][-1] = f"{checksum(columns):x}"
    else:
        _change(rng, header)
    text = json.dumps(header).encode()
    prefix = struct.pack("<8sIIQ", b"RESHARD\n", version, len(text), 32 + len(text) + len(columns))
    return prefix + struct.pack("<Q", checksum(prefix + text)) + text + columns


def _change(rng: random.Random, header: dict[str, Any]) -> None:
    """Put something else in some place of a header."""
    place: Any = header[rng.choice(("entries", "objects", "blocks", "entries"))]
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], (list, dict)) and place[key] and rng.random() < 0.9:
            place = place[key]
            continue
        place[key] = rng.choice(WILD)
        return


WILD: tuple[Any, ...] = (0, 1, -1, 2**31, 2**63, 2**70, 1.5, float("inf"), None, "", "x" * 50, "../x", [], {}, True)


def accidents(count: int, seed: int) -> collections.Counter[str]:
    """Do `count` accidents, and count how each ended. Raises AssertionError where a wrong value passed."""
    rng = random.Random(seed)
    ended: collections.Counter[str] = collections.Counter()
    saved = {codec: (checkpoint(codec, 1), checkpoint(codec, 2)) for codec in ("zstd", "none")}
    for _ in range(count):
        (content, state), (other, _) = saved[rng.choice(("zstd", "none"))]
        damaged = dict(content)
        rng.choice(ACCIDENTS)(rng, damaged, other)
        ended[outcome(damaged, state)] += 1
    return ended


def lies(count: int, seed: int) -> collections.Counter[str]:
    """Load by `count` manifests that lie. Raises AssertionError where memory was taken on their word."""
    rng = random.Random(seed)
    ended: collections.Counter[str] = collections.Counter()
    saved = {codec: checkpoint(codec, 1) for codec in ("zstd", "none")}
    tracemalloc.start()
    for _ in range(count):
        content, state = saved[rng.choice(("zstd", "none"))]
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            ended[outcome({**content, MANIFEST_NAME: lie(rng, content[MANIFEST_NAME])}, state)] += 1
        except AssertionError:
            ended["other values"] += 1
        taken = tracemalloc.get_traced_memory()[1] - before
        assert taken < MAX_MEMORY, f"a lie took {taken} bytes"
    tracemalloc.stop()
    return ended
