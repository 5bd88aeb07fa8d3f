"""No error, log, report or output of a command contains a password or a signature."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import reshard
from reshard.errors import (
    AccessDeniedError,
    ArgumentError,
    CheckpointError,
    StoreError,
    UnavailableError,
    UnsupportedURIError,
)
from reshard.planner.masking import MAX_REMEMBERED, masked, remember_secrets
from reshard.planner.text import shown
from reshard.storage.maintenance.gc import find_remains
from reshard.storage.stores import retry
from reshard.storage.stores.base import Capabilities
from reshard.storage.stores.open import open_store
from tests.failing_s3 import failing_s3

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

STATE = {"w": torch.arange(12.0).reshape(4, 3)}
SECRET = "wJal/rX+UtnF7zz"
QUOTED = "wJal%2FrX%2BUtnF7zz"
PIECES = ("wJal", "UtnF7zz")
"""The parts of SECRET, which must not be shown either."""
USER = "AKIAUSERNAME"

MASKED = [
    ("https://user:pass@host/p", "https://***@host/p"),
    ("https://token@host/p", "https://***@host/p"),
    (f"s3://{USER}:{SECRET}@bucket/a", "s3://***@bucket/a"),
    ("s3://key:se@cr@bucket/a@b", "s3://***@bucket/a@b"),
    ("s3://key:123/abc@bucket/a", "s3://***@bucket/a"),
    ("ftp://u:p@h/x", "ftp://***@h/x"),
    ("https://u:p'q@h/x", "https://***@h/x"),
    ("https://u:p?q#r@h/x", "https://***@h/x"),
    ("simplecache::https://u:p@h/x.pt", "simplecache::https://***@h/x.pt"),
    ("simplecache::zip://a::https://u:p@h/x.zip", "simplecache::zip://a::https://***@h/x.zip"),
    ("zip://a::https://h/x.zip?sig=abc&sv=2020", "zip://a::https://h/x.zip?sig=***&sv=2020"),
    ("https:/u:p@h/x", "https:/***@h/x"),
    ("HTTPS://U:P@h/x", "HTTPS://***@h/x"),
    (
        "https://h/x?X-Amz-Signature=ab%2F&X-Amz-Date=2020&X-Amz-Credential=AKIA%2F1&X-Amz-Security-Token=t",
        "https://h/x?X-Amz-Signature=***&X-Amz-Date=2020&X-Amz-Credential=***&X-Amz-Security-Token=***",
    ),
    ("https://h/x?x-amz-signature=ab", "https://h/x?x-amz-signature=***"),
    ("https://h/x?X-Goog-Signature=ab&X-Goog-Credential=c", "https://h/x?X-Goog-Signature=***&X-Goog-Credential=***"),
    ("https://h/x?sv=2020&sig=ab%2B&se=2026", "https://h/x?sv=2020&sig=***&se=2026"),
    ("https://h/x?AWSAccessKeyId=A&Signature=b&Expires=1", "https://h/x?AWSAccessKeyId=***&Signature=***&Expires=1"),
    ("https://h/x?api_key=a&password=b&t=c&hmac=d", "https://h/x?api_key=***&password=***&t=***&hmac=***"),
    ("https://h/x?opaque", "https://h/x?***"),
    ("abfss://c@acct.dfs.core.windows.net/x?sig=abc", "abfss://c@acct.dfs.core.windows.net/x?sig=***"),
    ("s3://bucket/x?X-Amz-Signature=abc", "s3://bucket/x?X-Amz-Signature=***"),
    ("/bucket/x?token=abc&versionId=7", "/bucket/x?token=***&versionId=7"),
    ("GET 'https://h/x?sig=abc', status 403.", "GET 'https://h/x?sig=***', status 403."),
    ("url=URL('https://h/x?sig=ab'cd&n=1'), x", "url=URL('https://h/x?sig=***&n=***'), x"),
    ("see https://h/x?sig=abc\nand more", "see https://h/x?sig=***\nand more"),
    ("https%3A%2F%2Fh%2Fx%3Fsig%3Dabc%26sv%3D2", "https%3A%2F%2Fh%2Fx%3Fsig%3D***"),
    ("{'secret': 'abc def', \"token\": 5}", "{'secret': '***', \"token\": 5}"),
    ('{"aws_secret_access_key": "x/y+z"}', '{"aws_secret_access_key": "***"}'),
    ("AccountName=x;AccountKey=abc==;EndpointSuffix=y", "AccountName=x;AccountKey=***;EndpointSuffix=y"),
    ("SharedAccessSignature=sv%3D1", "SharedAccessSignature=***"),
    ("Authorization: AWS4-HMAC-SHA256 Credential=A, Signature=b", "Authorization: ***"),
    ('"authorization": "Bearer abcDEF12"', '"authorization": "***"'),
    ("sent Bearer abcDEF12 there", "sent Bearer *** there"),
    ("<Token-0>abc</Token-0>", "<Token-0>***</Token-0>"),
    ("<SignatureProvided>d</SignatureProvided>", "<SignatureProvided>***</SignatureProvided>"),
]  # fmt: skip
UNCHANGED = [
    "/a/b c", "s3://bucket/run/step-1000", "https://host:8080/path/a@b", "hf://org/model@main", "s3://bucket/a@b",
    "abfss://container@acct.dfs.core.windows.net/x", "http://[::1]:9000/b?uploads", "zip://a::/x@y.zip", "s3://b/a?b/m.pt",
    "sftp://host:22/a@b", "https://h/x?list-type=2&prefix=a%2Fb&versionId=3", "user@example.com: hello", "a::b@c",
    "'model.attn.key' has shape (3, 4)", "the tokens: 3, embed_tokens.weight", "'*.key=colwise' and '*.up=rowwise'",
    "scalar of sigma=0.5", "the key 5 of the state dict is of int", "C:/x/y@z",
    "rank 0: 'w': chunk [0:3], bytes [0, 5)",
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), MASKED, ids=range(len(MASKED)))
def test_secrets_are_masked_by_their_context(text: str, expected: str) -> None:
    assert masked(text) == expected
    assert masked(expected) == expected
    assert shown(shown(text)) == shown(text)
    assert masked(f"cannot open {text!r}").count("***") >= 1


@pytest.mark.parametrize("text", UNCHANGED)
def test_text_without_secrets_is_unchanged(text: str) -> None:
    assert masked(text) == text


OPTIONS: list[dict[str, Any]] = [
    {"secret": SECRET},
    {"token": SECRET},
    {"password": SECRET},
    {"account_key": SECRET},
    {"sas_token": SECRET},
    {"connection_string": f"AccountName=x;AccountKey={SECRET};EndpointSuffix=y"},
    {"headers": {"Authorization": f"Bearer {SECRET}"}},
    {"client_kwargs": {"headers": {"authorization": f"Bearer {SECRET}"}}},
    {"client_kwargs": {"aws_secret_access_key": SECRET.encode()}},
    {"client_kwargs": {"auth": ("me", SECRET)}},
    {"token": {"type": "service_account", "private_key": SECRET}},
    {"endpoint_url": f"https://me:{SECRET}@host"},
    {"client_kwargs": {"proxies": [f"http://me:{QUOTED}@proxy:3128"]}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_secrets_of_storage_options_are_masked_by_their_values(options: dict[str, Any]) -> None:
    secret = f"{SECRET}{OPTIONS.index(options):03}"
    quoted = f"{QUOTED}{OPTIONS.index(options):03}"

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: changed(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(changed, value))
        return value.replace(SECRET, secret).replace(QUOTED, quoted) if isinstance(value, str) else secret.encode()

    remember_secrets("memory://x", changed(options))
    for form in (secret, quoted, repr(secret), secret.replace("+", "%2B")):
        text = str(CheckpointError(f"the client said <{form}> at last"))
        assert "the client said <" in text
        assert "> at last" in text
        assert not any(piece in text for piece in PIECES)


def test_ordinary_words_of_storage_options_are_not_masked() -> None:
    remember_secrets(
        "s3://bucket/run", {"token": "anon", "key": "a", "secret": "b", "anon": False, "region": "us-east-1"}
    )
    remember_secrets("gs://bucket/run", {"token": "/home/me/key.json", "project": "project"})
    remember_secrets("abfss://container@account.dfs.core.windows.net/x")
    text = "an anon project in us-east-1 has no file /home/me/key.json, and container@account has a and b"
    assert masked(text) == text


def test_the_secrets_that_were_passed_last_are_remembered() -> None:
    for at in range(MAX_REMEMBERED + 10):
        remember_secrets("s3://bucket", {"secret": f"a-long-secret-{at}-x"})
        remember_secrets("s3://bucket", {"secret": "used-all-the-time"})
    assert masked("a-long-secret-0-x") == "a-long-secret-0-x"
    assert masked(f"<a-long-secret-{MAX_REMEMBERED}-x> used-all-the-time") == "<***> ***"
    begin = time.monotonic()
    masked("a-long-secret " * 100_000)
    assert time.monotonic() - begin < 10


class _Answers(BaseHTTPRequestHandler):
    status = 403

    def do_GET(self) -> None:
        if self.status == 0:
            self.close_connection = True
            return
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_PUT = do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def host() -> Iterator[str]:
    """A server that answers all requests with `_Answers.status`. For 0 it closes the connection."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.15)


def calls(uri: str, options: dict[str, Any], folder: Path) -> list[Callable[[], object]]:
    return [
        lambda: reshard.open(uri, storage_options=options),
        lambda: reshard.find_checkpoints(uri, options),
        lambda: reshard.save(STATE, uri, storage_options=options),
        lambda: reshard.convert(uri, folder / "copy", src_options=options),
        lambda: find_remains(uri, options),
        lambda: dcp.load(dict(STATE), storage_reader=reshard.StorageReader(uri, storage_options=options)),
    ]


def check_shown(call: Callable[[], object], caplog: pytest.LogCaptureFixture) -> BaseException | None:
    """Make a call, and check that neither its result nor its error nor its logs contain the secret."""
    caplog.clear()
    error: BaseException | None = None
    try:
        text = repr(call())
    except (CheckpointError, CheckpointException) as raised:
        error = raised
        text = "".join(traceback.format_exception(raised)) + str(raised) + repr(raised)
    text += "".join(record.getMessage() for record in caplog.records if record.name.startswith("reshard"))
    for piece in (SECRET, QUOTED, *PIECES):
        assert piece not in text
    return error


SIGNED = f"X-Amz-Credential=AK{QUOTED}&X-Amz-Signature={QUOTED}&X-Amz-Security-Token={QUOTED}&X-Amz-Date=2026"
URIS = [
    f"http://user:{QUOTED}@HOST/a/x.safetensors",
    f"http://user:{SECRET}@HOST/a/x.safetensors",
    f"http://HOST/a/x.safetensors?{SIGNED}",
    f"http://HOST/a?sv=2020&sig={QUOTED}",
    f"http://HOST/a/x.pt?token={QUOTED}#part",
    f"simplecache::http://user:{QUOTED}@HOST/x.pt",
    f"simplecache::http://HOST/x.pt?sig={QUOTED}",
    f"zip://a::http://HOST/x.zip?sig={QUOTED}",
    f"webhdfs://user:{QUOTED}@HOST/x",
]


@pytest.mark.parametrize("status", [403, 404, 500, 0])
@pytest.mark.parametrize("uri", URIS)
def test_errors_of_http_clients_show_no_secret(
    uri: str, status: int, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_Answers, "status", status)
    caplog.set_level(logging.DEBUG, "reshard")
    for call in calls(uri.replace("HOST", host), {}, tmp_path):
        error = check_shown(call, caplog)
        if error is not None and not uri.startswith(("webhdfs", "zip", "simple", f"http://user:{SECRET}")):
            assert host in str(error)


def test_the_error_shows_the_status_and_the_rest_of_the_url(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        AccessDeniedError, match=rf"403.*http://{host}/a/x.pt\?X-Amz-Credential=\*\*\*&X-Amz-Signature="
    ):
        reshard.open(f"http://{host}/a/x.pt?{SIGNED}")
    monkeypatch.setattr(_Answers, "status", 500)
    with pytest.raises(UnavailableError, match=rf"500.*http://{host}/a/x.pt\?sig=\*\*\*"):
        reshard.open(f"http://{host}/a/x.pt?sig={QUOTED}")


@pytest.mark.parametrize(
    "uri",
    [
        f"ftp://user:{QUOTED}@127.0.0.1:1/x", f"sftp://user:{QUOTED}@127.0.0.1:1/x", f"smb://user:{QUOTED}@127.0.0.1/x",
        f"unheard-of://user:{SECRET}@host/x?token={QUOTED}", f"https:/user:{QUOTED}@host/x",
        f"s3:user:{SECRET}@bucket/x",
        f"s3://bucket//x?sig={QUOTED}", f"reference://user:{QUOTED}@x/y", f"git://user:{SECRET}@x/y",
        f"memory://user:{QUOTED}@x/y", f"hdfs://user:{QUOTED}@x/y", f"simplecache::unheard-of://u:{SECRET}@h/x",
        f"zip://a::unheard-of://u:{SECRET}@h/x?sig={QUOTED}",
    ],
)  # fmt: skip
def test_errors_about_invalid_uris_show_no_secret(uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "reshard")
    for call in calls(uri, {}, tmp_path):
        check_shown(call, caplog)
    with pytest.raises(UnsupportedURIError, match="'unheard-of://\\*\\*\\*@host/x\\?token=\\*\\*\\*'"):
        open_store(f"unheard-of://user:{SECRET}@host/x?token={QUOTED}")


@pytest.mark.parametrize(
    ("client", "code"),
    [("obstore", "AccessDenied"), ("obstore", "InvalidAccessKeyId"), ("obstore", "SlowDown"), ("s3fs", "AccessDenied")],
)
def test_errors_of_s3_clients_show_no_secret(
    client: str, code: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "reshard")
    with failing_s3(answers=503 if code == "SlowDown" else 403, code=code) as server:
        options: dict[str, Any] = {"key": USER, "secret": SECRET, "token": f"session{SECRET}"}
        options["client_kwargs"] = {"endpoint_url": server.endpoint, "region_name": "us-east-1"}
        if client == "s3fs":
            options |= {"config_kwargs": {"retries": {"max_attempts": 1}}, "skip_instance_cache": True}
        count = 4 if client == "obstore" else 1  # s3fs has its own retries, which take time
        for call in calls("s3://bucket/run", options, tmp_path)[:count]:
            assert isinstance(check_shown(call, caplog), StoreError)
        for uri in (f"s3://{USER}:{SECRET}@bucket/run", f"s3://{USER}:{QUOTED}@bucket/run"):
            assert isinstance(check_shown(calls(uri, options, tmp_path)[0], caplog), CheckpointError)
        if client == "obstore":
            options["client_kwargs"]["endpoint_url"] = server.endpoint.replace("http://", f"http://me:{QUOTED}@")
            assert isinstance(check_shown(calls("s3://bucket/run", options, tmp_path)[0], caplog), CheckpointError)


def test_errors_about_storage_options_show_no_secret(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "reshard")
    for options in (
        {"key": USER, "secret": SECRET, "password": SECRET},
        {"key": [USER], "secret": SECRET},
        {"key": USER, "secret": SECRET, "config_kwargs": {"secret": SECRET}},
        {"key": USER, "secret": SECRET, "client_kwargs": {"endpoint_url": f"nonsense/{SECRET}"}},
    ):
        check_shown(lambda options=options: reshard.open("s3://bucket/run", storage_options=options), caplog)  # type: ignore[misc]


class _LeakingStore:
    """A third-party store whose client shows everything in its errors."""

    location = f"leaking://user:{SECRET}@host"
    capabilities = Capabilities(concurrent_reads=1, buffers_objects=True)

    def _fail(self, *args: object, **options: object) -> Any:
        try:
            raise ValueError(f"https://user:{SECRET}@host/x?sig={QUOTED}")
        except ValueError as error:
            raise RuntimeError(f"request failed: Authorization: Bearer {SECRET}") from error

    read = size = modified = create = put = list = delete = _fail


def test_errors_of_a_third_party_store_show_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    store: Any = _LeakingStore()
    error = check_shown(lambda: reshard.load(dict(STATE), store), caplog)
    assert isinstance(error, CheckpointError)
    assert "request failed: Authorization: ***" in str(error)
    check_shown(lambda: reshard.save(STATE, store), caplog)


def test_found_checkpoints_show_no_secret_and_can_be_opened() -> None:
    uri = f"memory://user:{QUOTED}@place/runs"
    reshard.save(STATE, f"{uri}/step-1")
    (found,) = reshard.find_checkpoints(uri)
    assert QUOTED not in repr(found)
    assert reshard.open(found.uri).read("w").equal(STATE["w"])
    checkpoint = reshard.open(found.uri)
    plans = checkpoint.plan(reshard.Layout({"tp": 2}, {"w": "rowwise"}))
    for text in (repr(checkpoint), checkpoint._repr_html_(), repr(plans), plans._repr_html_(), plans.to_json()):
        assert not any(piece in text for piece in (QUOTED, *PIECES))
        assert "place/runs" in text


@pytest.mark.parametrize("command", ["ls", "inspect", "gc"])
def test_commands_print_no_secret(command: str, host: str, tmp_path: Path) -> None:
    locations = [
        [f"http://{host}/a/x.pt?{SIGNED}"],
        [f"simplecache::http://user:{SECRET}@{host}/x.pt"],
        ["s3://bucket/run", "-o", f"secret:{SECRET}"],
    ]
    for arguments in locations if command == "inspect" else locations[:1]:
        for debug in (["--debug"],) if command == "inspect" else ([],):
            run = [sys.executable, "-m", "reshard.cli", *debug, command, *arguments]
            done = subprocess.run(
                run, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False, env={**os.environ}
            )
            output = done.stdout + done.stderr
            assert output
            assert not any(piece in output for piece in (SECRET, QUOTED, *PIECES)), output


def test_words_in_folder_names_are_not_masked(tmp_path: Path) -> None:
    reshard.save({"a": torch.ones(2)}, tmp_path / "step-1000")
    for word in ("u:missing", "u:step-1000", ":"):
        folder = tmp_path / "a:" / f"{word}@x"
        folder.mkdir(parents=True)
        (folder / "manifest.reshard").write_text("x")
    found = {Path(found.uri).name: found.step for found in reshard.find_checkpoints(tmp_path)}
    assert found["step-1000"] == 1000
    assert masked("step-1000 is missing: x") == "step-1000 is missing: x"


@pytest.mark.parametrize("uri", ["https://:@h/y", "https://key:/x@h/y", "http://:@h"])
def test_an_empty_password_masks_no_other_text(uri: str) -> None:
    remember_secrets(uri)
    assert masked("a: b, the key: value") == "a: b, the key: value"


@pytest.mark.parametrize("number", range(5))
def test_passwords_with_spaces_and_punctuation_are_masked(number: int) -> None:
    secret = f"Zq9{number}vXw7Kp"
    uri = (
        f"http://u:a b{secret}@127.0.0.1:9/x", f"memory://u: {secret}@h/x", f"http://u::{secret}@127.0.0.1:9/x",
        f"http://127.0.0.1:9/x#token={secret}", f"http://u:/{secret}@127.0.0.1:9/x",
    )[number]  # fmt: skip
    remember_secrets(uri)
    assert secret not in masked(f"cannot open {uri}: no answer")


@pytest.mark.parametrize("endpoint", ["minio:S3cretPw99@h:9000", "//u:S3cretPw99@h", "ftp://u:S3cretPw99@h"])
def test_an_endpoint_without_protocol_is_shown_without_its_password(endpoint: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        reshard.open("s3://b/x", storage_options={"key": "a", "secret": "s", "endpoint_url": endpoint})
    assert "S3cretPw99" not in str(caught.value)
