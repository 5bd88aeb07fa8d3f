"""Sharded, compressed, checksummed checkpoints for PyTorch.

    reshard.save(state_dict, "s3://bucket/run/step-1000")     under FSDP, on N ranks
    reshard.load(state_dict, "s3://bucket/run/step-1000")     under TP, on M ranks: each fetches only what it needs
    reshard.open("s3://bucket/run/step-1000")                 without a process group
    reshard.convert("s3://bucket/run/step-1000", "model", format="safetensors")

Names are imported when they are first used, so that `import reshard` is light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .storage.version import __version__ as __version__

if TYPE_CHECKING:
    from . import errors as errors
    from . import pictures as pictures
    from .planner.box import Box as Box
    from .planner.layout import Layout as Layout
    from .planner.layout import Mesh as Mesh
    from .planner.layout import Replicate as Replicate
    from .planner.layout import Shard as Shard
    from .planner.layout import StridedShard as StridedShard
    from .storage.checkpoint import Checkpoint as Checkpoint
    from .storage.checkpoint import open_checkpoint as open
    from .storage.conversion.convert import convert as convert
    from .storage.dcp import StorageReader as StorageReader
    from .storage.dcp import StorageWriter as StorageWriter
    from .storage.load import load as load
    from .storage.maintenance.catalog import find_checkpoints as find_checkpoints
    from .storage.maintenance.catalog import remove as remove
    from .storage.runtime.progress import Progress as Progress
    from .storage.runtime.reports import Report as Report
    from .storage.save import save as save
    from .storage.stores.base import Store as Store

__all__ = [
    "Box",
    "Checkpoint",
    "Layout",
    "Mesh",
    "Progress",
    "Replicate",
    "Report",
    "Shard",
    "StorageReader",
    "StorageWriter",
    "Store",
    "StridedShard",
    "__version__",
    "convert",
    "errors",
    "find_checkpoints",
    "load",
    "open",
    "pictures",
    "remove",
    "save",
]

_HOMES = {
    "Box": ("planner.box", "Box"),
    "Checkpoint": ("storage.checkpoint", "Checkpoint"),
    "Layout": ("planner.layout", "Layout"),
    "Mesh": ("planner.layout", "Mesh"),
    "Progress": ("storage.runtime.progress", "Progress"),
    "Replicate": ("planner.layout", "Replicate"),
    "Report": ("storage.runtime.reports", "Report"),
    "Shard": ("planner.layout", "Shard"),
    "StorageReader": ("storage.dcp", "StorageReader"),
    "StorageWriter": ("storage.dcp", "StorageWriter"),
    "Store": ("storage.stores.base", "Store"),
    "StridedShard": ("planner.layout", "StridedShard"),
    "convert": ("storage.conversion.convert", "convert"),
    "errors": ("errors", ""),
    "find_checkpoints": ("storage.maintenance.catalog", "find_checkpoints"),
    "load": ("storage.load", "load"),
    "open": ("storage.checkpoint", "open_checkpoint"),
    "pictures": ("pictures", ""),
    "remove": ("storage.maintenance.catalog", "remove"),
    "save": ("storage.save", "save"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = importlib.import_module(f".{module}", __name__)
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
