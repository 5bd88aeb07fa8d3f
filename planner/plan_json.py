"""Convert read plans to JSON and back, so that a plan can be stored, compared with another one, or drawn elsewhere."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import numpy as np

from .box import Box, IntArray
from .chunk_reads import ChunkReads, WantedBox
from .coalesce import GapLimits, Requests
from .entries import Entry, Kind
from .errors import InvalidIndexError, InvalidPlanError
from .grid import Grid
from .index import count_checksums
from .read_plan import Exchange, ReadPlan
from .slabs import ByteRuns

_BY_STREAM = ("objects", "starts", "stops", "checksums")
"""The columns of shape (n, s)."""
_BY_DIMENSION = {
    "chunk_offsets": "chunk_offsets",
    "chunk_sizes": "chunk_sizes",
    "piece_offsets": "wanted_offsets",
    "piece_sizes": "wanted_sizes",
}
"""The names in JSON of the columns of shape (n, ndim), and their names in `ChunkReads`."""
_OF_RUNS = ("counts", "nbytes", "strides")


def plan_to_json(plan: ReadPlan) -> dict[str, Any]:
    """Convert a plan to dicts, lists and numbers."""
    requests = plan.requests
    return {
        "reads": [_read_to_json(read) for read in plan.reads],
        "requests": {
            "objects": requests.objects.tolist(),
            "starts": requests.starts.tolist(),
            "stops": requests.stops.tolist(),
            "request_of_range": requests.request_of_range.tolist(),
            "sparse": [[at, *runs] for at, runs in requests.sparse.items()],
        },
        "gaps": list(astuple(plan.gap_limits)),
        "order": None if plan.order is None else plan.order.tolist(),
        "exchange": None if plan.exchange is None else _exchange_to_json(plan.exchange),
    }


def plan_from_json(value: Any) -> ReadPlan:
    """Convert the result of `plan_to_json` back to a plan.

    Raises:
        InvalidPlanError: the value is not a valid plan.
    """
    try:
        requests = value["requests"]
        count = len(requests["objects"])
        columns = {name: _column(requests[name]).reshape(count) for name in ("objects", "starts", "stops")}
        of_range = _column(requests["request_of_range"])
        sparse = {int(at): (int(count), int(nbytes), int(stride)) for at, count, nbytes, stride in requests["sparse"]}
        max_gap_bytes, max_over_read, *more = value["gaps"]  # older versions write fewer numbers
        reads = tuple(_read_from_json(read) for read in value["reads"])
        if of_range.shape != (sum(read.objects.size for read in reads),) or not _within(of_range, count):
            raise ValueError("request_of_range does not name one request for each byte range")
        if not _within(np.array([*sparse], np.int64), count) or not bool((columns["starts"] >= 0).all()):
            raise ValueError("a request starts before its object, or a sparse request does not exist")
        fetched = Requests(**columns, request_of_range=of_range, sparse=sparse)
        limits = GapLimits(int(max_gap_bytes), float(max_over_read), *map(int, more))
        order, exchange = value.get("order"), value.get("exchange")  # older versions do not write them
        return ReadPlan(
            reads,
            fetched,
            limits,
            None if order is None else _permutation(order, count),
            None if exchange is None else _exchange_from_json(exchange, count),
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, InvalidIndexError) as error:
        raise InvalidPlanError(f"this is not a valid read plan: {type(error).__name__}: {error}") from error


def _exchange_to_json(exchange: Exchange) -> dict[str, Any]:
    columns = {name: getattr(exchange, name).tolist() for name in ("objects", "starts", "stops", "is_given")}
    return {**columns, "sent": exchange.bytes_sent, "received": exchange.bytes_received}


def _exchange_from_json(value: Any, requests: int) -> Exchange:
    count = len(value["objects"])
    columns = {name: _column(value[name]).reshape(count) for name in ("objects", "starts", "stops")}
    is_given = np.array(value["is_given"], np.bool_).reshape(requests)
    sent, received = int(value["sent"]), int(value["received"])
    if not bool(((columns["starts"] >= 0) & (columns["stops"] >= columns["starts"])).all()) or min(sent, received) < 0:
        raise ValueError("a shared byte range or the bytes that are exchanged are negative")
    return Exchange(**columns, is_given=is_given, bytes_sent=sent, bytes_received=received)


def _permutation(value: Any, count: int) -> IntArray:
    order = _column(value)
    if order.shape != (count,) or not np.array_equal(np.sort(order), np.arange(count)):
        raise ValueError("order does not name each request once")
    return order


def _read_to_json(read: ChunkReads) -> dict[str, Any]:
    entry, box, runs = read.entry, read.want.box, read.runs
    return {
        "name": entry.name,
        "kind": int(entry.kind),
        "dtype": entry.dtype,
        "shape": list(entry.grid.shape),
        "parts": list(entry.grid.parts),
        "order": None if entry.order is None else list(entry.order),
        "box": [list(box.offsets), list(box.sizes)],
        "heads_only": bool(read.want.heads_only),
        "streams": read.objects.shape[1],
        "encodings": read.encodings.tolist(),
        "skipped": read.skipped.tolist(),
        "checksum_counts": read.checksum_counts.tolist(),
        **{name: getattr(read, name).tolist() for name in _BY_STREAM},
        **{name: getattr(read, column).tolist() for name, column in _BY_DIMENSION.items()},
        "runs": None
        if runs is None
        else {**{name: getattr(runs, name).tolist() for name in _OF_RUNS}, "sparse": runs.sparse.tolist()},
    }


def _read_from_json(value: Any) -> ChunkReads:
    grid = Grid(tuple(map(int, value["shape"])), tuple(map(int, value["parts"])))
    order = value["order"] if value["order"] is None else tuple(map(int, value["order"]))
    entry = Entry(str(value["name"]), Kind(value["kind"]), str(value["dtype"]), grid, order)
    offsets, sizes = value["box"]
    box = Box(tuple(map(int, offsets)), tuple(map(int, sizes)))
    count = len(value["encodings"])
    by_stream = {name: _column(value[name]).reshape(count, int(value["streams"])) for name in _BY_STREAM}
    by_dimension = {
        column: _column(value[name]).reshape(count, len(grid.shape)) for name, column in _BY_DIMENSION.items()
    }
    runs = value["runs"]
    counts = value.get("checksum_counts")  # older versions do not write them, and verified pages
    if counts is None:
        encodings, nbytes = _column(value["encodings"]), by_stream["stops"][:, 0] - by_stream["starts"][:, 0]
        counts = count_checksums(encodings, nbytes, np.full(count, entry.page_bytes), whole=False)
    if not isinstance(value["encodings"], list):
        raise ValueError(f"encodings must be a list, got {type(value['encodings']).__name__}")
    return ChunkReads(
        want=WantedBox(entry.name, box, bool(value["heads_only"])),
        entry=entry,
        encodings=np.array(value["encodings"], np.uint8),
        skipped=_column(value["skipped"]).reshape(count),
        checksum_counts=_column(counts).reshape(count),
        **by_stream,
        **by_dimension,
        runs=None
        if runs is None
        else ByteRuns(
            **{name: _column(runs[name]).reshape(count) for name in _OF_RUNS},
            sparse=np.array(runs["sparse"], np.bool_).reshape(count),
        ),
    )


def _within(values: IntArray, count: int) -> bool:
    return bool(((values >= 0) & (values < count)).all())


def _column(values: Any) -> IntArray:
    return np.array(values, np.int64)
