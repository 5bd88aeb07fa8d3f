"""Which store a path or URI is, and the store on whatever fsspec opens: S3, GCS, ... The only importer of fsspec."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import fsspec
from fsspec.asyn import sync
from fsspec.core import split_protocol, url_to_fs
from typing_extensions import Buffer

from .conditions import put_new, refuse_to_replace
from .errors import StoreError, UnsupportedURIError
from .local_store import LocalStore
from .obstore_store import open_s3
from .retrying_store import RetryingStore, deadline_s
from .store import PART_BYTES, AsyncReads, ObjectWriter, Store, Upload, held
from .translate import is_beyond_the_end, translating, without_secrets

S3_CONFIG = {
    "max_pool_connections": 64,
    "response_checksum_validation": "when_required",
    "connect_timeout": 10,
    "read_timeout": 20,
}
"""botocore's default of 10 connections would let no more than ten requests run at once. What is read has checksums of
its own, and some servers answer a range with the checksum of the whole object."""
OBJECT_STORES = frozenset(("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "obs"))
S3_LARGEST_PUT = 5 * 1024**3


def open_fsspec(uri: str, storage_options: dict[str, Any]) -> Store:
    """The store at a path or URI. Raises UnsupportedURIError."""
    protocol, path = split_protocol(uri)
    if protocol in ("s3", "s3a"):
        store = open_s3(path, storage_options)
        if store is not None:
            return RetryingStore(store)
        storage_options = {
            **storage_options,
            "config_kwargs": {**S3_CONFIG, **storage_options.get("config_kwargs", {})},
        }
    try:
        filesystem, path = url_to_fs(uri, **storage_options)
    except ImportError as error:
        raise UnsupportedURIError(f"{uri!r} needs a package that is not installed: {error}") from error
    except (ValueError, TypeError) as error:
        raise UnsupportedURIError(f"cannot open {uri!r}: {error}") from error
    except Exception as error:  # one that connects at once
        raise StoreError(f"a place of {protocol}:// cannot be opened: {error}") from error
    if "file" in _protocols(filesystem) and type(filesystem) is fsspec.get_filesystem_class("file"):
        return LocalStore(path)
    return RetryingStore(FsspecStore(filesystem, path))


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


class FsspecStore:
    """The objects below a path of an fsspec filesystem."""

    concurrent_reads = 32
    read_into = None
    holds_objects = True

    def __init__(self, filesystem: Any, path: str) -> None:
        self._fs = filesystem
        self._root = path.rstrip("/")

    @property
    def location(self) -> str:
        if "://" in self._root:  # as it is of HTTP
            return without_secrets(self._root)
        return without_secrets(f"{_protocols(self._fs)[0]}://{self._root.lstrip('/')}")

    @property
    def async_reads(self) -> AsyncReads | None:
        return _AsyncReads(self) if self._fs.async_impl else None

    def _call(self, method: str, *arguments: Any, nbytes: int = 0, **options: Any) -> Any:
        """A call of the filesystem that moves so many bytes, with a deadline where it is asynchronous."""
        if not self._fs.async_impl:
            return getattr(self._fs, method)(*arguments, **options)
        coroutine = getattr(self._fs, f"_{method}")
        return sync(self._fs.loop, coroutine, *arguments, timeout=deadline_s(nbytes), **options)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def read(self, name: str, start: int, stop: int) -> Buffer:
        with self._errors("read", name):
            try:
                data: bytes = self._call("cat_file", self._path(name), nbytes=stop - start, start=start, end=stop)
            except Exception as error:
                if is_beyond_the_end(error):
                    return b""
                raise
            return data

    def size(self, name: str) -> int:
        with self._errors("read", name):
            self._fs.invalidate_cache()
            found = self._call("info", self._path(name))
            if found["type"] != "file":
                raise FileNotFoundError(name)
            return int(found["size"])

    def modified(self, name: str) -> float:
        with self._errors("read", name):
            self._fs.invalidate_cache()
            return float(self._fs.modified(self._path(name)).timestamp())

    def create(self, name: str) -> AbstractContextManager[ObjectWriter]:
        return held(lambda data: self._put(name, data, "overwrite"), lambda: self._upload(name))

    def _upload(self, name: str) -> Upload:
        errors = partial(self._errors, "write", name)
        with errors():
            file = self._fs.open(self._path(name), "wb", block_size=PART_BYTES)

        def abort() -> None:
            file.discard()
            with contextlib.suppress(AttributeError):
                file.closed = True  # or it would be closed, and come into being, once nobody holds it
            self.delete([name])  # a filesystem that is no object store shows what is written so far

        return Upload(file, errors, abort)

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
        # By one request: the condition of a multipart upload is ignored by some servers.
        options: dict[str, Any] = {"nbytes": len(data)}
        if "s3" in _protocols(self._fs):
            options["chunksize"] = S3_LARGEST_PUT
        with self._errors("write", name):
            try:
                self._call("pipe_file", path, data, mode=mode, **options)
            except FileNotFoundError:
                self._make_folder(path)
                self._call("pipe_file", path, data, mode=mode, **options)

    def _make_folder(self, path: str) -> None:
        """For a filesystem that has folders, and wants them made. Raises FileNotFoundError for one that has buckets."""
        if OBJECT_STORES.intersection(_protocols(self._fs)):
            raise FileNotFoundError(path)  # to make a bucket is not ours
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def list(self, folder: str = "") -> Iterable[str]:
        with self._errors("list", folder):
            self._fs.invalidate_cache()
            root = self._fs._strip_protocol(self._root)
            try:
                found = self._call("find", f"{self._root}/{folder}".rstrip("/"), detail=True)
            except FileNotFoundError:
                return []
            return [path[len(root) :].lstrip("/") for path, info in found.items() if info["type"] == "file"]

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            with self._errors("delete", name):
                try:
                    self._call("rm_file", self._path(name))
                except FileNotFoundError:
                    continue

    def _errors(self, doing: str, name: str) -> AbstractContextManager[None]:
        """Translate what the filesystem, or the client below it, raises."""
        return translating(doing, name, self.location)


class _AsyncReads:
    """Reads on the event loop of an asynchronous filesystem."""

    def __init__(self, store: FsspecStore) -> None:
        self._store = store
        self.loop: asyncio.AbstractEventLoop = store._fs.loop

    async def read(self, name: str, start: int, stop: int) -> Buffer:
        store = self._store
        with store._errors("read", name):
            try:
                reading = store._fs._cat_file(store._path(name), start=start, end=stop)
                data: bytes = await asyncio.wait_for(reading, deadline_s(stop - start))
            except Exception as error:
                if is_beyond_the_end(error):
                    return b""
                raise
            return data
