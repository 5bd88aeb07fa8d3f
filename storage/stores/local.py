"""A store on a local disk. It reads with preadv, syncs objects with fsync, and commits with a rename or a link."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from typing_extensions import Buffer

from ...planner.errors import CheckpointError
from ..errors import AccessDeniedError, CheckpointExistsError, ObjectNotFoundError, StoreError
from ..runtime.forks import fork_safe_lock
from ..runtime.logs import logger_of
from ..runtime.threads import Pool
from .base import Capabilities, ObjectWriter, is_name
from .buffer_pool import aligned_buffer

logger = logger_of(__name__)
TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{32}\.tmp", re.DOTALL)
"""The name of the file that `put` writes before it renames it. The group is the name of the object."""
OLD_S = 24 * 3600
"""A temporary file of this age was left by a put that was killed."""
MAX_OPEN_FILES = 64
MAX_ADVICE_BYTES = 512 * 1024
"""Linux ignores the part of an advice that exceeds what the device accepts at once, usually 100 KiB to 1 MiB."""
MAX_READ_BYTES = 2 * 1024 * 1024
"""The most bytes of one read: they should still be in the cache of the core when their checksums are computed
(`benchmarks/overhead.py`)."""
MIN_WRITE_BYTES = 1024 * 1024
"""Data is collected up to this size before the file is written to."""
MAX_BUFFERS_PER_WRITE = 512
"""Linux accepts 1024 buffers per `writev`."""
MIN_SYNC_BYTES = 8 * 1024 * 1024
"""A file is synced in the background each time that this much has been written."""


_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


class SpecialFileError(StoreError):
    """An object is a FIFO, a socket, a device or a folder instead of a file."""


class _IrregularFileError(OSError):
    """A path leads to something that is not a regular file."""


def _check_regular(found: os.stat_result) -> os.stat_result:
    """Return a result of `stat`. Raise _IrregularFileError if it is not of a regular file."""
    if not stat.S_ISREG(found.st_mode):
        raise _IrregularFileError(f"it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'something else')}, not a file")
    return found


class _OpenFile:
    """A file that is open for reading. It is closed when the last reference to it is gone."""

    def __init__(self, path: str) -> None:
        """Open a file. Raise _IrregularFileError for a FIFO, a device and so on, without waiting for it."""
        _check_regular(os.stat(path))  # before `open`, which may change the state of a device
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self.device = _check_regular(os.fstat(self.descriptor)).st_dev

    def read_into(
        self,
        ranges: Iterable[tuple[int, int]],
        buffer: memoryview,
        arrived: Callable[[int], None] = lambda nbytes: None,
    ) -> int:
        done = 0
        for start, stop in ranges:
            while start < stop:
                nbytes = stop - start if stop - start < MAX_READ_BYTES else MAX_READ_BYTES
                moved = os.preadv(self.descriptor, [buffer[done : done + nbytes]], start)
                if not moved:
                    break
                start += moved
                done += moved
                arrived(done)
        return done

    def is_cached(self, at: int) -> bool:
        """Return whether a byte is in the page cache. False if the system cannot report it."""
        try:
            return os.preadv(self.descriptor, [bytearray(1)], at, os.RWF_NOWAIT) == 1
        except (OSError, AttributeError):  # AttributeError if the system has no RWF_NOWAIT
            return False

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # `__init__` failed
            os.close(self.descriptor)


@contextmanager
def naming_working_directory(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise StoreError if a relative path cannot be resolved, because the working directory is gone."""
    try:
        yield
    except FileNotFoundError as error:
        raise StoreError(
            f"{os.fspath(path)!r} is relative to the working directory of this process, which has been removed: pass "
            "an absolute path, or change to another folder"
        ) from error


class LocalStore:
    """Objects as files below a folder, which is created when the first object is written.

    Args:
        root: the folder.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        with naming_working_directory(root):
            self._root = Path(os.path.abspath(root))
        self._lock = fork_safe_lock()
        self._open_files: dict[str, _OpenFile] = {}
        """The files that were used last, in the order of use."""

    @property
    def location(self) -> str:
        return str(self._root)

    @property
    def capabilities(self) -> Capabilities:
        # For reads outside of the decoding threads: more than 4 threads would only wait for each other's GIL.
        return Capabilities(
            concurrent_reads=4,
            read_into=self.read_into,
            will_read=self.will_read,
            list_top=self.list_top,
            check_delete=self.check_delete,
            close=self.close,
        )

    def read(self, name: str, start: int, stop: int) -> Buffer:
        with self._errors("read", name):
            file = _OpenFile(f"{self._root}/{name}")
            stop = max(start, min(stop, os.fstat(file.descriptor).st_size))
            data = aligned_buffer(start, stop - start)
            return data[: file.read_into([(start, stop)], data)]

    def size(self, name: str) -> int:
        return self._stat(name).st_size

    def modified(self, name: str) -> float:
        return self._stat(name).st_mtime

    def _stat(self, name: str) -> os.stat_result:
        with self._errors("read", name):
            found = os.stat(f"{self._root}/{name}")
            if stat.S_ISDIR(found.st_mode):
                raise FileNotFoundError(name)
            return _check_regular(found)

    def read_into(
        self, name: str, ranges: Sequence[tuple[int, int]], buffer: memoryview, arrived: Callable[[int], None]
    ) -> int:
        try:
            return self._open(name).read_into(ranges, buffer, arrived)
        except (OSError, ValueError) as error:
            with self._errors("read", name):
                raise error

    def will_read(self, name: str, ranges: Sequence[tuple[int, int]]) -> None:
        """Ask the kernel to read byte ranges ahead if they are not in the page cache."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError, ValueError):
                file = self._open(name)
                if _is_in_memory(file.device):
                    return
                for start, stop in ranges:
                    if file.is_cached(stop - 1):
                        continue  # advice on cached pages takes half as long as reading them (benchmarks/overhead.py)
                    for at in range(start, stop, MAX_ADVICE_BYTES):
                        nbytes = min(MAX_ADVICE_BYTES, stop - at)
                        os.posix_fadvise(file.descriptor, at, nbytes, os.POSIX_FADV_WILLNEED)

    def _open(self, name: str) -> _OpenFile:
        """Return an open file and keep it open, since opening a file takes as long as reading a few MB of it."""
        with self._lock:
            file = self._open_files.pop(name, None) or _OpenFile(f"{self._root}/{name}")
            self._open_files[name] = file
            if len(self._open_files) > MAX_OPEN_FILES:
                del self._open_files[next(iter(self._open_files))]
        return file

    @contextmanager
    def create(self, name: str) -> Iterator[ObjectWriter]:
        with self._folder("write", name, make=True) as (folder, base):
            with self._errors("write", name):
                file = _NewFile(base, folder, lambda: self._errors("write", name))
            try:
                yield file
                with self._errors("write", name):
                    file.sync()
                    os.fsync(folder)
            finally:
                file.close()

    def put(self, name: str, data: bytes, *, overwrite: bool) -> None:
        path = self._root / name
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        may_have_written = False
        try:
            with self._folder("write", name, make=True) as (folder, base), self._errors("write", name):
                try:
                    with open(os.open(temporary.name, _NEW, 0o666, dir_fd=folder), "wb") as file:
                        file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
                    may_have_written = True
                    if overwrite:
                        os.replace(temporary, path)
                    else:
                        _create(temporary, path)
                except FileExistsError:
                    raise CheckpointExistsError(f"{path} exists") from None
                finally:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(temporary.name, dir_fd=folder)
                os.fsync(folder)
                _sync_folder(self._root.parent)
                _remove_old_temporaries(folder, base)
        except StoreError as error:
            error.may_have_written = may_have_written
            raise

    @contextmanager
    def _folder(self, doing: str, name: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """Open the folder of an object without following a symbolic link below the root.

        Args:
            doing: the operation, for error messages.
            name: the object.
            make: whether to create missing folders.

        Yields:
            The descriptor of the folder, and the name of the object's file in it.

        Raises:
            StoreError: a folder is a symbolic link, or any error of `_errors`.
        """
        self._check_name(doing, name)
        *folders, base = name.split("/")
        with self._errors(doing, name):
            if make:
                _make_folder(self._root)
            descriptor = os.open(self._root, _FOLDER)
        try:
            for at, folder in enumerate(folders):
                try:
                    with self._errors(doing, name):
                        if make:
                            _make_folder_in(descriptor, folder)
                        below = os.open(folder, _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
                except StoreError:
                    if _is_link(folder, descriptor):
                        raise StoreError(self._link_message(doing, name, "/".join(folders[: at + 1]))) from None
                    raise
                os.close(descriptor)
                descriptor = below
            yield descriptor, base
        finally:
            os.close(descriptor)

    def _check_name(self, doing: str, name: str) -> None:
        if not is_name(name):
            raise StoreError(f"cannot {doing} {name!r} in {self.location}: this cannot be the name of an object")

    def _link_message(self, doing: str, name: str, folder: str) -> str:
        return (
            f"cannot {doing} {name!r} in {self.location}: its folder {folder!r} is a symbolic link. Links below the "
            "folder of a checkpoint are followed to read, never to write or to delete: replace the link by a folder, "
            "or make the folder of the checkpoint itself the link"
        )

    def list(self, folder: str = "") -> Iterable[str]:
        top = self._root / folder

        def failed(error: OSError) -> None:
            if isinstance(error, (FileNotFoundError, NotADirectoryError)):
                return
            if error.filename == str(top):
                raise error
            logger.warning("a folder in %s cannot be listed, so its objects are left out: %s", self.location, error)

        with self._errors("list", folder):
            for parent, _, files in os.walk(top, onerror=failed):
                yield from ((Path(parent) / file).relative_to(self._root).as_posix() for file in files)

    def list_top(self) -> Iterable[str]:
        with self._errors("list", ""):
            try:
                with os.scandir(self._root) as entries:
                    return [entry.name for entry in entries if not entry.is_dir()]
            except (FileNotFoundError, NotADirectoryError):
                return []

    def close(self) -> None:
        """Close the open files. A read opens them again."""
        with self._lock:
            self._open_files.clear()

    def __reduce__(self) -> tuple[type[LocalStore], tuple[Path]]:
        """Pickle only the root: another process opens its own files."""
        return type(self), (self._root,)

    def check_delete(self, names: Iterable[str]) -> None:
        names = list(names)
        for name in names:
            self._check_name("delete", name)
        for folder, bases in _by_folder(names).items():
            first = f"{folder}{bases[0]}"
            try:
                with self._folder("delete", first) as (descriptor, _):
                    for base in bases:
                        self._refuse_folder(f"{folder}{base}", base, descriptor)
            except ObjectNotFoundError:
                continue

    def _refuse_folder(self, name: str, base: str, folder: int) -> None:
        """Raise StoreError if a folder has the name of an object."""
        with self._errors("delete", name), contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(os.stat(base, dir_fd=folder, follow_symlinks=False).st_mode):
                raise StoreError(
                    f"cannot delete {name!r} in {self.location}: it is a folder instead of an object. Nothing was "
                    "deleted; remove that folder by other means"
                )

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects after checking all of them. Of a symbolic link, the link itself is deleted."""
        names = list(names)
        self.check_delete(names)
        with self._lock:
            for name in names:
                self._open_files.pop(name, None)
        for folder, bases in _by_folder(names).items():
            with contextlib.suppress(ObjectNotFoundError), self._folder("delete", folder + bases[0]) as (descriptor, _):
                for base in bases:
                    with self._errors("delete", folder + base), contextlib.suppress(FileNotFoundError):
                        os.unlink(base, dir_fd=descriptor)

    def delete_if_empty(self, folder: str = "") -> None:
        """Remove a folder that is empty, as an object store would. The current folder is not removed."""
        path = self._root / folder
        with contextlib.suppress(OSError):  # it is not empty
            if not path.samefile(os.curdir):
                os.rmdir(path)

    @contextmanager
    def _errors(self, doing: str, name: str) -> Iterator[None]:
        """Translate the exceptions of the operating system."""
        try:
            yield
        except CheckpointError:
            raise
        except (FileNotFoundError, NotADirectoryError) as error:
            if doing == "write":
                raise StoreError(f"cannot write {name!r}: {self.location} cannot be created: {error}") from error
            raise ObjectNotFoundError(f"{self.location} has no object {name!r}") from error
        except _IrregularFileError as error:
            raise SpecialFileError(f"cannot {doing} {name!r} in {self.location}: {error}") from None
        except PermissionError as error:
            raise AccessDeniedError(f"no permission to {doing} {name!r} in {self.location}: {error}") from error
        except OSError as error:
            raise StoreError(f"cannot {doing} {name!r} in {self.location}: {error}") from error
        except ValueError as error:  # an invalid path, for example with a NUL or an unpaired surrogate
            if doing == "read":
                raise ObjectNotFoundError(f"{self.location} has no object {name!r}: {error}") from error
            raise StoreError(f"cannot {doing} {name!r} in {self.location}: {error}") from error


class NodeLocalStore(LocalStore):
    """Objects on a disk that only the ranks of one machine see."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, is_shared=False)


class _NewFile:
    """A file that is being written, about a MiB per system call.

    Another thread syncs the file meanwhile. A single sync at the end would take as long as the writes
    (benchmarks/fsdp_to_tp.py).

    Args:
        name: the name of the file in its folder.
        folder: a descriptor of the folder.
        errors: returns a context manager that translates the exceptions of the operating system.
    """

    def __init__(self, name: str, folder: int, errors: Callable[[], AbstractContextManager[None]]) -> None:
        self.descriptor = os.open(name, _NEW, 0o666, dir_fd=folder)
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
        if self._nbytes >= MIN_WRITE_BYTES or len(self._waiting) >= MAX_BUFFERS_PER_WRITE:
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
        if self._unsynced >= MIN_SYNC_BYTES and (self._synced is None or self._synced.done()):
            self._wait_for_sync()
            self._synced = self._syncing.submit(_sync_data, self.descriptor)
            self._unsynced = 0

    def _wait_for_sync(self) -> None:
        """Wait for the background sync and raise its error: the system reports a failed write only once."""
        if self._synced is not None:
            self._synced.result()

    def sync(self) -> None:
        """Write what is left, and wait until the whole file is durable."""
        self.flush()
        self._wait_for_sync()
        os.fsync(self.descriptor)

    def close(self) -> None:
        self._syncing.shutdown()
        os.close(self.descriptor)


def _create(temporary: Path, path: Path) -> None:
    """Move a file to its final path atomically. Raise FileExistsError if the path exists."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # This filesystem has no hard links: the check and the rename are two steps.
        if os.path.lexists(path):
            raise FileExistsError(str(path)) from None
        os.replace(temporary, path)


@functools.cache
def _is_in_memory(device: int) -> bool:
    """Return whether a filesystem keeps its files in memory, so that reading ahead is useless."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError), open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            mounted, _, filesystem = line.partition(" - ")
            if mounted.split()[2] == number:
                return filesystem.split()[0] in ("tmpfs", "ramfs")
    return False


def _sync_data(descriptor: int) -> None:
    """Sync the content of a file without its timestamps, if the system can."""
    (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(descriptor)


def _make_folder(path: Path) -> None:
    """Create a folder and its missing parents, and make their names durable."""
    new = []
    while not path.exists():
        if path.is_symlink():
            raise StoreError(f"{path} is a symbolic link to {os.readlink(path)}, which does not exist")
        new.append(path)
        path = path.parent
    for folder in reversed(new):
        folder.mkdir(exist_ok=True)  # another rank may create it at the same time
        _sync_folder(folder.parent)


def _make_folder_in(parent: int, name: str) -> None:
    """Create a folder in an open folder if it does not exist, and make its name durable."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, dir_fd=parent)
        os.fsync(parent)


def _sync_folder(path: Path) -> None:
    """Make the names of the files in a folder durable, if this process may read the folder."""
    try:
        descriptor = os.open(path, _FOLDER)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_link(name: str, folder: int) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _by_folder(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names grouped by folder. A folder ends with a slash or is empty."""
    found: dict[str, list[str]] = {}
    for name in names:
        folder, slash, base = name.rpartition("/")
        found.setdefault(folder + slash, []).append(base)
    return found


def _remove_old_temporaries(folder: int, base: str) -> None:
    """Remove old temporary files of an object, which puts left that were killed."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = TEMPORARY.fullmatch(entry.name)
            if found and found[1] == base and entry.stat(follow_symlinks=False).st_mtime < time.time() - OLD_S:
                os.unlink(entry.name, dir_fd=folder)
