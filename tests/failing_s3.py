"""An S3 server on the loopback interface that fails the requests that a test selects."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

BUCKET = "bucket"


@dataclass
class FailingS3:
    """A running server.

    Args:
        content: The objects by key.
        fails: Returns whether a request fails, for its method and key.
        answers: The HTTP status of requests that fail. 0: they are never answered.
    """

    content: dict[str, bytes] = field(default_factory=dict)
    fails: Callable[[str, str], bool] = lambda method, key: True
    answers: int = 503
    code: str = "ServiceUnavailable"
    """S3's error code of requests that fail."""
    failing: threading.Event = field(default_factory=threading.Event)
    """Set when the first request fails."""
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    """The method, the key, the headers in lower case, and the body of each request."""
    refuses: Callable[[str, str, dict[str, str]], int] = lambda method, key, headers: 0
    """Returns the HTTP status of a request that is refused because of its headers, or 0."""
    shortens: Callable[[str, str], str] = lambda method, key: ""
    """Returns how an answer with an object is shortened: "body": the connection closes early; "length": the headers
    describe the short answer; "range": only Content-Range describes the whole answer; "": not at all."""
    endpoint: str = ""
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def options(self) -> dict[str, Any]:
        return {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": self.endpoint, "region_name": "us-east-1"}}


@contextlib.contextmanager
def failing_s3(**given: Any) -> Iterator[FailingS3]:
    """Run a server until the block ends."""
    server = FailingS3(**given)

    class Handler(_Handler):
        s3 = server

    with _Server(("127.0.0.1", 0), Handler) as http:
        server.endpoint = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            http.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that have closed the connection."""


class _Handler(BaseHTTPRequestHandler):
    s3: FailingS3
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # send head and body together, since the client would delay its acknowledgement of the head

    def handle_expect_100(self) -> bool:
        continues = super().handle_expect_100()
        self.wfile.flush()
        return continues

    def _serve(self) -> None:
        url = urlsplit(self.path)
        key = unquote(url.path).removeprefix(f"/{BUCKET}").removeprefix("/")
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self._body(headers)
        self.s3.requests.append((self.command, key, headers, body))
        if status := self.s3.refuses(self.command, key, headers):
            self._answer(status, _error("InvalidRequest", "refused for its headers"))
        elif self.s3.fails(self.command, key):
            self.s3.failing.set()
            if self.s3.answers == 0:
                self.s3.ended.wait()
                self.close_connection = True
            else:
                self._answer(self.s3.answers, _error(self.s3.code, "injected by the test"))
        elif not key and self.command == "GET":
            self._answer(200, self._listing(parse_qs(url.query, keep_blank_values=True)))
        elif self.command in ("GET", "HEAD"):
            self._get(key, headers)
        elif self.command == "PUT":
            taken = "if-none-match" in headers and key in self.s3.content
            if not taken:
                self.s3.content[key] = body
            self._answer(412 if taken else 200, _error("PreconditionFailed", "taken") if taken else b"")
        elif self.command == "DELETE":
            self.s3.content.pop(key, None)
            self._answer(204)
        else:  # a deletion of several objects
            names = re.findall(r"<Key>([^<]*)</Key>", body.decode())
            for name in names:
                self.s3.content.pop(unescape(name), None)
            deleted = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
            self._answer(200, f"<?xml version='1.0'?><DeleteResult>{deleted}</DeleteResult>".encode())

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "") != "chunked":
            return self.rfile.read(int(headers.get("content-length", "0")))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _get(self, key: str, headers: dict[str, str]) -> None:
        if key not in self.s3.content:
            self._answer(404, _error("NoSuchKey", "no such key"))
            return
        data, status, more, begin = self.s3.content[key], 200, {}, 0
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", "")):
            begin, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
            if begin >= len(data):
                self._answer(416, _error("InvalidRange", "beyond the end"))
                return
            more = {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
            data, status = data[begin:end], 206
        how = self.s3.shortens(self.command, key) if self.command == "GET" else ""
        half = data[: len(data) // 2]
        if how == "body":
            more["Content-Length"] = str(len(data))
            self.close_connection = True
        elif how == "length" and "Content-Range" in more:
            more["Content-Range"] = f"bytes {begin}-{begin + len(half) - 1}/{len(self.s3.content[key])}"
        self._answer(status, half if how else data, more)

    def _listing(self, query: dict[str, list[str]]) -> bytes:
        (prefix,) = query.get("prefix", [""])
        (delimiter,) = query.get("delimiter", [""])
        keys, folders = [], set()
        for key in sorted(self.s3.content):
            if key.startswith(prefix):
                below, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
                if found:
                    folders.add(prefix + below + delimiter)
                else:
                    keys.append(key)
        objects = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.s3.content[key])}</Size><ETag>x</ETag>"
            "<LastModified>2020-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in keys
        )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in sorted(folders))
        head = f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><IsTruncated>false</IsTruncated>"
        count = f"<KeyCount>{len(keys) + len(folders)}</KeyCount><MaxKeys>1000</MaxKeys>"
        return f"<?xml version='1.0'?><ListBucketResult>{head}{count}{objects}{common}</ListBucketResult>".encode()

    def _answer(self, status: int, data: bytes = b"", more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (more or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (more or {}):
            self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", '"0123456789abcdef0123456789abcdef"')
        self.send_header("Last-Modified", "Wed, 01 Jan 2020 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None: ...


def _error(code: str, message: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
