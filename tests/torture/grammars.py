"""Generate hostile pickles, zips, JSON and headers from grammars with shared references.

The inputs are nearly valid, so that they get far into a reader. Many repeat a small pattern, each time on the previous
result: this is how a few bytes can take exponential time or memory.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import torch

import reshard
from reshard.storage.formats.native.manifest import VERSION
from reshard.storage.runtime.checksums import checksum
from reshard.storage.stores.memory import MemoryStore

Content = dict[str, bytes]
NUMBERS = (0, 1, -1, 2, 64, 255, 2**31 - 1, 2**31, 2**32, 2**61 - 1, 2**62, 2**63, 2**64, 2**70, 10**30)
TORCH = (
    "collections OrderedDict", "collections Counter", "torch Size", "torch device", "torch FloatTensor",
    "torch FloatStorage", "torch UntypedStorage", "torch Tensor", "torch float32", "_codecs encode", "torch strided",
    "__builtin__ bytearray", "__builtin__ set", "builtins complex", "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter", "torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_qtensor",
    "torch._utils _rebuild_nested_tensor", "torch._utils _rebuild_meta_tensor_no_storage",
    "torch._tensor _rebuild_from_type_v2", "torch._utils _rebuild_wrapper_subclass",
    "torch._utils _rebuild_parameter_with_state", "torch.serialization _get_layout", "torch.nn.parameter Parameter",
    "torch._utils _rebuild_device_tensor_from_cpu_tensor", "os system", "builtins eval",
)  # fmt: skip
"""Classes and functions that a torch.save file may name, and some that it may not name."""
HOME = "torch.distributed.checkpoint.metadata"
DCP = (
    f"{HOME} Metadata", f"{HOME} TensorStorageMetadata", f"{HOME} BytesStorageMetadata", f"{HOME} MetadataIndex",
    f"{HOME} ChunkStorageMetadata", f"{HOME} TensorProperties", f"{HOME} StorageMeta", f"{HOME} _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem _StorageInfo", "torch.serialization _get_layout", "torch Size",
    "collections OrderedDict", "collections defaultdict", "pathlib PosixPath", "torch float32", "os system",
    "megatron.core Thing", "builtins bytearray", "builtins set", "numpy dtype",
)  # fmt: skip


def saved(value: Any) -> bytes:
    """Return the bytes that torch.save writes for a value."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


SLICE = saved(torch.arange(16.0).reshape(4, 4))
SLICES = SLICE + saved({"a": [1, 2]})
"""A data file of DCP: a (4, 4) tensor and a value."""


class Pickles:
    """A grammar of pickles.

    Each method returns the opcodes that build a value. Names are those of classes and functions.
    """

    def __init__(self, rng: random.Random, names: tuple[str, ...], *, protocol: int) -> None:
        self._rng = rng
        self._names = names
        self._protocol = protocol
        self._memo = 0
        self._swap_rate = rng.choice((0.0, 0.005, 0.03))
        """The probability that another value replaces the right one."""

    def document(self, made: Callable[[], bytes] | None = None) -> bytes:
        """Return a pickle of a few values and chains. Its result is that of `made`."""
        self._memo = 0
        body = b"".join(self.stored(self.value(2)) for _ in range(self._rng.randint(1, 3)))
        for _ in range(self._rng.choice((0, 0, 1, 1, 2))):
            body += self.chain(self._rng.choice((5, 20, 40, 200, 2000)))
        end = made() if made else self.container([self.value(2) for _ in range(3)])
        return b"\x80" + bytes([self._protocol]) + body + end + b"."

    def mostly(self, honest: bytes) -> bytes:
        """Return the opcodes of a value, or sometimes of another value instead."""
        roll = self._rng.random()
        if roll < self._swap_rate:
            return self.get(self._rng.randrange(self._memo))
        return self.value(1) if roll < 1.5 * self._swap_rate else honest

    def object(self, name: str, state: dict[str, bytes]) -> bytes:
        """Build an instance of a class with attributes."""
        module, _, of = name.partition(" ")
        items = b"".join(self.word(key) + self.mostly(value) for key, value in state.items())
        return b"c" + module.encode() + b"\n" + of.encode() + b"\n)\x81}(" + items + b"ub"

    def sizes(self, *numbers: int) -> bytes:
        """Build a torch.Size."""
        return b"ctorch\nSize\n((" + b"".join(self.mostly(self.number(n)) for n in numbers) + b"ttR"

    def metadata(self) -> bytes:
        """Build the metadata of DCP, with some (4, 4) tensors and a value."""
        rng = self._rng
        names = [f"w{i}" for i in range(rng.choice((1, 2, 10)))]
        before = self.stored(b"](" + b"".join(self.chunk() for _ in range(rng.choice((1, 1, 100)))) + b"e")
        chunks = self.get(self._memo - 1)
        if rng.random() < 0.5:
            chunks = b"](" + self.chunk() + b"e"
        layout = b"ctorch.serialization\n_get_layout\n" + self.word("torch.strided") + b"\x85R"
        properties = f"{HOME} TensorProperties".split()
        state = b"(ctorch\nfloat32\n" + layout + b"\x89K\0\x89t"
        of_tensor = (
            b"c" + properties[0].encode() + b"\n" + properties[1].encode() + b"\n)\x81" + self.mostly(state) + b"b"
        )
        tensor = {"properties": of_tensor, "size": self.sizes(4, 4), "chunks": chunks}
        entries = {name: self.object(DCP[1], tensor) for name in names} | {"o": self.object(DCP[2], {})}
        of_file = {"relative_path": self.word("__0_0.distcp"), "transform_descriptors": b"N"}
        slice = {**of_file, "offset": self.number(0), "length": self.number(len(SLICE))}
        blob = {**of_file, "offset": self.number(len(SLICE)), "length": self.number(len(SLICES) - len(SLICE))}
        stored = b"".join(
            self.object(
                DCP[3], {"fqn": self.word(name), "offset": b"N" if name == "o" else self.sizes(0, 0), "index": b"N"}
            )
            + self.mostly(
                self.object("torch.distributed.checkpoint.filesystem _StorageInfo", blob if name == "o" else slice)
            )
            for name in entries
        )
        paths = {name: b"(" + self.word(name) + b"t" for name in entries}
        return before + self.object(
            DCP[0],
            {
                "state_dict_metadata": self.dictionary(entries),
                "planner_data": self.dictionary(paths),
                "storage_data": b"}(" + stored + b"u",
            },
        )

    def chunk(self) -> bytes:
        """Build the metadata of a shard."""
        return self.object(DCP[4], {"offsets": self.sizes(0, 0), "sizes": self.sizes(4, 4)})

    def state_dict(self) -> bytes:
        """Build a state dict of tensors with four float32 values, and other values."""
        values = {f"w{i}": self.tensor(i) for i in range(self._rng.choice((1, 2, 3)))}
        values |= {f"o{i}": self.value(2) for i in range(2)} | {"last": self.get(self._rng.randrange(self._memo))}
        return self.dictionary(values)

    def tensor(self, key: int) -> bytes:
        """Build a tensor with four float32 values."""
        pid = [self.word("storage"), b"ctorch\nFloatStorage\n", self.word(str(key)), self.word("cpu"), self.number(4)]
        storage = b"(" + b"".join(map(self.mostly, pid)) + b"tQ"
        parts = [storage, self.number(0), b"(K\4t", b"(K\1t", b"\x89", b"ccollections\nOrderedDict\n)R"]
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + b"".join(map(self.mostly, parts)) + b"tR"

    def dictionary(self, values: dict[str, bytes]) -> bytes:
        """Build a dict."""
        return b"}(" + b"".join(self.word(key) + self.mostly(value) for key, value in values.items()) + b"u"

    def chain(self, length: int) -> bytes:
        """Repeat a pattern, each time on its previous result."""
        made = self.stored(self.value(1))
        shape = self._rng.randrange(8)
        called = self.name()
        count = self._rng.randint(1, 4)
        for _ in range(length):
            last = self._memo - 1
            parts = [self.get(last) for _ in range(count)]
            made += self.stored(self.combined(parts, shape, called))
        return made

    def combined(self, parts: list[bytes], shape: int, called: bytes) -> bytes:
        """Combine values into one."""
        if shape == 0:
            return b"(" + b"".join(parts) + b"t"
        if shape == 1:
            return b"](" + b"".join(parts) + b"e"
        if shape == 2:
            return b"}(" + b"".join(self.text() + part for part in parts) + b"u"
        if shape == 3:
            return b"}(" + b"".join(part + b"N" for part in parts) + b"u"
        if shape == 4:
            return called + b"(" + b"".join(parts) + b"tR"
        if shape == 5:
            return called + b"](" + b"".join(parts) + b"e\x85R"
        if shape == 6:
            return called + b")" + self._rng.choice((b"\x81", b"R")) + parts[0] + b"b"
        return (b"\x8f(" if self._protocol > 3 else b"](") + b"".join(parts) + (b"\x90" if self._protocol > 3 else b"e")

    def value(self, levels: int) -> bytes:
        rng = self._rng
        kind = rng.randrange(14 if levels else 6)
        if kind == 0:
            return rng.choice((b"N", b"\x88", b"\x89", b")", b"]", b"}"))
        if kind == 1:
            return self.number()
        if kind in (2, 3):
            return self.text()
        if kind == 4 and self._memo:
            return self.get(rng.randrange(self._memo))
        if kind == 5:
            return self.name()
        parts = [self.value(levels - 1) for _ in range(rng.choice((0, 1, 2, 3, 50)))] if levels else []
        if kind == 6:
            return self.name() + b"(" + b"".join(parts) + rng.choice((b"tR", b"t\x81"))
        if kind == 7:
            return self.name() + b")" + rng.choice((b"R", b"\x81")) + self.value(levels - 1 if levels else 0) + b"b"
        if kind == 8 and rng.random() < 0.1:
            return b"(" + self.text() + self.name() + self.text() + self.text() + self.number() + b"tQ"
        return self.container(parts)

    def container(self, parts: list[bytes]) -> bytes:
        kind = self._rng.randrange(3)
        if kind == 0:
            return b"(" + b"".join(parts) + b"t"
        if kind == 1:
            return b"](" + b"".join(parts) + b"e"
        return b"}(" + b"".join(self.text() + part for part in parts) + b"u"

    def stored(self, value: bytes) -> bytes:
        """Store a value in the memo, so that later values can refer to it. It stays on the stack."""
        self._memo += 1
        return value + b"r" + struct.pack("<I", self._memo - 1)

    def get(self, number: int) -> bytes:
        return b"h" + bytes([number]) if number < 256 else b"j" + struct.pack("<I", number)

    def number(self, number: int | None = None) -> bytes:
        if number is None and self._rng.random() < 0.1:
            return b"G" + struct.pack(">d", self._rng.choice((0.0, 1e300, float("nan"), float("inf"))))
        number = self._rng.choice(NUMBERS) if number is None else number
        data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data if number > 255 or number < 0 else b"K" + bytes([number])

    def text(self) -> bytes:
        rng = self._rng
        text = rng.choice(("", "a", "cpu", "storage", "latin1", "0", "1", "torch.strided", "x" * 5000, "é" * 300))
        return self.word(text + rng.choice(("", str(rng.randrange(100)))))

    def word(self, text: str) -> bytes:
        """Build a string."""
        data = text.encode()
        return b"X" + struct.pack("<I", len(data)) + data

    def name(self) -> bytes:
        module, name = self._rng.choice(self._names).split()
        return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def mutated(rng: random.Random, data: bytes, *, in_place: bool = False) -> bytes:
    """Change some bytes. Unless `in_place`, some parts may also be cut, moved or repeated many times."""
    made = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        at = rng.randrange(len(made) + 1)
        length = min(rng.choice((1, 1, 2, 4, 8, 40, 400)), len(made) - at)
        kind = rng.choice((0, 4, 5)) if in_place else rng.randrange(6)
        if kind == 0:
            made[at : at + length] = rng.randbytes(length)
        elif kind == 1:
            del made[at : at + length]
        elif kind == 2:
            made[at:at] = made[at : at + length] * rng.choice((1, 2, 50, 1000))
        elif kind == 3:
            other = rng.randrange(len(made) + 1)
            made[other:other] = made[at : at + length]
        elif kind == 4:
            other = rng.randrange(len(made) - length + 1)
            made[other : other + length] = made[at : at + length]
        elif length:
            made[at] ^= 1 << rng.randrange(8)
    return bytes(made)


def torch_zip(rng: random.Random, pickled: bytes) -> bytes:
    """Return a zip like those of torch.save, or sometimes one with false records."""
    out = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", method) as archive:
        folder = rng.choice(("archive", "model", "a"))
        archive.writestr(f"{folder}/data.pkl", pickled)
        archive.writestr(f"{folder}/byteorder", rng.choice((*[b"little"] * 20, b"big", b"")))
        archive.writestr(f"{folder}/version", b"3\n")
        for key in range(3):
            archive.writestr(f"{folder}/data/{key}", rng.randbytes(rng.choice((*[16] * 9, 0, 4000))))
        if rng.random() < 0.05:
            archive.comment = b"PK\5\6" + bytes(rng.choice((0, 18, 100)))
    data = out.getvalue()
    kind = rng.randrange(14)
    if kind == 0:
        at = data.rindex(b"PK\5\6") + rng.choice((4, 8, 10, 12, 16, 20))
        wrong = struct.pack("<I", rng.choice((0, 1, 2**16 - 1, 2**31, 2**32 - 1, rng.randrange(len(data)))))
        return data[:at] + wrong + data[at + 4 :]
    if kind == 1:
        at = data.index(b"PK\1\2") + rng.choice((8, 10, 20, 24, 28, 30, 32, 42))
        return data[:at] + struct.pack("<I", rng.choice((0, 1, 2**31, 2**32 - 1, rng.randrange(999)))) + data[at + 4 :]
    if kind == 2:
        begin, end = data.index(b"PK\1\2"), data.rindex(b"PK\5\6")
        return data[:begin] + data[begin:end] * rng.choice((2, 3)) + data[end:]
    if kind == 3:
        return two_directories(rng, pickled)
    return data if kind > 4 else mutated(rng, data)


def two_directories(rng: random.Random, hidden: bytes) -> bytes:
    """Return a zip with two directories. Python reads the last one, others the one that the end record names."""

    def local(name: bytes, content: bytes) -> bytes:
        sizes = (zlib.crc32(content), len(content), len(content), len(name), 0)
        return struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 20, 0, 0, 0, 0, *sizes) + name + content

    def entry(name: bytes, content: bytes, at: int) -> bytes:
        sizes = (zlib.crc32(content), len(content), len(content), len(name), 0, 0, 0, 0, 0, at)
        return struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", 20, 20, 0, 0, 0, 0, *sizes) + name

    plain = b"\x80\x02K\x01."
    body = local(b"a/data.pkl", hidden)
    shown_at = len(body)
    body += entry(b"a/data.pkl", hidden, 0)
    second = len(body)
    body += local(b"a/data.pkl", plain)
    shift = rng.choice((second - shown_at, 0, second))
    body += entry(b"a/data.pkl", plain, second - shift)
    size = len(entry(b"a/data.pkl", hidden, 0))
    return body + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, size, shown_at, 0)


def torch_file(rng: random.Random) -> Content:
    """Return a torch.save file."""
    if rng.random() < 0.3:
        honest = saved({"w": torch.arange(6.0), "o": {"a": [1, 2]}, "b": bytearray(9), "s": {1, 2}})
        return {"model.pt": mutated(rng, honest, in_place=rng.random() < 0.8)}
    grammar = Pickles(rng, TORCH, protocol=2)
    pickled = grammar.document(grammar.state_dict if rng.random() < 0.8 else None)
    return {"model.pt": torch_zip(rng, mutated(rng, pickled) if rng.random() < 0.15 else pickled)}


def dcp_metadata(rng: random.Random) -> Content:
    """Return a checkpoint of DCP."""
    grammar = Pickles(rng, DCP, protocol=rng.choice((2, 4, 5)))
    data = grammar.document(grammar.metadata if rng.random() < 0.8 else None)
    return {".metadata": mutated(rng, data) if rng.random() < 0.15 else data, "__0_0.distcp": SLICES}


WORDS = (
    "$tuple", "$set", "$frozenset", "$dict", "$ordered_dict", "$deque", "$bytes", "$bytearray", "$bytes_io",
    "$complex", "$range", "$slice", "$datetime", "$timedelta", "$timezone", "$decimal", "$fraction", "$uuid", "$path",
    "$argparse_namespace", "$ellipsis", "$torch_dtype", "$torch_device", "$torch_size", "$array", "$scalar", "$float",
    "$nothing",
)  # fmt: skip


def json_value(rng: random.Random, levels: int) -> Any:
    """Return a value for JSON, with the keywords of plain data."""
    kind = rng.randrange(12 if levels else 5)
    if kind < 5:
        return rng.choice((None, True, 1.5, "", "a", "float32", "AAAA", "<f4", "|O", "2020-01-01", "x" * 999, *NUMBERS))
    items = [json_value(rng, levels - 1) for _ in range(rng.choice((0, 1, 2, 3, 3, 20)))]
    if kind < 8:
        return {rng.choice(WORDS): rng.choice((items, items, [items, 3], json_value(rng, 0)))}
    if kind == 8:
        colliding = [[(2**61 - 1) * i, i] for i in range(rng.choice((3, 100, 5000)))]
        return {"$dict": colliding} if rng.random() < 0.5 else {"$set": [key for key, _ in colliding]}
    if kind == 9:
        return {"$array": [rng.choice(("<f4", "|u1", "|O", "<U2", "|S0", "|V8")), items, "AAAAAAAA"]}
    return {str(i): item for i, item in enumerate(items)} if kind == 10 else items


def nested(rng: random.Random) -> str:
    """Return deeply nested JSON text."""
    depth = rng.choice((10, 100, 500, 5000, 50_000))
    begin, end = rng.choice((("[", "]"), ('{"$tuple":[', "]}"), ('{"$dict":[[', ",0]]}"), ('{"a":', "}")))
    return begin * depth + "1" + end * depth


def objects(rng: random.Random) -> Content:
    """Return a native checkpoint with one value, whose stored bytes are hostile."""
    store = MemoryStore()
    kind = rng.randrange(3)
    if kind == 0:
        data = json.dumps(json_value(rng, 4)).encode() if rng.random() < 0.8 else nested(rng).encode()
        as_pickle = False
    else:
        grammar = Pickles(rng, TORCH, protocol=2)
        data, as_pickle = torch_zip(rng, grammar.document(grammar.state_dict if rng.random() < 0.5 else None)), True
    filler: Any = frozenset({torch.float32, object}) if as_pickle else "?" * max(0, len(data) - 2)
    reshard.save({"o": filler}, store, codec="none")
    return with_object(store.content, data)


def with_object(content: Content, data: bytes) -> Content:
    """Replace the stored bytes of the only value of a checkpoint, with right checksums."""
    header, _ = read_manifest(content["manifest.reshard"])
    [name] = [name for name in content if name != "manifest.reshard"]
    store = MemoryStore()
    size = max(1, len(data))
    reshard.save({"o": torch.frombuffer(bytearray(data or b" "), dtype=torch.uint8)}, store, codec="none")
    other, blocks = read_manifest(store.content["manifest.reshard"])
    other["entries"][0][1] = header["entries"][0][1]
    other["entries"][0][3] = [size]
    [saved] = [found for found in store.content if found != "manifest.reshard"]
    del content[name]
    return {saved: store.content[saved], "manifest.reshard": written_manifest(other, blocks)}


def read_manifest(manifest: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the blocks of a manifest."""
    length = struct.unpack_from("<8sIIQ", manifest)[2]
    return json.loads(manifest[32 : 32 + length]), manifest[32 + length :]


def written_manifest(header: Any, blocks: bytes) -> bytes:
    """Return a manifest with a right checksum of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = struct.pack("<8sIIQ", b"RESHARD\n", VERSION, len(text), 32 + len(text) + len(blocks))
    return prefix + struct.pack("<Q", checksum(prefix + text)) + text + blocks


def manifest(rng: random.Random) -> Content:
    """Return a native checkpoint whose manifest is hostile."""
    store = MemoryStore()
    state = {"w": torch.arange(12.0).reshape(3, 4), "e": torch.empty(0, 3), "l": {"s": [torch.ones(2)]}, "o": {"a": 1}}
    reshard.save(state, store, codec=rng.choice(("none", "zstd")))
    header, blocks = read_manifest(store.content["manifest.reshard"])
    for _ in range(rng.choice((1, 1, 2))):
        _change_header(rng, header)
    blocks = mutated(rng, blocks) if rng.random() < 0.2 else blocks
    rows = header.get("blocks")
    if rng.random() < 0.8 and isinstance(rows, list) and rows and isinstance(rows[0], list) and rows[0]:
        rows[0][-1] = f"{checksum(blocks):016x}"
    made: Any = header
    if rng.random() < 0.05:
        made = json.dumps(header).replace("1", nested(rng), 1).encode()
    return {**store.content, "manifest.reshard": written_manifest(made, blocks)}


def _change_header(rng: random.Random, header: dict[str, Any]) -> None:
    container: Any = header
    while True:
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(container[key], (list, dict)) and container[key] and rng.random() < 0.85:
            container = container[key]
            continue
        if isinstance(container, list) and rng.random() < 0.2:
            container += [container[key]] * rng.choice((1, 100, 3000))
        else:
            container[key] = rng.choice((*NUMBERS, "x", "../x", "a" * 3000, None, {"key": json_value(rng, 2)}, []))
        return


def safetensors(rng: random.Random) -> Content:
    """Return a safetensors file, sometimes with an index."""
    tensors: dict[str, Any] = {}
    at = 0
    for i in range(rng.choice((0, 1, 2, 3, 300))):
        size = rng.choice((0, 1, 4))
        tensors[f"t{i}"] = {"dtype": "F32", "shape": [size], "data_offsets": [at, at + 4 * size]}
        at += 4 * size
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}, **tensors}
    for _ in range(rng.choice((0, 1, 2))):
        _change_header(rng, header)
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = b'{"a":' + nested(rng).encode() + b"}"
    if rng.random() < 0.3:
        text = mutated(rng, text)
    nbytes = len(text) if rng.random() < 0.9 else rng.choice((0, 2**31, 2**63, len(text) + 1))
    content = {"model-00001-of-00001.safetensors": nbytes.to_bytes(8, "little") + text + bytes(at)}
    if rng.random() < 0.3:
        index: dict[str, Any] = {"metadata": {}, "weight_map": dict.fromkeys(tensors, next(iter(content)))}
        _change_header(rng, index)
        content["model.safetensors.index.json"] = json.dumps(index).encode()
    if rng.random() < 0.1:
        content[f"model-00002-of-{rng.choice(('9999999', '00002', '0'))}.safetensors"] = b""
    return content


FORMATS: dict[str, Callable[[random.Random], Content]] = {
    "dcp": dcp_metadata,
    "torch": torch_file,
    "objects": objects,
    "manifest": manifest,
    "safetensors": safetensors,
}
