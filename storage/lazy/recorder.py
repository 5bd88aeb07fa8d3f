"""Records copies of lazy tensors, and executes them with as few reads as possible."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ...planner.box import Box
from ...planner.chunk_reads import WantedBox
from ...planner.errors import CheckpointError
from ...planner.read_plan import ReadPlan, plan_reads
from ...planner.strided import StridedView
from ..errors import ArgumentError, DestinationError
from ..formats.source import Source
from ..reading.read_tensors import CheckedBoxes, ReadOptions, execute_reads, with_heads_only
from ..reading.shared_read import Offer, SharedRead
from ..reading.value_buffers import whole_wants
from ..runtime.deferred_writes import executing, finish_writes, register, unregister
from ..runtime.limits import budget_of
from ..runtime.logs import logger_of
from ..runtime.process_group import portable, rank_of
from ..runtime.progress import Meter, OnProgress
from ..runtime.reports import RankReport, added
from ..runtime.torch_modes import leave_mode, without_torch_modes
from ..tensors.casts import ScaleNames, check_cast, check_is_not_scaled
from ..tensors.local_shards import local_shards
from ..tensors.overlaps import address_range, find_overlaps
from ..tensors.splitting import group_by_bytes
from ..tensors.tensor_classes import as_plain, is_whole, memories_of, missing_memory, overrides_dispatch
from .origins import MIN_RUN_BYTES, Origin, Resolution, Stored, Target, resolve
from .tensor import (
    ONLY_SHAPES,
    USES_AS_NUMBER,
    USES_OF_MEMORY,
    LazyTensor,
    call_composite,
    check_is_writable,
    function_name,
    is_composite,
    is_view,
)

logger = logger_of(__name__)
aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class PendingCopy:
    """A copy that has been recorded and not been executed."""

    destination: torch.Tensor
    """A plain tensor."""
    origin: Origin
    view: StridedView

    def overlaps(self, other: torch.Tensor) -> bool:
        """Return whether a plain tensor may share memory with the destination."""
        return bool(find_overlaps([self.destination, other]))

    def halves(self) -> list[PendingCopy]:
        """Return two copies that together do the same. The list is empty if there is only one element."""
        sizes = self.view.sizes
        if self.view.numel < 2:
            return []
        dim = sizes.index(max(sizes))
        middle = sizes[dim] // 2
        whole = Box.whole(sizes)
        return [
            replace(self, destination=self.destination[box.slices], view=self.view.narrow(box))
            for box in (whole.with_extent(dim, 0, middle), whole.with_extent(dim, middle, sizes[dim]))
        ]


@dataclass(slots=True, eq=False)
class _Written:
    """A range of addresses, and the pending copies that write to it."""

    begin: int
    end: int
    copies: list[PendingCopy]


class _Destinations:
    """The pending copies by the addresses that they write to.

    They are not kept by storage, because several storages may share memory: those of `torch.frombuffer`, numpy arrays
    and DLPack.
    """

    def __init__(self, copies: Iterable[PendingCopy] = ()) -> None:
        self._written: list[_Written] = []
        """Ranges that do not overlap, in order."""
        for copy in copies:
            self.add(copy)

    def add(self, copy: PendingCopy) -> None:
        begin, end = address_range(copy.destination)
        near = self._near(begin, end)
        found = self._written[near]
        if not found:
            self._written.insert(near.start, _Written(begin, end, [copy]))
            return
        first, *others = found
        first.begin, first.end = min(begin, first.begin), max(end, found[-1].end)
        for other in others:
            first.copies += other.copies
        first.copies.append(copy)
        del self._written[near.start + 1 : near.stop]

    def overlap(self, memory: torch.Tensor) -> bool:
        """Return whether a copy may write to the memory of a plain tensor."""
        if not self._written or not memory.numel():
            return False
        near = self._written[self._near(*address_range(memory))]
        return any(copy.overlaps(memory) for written in near for copy in written.copies)

    def _near(self, begin: int, end: int) -> slice:
        first = bisect_right(self._written, begin, key=lambda written: written.end)
        return slice(first, bisect_left(self._written, end, first, key=lambda written: written.begin))


class _Batch:
    """Copies that are read together, as reads and what follows them."""

    def __init__(self, resolved: list[Resolution]) -> None:
        self._resolved = resolved
        self._box_reads: CheckedBoxes | None = None

    def box_reads(self, source: Source) -> CheckedBoxes:
        """Check that the boxes can be read, and return them. This allocates the temporary tensors."""
        if self._box_reads is None:
            reads = [read for found in self._resolved for read in found.reads]
            wants = [WantedBox(read.name, read.box) for read in reads]
            source.index(wants)  # checks the metadata before tensors of these sizes are allocated
            self._box_reads = CheckedBoxes.of(source, wants, [read.target.tensor() for read in reads])
        return self._box_reads

    def finish(self) -> None:
        """Copy out of the temporary tensors, after they have been read."""
        for found in self._resolved:
            for copy_out in found.copies:
                copy_out.run()
            found.scratch.clear()
        self._box_reads = None


@dataclass(frozen=True, slots=True)
class LazyOptions:
    """How the recorded copies are read. See `reshard.load`."""

    budget_bytes: int | None = None
    max_over_read: float | None = None
    progress: OnProgress = False
    process_group: dist.ProcessGroup | None = None
    """The ranks that leave the block together. None if each rank reads by itself."""
    cooperative: object = "auto"


class CopyRecorder:
    """Records copies while it is open, and executes them together. When it is not open, it executes each at once.

    Only the thread that opened it is watched: before one of its functions uses memory that a copy recorded by any open
    recorder will write, the copies are executed. A copy of another thread is executed at once, with all recorded ones.

    Args:
        source: returns the open checkpoint, or raises the error of a closed one.
        options: how to read.
    """

    def __init__(self, source: Callable[[], Source], options: LazyOptions) -> None:
        self._source = source
        self._options = options
        self._budget = budget_of(options.budget_bytes)
        self._modes: tuple[_FunctionMode, _WatchMode] | None = None
        self._left_modes: tuple[_FunctionMode, _WatchMode] | tuple[()] = ()
        """The modes of the last block. One that ended it is still on torch's stack, without effect."""
        self._has_stopped = False
        """Whether a loop over a generator has stopped early, and its copies have failed."""
        self._thread = 0
        self._lock = threading.RLock()
        self._pending: list[PendingCopy] = []
        self._destinations = _Destinations()
        self._is_executing = False
        self._kept: OrderedDict[tuple[Origin, StridedView, torch.device], torch.Tensor] = OrderedDict()
        """Values that were read at once, the oldest first."""
        self._kept_bytes = 0
        self.report = RankReport(0)
        self.used: set[str] = set()
        """The names of the tensors that copies and reads need."""

    @property
    def is_open(self) -> bool:
        return self._modes is not None

    def open(self) -> None:
        """Begin to record, and to watch this thread."""
        for mode in self._left_modes:
            leave_mode(mode)
        self._modes = _FunctionMode(), _WatchMode()  # type: ignore[no-untyped-call]
        for mode in self._modes:
            mode.__enter__()  # type: ignore[no-untyped-call]
        self._thread = threading.get_ident()
        register(self)

    def close(self, failed: BaseException | None) -> None:
        """End recording. The recorded copies are executed, or forgotten if the block has failed.

        Args:
            failed: the error of the block. GeneratorExit is not an error: a loop over a generator has stopped early,
                so the copies are executed. If they fail, Python only prints the error. So they stay recorded, and the
                next function that uses a destination tries again and raises.

        Raises:
            ArgumentError: another thread opened the recorder. It stays open.
            CheckpointError: see `execute`.
        """
        if self._modes is not None and self._thread != threading.get_ident():
            raise ArgumentError("the block of these lazy tensors must be left in the thread that entered it")
        if isinstance(failed, GeneratorExit):
            try:
                self.execute_all()
            finally:
                self._has_stopped = bool(self._pending)
                if not self._has_stopped:
                    self._end()
            return
        self._leave()
        try:
            if failed is None:
                self.execute_all()
            elif self._options.process_group is not None:
                with suppress(CheckpointError):  # the error of the block is raised
                    self._execute_together(failed)
        finally:
            self._end()

    def _leave(self) -> None:
        """Stop watching the thread."""
        if self._modes is not None:
            self._left_modes, self._modes = self._modes, None
            for mode in self._left_modes:
                leave_mode(mode)

    def _end(self) -> None:
        """End the block, and forget what it has recorded."""
        self._leave()
        self._has_stopped = False
        unregister(self)
        self._take()
        self._kept.clear()
        self._kept_bytes = 0

    def copy(self, destination: torch.Tensor, source: LazyTensor, *, at_once: bool = True) -> None:
        """Copy a lazy tensor to a tensor of the same shape. See `Recorder.copy`.

        Raises:
            CheckpointError: see `record` and `execute`.
        """
        self.record(destination, source)
        is_watched = self.is_open and not self._has_stopped and self._thread == threading.get_ident()
        if at_once and not is_watched:
            self.execute()

    def record(self, destination: torch.Tensor, source: LazyTensor) -> None:
        """Record a copy of a lazy tensor to a tensor of the same shape.

        Raises:
            DestinationError: the destination has no memory.
            RuntimeError: elements of the destination share memory.
        """
        if destination.device.type == "meta":
            return  # torch does nothing either
        if not is_whole(destination):
            for box, local in local_shards("the destination", destination):
                self.record(local, source[box.slices])  # type: ignore[arg-type]
            return
        reason = missing_memory(destination)
        if reason:
            raise DestinationError(
                f"a lazy tensor of {_shown(source.origin)} cannot be copied: the destination {reason}"
            )
        finish_writes("copy_", [destination], excluded=self)
        if overrides_dispatch(destination) or destination.is_conj() or destination.is_neg():
            self.finish("copy_", [destination])
            view, device = source.strided_view, source.device
            destination.copy_(self.read(source.origin, view, device, f"copy_ to {type(destination)}", keep=True))
            return
        with torch._C.DisableTorchFunctionSubclass():
            plain = as_plain(destination)
        check_is_writable(plain)
        copy = PendingCopy(plain, source.origin, source.strided_view)
        with self._lock:
            self.used.update(source.origin.names)
            if copy.view.numel:
                self._pending.append(copy)
                self._destinations.add(copy)

    def finish(self, function: Any, tensors: Sequence[torch.Tensor]) -> None:
        """Execute the recorded copies if a function uses the memory that they write to."""
        if not self._pending and not self._is_executing:
            return
        with self._lock:  # another thread may be executing the copies
            if any(map(self._is_pending, tensors)):
                logger.info("the copies recorded so far are executed: %s uses one of the destinations", function)
                self.execute()

    def _is_pending(self, tensor: torch.Tensor) -> bool:
        return not isinstance(tensor, LazyTensor) and any(map(self._destinations.overlap, memories_of(tensor)))

    @without_torch_modes()
    def read(self, origin: Origin, view: StridedView, device: torch.device, reason: str, *, keep: bool) -> torch.Tensor:
        """Read a view of an origin into a new tensor. See `Recorder.read`."""
        key = (origin, view, device)
        with self._lock:
            if key in self._kept:
                return self._kept[key]
        logger.info("%s of %s reads its values at once", reason, _shown(origin))
        self.used.update(origin.names)
        self._check_metadata([origin])
        made = torch.empty(view.sizes, dtype=origin.dtype, device=device)
        if view.numel:
            self._execute([PendingCopy(made, origin, view)])
        if keep:
            self._keep(key, made)
        return made

    def _keep(self, key: tuple[Origin, StridedView, torch.device], values: torch.Tensor) -> None:
        with self._lock:
            if key in self._kept:  # another thread has read them, too
                return
            self._kept[key] = values
            self._kept_bytes += values.nbytes
            while self._kept_bytes > self._budget:
                _, oldest = self._kept.popitem(last=False)
                self._kept_bytes -= oldest.nbytes

    @without_torch_modes()
    def plan(self) -> ReadPlan:
        """Plan the reads of the recorded copies. Nothing is read but metadata."""
        with self._lock:
            pending = list(self._pending)
        source = self._source()
        reads = [read for copy in pending for read in self._resolution(copy).reads]
        wants = with_heads_only(
            [WantedBox(read.name, read.box) for read in reads], [read.target.dtype for read in reads]
        )
        gap_limits = source.gap_limits(self._options.max_over_read)
        return plan_reads(source.index(wants), wants, gap_limits=gap_limits)

    @without_torch_modes()
    def execute(self) -> None:
        """Execute the recorded copies. If that fails inside the block, they stay recorded.

        Raises:
            CheckpointError: see `reshard.load`.
        """
        with self._taken() as rounds:
            while rounds:
                self._execute(rounds[0])
                rounds.popleft()
        if self._has_stopped:  # the block has ended, and only its copies were left
            self._end()

    def execute_stopped(self) -> None:
        """Execute what a loop that stopped early has left, if its copies have failed. Raises what `execute` raises."""
        if self._has_stopped:
            self.execute()

    @contextmanager
    def _taken(self) -> Iterator[deque[list[PendingCopy]]]:
        """Take the recorded copies to execute them, in rounds. Inside the block, those that are left stay recorded."""
        with self._lock, executing():
            rounds = deque(_rounds(self._take()))
            self._is_executing = True
            try:
                yield rounds
            finally:
                self._is_executing = False
                if self.is_open:  # otherwise the caller gets the error, and nothing is left to do
                    self._pending[:0] = [copy for copies in rounds for copy in copies]
                    self._destinations = _Destinations(self._pending)

    def _take(self) -> list[PendingCopy]:
        with self._lock:
            pending, self._pending = self._pending, []
            self._destinations = _Destinations()
        return pending

    def _check_metadata(self, origins: Iterable[Origin]) -> None:
        """Read and check the metadata of tensors, before tensors of these sizes are allocated."""
        source = self._source()
        source.index(whole_wants(source, {name: None for origin in origins for name in origin.names}))

    def execute_all(self) -> None:
        """Execute the recorded copies, together with the other ranks if there are any.

        Raises:
            CheckpointError: see `reshard.load`. With other ranks, all raise the same error.
        """
        if self._options.process_group is None or self._has_stopped:
            self.execute()
        else:
            self._execute_together(None)

    @without_torch_modes()
    def _execute_together(self, failed: BaseException | None) -> None:
        """Execute the recorded copies of all ranks. Bytes that several ranks need may be read once. Collective.

        Args:
            failed: the error of this rank, which then has nothing to read.
        """
        batches: list[_Batch] = []
        shared_read = SharedRead(self._options.cooperative, self._budget, self._options.process_group)

        def prepare() -> Offer | None:
            if failed is not None:
                raise portable(failed)
            batches.extend(self._batches(rounds[0] if rounds else []))
            source = self._source()
            return shared_read.offer(source, lambda: batches[0].box_reads(source).direct_wants)

        def run() -> None:
            rank = rank_of(self._options.process_group)
            self._run(batches, ReadOptions(rank, interrupt=shared_read.alarm.check, shared_read=shared_read))
            for copies in list(rounds)[1:]:
                self._execute(copies)
            rounds.clear()

        with self._taken() as rounds:
            shared_read.run(prepare, run)

    def _execute(self, copies: Sequence[PendingCopy]) -> None:
        """Execute copies to memory that does not overlap."""
        self._run(self._batches(copies), ReadOptions(rank_of(None)))

    def _batches(self, copies: Sequence[PendingCopy]) -> list[_Batch]:
        """Resolve copies to memory that does not overlap, in batches whose temporary tensors fit the budget."""
        source = self._source()
        scales = ScaleNames(entry.name for entry in source.entries)
        for copy in copies:
            to = copy.destination.dtype
            if to != copy.origin.dtype:
                name = next(copy.origin.names)
                check_cast(name, copy.origin.dtype, to)
                check_is_not_scaled(name, copy.origin.dtype, to, scales)
        resolved = [found for copy in copies for found in self._resolve(copy)]
        direct = Resolution([read for found in resolved if not found.scratch for read in found.reads])
        groups = list(group_by_bytes((found for found in resolved if found.scratch), self._budget)) or [[]]
        groups[0].insert(0, direct)
        return [_Batch(group) for group in groups]

    def _run(self, batches: Sequence[_Batch], options: ReadOptions) -> None:
        """Read batches. Only the first one is shared with other ranks."""
        begin = time.perf_counter()
        source, mine = self._source(), self._options
        with Meter("load", mine.progress, location=source.location, rank=options.rank) as meter:
            options = replace(options, budget_bytes=mine.budget_bytes, max_over_read=mine.max_over_read, meter=meter)
            for batch in batches:
                report = execute_reads(source, batch.box_reads(source), (), options)
                batch.finish()
                options = replace(options, shared_read=None)
                with self._lock:
                    self.report = added(self.report, report)
        logger.debug("%d batches took %.3f s", len(batches), time.perf_counter() - begin)

    def _resolution(self, copy: PendingCopy) -> Resolution:
        target = Target.of(copy.destination)
        if self._options.max_over_read is None:
            return resolve(copy.origin, copy.view, target)
        return resolve(copy.origin, copy.view, target, min_box_bytes=0, min_run_bytes=MIN_RUN_BYTES)

    def _resolve(self, copy: PendingCopy) -> Iterator[Resolution]:
        """Resolve a copy, in parts whose temporary tensors fit the budget if possible."""
        found = self._resolution(copy)
        if found.nbytes > self._budget:
            halves = [self._resolution(half) for half in copy.halves()]
            if halves and max(half.nbytes for half in halves) <= found.nbytes * 3 // 4:
                for half in copy.halves():
                    yield from self._resolve(half)
                return
        yield found


def _rounds(copies: Sequence[PendingCopy]) -> list[list[PendingCopy]]:
    """Split copies into lists to execute one after another, so that copies to the same memory stay in order.

    A copy to exactly the same memory as an earlier one replaces it.
    """
    rounds: list[list[PendingCopy]] = []
    for near in _neighbours(copies):
        for number, ordered in enumerate(_rounds_of_neighbours(near)):
            if number == len(rounds):
                rounds.append([])
            rounds[number] += ordered
    return rounds


def _neighbours(copies: Sequence[PendingCopy]) -> Iterator[list[PendingCopy]]:
    """Group copies. Only copies of the same group can write to the same memory."""

    def span(position: int) -> tuple[str, int, int]:
        to = copies[position].destination
        return str(to.device), *address_range(to)

    positions: list[int] = []
    last_device, last_end = "", 0
    for (device, begin, end), position in sorted((span(position), position) for position in range(len(copies))):
        if positions and (device != last_device or begin >= last_end):
            yield [copies[at] for at in sorted(positions)]
            positions, last_end = [], 0
        positions.append(position)
        last_device, last_end = device, max(last_end, end)
    if positions:
        yield [copies[at] for at in sorted(positions)]


def _rounds_of_neighbours(copies: Sequence[PendingCopy]) -> list[list[PendingCopy]]:
    if not find_overlaps([copy.destination for copy in copies]):
        return [list(copies)]
    rounds: list[list[PendingCopy]] = []
    for copy in copies:
        first = 0
        for number, earlier in enumerate(rounds):
            kept = []
            for other in earlier:
                overlaps = find_overlaps([other.destination, copy.destination])
                if not (overlaps and overlaps[0].is_same):
                    kept.append(other)
                    first = number + 1 if overlaps else first
            rounds[number] = kept
        if first == len(rounds):
            rounds.append([])
        rounds[first].append(copy)
    return [copies for copies in rounds if copies]


def _shown(origin: Origin) -> str:
    if isinstance(origin, Stored):
        return repr(origin.name)
    names = list(dict.fromkeys(origin.names))
    return f"{names[0]!r} and {len(names) - 1} more" if len(names) > 1 else repr(names[0])


class _WatchMode(TorchDispatchMode):
    """Executes the recorded copies before a function uses their destinations."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, which takes a second (`benchmarks/lazy_weights.py`)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_composite(func):
            with self:
                return call_composite(func, args, kwargs)
        flat = tree_flatten((args, kwargs))[0]
        if any(isinstance(value, LazyTensor) for value in flat):
            return LazyTensor.__torch_dispatch__(func, types, args, kwargs)  # before any other class
        if not is_view(func) and function_name(func) not in ONLY_SHAPES:
            finish_writes(func, [value for value in flat if isinstance(value, torch.Tensor)])
        return func(*args, **kwargs)


_CONSTRUCTORS: set[Any] = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}
_CONSTRUCTORS |= {torch.Tensor.new, torch.sparse_coo_tensor, torch.sparse_csr_tensor, torch.sparse_compressed_tensor}
_CONSTRUCTORS |= {torch.sparse_csc_tensor, torch.sparse_bsr_tensor, torch.sparse_bsc_tensor}
"""Functions that take lists of tensors, and use their memory."""

_NOT_DISPATCHED = USES_OF_MEMORY | USES_AS_NUMBER | _CONSTRUCTORS


class _FunctionMode(TorchFunctionMode):
    """Handles what does not pass through the dispatcher.

    If a lazy tensor is assigned to the `data` of an ordinary tensor, the values are read into a new tensor. Before a
    function uses the memory of a destination, the recorded copies are executed.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            if isinstance(args[1], LazyTensor) and not isinstance(args[0], LazyTensor):
                args = (args[0], args[1].filled(), *args[2:])
        elif func in _NOT_DISPATCHED:
            flat = tree_flatten((args, kwargs))[0]
            finish_writes(func.__name__, [value for value in flat if isinstance(value, torch.Tensor)])
        return func(*args, **kwargs or {})
