"""`LazyTensor`: a tensor without storage that records which part of a checkpoint its values are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ...planner.box import Box
from ...planner.strided import StridedView
from ..errors import ArgumentError
from ..runtime.deferred_writes import finish_writes
from ..tensors.overlaps import overlaps_itself
from .origins import Assembled, Origin, PlacedView, Stored

aten = torch.ops.aten
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
MAX_INDEXES = 4096
"""More separate indexes than this are not recorded: the values are read and indexed by torch."""

MAX_DEPTH = 64
MAX_VIEWS = 64 * MAX_INDEXES
"""Tensors that consist of more views, or of views of views, than this are not recorded: their values are read."""


class Recorder(Protocol):
    """What lazy tensors need in order to be read and copied."""

    def copy(self, destination: torch.Tensor, source: LazyTensor, *, at_once: bool = True) -> None:
        """Copy the values of a lazy tensor to a tensor of the same sizes, when the block ends.

        Args:
            at_once: whether to copy at once if there is no block. Otherwise the caller executes the copy.
        """

    def read(self, origin: Origin, view: StridedView, device: torch.device, reason: str, *, keep: bool) -> torch.Tensor:
        """Read a view of an origin now.

        Args:
            reason: the function that needs the values, for the log.
            keep: whether to keep the values for the next read of the same view. The caller must not change them.
        """
        raise NotImplementedError


class Memory:
    """What a lazy tensor and its views have in common, as ordinary tensors have a storage.

    If a tensor is changed in place, all its values are read first. From then on `values` has them.
    """

    def __init__(self, origin: Origin, recorder: Recorder, *, bits_of: Memory | None = None) -> None:
        self.origin = origin
        self.recorder = recorder
        self._bits_of = bits_of
        self._values: torch.Tensor | None = None

    @property
    def values(self) -> torch.Tensor | None:
        """A tensor of the shape of the origin, if there is one."""
        if self._values is None and self._bits_of is not None and self._bits_of.values is not None:
            self._values = self._bits_of.values.view(self.origin.dtype)
        return self._values

    def read_all(self, device: torch.device, reason: str) -> torch.Tensor:
        """Return `values`, after reading them if necessary."""
        if self.values is None and self._bits_of is not None:
            self._bits_of.read_all(device, reason)
        if self.values is None:
            whole = StridedView.whole(self.origin.shape)
            self._values = self.recorder.read(self.origin, whole, device, reason, keep=False)
        assert self.values is not None
        return self.values


class LazyTensor(torch.Tensor):
    """A tensor without storage, whose values are a strided view of a checkpoint's tensors.

    Views, copies, casts, `cat`, `stack` and indexing with integers return lazy tensors. `copy_` into a tensor is
    recorded. All other functions read the values.
    """

    _meta: torch.Tensor
    """A tensor on the meta device. Its strides and offset are those of the view."""
    _memory: Memory
    _device: torch.device

    @staticmethod
    def __new__(cls, meta: torch.Tensor, memory: Memory, device: torch.device) -> LazyTensor:
        # Neither a wrapper subclass nor a tensor with the keys of the device (`device_for_backend_keys`): torch would
        # let `tensor.data = made` pass, and using the tensor could crash the process.
        made: LazyTensor = torch.Tensor._make_subclass(cls, meta, False, dispatch_device=True)
        made._meta = meta
        made._memory = memory
        made._device = device
        return made

    @classmethod
    def whole(cls, origin: Origin, recorder: Recorder, device: torch.device) -> LazyTensor:
        """Return all values of an origin as a new lazy tensor."""
        meta = torch.empty(origin.shape, dtype=origin.dtype, device="meta")
        return cls(meta, Memory(origin, recorder), device)

    @property
    def memory(self) -> Memory:
        return self._memory

    @property
    def origin(self) -> Origin:
        return self._memory.origin

    @property
    def strided_view(self) -> StridedView:
        """The elements of the origin that are the values."""
        meta = self._meta
        return StridedView(tuple(meta.shape), meta.stride(), int(meta.storage_offset()))

    def materialized(self, reason: str) -> torch.Tensor:
        """Return an ordinary tensor that shares its memory with all views of this tensor, from now on."""
        return self._of(self._memory.read_all(self.device, reason), reason)

    def _of(self, values: torch.Tensor, reason: str) -> torch.Tensor:
        """Return the part of the values of the memory that this tensor is, after the recorded copies to it."""
        view = self.strided_view
        part = values.as_strided(view.sizes, view.strides, view.offset)
        finish_writes(reason, [part])
        return part

    def read(self, reason: str) -> torch.Tensor:
        """Return the values as an ordinary tensor, which the caller must not change."""
        known = self.known()
        if known is not None:
            return known
        return self._memory.recorder.read(self.origin, self.strided_view, self.device, reason, keep=True)

    def filled(self, *, at_once: bool = True) -> torch.Tensor:
        """Return a new ordinary tensor, and copy the values to it at the end of the block.

        Args:
            at_once: whether to copy at once if there is no block. Otherwise the caller executes the copy.
        """
        known = self.known()
        if known is not None:
            return known.clone()
        made = torch.empty_like(self._meta, device=self.device)
        self._memory.recorder.copy(made, self, at_once=at_once)
        return made

    def known(self) -> torch.Tensor | None:
        """Return the values as an ordinary tensor, if they have been read to be changed in place."""
        values = self._memory.values
        return None if values is None else self._of(values, "a use of a lazy tensor")

    # Functions that do not pass through the dispatcher.

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        lazy: dict[int, LazyTensor] = {}
        transforms = torch._C._functorch.get_interpreter_stack() or ()
        if func in USES_AS_NUMBER:
            args = (args[0].read(func.__name__),)
        elif func is torch.Tensor.new_tensor:  # only the dtype and the device count
            args = (torch.empty(0, dtype=args[0].dtype, device=args[0].device), *args[1:])
        elif (
            func in USES_OF_MEMORY
            or str(getattr(func, "__module__", "")).startswith("torch.distributed")
            or any(transform.key() != torch._C._functorch.TransformType.Vmap for transform in transforms)
        ):
            flat, spec = tree_flatten((args, kwargs))
            # The transforms of torch.func, except vmap, would take a lazy tensor for an ordinary one without values.
            with temporarily_clear_interpreter_stack():
                for at, value in enumerate(flat):
                    if isinstance(value, LazyTensor):
                        flat[at] = value.materialized(func.__name__)
                        lazy[id(flat[at])] = value
            restored: Any = tree_unflatten(flat, spec)
            args, kwargs = restored
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **(kwargs or {}))
        return lazy.get(id(made), made)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        names = list(dict.fromkeys(self.origin.names))
        of = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return (
            f"LazyTensor({names[0] if names else ''!r}{of}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={str(self.device)!r})"
        )

    def __format__(self, format_spec: str) -> str:
        return self.read("format").__format__(format_spec) if self.dim() == 0 else repr(self)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        return self.materialized("numpy").numpy(*args, **kwargs)

    def tolist(self) -> Any:
        return self.materialized("tolist").tolist()

    def data_ptr(self) -> int:
        return self.materialized("data_ptr").data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.materialized("untyped_storage").untyped_storage()

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.materialized("__dlpack__").__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self.materialized("__dlpack_device__").__dlpack_device__()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._as_parameter(self.materialized("pickle")).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = self._as_parameter(self.detach().clone())
        return memo[id(self)]

    def _as_parameter(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor as a parameter if this tensor is one."""
        return torch.nn.Parameter(tensor, self.requires_grad) if isinstance(self, torch.nn.Parameter) else tensor

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._device

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, LazyTensor):
            value = _with_known_values(value, self._memory.recorder)
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self._meta, self._memory, self._device = value._meta, value._memory, value._device

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0]._device
        if is_composite(func):
            return call_composite(func, args, kwargs)
        if func is aten.copy_.default and not isinstance(args[0], LazyTensor):
            return _copy(*args[:2])
        rule: Callable[..., Any] = _RULES.get(func, _like if function_name(func) in ONLY_SHAPES else _view)
        # torch makes a parameter only of a tensor whose detach returns the same class
        found = rule(func, *args, **kwargs) if func is aten.detach.default or _all_unknown(args) else None
        return _with_values(func, args, kwargs) if found is None else found


def _with_known_values(values: torch.Tensor, recorder: Recorder) -> LazyTensor:
    """Return a lazy tensor that has been materialized already, and shares its memory with an ordinary tensor."""
    with torch._C.DisableTorchFunction():
        values = values.detach().resolve_conj().resolve_neg()
        numel = values.untyped_storage().nbytes() // values.itemsize
        whole = LazyTensor.whole(Assembled((numel,), values.dtype, ()), recorder, values.device)
        whole._memory._values = values.as_strided((numel,), (1,), 0)
        view = whole._meta.as_strided(values.shape, values.stride(), values.storage_offset())
    return LazyTensor(view, whole._memory, values.device)


def _all_unknown(args: tuple[Any, ...]) -> bool:
    """Return whether all lazy tensors among some arguments are still without values."""
    lazy = [arg for arg in tree_flatten(args)[0] if isinstance(arg, LazyTensor)]
    return all(tensor._memory.values is None for tensor in lazy)


def _copy(destination: torch.Tensor, source: LazyTensor) -> torch.Tensor:
    """Copy a lazy tensor to an ordinary one."""
    values = source.known()
    if values is not None:
        finish_writes("copy_", [destination])
        return destination.copy_(values)
    expanded = source._meta.expand(destination.shape)  # raises torch's error if the shapes do not fit
    source._memory.recorder.copy(destination, LazyTensor(expanded, source._memory, source.device))
    return destination


def is_view(func: Any) -> bool:
    """Return whether a function of torch returns views of its arguments."""
    schema = func._schema
    return not schema.is_mutable and any(returned.alias_info is not None for returned in schema.returns)


@cache
def is_composite(func: Any) -> bool:
    """Return whether a function only calls other functions of torch.

    Such a function may return a view or a copy, as `reshape` does. Only inference mode dispatches it as a whole.
    """
    return func.namespace != "prim" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE)


def call_composite(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a composite function, so that the functions it calls are dispatched."""
    return func._op_dk(_COMPOSITE, *args, **kwargs)


def _view(func: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    """Apply a function that returns views of its first argument to the meta tensor."""
    if not isinstance(tensor, LazyTensor) or not (is_view(func) or func is aten._unsafe_view.default):
        return None
    if func is aten.view.dtype:
        return _view_as(tensor, *args)
    made = func(tensor._meta, *args, **kwargs)
    views = [view for view in tree_flatten(made)[0] if isinstance(view, torch.Tensor)]
    if func is aten.as_strided.default:  # torch does not check this on the meta device
        _check_is_inside(views[0], tensor.origin.shape)
    if any(view.dtype != tensor.dtype or view.is_conj() or view.is_neg() for view in views):
        return None
    return tree_map_only(torch.Tensor, lambda view: LazyTensor(view, tensor._memory, tensor.device), made)


def _check_is_inside(view: torch.Tensor, shape: tuple[int, ...]) -> None:
    end, numel = StridedView(tuple(view.shape), view.stride(), int(view.storage_offset())).end, math.prod(shape)
    if end > numel:
        raise RuntimeError(
            f"as_strided with sizes {tuple(view.shape)}, strides {view.stride()} and offset {view.storage_offset()} is "
            f"out of bounds: it needs {end} elements, and the tensor has {numel}"
        )


def _view_as(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor | None:
    """View the same bits as another dtype."""
    memory = tensor._memory
    if dtype.itemsize != tensor.dtype.itemsize or dtype.is_complex != tensor.dtype.is_complex:
        return None
    shape = memory.origin.shape
    same = PlacedView(Box.whole(shape), memory.origin, StridedView.whole(shape))
    viewed = Memory(Assembled(shape, dtype, (same,), same_bits=True), memory.recorder, bits_of=memory)
    view = tensor.strided_view
    meta = torch.empty(shape, dtype=dtype, device="meta").as_strided(view.sizes, view.strides, view.offset)
    return LazyTensor(meta, viewed, tensor.device)


_Part = tuple[Box, "LazyTensor"]
"""A box of a new tensor, and the lazy tensor with its values."""


def _assembled(meta: torch.Tensor, parts: Sequence[_Part], like: LazyTensor, device: torch.device) -> LazyTensor | None:
    """Return a new lazy tensor that consists of others.

    Args:
        meta: what the function returns for meta tensors.
        parts: what its parts consist of.
        like: one of the lazy tensors.
        device: the device of the new tensor.
    """
    strides = meta.stride()
    order = sorted(range(meta.dim()), key=lambda d: -strides[d])
    shape = tuple(meta.shape[d] for d in order)
    in_order = meta.permute(order)
    if not in_order.is_contiguous():
        return None

    def placed(box: Box, tensor: LazyTensor) -> PlacedView:
        moved = Box(tuple(box.offsets[d] for d in order), tuple(box.sizes[d] for d in order))
        view = tensor.strided_view
        turned = StridedView(moved.sizes, tuple(view.strides[d] for d in order), view.offset)
        return PlacedView(moved, tensor.origin, turned)

    origin = Assembled(shape, meta.dtype, tuple(placed(*part) for part in parts))
    if origin.depth > MAX_DEPTH or origin.views > MAX_VIEWS:
        return None
    return LazyTensor(meta, Memory(origin, like._memory.recorder), device)


def _whole_part(tensor: LazyTensor) -> list[_Part]:
    return [(Box.whole(tuple(tensor.shape)), tensor)]


def _clone(func: Any, tensor: LazyTensor, **kwargs: Any) -> LazyTensor | None:
    return _assembled(func(tensor._meta, **kwargs), _whole_part(tensor), tensor, tensor.device)


def _to_copy(func: Any, tensor: LazyTensor, **kwargs: Any) -> torch.Tensor | None:
    if kwargs.pop("pin_memory", False) or kwargs.get("layout") not in (None, torch.strided):
        return None
    device = torch.device(kwargs.pop("device", None) or tensor.device)
    if device.type == "meta":
        return torch.empty_like(func(tensor._meta, **kwargs))
    return _assembled(func(tensor._meta, **kwargs), _whole_part(tensor), tensor, device)


def _cat(func: Any, tensors: Sequence[Any], dim: int = 0) -> LazyTensor | None:
    if not _are_alike(tensors):
        return None
    made = _joined([tensor._meta for tensor in tensors], dim)
    parts: list[_Part] = []
    offsets = [0] * made.dim()
    for tensor in tensors:
        if tensor.dim() == made.dim():  # torch skips empty tensors of one dimension
            parts.append((Box(tuple(offsets), tuple(tensor.shape)), tensor))
            offsets[dim] += tensor.shape[dim]
    return _assembled(made, parts, tensors[0], tensors[0].device)


def _stack(func: Any, tensors: Sequence[Any], dim: int = 0) -> LazyTensor | None:
    if not _are_alike(tensors) or any(tensor.shape != tensors[0].shape for tensor in tensors):
        return None
    made = _joined([tensor._meta.unsqueeze(dim) for tensor in tensors], dim)
    parts: list[_Part] = []
    for at, tensor in enumerate(tensors):
        layer = LazyTensor(tensor._meta.unsqueeze(dim), tensor._memory, tensor.device)
        parts.append((Box.whole(tuple(made.shape)).with_extent(dim % made.dim(), at, at + 1), layer))
    return _assembled(made, parts, tensors[0], tensors[0].device)


def _joined(metas: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Return what `torch.cat` makes of meta tensors.

    The first `torch.cat` of meta tensors in a process imports the compiler of torch (benchmarks/lazy_weights.py). So
    it is only called if the result may not be contiguous, or to raise torch's error.
    """
    first = metas[0]
    dims = first.dim()
    alike = -dims <= dim < dims and all(meta.dim() == dims and meta.dtype == first.dtype for meta in metas)
    if alike and (dims <= 3 or all(meta.is_contiguous() for meta in metas)):
        shapes = [list(meta.shape) for meta in metas]
        sizes = [shape.pop(dim) for shape in shapes]
        if all(shape == shapes[0] for shape in shapes):
            shapes[0].insert(dim % dims, sum(sizes))
            return torch.empty(shapes[0], dtype=first.dtype, device="meta")
    return torch.cat(list(metas), dim)


def _are_alike(tensors: Sequence[Any]) -> bool:
    """Return whether all tensors are lazy, of the same checkpoint and on the same device."""
    return all(
        isinstance(tensor, LazyTensor)
        and tensor.device == tensors[0].device
        and tensor._memory.recorder is tensors[0]._memory.recorder
        for tensor in tensors
    )


def _index(func: Any, tensor: LazyTensor, indexes: Sequence[torch.Tensor | None]) -> LazyTensor | None:
    """Index one dimension with integers."""
    dims = [dim for dim, index in enumerate(indexes) if index is not None]
    index = indexes[dims[0]] if len(dims) == 1 else None
    return None if index is None else _select_indexes(tensor, dims[0], index)


def _index_select(func: Any, tensor: LazyTensor, dim: int, index: torch.Tensor) -> LazyTensor | None:
    if not tensor.dim() or index.dim() != 1:
        return None
    if not -tensor.dim() <= dim < tensor.dim():
        return None  # torch raises the error
    return _select_indexes(tensor, dim % tensor.dim(), index, may_be_negative=False)


def _select_indexes(
    tensor: LazyTensor, dim: int, index: torch.Tensor, *, may_be_negative: bool = True
) -> LazyTensor | None:
    if index.dtype not in (torch.int64, torch.int32) or index.device.type != "cpu" or isinstance(index, LazyTensor):
        return None
    size = tensor.shape[dim]
    finish_writes("indexing", [index])
    rows = [row + size if row < 0 and may_be_negative else row for row in index.reshape(-1).tolist()]
    if any(not 0 <= row < size for row in rows):
        raise IndexError(f"index out of range for dimension {dim} of size {size}")
    runs = _runs(rows) or [(0, 0)]
    if len(runs) > MAX_INDEXES:
        return None
    shape = (*tensor.shape[:dim], len(rows), *tensor.shape[dim + 1 :])
    parts: list[_Part] = []
    at = 0
    for row, count in runs:
        narrow = LazyTensor(tensor._meta.narrow(dim, row, count), tensor._memory, tensor.device)
        parts.append((Box.whole(shape).with_extent(dim, at, at + count), narrow))
        at += count
    made = _assembled(torch.empty(shape, dtype=tensor.dtype, device="meta"), parts, tensor, tensor.device)
    if made is None or index.dim() == 1:
        return made
    return made.view(*tensor.shape[:dim], *index.shape, *tensor.shape[dim + 1 :])  # type: ignore[return-value]


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first row and the number of rows of each run of consecutive rows."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and row == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((row, 1))
    return runs


def _methods(names: str) -> set[Any]:
    return {getattr(torch.Tensor, name) for name in names.split()}


USES_OF_MEMORY = _methods("__array__ __dlpack__ __format__ __reduce_ex__ __repr__ apply_ data_ptr map_ map2_ new numpy")
USES_OF_MEMORY |= _methods("share_memory_ storage tolist untyped_storage")
USES_OF_MEMORY.add(torch.Tensor.__cuda_array_interface__.__get__)
"""Functions that use the memory of a tensor and do not pass through the dispatcher."""

USES_AS_NUMBER = _methods("__bool__ __complex__ __float__ __index__ __int__")
"""Functions that return the value of a tensor. For a tensor in a list, they do not pass through the dispatcher."""

ONLY_SHAPES = {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"}
ONLY_SHAPES |= {"new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"}
"""Functions that create a tensor like another one. They do not use its values."""


def function_name(func: Any) -> str:
    """Return the name of a function of torch without its namespace and overload."""
    return str(func._schema.name.partition("::")[2])


def _like(func: Any, tensor: LazyTensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    device = kwargs.pop("device", None) or tensor.device
    made: torch.Tensor | None = func(tensor._meta, *args, device=device, **kwargs)
    return made


_RULES: dict[Any, Callable[..., Any]] = {
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
}


def _with_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function with the values of the lazy tensors."""
    flat, spec = tree_flatten((args, kwargs))
    lazy = {id(arg): arg for arg in flat if isinstance(arg, LazyTensor)}
    changed = _written(func, args, kwargs)
    sets_view = torch.Tag.inplace_view in func.tags
    if sets_view and changed & lazy.keys():
        raise ArgumentError(f"{func} changes the shape of a lazy tensor in place: use the function that returns a view")
    values: dict[int, torch.Tensor] = {}
    for key, tensor in lazy.items():
        is_shared = key in changed or sets_view or is_view(func)
        values[key] = tensor.materialized(str(func)) if is_shared else tensor.read(str(func))
    real = [values.get(id(arg), arg) for arg in flat]
    finish_writes(func, [arg for arg in real if isinstance(arg, torch.Tensor)])
    restored: Any = tree_unflatten(real, spec)
    args, kwargs = restored
    made = func(*args, **kwargs)
    back = {id(values[key]): tensor for key, tensor in lazy.items() if key in changed}
    return tree_map_only(torch.Tensor, lambda tensor: back.get(id(tensor), tensor), made)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
    """Return the ids of the tensors that a function changes in place."""
    written: set[int] = set()
    for at, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[at] if at < len(args) else kwargs.get(argument.name)
            written |= {id(tensor) for tensor in tree_flatten(value)[0] if isinstance(tensor, torch.Tensor)}
    return written


def check_is_writable(destination: torch.Tensor) -> None:
    """Check that a tensor can be the destination of `copy_`, as torch does. Raise RuntimeError."""
    if overlaps_itself(destination):
        raise RuntimeError("the elements of the destination share memory: copy into a clone of it")


def lazy_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, recorder: Recorder) -> LazyTensor:
    """Return a tensor of the checkpoint as a lazy tensor."""
    return LazyTensor.whole(Stored(name, shape, dtype), recorder, torch.device("cpu"))
