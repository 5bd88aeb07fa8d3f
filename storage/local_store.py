"""A store on a local disk: reads by pread, objects made durable by fsync, the commit by rename or link."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from typing_extensions import Buffer

from .errors import AccessDeniedError, CheckpointExistsError, ObjectNotFoundError, StoreError
from .memory import in_step
from .store import ObjectWriter
from .threads import Pool

OPEN_FILES = 64
ADVISED_BYTES = 512 * 1024
"""Linux heeds no more of one piece of advice than the device takes at once, most often some 100 KiB to a MiB."""
WRITE_BYTES = 1024 * 1024
"""What is waited for before a file that is written is written to."""
MOST_PARTS = 512
"""Of one call of the system; Linux takes 1024."""
SYNC_BYTES = 8 * 1024 * 1024
"""What is written of a file before the disk is told to keep it, at least."""


class _OpenFile:
    """A file open for reading, which is closed once nobody holds it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_into(self, ranges: Iterable[tuple[int, int]], buffer: memoryview) -> int:
        done = 0
        for start, stop in ranges:
            while start < stop and (moved := os.preadv(self.descriptor, [buffer[done : done + stop - start]], start)):
                start += moved
                done += moved
        return done

    def is_cached(self, at: int) -> bool:
        """Whether a byte is in memory, where that can be told."""
        try:
            return os.preadv(self.descriptor, [bytearray(1)], at, os.RWF_NOWAIT) == 1
        except (OSError, AttributeError):  # AttributeError where the system has no such reads
            return False

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it could not be opened
            os.close(self.descriptor)


class LocalStore:
    """A folder. It is made when the first object is written."""

    concurrent_reads = 4
    """Where they are not made by the threads that decode: more would only take turns at the interpreter."""
    async_reads = None
    holds_objects = False

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(os.path.abspath(root))
        self._lock = threading.Lock()
        self._open_files: dict[str, _OpenFile] = {}
        """Those used last, in that order."""

    @property
    def location(self) -> str:
        return str(self._root)

    def read(self, name: str, start: int, stop: int) -> Buffer:
        with self._errors("read", name):
            file = _OpenFile(f"{self._root}/{name}")
            stop = max(start, min(stop, os.fstat(file.descriptor).st_size))
            data = in_step(start, stop - start)
            return data[: file.read_into([(start, stop)], data)]

    def size(self, name: str) -> int:
        return self._stat(name).st_size

    def modified(self, name: str) -> float:
        return self._stat(name).st_mtime

    def _stat(self, name: str) -> os.stat_result:
        with self._errors("read", name):
            found = os.stat(f"{self._root}/{name}")
            if not stat.S_ISREG(found.st_mode):
                raise FileNotFoundError(name)
            return found

    def read_into(self, name: str, ranges: Sequence[tuple[int, int]], buffer: memoryview) -> int:
        with self._errors("read", name):
            return self._open(name).read_into(ranges, buffer)

    def will_read(self, name: str, ranges: Sequence[tuple[int, int]]) -> None:
        """Have the kernel begin to read from the disk what it does not hold yet, where it can be told to."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError, StoreError), self._errors("read", name):
                file = self._open(name)
                for start, stop in ranges:
                    if file.is_cached(stop - 1):
                        continue  # to give advice on cached pages would take half as long as to read them
                    for at in range(start, stop, ADVISED_BYTES):
                        os.posix_fadvise(file.descriptor, at, min(ADVISED_BYTES, stop - at), os.POSIX_FADV_WILLNEED)

    def _open(self, name: str) -> _OpenFile:
        """The file, kept open: to open one takes as long as to read some MB of it."""
        with self._lock:
            file = self._open_files.pop(name, None) or _OpenFile(f"{self._root}/{name}")
            self._open_files[name] = file
            if len(self._open_files) > OPEN_FILES:
                del self._open_files[next(iter(self._open_files))]
        return file

    @contextmanager
    def create(self, name: str) -> Iterator[ObjectWriter]:
        path = self._root / name
        with self._errors("write", name):
            _make_folder(path.parent)
            file = _NewFile(path, lambda: self._errors("write", name))
        try:
            yield file
            with self._errors("write", name):
                file.sync()
                _sync_folder(path.parent)
        finally:
            file.close()

    def put(self, name: str, data: bytes, *, overwrite: bool) -> None:
        path = self._root / name
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        with self._errors("write", name):
            _make_folder(path.parent)
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if overwrite:
                    os.replace(temporary, path)
                else:
                    _create(temporary, path)
            except FileExistsError:
                raise CheckpointExistsError(f"{path} exists") from None
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(path.parent)
            _sync_folder(self._root.parent)

    def list(self, folder: str = "") -> Iterable[str]:
        with self._errors("list", folder):
            for parent, _, files in os.walk(self._root / folder):
                yield from ((Path(parent) / file).relative_to(self._root).as_posix() for file in files)

    def list_top(self) -> Iterable[str]:
        with self._errors("list", ""):
            try:
                with os.scandir(self._root) as entries:
                    return [entry.name for entry in entries if not entry.is_dir()]
            except (FileNotFoundError, NotADirectoryError):
                return []

    def __reduce__(self) -> tuple[type[LocalStore], tuple[Path]]:
        """What is sent to another process: where it is, and no open file."""
        return LocalStore, (self._root,)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            with self._lock:
                self._open_files.pop(name, None)
            with self._errors("delete", name):
                (self._root / name).unlink(missing_ok=True)

    def delete_if_empty(self, folder: str = "") -> None:
        """Remove a folder that holds nothing, as object stores do by themselves; not the one that we are in."""
        path = self._root / folder
        with contextlib.suppress(OSError):  # it holds something
            if not path.samefile(os.curdir):
                os.rmdir(path)

    @contextmanager
    def _errors(self, doing: str, name: str) -> Iterator[None]:
        """Translate what the operating system raises."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            if doing == "write":
                raise StoreError(f"cannot write {name!r}: {self.location} cannot be made: {error}") from error
            raise ObjectNotFoundError(f"{self.location} has no object {name!r}") from error
        except PermissionError as error:
            raise AccessDeniedError(f"no permission to {doing} {name!r} in {self.location}: {error}") from error
        except OSError as error:
            raise StoreError(f"cannot {doing} {name!r} in {self.location}: {error}") from error
        except ValueError as error:  # a path that no file can have, as with a NUL, or half of a UTF-16 pair
            if doing == "read":
                raise ObjectNotFoundError(f"{self.location} has no object {name!r}: {error}") from error
            raise StoreError(f"cannot {doing} {name!r} in {self.location}: {error}") from error


class _NewFile:
    """A file being written, some MiB by one call of the system; what that raises is translated.

    A thread has the disk keep what is written while more is: at the end that would take as long again.
    """

    def __init__(self, path: Path, errors: Callable[[], AbstractContextManager[None]]) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._errors = errors
        self._waiting: list[memoryview] = []
        self._nbytes = 0
        self._unsynced = 0
        self._syncing = Pool(1, "reshard-sync")
        self._synced: Future[None] | None = None

    def write(self, data: Buffer, /) -> None:
        view = memoryview(data).cast("B")
        if len(view):
            self._waiting.append(view)
            self._nbytes += len(view)
        if self._nbytes >= WRITE_BYTES or len(self._waiting) >= MOST_PARTS:
            with self._errors():
                self.flush()

    def flush(self) -> None:
        while self._waiting:
            done = os.writev(self.descriptor, self._waiting)
            self._unsynced += done
            self._nbytes -= done
            while self._waiting and done >= len(self._waiting[0]):
                done -= len(self._waiting.pop(0))
            if done:
                self._waiting[0] = self._waiting[0][done:]
        if self._unsynced >= SYNC_BYTES and (self._synced is None or self._synced.done()):
            self._wait_for_sync()
            self._synced = self._syncing.submit(_sync_data, self.descriptor)
            self._unsynced = 0

    def _wait_for_sync(self) -> None:
        """Raises what it raised: the system tells of a write that failed only once."""
        if self._synced is not None:
            self._synced.result()

    def sync(self) -> None:
        """Wait until the disk keeps all of it."""
        self.flush()
        self._wait_for_sync()
        os.fsync(self.descriptor)

    def close(self) -> None:
        self._syncing.shutdown()
        os.close(self.descriptor)


def _create(temporary: Path, path: Path) -> None:
    """Give a file its name, atomically. Raises FileExistsError where the name is taken."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # A filesystem without hard links: the check and the renaming are two steps.
        if path.exists():
            raise FileExistsError(str(path)) from None
        os.replace(temporary, path)


def _sync_data(descriptor: int) -> None:
    """Without its times, where the system knows the difference."""
    (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(descriptor)


def _make_folder(path: Path) -> None:
    """Make a folder and the parents that it lacks, and make the names of all durable."""
    new = []
    while not path.exists():
        new.append(path)
        path = path.parent
    for folder in reversed(new):
        folder.mkdir(exist_ok=True)  # another rank may make it at the same time
        _sync_folder(folder.parent)


def _sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
