"""A store on S3 through obstore, a client in Rust.

It stores the same objects as s3fs and needs less CPU time (benchmarks/overhead.py). It is used if obstore is installed
and supports all of the storage options; otherwise s3fs is used. botocore finds the credentials if it is installed.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from typing_extensions import Buffer

from ..errors import ArgumentError, StoreError
from ..runtime.logs import logger_of
from ..runtime.threads import event_loop, result_of
from . import retry
from .base import PART_BYTES, Capabilities, MultipartUpload, ObjectWriter, Store, buffered_writer, is_name, top_names
from .client_errors import translating
from .conditional_put import put_new
from .obstore_reads import (
    CREDENTIALS_FOR,
    ObstoreReads,
    call_deadline_s,
    client_options,
    is_plain,
    is_usable,
)
from .options import check_endpoint

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import BackoffConfig, RetryConfig, S3Credential, S3Store

T = TypeVar("T")
logger = logger_of(__name__)
_IGNORED_OPTIONS = frozenset(("skip_instance_cache", "use_listings_cache", "asynchronous", "default_block_size"))
"""Options of fsspec that have no effect here."""


def open_s3(
    path: str, options: Mapping[str, Any], open_lister: Callable[[], Store] | None = None
) -> ObstoreStore | None:
    """Open the store at "bucket/folder". Return None if obstore cannot be used or does not support an option.

    Args:
        path: the bucket and the folder.
        options: storage options of s3fs.
        open_lister: opens the same location with s3fs, for listings that obstore returns wrongly or not at all.
    """
    bucket, _, folder = path.rstrip("/").partition("/")
    if not is_usable() or not is_plain(path.rstrip("/")) or bucket.endswith("--x-s3"):
        return None  # directory buckets, whose names end so, need another protocol
    try:
        given = options.get("key") is not None or bool(options.get("anon"))
        session = _session(options.get("profile"), may_call=not given)
        config = _config(dict(options), session)
        return None if config is None else _open(bucket, folder, config, _ca_bundle(session), open_lister)
    except ArgumentError:
        raise
    except Exception as error:
        logger.debug("obstore cannot open s3://%s, trying s3fs: %s", path, error)
        return None


def _config(options: dict[str, Any], session: Any) -> dict[str, Any] | None:
    """Return obstore's configuration for storage options of s3fs.

    Return None if obstore does not support an option, or a setting of the environment.
    """
    options = {name: value for name, value in options.items() if name not in _IGNORED_OPTIONS}
    client = dict(options.pop("client_kwargs", {}))
    anonymous = bool(options.pop("anon", False))
    endpoint = options.pop("endpoint_url", None) or client.pop("endpoint_url", None)
    region = client.pop("region_name", None)
    keys = {name: options.pop(name, None) for name in ("key", "secret", "token")}
    profile = options.pop("profile", None)
    if options or client or (session is None and profile is not None) or _needs_s3fs(session):
        return None
    if not endpoint:
        endpoint = _configured_endpoint(session)
        check_endpoint("the endpoint of S3 in the environment or in the AWS configuration", endpoint or "")
    region = region or _configured_region(session) or ("us-east-1" if endpoint else None)
    if region is None:
        return None  # s3fs finds out the region of a bucket
    # Like botocore: over TLS the payload needs no SHA-256, which would take a core one second per 1.5 GB or so.
    plain = str(endpoint or "").startswith("http:")
    config: dict[str, Any] = {"region": region, "skip_signature": anonymous, "unsigned_payload": not plain}
    if endpoint:
        config["endpoint"] = endpoint
    if keys["key"] is not None:
        # A provider, since obstore would read a missing session token from the environment.
        credentials = _StaticCredentials(keys["key"], keys["secret"], keys["token"])
        config["credential_provider"] = _CredentialProvider(credentials)
    elif session is not None and not anonymous:
        credentials = session.get_credentials()
        if credentials is None:
            return None
        config["credential_provider"] = _CredentialProvider(credentials)
    return config


def _open(
    bucket: str,
    folder: str,
    config: dict[str, Any],
    bundle: str | None,
    open_lister: Callable[[], Store] | None,
) -> ObstoreStore:
    from obstore.store import S3Store

    reading, writing = client_options(reading=True), client_options(reading=False)
    if bundle and not str(config.get("endpoint", "")).startswith("http:"):
        reading["root_certificate"] = writing["root_certificate"] = Path(bundle).read_bytes()
    # The client retries the parts of an upload. Its first pause has no jitter, but must differ between processes.
    silence = datetime.timedelta(seconds=retry.REQUEST_DEADLINE_S)
    pause: BackoffConfig = {"init_backoff": datetime.timedelta(seconds=retry.jittered(retry.FIRST_WAIT_S))}
    once_more: RetryConfig = {"max_retries": 1, "retry_timeout": silence, "backoff": pause}
    client = partial(S3Store, bucket, **config)
    return ObstoreStore(
        client(client_options=reading, retry_config={"max_retries": 0}),
        lambda: client(client_options=writing, retry_config=once_more),
        bucket,
        folder,
        str(config.get("endpoint")),
        open_lister if find_spec("s3fs") else None,
    )


def _session(profile: str | None, *, may_call: bool = True) -> Any:
    """Return a session of botocore, which reads profiles, files, roles and instance metadata; None without botocore.

    Args:
        profile: the AWS profile, or None.
        may_call: whether the session is used for credentials. It may call a service for them, and takes longer to
            prepare.
    """
    try:
        from botocore.session import Session
    except ImportError:
        return None
    return Session(profile=profile, include_builtin_handlers=may_call)


def _ca_bundle(session: Any) -> str | None:
    configured: str | None = None if session is None else session.get_config_variable("ca_bundle")
    return configured or os.environ.get("AWS_CA_BUNDLE") or os.environ.get("REQUESTS_CA_BUNDLE")


def _needs_s3fs(session: Any) -> bool:
    """Return whether the environment or the AWS configuration requires something that obstore does not support."""
    if session is None:
        return any(name in os.environ for name in ("AWS_USE_FIPS_ENDPOINT", "AWS_USE_DUALSTACK_ENDPOINT"))
    variables = ("use_fips_endpoint", "use_dualstack_endpoint")
    return "s3" in session.get_scoped_config() or any(session.get_config_variable(name) for name in variables)


def _configured_endpoint(session: Any) -> str | None:
    if session is None:
        return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    from botocore.configprovider import ConfiguredEndpointProvider

    if session.get_config_variable("ignore_configured_endpoint_urls"):
        return None
    provider = ConfiguredEndpointProvider(session.full_config, session.get_scoped_config(), "s3")
    endpoint: str | None = provider.provide()
    return endpoint


def _configured_region(session: Any) -> str | None:
    region: str | None = None if session is None else session.get_config_variable("region")
    return region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")


@dataclass(frozen=True, slots=True)
class _StaticCredentials:
    """Credentials that do not change, with the attributes and the method of botocore's credentials."""

    access_key: str
    secret_key: str
    token: str | None

    def get_frozen_credentials(self) -> _StaticCredentials:
        return self


class _CredentialProvider:
    """A function that obstore calls for credentials. It returns those of botocore."""

    def __init__(self, credentials: Any) -> None:
        self._credentials = credentials

    def __call__(self) -> S3Credential:
        frozen = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.datetime.now(datetime.UTC) + CREDENTIALS_FOR,
        }


class ObstoreStore:
    """Objects below a folder of an S3 bucket."""

    def __init__(
        self,
        reading: S3Store,
        open_writing: Callable[[], S3Store],
        bucket: str,
        folder: str,
        endpoint: str,
        open_lister: Callable[[], Store] | None,
    ) -> None:
        self._reading = reading
        self._open_writing = open_writing
        self._bucket = bucket
        self._prefix = f"{folder}/" if folder else ""
        self._endpoint = endpoint
        self._open_lister = open_lister
        self._reads = ObstoreReads(reading, self._prefix, self.location, accepts_whole=True)

    @property
    def location(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    @cached_property
    def _writing(self) -> S3Store:
        """The client for writes, opened when it is first used: to read the system's certificates takes some ms."""
        return self._open_writing()

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(concurrent_reads=32, buffers_objects=True, async_reads=self._reads, list_top=self.list_top)

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a call of the client. Its blocking calls cannot be interrupted, and abort a process that exits."""
        return result_of(coroutine, event_loop(), call_deadline_s())

    def read(self, name: str, start: int, stop: int) -> Buffer:
        return result_of(self._reads.read(name, start, stop), event_loop())

    def size(self, name: str) -> int:
        return self._head(name)["size"]

    def modified(self, name: str) -> float:
        return self._head(name)["last_modified"].timestamp()

    def _head(self, name: str) -> ObjectMeta:
        import obstore

        async def head() -> ObjectMeta:
            return await obstore.head_async(self._reading, self._prefix + name)

        with self._errors("read", name):
            return self._wait(head())

    def create(self, name: str) -> AbstractContextManager[ObjectWriter]:
        return buffered_writer(lambda data: self._put(name, data, "overwrite"), lambda: self._upload(name))

    def _upload(self, name: str) -> MultipartUpload:
        """Begin an upload in parts.

        The parts of an aborted upload remain until the bucket's rule for incomplete uploads removes them.
        """
        import obstore

        errors = partial(self._errors, "write", name)
        with errors():
            file = obstore.open_writer_async(
                self._writing, self._prefix + name, buffer_size=PART_BYTES, max_concurrency=4
            )

        async def write(data: bytes) -> None:
            await file.write(data)

        async def close() -> None:
            await file.close()

        async def abort() -> None:
            await file.__aexit__(StoreError, StoreError("aborted"), None)

        blocking = _BlockingFile(lambda data: self._wait(write(data)), lambda: self._wait(close()))
        return MultipartUpload(blocking, errors, lambda: self._wait(abort()))

    def put(self, name: str, data: bytes, *, overwrite: bool) -> None:
        if overwrite:
            self._put(name, data, "overwrite")
        else:
            bucket = (self._endpoint, self._bucket)
            put_new(self, bucket, lambda name, data: self._put(name, data, "create"), name, data)

    def _put(self, name: str, data: bytes, mode: Any) -> None:
        import obstore

        async def put() -> None:
            await obstore.put_async(self._writing, self._prefix + name, data, mode=mode, use_multipart=False)

        with self._errors("write", name):
            self._wait(put())

    def list(self, folder: str = "") -> Iterable[str]:
        import obstore

        prefix = f"{self._prefix}{folder.rstrip('/')}/" if folder else self._prefix

        async def listed() -> Sequence[ObjectMeta]:
            return [entry async for batch in obstore.list(self._reading, prefix or None) for entry in batch]

        return self._names(listed, lambda lister: lister.list(folder))

    def list_top(self) -> Iterable[str]:
        import obstore

        async def listed() -> Sequence[ObjectMeta]:
            return (await obstore.list_with_delimiter_async(self._reading, self._prefix or None))["objects"]

        return self._names(listed, top_names)

    def _names(
        self,
        listed: Callable[[], Coroutine[Any, Any, Sequence[ObjectMeta]]],
        list_with: Callable[[Store], Iterable[str]],
    ) -> Iterable[str]:
        """Return the names that obstore lists, or those that s3fs lists if obstore changes or refuses some keys.

        obstore returns "a/", the empty marker of a folder, as "a". In the root of a bucket it also returns "/a" as "a".
        It raises an error for "a//b".

        Args:
            listed: lists with obstore.
            list_with: lists with the store that it gets.
        """
        if not self._prefix and self._open_lister is not None:
            return list_with(self._open_lister())
        try:
            with self._errors("list", ""):
                found = self._wait(listed())
        except StoreError as error:
            if "invalid path" not in str(error):
                raise
            if self._open_lister is None:
                raise StoreError(f"{error}; install s3fs, which can list such a name, or remove that object") from None
            return list_with(self._open_lister())
        if self._open_lister is not None and any(entry["size"] == 0 for entry in found):
            return list_with(self._open_lister())
        return [name for entry in found if is_name(name := entry["path"][len(self._prefix) :])]

    def delete(self, names: Iterable[str]) -> None:
        import obstore

        paths = [self._prefix + name for name in names]

        async def delete() -> None:
            await obstore.delete_async(self._writing, paths)  # S3 deletes up to a thousand per request

        if paths:
            with self._errors("delete", paths[0]), contextlib.suppress(FileNotFoundError):
                self._wait(delete())

    def _errors(self, doing: str, name: str) -> AbstractContextManager[None]:
        """Translate the client's exceptions. Their text may contain a session token, so they are not kept as causes."""
        return translating(doing, name, self.location, with_cause=False)


@dataclass(frozen=True, slots=True)
class _BlockingFile:
    """The methods of the client's file that `MultipartUpload` calls, as blocking calls."""

    write: Callable[[bytes], None]
    close: Callable[[], None]
