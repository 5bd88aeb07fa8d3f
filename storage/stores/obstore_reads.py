"""Reads through obstore, a client in Rust. They need less CPU time than those of s3fs, gcsfs and adlfs.

`obstore.py` uses it for S3. For Google Cloud Storage and Azure, a filesystem of fsspec finds the credentials and does
everything else.
"""

from __future__ import annotations

import asyncio
import datetime
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from typing_extensions import Buffer

from ..errors import StoreError, UnavailableError
from ..runtime.forks import after_fork_in_child
from ..runtime.logs import logger_of
from ..runtime.threads import event_loop
from . import retry
from .client_errors import is_beyond_the_end, translating

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore

logger = logger_of(__name__)
GOOGLE = frozenset(("gs", "gcs"))
AZURE = frozenset(("abfs", "abfss", "az"))
DEADLINE_BYTES = 64 * 1024**2
"""Every request has the deadline of a request of this size, which is the largest usual one."""
CREDENTIALS_FOR = datetime.timedelta(minutes=5)
"""How long credentials are used before the library that found them returns them again. It renews those that are about
to expire."""
MAX_FAILURES = 3
"""After this many transient failures of obstore, the filesystem does all reads."""
_PLAIN_PART = r"[A-Za-z0-9_=+@,-][A-Za-z0-9_.=+@,-]*"
_PLAIN_KEY = re.compile(rf"{_PLAIN_PART}(/{_PLAIN_PART})*")
_lost_in_fork = False
"""Whether a parent of this process had loaded obstore before the fork."""


def is_lost_in_fork() -> bool:
    """Return whether obstore cannot be used because this process was forked from one that had loaded it.

    obstore starts its threads once per process. A forked child does not have them and cannot start them again, so
    every call would wait forever.
    """
    return _lost_in_fork


def _note_fork() -> None:
    global _lost_in_fork
    _lost_in_fork = _lost_in_fork or "obstore" in sys.modules


after_fork_in_child(_note_fork)


def is_usable() -> bool:
    """Return whether obstore is installed and works in this process."""
    return not is_lost_in_fork() and find_spec("obstore") is not None


def is_plain(key: str) -> bool:
    """Return whether obstore and the other clients write a key alike. obstore encodes some characters."""
    return _PLAIN_KEY.fullmatch(key) is not None


def client_options(*, reading: bool) -> ClientConfig:
    """Return the options of a client: its deadlines. It does not retry, because RetryingStore does."""
    silence = datetime.timedelta(seconds=retry.REQUEST_DEADLINE_S)
    options: ClientConfig = {
        "allow_http": True,
        "timeout": datetime.timedelta(seconds=retry.deadline_s(DEADLINE_BYTES)),
        "connect_timeout": min(silence, datetime.timedelta(seconds=10)),
    }
    if reading:
        options["read_timeout"] = silence  # not for writes: nothing is read during an upload
    return options


def call_deadline_s() -> float:
    """Return how many seconds a call may take. The client has its own deadlines, but they need its threads to run."""
    return 3 * retry.deadline_s(DEADLINE_BYTES)


class ObstoreReads:
    """Reads byte ranges of the objects of a bucket.

    Args:
        client: the client of the bucket.
        prefix: what all keys begin with: "" or a folder and a slash.
        location: the folder, for error messages.
        accepts_whole: whether an answer with the whole object is accepted. Some servers of S3 answer so if the range is
            the whole object.
    """

    def __init__(self, client: ObjectStore, prefix: str, location: str, *, accepts_whole: bool = False) -> None:
        self.client = client
        self.prefix = prefix
        self.location = location
        self._accepts_whole = accepts_whole

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that `read` runs on."""
        return event_loop()

    async def read(self, name: str, start: int, stop: int) -> Buffer:
        """Return bytes [start, stop) of an object, or fewer if it ends before. Raise StoreError or a subclass."""
        # The text of obstore's errors may contain a session token.
        with translating("read", name, self.location, with_cause=False):
            return await asyncio.wait_for(self._read(self.prefix + name, start, stop), call_deadline_s())

    async def _read(self, key: str, start: int, stop: int) -> Buffer:
        import obstore

        try:
            return await obstore.get_range_async(self.client, key, start=start, end=stop)
        except Exception as error:
            if is_beyond_the_end(error):
                return b""
            if self._accepts_whole and "non-partial response" in str(error):
                whole = await obstore.get_async(self.client, key)
                return memoryview(await whole.bytes_async())[start:stop]
            raise


class ReadsOfFilesystem:
    """Reads for a filesystem of fsspec, until obstore cannot read an object that the filesystem can read.

    Zonal buckets, for example, need another protocol. An emulator may not have the API that obstore uses: to it, no
    object seems to exist. And only obstore uses the proxies that the environment names.
    """

    def __init__(self, reads: ObstoreReads) -> None:
        self._reads: ObstoreReads | None = reads
        self._has_read = False
        self._failures = 0
        """How often the filesystem could read what obstore could not."""

    def can_read(self, name: str, start: int, stop: int) -> bool:
        return self._reads is not None and start < stop and is_plain(self._reads.prefix + name)

    async def read(self, name: str, start: int, stop: int) -> Buffer | StoreError:
        """Return bytes as `ObstoreReads.read`, or the error if the filesystem should try the same read."""
        assert self._reads is not None
        try:
            data = await self._reads.read(name, start, stop)
        except UnavailableError as error:
            if self._has_read:
                raise
            return error
        except StoreError as error:
            return error
        self._has_read = True
        return data

    def note_failure(self, error: StoreError) -> None:
        """Record that the filesystem could read what obstore could not.

        From then on the filesystem does all reads, but only after MAX_FAILURES if the failures are transient.
        """
        self._failures += 1
        if self._reads is not None and (self._failures == MAX_FAILURES or not isinstance(error, UnavailableError)):
            logger.info("obstore is not used any more, because the filesystem can read what it cannot: %s", error)
            self._reads = None


def open_reads(filesystem: Any, protocol: str | None, path: str, location: str) -> ReadsOfFilesystem | None:
    """Return reads for a filesystem of fsspec, or None if obstore does not support the store or an option.

    Args:
        filesystem: the filesystem. It may be one of any store.
        protocol: the protocol of the URI.
        path: the path in the filesystem: the bucket, and perhaps a folder.
        location: the URI, for error messages.
    """
    openers = dict.fromkeys(GOOGLE, _open_google) | dict.fromkeys(AZURE, _open_azure)
    bucket, _, folder = path.strip("/").partition("/")
    if protocol not in openers or not bucket or not is_usable() or filesystem.protocol == "dir":
        return None
    try:
        client = openers[protocol](filesystem, bucket)
    except Exception as error:  # of a newer version of the filesystem or of obstore
        logger.debug("obstore cannot open %s: %s", location, error)
        return None
    return None if client is None else ReadsOfFilesystem(ObstoreReads(client, f"{folder}/" if folder else "", location))


def _open_google(filesystem: Any, bucket: str) -> ObjectStore | None:
    """Open a bucket with the endpoint and the credentials of gcsfs. Return None if it has other options."""
    from obstore.store import GCSStore

    if filesystem.requester_pays or filesystem.session_kwargs or filesystem.version_aware:
        return None
    if getattr(filesystem, "_use_mtls_endpoint", False):
        return None
    # Everything is passed, so that no variable of the environment that gcsfs does not know replaces it.
    is_anonymous = filesystem.credentials.credentials is None
    config: dict[str, Any] = {"base_url": filesystem._location, "skip_signature": is_anonymous}
    if not is_anonymous:
        config["credential_provider"] = _GoogleCredentials(filesystem.credentials)
    return GCSStore(bucket, **config, client_options=client_options(reading=True), retry_config={"max_retries": 0})


class _GoogleCredentials:
    """A function that obstore calls for credentials. It returns those of gcsfs."""

    def __init__(self, credentials: Any) -> None:
        self._credentials = credentials

    def __call__(self) -> dict[str, Any]:
        self._credentials.maybe_refresh()
        token: str = self._credentials.credentials.token
        return {"token": token, "expires_at": datetime.datetime.now(datetime.UTC) + CREDENTIALS_FOR}


def _open_azure(filesystem: Any, container: str) -> ObjectStore | None:
    """Open a container with the endpoint and the key or signature of adlfs. Return None if it has other options."""
    from obstore.store import AzureStore

    client = filesystem.service_client
    url = urlsplit(client.url)
    config: dict[str, Any] = {"endpoint": f"{url.scheme}://{url.netloc}{url.path}".rstrip("/")}
    if filesystem.version_aware or filesystem.location_mode != "primary" or not client.account_name:
        return None
    # Everything is passed, so that no variable of the environment that adlfs does not know replaces it.
    config |= {"account_name": client.account_name, "use_emulator": False, "skip_signature": False}
    if (key := getattr(client.credential, "account_key", None)) is not None:
        config["credential_provider"] = _returning({"access_key": key, "expires_at": None})
    elif client.credential is not None:
        return None
    elif url.query:
        config["credential_provider"] = _returning({"sas_token": parse_qsl(url.query), "expires_at": None})
    else:
        config["skip_signature"] = True
    return AzureStore(container, **config, client_options=client_options(reading=True), retry_config={"max_retries": 0})


def _returning(credentials: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    return lambda: credentials
