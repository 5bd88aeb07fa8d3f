"""Find out which tensors have their values in dense memory, and write to tensors whose class decides how."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from ..errors import DestinationError, UnsupportedValueError
from ..runtime.checksums import checksum
from ..runtime.torch_modes import writing_to
from .dtypes import as_array, as_bytes

_TORCH_CLASSES = (torch.Tensor, torch.nn.Parameter)


def overrides_dispatch(tensor: torch.Tensor) -> bool:
    """Return whether the class of a tensor has its own `__torch_dispatch__`.

    Such a class decides what its values are. They need not be at its data pointer: torchao's quantised tensors contain
    tensors of integers and scales, and have no memory themselves.
    """
    kind = type(tensor)
    return kind not in _TORCH_CLASSES and kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def is_whole(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is not sharded over ranks, whatever its class."""
    shards = "local_shards", "__create_chunk_list__"  # ShardedTensor, and torch's protocol for such classes
    return type(tensor) in _TORCH_CLASSES or not any(hasattr(type(tensor), attribute) for attribute in shards)


def as_plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a detached view of a tensor, of the class torch.Tensor.

    Args:
        tensor: a tensor whose class does not have its own `__torch_dispatch__`.
    """
    if type(tensor) in _TORCH_CLASSES:
        return tensor.detach()
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(torch.Tensor)


def missing_memory(tensor: torch.Tensor) -> str:
    """Return why a tensor has no values in dense memory. Empty if it has, or if its class decides."""
    if type(tensor) not in _TORCH_CLASSES and (reason := _class_without_values(tensor)):
        return reason
    if tensor.is_nested:
        return "is a nested tensor: use its values() and offsets()"
    if tensor.is_quantized:
        return f"is a quantised tensor of {tensor.dtype}: use its int_repr() and its scales, or dequantize() it"
    if tensor.device.type == "meta":
        return "is on the meta device: give it memory first (to_empty)"
    if tensor.layout is not torch.strided:
        return f"has the layout {tensor.layout}: only dense tensors are supported"
    if overrides_dispatch(tensor) or tensor.numel() == 0:
        return ""
    try:
        numel = tensor.numel()
        if not tensor.is_contiguous():
            numel = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        storage = tensor.untyped_storage()
        if storage.data_ptr() and storage.nbytes() >= (tensor.storage_offset() + numel) * tensor.itemsize:
            return ""
    except RuntimeError:  # raised by torch for zero tensors and the storages of wrappers
        pass
    return "has no memory, like a parameter that FSDP has freed"


def _class_without_values(tensor: torch.Tensor) -> str:
    """Return why tensors of this class have no values in dense memory. Empty if they may have."""
    if is_lazy(tensor):
        return f"is an {type(tensor).__name__}, which has no shape yet: run the module once, or give it a shape"
    if derives_from(tensor, "FakeTensor", "torch._subclasses"):
        return "is a FakeTensor, which has no values"
    if derives_from(tensor, "MaskedTensor", "torch.masked"):
        return "is a MaskedTensor, so some values are masked: use its get_data() and get_mask()"
    return ""


def check_has_memory(name: str, tensor: torch.Tensor) -> None:
    """Check that a tensor has values in dense memory or that its class decides. Raise UnsupportedValueError."""
    reason = missing_memory(tensor)
    if reason:
        raise UnsupportedValueError(f"{name!r} cannot be stored: it {reason}")


def as_storable(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a plain view of the values of a local tensor.

    Raises:
        UnsupportedValueError: the values are not in dense memory, or the tensor's class decides what they are.
    """
    check_has_memory(name, tensor)
    if not overrides_dispatch(tensor):
        return as_plain(tensor)
    values = only_values(tensor)
    if values is None:
        raise UnsupportedValueError(
            f"{name!r} cannot be stored: its class {_full_name(tensor)} keeps the values in its own form. Save the "
            "tensors inside it, or a plain tensor of its values"
        )
    return values


def only_values(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the plain tensor that a tensor consists of, if it is the only one and has the same values; None otherwise.

    For example, the weights that torchao casts to float8 when FSDP gathers them contain plain tensors. The answer
    depends on the class and its settings, not on the values.
    """
    if not hasattr(tensor, "__tensor_flatten__"):
        return None
    inner = list(tensors_inside(tensor).values())
    flattened: Any = tensor.__tensor_flatten__()
    if not len(inner) == len(flattened[0]) == 1 or (inner[0].shape, inner[0].dtype) != (tensor.shape, tensor.dtype):
        return None
    values = only_values(inner[0]) if overrides_dispatch(inner[0]) else as_plain(inner[0])
    return values if values is not None and not missing_memory(values) and _presents_its_values(tensor) else None


def _presents_its_values(tensor: Any) -> bool:
    """Return whether a class with one tensor inside presents the values of this tensor, as a small example shows."""
    (attribute,), context = tensor.__tensor_flatten__()
    try:
        values = torch.arange(1, 1 + 2 ** tensor.dim()).reshape((2,) * tensor.dim()).to(tensor.dtype)
        with torch.no_grad():
            example = type(tensor).__tensor_unflatten__({attribute: values}, context, values.shape, values.stride())
            found = torch.empty_like(values).copy_(example)
        return type(found) is torch.Tensor and bool(np.array_equal(as_array(found), as_array(values)))
    except Exception:  # the class may accept other shapes only
        return False


def copy_into(name: str, destination: torch.Tensor, values: torch.Tensor) -> None:
    """Write to a tensor whose class decides how, by its `copy_`.

    Args:
        name: the name of the tensor, for error messages.
        destination: the tensor to write to.
        values: the values, of the same shape.

    Raises:
        DestinationError: the `copy_` of the class raises an error, or changes nothing.
    """
    before = _digests(destination)
    try:
        with torch.no_grad(), writing_to(destination):
            destination.copy_(values)
            written = _reads_back(destination, values) or _digests(destination) != before
            if not written:  # rounding may leave the old values: see whether other values change it
                for other in (torch.zeros_like(values), torch.ones_like(values)):
                    destination.copy_(other)
                    written = written or _digests(destination) != before
                destination.copy_(values)
    except Exception as error:
        raise DestinationError(
            f"{name!r} is of the class {_full_name(destination)}, whose copy_ failed: {type(error).__name__}: {error}. "
            "Load into a plain tensor, and create a tensor of that class from it"
        ) from error
    if destination.numel() and not written:
        raise DestinationError(
            f"{name!r} is of the class {_full_name(destination)}, whose copy_ does not write to it. Load into a plain "
            "tensor, and create a tensor of that class from it"
        )


def _reads_back(tensor: torch.Tensor, values: torch.Tensor) -> bool:
    found = torch.empty_like(values)
    try:
        found.copy_(tensor)
    except Exception:  # the class may not support it
        return False
    return type(found) is torch.Tensor and bool(np.array_equal(as_array(found), as_array(values)))


def _digests(tensor: torch.Tensor) -> list[int]:
    """Return checksums of the tensors inside a tensor."""
    found: list[int] = []
    for inner in tensors_inside(tensor).values():
        if overrides_dispatch(inner):
            found += _digests(inner)
        elif not missing_memory(inner):
            found.append(checksum(as_bytes(as_array(inner)).data))
    return found


def tensors_inside(tensor: Any) -> dict[str, torch.Tensor]:
    """Return the tensors inside a tensor by their attributes."""
    if hasattr(tensor, "__tensor_flatten__"):
        values = {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}  # also the mesh of a DTensor
    else:
        values = vars(tensor)
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def derives_from(tensor: torch.Tensor, name: str, package: str) -> bool:
    """Return whether a tensor is an instance of a class of torch, without importing the class."""
    return any(kind.__name__ == name and kind.__module__.startswith(package) for kind in type(tensor).__mro__)


def memory_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the plain tensor whose memory holds a tensor's values: the tensor, or the largest tensor inside it."""
    return max(memories_of(tensor), key=lambda part: part.nbytes, default=None)


def memories_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors whose memory a tensor uses: the tensor, or all tensors inside it."""
    if not overrides_dispatch(tensor):
        return [] if missing_memory(tensor) else [tensor]
    return [memory for part in tensors_inside(tensor).values() for memory in memories_of(part)]


def _full_name(tensor: torch.Tensor) -> str:
    return f"{type(tensor).__module__}.{type(tensor).__qualname__}"
