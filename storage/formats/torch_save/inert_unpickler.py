"""Pickles of torch as inert records: what they say, without running any code of torch, or of anybody.

Every class and function that a pickle may name is one of a list, and stands for a record of what it was given. Any
other name is refused, before anything is made of it; or, in metadata that other tools add to, becomes a `Foreign`,
which takes whatever it is given and does nothing.
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

MAX_FOREIGN = 1000
"""Classes and functions that are told apart by name."""
MAX_NAME = 200
"""How much of the name of a class is kept, in characters."""
MAX_DIMENSIONS = 64
"""Of a tensor, as torch has it."""


class Record:
    """An object of a class in a pickle, reduced to its state."""

    __slots__ = ("state",)

    def __new__(cls, *arguments: Any) -> Record:
        made = super().__new__(cls)
        made.state = None
        return made

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """An attribute, None where it has none."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class Foreign:
    """What stands for a class or function that is not known, and for what would be made with it.

    It accepts every argument, state, item and call that a pickle can give it, and runs nothing. Only the state
    is kept.
    """

    __slots__ = ("state",)
    of = "an unknown class"
    """The module and name that the pickle gives."""

    def __new__(cls, *arguments: Any, **named: Any) -> Foreign:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None: ...

    def __call__(self, *arguments: Any, **named: Any) -> Foreign:
        return Foreign()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def add(self, value: Any) -> None: ...


def name_of_foreign(value: Any) -> str | None:
    """Return the name of the unknown class or function that a `Foreign` value came from; None for other values."""
    if isinstance(value, Foreign) or (isinstance(value, type) and issubclass(value, Foreign)):
        return value.of
    return None


class _NoSize(Foreign):
    __slots__ = ()
    of = "a torch.Size that holds no sizes"


class StandIn:
    """A replacement for a function. A pickle can call it but cannot change it."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


def _size_of(values: Any) -> Any:
    """Return a torch.Size as a tuple of integers, or a `Foreign` if the values are not sizes."""
    try:
        return integers(values)
    except ValueError:
        return _NoSize()


def _layout_of(name: Any) -> str:
    if type(name) is not str or len(name) > MAX_NAME:
        raise ValueError("a layout has no name")
    return name


class Dictionary(dict[Any, Any]):
    """A plain dict in place of a kind of dict. It keeps the items that are added to it and nothing else."""

    __slots__ = ()

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


SIZE = StandIn(_size_of)
LAYOUT = StandIn(_layout_of)


def record(name: str) -> type[Record]:
    """A class of records of its own."""
    return type(name, (Record,), {"__slots__": ()})


def integers(values: Any) -> tuple[int, ...]:
    """Return sizes or offsets. Raises ValueError for anything but a tuple of integers that fit 60 bits."""
    if type(values) is not tuple or len(values) > MAX_DIMENSIONS:
        raise ValueError("a shape or an offset is no tuple of integers")
    if not all(type(n) is int and 0 <= n < 2**60 for n in values):
        raise ValueError("a size or an offset is none")
    return values


def refused(where: str, name: str) -> UnsafeValueError:
    """The error for a pickle that needs a class or function that is not known."""
    return UnsafeValueError(f"{where} names {name[:MAX_NAME]}, which such metadata never does: it was refused")


def load_inert(
    data: bytes,
    allowed: Mapping[tuple[str, str], Any],
    where: str,
    persistent_load: Callable[[Any], Any] | None = None,
    *,
    takes_foreign: bool = False,
) -> tuple[Any, int]:
    """Unpickle.

    Args:
        data: begins with the pickle; what follows it is left.
        allowed: what stands for each global, by module and name. dtypes of torch stand for their names.
        where: what errors call the pickle.
        persistent_load: what stands for a persistent id.
        takes_foreign: whether other globals become a `Foreign`; by default they are refused.

    Returns: what was pickled, and the byte after the pickle's end.

    Raises UnsafeValueError where it names anything else; CorruptCheckpointError where it is no pickle.
    """

    foreign: dict[tuple[str, str], type[Foreign]] = {}

    class Inert(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in allowed:
                return allowed[module, name]
            if module == "torch" and name in ITEMSIZES:
                return name
            if not takes_foreign:
                raise refused(where, f"{module}.{name}")
            if (module, name) not in foreign:
                if len(foreign) == MAX_FOREIGN:  # a class takes more memory than its name in the pickle
                    return Foreign
                of = f"{module[:MAX_NAME]}.{name[:MAX_NAME]}"
                foreign[module, name] = type("Foreign", (Foreign,), {"of": of, "__slots__": ()})
            return foreign[module, name]

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
    except Exception as error:  # whatever bytes that are no pickle make of the machine
        raise CorruptCheckpointError(f"{where} cannot be read: {reason(error)}") from error
    return found, stream.tell()
