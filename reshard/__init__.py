"""Sharded, compressed, checksummed checkpoints for PyTorch.

    reshard.save(state_dict, "s3://bucket/run/step-1000")     under FSDP, on N ranks
    reshard.load(state_dict, "s3://bucket/run/step-1000")     under TP, on M ranks: each rank fetches only what it needs
    reshard.open("s3://bucket/run/step-1000")                 without a process group
    reshard.convert("s3://bucket/run/step-1000", "model", format="safetensors")

Names are imported when they are first used, so that `import reshard` is fast.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from typing import TYPE_CHECKING, Any

from .storage.version import __version__ as __version__

if TYPE_CHECKING:
    from . import errors as errors
    from . import formats as formats
    from . import layout as layout
    from . import pictures as pictures
    from . import plans as plans
    from . import stores as stores
    from . import testing as testing
    from .planner.box import Box as Box
    from .planner.layout import Layout as Layout
    from .planner.layout import Mesh as Mesh
    from .storage.async_save import AsyncSave as AsyncSave
    from .storage.async_save import async_save as async_save
    from .storage.checkpoint import Checkpoint as Checkpoint
    from .storage.checkpoint import TensorInfo as TensorInfo
    from .storage.checkpoint import open_checkpoint as open
    from .storage.conversion.convert import convert as convert
    from .storage.dcp_reader import StorageReader as StorageReader
    from .storage.dcp_writer import StorageWriter as StorageWriter
    from .storage.lazy.weights import LazyWeights as LazyWeights
    from .storage.load import load as load
    from .storage.maintenance.catalog import FoundCheckpoint as FoundCheckpoint
    from .storage.maintenance.catalog import Removal as Removal
    from .storage.maintenance.catalog import find_checkpoints as find_checkpoints
    from .storage.maintenance.catalog import find_removal as find_removal
    from .storage.maintenance.catalog import remove as remove
    from .storage.maintenance.diff import Difference as Difference
    from .storage.maintenance.diff import diff as diff
    from .storage.maintenance.gc import Remains as Remains
    from .storage.maintenance.gc import gc as gc
    from .storage.maintenance.verify import DamagedChunk as DamagedChunk
    from .storage.memory import release_memory as release_memory
    from .storage.runtime.progress import Progress as Progress
    from .storage.runtime.reports import Cast as Cast
    from .storage.runtime.reports import RankReport as RankReport
    from .storage.runtime.reports import Report as Report
    from .storage.save import save as save
    from .storage.stores.base import Store as Store
    from .storage.training.manager import CheckpointManager as CheckpointManager
    from .storage.training.policies import Policy as Policy
    from .storage.training.policies import SavedStep as SavedStep
    from .storage.training.policies import best as best
    from .storage.training.policies import every as every
    from .storage.training.policies import latest as latest
    from .storage.training.training_state import training_state as training_state

__all__ = [
    "AsyncSave",
    "Box",
    "Cast",
    "Checkpoint",
    "CheckpointManager",
    "DamagedChunk",
    "Difference",
    "FoundCheckpoint",
    "Layout",
    "LazyWeights",
    "Mesh",
    "Policy",
    "Progress",
    "RankReport",
    "Remains",
    "Removal",
    "Report",
    "SavedStep",
    "StorageReader",
    "StorageWriter",
    "Store",
    "TensorInfo",
    "__version__",
    "async_save",
    "best",
    "convert",
    "diff",
    "errors",
    "every",
    "find_checkpoints",
    "find_removal",
    "formats",
    "gc",
    "latest",
    "layout",
    "load",
    "open",
    "pictures",
    "plans",
    "release_memory",
    "remove",
    "save",
    "stores",
    "testing",
    "training_state",
]

_MODULES = ("errors", "formats", "layout", "pictures", "plans", "stores", "testing")
_HOMES = {
    "planner.box": ("Box",),
    "planner.layout": ("Layout", "Mesh"),
    "storage.async_save": ("AsyncSave", "async_save"),
    "storage.memory": ("release_memory",),
    "storage.checkpoint": ("Checkpoint", "TensorInfo"),
    "storage.conversion.convert": ("convert",),
    "storage.dcp_reader": ("StorageReader",),
    "storage.dcp_writer": ("StorageWriter",),
    "storage.lazy.weights": ("LazyWeights",),
    "storage.load": ("load",),
    "storage.maintenance.catalog": ("FoundCheckpoint", "Removal", "find_checkpoints", "find_removal", "remove"),
    "storage.maintenance.diff": ("Difference", "diff"),
    "storage.maintenance.gc": ("Remains", "gc"),
    "storage.maintenance.verify": ("DamagedChunk",),
    "storage.runtime.progress": ("Progress",),
    "storage.runtime.reports": ("Cast", "RankReport", "Report"),
    "storage.save": ("save",),
    "storage.stores.base": ("Store",),
    "storage.training.manager": ("CheckpointManager",),
    "storage.training.policies": ("Policy", "SavedStep", "best", "every", "latest"),
    "storage.training.training_state": ("training_state",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


_IMPORT_S = 10.0
_import_lock = threading.RLock()
"""Held while a name is imported. A fork waits for it: otherwise a module that another thread imports at that moment
would stay locked in the child, where its next import would wait forever."""


def _before_fork() -> None:
    _import_lock.acquire(timeout=_IMPORT_S)


def _after_fork() -> None:
    with contextlib.suppress(RuntimeError):  # another thread still holds it
        _import_lock.release()


def _after_fork_in_child() -> None:
    global _import_lock
    _import_lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def __getattr__(name: str) -> Any:
    with _import_lock:
        return _imported(name)


def _imported(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name == "open":
        value = importlib.import_module(".storage.checkpoint", __name__).open_checkpoint
    elif name in _HOME_OF:
        value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
