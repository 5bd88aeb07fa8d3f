"""The pickle scan accepts everything that an honest pickler writes, with any protocol."""

from __future__ import annotations

import collections
import io
import pickle
import random
import zipfile
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from reshard.storage.formats.torch_save import pickle_scan
from reshard.storage.formats.torch_save.pickle_scan import check_pickle
from reshard.storage.formats.tree_size import is_repetitive
from reshard.storage.formats.value_codec import decode_value, encode_value
from tests.formats.test_value_codec import same

RNG = random.Random(0)


def optimizer_state() -> dict[str, Any]:
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(20)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "ema": model.state_dict(), "optimizer": optimizer.state_dict()}


def attributed() -> torch.Tensor:
    tensor = torch.zeros(3)
    tensor.note = {"a": [1, 2]}  # type: ignore[attr-defined]
    return tensor


shared = [1, 2, 3]
HONEST: dict[str, Any] = {
    "an optimizer": optimizer_state(),
    "parameters": [torch.nn.Parameter(torch.zeros(2)) for _ in range(500)],
    "an attribute": attributed(),
    "merges of bytes": {(i % 300, i): i for i in range(60_000)},
    "merges of strings": {(str(i), str(i + 1), "c"): i for i in range(60_000)},
    "keys of three numbers": {(i, i + 1, i + 2): i for i in range(30_000)},
    "keys of floats": {(i / 7, i / 3, None, True): i for i in range(30_000)},
    "hashes": {hash(str(i)): i for i in range(30_000)},
    "large integers": [2**200 + i for i in range(1000)],
    "keys of 128 bits": {2**127 + i * 977: i for i in range(30_000)},
    "sets": [set(range(n)) for n in range(200)] + [frozenset("abc")],
    "a counter": collections.Counter(str(i % 977) for i in range(10_000)),
    "bytes": [bytes(100_000), bytearray(100_000), bytearray(), b"x" * 100],
    "sizes": [torch.Size([i] * 5) for i in range(2000)],
    "text": "é" * 1_000_000,
    "one text many times": ["a long text of many characters, the same each time"] * 5000,
    "one list many times": [shared] * 5000,
    "numbers": [1.5, -1, 2**31, float("nan"), 1j, None, True] * 500,
    "nesting": (((((((((1,), 2), 3), 4), 5), 6), 7), 8), 9),
    "dicts": {"a": {str(i): {"b": i} for i in range(1000)}},
    "an ordered dict": collections.OrderedDict((str(i), [i]) for i in range(1000)),
    "types": [torch.float32, torch.device("cpu"), torch.strided],
}


def pickled_by_torch(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    with zipfile.ZipFile(out) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


@pytest.mark.slow
@pytest.mark.parametrize("name", HONEST)
def test_pickles_of_torch_save_pass(name: str) -> None:
    check_pickle(pickled_by_torch(HONEST[name]))


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", [name for name in HONEST if name not in ("an optimizer", "parameters", "types")])
def test_pickles_of_every_protocol_pass(name: str, protocol: int) -> None:
    check_pickle(pickle.dumps(HONEST[name], protocol), calls=False)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_metadata_of_many_shards_stays_far_below_the_limits(protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors: dict[str, Any] = {}
    infos = {}
    for i in range(50):
        name = f"model.layers.{i}.self_attn.q_proj.weight"
        chunks = [ChunkStorageMetadata(torch.Size([64 * k, 0]), torch.Size([64, 512])) for k in range(40)]
        tensors[name] = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size([2560, 512]), chunks)
        for k in range(40):
            index = MetadataIndex(name, torch.Size([64 * k, 0]), k)
            infos[index] = _StorageInfo(f"__{k}_0.distcp", 1000 * i, 1000)
    data = pickle.dumps(Metadata(tensors, {name: tuple(name.split(".")) for name in tensors}, infos), protocol)
    monkeypatch.setattr(pickle_scan, "FREE_VALUES", 0)
    monkeypatch.setattr(pickle_scan, "MAX_COPIED_PER_BYTE", 0.5)
    monkeypatch.setattr(pickle_scan, "MAX_HASHED_PER_BYTE", 2)
    check_pickle(data, calls=False)


def test_calling_tensor_classes_of_torch_is_refused() -> None:
    for kind in torch._tensor_classes | torch._storage_classes:
        if kind.__module__ in ("torch", "torch.storage", "torch.sparse", "torch.cuda", "torch.cuda.sparse"):
            call = f"c{kind.__module__}\n{kind.__name__}\n".encode() + b"K\x05\x85R."
            with pytest.raises(ValueError, match="makes a tensor or storage of a size"):
                check_pickle(b"\x80\x02" + call)


def chained(levels: int, make: Any) -> Any:
    value: Any = [1]
    for _ in range(levels):
        value = make(value)
    return value


@pytest.mark.parametrize(
    "make",
    [lambda v: [v, v], lambda v: {"a": v, "b": v}, lambda v: (v, v), lambda v: collections.deque([v, v])],
)
def test_repetitive_containers_are_pickled_and_stay_shared(make: Any) -> None:
    value = chained(60, make)
    assert is_repetitive(value)
    if isinstance(value, collections.deque):
        return  # torch.load(weights_only=True) does not allow deques
    kind, data = encode_value(value)
    assert len(data) < 20_000
    back = decode_value("x", kind, data)
    first, second = back.values() if isinstance(back, dict) else back
    assert first is second


@pytest.mark.parametrize("name", ["dicts", "nesting", "numbers", "merges of bytes", "an ordered dict"])
def test_values_with_few_shared_parts_are_not_repetitive(name: str) -> None:
    assert not is_repetitive(HONEST[name])
    assert not is_repetitive([HONEST[name]] * 10)


def test_value_that_contains_itself_is_repetitive() -> None:
    value: list[Any] = []
    value.append(value)
    assert is_repetitive(value)


@pytest.mark.parametrize("name", ["one text many times", "one list many times"])
def test_repetitive_values_round_trip(name: str) -> None:
    assert same(decode_value("x", *encode_value(HONEST[name])), HONEST[name])
