"""`LazyWeights`: the tensors of a checkpoint as lazy tensors, as `Checkpoint.lazy` returns them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch

from ...planner.errors import MissingTensorError
from ...planner.read_plan import ReadPlan
from ...planner.text import counted
from ..errors import ArgumentError
from ..formats.source import Source
from ..reading.read_tensors import counting_metadata
from ..runtime.reports import RankReport
from ..tensors.dtypes import torch_dtype
from .recorder import CopyRecorder, LazyOptions
from .tensor import LazyTensor, lazy_tensor


class LazyWeights(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint, by name, without their values.

    Use it as a context manager. Inside the block, copies out of the tensors are recorded. At the end of the block they
    are executed together: only the byte ranges of the copied parts are read, straight into the destinations. If the
    block ends with an error, nothing is read. GeneratorExit is not an error: a loop over a generator has stopped early.
    Outside the block, each copy is executed at once.

    Views (slices, `narrow`, `chunk`, `transpose`, `view`, ...), `clone`, `contiguous`, `to`, casts, `torch.cat`,
    `torch.stack` and indexing with integers return lazy tensors again. All other functions read the values that they
    need at once, which is logged. The values are kept until the block ends, within the budget.

    Inside the block, a function that uses a destination before it has been filled executes the recorded copies first.
    This covers the functions of torch in the thread that entered the block. Code that uses the memory in other threads,
    or without torch, sees the old values until the block ends. A copy that another thread makes is executed at once.

    `parameter.data = lazy` reads into a new tensor if the thread that entered the block executes it. Elsewhere torch
    raises RuntimeError (incompatible tensor type): use `copy_`.
    """

    def __init__(self, source: Callable[[], Source], options: LazyOptions) -> None:
        self._source = source
        self._opened = source()
        self._recorder = CopyRecorder(source, options)
        self._tensors: dict[str, LazyTensor] = {}
        self._names = {entry.name: entry for entry in self._opened.entries if entry.is_tensor}

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a lazy tensor. Raise MissingTensorError, or the error that the checkpoint has for the name."""
        if name not in self._tensors:
            if not isinstance(name, str):
                raise MissingTensorError(f"{name!r} is not the name of a tensor: names are strings")
            entry = self._source().entry(name)
            if not entry.is_tensor:
                raise MissingTensorError(f"{name!r} is a value, not a tensor: read it with Checkpoint.read_value")
            self._tensors[name] = lazy_tensor(name, entry.shape, torch_dtype(entry.dtype), self._recorder)
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names or name in self._source().unreadable

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the tensors, and the names that cannot be read."""
        yield from self._names
        yield from self._source().unreadable

    def __len__(self) -> int:
        return len(self._names) + len(self._source().unreadable)

    def __copy__(self) -> dict[str, torch.Tensor]:
        return dict(self)

    def __reduce__(self) -> tuple[Any, ...]:
        raise ArgumentError(
            "the lazy tensors of a checkpoint cannot be pickled: pickle the Checkpoint, and call its lazy() in the "
            "other process"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, torch.Tensor]:
        """Return a dict of copies, which are lazy too."""
        return {name: copy.deepcopy(tensor, memo) for name, tensor in self.items()}

    def __enter__(self) -> LazyWeights:
        self._recorder.execute_stopped()
        if self._recorder.is_open:
            raise ArgumentError("the block of these lazy tensors has already been entered")
        self._recorder.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._recorder.close(error)

    def plan(self) -> ReadPlan:
        """Return what the end of the block would read for the copies recorded so far. This reads metadata only.

        Raises:
            StoreError, CorruptCheckpointError: the metadata cannot be read.
        """
        return self._recorder.plan()

    def fill(self, module: torch.nn.Module) -> None:
        """Replace the lazy parameters and buffers of a module by ordinary ones, and read their values.

        Use it if the module keeps lazy tensors: after `load_state_dict(weights, assign=True)`, or if parameters were
        created from lazy tensors. All values, and the copies recorded so far, are read together. Tensors that
        shared all their values share memory afterwards. The lazy tensors may be those of other checkpoints, too.

        Raises:
            ArgumentError: `module` is not a module.
            CheckpointError: see `reshard.load`.
        """
        if not isinstance(module, torch.nn.Module):
            raise ArgumentError(f"fill needs a torch.nn.Module, not an object of {type(module).__name__}")
        made = _Filled()
        for owner in module.modules():
            held: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
            for tensors in held:
                for name, tensor in tensors.items():
                    if isinstance(tensor, LazyTensor):
                        tensors[name] = made.tensor(tensor)
                    elif isinstance(local := getattr(tensor, "_local_tensor", None), LazyTensor):  # a DTensor
                        setattr(tensor, "_local_tensor", made.values(local))  # noqa: B010
        self._recorder.execute_all()
        for recorder in made.recorders:
            recorder.execute()

    @property
    def report(self) -> RankReport:
        """What has been read so far, with the metadata of the checkpoint."""
        return counting_metadata(self._recorder.report, self._opened)

    @property
    def unused_names(self) -> tuple[str, ...]:
        """The names of the tensors that have neither been copied nor read, in the order of the checkpoint."""
        return tuple(name for name in self._names if name not in self._recorder.used)

    def __repr__(self) -> str:
        return f"LazyWeights({self._source().location!r}, {counted(len(self._names), 'tensor')})"


class _Filled:
    """The ordinary tensors that replace the lazy tensors of a module."""

    def __init__(self) -> None:
        self.recorders: dict[Any, None] = {}
        """The recorders of the copies to the new tensors."""
        self._tensors: dict[int, torch.Tensor] = {}
        self._values: dict[Any, torch.Tensor] = {}

    def values(self, tensor: LazyTensor) -> torch.Tensor:
        """Return a new tensor, the same for all lazy tensors that share their values. Record a copy to it."""
        key = tensor.memory, tensor.strided_view
        if key not in self._values:
            self._values[key] = tensor.filled(at_once=False)
            self.recorders[tensor.memory.recorder] = None
        return self._values[key]

    @torch.no_grad()
    def tensor(self, tensor: LazyTensor) -> torch.Tensor:
        """Return a tensor, or a parameter with the attributes of the lazy one, that replaces a lazy tensor."""
        if id(tensor) not in self._tensors:
            self._tensors[id(tensor)] = made = self.values(tensor)
            if isinstance(tensor, torch.nn.Parameter):
                self._tensors[id(tensor)] = made = torch.nn.Parameter(made, tensor.requires_grad)
                own = ("_meta", "_memory", "_device")
                vars(made).update({key: value for key, value in vars(tensor).items() if key not in own})
        return self._tensors[id(tensor)]
