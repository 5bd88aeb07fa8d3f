"""Invalid storage options raise an error at once that names them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import reshard
from reshard.errors import ArgumentError
from reshard.storage.maintenance.gc import find_remains
from reshard.storage.stores.open import open_store
from tests.conftest import Place

KEYS = {"key": "k", "secret": "s"}
ENDPOINTS = [
    "http://[x",
    "http://[::1",
    "http://[zz]",
    "http://127.0.0.1:99999",
    "http://127.0.0.1:-1",
    "http://127.0.0.1:0",
    "http://127.0.0.1:abc",
    "http://",
    "https:///path",
    "://x",
    "ftp://127.0.0.1",
    "file:///etc",
    "http://a b",
    "http://127.0.0.1:1\n",
    "http://\x00",
    "http://a..b",
    f"http://{'a' * 70}.b",
    "localhost:9000",
    "127.0.0.1",
    "\x1b[2J",
]
GOOD_ENDPOINTS = [
    "http://127.0.0.1:9",
    "https://[::1]:9000",
    "http://minio:9000/",
    "https://s3.eu.example.com",
    "HTTP://x",
]
FORMS: list[Callable[[Any], dict[str, Any]]] = [
    lambda endpoint: {**KEYS, "client_kwargs": {"endpoint_url": endpoint}},
    lambda endpoint: {
        **KEYS,
        "client_kwargs": {"endpoint_url": endpoint},
        "config_kwargs": {"max_pool_connections": 3},
    },
    lambda endpoint: {**KEYS, "endpoint_url": endpoint},
]


@pytest.fixture(autouse=True)
def _in_time() -> Any:
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("endpoint", [*ENDPOINTS, 5, [], {}, True, b"http://x"])
@pytest.mark.parametrize("uri", ["s3://bucket/run", "s3a://bucket/run", "gs://bucket/run"])
def test_an_invalid_endpoint_raises_argument_error(uri: str, endpoint: Any) -> None:
    for form in FORMS:
        with pytest.raises(ArgumentError, match="endpoint_url") as caught:
            reshard.open(uri, storage_options=form(endpoint))
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("endpoint", GOOD_ENDPOINTS)
def test_a_valid_endpoint_is_accepted(endpoint: str) -> None:
    for form in FORMS:
        open_store("s3://bucket/run", form(endpoint))


def test_a_password_in_an_endpoint_is_not_shown() -> None:
    for endpoint in ("http://me:hidden@[x", "http://me:hidden@host:99999", "http://host:99999?token=hidden"):
        with pytest.raises(ArgumentError, match="endpoint_url") as caught:
            open_store("s3://bucket/run", FORMS[0](endpoint))
        assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_endpoint_in_the_environment_is_checked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "http://[x")
    with pytest.raises(ArgumentError, match="environment"):
        open_store("s3://bucket/run", KEYS)


@pytest.mark.parametrize(
    "options",
    [
        [],
        [1],
        (),
        "",
        "key=k",
        0,
        5,
        True,
        (("key", "k"),),
        {1: 2},
        {b"key": "k"},
        {None: 1},
        {"client_kwargs": 5},
        {"client_kwargs": [1]},
        {"client_kwargs": "x"},
        {"client_kwargs": {1: 2}},
        {"config_kwargs": 5},
        {"config_kwargs": "x"},
        {"config_kwargs": [["a", 1]]},
        {"config_kwargs": {1: 2}},
    ],
)
@pytest.mark.parametrize("uri", ["s3://bucket/run", "gs://bucket/run", "memory://run", "http://127.0.0.1:9/run", "run"])
def test_options_must_be_mappings_with_string_keys(uri: str, options: Any) -> None:
    with pytest.raises(ArgumentError, match=r"storage_options"):
        open_store(uri, options)


@pytest.mark.parametrize(
    "options",
    [
        {"key": 5, "secret": "s"},
        {"key": ["k"], "secret": "s"},
        {"key": "k", "secret": b"s"},
        {"key": "k\n", "secret": "s"},
        {"key": "k", "secret": "s\x00"},
        {"token": 5, "key": "k", "secret": "s"},
        {"profile": 5},
        {"client_kwargs": {"region_name": 5}},
    ],
)
def test_credentials_of_s3_must_be_strings(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=r"storage_options\["):
        open_store("s3://bucket/run", options)


STATE = {"w": torch.arange(3)}
CALLS: dict[str, Callable[[Any, Path], object]] = {
    "open": lambda options, _: reshard.open("s3://b/run", storage_options=options),
    "load": lambda options, _: reshard.load(dict(STATE), "s3://b/run", storage_options=options),
    "save": lambda options, _: reshard.save(STATE, "s3://b/run", storage_options=options),
    "convert from": lambda options, path: reshard.convert("s3://b/run", path / "copy", src_options=options),
    "convert to": lambda options, path: reshard.convert(path / "run", "s3://b/run", dst_options=options),
    "remove": lambda options, _: reshard.remove("s3://b/run", options),
    "find_checkpoints": lambda options, _: reshard.find_checkpoints("s3://b/run", options),
    "find_remains": lambda options, _: find_remains("s3://b/run", options),
    "StorageReader": lambda options, _: reshard.StorageReader("s3://b/run", storage_options=options).read_metadata(),
}


@pytest.mark.parametrize("options", [[1], "x", {1: 2}, {"client_kwargs": 5}, FORMS[0]("http://[x")])
@pytest.mark.parametrize("call", CALLS)
def test_every_call_checks_storage_options(call: str, options: Any, tmp_path: Path) -> None:
    reshard.save(STATE, tmp_path / "run")
    with pytest.raises(ArgumentError, match="storage_options"):
        CALLS[call](options, tmp_path)


def test_the_option_asynchronous_is_ignored(s3: Place) -> None:
    uri, options = s3
    for more in ({}, {"config_kwargs": {"max_pool_connections": 3}}):
        store = open_store(uri, {**options, **more, "asynchronous": True})
        store.put("x", b"x", overwrite=True)
        assert bytes(store.read("x", 0, 1)) == b"x"


@pytest.mark.parametrize(
    "endpoint",
    ["http://256.1.1.1", "http://1.2.3.4.5", "http://[::1]x", "http://[fe80::1%25eth0]", "http://{}", "http://h|x",
     "http://h%41", "http://<x>", "http://xn--", "http://h^x"],
)  # fmt: skip
def test_an_invalid_host_raises_before_a_client_is_opened(endpoint: str) -> None:
    with pytest.raises(ArgumentError, match="must be the URL of a server"):
        reshard.open("s3://b/x", storage_options={"key": "k", "secret": "s", "endpoint_url": endpoint})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "k"}, "has 'key' and no 'secret'"),
        ({"secret": "s"}, "has 'secret' and no 'key'"),
        ({"anon": "false"}, r"\['anon'\] must be True or False, got 'false'"),
        ({"config_kwargs": {"max_pool_connections": -1}}, "must be a positive integer, got -1"),
        ({"config_kwargs": {"max_pool_connections": "8"}}, "must be a positive integer, got '8'"),
        (
            {"endpoint_url": "http://127.0.0.1:1", "client_kwargs": {"endpoint_url": "http://127.0.0.1:2"}},
            "two different values of endpoint_url",
        ),
    ],
)
def test_options_of_s3_that_contradict_each_other_raise_argument_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        open_store("s3://bucket/run", options)


def test_the_same_endpoint_may_be_passed_twice(s3: Place) -> None:
    uri, options = s3
    options = {**options, "endpoint_url": options["client_kwargs"]["endpoint_url"]}
    reshard.save({"w": torch.ones(2)}, f"{uri}/twice", storage_options=options)
    assert reshard.open(f"{uri}/twice", storage_options=options).read("w").eq(1).all()
