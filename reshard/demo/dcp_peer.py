"""The fsspec reader of torch.distributed.checkpoint, with counters, for comparison with reshard."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader


class CountingReader(FsspecReader):
    """DCP's fsspec reader. It counts the bytes and the calls that read from the filesystem."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.bytes = 0
        self.requests = 0
        create_stream = self.fs.create_stream

        @contextmanager
        def counted(path: Any, mode: str) -> Generator[Any, None, None]:
            with create_stream(path, mode) as stream:
                yield _CountingStream(stream, self)

        self.fs.create_stream = counted  # type: ignore[method-assign]


class _CountingStream:
    def __init__(self, stream: Any, counter: CountingReader) -> None:
        self._stream = stream
        self._counter = counter

    def read(self, size: int = -1) -> Any:
        data = self._stream.read(size)
        self._counter.bytes += len(data)
        self._counter.requests += 1
        return data

    def readinto(self, buffer: Any) -> int:
        count: int = self._stream.readinto(buffer)
        self._counter.bytes += count
        self._counter.requests += 1
        return count

    def readline(self) -> Any:
        data = self._stream.readline()
        self._counter.bytes += len(data)
        self._counter.requests += 1
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
