"""FIFOs, sockets, devices and folders instead of objects raise one error at once."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import reshard
from reshard.errors import AccessDeniedError
from tests.stores.test_deletes import WRITTEN, write_dcp

ROOT = Path(__file__).parents[2]
MAX_S = 60
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bound(path: Path) -> None:
    """Create a socket, from within its folder: the full path would be too long."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as created:
            created.bind(path.name)
    finally:
        os.chdir(before)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def null(path: Path) -> None:
    path.symlink_to("/dev/null")


def linked_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("fifo"))
    path.symlink_to("fifo")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


KINDS = (fifo, bound, endless, null, linked_fifo, loop)


def native(folder: Path) -> None:
    reshard.save({"w": torch.arange(1000)}, folder)


def with_dcp(folder: Path) -> None:
    dcp.save({"w": torch.arange(1000)}, checkpoint_id=folder, no_dist=True)


def safetensors(folder: Path) -> None:
    folder.mkdir()
    save_file({"w": torch.arange(1000)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


def indexed(folder: Path) -> None:
    native(folder.with_name("source"))
    reshard.convert(folder.with_name("source"), folder, format="safetensors")
    shutil.rmtree(folder.with_name("source"))


def torch_file(folder: Path) -> None:
    folder.mkdir()
    torch.save({"w": torch.arange(1000)}, folder / "model.pt")


def unfinished_conversion(folder: Path) -> None:
    """A conversion to DCP that was killed."""
    folder.mkdir()
    (folder / ".reshard-convert.json").write_text("{}")


PLACES: list[tuple[Callable[[Path], None], str]] = [
    (native, "manifest.reshard"),
    (native, "data/*.shard"),
    (with_dcp, ".metadata"),
    (with_dcp, "__0_0.distcp"),
    (safetensors, "model.safetensors"),
    (safetensors, "config.json"),
    (indexed, "model.safetensors.index.json"),
    (indexed, "model-00001-of-00001.safetensors"),
    (torch_file, "model.pt"),
    (unfinished_conversion, ".reshard-convert.json"),
]
SCRIPT = """
import contextlib, os, sys, torch, reshard
from reshard.storage.maintenance.gc import find_remains

uri, copy, other = sys.argv[1:]
reshard.save({"w": torch.zeros(3)}, other)

def call(what):
    try:
        return what()
    except reshard.errors.CheckpointError as error:
        print(type(error).__name__, error, flush=True)
        return error

outcome = []
for what in (
    lambda: reshard.open(uri).state_dict(),
    lambda: reshard.load({"w": torch.zeros(1000, dtype=torch.int64)}, uri),
    lambda: reshard.open(uri).verify(),
    lambda: reshard.open(uri).verify(quick=True),
    lambda: reshard.convert(uri, copy),
    lambda: reshard.convert(other, uri, format="dcp"),
    lambda: reshard.save({"w": torch.zeros(3)}, uri),
    lambda: find_remains(os.path.dirname(uri)),
):
    outcome.append(call(what))
found = {os.path.basename(row.uri): row.state for row in reshard.find_checkpoints(os.path.dirname(uri))}
print(found)
assert found["other"] == "complete", found
failed = [isinstance(it, reshard.errors.CheckpointError) for it in outcome]
print("failed", *map(int, failed))
"""


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_S, MAX_S))


def run(code: str, *arguments: object) -> str:
    """Run a script in a process with a time limit. Return what it prints."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=MAX_S, preexec_fn=limited
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_special_file_raises_one_error(tmp_path: Path) -> None:
    """All cases run in one process, since starting a process takes longer than the calls."""
    arguments = []
    for make, name in PLACES:
        for kind in KINDS:
            folder = tmp_path / f"{make.__name__}-{name.strip('.').replace('/', '-')}-{kind.__name__}" / "run"
            folder.parent.mkdir()
            make(folder)
            (path,) = folder.glob(name)
            path.unlink()
            kind(path)
            arguments.append(folder)
    script = SCRIPT.replace("uri, copy, other = sys.argv[1:]", "").replace("\n", "\n    ")
    code = (
        "import sys\nfor uri in sys.argv[1:]:\n    print('==', uri)\n"
        "    copy, other = uri + '-copy', uri.rpartition('/')[0] + '/other'" + script
    )
    outcomes = dict.fromkeys(map(str, arguments), "")
    for part in run(code, *arguments).split("== ")[1:]:
        uri, _, outcomes[uri] = part.partition("\n")
    for uri, shown in outcomes.items():
        failed = shown.rpartition("failed ")[2].split()
        if "config" in uri:
            continue  # only conversions of fused models read it
        assert failed[0] == failed[1] == failed[4] == "1", (uri, shown)
        assert "not a file" in shown or "symbolic links" in shown or "another tool" in shown, (uri, shown)
        assert "Traceback" not in shown


@pytest.mark.parametrize("scheme", ["", "file://", "local://", "simplecache::file://", "blockcache::file://"])
def test_a_fifo_raises_one_error_with_every_scheme(scheme: str, tmp_path: Path) -> None:
    native(tmp_path / "run")
    (tmp_path / "run" / "manifest.reshard").unlink()
    fifo(tmp_path / "run" / "manifest.reshard")
    code = """
    import sys, reshard
    try:
        reshard.open(sys.argv[1])
    except reshard.errors.StoreError as error:
        print(error)
    """
    assert "not a file" in run(code, f"{scheme}{tmp_path / 'run'}")


def test_the_command_line_lists_the_neighbours_of_a_fifo(tmp_path: Path) -> None:
    native(tmp_path / "a")
    native(tmp_path / "b")
    (tmp_path / "a" / "manifest.reshard").unlink()
    fifo(tmp_path / "a" / "manifest.reshard")
    fifo(tmp_path / "c.pt")
    shown = run("import sys; from reshard.cli import main; sys.argv[1:] = ['ls', sys.argv[1]]; main()", tmp_path)
    rows = {row.split("\t")[0]: row.split("\t")[-1] for row in shown.splitlines()}
    assert rows[str(tmp_path / "b")] == "complete"
    assert rows[str(tmp_path / "a")].endswith("it is a FIFO, not a file")
    assert "c.pt" in shown


def test_a_fifo_instead_of_data_can_be_removed(tmp_path: Path) -> None:
    write_dcp(tmp_path / "run", "__0_0.distcp")
    (tmp_path / "run" / "__0_0.distcp").unlink()
    fifo(tmp_path / "run" / "__0_0.distcp")
    reshard.remove(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_gc_ignores_special_files(tmp_path: Path) -> None:
    for at, kind in enumerate((fifo, bound, endless, null, linked_fifo)):
        folder = tmp_path / str(at)
        (folder / "data").mkdir(parents=True)
        kind(folder / WRITTEN)
        kind(folder / f".manifest.reshard.{'0' * 32}.tmp")
        (folder / "data" / f"{'f' * 32}-00001.shard").write_bytes(b"RESHARDD")
    code = """
    import sys
    from reshard.storage.maintenance.gc import find_remains, remove_remains
    found = find_remains(sys.argv[1], older_than_s=0)
    print(sorted(found[0].names), len(found))
    remove_remains(found, older_than_s=0)
    """
    shown = run(code, tmp_path)
    assert shown.count("shard") == 1, shown
    assert shown.split()[-1] == "5"
    assert not list(tmp_path.glob(f"*/data/{'f' * 32}-00001.shard"))


def refuse(monkeypatch: pytest.MonkeyPatch, method: str, folder: Path) -> None:
    """Let a function of `os` refuse a folder, as it would for users without permission. Tests may run as root."""
    real = getattr(os, method)

    def call(path: Any = ".", *arguments: Any, **options: Any) -> Any:
        if os.fspath(path) == os.fspath(folder):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, method, call)


def test_the_parent_of_a_checkpoint_need_not_be_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parent" / "c").mkdir(parents=True)
    refuse(monkeypatch, "open", tmp_path / "parent")
    reshard.save({"w": torch.ones(3)}, tmp_path / "parent" / "c")
    assert reshard.open(tmp_path / "parent" / "c").read("w").equal(torch.ones(3))


def test_a_folder_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        reshard.save({"w": torch.ones(3)}, tmp_path / "run" / name)
    with monkeypatch.context() as patch:
        refuse(patch, "scandir", tmp_path / "run")
        with pytest.raises(AccessDeniedError, match="no permission to list"):
            reshard.find_checkpoints(tmp_path / "run")
    refuse(monkeypatch, "scandir", tmp_path / "run" / "b")
    (found,) = reshard.find_checkpoints(tmp_path / "run")
    assert found.uri.endswith("/a")
    assert "cannot be listed, so its objects are left out" in caplog.text
