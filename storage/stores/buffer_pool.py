"""Memory to read into that is used again: fresh pages cost more than filling them."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .base import ReadInto

Array = npt.NDArray[np.uint8]
PAGE_BYTES = 4096


def in_step(start: int, nbytes: int) -> memoryview:
    """Fresh memory for what lies in a file from byte `start`, as far into a page as it is there.

    Where memory lies up to 63 bytes further into its page than what is copied to it, AMD's Zen 3 and 4 copy five times
    as slowly (glibc's bug 30994), and that is where the C library puts large memory: 16 bytes into a page.
    """
    into_page = start % PAGE_BYTES
    return _whole_pages(into_page + nbytes).data[into_page:]


def _whole_pages(nbytes: int) -> Array:
    """Fresh memory that begins with a page."""
    array = np.empty(nbytes + PAGE_BYTES, np.uint8)
    return array[-array.ctypes.data % PAGE_BYTES :][:nbytes]


class Memory:
    """Memory that is used again, in few sizes; never more of it than was lent at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[int, list[Array]] = {}
        """By size, that given back last at the end: it is the likeliest to be in the cache."""
        self._lent: dict[int, Array] = {}
        """By what `id` gives."""
        self._lent_bytes = self._free_bytes = self._most_bytes = 0

    def filled(self, read_into: ReadInto, name: str, ranges: Sequence[tuple[int, int]]) -> memoryview:
        """What `read_into` gives of some ranges, one after another. Raises what it raises."""
        nbytes = sum(stop - start for start, stop in ranges)
        data = self._lend(nbytes).data[ranges[0][0] % PAGE_BYTES :]  # as `in_step` has it
        try:
            return data[: read_into(name, ranges, data[:nbytes])]
        except BaseException:
            self.give(data)
            raise

    def _lend(self, nbytes: int) -> Array:
        """At least as many bytes, and a page."""
        step = 1 << max(0, (nbytes - 1).bit_length() - 4)
        size = -(-nbytes // step) * step + PAGE_BYTES  # at most an eighth more
        with self._lock:
            if free := self._free.get(size):
                array = free.pop()
                self._free_bytes -= size
            else:
                array = _whole_pages(size)
            self._lent[id(array)] = array
            self._lent_bytes += size
            self._most_bytes = max(self._most_bytes, self._lent_bytes)
            self._drop()
        return array

    def _drop(self) -> None:
        """Let go of what is too much, of the size that was given back longest ago."""
        while self._free_bytes + self._lent_bytes > self._most_bytes:
            size, free = next(iter(self._free.items()))
            if free:
                free.pop(0)
                self._free_bytes -= size
            if not free:
                del self._free[size]

    def give(self, data: memoryview) -> None:
        """Take back what was lent; anything else is left alone."""
        with self._lock:
            array = self._lent.pop(id(data.obj), None)
            if array is not None:
                self._lent_bytes -= array.nbytes
                self._free_bytes += array.nbytes
                free = self._free.pop(array.nbytes, [])
                free.append(array)
                self._free[array.nbytes] = free  # the last of the sizes
                self._drop()
