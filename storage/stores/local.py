"""A store on a local disk: reads by pread, objects made durable by fsync, the commit by rename or link."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from typing_extensions import Buffer

from ...planner.errors import CheckpointError
from ..errors import AccessDeniedError, CheckpointExistsError, ObjectNotFoundError, StoreError
from ..runtime.forks import Lock
from ..runtime.threads import Pool
from .base import ObjectWriter, is_name
from .buffer_pool import in_step

TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{32}\.tmp", re.DOTALL)
"""What a put calls a file before it is whole; the group is the object's name."""
OLD_S = 24 * 3600
"""A temporary file of that age is one of a put that was killed."""
OPEN_FILES = 64
ADVISED_BYTES = 512 * 1024
"""Linux heeds no more of one piece of advice than the device takes at once, most often some 100 KiB to a MiB."""
WRITE_BYTES = 1024 * 1024
"""What is waited for before a file that is written is written to."""
MAX_PARTS = 512
"""Of one call of the system; Linux takes 1024."""
SYNC_BYTES = 8 * 1024 * 1024
"""What is written of a file before the disk is told to keep it, at least."""


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
    """A FIFO, a socket, a device or a folder is in the place of an object."""


class _IrregularFileError(OSError):
    """Something that is no regular file is in the place of one."""


def _check_regular(found: os.stat_result) -> os.stat_result:
    """Return what `stat` found. Raises _IrregularFileError if it is no regular file."""
    if not stat.S_ISREG(found.st_mode):
        raise _IrregularFileError(f"it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'something else')}, not a file")
    return found


class _OpenFile:
    """A file open for reading, which is closed once nobody holds it."""

    def __init__(self, path: str) -> None:
        """Open a file. Raises _IrregularFileError for a FIFO, a device and so on, without waiting for it."""
        _check_regular(os.stat(path))  # to open a device may change its state
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        _check_regular(os.fstat(self.descriptor))

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
        self._lock = Lock()
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
            if stat.S_ISDIR(found.st_mode):
                raise FileNotFoundError(name)
            return _check_regular(found)

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
        with self._folder("write", name, make=True) as (folder, base), self._errors("write", name):
            try:
                with open(os.open(temporary.name, _NEW, 0o666, dir_fd=folder), "wb") as file:
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
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary.name, dir_fd=folder)
            os.fsync(folder)
            _sync_folder(self._root.parent)
            _remove_old_temporaries(folder, base)

    @contextmanager
    def _folder(self, doing: str, name: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """Open the folder that holds an object, and follow no link below the root.

        Args:
            make: whether to make the folders that are missing.

        Returns: the folder's descriptor, and the object's name in it.

        Raises StoreError for a folder that is a link, and what `_errors` does.
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
                        raise StoreError(self._told_link(doing, name, "/".join(folders[: at + 1]))) from None
                    raise
                os.close(descriptor)
                descriptor = below
            yield descriptor, base
        finally:
            os.close(descriptor)

    def _check_name(self, doing: str, name: str) -> None:
        if not is_name(name):
            raise StoreError(f"cannot {doing} {name!r} in {self.location}: it is no name of an object")

    def _told_link(self, doing: str, name: str, folder: str) -> str:
        return (
            f"cannot {doing} {name!r} in {self.location}: its folder {folder!r} is a symbolic link. Links below a "
            "checkpoint's own folder are followed to read, never to write or to delete: put a folder in the place of "
            "the link, or make the checkpoint's own folder the link"
        )

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

    def close(self) -> None:
        """Close the files that are kept open. A read opens them again."""
        with self._lock:
            self._open_files.clear()

    def __reduce__(self) -> tuple[type[LocalStore], tuple[Path]]:
        """What is sent to another process: where it is, and no open file."""
        return LocalStore, (self._root,)

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
        """Raises StoreError if what has an object's name is a folder."""
        with self._errors("delete", name), contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(os.stat(base, dir_fd=folder, follow_symlinks=False).st_mode):
                raise StoreError(
                    f"cannot delete {name!r} in {self.location}: it is a folder, where an object should be. Nothing "
                    "was deleted; remove that folder by other means"
                )

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects, after checking all of them. An object that is a link is removed, and not what it leads to."""
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
        except CheckpointError:
            raise
        except (FileNotFoundError, NotADirectoryError) as error:
            if doing == "write":
                raise StoreError(f"cannot write {name!r}: {self.location} cannot be made: {error}") from error
            raise ObjectNotFoundError(f"{self.location} has no object {name!r}") from error
        except _IrregularFileError as error:
            raise SpecialFileError(f"cannot {doing} {name!r} in {self.location}: {error}") from None
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
        if self._nbytes >= WRITE_BYTES or len(self._waiting) >= MAX_PARTS:
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
        if os.path.lexists(path):
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


def _make_folder_in(parent: int, name: str) -> None:
    """Make a folder in one that is open, if it is not there, and make its name durable."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, dir_fd=parent)
        os.fsync(parent)


def _sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, _FOLDER)
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
    """Group names by their folders, which end with a slash, or are empty."""
    found: dict[str, list[str]] = {}
    for name in names:
        folder, slash, base = name.rpartition("/")
        found.setdefault(folder + slash, []).append(base)
    return found


def _remove_old_temporaries(folder: int, base: str) -> None:
    """Remove what puts of an object left that were killed, if it is old."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = TEMPORARY.fullmatch(entry.name)
            if found and found[1] == base and entry.stat(follow_symlinks=False).st_mtime < time.time() - OLD_S:
                os.unlink(entry.name, dir_fd=folder)
