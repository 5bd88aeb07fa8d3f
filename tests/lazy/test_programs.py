"""Random programs end with the same values, whether they use lazy or ordinary tensors."""

from __future__ import annotations

from random import Random

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemWriter

import reshard
from tests.lazy.programs import run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FORMATS = ["none", "zstd", "dcp", "safetensors", "torch"]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "matrix": normal(12, 10).bfloat16(),
        "wide": normal(5, 24),
        "cube": normal(4, 6, 5),
        "vector": normal(17),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "double": normal(6, 6).double(),
        "numbers": torch.arange(40).reshape(8, 5),
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, reshard.Checkpoint]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for codec in ("none", "zstd"):
        reshard.save(tensors(), folder / codec, codec=codec)
    dcp.save(tensors(), storage_writer=FileSystemWriter(folder / "dcp", sync_files=False), no_dist=True)
    save_file(tensors(), folder / "safetensors.safetensors")
    torch.save(tensors(), folder / "torch.pt")
    suffixes = {"safetensors": ".safetensors", "torch": ".pt"}
    return {name: reshard.open(folder / f"{name}{suffixes.get(name, '')}") for name in FORMATS}


def check(checkpoint: reshard.Checkpoint, seed: int, *, budget_bytes: int | None = None) -> None:
    ordinary = {name: tensor.clone() for name, tensor in tensors().items()}
    expected = run(ordinary, Random(seed))
    with checkpoint.lazy(budget_bytes=budget_bytes) as weights:
        found = run(weights, Random(seed))
    assert len(found) == len(expected)
    for at, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype == other.dtype
        assert torch.equal(one + 0, other), at


@pytest.mark.parametrize("name", FORMATS)
@given(st.integers(0, 2**62))
def test_programs_with_lazy_tensors_have_the_values_of_torch(
    checkpoints: dict[str, reshard.Checkpoint], name: str, seed: int
) -> None:
    check(checkpoints[name], seed)


@given(st.integers(0, 2**62))
def test_programs_have_the_same_values_within_a_small_budget(
    checkpoints: dict[str, reshard.Checkpoint], seed: int
) -> None:
    check(checkpoints["zstd"], seed, budget_bytes=100)


@given(st.integers(0, 2**62))
def test_programs_have_the_same_values_without_a_block(checkpoints: dict[str, reshard.Checkpoint], seed: int) -> None:
    expected = run({name: tensor.clone() for name, tensor in tensors().items()}, Random(seed))
    found = run(checkpoints["none"].lazy(), Random(seed))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one + 0, other)
