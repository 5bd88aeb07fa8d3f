"""Damage a saved checkpoint in many ways. A load must return the right values or raise an error.

There are two kinds. Accidents: bytes are flipped, truncated or swapped, or objects are replaced. No load may return a
wrong value. Falsehoods: a manifest is changed and gets a right checksum. Its values can be anything, but it must not
crash the reader or make it allocate memory that neither the manifest nor the tensors justify.
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
from reshard.planner.chunk_reads import WantedBox
from reshard.planner.read_plan import plan_reads
from reshard.storage.formats.detect import open_source
from reshard.storage.formats.native.manifest import MANIFEST_NAME
from reshard.storage.runtime.checksums import checksum
from reshard.storage.stores.base import Capabilities
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.writing import object_layout

Content = dict[str, bytes]
MAX_MEMORY = 64 * 1024 * 1024
"""The memory limit: more than a load of the small checkpoint and one decoded chunk take."""


def checkpoint(codec: str, seed: int) -> tuple[Content, dict[str, Any]]:
    """Return a small checkpoint with several dtypes and data objects, and the saved state."""
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
    """Load it. Return "right" or the class name of reshard's error. Raise AssertionError for a wrong value."""
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
        raise AssertionError("an exception that is not one of reshard's was raised") from error
    except reshard.errors.CheckpointError as error:
        return type(error).__name__
    for name, value in state.items():
        same = loaded[name].equal(value) if isinstance(value, torch.Tensor) else loaded[name] == value
        assert same, f"{name} is wrong, and no error was raised"
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
    """Replace a page by zeros, as after a power failure."""
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
    plan = plan_reads(index, [WantedBox(entry.name, Box.whole(entry.shape)) for entry in index.entries])
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
    """Replace a data object by one of another checkpoint."""
    content[rng.choice(data_of(content))] = other[rng.choice(data_of(other))]


def foreign_manifest(rng: random.Random, content: Content, other: Content) -> None:
    """Replace the manifest by that of another save, whose data is missing."""
    content[MANIFEST_NAME] = other[MANIFEST_NAME]


def swap_objects(rng: random.Random, content: Content, other: Content) -> None:
    """Swap two objects. One of them may be the manifest."""
    a, b = rng.sample(list(content), 2)
    content[a], content[b] = content[b], content[a]


ACCIDENTS: list[Callable[[random.Random, Content, Content], None]] = [
    flip, flip, flip, cut, grow, blank, swap_chunks, drop, foreign_data, foreign_manifest, swap_objects,
]  # fmt: skip


def falsify(rng: random.Random, manifest: bytes) -> bytes:
    """Return a manifest with changed values and a right checksum."""
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
    """Replace a value somewhere in a header."""
    container: Any = header[rng.choice(("entries", "objects", "blocks", "entries"))]
    while True:
        key = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
        if isinstance(container[key], (list, dict)) and container[key] and rng.random() < 0.9:
            container = container[key]
            continue
        container[key] = rng.choice(HOSTILE_VALUES)
        return


HOSTILE_VALUES: tuple[Any, ...] = (
    0,
    1,
    -1,
    2**31,
    2**63,
    2**70,
    1.5,
    float("inf"),
    None,
    "",
    "x" * 50,
    "../x",
    [],
    {},
    True,
)


def accidents(count: int, seed: int) -> collections.Counter[str]:
    """Load after `count` accidents, and count how the loads ended. Raise AssertionError for a wrong value."""
    rng = random.Random(seed)
    ended: collections.Counter[str] = collections.Counter()
    saved = {codec: (checkpoint(codec, 1), checkpoint(codec, 2)) for codec in ("zstd", "none")}
    for _ in range(count):
        (content, state), (other, _) = saved[rng.choice(("zstd", "none"))]
        damaged = dict(content)
        rng.choice(ACCIDENTS)(rng, damaged, other)
        ended[outcome(damaged, state)] += 1
    return ended


def falsehoods(count: int, seed: int) -> collections.Counter[str]:
    """Load with `count` false manifests, and count how the loads ended. Raise AssertionError for too much memory."""
    rng = random.Random(seed)
    ended: collections.Counter[str] = collections.Counter()
    saved = {codec: checkpoint(codec, 1) for codec in ("zstd", "none")}
    tracemalloc.start()
    for _ in range(count):
        content, state = saved[rng.choice(("zstd", "none"))]
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            ended[outcome({**content, MANIFEST_NAME: falsify(rng, content[MANIFEST_NAME])}, state)] += 1
        except AssertionError:
            ended["other values"] += 1
        taken = tracemalloc.get_traced_memory()[1] - before
        assert taken < MAX_MEMORY, f"a false manifest took {taken} bytes"
    tracemalloc.stop()
    return ended
