"""Translate the exceptions of store clients into reshard's errors. No other module knows the clients' messages.

s3fs raises an OSError whose cause has botocore's answer, gcsfs an error with a number, adlfs an error with a code and a
status, obstore an error with the store's answer in its message. aiohttp, botocore and azure-core have their own classes
for network errors. The translation distinguishes: not found, access denied, condition failed, range past the end, and
transient failures.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from ...planner.errors import CheckpointError
from ...planner.masking import harmless
from ..errors import AccessDeniedError, CheckpointExistsError, ObjectNotFoundError, StoreError, UnavailableError

_ACCESS_DENIED_CODES = frozenset(
    ("AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch", "401", "403")
)
_ACCESS_DENIED_CLASSES = frozenset(("PermissionDeniedError", "UnauthenticatedError"))
"""Exceptions of obstore."""
_CONDITION_FAILED = frozenset(("BlobAlreadyExists", "ConditionNotMet", "PreconditionFailed", "412"))
_CONFLICTS = frozenset(("ConditionalRequestConflict", "OperationAborted", "409"))
"""S3's answers to one of two simultaneous conditional writes. They do not say which write succeeds."""
_BEYOND_THE_END = frozenset(("InvalidRange", "416"))
_NO_BUCKET = frozenset(("ContainerNotFound", "NoSuchBucket"))
_GONE = ("404", "410")
_TRANSIENT = frozenset(
    [
        "InternalError",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "XAmzContentSHA256Mismatch",
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
        "ResponseParserError",
        "ResponseStreamingError",
        "ServerDisconnectedError",
        "ServiceRequestError",
        "ServiceResponseError",
    ]
)
"""Exceptions of aiohttp, azure-core, botocore, urllib3 and requests, by name: these packages may not be installed."""
_TRANSIENT_ERRNO = frozenset(
    (errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT)
)
_XML_CODE = re.compile(r"<Code>(\w+)</Code>")
_XML_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_SYSTEM_MESSAGE = re.compile(r'(?:message|error): "([^"]*)"')
_OTHER_RANGE = re.compile(r"Requested \d+\.\.\d+, got \d+\.\.\d+")
_STATUS = re.compile(r"status code: (\d{3})")


@contextmanager
def translating(doing: str, name: str, location: str, *, with_cause: bool = True) -> Iterator[None]:
    """Translate the exceptions that a block raises.

    Args:
        doing: what the block does: "read", "write", "list" or "delete".
        name: the object.
        location: the root of the store.
        with_cause: whether to keep the client's exception as the cause. False if it may contain a secret.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise translated(error, doing, name, location) from (harmless(error) if with_cause else None)


def translated(error: Exception, doing: str, name: str, location: str) -> CheckpointError:
    """Return reshard's error for an exception of a client. The arguments are those of `translating`."""
    where = f"{name!r} in {location}" if name else location
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) and _status(cause) not in ("", *_GONE):
        error = cause  # fsspec raises this for any failed look-up
    if isinstance(error, FileNotFoundError):
        if doing == "write":
            missing = StoreError(f"cannot write {where}: there is no such bucket or folder")
            missing.may_have_written = False
            return missing
        return ObjectNotFoundError(f"{location} has no object {name!r}")
    kind = type(error).__name__
    text = str(error)
    is_of_zip = doing == "write" and "ZipFile.writestr() got an unexpected" in text  # fsspec opens it to read
    is_unsupported = isinstance(error, NotImplementedError) or is_of_zip
    reason = "its filesystem does not support that" if is_unsupported else f"{kind}: {_message(error)}"
    is_denied = isinstance(error, PermissionError) or "Credential" in kind or kind in _ACCESS_DENIED_CLASSES
    if is_denied or not _ACCESS_DENIED_CODES.isdisjoint((_code(error), _status(error))):
        return AccessDeniedError(
            f"{location} refused to {doing} {name!r}: {reason}; "
            "check the credentials in the environment or in storage_options"
        )
    if doing == "write" and (_code(error) in _CONFLICTS or _status(error) == "410"):
        return UnavailableError(f"cannot write {where} now: {reason}")
    exists = isinstance(error, FileExistsError) or kind == "AlreadyExistsError"  # the latter is obstore's
    if doing == "write" and (exists or _code(error) in _CONDITION_FAILED):
        return CheckpointExistsError(f"{name!r} exists in {location}")
    if isinstance(error, TypeError) and "unexpected keyword argument" in text and not is_unsupported:
        reason = f"storage_options has an option that the client does not know: {error}"
    if _code(error) in _NO_BUCKET:
        reason = "there is no such bucket"
    if "Received redirect without LOCATION" in text:
        reason = f"the bucket is in another region; set AWS_DEFAULT_REGION, or region_name in client_kwargs ({reason})"
    if _is_transient(error):
        return UnavailableError(f"cannot {doing} {where} now: {reason}")
    found = StoreError(f"cannot {doing} {where}: {reason}")
    found.may_have_written = _status(error)[:1] != "4" and _status(error) != "501"  # the other answers are refusals
    return found


def is_beyond_the_end(error: Exception) -> bool:
    """Return whether an error means that the range begins at or after the end of the object."""
    return _code(error) in _BEYOND_THE_END or "Requested Range Not Satisfiable" in str(error)


def is_missing_bucket(error: Exception) -> bool:
    """Return whether an error means that there is no such bucket."""
    return _code(error) in _NO_BUCKET


def _is_transient(error: Exception) -> bool:
    if isinstance(error, (TimeoutError, ConnectionError)) or not _TRANSIENT.isdisjoint((_code(error), _status(error))):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return True
    if _is_from_obstore(error) and ("HTTP error: " in str(error) or _OTHER_RANGE.search(str(error))):
        return True
    causes = (error, error.__cause__, error.__context__)
    return any(kind.__name__ in _TRANSIENT_CLASSES for cause in causes for kind in type(cause).__mro__)


def _is_from_obstore(error: BaseException) -> bool:
    """Return whether obstore raised an error. Its files raise plain OSErrors."""
    is_from_file = type(error) is OSError and "Error performing " in str(error)
    return is_from_file or type(error).__module__.partition(".")[0] == "obstore"


def _message(error: BaseException) -> str:
    """Return the message of an error.

    The messages of obstore and azure-core show the whole answer. Only the store's code and message are kept of them.
    """
    text = str(error)
    if type(error).__module__.startswith("azure."):
        return text.partition("\n")[0]  # the request's number and the answer follow
    if not _is_from_obstore(error):
        return text
    code, message = _XML_CODE.search(text), _XML_MESSAGE.search(text)
    if code:
        return f"{code[1]}: {message[1]}" if message else code[1]
    source = _SYSTEM_MESSAGE.search(text)
    why = source[1] if source else ""
    if "kind: Connect," in text:
        why = f"{why or 'no connection'}: check the host of the endpoint, and whether it uses http or https"
    return text.partition("\n")[0] + (f" ({why})" if why else "")


def _code(error: BaseException) -> str:
    """Return the store's error code, such as "NoSuchKey", or the HTTP status if there is no code."""
    if _is_from_obstore(error):
        found = _XML_CODE.search(str(error))
        return found[1] if found else _status(error)
    response = _response(error)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    azure = getattr(error, "error_code", None)
    if isinstance(azure, str):
        return str(getattr(azure, "value", azure))  # of an enum
    return _status(error) or str(getattr(error, "code", ""))


def _status(error: BaseException | None) -> str:
    """Return the HTTP status of the answer that caused an error, or "" if it is not known."""
    if error is None:
        return ""
    if _is_from_obstore(error):
        found = _STATUS.search(str(error))
        return found[1] if found else ""
    response = _response(error)
    if isinstance(response, dict):
        return str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    status = getattr(error, "status", None) or getattr(error, "status_code", None)
    return str(status) if isinstance(status, int) else ""


def _response(error: BaseException) -> object:
    """Return the answer that botocore attaches to an error or to its cause."""
    return getattr(error.__cause__, "response", None) or getattr(error, "response", None)
