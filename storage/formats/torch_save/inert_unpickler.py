"""Unpickle pickles of torch as inert data, without running any code that they name.

A pickle may only name classes and functions of an allow-list. Each of them is replaced by an inert one of this module,
which keeps its arguments or its state and does nothing else. Any other name raises an error before an object is made.
In metadata that other tools extend, other names become an `UnknownObject` instead.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

from ....planner.entries import ITEMSIZES
from ...errors import CorruptCheckpointError, UnsafeValueError
from ...runtime.brief import reason
from .pickle_scan import check_pickle

MAX_UNKNOWN_CLASSES = 1000
"""How many unknown classes and functions of one pickle keep their names."""
MAX_GLOBAL_CHARS = 200
"""How many characters of the name of a class or function are kept."""
MAX_TORCH_DIMENSIONS = 64
"""torch's own limit of the dimensions of a tensor."""


class InertObject:
    """An instance of an allowed class, reduced to its state."""

    __slots__ = ("state",)

    def __new__(cls, *arguments: Any) -> InertObject:
        made = super().__new__(cls)
        made.state = None
        return made

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """Return an attribute, or None if it does not exist."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class UnknownObject:
    """A replacement for an unknown class or function, and for everything that is made with it.

    It accepts every argument, state, item and call that a pickle can contain, and runs nothing. It keeps only its
    state.
    """

    __slots__ = ("state",)
    of = "an unknown class"
    """The module and name in the pickle."""

    def __new__(cls, *arguments: Any, **named: Any) -> UnknownObject:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None: ...

    def __call__(self, *arguments: Any, **named: Any) -> UnknownObject:
        return UnknownObject()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def add(self, value: Any) -> None: ...


def unknown_name(value: Any) -> str | None:
    """Return the name of the unknown class or function that a value is of, or None for other values."""
    if isinstance(value, UnknownObject) or (isinstance(value, type) and issubclass(value, UnknownObject)):
        return value.of
    return None


class _InvalidSize(UnknownObject):
    __slots__ = ()
    of = "a torch.Size that holds no sizes"


class InertFunction:
    """A replacement for a function. A pickle can call it but cannot change it."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


def _size_of(values: Any) -> Any:
    """Return a torch.Size as a tuple of integers, or an `UnknownObject` if the values are not sizes."""
    try:
        return checked_sizes(values)
    except ValueError:
        return _InvalidSize()


def _layout_of(name: Any) -> str:
    if type(name) is not str or len(name) > MAX_GLOBAL_CHARS:
        raise ValueError("a layout has no name")
    return name


class InertDict(dict[Any, Any]):
    """A plain dict in place of a subclass of dict. It keeps its items and nothing else."""

    __slots__ = ()

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


INERT_SIZE = InertFunction(_size_of)
INERT_LAYOUT = InertFunction(_layout_of)


def inert_class(name: str) -> type[InertObject]:
    """Return a new subclass of InertObject, so that its instances can be distinguished from others."""
    return type(name, (InertObject,), {"__slots__": ()})


def checked_sizes(values: Any) -> tuple[int, ...]:
    """Return sizes or offsets. Raise ValueError unless they are a tuple of integers from 0 to 2**60 - 1."""
    if type(values) is not tuple or len(values) > MAX_TORCH_DIMENSIONS:
        raise ValueError("a shape or an offset is not a tuple of integers")
    if not all(type(n) is int and 0 <= n < 2**60 for n in values):
        raise ValueError("a size or an offset is invalid")
    return values


def refused_global_error(where: str, name: str) -> UnsafeValueError:
    """Return the error for a pickle that names a class or function that is not allowed."""
    return UnsafeValueError(f"{where} names {name[:MAX_GLOBAL_CHARS]}, which such metadata never does: it was refused")


def load_inert(
    data: bytes,
    allowed: Mapping[tuple[str, str], Any],
    where: str,
    persistent_load: Callable[[Any], Any] | None = None,
    *,
    allow_unknown: bool = False,
) -> tuple[Any, int]:
    """Unpickle inert data.

    Args:
        data: bytes that begin with the pickle. Bytes after its end are ignored.
        allowed: the replacement of each allowed class and function, by module and name. A dtype of torch is replaced by
            its name.
        where: the name of the pickle in error messages.
        persistent_load: a function from a persistent id to the object that replaces it. By default, a persistent id is
            an error.
        allow_unknown: whether other classes and functions become an `UnknownObject`. By default they are an error.

    Returns:
        The unpickled data, and the position of the first byte after the pickle.

    Raises:
        UnsafeValueError: the pickle names another class or function.
        CorruptCheckpointError: the data is not a pickle, or is one that no honest writer makes.
    """

    unknown: dict[tuple[str, str], type[UnknownObject]] = {}

    class Inert(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in allowed:
                return allowed[module, name]
            if module == "torch" and name in ITEMSIZES:
                return name
            if not allow_unknown:
                raise refused_global_error(where, f"{module}.{name}")
            if (module, name) not in unknown:
                if len(unknown) == MAX_UNKNOWN_CLASSES:  # a class takes more memory than its name in the pickle
                    return UnknownObject
                of = f"{module[:MAX_GLOBAL_CHARS]}.{name[:MAX_GLOBAL_CHARS]}"
                unknown[module, name] = type("UnknownObject", (UnknownObject,), {"of": of, "__slots__": ()})
            return unknown[module, name]

        def persistent_load(self, pid: Any) -> Any:
            if persistent_load is None:
                raise pickle.UnpicklingError("it has a persistent id")
            return persistent_load(pid)

    stream = io.BytesIO(data)
    try:
        check_pickle(data, calls=False)
        found = Inert(stream).load()
    except UnsafeValueError:
        raise
    except Exception as error:  # damaged bytes can make an unpickler raise anything
        raise CorruptCheckpointError(f"{where} cannot be read: {reason(error)}") from error
    return found, stream.tell()
