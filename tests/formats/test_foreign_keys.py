"""Unusual keys in a bucket, such as keys that no file can have, are skipped or listed, and disturb nothing else."""

import uuid
from importlib.util import find_spec

import pytest
import torch
from typer.testing import CliRunner

import reshard
from reshard.cli.app import app
from reshard.storage.maintenance.gc import find_remains, remove_remains
from reshard.storage.stores import obstore
from reshard.storage.stores.base import is_name, top_names
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.open import open_store
from tests import servers
from tests.failing_s3 import failing_s3
from tests.torture.faults import CLIENTS, by_client

pytestmark = pytest.mark.slow

STATE = {"w": torch.arange(12.0).reshape(4, 3)}
NO_NAMES = [
    "run//y",
    "run/a//b",
    "run/./z",
    "run/../q",
    "run/",
    "run/dir/",
    "run/step/",
    "run/step/data/",
    "run/step/manifest.reshard/",
    "run/step/model.safetensors/",
    "run/trail /",
    "run//manifest.reshard",
    "run/step//manifest.reshard",
    "run/step/data//x.shard",
]
OUTSIDE = ["/run/step/other", "//run/x", "run", "runs/x", "/manifest.reshard", "run/..", "/"]
ODD = [
    "run/a b",
    "run/a%20b",
    "run/a+b",
    "run/ü",
    "run/~t",
    "run/#h",
    "run/a?b",
    "run/{x}",
    "run/t\tb",
    "run/a&b<c>",
    "run/a%3Fb",
]


@pytest.mark.parametrize("client", CLIENTS)
def test_unusual_key_does_not_disturb_other_checkpoints(client: str) -> None:
    with failing_s3(fails=lambda method, key: False) as server:
        options = by_client(client, server.options)
        reshard.save(STATE, "s3://bucket/run/step", storage_options=options)
        own = dict(server.content)
        stores = {uri: open_store(uri, options) for uri in ("s3://bucket", "s3://bucket/run", "s3://bucket/run/step")}
        for key in [*NO_NAMES, *OUTSIDE, *ODD]:
            server.content = own | {key: b"" if key.endswith("/") else b"foreign"}
            for uri, store in stores.items():
                listed = {f"{uri}/{name}".removeprefix("s3://bucket/") for name in store.list()}
                keys = {k for k in server.content if is_name(k) and f"s3://bucket/{k}".startswith(f"{uri}/")}
                assert listed == keys, (key, uri)
                assert set(top_names(store)) == {name for name in store.list() if "/" not in name}, (key, uri)


@pytest.mark.parametrize("client", CLIENTS)
def test_unusual_key_is_read_and_removed_under_its_own_name(client: str) -> None:
    with failing_s3(fails=lambda method, key: False) as server:
        store = open_store("s3://bucket/run", by_client(client, server.options))
        keys = [key for key in ODD if "\t" not in key]  # obstore reports that it cannot read a key with a tab
        server.content = {key: key.encode() for key in keys}
        for key in keys:
            assert bytes(store.read(key.removeprefix("run/"), 0, 99)) == key.encode()
        for key in keys:
            store.delete([key.removeprefix("run/")])
            assert key not in server.content
            assert len(server.content) == len(keys) - keys.index(key) - 1


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    "key", ["run//x", "run/", "run/step/", "run/step/data/", "/run/step/manifest.reshard", "run/./x"]
)
def test_checkpoints_are_found_beside_an_unusual_key(key: str, client: str) -> None:
    with failing_s3(fails=lambda method, key: False) as server:
        options = by_client(client, server.options)
        reshard.save(STATE, "s3://bucket/run/step", storage_options=options)
        server.content[key] = b"" if key.endswith("/") else b"foreign"
        for uri in ("s3://bucket", "s3://bucket/run", "s3://bucket/run/step"):
            found = reshard.find_checkpoints(uri, options)
            assert [(item.uri, item.is_complete) for item in found] == [("s3://bucket/run/step", True)]
            assert find_remains(uri, options, older_than_s=0) == []
        assert reshard.open("s3://bucket/run/step", storage_options=options).verify() == []
        reshard.save(STATE, "s3://bucket/run/step", storage_options=options, overwrite=True)
        with pytest.raises(reshard.errors.CheckpointExistsError):
            reshard.save(STATE, "s3://bucket/run/step", storage_options=options)
        assert reshard.remove("s3://bucket/run/step", options)
        assert set(server.content) == {key}


@pytest.mark.parametrize("client", CLIENTS)
def test_all_unusual_keys_at_once(client: str) -> None:
    with failing_s3(fails=lambda method, key: False) as server:
        options = by_client(client, server.options)
        reshard.save(STATE, "s3://bucket/run/step", storage_options=options)
        left = {f"run/killed/data/{uuid.uuid4().hex}-00000.shard": b"RESHARDD"}
        foreign = {key: b"" if key.endswith("/") else b"foreign" for key in [*NO_NAMES, *OUTSIDE, *ODD]}
        server.content |= left | foreign
        arguments = [part for name in ("key", "secret") for part in ("-o", f"{name}={server.options[name]}")]
        arguments += [
            "-o",
            f"client_kwargs.endpoint_url={server.endpoint}",
            "-o",
            "client_kwargs.region_name=us-east-1",
        ]
        if client == "s3fs":
            arguments += ["-o", "config_kwargs.max_pool_connections=32"]
        listed = CliRunner().invoke(app, ["ls", "s3://bucket/run", *arguments], catch_exceptions=False)
        assert listed.exit_code == 0
        assert "s3://bucket/run/step\treshard" in listed.stdout
        remains = find_remains("s3://bucket/run", options, older_than_s=0)
        assert [item.uri for item in remains] == ["s3://bucket/run/killed"]
        remove_remains(remains, options, older_than_s=0)
        assert foreign.keys() <= server.content.keys()
        assert not left.keys() & server.content.keys()


@pytest.mark.parametrize("client", CLIENTS)
def test_unusual_keys_of_a_real_server(client: str, moto: servers.Server) -> None:
    import boto3  # type: ignore[import-untyped]

    options = by_client(client, moto.options)
    uri = moto.place(f"{uuid.uuid4().hex}/run")
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    s3 = boto3.client(
        "s3",
        endpoint_url=moto.endpoint,
        aws_access_key_id=moto.options["key"],
        aws_secret_access_key=moto.options["secret"],
        region_name="us-east-1",
    )
    for name in ("//x", "/step//x", "/", "/step/", "/./x", "/a b"):
        s3.put_object(Bucket=bucket, Key=f"{prefix}{name}", Body=b"")
    reshard.save(STATE, f"{uri}/step", storage_options=options)
    assert [(item.uri, item.is_complete) for item in reshard.find_checkpoints(uri, options)] == [(f"{uri}/step", True)]
    assert set(top_names(open_store(uri, options))) == {"a b"}


def test_error_without_s3fs_names_the_unusual_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obstore, "find_spec", lambda name: None if name == "s3fs" else find_spec(name))
    with failing_s3(fails=lambda method, key: False, content={"run/a": b"x", "run/b/": b""}) as server:
        assert list(open_store("s3://bucket/run", server.options).list()) == ["a", "b"]
        server.content["run//y"] = b"x"
        with pytest.raises(reshard.errors.StoreError, match=r"run//y.*install s3fs"):
            open_store("s3://bucket/run", server.options).list()


def test_top_names_are_those_outside_folders() -> None:
    store = MemoryStore()
    store.content = {"a": b"", "b/c": b"", "b/d/e": b""}
    assert store.capabilities.list_top is None
    assert top_names(store) == ["a"]
