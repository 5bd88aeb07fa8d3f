"""What the clients of stores raise, as errors of reshard: the one place that knows their words.

s3fs hides botocore's answer behind an OSError, whose cause still has it; gcsfs has an error with a number; obstore has
the store's answer in its message; aiohttp and botocore have classes of their own for what goes wrong on the way. Told
apart: not there, not permitted, refused by a condition, beyond the end, and what may pass if it is tried again.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from ...planner.errors import CheckpointError
from ...planner.masking import harmless
from ..errors import AccessDeniedError, CheckpointExistsError, ObjectNotFoundError, StoreError, UnavailableError

_REFUSED = frozenset(
    ("AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch", "401", "403")
)
_DENIED = frozenset(("PermissionDeniedError", "UnauthenticatedError"))
"""Classes of obstore."""
_CONDITION_FAILED = frozenset(("PreconditionFailed", "412"))
_CONFLICTS = frozenset(("ConditionalRequestConflict", "OperationAborted", "409"))
"""What S3 answers to one of two conditional writes at the same time; it says nothing of which one wins."""
_BEYOND_THE_END = frozenset(("InvalidRange", "416"))
_GONE = ("404", "410")
_TRANSIENT = frozenset(
    [
        "InternalError",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "408",
        "429",
        "500",
        "502",
        "503",
        "504",
    ]
)
_TRANSIENT_CLASSES = frozenset(
    [
        "ClientConnectionError",
        "ClientPayloadError",
        "ClientOSError",
        "ConnectionError",
        "HTTPClientError",
        "IncompleteRead",
        "IncompleteReadError",
        "ReadTimeout",
        "ResponseStreamingError",
        "ServerDisconnectedError",
    ]
)
"""Of aiohttp, botocore, urllib3 and requests, whose packages need not be here."""
_TRANSIENT_ERRNO = frozenset(
    (errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT)
)
_XML_CODE = re.compile(r"<Code>(\w+)</Code>")
_XML_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_SYSTEM_MESSAGE = re.compile(r'message: "([^"]*)"')
_OTHER_RANGE = re.compile(r"Requested \d+\.\.\d+, got \d+\.\.\d+")
_STATUS = re.compile(r"status code: (\d{3})")


@contextmanager
def translating(doing: str, name: str, location: str, *, with_cause: bool = True) -> Iterator[None]:
    """Translate what a block raises; with the client's own error as the cause, unless that shows a secret."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise translated(error, doing, name, location) from (harmless(error) if with_cause else None)


def translated(error: Exception, doing: str, name: str, location: str) -> CheckpointError:
    """The error of reshard for what a client raised while `doing` ("read", "write", ...) an object of a store."""
    where = f"{name!r} in {location}"
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) and _status(cause) not in ("", *_GONE):
        error = cause  # fsspec takes any answer to a look for a file as a no
    if isinstance(error, FileNotFoundError):
        if doing == "write":
            return StoreError(f"cannot write {where}: there is no such bucket or folder")
        return ObjectNotFoundError(f"{location} has no object {name!r}")
    kind = type(error).__name__
    reason = f"{kind}: {_words(error)}"
    if isinstance(error, PermissionError) or "Credential" in kind or kind in _DENIED or _code(error) in _REFUSED:
        return AccessDeniedError(
            f"{location} refused to {doing} {name!r}: {reason}; "
            "check the credentials in the environment or in storage_options"
        )
    if doing == "write" and (_code(error) in _CONFLICTS or _status(error) == "410"):
        return UnavailableError(f"cannot write {where} now: {reason}")
    exists = isinstance(error, FileExistsError) or kind == "AlreadyExistsError"  # the latter of obstore
    if doing == "write" and (exists or _code(error) in _CONDITION_FAILED):
        return CheckpointExistsError(f"{name!r} exists in {location}")
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        reason = f"the client does not know what storage_options have: {error}"
    if _code(error) == "NoSuchBucket":
        reason = "there is no such bucket"
    if "Received redirect without LOCATION" in str(error):
        reason = f"the bucket is in another region; set AWS_DEFAULT_REGION, or region_name in client_kwargs ({reason})"
    if _is_transient(error):
        return UnavailableError(f"cannot {doing} {where} now: {reason}")
    return StoreError(f"cannot {doing} {where}: {reason}")


def is_beyond_the_end(error: Exception) -> bool:
    """Whether a store refused a range that begins at or after the end of the object."""
    return _code(error) in _BEYOND_THE_END or "Requested Range Not Satisfiable" in str(error)


def _is_transient(error: Exception) -> bool:
    if isinstance(error, (TimeoutError, ConnectionError)) or _code(error) in _TRANSIENT:
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return True
    if _is_of_obstore(error) and ("HTTP error: " in str(error) or _OTHER_RANGE.search(str(error))):
        return True
    causes = (error, error.__cause__, error.__context__)
    return any(kind.__name__ in _TRANSIENT_CLASSES for cause in causes for kind in type(cause).__mro__)


def _is_of_obstore(error: BaseException) -> bool:
    """Return whether an error is obstore's; those of its files are plain OSErrors."""
    is_of_file = type(error) is OSError and str(error).startswith("Generic S3 error: ")
    return is_of_file or type(error).__module__.partition(".")[0] == "obstore"


def _words(error: BaseException) -> str:
    """What an error says; of obstore's, which show all that was sent and answered, the store's code and message."""
    text = str(error)
    if not _is_of_obstore(error):
        return text
    code, message = _XML_CODE.search(text), _XML_MESSAGE.search(text)
    if code:
        return f"{code[1]}: {message[1]}" if message else code[1]
    source = _SYSTEM_MESSAGE.search(text)
    return text.partition("\n")[0] + (f" ({source[1]})" if source else "")


def _code(error: BaseException) -> str:
    """The store's own word for an error: of S3's clients in a response, of gcsfs as a number."""
    if _is_of_obstore(error):
        found = _XML_CODE.search(str(error))
        return found[1] if found else _status(error)
    response = _response(error)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    return _status(error) or str(getattr(error, "code", ""))


def _status(error: BaseException | None) -> str:
    """The number of an answer of HTTP: obstore's errors have it in their words, others as an attribute."""
    if error is None:
        return ""
    if _is_of_obstore(error):
        found = _STATUS.search(str(error))
        return found[1] if found else ""
    response = _response(error)
    if isinstance(response, dict):
        return str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    status = getattr(error, "status", None)
    return str(status) if isinstance(status, int) else ""


def _response(error: BaseException) -> object:
    """What botocore keeps of an answer."""
    return getattr(error.__cause__, "response", None) or getattr(error, "response", None)
