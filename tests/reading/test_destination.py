import math

import numpy as np
import pytest
import torch

from reshard.storage.formats.native.chunk_runs import Slices
from reshard.storage.reading.blocks import Block
from reshard.storage.reading.destination import Destination
from reshard.storage.tensors.dtypes import SINGLE_THREAD_NUMEL, as_array, as_bytes, cast, from_bytes


def chunk_at(target: Slices, sizes: tuple[int, ...]) -> Block:
    """Return a block of one chunk."""
    return Block(0, 0, math.prod(sizes), sizes, (slice(None),) * len(sizes), target)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_staged_destination_is_written_to_host_memory_first(stored: torch.dtype) -> None:
    tensor, values = torch.zeros(4, 6), torch.arange(24.0).reshape(4, 6)
    destination = Destination(tensor, stored, staged=True)
    for columns in (slice(0, 2), slice(2, 6)):
        destination.begin(whole=True, max_bytes=1000)
        part = values[:, columns].to(stored)
        destination.open(chunk_at((slice(0, 4), columns), tuple(part.shape))).write((), as_bytes(as_array(part)))
        assert (tensor == 0).all(), "the tensor changes only in finish()"
    destination.finish()
    assert tensor.equal(values)


@pytest.mark.parametrize(("whole", "max_bytes"), [(False, 1000), (True, 15)])
def test_destination_that_is_too_large_to_stage_is_written_directly(whole: bool, max_bytes: int) -> None:
    tensor = torch.zeros(4)
    destination = Destination(tensor, torch.float32, staged=True)
    destination.begin(whole=whole, max_bytes=max_bytes)
    destination.open(chunk_at((slice(0, 2),), (2,))).write((), as_bytes(as_array(torch.ones(2))))
    assert tensor.tolist() == [1, 1, 0, 0]
    destination.finish()
    assert tensor.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("numel", [1, SINGLE_THREAD_NUMEL, 3 * SINGLE_THREAD_NUMEL + 7])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.int64, torch.float16)]
)
def test_cast_returns_the_same_values_as_torch(dtypes: tuple[torch.dtype, torch.dtype], numel: int) -> None:
    """The source bytes may be read-only."""
    stored, dtype = dtypes
    values = torch.randn(numel).mul(1000).to(stored)
    given = as_bytes(as_array(values)).copy()
    given.flags.writeable = False
    out = np.empty(numel * dtype.itemsize, np.uint8)
    cast(given, stored, out, dtype)
    assert torch.from_numpy(out).view(dtype).equal(values.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64, torch.complex128])
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_from_bytes_returns_aligned_tensors(offset: int, dtype: torch.dtype) -> None:
    expected = torch.randn(5, dtype=dtype)
    data = expected.view(torch.uint8).numpy()
    memory = np.empty(len(data) + offset, np.uint8)
    memory[offset:] = data
    tensor = from_bytes(memory[offset:], dtype, (5,))
    assert tensor.equal(expected)
    assert tensor.data_ptr() % dtype.itemsize == 0
