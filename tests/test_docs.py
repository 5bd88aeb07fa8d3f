"""The pages are true: every Python block and every `reshard` command runs.

Each page runs in its own process and folder, after `tests/docs/setup/<page>.py`, which creates what the page assumes: a
model, or a checkpoint of another tool. `s3://bucket` is a bucket of a mocked S3 and `gs://bucket` a bucket of an
emulated GCS, both configured through the environment. Addresses under `example.org` are replaced with those of servers
on loopback. A page that creates a process group has a group of one rank; `examples/` covers several ranks.
"""

from __future__ import annotations

import ast
import functools
import multiprocessing
import re
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

import reshard
from tests import servers
from tests.docs.blocks import LANGUAGES, MAX_COLUMNS, REASONS, blocks
from tests.docs.files import FileRanges
from tests.docs.run import run_page
from tests.ranks import PRELOADED

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
GUIDES = sorted(path for folder in ("guides", "extending") for path in (ROOT / "docs" / folder).glob("*.md"))
PAGES = [
    *GUIDES,
    ROOT / "docs" / "index.md",
    ROOT / "docs" / "OTHER_FORMATS.md",
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]
ALL_PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
]
STABLE_MODULES = frozenset(
    f"reshard{name}" for name in ("", ".errors", ".formats", ".layout", ".plans", ".stores", ".testing")
)
INTEGRATIONS = frozenset({"reshard.integrations.lightning", "reshard.integrations.transformers"})
"""The modules of reshard that a page may import from, in addition to the stable ones."""
WITHOUT_OBSTORE = ("getting-started", "credentials")
"""Pages that run a second time with s3fs."""
RUNS = [(page, "") for page in PAGES] + [(page, "obstore") for page in PAGES if page.stem in WITHOUT_OBSTORE]
SECONDS = 400


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Yield a folder and the address at which an HTTP server serves its files."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(FileRanges, folder=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def empty_bucket(server: servers.Server, name: str = "bucket") -> None:
    """Create the bucket of the pages, or remove everything from it."""
    filesystem = fsspec.filesystem(server.protocol, **server.options)
    filesystem.invalidate_cache()
    if filesystem.exists(name):
        for path in filesystem.find(name):
            filesystem.rm_file(path)
    else:
        filesystem.mkdir(name)


@pytest.mark.parametrize(
    ("page", "hidden"), RUNS, ids=lambda value: value.stem if isinstance(value, Path) else f"without-{value or 'none'}"
)
def test_page_runs(
    page: Path,
    hidden: str,
    tmp_path: Path,
    moto: servers.Server,
    files: tuple[Path, str],
    request: pytest.FixtureRequest,
) -> None:
    empty_bucket(moto)
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
        empty_bucket(gcs)
        environment["STORAGE_EMULATOR_HOST"] = gcs.endpoint
    if any("abfs://" in block.text for block in blocks(page) if block.runs):
        azurite: servers.Server = request.getfixturevalue("azurite")
        empty_bucket(azurite, "container")
        environment["AZURE_STORAGE_CONNECTION_STRING"] = azurite.options["connection_string"]
    replacements = {"https://models.example.org": address, "https://minio.example.org:9000": moto.endpoint}
    folder, log = tmp_path / "here", tmp_path / "log"
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=run_page, args=(page, folder, environment, replacements, hidden, log))
    process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode == 0, log.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_block_that_does_not_run_says_why(page: Path) -> None:
    reasons = {block.no_run for block in blocks(page)} - {None}
    assert reasons <= REASONS
    assert {block.language for block in blocks(page)} <= LANGUAGES


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.stem)
def test_code_fits_the_width_of_the_site(page: Path) -> None:
    lines = [(block.line + i, line) for block in blocks(page) for i, line in enumerate(block.text.splitlines())]
    assert [f"{page.name}:{number}" for number, line in lines if len(line) > MAX_COLUMNS] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_imports_from_stable_modules(page: Path) -> None:
    for block in blocks(page):
        if block.language != "python" or block.text.lstrip().startswith(">>>"):
            continue
        for node in ast.walk(ast.parse(block.text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            ours = {name for name in names if name.partition(".")[0] == "reshard"}
            assert ours <= STABLE_MODULES | INTEGRATIONS, f"{page.name}:{block.line}"


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """A page may name a module by the end of its path, such as `formats/detect.py`."""
    folders = ("benchmarks", "examples", "planner", "reshard", "storage", "tests")
    known = [path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for path in re.findall(r"`([\w/-]+\.py)`", page.read_text()):
        assert any(name == path or name.endswith(f"/{path}") for name in known), f"{page.name} names {path}"


@pytest.mark.parametrize("page", [page for page in GUIDES if page.stem != "vllm"], ids=lambda page: page.stem)
def test_guide_asserts_something(page: Path) -> None:
    assert any("assert " in block.text or ">>> " in block.text for block in blocks(page) if block.runs)


@pytest.mark.parametrize("record", sorted((ROOT / "docs" / "decisions").glob("0*.md")), ids=lambda path: path.stem)
def test_decision_record_is_complete_and_in_the_index(record: Path) -> None:
    text = record.read_text()
    for part in ("Question", "Choice", "Alternatives", "Figures"):
        assert f"\n**{part}.**" in text, part
    title = text.partition("\n")[0].partition(". ")[2]
    assert f"[{title}]({record.name})" in (record.parent / "README.md").read_text()


def public_names() -> Iterator[tuple[str, object]]:
    """Yield the stable address and the value of everything that users may import."""
    for name in reshard.__all__:
        value = getattr(reshard, name)
        if f"reshard.{name}" not in STABLE_MODULES and name not in ("__version__", "pictures"):
            yield f"reshard.{name}", value
    for module in sorted(STABLE_MODULES - {"reshard"}):
        for name, value in vars(getattr(reshard, module.removeprefix("reshard."))).items():
            if not name.startswith("_") and name != "annotations":
                yield f"{module}.{name}", value


def test_api_pages_document_every_public_name() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    members = dict(re.findall(r"^::: (\S+)\n    options: \{members: \[([^\]]*)\]", pages, re.MULTILINE))
    documented |= {f"{module}.{name}" for module, names in members.items() for name in names.split(", ")}
    undocumented = [
        address for address, _ in public_names() if address not in documented and f"`{address}`" not in pages
    ]
    assert undocumented == []
    assert [address for address, value in public_names() if isinstance(value, type) and not value.__doc__] == []


def error_tree(kind: type[reshard.errors.CheckpointError], indent: str = "") -> Iterator[str]:
    """Yield a line for an error class and each of its subclasses, with the built-in bases in parentheses."""
    bases = [base.__name__ for base in kind.__bases__ if base.__module__ == "builtins" and base is not Exception]
    yield f"{indent}{kind.__name__}" + (f" ({', '.join(bases)})" if bases else "")
    for child in vars(reshard.errors).values():
        if isinstance(child, type) and kind in child.__bases__:
            yield from error_tree(child, indent + "    ")


def test_api_page_shows_the_tree_of_errors() -> None:
    (block,) = blocks(ROOT / "docs" / "api" / "errors.md")
    assert block.text.splitlines() == list(error_tree(reshard.errors.CheckpointError))


def test_page_that_is_wrong_fails(tmp_path: Path) -> None:
    """A wrong value, a wrong output and a wrong command each make the page fail."""
    for text in ("```python\nassert 1 > 2\n```", "```python\n>>> print('a')\nb\n```", "```\nreshard inspect none\n```"):
        page, log = tmp_path / "page.md", tmp_path / "log"
        page.write_text(text)
        process = multiprocessing.get_context("forkserver").Process(
            target=run_page, args=(page, tmp_path, {}, {}, "", log)
        )
        process.start()
        process.join(SECONDS)
        assert process.exitcode == 1, text
