"""`diff` compares manifests if they are sufficient, and values in pieces otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import reshard
from reshard.storage.maintenance.diff import Difference, diff
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.testing import RecordingStore
from reshard.storage.tensors.splitting import MAX_PIECE_BYTES
from tests.conversion.samples import cut_small


def saved(state: dict[str, torch.Tensor]) -> RecordingStore:
    store = MemoryStore()
    reshard.save(state, store)
    return RecordingStore(store)


def differences(a: RecordingStore, b: RecordingStore) -> dict[str, Difference]:
    return {difference.name: difference for difference in diff(a, b)}


def test_only_tensors_with_different_checksums_are_read() -> None:
    a = {"same": torch.randn(1024, 512), "other": torch.randn(256, 256)}
    one, two = saved(a), saved({**a, "other": a["other"] + 1})
    found = differences(one, two)
    assert set(found) == {"other"}
    assert found["other"].changed == 256 * 256
    read = sum(call.stop - call.start for call in one.calls if call.method == "read" and call.name.startswith("data/"))
    assert 0 < read <= 256 * 256 * 4, "only the tensor that differs is read"


def test_tensors_of_many_sizes_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, piece=4096)
    torch.manual_seed(0)
    a = {f"{i:03}": torch.randn(i % 7, 3 * i) for i in range(60)}
    b = {name: tensor.clone() for name, tensor in a.items()}
    changed = {"011": 1, "050": 2, "059": 3}
    for name, count in changed.items():
        b[name].view(-1)[-count:] += 5
    assert {name: found.changed for name, found in differences(saved(a), saved(b)).items()} == changed


def test_tensors_of_different_dtypes_are_compared_by_value(tmp_path: Path) -> None:
    values = torch.randn(3000, 2000)
    assert values.nbytes > MAX_PIECE_BYTES
    narrow = values.bfloat16()
    found = differences(saved({"w": values}), saved({"w": narrow}))["w"]
    assert found.what == "dtype"
    assert found.largest == (values.double() - narrow.double()).abs().max()
    assert found.changed == int((values != narrow).sum())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_value_that_only_one_checkpoint_can_read_is_not_called_different(tmp_path: Path) -> None:
    state = {"w": torch.ones(2), "number": np.float32(1.5), "set": frozenset({1}), "plain": 3}
    reshard.save(state, tmp_path / "native")
    reshard.convert(tmp_path / "native", tmp_path / "dcp", format="dcp")
    found = {difference.name: difference for difference in diff(tmp_path / "native", tmp_path / "dcp")}
    assert {name: difference.what for name, difference in found.items()} == {
        "number": "unreadable",
        "set": "unreadable",
    }
    assert found["set"].a == '{"$frozenset":[1]}'
    assert found["set"].b == "a pickle that could run code"
    assert diff(tmp_path / "dcp", tmp_path / "dcp") == []
