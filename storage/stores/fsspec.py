"""Open paths and URIs, and a store on any filesystem of fsspec: S3, GCS, ..."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from itertools import accumulate
from typing import Any

import fsspec
from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.cached import CachingFileSystem
from fsspec.implementations.local import LocalFileSystem
from typing_extensions import Buffer

from ...planner.masking import harmless, masked
from ..errors import ArgumentError, StoreError, UnsupportedURIError
from ..runtime.threads import Pool, result_of, run_bounded
from .base import PART_BYTES, Capabilities, MultipartUpload, ObjectWriter, Store, buffered_writer, is_name
from .client_errors import is_beyond_the_end, is_missing_bucket, translating
from .conditional_put import put_new, refuse_to_replace
from .local import LocalStore, naming_working_directory
from .obstore import open_s3
from .obstore_reads import ReadsOfFilesystem, call_deadline_s, is_lost_in_fork, open_reads
from .options import checked_options
from .retry import RetryingStore, deadline_s
from .uris import OBJECT_STORES, WRAPPERS, is_chain, is_local, without_query

S3_CONFIG = {
    "max_pool_connections": 64,
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    "connect_timeout": 10,
    "read_timeout": 20,
}
"""botocore's default of 10 connections allows only ten requests at once. Its checksums are off because reshard has its
own, and because some servers answer a range with the checksum of the whole object, and others refuse checksums."""
NO_RETRIES = {"total_max_attempts": 1}
"""botocore's configuration for the calls that RetryingStore retries. Without it, one call makes up to 5 requests."""
CONCURRENT_DELETES = 16
S3_MAX_PUT_BYTES = 5 * 1024**3


_HIDE_MISSING_BUCKETS = OBJECT_STORES - {"s3", "s3a"}
"""The protocols whose filesystems find no objects in a bucket that does not exist, instead of raising an error."""
_REPLACED = re.compile(r"(^|/)(manifest\.reshard$|\.reshard-)")
"""Matches the names of objects that reshard replaces: manifests, leases, notes of conversions. A cache of whole files
would return old ones. The names of data objects are unique."""


def open_fsspec(uri: str, storage_options: dict[str, Any]) -> Store:
    """Open the store at a path or URI. Raise UnsupportedURIError, ArgumentError or StoreError."""
    if is_local(uri):
        if storage_options:
            raise ArgumentError(
                f"{uri!r} is a local path, which takes no storage_options, "
                f"got {', '.join(map(repr, storage_options))}: omit them, or pass the URI that they are for"
            )
        with naming_working_directory(uri):
            path = LocalFileSystem._strip_protocol(uri)
        return LocalStore(path)
    storage_options = checked_options(storage_options, split_protocol(uri)[0] or "")
    return RetryingStore(_open_remote(uri, storage_options), reopen=partial(_open_remote, uri, storage_options))


def _open_remote(uri: str, storage_options: dict[str, Any]) -> Store:
    """Open the store at a URI that is not local. Raise UnsupportedURIError or StoreError."""
    shown = masked(uri)
    storage_options = {name: value for name, value in storage_options.items() if name != "asynchronous"}
    open_uploads: Callable[[], tuple[Any, str]] | None = None
    protocol, path = split_protocol(uri)
    if protocol in OBJECT_STORES and path.partition("/")[2].startswith("/"):
        raise UnsupportedURIError(f"{shown!r} has two slashes after the bucket: remove one")
    if protocol in OBJECT_STORES and not path.partition("/")[0]:
        raise UnsupportedURIError(f"{shown!r} has no bucket: pass {protocol}://bucket/folder")
    if protocol in ("s3", "s3a"):
        given = storage_options
        passed = given.get("config_kwargs") or {}
        storage_options = {**given, "config_kwargs": {**S3_CONFIG, "retries": NO_RETRIES, **passed}}
        uploading = {**given, "config_kwargs": {**S3_CONFIG, **passed}}
        open_uploads = partial(_filesystem, uri, protocol, uploading)
        store = open_s3(path, given, lambda: FsspecStore(*_filesystem(uri, protocol, storage_options)))
        if store is not None:
            return store
    if without_query(protocol, path)[1]:
        storage_options = {"encoded": True, **storage_options}  # a signed URL must not be encoded again
    try:
        filesystem, path = _filesystem(uri, protocol, storage_options)
    except ImportError as error:
        if protocol in ("s3", "s3a") and is_lost_in_fork():
            raise StoreError(
                f"cannot open {shown!r}: this process was forked from one that had loaded obstore, and a forked "
                "process does not have obstore's threads. Install s3fs, which is then used instead, or start the "
                "process with spawn or forkserver (multiprocessing_context= of a DataLoader)"
            ) from error
        raise UnsupportedURIError(f"{shown!r} needs a package that is not installed: {error}") from harmless(error)
    except (ValueError, TypeError) as error:
        raise UnsupportedURIError(f"cannot open {shown!r}: {error}") from harmless(error)
    except Exception as error:  # some filesystems connect when they are opened
        raise StoreError(f"cannot open a location of {protocol}://: {error}") from harmless(error)
    return FsspecStore(filesystem, path, open_uploads, open_reads(filesystem, protocol, path, shown))


def _filesystem(uri: str, protocol: str | None, options: dict[str, Any]) -> tuple[Any, str]:
    """Return fsspec's filesystem for a URI, and the path in it."""
    if "::" not in uri or is_chain(uri) or protocol in WRAPPERS:
        filesystem, path = url_to_fs(uri, **options)
    else:
        kind = fsspec.get_filesystem_class(protocol)  # `url_to_fs` would split the URI at a "::" in a name
        filesystem = fsspec.filesystem(protocol, **{**kind._get_kwargs_from_urls(uri), **options})
        path = kind._strip_protocol(uri)
    if protocol in ("s3", "s3a"):
        filesystem.retries = 1  # the pauses of s3fs have no jitter, and it repeats each retry of botocore
    return filesystem, path


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _is_on_disk(filesystem: Any) -> bool:
    """Return whether a filesystem is the local disk, or wraps it."""
    while filesystem is not None and not isinstance(filesystem, LocalFileSystem):
        filesystem = getattr(filesystem, "fs", None)
    return filesystem is not None


class FsspecStore:
    """Objects below a path of a filesystem of fsspec.

    Args:
        filesystem: the filesystem.
        path: the root, as a path in the filesystem.
        open_uploads: returns the filesystem and the path for uploads in parts, which the client has to retry. Default:
            the same ones.
        reads: reads instead of the filesystem, as long as they work. Only for asynchronous filesystems.
    """

    def __init__(
        self,
        filesystem: Any,
        path: str,
        open_uploads: Callable[[], tuple[Any, str]] | None = None,
        reads: ReadsOfFilesystem | None = None,
    ) -> None:
        self._fs = filesystem
        self._reads = reads
        self._open_uploads = open_uploads or (lambda: (filesystem, path))
        path, self._query = without_query(path.partition("://")[0], path)
        self._root = path.rstrip("/")
        self._has_folders = not OBJECT_STORES.intersection(_protocols(filesystem))
        self._is_on_disk = _is_on_disk(filesystem)
        self._bucket_exists = False
        """Whether the bucket has been seen. False means not known."""
        self._is_async = filesystem.async_impl and not self._is_on_disk  # DirFileSystem is async for any filesystem

    @property
    def location(self) -> str:
        if "://" in self._root:  # HTTP
            return masked(self._root)
        return masked(f"{_protocols(self._fs)[0]}://{self._root.lstrip('/')}")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            concurrent_reads=32,
            buffers_objects=True,
            async_reads=_FsspecReads(self) if self._is_async else None,
            list_top=self.list_top,
            check_delete=self.check_delete,
        )

    def _call(self, method: str, *arguments: Any, nbytes: int = 0, **options: Any) -> Any:
        """Call a method of the filesystem. An asynchronous one has a deadline for the `nbytes` that it transfers."""
        if not self._is_async:
            return getattr(self._fs, method)(*arguments, **options)
        coroutine = getattr(self._fs, f"_{method}")
        return result_of(coroutine(*arguments, **options), self._fs.loop, deadline_s(nbytes))

    def _cat(self, name: str, start: int, stop: int) -> Any:
        """Return the bytes of an object, or a coroutine that does so if the filesystem is asynchronous."""
        filesystem, options = self._fs, {}
        if isinstance(filesystem, CachingFileSystem) and _REPLACED.search(name):
            filesystem = filesystem.fs
        if {"http", "https"}.intersection(_protocols(filesystem)):
            options["raise_for_status"] = partial(_check_range, start)
        read = filesystem._cat_file if self._is_async else filesystem.cat_file
        return read(self._path(name), start=start, end=stop, **options)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}{self._query}"

    def read(self, name: str, start: int, stop: int) -> Buffer:
        with self._errors("read", name):
            if self._reads is not None:
                deadline = call_deadline_s() + 2 * deadline_s(stop - start)
                return result_of(_FsspecReads(self).read(name, start, stop), self._fs.loop, deadline)
            self._check_regular(name)
            try:
                found = self._cat(name, start, stop)
                data = result_of(found, self._fs.loop, deadline_s(stop - start)) if self._is_async else found
            except Exception as error:
                if is_beyond_the_end(error):
                    return b""
                raise
            return _range_of(data, start, stop, name)

    def _check_regular(self, name: str) -> None:
        """Raise StoreError if the object is on a local disk and not a file: opening a FIFO would wait forever."""
        if self._is_on_disk and self._call("info", self._path(name))["type"] != "file":
            raise StoreError(f"cannot read {name!r} in {self.location}: it is not a file")

    def size(self, name: str) -> int:
        with self._errors("read", name):
            self._fs.invalidate_cache()
            found = self._call("info", self._path(name))
            if found["type"] != "file":
                raise FileNotFoundError(name)
            if found["size"] is None:
                raise StoreError(f"cannot read {name!r} in {self.location}: the server does not tell its size")
            return int(found["size"])

    def modified(self, name: str) -> float:
        with self._errors("read", name):
            self._fs.invalidate_cache()
            return float(self._fs.modified(self._path(name)).timestamp())

    def create(self, name: str) -> AbstractContextManager[ObjectWriter]:
        return buffered_writer(lambda data: self._put(name, data, "overwrite"), lambda: self._upload(name))

    def _upload(self, name: str) -> MultipartUpload:
        errors = partial(self._errors, "write", name)
        with errors():
            file = self._open_uploads()[0].open(self._path(name), "wb", block_size=PART_BYTES)

        def abort() -> None:
            run_bounded(file.discard)
            with contextlib.suppress(AttributeError):
                file.closed = True  # else its finalizer would close it, which completes the object
            self.delete([name])  # a filesystem that is not an object store has an incomplete file

        return MultipartUpload(file, errors, abort)

    def put(self, name: str, data: bytes, *, overwrite: bool) -> None:
        if overwrite:
            self._put(name, data, "overwrite")
        elif OBJECT_STORES.intersection(_protocols(self._fs)):
            bucket = (self._fs._fs_token, self._root.partition("/")[0])
            put_new(self, bucket, lambda name, data: self._put(name, data, "create"), name, data)
        else:
            refuse_to_replace(self, name)
            self._put(name, data, "create")

    def _put(self, name: str, data: bytes, mode: str) -> None:
        path = self._path(name)
        # One request, since some servers ignore the condition of a multipart upload.
        options: dict[str, Any] = {"nbytes": len(data)}
        if "s3" in _protocols(self._fs):
            options["chunksize"] = S3_MAX_PUT_BYTES
        with self._errors("write", name):
            try:
                self._call("pipe_file", path, data, mode=mode, **options)
            except FileNotFoundError:
                self._make_folder(path)
                self._call("pipe_file", path, data, mode=mode, **options)

    def _make_folder(self, path: str) -> None:
        """Create the folder of a path. Raise FileNotFoundError on an object store: reshard creates no buckets."""
        if OBJECT_STORES.intersection(_protocols(self._fs)):
            raise FileNotFoundError(path)
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def list(self, folder: str = "") -> Iterable[str]:
        return self._listed("find", folder)

    def list_top(self) -> Iterable[str]:
        return [name for name in self._listed("ls", "") if "/" not in name]

    def _listed(self, method: str, folder: str) -> Iterable[str]:
        with self._errors("list", folder):
            self._fs.invalidate_cache()
            root = self._fs._strip_protocol(self._root)
            try:
                found = self._call(method, f"{self._root}/{folder}".rstrip("/") + self._query, detail=True)
            except FileNotFoundError as error:
                if is_missing_bucket(error) or self._lacks_bucket():
                    raise StoreError(f"cannot list {self.location}: there is no such bucket") from None
                return []
            if not found and self._lacks_bucket():
                raise StoreError(f"cannot list {self.location}: there is no such bucket")
            entries = found.values() if isinstance(found, dict) else found
            # If the folder is an object, adlfs returns its name alone.
            paths = [entry["name"] for entry in entries if not isinstance(entry, str) and entry["type"] == "file"]
            # Remove only one slash: a key may have an empty part.
            return [name for path in paths if is_name(name := path[len(root) :].removeprefix("/"))]

    def _lacks_bucket(self) -> bool:
        """Return whether there is certainly no such bucket. On some stores, listing a missing bucket finds no objects.

        Without the permission to look at the bucket, this is not known.
        """
        if self._bucket_exists or _HIDE_MISSING_BUCKETS.isdisjoint(_protocols(self._fs)):
            return False
        try:
            self._call("info", self._fs._strip_protocol(self._root).partition("/")[0])
        except FileNotFoundError:
            return True
        except Exception:  # the listing has succeeded
            return False
        self._bucket_exists = True
        return False

    def check_delete(self, names: Iterable[str]) -> None:
        """Check objects on a filesystem that has folders. Symbolic links are recognised only on a local disk."""
        seen: set[str] = set()
        for name in names if self._has_folders else ():
            with self._errors("delete", name):
                *folders, _ = accumulate(name.split("/"), "{}/{}".format)
                for folder in folders:
                    if folder not in seen and self._info(folder).get("islink"):
                        raise StoreError(f"cannot delete {name!r} in {self.location}: {folder!r} is a symbolic link")
                    seen.add(folder)
                found = self._info(name)
                if found.get("type") == "directory" and not found.get("islink"):
                    raise StoreError(f"cannot delete {name!r} in {self.location}: it is a folder; nothing was deleted")

    def _info(self, name: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self._call("info", self._path(name))
        except FileNotFoundError:
            return {}
        return found

    def delete(self, names: Iterable[str]) -> None:
        names = list(names)
        self.check_delete(names)

        def delete(name: str) -> None:
            with self._errors("delete", name), contextlib.suppress(FileNotFoundError):
                self._call("rm_file", self._path(name))

        if self._has_folders or len(names) < 2:
            for name in names:
                delete(name)
            return
        with Pool(min(CONCURRENT_DELETES, len(names)), "reshard-delete") as pool:
            for _ in pool.map(delete, names):
                pass

    def _errors(self, doing: str, name: str) -> AbstractContextManager[None]:
        """Translate the exceptions of the filesystem and of its client."""
        return translating(doing, name, self.location)


class _FsspecReads:
    """Reads on the event loop of an asynchronous filesystem."""

    def __init__(self, store: FsspecStore) -> None:
        self._store = store

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        loop: asyncio.AbstractEventLoop = self._store._fs.loop
        return loop

    async def read(self, name: str, start: int, stop: int) -> Buffer:
        reads = self._store._reads
        if reads is None or not reads.can_read(name, start, stop):
            return await self._read(name, start, stop)
        found = await reads.read(name, start, stop)
        if isinstance(found, StoreError):
            data = await self._read(name, start, stop)
            reads.note_failure(found)
            return data
        return found

    async def _read(self, name: str, start: int, stop: int) -> Buffer:
        store = self._store
        with store._errors("read", name):
            try:
                data: bytes = await asyncio.wait_for(store._cat(name, start, stop), deadline_s(stop - start))
            except Exception as error:
                if is_beyond_the_end(error):
                    return b""
                raise
            return _range_of(data, start, stop, name)


async def _check_range(start: int, response: Any) -> None:
    """Raise StoreError if a server of HTTP has answered with another range than the one that begins at `start`."""
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if response.status == 206 and found and int(found[1]) != start:
        raise StoreError(f"the server answered with bytes from {found[1]} on instead of {start}")


def _range_of(data: bytes, start: int, stop: int, name: str) -> bytes:
    """Return the bytes [start, stop) from an answer, which is the whole file if the server does not support ranges."""
    if len(data) <= stop - start:
        return data
    if start == 0 or len(data) >= stop:
        return data[start:stop]
    raise StoreError(f"the server answered with {len(data)} bytes of {name!r} for the range [{start}, {stop})")
