"""`reshard inspect`."""

from __future__ import annotations

import fnmatch
import math
import sys
from collections import Counter
from typing import Any

import reshard
from reshard.storage.checkpoint import Checkpoint

from ..humanize import format_bytes
from .common import in_words, print_json, print_table, storage_options, tell
from .fold import Folded, fold, tree


def run(uri: str, names: list[str], format: str | None, options: list[str] | None, as_json: bool) -> int:
    """Return the exit code: 1 if tensors of the checkpoint are missing."""
    checkpoint = reshard.open(uri, storage_options=storage_options(options), format=format)
    if names:
        _tell_tensors(checkpoint, names, as_json)
    elif as_json:
        print_json(summary(checkpoint) | {"tensors": {name: _row(checkpoint, name) for name in checkpoint.tensors}})
    else:
        _tell_all(checkpoint)
    return int(bool(checkpoint.damaged))


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint in numbers."""
    parameters: Counter[str] = Counter()
    raw: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        dtype = _short(info.dtype)
        parameters[dtype] += math.prod(info.shape)
        raw[dtype] += math.prod(info.shape) * info.dtype.itemsize
        stored[dtype] += info.stored_bytes
    return {
        **checkpoint.info,
        "location": checkpoint.location,
        "format": checkpoint.format,
        "parameters": sum(parameters.values()),
        "bytes": sum(raw.values()),
        "stored_bytes": sum(stored.values()),
        "values": list(checkpoint.value_names),
        "unreadable": dict(checkpoint.unreadable),
        "missing": list(checkpoint.damaged),
        "unindexed": list(checkpoint.unindexed),
        "dtypes": {
            dtype: {"parameters": parameters[dtype], "bytes": raw[dtype], "stored_bytes": stored[dtype]}
            for dtype in sorted(parameters)
        },
    }


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _row(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    info = checkpoint.tensors[name]
    return {
        "shape": list(info.shape),
        "dtype": _short(info.dtype),
        "chunks": info.chunks,
        "stored_bytes": info.stored_bytes,
    }


def _tell_all(checkpoint: Checkpoint) -> None:
    told = summary(checkpoint)
    made = ", ".join(
        f"{key} {in_words(told[key])}" for key in ("created", "writer", "torch", "codec", "ranks") if key in told
    )
    tell(f"{told['location']}: {told['format']}" + (f" ({made})" if made else ""))
    dtypes = [
        (dtype, f"{row['parameters']:,}", format_bytes(row["bytes"]), format_bytes(row["stored_bytes"]), _ratio(row))
        for dtype, row in told["dtypes"].items()
    ]
    total = (
        "all",
        f"{told['parameters']:,}",
        format_bytes(told["bytes"]),
        format_bytes(told["stored_bytes"]),
        _ratio(told),
    )
    columns = ("dtype", "values", "raw", "stored", "ratio")
    print_table(columns, [*dtypes, total] if len(dtypes) != 1 else dtypes, right=columns[1:])
    print()
    folded = fold({name: (_short(i.dtype), i.shape) for name, i in checkpoint.tensors.items()})
    lines = tree(folded) if sys.stdout.isatty() else [(tensors.name, tensors) for tensors in folded]
    rows = [(name, *_about(checkpoint, tensors)) for name, tensors in lines]
    about = ("dtype", "shape", "count", "chunks", "stored")
    print_table(("tensor", *about), rows, right=about[2:])
    if checkpoint.value_names:
        print()
        values = fold(dict.fromkeys(checkpoint.value_names, ()))
        print_table(("value", "count"), [(value.name, value.count) for value in values], right=("count",))
    if checkpoint.unreadable:
        print()
        print_table(("cannot be read", "why"), checkpoint.unreadable.items())
    others = checkpoint.info.get("unindexed_files")
    if isinstance(others, list) and others:
        print()
        tell(f"the index does not name these files, which were not read: {', '.join(map(in_words, others))}")
    if checkpoint.unindexed:
        print()
        unindexed = fold(dict.fromkeys(checkpoint.unindexed, ()))
        print_table(("not in the index", "count"), [(of.name, of.count) for of in unindexed], right=("count",))


def _about(checkpoint: Checkpoint, tensors: Folded | None) -> tuple[object, ...]:
    if tensors is None:
        return ("",) * 5
    infos = [checkpoint.tensors[name] for name in tensors.names]
    shape = " x ".join(map(str, infos[0].shape)) or "scalar"
    stored = format_bytes(sum(info.stored_bytes for info in infos))
    return _short(infos[0].dtype), shape, tensors.count, sum(info.chunks for info in infos), stored


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['stored_bytes'] / row['bytes']:.3f}" if row["bytes"] else ""


def _tell_tensors(checkpoint: Checkpoint, names: list[str], as_json: bool) -> None:
    told: dict[str, Any] = {}
    there = [*checkpoint.tensors, *checkpoint.value_names]
    for name in (found for given in names for found in fnmatch.filter(there, given) or [given]):
        if name in checkpoint.value_names:
            told[name] = {"value": checkpoint.read_value(name)}
            continue
        shards, grid = checkpoint.layout_of(name)
        told[name] = _row(checkpoint, name) | {"grid": list(grid), "shards": [str(box) for box in shards]}
    if as_json:
        print_json(told)
        return
    for name, row in told.items():
        tell(name)
        for key, value in row.items():
            tell(f"  {key}: " + (" x ".join(map(str, value)) if key in ("shape", "grid") else _listed(value)))


def _listed(value: Any) -> str:
    return ", ".join(map(in_words, value)) if isinstance(value, list) else in_words(value)
