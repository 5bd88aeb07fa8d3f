import math

import numpy as np
import pytest
import torch

from reshard.storage.formats.native.chunk_runs import Slices
from reshard.storage.reading.blocks import Block
from reshard.storage.reading.destination import BlockWriter, Destination
from reshard.storage.tensors.dtypes import SINGLE_THREAD_NUMEL, as_array, as_bytes, cast, from_bytes


def chunk_at(target: Slices, sizes: tuple[int, ...]) -> Block:
    """Return a block of one chunk."""
    return Block(0, 0, math.prod(sizes), sizes, (slice(None),) * len(sizes), target)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_torch", [False, True])
def test_boxes_are_written_and_cast(stored: torch.dtype, by_torch: bool) -> None:
    tensor, values = torch.zeros(4, 6), torch.arange(24.0).reshape(4, 6)
    destination = Destination(tensor, stored)
    for columns in (slice(0, 2), slice(2, 6)):
        part = values[:, columns].to(stored)
        target = BlockWriter(destination, chunk_at((slice(0, 4), columns), tuple(part.shape)))
        if by_torch:
            target.write_tensor((), part.reshape(-1))
        else:
            target.write((), as_bytes(as_array(part)))
    assert tensor.equal(values)


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
