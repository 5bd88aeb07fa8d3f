"""Parse paths and URIs: what is local, and the folders of a location."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from fsspec.core import split_protocol
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import available_protocols

from ...planner.masking import masked, remember_secrets
from ..errors import UnsupportedURIError

_AZURE = frozenset(("abfs", "abfss", "az"))
OBJECT_STORES = frozenset(("s3", "s3a", "gs", "gcs", "oss", "obs")) | _AZURE
LOCAL_PROTOCOLS = ("file", "local")
WRAPPERS = frozenset(
    ("blockcache", "cached", "dir", "filecache", "libarchive", "reference", "simplecache", "tar", "zip")
)
"""Filesystems that read from another one. In their chains, the other one may be a plain path: "zip://x::/y.zip"."""
ARCHIVES = frozenset(("libarchive", "reference", "tar", "zip"))
"""Filesystems whose files are in a file of another one."""
_NO_PARENT = OBJECT_STORES | {"http", "https"}
_LOST_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?!//)")
_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""The beginning of a URI that has lost a slash. A single letter would be a drive."""


def is_local(uri: str) -> bool:
    """Return whether a path or URI is on a local disk.

    Raises:
        UnsupportedURIError: a URI has lost a slash, as in `Path("s3://bucket")` or "file://data". It would be a local
            folder.
    """
    parts = uri.split("::")
    _check_file_uris(parts if is_chain(uri) else parts[:1])
    lost = [_lost_slash(part) for part in parts]
    if lost[0] or (
        any(lost) and all(is_lost or _is_chain_part(part) for part, is_lost in zip(parts, lost, strict=True))
    ):
        whole = "::".join(_with_slashes(p) if is_lost else p for p, is_lost in zip(parts, lost, strict=True))
        remember_secrets(whole)
        raise UnsupportedURIError(
            f"{masked(uri)!r} would be a local folder: pass the URI as a string, {masked(whole)!r}, not as a Path, "
            f"which drops a slash. For the local folder, pass {'./' + masked(uri)!r}"
        )
    return not is_chain(uri) and split_protocol(uri)[0] in (None, *LOCAL_PROTOCOLS)


def _check_file_uris(parts: Iterable[str]) -> None:
    """Raise UnsupportedURIError if a URI of a local file has a host, or a path that is not absolute."""
    for part in parts:
        protocol, mark, path = part.partition("://")
        if mark and protocol in LOCAL_PROTOCOLS and not path.startswith(("/", "~")):
            remember_secrets(part)
            host, _, rest = path.partition("/")
            path = rest if host == "localhost" else path
            advice = f"pass '{protocol}:///' and an absolute path, or a path without '{protocol}://'"
            if path and path[0] not in ".$" and "@" not in path:
                absolute = f"{protocol}:///{path}"
                advice = f"pass {absolute!r}, or {path!r} for a path in the current folder"
            raise UnsupportedURIError(f"{masked(part)!r} has no absolute path: {advice}")


def _lost_slash(part: str) -> bool:
    found = _LOST_SLASH.match(part)  # "file:/x" is a valid URI
    if found is None or found[1] in LOCAL_PROTOCOLS:
        return False
    is_unknown = _ONE_SLASH.match(part) is not None and not os.path.lexists(f"{found[1]}:")
    return found[1].lower() in _known_protocols() or is_unknown


def _with_slashes(part: str) -> str:
    protocol, _, path = part.partition(":")
    protocol = protocol.lower()
    return f"{protocol}://{path if protocol in LOCAL_PROTOCOLS else path.lstrip('/')}"


def _known_protocols() -> set[str]:
    return {*available_protocols(), *OBJECT_STORES}


def is_chain(uri: str) -> bool:
    parts = uri.split("::")
    return len(parts) > 1 and all(map(_is_chain_part, parts))


def _is_chain_part(part: str) -> bool:
    """Return whether a string between two "::" is a protocol or a URI."""
    return part.partition("://")[0] in _known_protocols() or part.startswith(("file:", "local:"))


def check_names(uri: str) -> None:
    """Check that the store of a URI can hold objects of its names.

    Raises:
        UnsupportedURIError: the path on Azure has a part that Azure does not keep as it is.
    """
    for link in uri.split("::"):
        protocol, mark, path = link.partition("://")
        if mark and protocol.lower() in _AZURE and ("\\" in path or {".", ".."} & set(path.split("/"))):
            raise UnsupportedURIError(
                f"{masked(uri)!r} has a backslash, or a part that is '.' or '..'. Azure changes such names: pass "
                "another path"
            )


def join_location(location: str, folder: str) -> str:
    """Return the path or URI of a folder below a location. In a chain of URIs, it is in the first filesystem."""
    if not folder:
        return location
    first, chained, rest = _first_link(location)
    if chained and "://" not in first:
        if first in ARCHIVES:
            return f"{first}://{folder}::{rest}"
        return f"{first}::{join_location(rest, folder)}"
    protocol, mark, path = first.partition("://")
    if not mark:
        protocol, path = "", first
    path, query = without_query(protocol, path)
    root = path[:1] if not path.strip("/") else f"{path.rstrip('/')}/"
    return f"{protocol}{mark}{root}{folder}{query}{chained}{rest}"


def folder_below(location: str, uri: str) -> str:
    """Return the folder from which `join_location` made a URI."""
    before, after = join_location(location, "\0").split("\0")
    return uri[len(before) : len(uri) - len(after)]


def last_name(location: str) -> str:
    """Return the last part of the path of a location, such as "step-1" of "s3://bucket/run/step-1/"."""
    first, chained, rest = _first_link(location)
    if chained and "://" not in first:
        return last_name(rest)
    protocol, mark, path = first.partition("://")
    path = without_query(protocol, path)[0] if mark else first
    return path.rstrip("/").rpartition("/")[2]


def split_file(uri: str) -> tuple[str, str]:
    """Split the path or URI of a file into its folder and its name.

    The folder keeps the query of the URI. If the URI has no folder, the name is "".
    """
    return _split_remote(LocalFileSystem._strip_protocol(uri) if is_local(uri) else uri)


def _first_link(uri: str) -> tuple[str, str, str]:
    """Split a chain of URIs after its first one. The second and the third result are "" if it is no chain."""
    if is_chain(uri) or split_protocol(uri)[0] in WRAPPERS:
        return uri.partition("::")
    return uri, "", ""


def _split_remote(uri: str) -> tuple[str, str]:
    first, chained, rest = _first_link(uri)
    if chained and "://" not in first:
        folder, name = _split_remote(rest)
        return f"{first}::{folder}", name
    protocol, mark, path = first.partition("://")
    if not mark:
        protocol, path = "", first
    path, query = without_query(protocol, path)
    folder, slash, name = path.rstrip("/").rpartition("/")
    if not slash and protocol in _NO_PARENT:
        return uri, ""
    return f"{protocol}{mark}{folder or slash}{query}{chained}{rest}", name


def without_query(protocol: str, path: str) -> tuple[str, str]:
    """Split a path of HTTP at its query, as in "model.safetensors?signature=…". Other protocols have no query."""
    if protocol not in ("http", "https"):
        return path, ""
    path, mark, query = path.partition("?")
    return path, mark + query
