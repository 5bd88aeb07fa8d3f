"""An HTTP server that serves the files of a folder and supports range requests."""

from __future__ import annotations

import re
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any


class FileRanges(BaseHTTPRequestHandler):
    """Serve the files of a folder. Files outside of `/open` require `Authorization: Bearer testing`."""

    def __init__(self, *args: Any, folder: Path) -> None:
        self._folder = folder
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self._folder / self.path.lstrip("/")
        if not self.path.startswith("/open") and self.headers.get("Authorization") != "Bearer testing":
            self.send_error(401)
            return
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        requested = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(requested[1]), min(int(requested[2]) + 1, len(content))) if requested else (0, len(content))
        self.send_response(206 if requested else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        if requested:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.end_headers()
        if with_body:
            self.wfile.write(content[start:stop])

    def log_message(self, format: str, *args: object) -> None: ...
