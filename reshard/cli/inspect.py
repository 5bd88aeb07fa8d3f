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
from .common import as_text, print_json, print_line, print_table, storage_options
from .fold import Folded, fold, tree


def run(uri: str, names: list[str], format: str | None, options: list[str] | None, as_json: bool) -> int:
    """Return the exit code: 1 if tensors of the checkpoint are missing."""
    checkpoint = reshard.open(uri, storage_options=storage_options(options), format=format)
    if names:
        _print_details(checkpoint, names, as_json)
    elif as_json:
        print_json(summary(checkpoint) | {"tensors": {name: _row(checkpoint, name) for name in checkpoint.tensors}})
    else:
        _print_summary(checkpoint)
    return int(bool(checkpoint.damaged))


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the sizes and names of a checkpoint, as plain data."""
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
        "metadata": checkpoint.metadata,
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


def _print_summary(checkpoint: Checkpoint) -> None:
    found = summary(checkpoint)
    origin = ", ".join(
        f"{key} {as_text(found[key])}" for key in ("created", "writer", "torch", "codec", "ranks") if key in found
    )
    print_line(f"{found['location']}: {found['format']}" + (f" ({origin})" if origin else ""))
    for key, value in found["metadata"].items():
        print_line(f"  {key}: {as_text(value)}")
    dtypes = [
        (dtype, f"{row['parameters']:,}", format_bytes(row["bytes"]), format_bytes(row["stored_bytes"]), _ratio(row))
        for dtype, row in found["dtypes"].items()
    ]
    total = (
        "all",
        f"{found['parameters']:,}",
        format_bytes(found["bytes"]),
        format_bytes(found["stored_bytes"]),
        _ratio(found),
    )
    columns = ("dtype", "elements", "size", "stored", "ratio")
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
        print_line(f"these files are not in the index and were not read: {', '.join(map(as_text, others))}")
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


def _print_details(checkpoint: Checkpoint, names: list[str], as_json: bool) -> None:
    details: dict[str, Any] = {}
    value_names = set(checkpoint.value_names)
    all_names = [*checkpoint.tensors, *checkpoint.value_names]
    for name in (found for given in names for found in fnmatch.filter(all_names, given) or [given]):
        if name in value_names:
            details[name] = {"value": checkpoint.read_value(name)}
            continue
        shards, grid = checkpoint.shards_of(name)
        details[name] = _row(checkpoint, name) | {"grid": list(grid), "shards": [str(box) for box in shards]}
    if as_json:
        print_json(details)
        return
    for name, row in details.items():
        print_line(name)
        for key, value in row.items():
            print_line(f"  {key}: " + (" x ".join(map(str, value)) if key in ("shape", "grid") else _listed(value)))


def _listed(value: Any) -> str:
    return ", ".join(map(as_text, value)) if isinstance(value, list) else as_text(value)
