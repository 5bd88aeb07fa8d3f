"""Pickles of torch as inert records: what they say, without running any code of torch, or of anybody.

Every class and function that a pickle may name is one of a list, and stands for a record of what it was given. Any
other name is refused, before anything is made of it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

from ...planner.index import ITEMSIZES
from ..errors import CorruptCheckpointError, UnsafeObjectError
from .pickle_ops import check_operations


class Record:
    """What stands for an object of a class: its arguments, and the state that was set."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """An attribute, None where it has none."""
        return self.state.get(name) if isinstance(self.state, dict) else None


def record(name: str) -> type[Record]:
    """A class of records of its own."""
    return type(name, (Record,), {})


def integers(values: Any) -> tuple[int, ...]:
    """What stands for a torch.Size. Raises ValueError for anything but integers that fit 60 bits."""
    found = tuple(values)
    if not all(type(n) is int and 0 <= n < 2**60 for n in found):
        raise ValueError("a size or an offset is none")
    return found


def load_inert(
    data: bytes,
    allowed: Mapping[tuple[str, str], Any],
    where: str,
    persistent_load: Callable[[Any], Any] | None = None,
) -> tuple[Any, int]:
    """Unpickle.

    Args:
        data: begins with the pickle; what follows it is left.
        allowed: what stands for each global, by module and name. dtypes of torch stand for their names.
        where: what errors call the pickle.
        persistent_load: what stands for a persistent id.

    Returns: what was pickled, and the byte after the pickle's end.

    Raises UnsafeObjectError where it names anything else; CorruptCheckpointError where it is no pickle.
    """

    class Inert(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in allowed:
                return allowed[module, name]
            if module == "torch" and name in ITEMSIZES:
                return name
            raise UnsafeObjectError(f"{where} names {module}.{name}, which such metadata never does: it was refused")

        def persistent_load(self, pid: Any) -> Any:
            if persistent_load is None:
                raise pickle.UnpicklingError("it has a persistent id")
            return persistent_load(pid)

    stream = io.BytesIO(data)
    try:
        check_operations(data)
        found = Inert(stream).load()
    except UnsafeObjectError:
        raise
    except Exception as error:  # whatever bytes that are no pickle make of the machine
        raise CorruptCheckpointError(f"{where} cannot be read: {error!r}") from error
    return found, stream.tell()
