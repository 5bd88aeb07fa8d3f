"""Boxes of a checkpoint into tensors: check, plan, carry out. What every way to load goes through."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.profiler import record_function

from ..planner.box import Box
from ..planner.coalesce import MAX_REQUEST_BYTES
from ..planner.errors import ShapeMismatchError
from ..planner.index import Kind
from ..planner.read_plan import Want, plan_reads
from .errors import DestinationError
from .logs import logger_of
from .objects import decode_object
from .place import check_destination
from .progress import Meter
from .ranks import Interrupt, never
from .reader import execute
from .reports import RankReport
from .resources import check_budget, default_budget
from .source import Source
from .tensors import from_bytes, torch_dtype
from .workers import Workers

logger = logger_of(__name__)


def check_is_tensor(source: Source, name: str) -> None:
    """Raises DestinationError where the checkpoint has an object of this name, MissingTensorError for nothing."""
    if source.entry(name).kind is not Kind.TENSOR:
        raise DestinationError(f"{name!r} is an object in the checkpoint, and cannot be loaded into a tensor")


class Blob:
    """An object of a checkpoint: the tensor of bytes that it is read into, and what they mean.

    Raises MissingTensorError where the checkpoint has none of this name.
    """

    def __init__(self, source: Source, name: str) -> None:
        entry = source.entry(name)
        self.name = name
        self.kind = entry.kind
        self.wants = [] if name in source.inline else [Want(name, Box.whole(entry.shape))]
        """What is to be read for it: nothing, where it is here."""
        source.index(self.wants)  # what it says is checked before memory is taken on its word
        here = source.inline.get(name)
        self._tensor = (
            torch.empty(entry.shape, dtype=torch.uint8)
            if here is None
            else from_bytes(np.frombuffer(here, np.uint8), torch.uint8, entry.shape)
        )
        self.tensors = [self._tensor for _ in self.wants]

    @property
    def data(self) -> bytes:
        return bytes(self._tensor.numpy())

    def value(self, *, allow_pickle: bool = False) -> Any:
        """The object. Raises UnsafeObjectError, CorruptCheckpointError."""
        return decode_object(self.name, self.kind, self.data, allow_pickle=allow_pickle)


def read_boxes(
    source: Source,
    wants: Sequence[Want],
    destinations: Sequence[torch.Tensor],
    *,
    blobs: Sequence[Blob] = (),
    rank: int = 0,
    budget_bytes: int | None = None,
    max_over_read: float | None = None,
    interrupt: Interrupt = never,
    meter: Meter | None = None,
    workers: Workers | None = None,
) -> RankReport:
    """Read boxes into tensors of their sizes, in place, and `blobs` with them.

    All is checked before anything is read; for the errors of reading, see `reader.execute`.
    Raises DtypeError, DestinationError, ShapeMismatchError, MissingTensorError, CorruptCheckpointError, StoreError,
    ArgumentError for a budget that is none.
    """
    begin = time.perf_counter()
    check_budget(budget_bytes)
    wants = [*wants, *(want for blob in blobs for want in blob.wants)]
    destinations = [*destinations, *(tensor for blob in blobs for tensor in blob.tensors)]
    for want, destination in zip(wants, destinations, strict=True):
        check_destination(want.name, destination, torch_dtype(source.entry(want.name).dtype))
        if tuple(destination.shape) != want.box.sizes:
            raise ShapeMismatchError(
                f"{want.name!r}: the destination of {want.box} has shape {tuple(destination.shape)}"
            )
    narrowed = [
        Want(want.name, want.box, heads_only=destination.dtype is torch.bfloat16)
        for want, destination in zip(wants, destinations, strict=True)
    ]
    index = source.index(wants)
    budget = default_budget() if budget_bytes is None else budget_bytes
    most = min(MAX_REQUEST_BYTES, budget // 4)  # so that several are under way, whatever the budget
    with record_function("reshard.plan"):
        plan = plan_reads(index, narrowed, gaps=source.gaps(max_over_read), max_request_bytes=max(most, 1))
    meter = meter or Meter("load")
    meter.expect(plan.requests.nbytes)
    logger.debug("%s: %r", source.location, plan)
    planned = time.perf_counter()
    for device in {destination.device for destination in destinations if destination.device.type != "cpu"}:
        torch.accelerator.synchronize(device)  # what still writes to the destinations on their own stream
    with record_function("reshard.read"):
        stats = execute(
            plan,
            index,
            source.store,
            destinations,
            budget_bytes=budget,
            interrupt=meter.watching(interrupt),
            placed=meter.add,
            workers=workers,
        )
    done, report = time.perf_counter(), plan.report
    source.observe(plan.requests.nbytes, done - planned)
    return RankReport(
        rank=rank,
        bytes_needed=sum(destination.nbytes for destination in destinations),
        bytes_fetched=plan.requests.nbytes,
        requests=report.requests,
        chunks=report.chunks,
        seconds={
            "plan": planned - begin,
            "fetch": stats.fetch_s,
            "decode": stats.decode_s,
            "total": done - begin,
        },
    )


def counting_metadata(report: RankReport, source: Source) -> RankReport:
    """A report with what was read of the source's metadata, all that it takes to read anything."""
    fetched, requests = report.bytes_fetched + source.bytes_read, report.requests + source.requests
    return replace(report, bytes_fetched=fetched, requests=requests)
