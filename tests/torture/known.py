"""Hostile inputs that have hung or crashed a reader or exhausted its memory, and similar inputs."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata

import reshard
from reshard.planner.entries import Entry, Kind, Segments
from reshard.planner.grid import Grid
from reshard.planner.index import CheckpointIndex
from reshard.storage.formats.native.manifest import encode_manifest
from reshard.storage.stores.memory import MemoryStore
from tests.torture.grammars import (
    DCP,
    SLICES,
    Content,
    Pickles,
    read_manifest,
    two_directories,
    with_object,
    written_manifest,
)

CORRUPT = {"CorruptCheckpointError"}
GROUPS: list[tuple[Callable[[], dict[str, Content]], set[str]]] = []
"""Functions that return inputs by name, and the allowed ends of reading them."""
Make = Callable[[], dict[str, Content]]


def known(*ends: str) -> Callable[[Make], Make]:
    """Register a function that returns inputs. `ends` are the allowed ends; the default is CorruptCheckpointError."""

    def add(make: Make) -> Make:
        GROUPS.append((make, set(ends) or CORRUPT))
        return make

    return add


def zipped(pickled: bytes, method: int = zipfile.ZIP_STORED, before: bytes = b"", **records: bytes) -> bytes:
    out = io.BytesIO()
    out.write(before)
    with zipfile.ZipFile(out, "a" if before else "w", method) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3\n")
        for name, data in records.items():
            archive.writestr(f"archive/{name.replace('__', '/')}", data)
    return out.getvalue()


def as_object(data: bytes) -> Content:
    """Return a native checkpoint with a value stored as these bytes, as if torch.save had written them."""
    store = MemoryStore()
    reshard.save({"o": {torch.float32: {1, 2}, "a": Metadata}}, store, codec="none")
    return with_object(store.content, data)


def json_object(value: str) -> Content:
    """Return a native checkpoint with a value stored as this JSON."""
    store = MemoryStore()
    reshard.save({"o": 1}, store, codec="none")
    return with_object(store.content, value.encode())


def everywhere(name: str, pickled: bytes) -> dict[str, Content]:
    """Return a torch.save file with a pickle, and a native checkpoint with a value of that pickle."""
    return {f"{name}, file": {"m.pt": zipped(pickled)}, f"{name}, object": as_object(zipped(pickled))}


def metadata(pickled: bytes) -> Content:
    return {".metadata": pickled, "__0_0.distcp": SLICES}


def get(number: int) -> bytes:
    return b"h" + bytes([number])


def put(number: int) -> bytes:
    return b"q" + bytes([number])


def chain(first: bytes, step: Callable[[bytes], bytes], length: int) -> bytes:
    """Build values that are numbered from 0, each from the previous one."""
    return first + put(0) + b"".join(step(get(i)) + put(i + 1) for i in range(length))


def glob(name: str) -> bytes:
    module, _, of = name.partition(" ")
    return b"c" + module.encode() + b"\n" + of.encode() + b"\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


PAIRS = chain(b")", lambda last: last + last + b"\x86", 40)
TRIPLES = chain(b")", lambda last: last * 3 + b"\x87", 40)
MANY = chain(b")", lambda last: b"(" + last * 10 + b"t", 30)
LISTS = chain(b"]", lambda last: b"](" + last * 2 + b"e", 40)
DICTS = chain(b"}", lambda last: b"}(" + text("a") + last + text("b") + last + b"u", 40)
P2 = b"\x80\x02"


@known()
def zips_whose_readers_see_different_records() -> dict[str, Content]:
    import random

    deep = P2 + b")" + b"\x85" * 1_000_000 + put(0) + b"}" + get(0) + b"Ns."
    bomb = zipped(P2 + b"}.", zipfile.ZIP_DEFLATED, data__0=bytes(200_000_000))
    good = zipped(P2 + b"}.")
    end = good.rindex(b"PK\5\6")
    hostile = {
        "deep": zipped(deep),
        "compressed": bomb,
        "something before": zipped(P2 + b"}.", before=b"#!/bin/sh\n" * 3),
        "a comment": good[:end] + good[end : end + 20] + struct.pack("<H", 30) + bytes(30),
        "a directory twice": good[: good.index(b"PK\1\2")]
        + good[good.index(b"PK\1\2") : end] * 2
        + good[end:],
        "bytes between": good[: good.index(b"PK\1\2")] + bytes(100) + good[good.index(b"PK\1\2") :],
        **{f"two directories {i}": two_directories(random.Random(i), deep) for i in range(3)},
    }  # fmt: skip
    found = {f"{name}, file": {"m.pt": data} for name, data in hostile.items()}
    return found | {f"{name}, object": as_object(data) for name, data in hostile.items()}


@known()
def tuples_that_are_hashed_repeatedly() -> dict[str, Content]:
    keys = {
        "pairs": PAIRS + b"}" + get(40) + b"Ns.",
        "triples": TRIPLES + b"}" + get(40) + b"Ns.",
        "many": MANY + b"}(" + get(30) + b"Nu.",
        "thousands of keys": chain(b")", lambda last: last * 2 + b"\x86", 16) + b"}(" + (get(16) + b"N") * 5000 + b"u.",
    }
    found = {f"{name}, metadata": metadata(P2 + body) for name, body in keys.items()}
    for name, body in keys.items():
        found |= everywhere(name, P2 + body)
    in_set = PAIRS.replace(b"q", b"q") + glob("__builtin__ set") + b"](" + get(40) + b"e\x85R."
    found |= everywhere("a set", P2 + in_set)
    found["a set, metadata"] = metadata(b"\x80\x04" + PAIRS + b"\x8f(" + get(40) + b"\x90.")
    found["a frozenset, metadata"] = metadata(b"\x80\x04" + PAIRS + b"(" + get(40) + b"\x91.")
    return found


@known()
def keys_that_collide() -> dict[str, Content]:
    def long(value: int) -> bytes:
        data = value.to_bytes(value.bit_length() // 8 + 1, "little")
        return b"\x8a" + bytes([len(data)]) + data

    prime = 2**61 - 1
    numbers = b"}(" + b"".join(long(prime * i) + b"N" for i in range(1, 60_000)) + b"u."
    long_one = b"\x8b" + struct.pack("<I", 1_000_000) + b"\x01" * 1_000_000 + put(0)
    return {
        "integers, metadata": metadata(P2 + numbers),
        "a long integer, metadata": metadata(P2 + long_one + b"}(" + (get(0) + b"N") * 300_000 + b"u."),
        **everywhere("integers", P2 + numbers),
    }


def colliding_pairs(count: int) -> list[tuple[int, int]]:
    """Return pairs of integers that all have the same hash as tuples, by the xxHash of CPython 3.8 and later."""
    prime_1, prime_2, prime_5 = 11400714785074694791, 14029467366897019727, 2870177450012600261
    mask = 2**64 - 1
    inverse = pow(prime_2, -1, 2**64)

    def rotated(value: int) -> int:
        return ((value << 31) | (value >> 33)) & mask

    found: list[tuple[int, int]] = []
    target = 0x1234_5678_9ABC_DEF0
    a = 0
    while len(found) < count:
        a += 1
        after = rotated((prime_5 + a * prime_2) & mask) * prime_1 & mask
        b = (target - after) * inverse & mask
        if b < 2**61 - 1:
            found.append((a, b))
    assert len({hash(pair) for pair in found}) == 1
    return found


@known()
def tuples_that_collide() -> dict[str, Content]:
    pairs = dict.fromkeys(colliding_pairs(5000))
    return {
        "metadata": metadata(pickle.dumps(pairs, 2)),
        "metadata of protocol 4": metadata(pickle.dumps(pairs, 4)),
        "a set, metadata": metadata(pickle.dumps(set(pairs), 4)),
        **everywhere("a dict", pickle.dumps(pairs, 2)),
        **everywhere("a set", pickle.dumps(set(pairs), 2)),
        **everywhere("in a list first", P2 + pickle.dumps(list(pairs), 2)[2:-1] + put(255) + b"0"[:0]
                     + glob("__builtin__ set") + get(255) + b"\x85R."),
    }  # fmt: skip


@known()
def values_that_are_copied_repeatedly() -> dict[str, Content]:
    layout, size, ordered = glob("torch.serialization _get_layout"), glob("torch Size"), glob("collections OrderedDict")
    long_list = b"](" + b"N" * 50_000 + b"e" + put(0)
    long_tuple = b"(" + b"K\1" * 50_000 + b"t" + put(0)
    pairs = b"](" + b"".join(text(str(i)) + b"N\x86" for i in range(5000)) + b"e" + put(0)
    nested = b"".join(layout + b"](" + get(i) * 10 + b"e\x85R" + put(i + 1) for i in range(8))
    state = b"}(" + b"".join(text(str(i)) + b"N" for i in range(5000)) + b"u" + put(0)
    long_text = text("x" * 100_000) + put(0) + text("latin1") + put(1)
    torch_only = {
        "sizes of a list": long_list + b"](" + (size + get(0) + b"\x85R") * 3000 + b"e.",
        "dicts of pairs": pairs + b"](" + (ordered + get(0) + b"\x85R") * 3000 + b"e.",
        "sets": long_list + b"](" + (glob("__builtin__ set") + get(0) + b"\x85R") * 3000 + b"e.",
        "counters": long_list + b"](" + (glob("collections Counter") + get(0) + b"\x85R") * 3000 + b"e.",
        "states": state + b"](" + (ordered + b")R" + get(0) + b"b") * 3000 + b"e.",
        "bytes": long_text + b"](" + (glob("_codecs encode") + get(0) + get(1) + b"\x86R") * 3000 + b"e.",
        "sizes of a tuple": long_tuple + b"](" + (size + get(0) + b"\x85R") * 3000 + b"e.",
    }
    found = {
        "layouts, metadata": metadata(P2 + text("x") + put(0) + nested + b"."),
        "sizes of a list, metadata": metadata(P2 + torch_only["sizes of a list"]),
        "sizes of a tuple, metadata": metadata(P2 + torch_only["sizes of a tuple"]),
        "dicts of pairs, metadata": metadata(P2 + torch_only["dicts of pairs"]),
        "states, metadata": metadata(P2 + torch_only["states"]),
        "numbers of one value, metadata": metadata(b"\x80\x04N" + b"\x94" * 3_000_000 + b"."),
        "sets without items, metadata": metadata(b"\x80\x04](" + b"\x8f" * 3_000_000 + b"e."),
    }
    for name, body in torch_only.items():
        found |= everywhere(name, P2 + body)
    return found


@known("CorruptCheckpointError", "UnsafeValueError")
def memory_for_a_number() -> dict[str, Content]:
    number = b"\x8a\x05" + (2**33).to_bytes(5, "little")
    found: dict[str, Content] = {}
    for name in (
        "__builtin__ bytearray", "torch FloatTensor", "torch Tensor", "torch.storage UntypedStorage",
        "torch FloatStorage", "torch.cuda FloatTensor", "torch.sparse FloatTensor",
    ):  # fmt: skip
        called = glob(name) + number + b"\x85R"
        through = (
            glob("torch._tensor _rebuild_from_type_v2") + b"(" + glob(name) + glob("torch Tensor") + number + b"\x85}tR"
        )
        found |= everywhere(name, P2 + called + b".") | everywhere(f"{name}, through another", P2 + through + b".")
        found[f"{name}, metadata"] = metadata(P2 + called + b".")
    return found


@known("CorruptCheckpointError", "UnsafeValueError", "UnsupportedFormatError")
def calls_with_arguments_that_are_not_a_tuple() -> dict[str, Content]:
    number = b"\x8a\x05" + (2**33).to_bytes(5, "little")
    found: dict[str, Content] = {}
    arguments = {
        "a list": b"]" + number + b"a",
        "a dict": b"}" + number + b"Ns",
        "a size": glob("torch Size") + b"(" + number + b"t\x85R",
        "a set": glob("__builtin__ set") + b"]" + number + b"a\x85R",
    }
    for name, given in arguments.items():
        found |= everywhere(f"bytearray of {name}", P2 + glob("__builtin__ bytearray") + given + b"R.")
        rebuilt = glob("torch._tensor _rebuild_from_type_v2")
        through = rebuilt + b"](" + glob("torch FloatTensor") + glob("torch Tensor") + number + b"\x85}eR"
        found |= everywhere(f"through another, {name}", P2 + given + put(0) + through + b".")
    items = b"}(" + b"".join(text(str(i)) + b"N" for i in range(5000)) + b"u" + put(0)
    for module in ("UserDict", "UserList", "UserString"):
        ordered = glob(f"{module} OrderedDict")
        found |= everywhere(f"{module}", P2 + items + b"](" + (ordered + get(0) + b"\x85R") * 3000 + b"e.")
    return found


@known("CorruptCheckpointError", "UnsupportedFormatError", "UnsafeValueError", "read")
def attributes_that_hide_methods() -> dict[str, Content]:
    ordered = glob("collections OrderedDict") + b")R"
    hidden = ordered + text("a") + b"K\1s}" + text("items") + glob("torch Size") + b"sb"
    kind = ordered + b"}" + text("dtype") + ordered + b"}" + text("itemsize") + text("x") + b"sbsb"
    pid = b"(" + text("storage") + kind + text("0") + text("cpu") + b"J\xff\xff\xff\x7ftQ"
    shape = b"K\0(K\4t(K\1t\x89" + glob("collections OrderedDict") + b")R"
    honest = b"(" + text("storage") + glob("torch FloatStorage") + text("0") + text("cpu") + b"K\4tQ"
    found = {
        "items": {"m.pt": zipped(P2 + b"}" + text("q") + hidden + b"s.")},
        "a number of items": {"m.pt": zipped(P2 + ordered + b"}" + text("items") + b"K\5sb.")},
        "a dtype": {"m.pt": zipped(P2 + pid + b".", data__0=bytes(16))},
        "a storage": {"m.pt": zipped(P2 + b"}" + text("q") + honest + b"}" + text("_untyped_storage") + b"Nsbs.")},
    }
    for name in ("is_conj", "stride", "untyped_storage", "dim", "numel", "storage_offset"):
        made = glob("torch._tensor _rebuild_from_type_v2") + b"(" + glob("torch._utils _rebuild_tensor_v2")
        made += glob("torch Tensor") + b"(" + honest + shape + b"t}" + text(name) + b"K\5stR"
        found[name] = {"m.pt": zipped(P2 + b"}" + text("w") + made + b"s.")}
    return found


@known("CorruptCheckpointError")
def long_keys_that_many_names_share() -> dict[str, Content]:
    grammar = Pickles(__import__("random").Random(0), DCP, protocol=2)
    grammar._swap_rate = 0
    honest = grammar.metadata() + b"."
    word = text("x" * 300_000)
    return {"a dtype": metadata(P2 + honest.replace(b"(ctorch\nfloat32\n", b"(" + word))}


@known("CorruptCheckpointError")
def typed_paths_of_lists_that_are_shared() -> dict[str, Content]:
    grammar = Pickles(__import__("random").Random(0), DCP, protocol=2)
    grammar._swap_rate = 0
    honest = grammar.metadata().replace(b"r\x00\x00\x00\x00", b"q\xc8").replace(b"h\x00", b"h\xc8")
    paths = b"}" + text("w0") + b"]}" + text("key") + get(40) + b"sas"
    hostile = honest.replace(
        text("planner_data") + b"}(", text("planner_data") + b"}(" + text(".reshard.paths") + paths
    )
    return {"lists": metadata(P2 + LISTS + put(0) + hostile + b".")}


@known("CorruptCheckpointError", "UnsupportedFormatError")
def many_files_of_shared_lists() -> dict[str, Content]:
    folder: Content = {}
    for i in range(1, 31):
        rows: Any = [torch.ones(1)] * 120
        out = io.BytesIO()
        torch.save({f"f{i}": [rows] * 120}, out)
        folder[f"pytorch_model-{i:05}-of-00030.bin"] = out.getvalue()
    return {"thirty": folder}


@known("CorruptCheckpointError", "read")
def messages_that_show_values_at_length() -> dict[str, Content]:
    grammar = Pickles(__import__("random").Random(0), DCP, protocol=2)
    grammar._swap_rate = 0
    made = P2 + LISTS + put(0)
    honest = grammar.metadata().replace(b"r\x00\x00\x00\x00", b"q\xc8").replace(b"h\x00", b"h\xc8")
    honest += b"."
    called = LISTS + get(40) + b")R."
    found = {f"a call of a list{name[1:]}": made for name, made in everywhere("x", P2 + called).items()}
    found |= {
        "dtype, metadata": metadata(made + honest.replace(b"(ctorch\nfloat32\n", b"(" + get(40))),
        "path, metadata": metadata(made + honest.replace(text("__0_0.distcp"), get(40))),
        "size, metadata": metadata(made + honest.replace(b"K\4K\4tt", b"K\4" + get(40) + b"tt")),
        "name, metadata": metadata(made + honest.replace(text("fqn") + text("o"), text("fqn") + get(40))),
        "transforms, metadata": metadata(
            made + honest.replace(text("transform_descriptors") + b"N", text("transform_descriptors") + get(40))
        ),
    }
    return found


@known("UnsupportedFormatError")
def shared_containers_that_are_a_tree_of_names() -> dict[str, Content]:
    value: Any = {"w": 1}
    for _ in range(19):
        value = {"a": value, "b": value}
    rows: Any = [torch.ones(1)]
    for _ in range(25):
        rows = [rows, rows]
    key = "k" * 20_000
    long_names: Any = {str(i): i for i in range(2000)}
    for _ in range(60):
        long_names = {key: long_names}
    found: dict[str, Content] = {"forty dicts": {"m.pt": zipped(P2 + DICTS + get(40) + b".")}}
    for name, state in {"dicts": value, "lists with a tensor": {"x": rows}, "long names": long_names}.items():
        out = io.BytesIO()
        torch.save(state, out)
        found[name] = {"m.pt": out.getvalue()}
    return found


@known("read")
def shared_containers_that_torch_reads() -> dict[str, Content]:
    return {
        "lists": as_object(zipped(P2 + LISTS + get(40) + b".")),
        "dicts": as_object(zipped(P2 + DICTS + get(40) + b".")),
    }


@known("CorruptCheckpointError", "UnsafeValueError")
def pickles_that_change_a_stand_in_for_a_function() -> dict[str, Content]:
    states = (b"N}" + text("__defaults__") + text("x") + b"\x85s\x86", b"}" + text("of") + text("x") + b"s")
    return {
        f"{name} {i}": metadata(P2 + glob(name) + state + b"b.")
        for name in (*DCP, "some.unknown Thing")
        for i, state in enumerate(states)
    }


def bricks(rows: int, columns: int) -> bytes:
    """Return a manifest of one tensor whose shards are arranged like bricks."""
    offsets, sizes = [], []
    for row in range(rows):
        begins = [0, *range(1 + row % 2, columns, 2), columns]
        for begin, end in pairwise(begins):
            if end > begin:
                offsets.append((row, begin))
                sizes.append((1, end - begin))
    n = len(offsets)
    lengths = np.array([size[1] for size in sizes], np.uint32)
    segments = Segments(
        entries=np.zeros(n, np.int64),
        streams=np.zeros(n, np.uint8),
        encodings=np.zeros(n, np.uint8),
        objects=np.zeros(n, np.int64),
        starts=np.cumsum(lengths, dtype=np.int64) - lengths,
        offsets=np.array(offsets, np.int64).ravel(),
        sizes=np.array(sizes, np.int64).ravel(),
    )
    entry = Entry("w", Kind.TENSOR, "uint8", Grid((rows, columns), (1, 1)))
    index = CheckpointIndex(
        (entry,), (("data/a.shard", int(lengths.sum())),), segments, lengths, np.zeros(n, np.uint64)
    )
    return bytes(encode_manifest(index, {}, {}))


@known()
def shards_like_bricks() -> dict[str, Content]:
    return {"60,000": {"manifest.reshard": bricks(200, 600), "data/a.shard": bytes(200 * 600)}}


@known()
def json_that_takes_quadratic_time() -> dict[str, Content]:
    prime = 2**61 - 1
    words = {
        "dict": {"$dict": [[prime * i, 0] for i in range(50_000)]},
        "set": {"$set": [prime * i for i in range(50_000)]},
        "complex": {"$set": [{"$complex": [-1000003.0 * i, float(i)]} for i in range(20_000)]},
        "decimals": {"$frozenset": [{"$decimal": str(prime * i)} for i in range(20_000)]},
        "fractions": {"$set": [{"$fraction": [prime * i, 1]} for i in range(20_000)]},
        "uuids": {"$dict": [[{"$uuid": f"{prime * i:032x}"}, 0] for i in range(20_000)]},
    }
    return {name: json_object(json.dumps(value)) for name, value in words.items()}


@known()
def json_with_keywords_that_no_save_writes() -> dict[str, Content]:
    words = {
        "object array": {"$array": ["|O", [1], "AAAAAAAA"]},
        "structured array": {"$array": [[["a", "<f4"]], [1], "AAAAAA=="]},
        "void array": {"$array": ["|V4", [1], "AAAAAA=="]},
        "empty strings": {"$array": ["<U0", [10**12], ""]},
        "a negative shape": {"$array": ["<f4", [-1], "AAAAAA=="]},
        "a scalar of many": {"$scalar": ["<f4", [1], "AAAAAA=="]},
        "a module": {"$torch_dtype": "_dynamo"},
        "a position": {"$bytes_io": ["", 10**15]},
        "an attribute": {"$simple_namespace": [[1, 2]]},
        "a fraction of a text": {"$fraction": ["1e300000000"]},
        "a fraction of one number": {"$fraction": [1]},
        "a fraction of nothing": {"$fraction": [1, 0]},
        "a size": {"$torch_size": [2**70]},
        "a device": {"$torch_device": "bogus"},
        "a scalar dtype": {"$scalar": ["(1,f4", [], ""]},
        "a scalar text": {"$scalar": ["<U1", [], "////fw=="]},
    }
    deep = "[" * 100_000 + "]" * 100_000
    return {"deep": json_object(deep)} | {name: json_object(json.dumps(value)) for name, value in words.items()}


@known()
def stored_values_that_claim_too_much() -> dict[str, Content]:
    store = MemoryStore()
    values = torch.zeros(40 * 2**20, dtype=torch.uint8)
    reshard.save({"o": values}, store, codec="zstd")
    header, blocks = read_manifest(store.content["manifest.reshard"])
    header["entries"][0][1] = int(Kind.TORCH_SAVE)
    shared = {**store.content, "manifest.reshard": written_manifest(header, _on_each_other(header, blocks))}
    return {"segments on each other": shared}


def _on_each_other(header: dict[str, Any], blocks: bytes) -> bytes:
    """Return the blocks, with all segments at the same byte of the object."""
    from reshard.storage.runtime.checksums import checksum

    segments, extents = header["blocks"][0][1:3]
    starts = 16 * extents
    first = blocks[starts : starts + 8]
    made = blocks[:starts] + first * segments + blocks[starts + 8 * segments :]
    header["blocks"][0][-1] = f"{checksum(made):016x}"
    return bytes(made)


@known()
def paths_that_no_save_writes() -> dict[str, Content]:
    store = MemoryStore()
    reshard.save({"a": {"b": torch.ones(2)}, "w": torch.ones(2)}, store, codec="none")
    header, blocks = read_manifest(store.content["manifest.reshard"])
    found = {}
    for i, path in enumerate(
        (5, "ab", [], [None], [1.5], [-1], [True], [[1]], [{}], [{"key": "a"}], [{"key": [1]}], ["a"] * 101,
         [{"key": {"$fraction": ["1e300000000"]}}], [{"key": {"$torch_device": "bogus"}}],
         [{"key": {"$scalar": ["(1,f4", [], ""]}}], [{"key": {"$scalar": ["<U1", [], "////fw=="]}}],
         [{"key": {"$float": "nan"}}], [{"key": {"$nothing": 1}}], [{"key": 1, "more": 2}])
    ):  # fmt: skip
        header["entries"][0][5] = path
        found[f"{i}"] = {**store.content, "manifest.reshard": written_manifest(header, blocks)}
    return found


@known()
def shapes_whose_strides_overflow() -> dict[str, Content]:
    store = MemoryStore()
    reshard.save({"w": torch.empty(0, 3, 3)}, store, codec="none")
    header, blocks = read_manifest(store.content["manifest.reshard"])
    found = {}
    for i, shape in enumerate(([0, 2**37, 2**37], [2**37, 2**37, 0], [0, 2**62, 1])):
        header["entries"][0][3] = shape
        found[f"native {i}"] = {**store.content, "manifest.reshard": written_manifest(header, blocks)}
        text = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
        found[f"safetensors {i}"] = {"m.safetensors": len(text).to_bytes(8, "little") + text}
    return found


@known()
def file_names_that_claim_how_many_there_are() -> dict[str, Content]:
    text = b'{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    file = len(text).to_bytes(8, "little") + text
    return {
        "safetensors": {"model-00001-of-9999999.safetensors": file},
        "torch": {"pytorch_model-0000001-of-9999999.bin": zipped(P2 + b"}.")},
    }
