"""Who imports whom and what: docs/ARCHITECTURE.md, kept by a test."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import reshard

ROOT = Path(__file__).parent.parent


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(level, module) of every import in a file; level 0 is absolute."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


@pytest.mark.parametrize("path", sorted((ROOT / "planner").glob("*.py")), ids=lambda path: path.name)
def test_the_planner_is_pure(path: Path) -> None:
    for level, module in imports(path):
        top = module.partition(".")[0]
        assert level == 1 or (level == 0 and (top == "numpy" or top in sys.stdlib_module_names)), module


LAYERS = (
    ("runtime",),
    ("tensors",),
    ("stores",),
    ("formats",),
    ("reading", "writing"),
    ("lazy",),
    ("conversion",),
    ("maintenance",),
    ("async_save", "checkpoint", "dcp_reader", "dcp_writer", "load", "memory", "save"),
    ("training",),
)
"""The folders of storage, and the modules beside them, from the lowest to the highest."""
ENTRY_POINTS = {"async_save", "checkpoint", "dcp_reader", "dcp_writer", "load", "memory", "save"}
"""Modules of one layer that may import each other."""
EVERYBODY_IMPORTS = ("errors", "version")


def modules(package: str) -> dict[str, Path]:
    """The modules of a package at the top level, by their dotted names."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules among the known ones that a module imports, anywhere in it."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parents = package.split(".")
            parts = parents[: len(parents) - node.level + 1] + ([node.module] if node.module else [])
            whole = ".".join(parts)
            found |= {f"{whole}.{a.name}" if f"{whole}.{a.name}" in known else whole for a in node.names}
    return found & known.keys()


@pytest.mark.parametrize("path", sorted((ROOT / "storage").rglob("*.py")), ids=lambda path: path.name)
def test_storage_imports_the_planner_and_not_the_face(path: Path) -> None:
    inside = len(path.relative_to(ROOT / "storage").parts)
    for level, module in imports(path):
        assert level <= inside or (level == inside + 1 and module.startswith("planner")), module
        assert not (level == 0 and module.partition(".")[0] == "reshard"), module
        if module.partition(".")[0] == "fsspec" and level == 0:
            assert path.relative_to(ROOT / "storage").as_posix() in ("stores/fsspec.py", "stores/uris.py")


def test_the_folders_of_storage_import_only_those_below() -> None:
    known = modules("storage")
    layer = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
    wrong = []
    for name, path in known.items():
        room = name.split(".")[1] if "." in name else ""
        for other in imported(name, path, known):
            to = other.split(".")[1] if "." in other else ""
            if room in EVERYBODY_IMPORTS or to in EVERYBODY_IMPORTS or to == room:
                continue
            if layer[to] >= layer[room] and not {to, room} <= ENTRY_POINTS:
                wrong.append(f"{name} imports {other}")
    assert not wrong


@pytest.mark.parametrize("package", ["planner", "storage"])
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    known = modules(package)
    left = {name: imported(name, path, known) - {name} for name, path in known.items()}
    while left:
        free = [name for name, needs in left.items() if not needs & left.keys()]
        assert free, f"modules in a circle, or above one: {sorted(left)}"
        for name in free:
            del left[name]


def test_stores_do_without_torch() -> None:
    code = (
        "import sys, reshard.storage.stores.open, reshard.storage.stores.obstore, reshard.storage.stores.testing; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_importing_is_light() -> None:
    code = (
        "import sys, reshard; dir(reshard); "
        "print([m for m in ('torch', 'fsspec', 's3fs', 'gcsfs', 'zstandard') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_plugin_imports_its_engine_when_it_is_registered() -> None:
    code = "import sys, reshard.integrations.vllm as plugin; print('torch' in sys.modules); plugin.register()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False"
    assert "ModuleNotFoundError: No module named 'vllm'" in done.stderr


@pytest.mark.parametrize("call", ["save", "load", "async_save"])
def test_plain_tensors_are_saved_and_loaded_without_what_only_sharded_ones_need(call: str, tmp_path: Path) -> None:
    """It takes longer to import than many a checkpoint to load."""
    reshard.save({"w": torch.arange(4)}, tmp_path / "c")
    more = "" if call == "load" else ", overwrite=True"
    code = (
        f"import sys, torch, reshard; reshard.{call}({{'w': torch.zeros(4, dtype=torch.int64)}}, sys.argv[1]{more}); "
        "heavy = ('torch.distributed.tensor', 'torch.distributed.checkpoint', 's3fs', 'botocore', 'matplotlib'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "c")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_there() -> None:
    for name in reshard.__all__:
        assert getattr(reshard, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = reshard.nothing_of_this_name
    tree = [error for error in vars(reshard.errors).values() if isinstance(error, type)]
    assert len(tree) > 15
    assert all(issubclass(error, reshard.errors.CheckpointError) for error in tree)
