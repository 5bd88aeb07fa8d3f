"""Boxes of a checkpoint into tensors: check, plan, carry out. What every way to load goes through."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.profiler import record_function

from ...planner.box import Box
from ...planner.coalesce import MAX_REQUEST_BYTES
from ...planner.errors import ShapeMismatchError
from ...planner.read_plan import Want, plan_reads
from ..errors import ArgumentError, CorruptCheckpointError, DestinationError
from ..formats.source import Source
from ..formats.value_codec import MAX_VALUE_BYTES, decode_value
from ..runtime.limits import check_budget, default_budget
from ..runtime.logs import logger_of
from ..runtime.process_group import Interrupt, never
from ..runtime.progress import Meter
from ..runtime.reports import RankReport, added
from ..runtime.torch_modes import writing_to
from ..tensors.casts import check_cast, check_integers, check_is_not_scaled, needs_check, scale_names
from ..tensors.dtypes import as_array, from_bytes, torch_dtype
from ..tensors.overlaps import find_overlaps, overlaps_itself
from ..tensors.splitting import group_by_bytes, row_boxes
from ..tensors.tensor_classes import copy_into, memory_of, missing_memory, overrides_dispatch
from .executor import execute
from .same_chunks import same_chunks
from .workers import Workers

logger = logger_of(__name__)


def check_is_tensor(source: Source, name: str) -> None:
    """Raises DestinationError where the checkpoint has an object of this name, MissingTensorError for nothing."""
    if not source.entry(name).is_tensor:
        raise DestinationError(f"{name!r} is an object in the checkpoint, and cannot be loaded into a tensor")


def value_wants(source: Source, names: Iterable[str]) -> list[Want]:
    """What is to be read for objects: nothing for those whose bytes are here. Raises MissingTensorError."""
    return [Want(name, Box.whole(source.entry(name).shape)) for name in names if name not in source.inline]


def check_values(source: Source, names: Iterable[str], budget_bytes: int | None) -> None:
    """Raise ArgumentError if objects that are read together take more bytes than a budget that was given."""
    if budget_bytes is None:
        return
    nbytes = {name: source.entry(name).numel for name in names}
    total = sum(nbytes.values())
    if total > budget_bytes:
        largest = max(nbytes, key=lambda name: nbytes[name])
        raise ArgumentError(
            f"the objects of {source.location} that are read take {total} bytes, most of them {largest!r} with "
            f"{nbytes[largest]}, and budget_bytes is {budget_bytes}: give a budget that holds them"
        )


class StoredValue:
    """An object of a checkpoint: the bytes that it is read into, and what they mean.

    Raises MissingTensorError where the checkpoint has none of this name, and CorruptCheckpointError where it would be
    larger than any that is saved.
    """

    def __init__(self, source: Source, name: str) -> None:
        entry = source.entry(name)
        self.name = name
        self.kind = entry.kind
        self.wants = value_wants(source, [name])
        """What is to be read for it: nothing, where it is here."""
        source.index(self.wants)  # what it says is checked before memory is taken on its word
        if entry.numel > MAX_VALUE_BYTES:
            raise CorruptCheckpointError(
                f"object {name!r} in {source.location} has {entry.numel} bytes, and none may have more than "
                f"{MAX_VALUE_BYTES}"
            )
        here = source.inline.get(name)
        self._tensor = (
            torch.empty(entry.shape, dtype=torch.uint8, device="cpu")
            if here is None
            else from_bytes(np.frombuffer(here, np.uint8), torch.uint8, entry.shape)
        )
        self.tensors = [self._tensor for _ in self.wants]

    @property
    def data(self) -> bytes:
        return bytes(self._tensor.numpy())

    def value(self, *, allow_pickle: bool = False) -> Any:
        """The object. Raises UnsafeValueError, CorruptCheckpointError."""
        return decode_value(self.name, self.kind, self.data, allow_pickle=allow_pickle)


@dataclass(frozen=True, slots=True)
class TensorCopy:
    """Values that are in memory already, as those of an object of the checkpoint, and the tensor that they go to."""

    name: str
    values: torch.Tensor
    destination: torch.Tensor


@dataclass(frozen=True, slots=True)
class BoxReads:
    """Boxes to read and the tensors that they go to, checked to fit each other.

    Most are read straight into their destination. Those of two kinds are read into memory of their own first: integers
    that may not fit the destination's dtype, and tensors whose class has to be asked to write to them.
    """

    wants: tuple[Want, ...]
    destinations: tuple[torch.Tensor, ...]
    direct: tuple[int, ...]
    """Which of them are read straight into their destination."""
    checked: tuple[int, ...]
    """Which hold integers that may not fit."""
    through_class: tuple[int, ...]
    """Which are written by their class's own `copy_`."""
    given: tuple[TensorCopy, ...]

    @classmethod
    def of(
        cls,
        source: Source,
        wants: Sequence[Want],
        destinations: Sequence[torch.Tensor],
        given: Sequence[TensorCopy] = (),
    ) -> BoxReads:
        """Check that boxes can be read into tensors. Nothing is changed.

        Args:
            wants: one for each destination.
            destinations: of the sizes of the boxes, on any device.
            given: values that go to tensors with them.

        Raises:
            DtypeError: a stored dtype cannot be cast to that of its destination, or a given integer does not fit.
            DestinationError: a destination has no dense memory, or shares memory with itself or with another one that
                other values are stored for.
            ShapeMismatchError, MissingTensorError, CorruptCheckpointError, StoreError.
        """
        direct: list[int] = []
        checked: list[int] = []
        through_class: list[int] = []
        scales: list[str] | None = None
        for at, (want, destination) in enumerate(zip(wants, destinations, strict=True)):
            stored = torch_dtype(source.entry(want.name).dtype)
            if stored.itemsize == 1 and scales is None:
                scales = scale_names(entry.name for entry in source.entries)
            check_is_not_scaled(want.name, stored, destination.dtype, scales or ())
            _check_destination(want.name, destination, stored, want.box.sizes)
            if overrides_dispatch(destination):
                through_class.append(at)
            elif needs_check(stored, destination.dtype):
                checked.append(at)
            else:
                direct.append(at)
        for value in given:
            _check_destination(value.name, value.destination, value.values.dtype, tuple(value.values.shape))
            if needs_check(value.values.dtype, value.destination.dtype):
                check_integers(value.name, value.values, value.destination.dtype)
        dropped = _repeated(source, wants, destinations, given)
        return cls(
            tuple(wants),
            tuple(destinations),
            tuple(at for at in direct if at not in dropped),
            tuple(at for at in checked if at not in dropped),
            tuple(at for at in through_class if at not in dropped),
            tuple(given),
        )


def _check_destination(name: str, destination: torch.Tensor, stored: torch.dtype, sizes: tuple[int, ...]) -> None:
    reason = missing_memory(destination)
    if reason:
        raise DestinationError(f"{name!r} {reason}; it cannot be loaded into")
    check_cast(name, stored, destination.dtype)
    if not overrides_dispatch(destination) and overlaps_itself(destination):
        is_expanded = 0 in destination.stride()
        raise DestinationError(
            f"{name!r} {'is expanded' if is_expanded else 'overlaps itself'}: its elements share memory. Load into a "
            "clone of it"
        )
    if tuple(destination.shape) != sizes:
        raise ShapeMismatchError(
            f"{name!r}: the destination has shape {tuple(destination.shape)}, what is read {sizes}"
        )


def _repeated(
    source: Source, wants: Sequence[Want], destinations: Sequence[torch.Tensor], given: Sequence[TensorCopy]
) -> set[int]:
    """Which wants need not be read, for their destination is that of another one with the same values.

    Raises DestinationError where destinations share memory otherwise.
    """
    targets = [*destinations, *(value.destination for value in given)]
    memories = [(at, memory) for at, target in enumerate(targets) if (memory := memory_of(target)) is not None]
    dropped: set[int] = set()
    for overlap in find_overlaps([memory for _, memory in memories]):
        first, second = memories[overlap.first][0], memories[overlap.second][0]
        is_same = overlap.is_same and type(targets[first]) is type(targets[second])
        if second < len(wants):
            names = wants[first].name, wants[second].name
            if is_same and (names[0] == names[1] or _same_values(source, wants[first], wants[second])):
                dropped.add(second)
                continue
        elif first < len(wants):
            names, is_same = (wants[first].name, given[second - len(wants)].name), False
        else:
            one, two = given[first - len(wants)], given[second - len(wants)]
            names = one.name, two.name
            if is_same and one.values.dtype == two.values.dtype and _equal(one.values, two.values):
                continue
        how = "are the same memory, and different values are stored for them" if is_same else "share memory"
        which = f"{names[0]!r} and {names[1]!r}" if names[0] != names[1] else f"two parts of {names[0]!r}"
        raise DestinationError(
            f"the destinations of {which} {how}: load into tensors of their own, or leave out one of them"
        )
    return dropped


def _same_values(source: Source, first: Want, second: Want) -> bool:
    """Whether the same values are stored for two boxes; where the index does not show it, they are read."""
    entries = source.entry(first.name), source.entry(second.name)
    if first.box != second.box or entries[0].dtype != entries[1].dtype:
        return False
    index = source.index([first, second])
    if same_chunks(index, first.name, index, second.name):
        return True
    dtype = torch_dtype(entries[0].dtype)
    for rows in row_boxes(first.box.sizes, entries[0].dtype):
        box = Box(tuple(a + b for a, b in zip(rows.offsets, first.box.offsets, strict=True)), rows.sizes)
        parts = [torch.empty(box.sizes, dtype=dtype, device="cpu") for _ in range(2)]
        read_boxes(source, [Want(first.name, box), Want(second.name, box)], parts)
        if not _equal(*parts):
            return False
    return True


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same bits."""
    return bool(np.array_equal(as_array(a), as_array(b)))


def read_boxes(
    source: Source,
    wants: Sequence[Want],
    destinations: Sequence[torch.Tensor],
    *,
    blobs: Sequence[StoredValue] = (),
    rank: int = 0,
    budget_bytes: int | None = None,
    max_over_read: float | None = None,
    interrupt: Interrupt = never,
    meter: Meter | None = None,
    workers: Workers | None = None,
) -> RankReport:
    """Read boxes into tensors of their sizes, in place, and `blobs` with them.

    Raises as `BoxReads.of`, before anything is read, and as `carry_out`.
    """
    return carry_out(
        source,
        BoxReads.of(source, wants, destinations),
        blobs=blobs,
        rank=rank,
        budget_bytes=budget_bytes,
        max_over_read=max_over_read,
        interrupt=interrupt,
        meter=meter,
        workers=workers,
    )


def carry_out(
    source: Source,
    reads: BoxReads,
    *,
    blobs: Sequence[StoredValue] = (),
    rank: int = 0,
    budget_bytes: int | None = None,
    max_over_read: float | None = None,
    interrupt: Interrupt = never,
    meter: Meter | None = None,
    workers: Workers | None = None,
) -> RankReport:
    """Read boxes into tensors, in place, and `blobs` with them.

    What can still be refused comes first: integers are checked before anything is written, and tensors that are written
    by their class before all others.

    Raises:
        DtypeError: an integer does not fit. Nothing was changed.
        DestinationError: the `copy_` of a tensor's class does not work.
        CorruptCheckpointError, StoreError: as `reader.execute`.
    """
    begin = time.perf_counter()
    check_budget(budget_bytes)
    budget = default_budget() if budget_bytes is None else budget_bytes
    meter = meter or Meter("load")
    report = RankReport(rank)

    def read(wants: Sequence[Want], destinations: Sequence[torch.Tensor]) -> None:
        nonlocal report
        report = added(report, _read(source, wants, destinations, budget, max_over_read, interrupt, meter, workers))

    def staged(positions: Sequence[int]) -> list[torch.Tensor]:
        """Values as they are stored, or, where integers need no check, as the destination has them."""
        tensors = []
        for at in positions:
            want, to = reads.wants[at], reads.destinations[at].dtype
            stored = torch_dtype(source.entry(want.name).dtype)
            dtype = stored if needs_check(stored, to) else to
            tensors.append(torch.empty(want.box.sizes, dtype=dtype, device="cpu"))
        read([reads.wants[at] for at in positions], tensors)
        for at, tensor in zip(positions, tensors, strict=True):
            if needs_check(tensor.dtype, reads.destinations[at].dtype):
                check_integers(reads.wants[at].name, tensor, reads.destinations[at].dtype)
        return tensors

    def in_budget(positions: Sequence[int]) -> list[list[int]]:
        groups = group_by_bytes([_Staged(at, reads.destinations[at]) for at in positions], budget)
        return [[part.at for part in group] for group in groups]

    integers = in_budget(reads.checked)
    held = staged(integers[0]) if len(integers) == 1 else []
    for group in integers if len(integers) > 1 else []:
        staged(group)  # those that do not fit the budget together are checked first, and read again to be written
    for group in in_budget(reads.through_class):
        for at, tensor in zip(group, staged(group), strict=True):
            destination = reads.destinations[at]
            copy_into(reads.wants[at].name, destination, tensor.to(destination.device, destination.dtype))
    for group in integers:
        for at, tensor in zip(group, held or staged(group), strict=True):
            with writing_to(reads.destinations[at]):
                reads.destinations[at].copy_(tensor)
    held.clear()
    read(
        [*(reads.wants[at] for at in reads.direct), *(want for blob in blobs for want in blob.wants)],
        [*(reads.destinations[at] for at in reads.direct), *(tensor for blob in blobs for tensor in blob.tensors)],
    )
    for value in reads.given:
        if overrides_dispatch(value.destination):
            values = value.values.to(value.destination.device, value.destination.dtype)
            copy_into(value.name, value.destination, values)
        else:
            with writing_to(value.destination):
                value.destination.copy_(value.values)
    needed = sum(destination.nbytes for destination in reads.destinations)
    needed += sum(tensor.nbytes for blob in blobs for tensor in blob.tensors)
    seconds = {**report.seconds, "total": time.perf_counter() - begin}
    return replace(report, bytes_needed=needed, seconds=seconds)


@dataclass(frozen=True, slots=True)
class _Staged:
    """A destination that is read into memory of its own first, by its position."""

    at: int
    destination: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.destination.numel() * self.destination.dtype.itemsize


def _read(
    source: Source,
    wants: Sequence[Want],
    destinations: Sequence[torch.Tensor],
    budget: int,
    max_over_read: float | None,
    interrupt: Interrupt,
    meter: Meter,
    workers: Workers | None,
) -> RankReport:
    """Plan and execute one read."""
    begin = time.perf_counter()
    narrowed = [
        Want(want.name, want.box, heads_only=destination.dtype is torch.bfloat16)
        for want, destination in zip(wants, destinations, strict=True)
    ]
    index = source.index(wants)
    most = min(MAX_REQUEST_BYTES, budget // 4)  # so that several are under way, whatever the budget
    with record_function("reshard.plan"):
        plan = plan_reads(index, narrowed, gaps=source.gaps(max_over_read), max_request_bytes=max(most, 1))
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
    source.observe(plan.requests.nbytes, time.perf_counter() - planned)
    return RankReport(
        rank=0,
        bytes_fetched=plan.requests.nbytes,
        requests=plan.report.requests,
        chunks=plan.report.chunks,
        seconds={"plan": planned - begin, "fetch": stats.fetch_s, "decode": stats.decode_s},
    )


def counting_metadata(report: RankReport, source: Source) -> RankReport:
    """A report with what was read of the source's metadata, all that it takes to read anything."""
    fetched, requests = report.bytes_fetched + source.bytes_read, report.requests + source.requests
    return replace(report, bytes_fetched=fetched, requests=requests)
