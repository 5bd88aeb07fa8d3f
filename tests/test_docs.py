"""The pages say what is true: every block of python, and every call of the command line, runs as it stands.

Each page runs in a process and a folder of its own, after `tests/docs/setup/<page>.py`, which makes what the page
takes for granted: a model, a checkpoint of another tool. `s3://bucket` is a bucket of a mocked S3, `gs://bucket` one
of a GCS in memory, found by the environment as every client finds them; addresses under `example.org` are replaced by
those of servers on loopback. A page that makes a process group has one of one rank; what takes more is in `examples/`.
"""

from __future__ import annotations

import functools
import multiprocessing
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

import reshard
from tests import servers
from tests.docs.blocks import LANGUAGES, REASONS, blocks
from tests.docs.files import FileRanges
from tests.docs.run import run_page
from tests.ranks import PRELOADED

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
PAGES = [
    *GUIDES,
    ROOT / "docs" / "index.md",
    ROOT / "docs" / "OTHER_FORMATS.md",
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]
WITHOUT_OBSTORE = ("getting-started", "credentials")
"""Pages that run once more by s3fs."""
RUNS = [(page, "") for page in PAGES] + [(page, "obstore") for page in PAGES if page.stem in WITHOUT_OBSTORE]
SECONDS = 400


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which a server of HTTP has its files."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(FileRanges, folder=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def empty(server: servers.Server) -> None:
    """Make the bucket of the pages, or take all out of it."""
    filesystem = fsspec.filesystem(server.protocol, **server.options)
    filesystem.invalidate_cache()
    if filesystem.exists("bucket"):
        for path in filesystem.find("bucket"):
            filesystem.rm_file(path)
    else:
        filesystem.mkdir("bucket")


@pytest.mark.parametrize(
    ("page", "without"), RUNS, ids=lambda value: value.stem if isinstance(value, Path) else f"without-{value or 'none'}"
)
def test_a_page_runs(
    page: Path,
    without: str,
    tmp_path: Path,
    moto: servers.Server,
    files: tuple[Path, str],
    request: pytest.FixtureRequest,
) -> None:
    empty(moto)
    served, address = files
    (port,) = servers.free_ports(1)
    environment = {
        "AWS_ACCESS_KEY_ID": servers.KEY,
        "AWS_SECRET_ACCESS_KEY": servers.SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": moto.endpoint,
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "SERVED": str(served),
        "COLUMNS": "120",
    }
    if any("gs://" in block.text for block in blocks(page) if block.runs):
        gcs: servers.Server = request.getfixturevalue("gcs")
        empty(gcs)
        environment["STORAGE_EMULATOR_HOST"] = gcs.endpoint
    instead = {"https://models.example.org": address, "https://minio.example.org:9000": moto.endpoint}
    folder, log = tmp_path / "here", tmp_path / "log"
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=run_page, args=(page, folder, environment, instead, without, log))
    process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode == 0, log.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_left_out_says_why(page: Path) -> None:
    left_out = {block.left_out for block in blocks(page)} - {None}
    assert left_out <= REASONS
    assert {block.language for block in blocks(page)} <= LANGUAGES


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_a_guide_asserts_something(page: Path) -> None:
    assert any("assert " in block.text or ">>> " in block.text for block in blocks(page) if block.runs)


def test_the_api_has_every_public_name() -> None:
    shown = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    for name in set(reshard.__all__) - {"__version__", "errors"}:
        assert f"heading: reshard.{name}}}" in shown or f"heading: reshard.{name}," in shown, name
        assert getattr(reshard, name).__doc__


def test_a_page_that_is_wrong_fails(tmp_path: Path) -> None:
    """What runs the pages sees a wrong value, a wrong output and a wrong call."""
    for text in ("```python\nassert 1 > 2\n```", "```python\n>>> print('a')\nb\n```", "```\nreshard inspect none\n```"):
        page, log = tmp_path / "page.md", tmp_path / "log"
        page.write_text(text)
        process = multiprocessing.get_context("forkserver").Process(
            target=run_page, args=(page, tmp_path, {}, {}, "", log)
        )
        process.start()
        process.join(SECONDS)
        assert process.exitcode == 1, text
