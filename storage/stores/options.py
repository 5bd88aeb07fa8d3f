"""Check storage options before a client is opened. Some clients abort or hang on invalid ones."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from ...planner.masking import masked
from ..errors import ArgumentError

_NESTED = ("client_kwargs", "config_kwargs")
_S3_STRINGS = ("key", "secret", "token", "profile")
"""Options of S3 that must be strings."""


def checked_options(options: Mapping[str, Any] | None, protocol: str = "") -> dict[str, Any]:
    """Return storage options as a dict.

    Args:
        options: the options. None is an empty dict.
        protocol: the protocol of the URI that they are for.

    Raises:
        ArgumentError: the options are not a mapping with strings as keys, or a value cannot be used by any client.
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
                raise ArgumentError(f"{shown} contains a line break or another control character")
    return _checked_s3_options(found) if protocol in ("s3", "s3a") else found


def _checked_s3_options(options: dict[str, Any]) -> dict[str, Any]:
    """Check the options of S3, and return them with one endpoint."""
    for name in _S3_STRINGS:
        if options.get(name) is not None:
            _check_string(f"storage_options[{name!r}]", options[name])
            if not options[name].isprintable():
                raise ArgumentError(f"storage_options[{name!r}] contains a line break or another control character")
    if bool(options.get("key")) != bool(options.get("secret")):
        given, missing = ("key", "secret") if options.get("key") else ("secret", "key")
        raise ArgumentError(f"storage_options has {given!r} and no {missing!r}: pass both, or neither")
    if not isinstance(options.get("anon", False), (bool, type(None))):
        raise ArgumentError(f"storage_options['anon'] must be True or False, got {options['anon']!r}")
    connections = (options.get("config_kwargs") or {}).get("max_pool_connections", 1)
    if type(connections) is not int or connections < 1:
        raise ArgumentError(
            f"storage_options['config_kwargs']['max_pool_connections'] must be a positive integer, got {connections!r}"
        )
    client = dict(options.get("client_kwargs") or {})
    endpoints = {endpoint for endpoint in (options.get("endpoint_url"), client.get("endpoint_url")) if endpoint}
    if len(endpoints) > 1:
        raise ArgumentError("storage_options has two different values of endpoint_url: pass one")
    if options.get("endpoint_url") and client.pop("endpoint_url", None):
        options["client_kwargs"] = client
    return options


def _check_mapping(what: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{what} must be a mapping of names to values, got {type(value)}")
    for name in value:
        if not isinstance(name, str):
            raise ArgumentError(f"{what} must have strings as names, got a name of {type(name)}")


def _check_string(what: str, value: object) -> None:
    if not isinstance(value, str):
        raise ArgumentError(f"{what} must be a string, got {type(value)}")


def check_endpoint(what: str, endpoint: str) -> None:
    """Raise ArgumentError if an endpoint is not the URL of a server. An empty endpoint is accepted.

    A client would hang on some invalid endpoints, and abort on others.

    Args:
        what: how the error message calls the endpoint.
        endpoint: the URL.
    """
    if not endpoint:
        return
    try:
        url = urlsplit(endpoint)
        reason = ""
        if url.scheme not in ("http", "https"):
            reason = "it must begin with http:// or https://"
        elif not endpoint.isprintable() or " " in endpoint:
            reason = "it contains a space or a character that cannot be printed"
        elif not url.hostname:
            reason = "it has no host"
        elif url.port == 0:
            reason = "its port is 0"
        elif not _is_host(url.hostname, url.netloc):
            reason = f"{url.hostname!r} cannot be a host"
    except ValueError as error:  # includes UnicodeError
        reason = str(error)
    if reason:
        shown = re.sub(r"[^/\s]*@", "***@", endpoint.split()[0] if endpoint.split() else endpoint)
        raise ArgumentError(f"{what} must be the URL of a server, got {masked(shown)[:200]!r}: {reason}")


def _is_host(host: str, netloc: str) -> bool:
    """Return whether a client can look up the host of a URL. Raises ValueError for some invalid hosts."""
    if "[" in netloc:
        ipaddress.IPv6Address(host)
        return re.fullmatch(r"(:\d{1,5})?", netloc.rpartition("]")[2]) is not None and "%" not in host
    host.encode("idna")
    if not host.isascii():
        return True
    if re.fullmatch(r"[0-9.]+", host):
        ipaddress.IPv4Address(host)
    return re.fullmatch(r"[A-Za-z0-9._-]+", host) is not None and not host.endswith("xn--")
