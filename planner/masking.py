"""Mask secrets in text. All knowledge about what secrets look like is in this module.

A secret is recognised by its position: before the host of a URI, as a parameter that signs a URL, or after a word such
as "password". It is also recognised by its value: secrets that came with a URI or a storage option are masked wherever
they appear.
"""

from __future__ import annotations

import os
import re
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, quote_plus, unquote

MASK = "***"
MAX_REMEMBERED = 512
MIN_CHARACTERS = 6
"""The minimum length of a value that is masked wherever it appears: a shorter one may be a part of any sentence."""
MIN_USER_CHARACTERS = 8
"""The same for the name of a user or of an access key."""
MAX_OPTION_LEVELS = 8
"""The maximum depth of nested options; secrets in deeper ones are not remembered."""
_NO_SECRETS = frozenset(("anonymous", "browser", "default", "google_default", "latin-1", "latin1", "utf-8"))
"""Values of secret options that are not secret: names of methods to find credentials, and encodings."""
_WITHOUT_PORT = frozenset(("s3", "s3a", "gs", "gcs", "oss", "obs"))
_NAMES_CONTAINER = frozenset(("abfs", "abfss", "wasb", "wasbs"))
"""Protocols whose URIs have the form `container@account`."""
_BEFORE_HOST = re.compile(
    r"(?:(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]{1,30}))?(:/{1,3})((?:(?!:/)\S)*?@(?:[^\s/?#@]*@)*)"
)
_ANY_BEFORE_HOST = re.compile(r"://([^/?#:@]*):(?!\d{1,5}[/?#])([^@]*)@", re.DOTALL)
"""A user and a password in a text that is only a URI. They may contain spaces."""
_PORT = re.compile(r"\d{1,5}(?:[/?#]|$)")
_QUERY = re.compile(r"(?i)(\bhttps?:/{1,3}(?:(?!https?:/)[^\s?])*\?)(\S+)")
_BEHIND_A_URL = re.compile(r"['\")\]>},;:.]*$")
_HARMLESS = re.compile(
    r"(?i)alt|comp|continuation-token|delimiter|encoding-type|expires|fields|generation|list-type|marker|max-?keys|"
    r"maxresults|partnumber|prefix|projection|restype|revision|s[epvrt]|spr|start-after|tagging|uploads|version(?:id|ing)|"
    r"x-(?:amz|goog)-(?:algorithm|content-sha256|date|expires|signedheaders)"
)
"""Parameters of URLs that describe a request and grant no access."""
_SECRET = (
    r"signature|credential|secret|passw(?:or)?d|passphrase|(?:security|session|access|auth|refresh|id|sas)[-_]?token|"
    r"(?:api|access|account|private)[-_]?key|sharedaccess"
)
_PARAMETER = re.compile(r"(?<=[?&#])([\w.%-]{1,64})(=|%3D)(?!\*\*\*)([^\s&]+)")
_SECRET_PARAMETER = re.compile(rf"(?i){_SECRET}|^(?:sig|pwd|pass|code|jwt|hmac)$|token|key|auth|policy")
_NAMED = re.compile(
    rf"(?i)((?:{_SECRET}|(?:(?<![a-z0-9])|(?<=%3f)|(?<=%26))sig(?=[=%]))[\w-]{{0,24}}(?:=|%3D))(?!\*\*\*)([^\s&,;'\"<>)\]}}]+)"
)
_QUOTED = re.compile(rf"(?i)((?:{_SECRET})[\w-]{{0,24}}(?:\\?[\"'])?\s?[:=]\s?)(\\?[\"'])(?!\*\*\*)(.+?)\2")
_HEADER = re.compile(r"(?i)((?:authorization|x-api-key|(?<![\w-])cookie)[\"']?\s?[:=]\s?[\"']?)([^\"'\r\n]+)")
_BEARER = re.compile(r"\b(Bearer|Basic) (?=\S*[A-Z0-9=])([A-Za-z0-9+/=_.~-]{6,})")
_ELEMENT = re.compile(r"(<(?:\w{0,30}(?:Token|Signature|Secret|Credential)[\w-]{0,30}|AWSAccessKeyId)>)[^<]+")
_HINTS = re.compile(r"(?i)signature|credential|secret|passw|passphrase|token|key|shared|sig|cookie|auth|bearer|basic")
"""Every match of _NAMED, _QUOTED, _HEADER, _BEARER or _ELEMENT contains one of these words."""
_SECRET_OPTION = re.compile(rf"(?i){_SECRET}|token|pwd|sas|auth|cookie|connection_string|^pass$")
_USER_OPTION = re.compile(r"(?i)(?:^|[-_.])(?:key|user|username|login|key_id)$")
_CONNECTION_PART = re.compile(r"(?i)(?:key|signature|password|secret)=([^;]+)")


class _Remembered:
    """The last MAX_REMEMBERED values that were given as secrets."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, None] = {}
        self._forms: tuple[str, ...] | None = ()
        """All forms in which the values may be written, the longest first; None if they must be computed again."""

    def renew(self) -> None:
        """Replace the lock after a fork: a thread of the parent process may have held it."""
        self._lock = threading.Lock()

    def add(self, values: Iterable[str]) -> None:
        with self._lock:
            for value in values:
                if value not in self._values:
                    self._forms = None
                self._values.pop(value, None)
                self._values[value] = None
            while len(self._values) > MAX_REMEMBERED:
                del self._values[next(iter(self._values))]

    def masked(self, text: str) -> str:
        with self._lock:
            if self._forms is None:
                forms = {form for value in self._values for form in _forms(value)}
                self._forms = tuple(sorted(forms, key=len, reverse=True))
            forms_now = self._forms
        for form in forms_now:
            if form in text:
                text = re.sub(_as_word(form), MASK, text)
        return text


_remembered = _Remembered()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_remembered.renew)


def _forms(value: str) -> tuple[str, ...]:
    """Return the forms in which clients write a value in messages and URLs."""
    plain = unquote(value)
    return value, plain, quote(plain), quote(plain, safe=""), quote_plus(plain), quote(value), repr(value)[1:-1]


def _as_word(value: str) -> str:
    """Return a pattern that matches a value unless it is a part of a longer word."""
    before = r"(?<![A-Za-z0-9])" if value[:1].isalnum() else ""
    after = r"(?![A-Za-z0-9])" if value[-1:].isalnum() else ""
    return f"{before}{re.escape(value)}{after}"


def remember_secrets(uri: str, options: Mapping[str, Any] | None = None) -> None:
    """Make `masked` mask the secrets of a URI and of storage options wherever they appear in this process."""
    _remembered.add([*_secrets_of_uri(uri), *_secrets_of_options(options or {})])


def _secrets_of_uri(uri: str) -> Iterator[str]:
    for found in _BEFORE_HOST.finditer(uri):
        if _without_user(found) == found[0]:
            continue
        user, colon, password = found[3].removesuffix("@").partition(":")
        if len(user) >= MIN_USER_CHARACTERS:
            yield user
        if not colon:
            continue
        pieces = re.split("[/@?#]", password)  # some clients take the part before a slash as the password
        yield from (pair for pair in (f"{user}:{password}", f"{user}:{pieces[0]}") if len(pair) >= MIN_CHARACTERS)
        yield from (part for part in (password, *pieces) if len(part) >= MIN_CHARACTERS or _is_odd(part))
    before = _ANY_BEFORE_HOST.search(uri)
    if before is not None and "::" not in uri[: before.start()]:
        password = before[2].lstrip(":/")
        yield from (part for part in (before[2], password) if len(part) >= MIN_CHARACTERS)
    for parameter in _PARAMETER.finditer(uri):
        if _SECRET_PARAMETER.search(parameter[1]) and len(parameter[3]) >= MIN_CHARACTERS:
            yield parameter[3]


def _is_odd(text: str) -> bool:
    """Return whether a short text is not a word, so that sentences will not contain it."""
    return len(text) >= 4 and not (text.isalpha() and (text.islower() or text.isupper() or text.istitle()))


def _secrets_of_options(value: object, name: str = "", level: int = 0) -> Iterator[str]:
    """Yield the secrets in an option. A name that marks a secret applies to everything nested in the option."""
    if level > MAX_OPTION_LEVELS:
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            inner = str(key) if level == 0 or not _SECRET_OPTION.search(name) else name
            yield from _secrets_of_options(item, inner, level + 1)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for item in value:
            yield from _secrets_of_options(item, name, level + 1)
    elif isinstance(value, (str, bytes)):
        text = value if isinstance(value, str) else value.decode(errors="replace")
        yield from _secrets_of_uri(text)
        if text.lower() in _NO_SECRETS or _is_file_of_gcsfs(name, text):
            return
        if _SECRET_OPTION.search(name):
            parts = [text, *text.split(), *_CONNECTION_PART.findall(text)]
            yield from (part for part in parts if len(part) >= MIN_CHARACTERS)
        elif _USER_OPTION.search(name) and len(text) >= MIN_USER_CHARACTERS:
            yield text


def _is_file_of_gcsfs(name: str, value: str) -> bool:
    return name == "token" and value.startswith(("/", "~", "./")) and value.endswith(".json")


def masked(text: str) -> str:
    """Mask the secrets in a text, as in `https://***@host/model?X-Amz-Signature=***`.

    It masks users and passwords in URIs, the parameters of URLs (except those that are known to grant no access), the
    text after the name of a secret, and the values that were passed to `remember_secrets`. It keeps hosts, paths and
    the names of parameters. Masking a masked text changes nothing.
    """
    text = _remembered.masked(text)
    if "@" in text and ":/" in text:
        text = _BEFORE_HOST.sub(_without_user, text)
    if any(mark in text for mark in "?&#"):
        text = _QUERY.sub(lambda found: found[1] + _without_values(found[2]), text)
        text = _PARAMETER.sub(_without_value, text)
    if _HINTS.search(text):  # searching a megabyte of text for these patterns takes a second
        text = _NAMED.sub(rf"\1{MASK}", text)
        text = _QUOTED.sub(rf"\1\2{MASK}\2", text)
        text = _HEADER.sub(rf"\1{MASK}", text)
        text = _BEARER.sub(rf"\1 {MASK}", text)
        text = _ELEMENT.sub(rf"\1{MASK}", text)
    return text


def _without_user(found: re.Match[str]) -> str:
    """Mask the user and the password at the beginning of a URI, if it has any. An `@` may also be part of a path."""
    protocol, slashes, before = (found[1] or "").lower(), found[2], found[3]
    user, colon, password = before.removesuffix("@").partition(":")
    begin = f"{found[1] or ''}{slashes}"
    if any(mark in user for mark in "/?#") or password.startswith(":"):  # a chain of fsspec
        return found[0]
    if not colon:
        is_user = len(slashes) > 2 and protocol not in _NAMES_CONTAINER
        return f"{begin}{MASK}@" if is_user else found[0]
    if _PORT.match(password) and protocol not in _WITHOUT_PORT:
        return found[0]
    return f"{begin}{MASK}@"


def _without_values(query: str) -> str:
    """Mask the values of parameters in the query of a URL. Keep punctuation after the URL."""
    end = _BEHIND_A_URL.search(query)
    assert end is not None
    parts = [part.partition("=") for part in query[: end.start()].split("&")]
    return "&".join(_shown_parameter(*part) for part in parts) + end[0]


def _shown_parameter(name: str, equals: str, value: str) -> str:
    if _HARMLESS.fullmatch(name) or name.startswith(MASK) or value.startswith(MASK):
        return f"{name}{equals}{value}"
    if not equals:
        return MASK if name else ""
    return f"{name}={MASK}"


def _without_value(found: re.Match[str]) -> str:
    if not _SECRET_PARAMETER.search(found[1]):
        return found[0]
    end = _BEHIND_A_URL.search(found[3])
    return f"{found[1]}{found[2]}{MASK}{end[0] if end else ''}"


def shows_secrets(error: BaseException | None) -> bool:
    """Return whether the traceback of an error, with its causes, would show a secret."""
    if error is None:
        return False
    text = "".join(traceback.format_exception(error))
    return masked(text) != text


def harmless(error: BaseException) -> BaseException | None:
    """Return an error if it may be shown as the cause of another one. Return None if it would show a secret."""
    return None if shows_secrets(error) else error
