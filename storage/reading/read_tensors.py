"""Reads boxes of a checkpoint into tensors: checks the destinations, plans the requests and executes the plan.

All functions that load tensors end here.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.autograd.graph import increment_version
from torch.profiler import record_function

from ...planner.box import Box
from ...planner.chunk_reads import WantedBox
from ...planner.coalesce import MAX_REQUEST_BYTES
from ...planner.errors import ShapeMismatchError
from ...planner.index import CheckpointIndex
from ...planner.read_plan import ReadPlan, plan_reads
from ..errors import DestinationError
from ..formats.source import Source
from ..runtime.arguments import check_nbytes
from ..runtime.devices import synchronize
from ..runtime.limits import budget_of
from ..runtime.logs import logger_of
from ..runtime.process_group import Interrupt, never
from ..runtime.progress import Meter
from ..runtime.reports import RankReport, added
from ..runtime.torch_modes import writing_to
from ..tensors.casts import ScaleNames, check_cast, check_integers, check_is_not_scaled, needs_check
from ..tensors.dtypes import as_array, torch_dtype
from ..tensors.overlaps import find_overlaps, overlaps_itself
from ..tensors.splitting import MAX_PIECE_BYTES, group_by_bytes, row_boxes
from ..tensors.tensor_classes import copy_into, memory_of, missing_memory, overrides_dispatch
from .executor import ReadStats, execute
from .same_chunks import same_chunks
from .shared_fetcher import SharedFetcher
from .shared_read import SharedPart, SharedRead
from .value_buffers import ValueBuffer
from .workers import Workers

logger = logger_of(__name__)


def check_is_tensor(source: Source, name: str) -> None:
    """Check that an entry of a checkpoint is a tensor.

    Raises:
        DestinationError: it is a value.
        MissingTensorError: the checkpoint has no entry of this name.
    """
    if not source.entry(name).is_tensor:
        raise DestinationError(
            f"{name!r} is a value in the checkpoint, and cannot be loaded into a tensor: read it with "
            "Checkpoint.read_value, or replace the tensor by a value of that type"
        )


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How boxes are read."""

    rank: int = 0
    """The rank that the report names."""
    budget_bytes: int | None = None
    """Memory for data that has been fetched and not been written yet. `default_budget()` if it is None."""
    max_over_read: float | None = None
    """Bytes in gaps that requests may read over, as a fraction of the stored bytes that are wanted.

    If it is None, the source decides.
    """
    interrupt: Interrupt = never
    """Called regularly. If it raises an error, the read stops with this error."""
    meter: Meter | None = None
    """Reports the progress."""
    workers: Workers | None = None
    """Threads that several reads share. If it is None, the read starts its own."""
    shared_read: SharedRead | None = None
    """What the ranks agreed on. They may share the boxes that are read straight into their destinations."""


@dataclass(frozen=True, slots=True)
class DecodedTensor:
    """A tensor that is already in memory, as a part of a decoded value, and the tensor that it is copied to."""

    name: str
    offsets: tuple[int, ...]
    """The position of its first element in the tensor of that name."""
    values: torch.Tensor
    destination: torch.Tensor


@dataclass(frozen=True, slots=True)
class CheckedBoxes:
    """Boxes to read and their destinations, after a check that they match.

    Most boxes are read straight into their destination. Two kinds are first read into a temporary tensor: integers that
    may not fit the dtype of the destination, and destinations that only their class can write to.
    """

    wants: tuple[WantedBox, ...]
    destinations: tuple[torch.Tensor, ...]
    direct: tuple[int, ...]
    """Positions of the boxes that are read straight into their destination."""
    checked: tuple[int, ...]
    """Positions of the boxes whose integers may not fit."""
    through_class: tuple[int, ...]
    """Positions of the boxes that are written by the `copy_` of the destination's class."""
    decoded: tuple[DecodedTensor, ...]
    compared: RankReport
    """What was read to compare the values of two names that have one destination."""

    @property
    def direct_wants(self) -> list[WantedBox]:
        """The boxes that are read straight into their destination, with only the heads if these are enough."""
        return with_heads_only(
            [self.wants[at] for at in self.direct], [self.destinations[at].dtype for at in self.direct]
        )

    @classmethod
    def of(
        cls,
        source: Source,
        wants: Sequence[WantedBox],
        destinations: Sequence[torch.Tensor],
        decoded: Sequence[DecodedTensor] = (),
        options: ReadOptions | None = None,
    ) -> CheckedBoxes:
        """Check that boxes can be read into tensors. No tensor is changed.

        If two names have one destination and the index does not show that their values are the same, both are read.

        Args:
            wants: the boxes, one for each destination.
            destinations: tensors with the sizes of the boxes, on any device.
            decoded: tensors in memory that are copied after the read.
            options: how values are read to compare them.

        Raises:
            DtypeError: a stored dtype cannot be cast to the dtype of its destination, or an integer of `decoded` does
                not fit.
            DestinationError: a destination has no dense memory, its elements share memory, or it shares memory with
                a destination of other values.
            ShapeMismatchError: a destination has another shape than its box.
            MissingTensorError, CorruptCheckpointError, StoreError: the metadata cannot be read.
        """
        direct: list[int] = []
        checked: list[int] = []
        through_class: list[int] = []
        scales = ScaleNames(entry.name for entry in source.entries)
        for at, (want, destination) in enumerate(zip(wants, destinations, strict=True)):
            stored = torch_dtype(source.entry(want.name).dtype)
            check_is_not_scaled(want.name, stored, destination.dtype, scales)
            _check_destination(want.name, destination, stored, want.box.sizes)
            if overrides_dispatch(destination):
                through_class.append(at)
            elif needs_check(stored, destination.dtype):
                checked.append(at)
            else:
                direct.append(at)
        for value in decoded:
            _check_destination(value.name, value.destination, value.values.dtype, tuple(value.values.shape))
            if needs_check(value.values.dtype, value.destination.dtype):
                check_integers(value.name, value.values, value.destination.dtype, value.offsets)
        comparison = _Comparison(source, options or ReadOptions())
        repeated = _find_repeated(comparison, wants, destinations, decoded)
        return cls(
            tuple(wants),
            tuple(destinations),
            tuple(at for at in direct if at not in repeated),
            tuple(at for at in checked if at not in repeated),
            tuple(at for at in through_class if at not in repeated),
            tuple(decoded),
            comparison.report,
        )


def _check_destination(name: str, destination: torch.Tensor, stored: torch.dtype, sizes: tuple[int, ...]) -> None:
    reason = missing_memory(destination)
    if reason:
        raise DestinationError(f"{name!r} {reason}, so nothing can be loaded into it")
    check_cast(name, stored, destination.dtype)
    if not overrides_dispatch(destination) and overlaps_itself(destination):
        is_expanded = 0 in destination.stride()
        raise DestinationError(
            f"{name!r} {'is expanded' if is_expanded else 'overlaps itself'}: its elements share memory. Load into a "
            "clone of it"
        )
    if tuple(destination.shape) != sizes:
        raise ShapeMismatchError(
            f"{name!r}: the destination has shape {tuple(destination.shape)}, but the box to read has shape {sizes}"
        )


def _find_repeated(
    comparison: _Comparison,
    wants: Sequence[WantedBox],
    destinations: Sequence[torch.Tensor],
    decoded: Sequence[DecodedTensor],
) -> set[int]:
    """Return the positions of boxes that need not be read, because another box has the same values and destination.

    Raises:
        DestinationError: other destinations share memory.
    """
    all_destinations = [*destinations, *(value.destination for value in decoded)]
    memories = [
        (at, memory)
        for at, destination in enumerate(all_destinations)
        if (memory := memory_of(destination)) is not None
    ]
    repeated: set[int] = set()
    for overlap in find_overlaps([memory for _, memory in memories]):
        first, second = memories[overlap.first][0], memories[overlap.second][0]
        is_same = overlap.is_same and type(all_destinations[first]) is type(all_destinations[second])
        if second < len(wants):
            names = wants[first].name, wants[second].name
            if is_same and comparison.are_equal(wants[first], wants[second]):
                repeated.add(second)
                continue
        elif first < len(wants):
            names, is_same = (wants[first].name, decoded[second - len(wants)].name), False
        else:
            one, two = decoded[first - len(wants)], decoded[second - len(wants)]
            names = one.name, two.name
            if is_same and one.values.dtype == two.values.dtype and _have_same_bits(one.values, two.values):
                continue
        problem = "are the same memory, but the checkpoint has different values for them" if is_same else "share memory"
        which = f"{names[0]!r} and {names[1]!r}" if names[0] != names[1] else f"two parts of {names[0]!r}"
        raise DestinationError(
            f"the destinations of {which} {problem}: load into tensors that do not share memory, or leave out one of "
            "them"
        )
    return repeated


class _Comparison:
    """Compares stored values with each other.

    Args:
        options: how values are read. The progress is not reported, and the read is not shared.
    """

    def __init__(self, source: Source, options: ReadOptions) -> None:
        self._source = source
        self._options = replace(options, meter=None, workers=None, shared_read=None)
        self.report = RankReport(options.rank)
        """What was read."""

    def are_equal(self, first: WantedBox, second: WantedBox) -> bool:
        """Return whether two boxes have the same stored values. If the index does not show it, read the values."""
        source = self._source
        entries = source.entry(first.name), source.entry(second.name)
        if first.box != second.box or entries[0].dtype != entries[1].dtype:
            return False
        index = source.index([first, second])
        if same_chunks(index, first.name, index, second.name):
            return True
        dtype = torch_dtype(entries[0].dtype)
        max_bytes = min(MAX_PIECE_BYTES, budget_of(self._options.budget_bytes) // 2)
        for box in _row_boxes_of(first.box, entries[0].dtype, max_bytes):
            parts = [torch.empty(box.sizes, dtype=dtype, device="cpu") for _ in range(2)]
            wants = [WantedBox(first.name, box), WantedBox(second.name, box)]
            self.report = added(self.report, read_boxes(source, wants, parts, options=self._options))
            if not _have_same_bits(*parts):
                return False
        return True


def _row_boxes_of(box: Box, dtype: str, max_bytes: int) -> Iterator[Box]:
    """Split a box of a tensor into boxes of whole rows. See `row_boxes`."""
    for rows in row_boxes(box.sizes, dtype, max_bytes):
        yield Box(tuple(a + b for a, b in zip(rows.offsets, box.offsets, strict=True)), rows.sizes)


def _have_same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(np.array_equal(as_array(a), as_array(b)))


def read_boxes(
    source: Source,
    wants: Sequence[WantedBox],
    destinations: Sequence[torch.Tensor],
    values: Sequence[ValueBuffer] = (),
    options: ReadOptions | None = None,
) -> RankReport:
    """Check that boxes can be read into tensors, and read them. See `CheckedBoxes.of` and `execute_reads`.

    Raises:
        CheckpointError: as `CheckedBoxes.of`, before anything is read, and as `execute_reads`.
    """
    checked = CheckedBoxes.of(source, wants, destinations, options=options)
    return execute_reads(source, checked, values, options)


def execute_reads(
    source: Source, reads: CheckedBoxes, values: Sequence[ValueBuffer] = (), options: ReadOptions | None = None
) -> RankReport:
    """Read boxes into their destinations, in place, and the bytes of values into their buffers.

    What can still fail comes first: integers are checked before any tensor is written, and tensors that their class
    writes come before all others.

    Raises:
        DtypeError: an integer does not fit the dtype of its destination. No tensor was changed.
        DestinationError: the `copy_` of a tensor's class failed.
        CorruptCheckpointError, StoreError: as `executor.execute`.
    """
    begin = time.perf_counter()
    run = _ReadRun(source, reads, options or ReadOptions())
    run.read_through_memory()
    run.read_direct(values)
    for value in reads.decoded:
        _copy_values(value.name, value.values, value.destination)
    needed = sum(destination.nbytes for destination in reads.destinations)
    needed += sum(tensor.nbytes for value in values for tensor in value.tensors)
    seconds = {**run.report.seconds, "total": time.perf_counter() - begin}
    return replace(run.report, bytes_needed=needed, seconds=seconds)


class _ReadRun:
    """One call of `execute_reads`. It consists of several reads, whose reports are added up."""

    def __init__(self, source: Source, reads: CheckedBoxes, options: ReadOptions) -> None:
        check_nbytes(budget_bytes=options.budget_bytes)
        self._source = source
        self._reads = reads
        self._options = options
        self._budget = budget_of(options.budget_bytes)
        self._meter = options.meter or Meter("load")
        self.report = added(RankReport(options.rank), reads.compared)

    def read_through_memory(self) -> None:
        """Read the boxes that need a temporary tensor, check their integers, and copy them to their destinations."""
        of_classes = list(map(self._temporary, self._reads.through_class))
        integers = self._groups_in_budget(
            (
                *(one for one in of_classes if one.needs_check),
                *(part for at in self._reads.checked for part in self._parts(at)),
            )
        )
        others = self._groups_in_budget(one for one in of_classes if not one.needs_check)
        kept = self._read_temporaries(integers[0]) if len(integers) == 1 and not others else None
        if kept is None:
            for group in integers:  # too large for the budget: they are checked first, and read again to be written
                self._read_temporaries(group)
        for group in others:
            _copy_all(group, self._read_temporaries(group))
        for group in integers:
            _copy_all(group, kept or self._read_temporaries(group))

    def read_direct(self, values: Sequence[ValueBuffer]) -> None:
        """Read the other boxes straight into their destinations, and the bytes of values with them."""
        wants = [*self._reads.direct_wants, *(want for value in values for want in value.wants)]
        destinations = [self._reads.destinations[at] for at in self._reads.direct]
        destinations += [tensor for value in values for tensor in value.tensors]
        increment_version(destinations)  # autograd does not see what is written through other views of the memory
        shared_read = self._options.shared_read
        if shared_read is not None and shared_read.part is not None:
            self._read_shared(destinations, shared_read.part)
        else:
            self._read(wants, destinations)

    def _temporary(self, at: int) -> _Temporary:
        """Return what a whole box is read into before it is copied to its destination."""
        want, destination = self._reads.wants[at], self._reads.destinations[at]
        stored = torch_dtype(self._source.entry(want.name).dtype)
        dtype = stored if needs_check(stored, destination.dtype) else destination.dtype
        return _Temporary(want.name, want.box, dtype, destination)

    def _parts(self, at: int) -> Iterator[_Temporary]:
        """Yield the temporary tensors of a box, which is split if it exceeds the budget."""
        whole = self._temporary(at)
        if whole.nbytes <= self._budget:
            yield whole
            return
        for box in _row_boxes_of(whole.box, self._source.entry(whole.name).dtype, self._budget):
            rows = whole.destination.detach()[box.relative_to(whole.box).slices]
            yield replace(whole, box=box, destination=rows)

    def _groups_in_budget(self, temporaries: Iterable[_Temporary]) -> list[list[_Temporary]]:
        return list(group_by_bytes(temporaries, self._budget))

    def _read_temporaries(self, group: Sequence[_Temporary]) -> list[torch.Tensor]:
        """Read boxes into temporary tensors, and check their integers."""
        tensors = [torch.empty(one.box.sizes, dtype=one.dtype, device="cpu") for one in group]
        wants = [WantedBox(one.name, one.box) for one in group]
        self._read(with_heads_only(wants, [one.dtype for one in group]), tensors)
        for one, tensor in zip(group, tensors, strict=True):
            if one.needs_check:
                check_integers(one.name, tensor, one.destination.dtype, one.box.offsets)
        return tensors

    def _read(self, wants: Sequence[WantedBox], destinations: Sequence[torch.Tensor]) -> None:
        """Plan one read, execute it, and add its report."""
        begin = time.perf_counter()
        source = self._source
        index = source.index(wants)
        with record_function("reshard.plan"):
            gap_limits = source.gap_limits(self._options.max_over_read)
            plan = plan_reads(index, wants, gap_limits=gap_limits, max_request_bytes=self._max_request_bytes)
        planned = time.perf_counter()
        stats = self._execute(plan, index, destinations, self._options.budget_bytes, self._options.workers)
        source.observe(plan.requests.nbytes, time.perf_counter() - planned)
        self._add(plan, stats, planned - begin)

    def _read_shared(self, destinations: Sequence[torch.Tensor], part: SharedPart) -> None:
        """Execute this rank's part of a read that ranks share, and add its report."""
        begin = time.perf_counter()
        gap_limits = self._source.gap_limits(self._options.max_over_read)
        plan = part.plan(gap_limits, self._max_request_bytes)
        planned = time.perf_counter()
        fetcher = SharedFetcher(self._source.store, part.share.units, part.peers, self._budget // 4)
        with Workers(self._source.store, fetcher) as workers:
            stats = self._execute(plan, part.index, destinations, self._budget // 2, workers, fetcher.check)
            fetcher.finish(self._meter.watching(self._options.interrupt))
        self._add(plan, stats, planned - begin)

    @property
    def _max_request_bytes(self) -> int:
        return max(min(MAX_REQUEST_BYTES, self._budget // 4), 1)  # several requests run at once, whatever the budget

    def _execute(
        self,
        plan: ReadPlan,
        index: CheckpointIndex,
        destinations: Sequence[torch.Tensor],
        budget_bytes: int | None,
        workers: Workers | None,
        check: Interrupt = never,
    ) -> ReadStats:
        """Execute a plan.

        Args:
            check: called regularly, as `ReadOptions.interrupt` is.
        """
        self._meter.expect(plan.requests.nbytes)
        logger.debug("%s: %r", self._source.location, plan)
        for device in {destination.device for destination in destinations}:
            synchronize(device)  # the caller may still compute with the destinations, and reads use other streams
        watching = self._meter.watching(self._options.interrupt)

        def interrupt() -> None:
            watching()
            check()

        with record_function("reshard.read"):
            return execute(
                plan,
                index,
                self._source.store,
                destinations,
                budget_bytes=budget_bytes,
                interrupt=interrupt,
                placed=self._meter.add,
                workers=workers,
            )

    def _add(self, plan: ReadPlan, stats: ReadStats, plan_s: float) -> None:
        """Add a read to the report."""
        fetched, exchange = plan.fetched, plan.exchange
        report = RankReport(
            rank=0,
            bytes_fetched=fetched.nbytes,
            requests=fetched.byte_ranges,
            chunks=sum(map(len, plan.reads)),
            seconds={"plan": plan_s, **stats.seconds},
            bytes_sent=exchange.bytes_sent if exchange else 0,
            bytes_received=exchange.bytes_received if exchange else 0,
            decoded_by=stats.decoded_by,
        )
        self.report = added(self.report, report)


def with_heads_only(wants: Iterable[WantedBox], dtypes: Iterable[torch.dtype]) -> list[WantedBox]:
    """Return the wants, with only the heads of float32 values for destinations of bfloat16.

    Args:
        dtypes: those of the destinations.
    """
    return [
        WantedBox(want.name, want.box, heads_only=dtype is torch.bfloat16)
        for want, dtype in zip(wants, dtypes, strict=True)
    ]


def _copy_values(name: str, values: torch.Tensor, destination: torch.Tensor) -> None:
    if overrides_dispatch(destination):
        copy_into(name, destination, values.to(destination.device, destination.dtype))
    else:
        with writing_to(destination):
            destination.copy_(values)


def _copy_all(group: Sequence[_Temporary], tensors: Sequence[torch.Tensor]) -> None:
    for one, tensor in zip(group, tensors, strict=True):
        _copy_values(one.name, tensor, one.destination)


@dataclass(frozen=True, slots=True)
class _Temporary:
    """A box that is first read into a temporary tensor, and its destination."""

    name: str
    box: Box
    dtype: torch.dtype
    """The dtype of the temporary tensor: the stored one if integers have to be checked, otherwise the destination's."""
    destination: torch.Tensor

    @property
    def nbytes(self) -> int:
        """The size of the temporary tensor."""
        return self.box.numel * self.dtype.itemsize

    @property
    def needs_check(self) -> bool:
        """Whether its integers may not fit the dtype of the destination."""
        return needs_check(self.dtype, self.destination.dtype)


def counting_metadata(report: RankReport, source: Source) -> RankReport:
    """Return a report that also counts the bytes and requests that opening the source took."""
    fetched, requests = report.bytes_fetched + source.bytes_read, report.requests + source.requests
    return replace(report, bytes_fetched=fetched, requests=requests)
