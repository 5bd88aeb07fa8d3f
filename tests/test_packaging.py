"""The built packages contain the files of the repository, and work in an empty environment.

The last test creates a virtual environment, and pip installs the wheel and all of its dependencies, torch included, at
the versions of constraints.txt. With a registry nearby that has torch for the CPU, this takes about 20 s.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SMOKE = """
import torch, reshard
assert "site-packages" in reshard.__file__, reshard.__file__
state = {"w": torch.arange(1000.0).reshape(50, 20), "step": 3}
reshard.save(state, "step-3")
checkpoint = reshard.open("step-3")
assert checkpoint.read("w").equal(state["w"])
loaded = {"w": torch.zeros(50, 20), "step": 0}
reshard.load(loaded, "step-3")
assert loaded["w"].equal(state["w"]) and loaded["step"] == 3
assert checkpoint.verify() == []
reshard.convert("step-3", "model", format="safetensors")
assert reshard.open("model").read("w").equal(state["w"])
assert reshard.StorageWriter and reshard.errors.CheckpointError
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out, source, cwd=out.parent)
    [built] = out.iterdir()
    return built


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Build a source distribution and a wheel from the files that git does not ignore, and a wheel from the former."""
    folder = tmp_path_factory.mktemp("packaging")
    tree = folder / "tree"
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if not os.path.lexists(ROOT / name):
            continue
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name, follow_symlinks=False)
    sdist = build("sdist", tree, folder / "sdist")
    wheel = build("wheel", tree, folder / "wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    [unpacked] = (folder / "unpacked").iterdir()
    return sdist, wheel, build("wheel", unpacked, folder / "of-sdist")


def test_wheel_contains_the_whole_package_and_nothing_else(built: tuple[Path, Path, Path]) -> None:
    _, wheel, of_sdist = built
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names == set(zipfile.ZipFile(of_sdist).namelist())
    code = {name for name in names if not name.startswith("reshard-")}
    expected = {
        str(path.relative_to(ROOT) if package == "reshard" else Path("reshard", path.relative_to(ROOT)))
        for package in ("reshard", "planner", "storage")
        for path in (ROOT / package).rglob("*.py")
        if package != "reshard" or path.relative_to(ROOT).parts[1] not in ("planner", "storage")
    }
    assert code == expected | {"reshard/py.typed"}
    assert {
        "reshard/storage/formats/dcp_source.py",
        "reshard/storage/conversion/targets/dcp.py",
        "reshard/planner/grid.py",
    } <= code
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_metadata_matches_the_project(built: tuple[Path, Path, Path]) -> None:
    sdist, wheel, _ = built
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith("/METADATA")]
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Name"] == "reshard"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "torch>=2.11" in metadata.get_all("Requires-Dist", [])
    assert {"s3", "obstore", "gcs", "docs", "dev"} <= set(metadata.get_all("Provides-Extra", []))
    with tarfile.open(sdist) as source:
        inside = {name.partition("/")[2] for name in source.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "planner/grid.py", "storage/formats/dcp_source.py"} <= inside


def test_wheel_works_in_an_empty_environment(built: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, wheel, _ = built
    venv.create(tmp_path / "venv", with_pip=True)
    scripts = tmp_path / "venv" / "bin"
    install: list[str | Path] = [scripts / "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    run(*install, "--constraint", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    folder = tmp_path / "empty"
    folder.mkdir()
    run(scripts / "python", "-c", SMOKE, cwd=folder)
    assert "inspect" in run(scripts / "reshard", "--help", cwd=folder)
    printed = run(scripts / "reshard", "inspect", "step-3", cwd=folder)
    assert "w\tfloat32\t50 x 20\t1" in printed
    assert "read by tp 2" in run(
        scripts / "reshard", "plan", "step-3", "--tp", "2", "--tp-plan", "w=colwise", cwd=folder
    )
