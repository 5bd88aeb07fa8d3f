"""Which storage options cannot be meant: found out before a client is opened, some of which abort or wait for them."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from ...planner.masking import masked
from ..errors import ArgumentError

_NESTED = ("client_kwargs", "config_kwargs")
_STRINGS = ("key", "secret", "token", "profile")
"""Of S3, where they are given at all."""


def checked_options(options: Mapping[str, Any] | None, protocol: str = "") -> dict[str, Any]:
    """Return storage options as a dict.

    Args:
        protocol: of the URI that they are for.

    Raises ArgumentError for options that are no mapping of names, and for values that no client takes.
    """
    if options is None:
        return {}
    _check_mapping("storage_options", options)
    found = dict(options)
    for name in _NESTED:
        if found.get(name) is not None:
            _check_mapping(f"storage_options[{name!r}]", found[name])
    client = found.get("client_kwargs") or {}
    for name, where in (("endpoint_url", found), ("endpoint_url", client), ("region_name", client)):
        if where.get(name) is not None:
            shown = f"storage_options[{name!r}]" if where is found else f"storage_options['client_kwargs'][{name!r}]"
            _check_string(shown, where[name])
            if name == "endpoint_url":
                check_endpoint(shown, where[name])
            elif not where[name].isprintable():
                raise ArgumentError(f"{shown} has a line break, or another such character")
    for name in _STRINGS if protocol in ("s3", "s3a") else ():
        if found.get(name) is not None:
            _check_string(f"storage_options[{name!r}]", found[name])
            if not found[name].isprintable():
                raise ArgumentError(f"storage_options[{name!r}] has a line break, or another such character")
    return found


def _check_mapping(what: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{what} must be a mapping of names to values, got {type(value)}")
    for name in value:
        if not isinstance(name, str):
            raise ArgumentError(f"{what} must have strings as names, got one of {type(name)}")


def _check_string(what: str, value: object) -> None:
    if not isinstance(value, str):
        raise ArgumentError(f"{what} must be a string, got {type(value)}")


def check_endpoint(what: str, endpoint: str) -> None:
    """Check that an endpoint is the URL of a server; none where it is empty. Raises ArgumentError that calls it `what`.

    A client would wait for a server that cannot be, or abort.
    """
    if not endpoint:
        return
    try:
        url = urlsplit(endpoint)
        reason = ""
        if url.scheme not in ("http", "https"):
            reason = "it does not begin with http:// or https://"
        elif not endpoint.isprintable() or " " in endpoint:
            reason = "it has a blank, or a character that cannot be printed"
        elif not url.hostname:
            reason = "it names no server"
        elif url.port == 0:
            reason = "its port is 0"
        elif not _is_host(url.hostname, url.netloc):
            reason = f"{url.hostname!r} cannot be a server"
    except ValueError as error:  # UnicodeError, too
        reason = str(error)
    if reason:
        shown = re.sub(r"[^/\s]*@", "***@", endpoint.split()[0] if endpoint.split() else endpoint)
        raise ArgumentError(f"{what} is no URL of a server: {reason}. It is {masked(shown)[:200]!r}")


def _is_host(host: str, netloc: str) -> bool:
    """Return whether a client can look up the host of a URL. Raises ValueError for some that none can."""
    if "[" in netloc:
        ipaddress.IPv6Address(host)
        return re.fullmatch(r"(:\d{1,5})?", netloc.rpartition("]")[2]) is not None and "%" not in host
    host.encode("idna")
    if not host.isascii():
        return True
    if re.fullmatch(r"[0-9.]+", host):
        ipaddress.IPv4Address(host)
    return re.fullmatch(r"[A-Za-z0-9._-]+", host) is not None and not host.endswith("xn--")
