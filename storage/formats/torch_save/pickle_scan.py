"""Check a pickle before an unpickler reads it: count what an unpickler would hash, copy and allocate.

A few bytes can make an unpickler hash a tuple that contains another tuple twice, forty levels deep, copy one list many
times, or allocate memory for bytes that do not follow. None of this raises an error, and much of it runs in C, where
Python does not handle signals.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
from collections.abc import Callable
from typing import Any, ClassVar

from torch._utils import IMPORT_MAPPING, NAME_MAPPING

from ...tensors.plain_json import MAX_HASH_COLLISIONS

MAX_PICKLE_BYTES = 2**30
"""The largest size of a pickle."""
MAX_DEPTH = 100
"""How deeply tuples and frozensets may be nested."""
MAX_HASHED_PER_BYTE = 64
"""How many values all keys together may hold, for each byte of the pickle."""
MAX_COPIED_PER_BYTE = 1
"""How many values the arguments of all classes and functions together may hold, for each byte of the pickle."""
FREE_VALUES = 64 * 1024
"""How many values keys, and arguments, may hold in addition, in a pickle of any size."""
MAX_COLLIDING_VALUES = 20_000
"""How many values keys may hold if a writer can choose their hashes and the scan cannot compute them."""
MIN_BYTES_PER_SET = 8
"""How many bytes of a pickle each set accounts for. Without this limit, a set of 216 bytes takes one byte of pickle."""
TEXT_BYTES_PER_VALUE = 64
"""How many bytes of a string, or of bytes, count as one value."""

# The scan represents a Python value by one of these:
# - bytes, for None, a boolean, a number or an empty string: the opcode and its argument. The scan can compute the hash.
# - a list, for a list, dict or set, which can grow: [weight of its items, {hash: number of its items with this hash}].
#   Both stay empty if nothing in the pickle can copy the container.
# - a tuple, for a Python tuple that the scan has to look into: (header, constants or None, containers that can grow).
#   The constants are its items, if all of them are constants. Other Python tuples are represented by the header alone.
# - an integer, the header, for everything else: flags in the lowest 8 bits, then the depth of nested tuples in 7 bits,
#   then the weight. The weight is the number of values that the value holds; shared values count each time.
_COLLIDES = 1
"""A writer can choose the hash of the value, and the scan does not know the hash."""
_IS_TUPLE = 2
_ALLOCATES = 4
"""A class or function that allocates memory by a number; or a tuple that begins with one."""
_COPIES = 8
"""A class or function that copies the items of its argument; or a tuple that begins with one."""
_IS_BYTEARRAY = 16
_BEGINS_WITH_NUMBER = 32
_CALLABLE = 64
_HOLDS_MANY = 128
"""A tuple that holds more containers than the scan follows."""
_DEPTH = 256
_DEPTHS = 127 * _DEPTH
_WEIGHT = 128 * _DEPTH
_SHIFT = _WEIGHT.bit_length() - 1
_ATOM = _WEIGHT
_MADE = _WEIGHT | _CALLABLE
"""A class, a function, or a value that one of them returned."""
_EMPTY_TUPLE = (_WEIGHT | _DEPTH | _IS_TUPLE, (), ())
_MAX_CONTAINERS = 16
"""How many containers in a tuple the scan follows."""
_MAX_LONG_BYTES = 128
"""The largest integer whose hash the scan computes."""
_MAX_CONSTANTS = 1000
"""The largest tuple whose hash the scan computes."""
_EMPTY_STRING = b"E"
"""Represents an empty string. No opcode of pickle has this byte."""


def _codes(*opcodes: bytes) -> list[int]:
    return [opcode[0] for opcode in opcodes]


_OPCODE_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_BINGET, _MEMOIZE, _STOP = _codes(pickle.BINGET, pickle.MEMOIZE, pickle.STOP)
_BININT, _BININT1, _BININT2, _BINFLOAT = _codes(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.BINFLOAT)
_LONG1, _LONG4 = _codes(pickle.LONG1, pickle.LONG4)
_SINGLETONS = {pickle.NONE[0]: None, pickle.NEWTRUE[0]: True, pickle.NEWFALSE[0]: False, _EMPTY_STRING[0]: ""}
_ARGUMENT_BYTES = {
    **dict.fromkeys(_codes(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE), 0),
    _BININT1: 1,
    _BININT2: 2,
    _BININT: 4,
    _BINFLOAT: 8,
}
"""The opcodes of constants, and the size of their argument."""
_LENGTH_BYTES = {
    **dict.fromkeys(_codes(pickle.SHORT_BINUNICODE, pickle.SHORT_BINBYTES, pickle.SHORT_BINSTRING, pickle.LONG1), 1),
    **dict.fromkeys(_codes(pickle.BINUNICODE, pickle.BINBYTES, pickle.BINSTRING, pickle.LONG4), 4),
    **dict.fromkeys(_codes(pickle.BINUNICODE8, pickle.BINBYTES8, pickle.BYTEARRAY8), 8),
}
"""The opcodes of strings, bytes, bytearrays and long integers, and the size of the length before their content."""
_NUMBERS = frozenset(_codes(pickle.BININT1, pickle.BININT2, pickle.BININT, pickle.BINFLOAT, pickle.LONG1, pickle.LONG4))
_NEVER_COLLIDE = frozenset([*_ARGUMENT_BYTES, _EMPTY_STRING[0]])
"""Opcodes of constants. Only a few different constants of one opcode can have the same hash."""
_COPYING = {
    *(("builtins", name) for name in ("set", "frozenset", "bytearray")),
    ("collections", "OrderedDict"),
    ("collections", "Counter"),
    ("_codecs", "encode"),
    ("torch", "Size"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch._utils", "_rebuild_parameter_with_state"),
}
"""Classes and functions that copy the items of a list or dict that they get."""
_ALLOCATING = {
    ("torch._utils", "_rebuild_device_tensor_from_numpy"),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"),
}
_TENSOR_MODULES = {"torch", "torch.cuda", "torch.sparse", "torch.cuda.sparse", "torch.storage"}
"""Modules with classes that can be called with a size, as in torch.FloatTensor(10)."""


def check_pickle(data: bytes, *, calls: bool = True) -> None:
    """Check that unpickling needs time and memory in proportion to the size of the pickle.

    This follows the opcodes to the end and creates no objects. It accepts the opcodes that protocols 2 to 5 write.

    Args:
        data: the pickle. Bytes after its end are ignored.
        calls: whether the unpickler calls the classes and functions of torch and Python, as torch.load does.

    Raises:
        ValueError, LookupError: the pickle is malformed, or does something that no honest pickle does.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise ValueError(f"the pickle has {len(data)} bytes, more than {MAX_PICKLE_BYTES}")
    _Scan(data, calls).run()


class _Scan:
    """A scan of one pickle: a stack machine, as an unpickler, that keeps headers and weights instead of values."""

    def __init__(self, data: bytes, calls: bool) -> None:
        self._data = data
        self._calls = calls
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._hashed = 0
        self._copied = 0
        self._colliding = 0
        self._sets = 0

    def run(self) -> None:
        """Scan the whole pickle. Raise ValueError or LookupError if it exceeds a limit or is malformed."""
        self._follow()
        nbytes = len(self._data)
        if self._copied > FREE_VALUES + MAX_COPIED_PER_BYTE * nbytes:
            raise ValueError("it has the same values copied again and again")
        if self._hashed > FREE_VALUES + MAX_HASHED_PER_BYTE * nbytes:
            raise _too_many_hashed()
        if self._colliding > MAX_COLLIDING_VALUES:
            raise ValueError(
                f"its keys hold more than {MAX_COLLIDING_VALUES} values that can be chosen to have the same hash"
            )

    def _follow(self) -> None:
        data, stack, memo, handlers = self._data, self._stack, self._memo, self._HANDLERS
        at, previous = 0, -1
        while True:
            opcode = data[at]
            at += 1
            # The most frequent opcodes are handled here, without a call.
            if opcode == _MEMOIZE:
                if previous == _MEMOIZE:
                    raise ValueError("it numbers a value twice")
                memo[len(memo)] = stack[-1]
            elif opcode == _BINGET:
                stack.append(memo[data[at]])
                at += 1
            elif opcode in _ARGUMENT_BYTES:
                begin, at = at - 1, at + _ARGUMENT_BYTES[opcode]
                stack.append(data[begin:at])
            elif opcode in handlers:
                at = handlers[opcode](self, opcode, at)
            elif opcode == _STOP:
                if not stack:
                    raise IndexError("the stack is empty")
                return
            else:
                raise ValueError(f"it has the opcode {_opcode_name(opcode)}, which nothing that is stored here needs")
            previous = opcode

    # Each of the following handles some opcodes. It gets the opcode and the position of the opcode's argument, and
    # returns the position of the next opcode.

    def _load_counted(self, opcode: int, at: int) -> int:
        data = self._data
        begin = at + _LENGTH_BYTES[opcode]
        nbytes = int.from_bytes(data[at:begin], "little")
        end = begin + nbytes
        if end > len(data):  # an unpickler allocates memory for a bytearray before it reads it
            raise ValueError(
                f"it has the opcode {_opcode_name(opcode)} with {nbytes} bytes, but only {len(data)} bytes in all"
            )
        if opcode != _LONG1 and opcode != _LONG4:
            self._stack.append((1 + nbytes // TEXT_BYTES_PER_VALUE) * _WEIGHT if nbytes else _EMPTY_STRING)
        elif nbytes <= _MAX_LONG_BYTES:
            self._stack.append(data[at - 1 : end])
        else:
            self._stack.append((1 + nbytes // 8) * _WEIGHT | _COLLIDES)
        return end

    def _load_empty_container(self, opcode: int, at: int) -> int:
        self._stack.append([0, None])
        return at

    def _load_empty_set(self, opcode: int, at: int) -> int:
        self._count_set()
        self._stack.append([0, None])
        return at

    def _load_empty_tuple(self, opcode: int, at: int) -> int:
        self._stack.append(_EMPTY_TUPLE)
        return at

    def _load_tuple1(self, opcode: int, at: int) -> int:
        self._stack[-1] = _tuple([self._stack[-1]])
        return at

    def _load_tuple2_or_tuple3(self, opcode: int, at: int) -> int:
        begin = len(self._stack) - (2 if opcode == pickle.TUPLE2[0] else 3)
        if begin < 0:
            raise IndexError("the stack is empty")
        self._stack[begin:] = [_tuple(self._stack[begin:])]
        return at

    def _load_mark(self, opcode: int, at: int) -> int:
        self._marks.append(len(self._stack))
        return at

    def _pop_to_mark(self) -> list[Any]:
        begin = self._marks.pop()
        items = self._stack[begin:]
        del self._stack[begin:]
        return items

    def _load_tuple(self, opcode: int, at: int) -> int:
        items = self._pop_to_mark()
        self._stack.append(_tuple(items))
        return at

    def _load_frozenset(self, opcode: int, at: int) -> int:
        self._count_set()
        items = self._pop_to_mark()
        self._hash(items, [0, None])
        self._stack.append(_tuple(items, is_set=True))
        return at

    def _load_setitem(self, opcode: int, at: int) -> int:
        items = self._stack[-2:]
        del self._stack[-2:]
        self._grow(items)
        self._hash(items[:1], self._stack[-1])
        return at

    def _load_setitems(self, opcode: int, at: int) -> int:
        items = self._pop_to_mark()
        self._grow(items)
        self._hash(items[::2], self._stack[-1])
        return at

    def _load_additems(self, opcode: int, at: int) -> int:
        items = self._pop_to_mark()
        self._grow(items)
        self._hash(items, self._stack[-1])
        return at

    def _load_append(self, opcode: int, at: int) -> int:
        self._append([self._stack.pop()])
        return at

    def _load_appends(self, opcode: int, at: int) -> int:
        self._append(self._pop_to_mark())
        return at

    def _load_long_binget(self, opcode: int, at: int) -> int:
        self._stack.append(self._memo[int.from_bytes(self._data[at : at + 4], "little")])
        return at + 4

    def _load_put(self, opcode: int, at: int) -> int:
        end = at + (1 if opcode == pickle.BINPUT[0] else 4)
        number = int.from_bytes(self._data[at:end], "little")
        if number > len(self._data):
            raise ValueError(f"it numbers a value {number}, and has {len(self._data)} bytes")
        self._memo[number] = self._stack[-1]
        return end

    def _load_global(self, opcode: int, at: int) -> int:
        middle = self._data.index(b"\n", at)
        end = self._data.index(b"\n", middle + 1)
        module, name = self._data[at:middle].decode(), self._data[middle + 1 : end].decode()
        self._stack.append(_global(module, name) if self._calls else _MADE)
        return end + 1

    def _load_stack_global(self, opcode: int, at: int) -> int:
        self._stack.pop()
        self._stack[-1] = _MADE
        return at

    def _load_binpersid(self, opcode: int, at: int) -> int:
        self._stack[-1] = _ATOM
        return at

    def _load_reduce_or_newobj(self, opcode: int, at: int) -> int:
        stack = self._stack
        arguments = stack.pop()
        if arguments is _EMPTY_TUPLE and stack[-1] == _MADE:
            stack[-1] = _MADE
        else:
            stack[-1] = self._call(stack[-1], arguments, is_reduce=opcode == pickle.REDUCE[0])
        return at

    def _load_newobj_ex(self, opcode: int, at: int) -> int:
        named, arguments = self._stack.pop(), self._stack.pop()
        self._copied += _weight(named) + _container_weight(named)
        if self._stack[-1] != _MADE:
            raise ValueError("it passes arguments by name to a class that takes none")
        self._stack[-1] = self._call(self._stack[-1], arguments, is_reduce=False)
        return at

    def _load_build(self, opcode: int, at: int) -> int:
        state = self._stack.pop()
        if self._calls:
            self._copied += _weight(state) + _container_weight(state)
        if not self._stack:
            raise IndexError("the stack is empty")
        return at

    def _load_proto(self, opcode: int, at: int) -> int:
        return at + 1

    def _load_frame(self, opcode: int, at: int) -> int:
        return at + 8

    _HANDLERS: ClassVar[dict[int, Callable[[_Scan, int, int], int]]] = {
        **dict.fromkeys(_LENGTH_BYTES, _load_counted),
        **dict.fromkeys(_codes(pickle.EMPTY_LIST, pickle.EMPTY_DICT), _load_empty_container),
        pickle.EMPTY_SET[0]: _load_empty_set,
        pickle.EMPTY_TUPLE[0]: _load_empty_tuple,
        pickle.TUPLE1[0]: _load_tuple1,
        **dict.fromkeys(_codes(pickle.TUPLE2, pickle.TUPLE3), _load_tuple2_or_tuple3),
        pickle.MARK[0]: _load_mark,
        pickle.TUPLE[0]: _load_tuple,
        pickle.FROZENSET[0]: _load_frozenset,
        pickle.SETITEM[0]: _load_setitem,
        pickle.SETITEMS[0]: _load_setitems,
        pickle.ADDITEMS[0]: _load_additems,
        pickle.APPEND[0]: _load_append,
        pickle.APPENDS[0]: _load_appends,
        pickle.LONG_BINGET[0]: _load_long_binget,
        **dict.fromkeys(_codes(pickle.BINPUT, pickle.LONG_BINPUT), _load_put),
        pickle.GLOBAL[0]: _load_global,
        pickle.STACK_GLOBAL[0]: _load_stack_global,
        pickle.BINPERSID[0]: _load_binpersid,
        **dict.fromkeys(_codes(pickle.REDUCE, pickle.NEWOBJ), _load_reduce_or_newobj),
        pickle.NEWOBJ_EX[0]: _load_newobj_ex,
        pickle.BUILD[0]: _load_build,
        pickle.PROTO[0]: _load_proto,
        pickle.FRAME[0]: _load_frame,
    }

    def _call(self, called: Any, arguments: Any, *, is_reduce: bool) -> Any:
        """Return what represents the result of a class or function that is called with some arguments."""
        if type(called) is not int or not called & _CALLABLE:
            raise ValueError("it calls something that is neither a class nor a function")
        header = arguments[0] if type(arguments) is tuple else arguments if type(arguments) is int else 0
        if not header & _IS_TUPLE:
            raise ValueError("it calls a class or function with arguments that are not a tuple")
        self._copied += header >> _SHIFT
        if not called & (_COPIES | _ALLOCATES):
            return _MADE | _COLLIDES if is_reduce or self._calls else _MADE
        if called & _ALLOCATES:
            raise ValueError("it makes a tensor or storage of a size, which has no values in the file")
        if header & (_ALLOCATES | _COPIES):
            raise ValueError("it calls a class that allocates memory through another one")
        if called & _IS_BYTEARRAY and header & _BEGINS_WITH_NUMBER:
            raise ValueError("it makes a bytearray from the number of its bytes")
        if header & _HOLDS_MANY:
            raise ValueError("it passes many lists at once to a class")
        held = _container_weight(arguments)
        self._copied += held
        self._hashed += held + (header >> _SHIFT)
        for container in arguments[2] if type(arguments) is tuple else ():
            if container[1] and max(container[1].values()) > MAX_HASH_COLLISIONS:
                raise _too_many_collisions()
        return [held + (header >> _SHIFT), None]

    def _grow(self, items: list[Any]) -> None:
        """Add the weight of items to the list, dict or set at the top of the stack."""
        container = self._stack[-1]
        if self._calls and type(container) is list:
            container[0] += sum(map(_weight, items))

    def _append(self, items: list[Any]) -> None:
        """Append items to the list at the top of the stack. If it cannot be copied, its items do not matter."""
        if self._calls:
            self._grow(items)
            _count_hashes(items, self._stack[-1])

    def _hash(self, keys: list[Any], container: Any) -> None:
        """Count what it takes to hash the keys of a dict, or the items of a set."""
        weight = 0
        constants: list[Any] = []
        for key in keys:
            header = key
            if type(key) is not int:
                if type(key) is list:
                    weight += 1
                    continue
                constants.append(key)
                if type(key) is bytes:
                    weight += 1 + len(key) // 8
                    continue
                header = key[0]
            weight += header >> _SHIFT
            if header & _COLLIDES:
                self._colliding += header >> _SHIFT
        self._hashed += weight
        if self._hashed > FREE_VALUES + MAX_HASHED_PER_BYTE * len(self._data):
            raise _too_many_hashed()
        if constants:
            most = _count_hashes(constants, container)
            if most is not None and most > MAX_HASH_COLLISIONS:
                raise _too_many_collisions()

    def _count_set(self) -> None:
        self._sets += 1
        if self._sets * MIN_BYTES_PER_SET > len(self._data):
            raise ValueError("it has more sets than its bytes can fill")


def _opcode_name(opcode: int) -> str:
    return f"{_OPCODE_NAMES[opcode]} ({opcode:#04x})" if opcode in _OPCODE_NAMES else f"{opcode:#04x}"


def _too_many_hashed() -> ValueError:
    return ValueError("its keys hold the same values again and again")


def _too_many_collisions() -> ValueError:
    return ValueError(f"more than {MAX_HASH_COLLISIONS} keys of a dict or set have the same hash")


def _global(module: str, name: str) -> int:
    """Return the header of a class or function. The names of Python 2 are mapped as torch maps them."""
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[module, name]
    else:
        module = IMPORT_MAPPING.get(module, module)
    if (module, name) in _COPYING:
        return _MADE | _COPIES | (_IS_BYTEARRAY if name == "bytearray" else 0)
    is_tensor = module in _TENSOR_MODULES and name.endswith(("Tensor", "Storage"))
    if is_tensor or (module, name) in _ALLOCATING:
        return _MADE | _ALLOCATES
    return _MADE


def _weight(value: Any) -> int:
    """Return how many values a value holds, except the items of lists, dicts and sets."""
    kind = type(value)
    if kind is int:
        return int(value >> _SHIFT)
    if kind is bytes:
        return 1 + len(value) // 8
    return int(value[0] >> _SHIFT) if kind is tuple else 1


def _container_weight(value: Any) -> int:
    """Return how many values the lists, dicts and sets in a value hold."""
    if type(value) is list:
        return int(value[0])
    return sum(container[0] for container in value[2]) if type(value) is tuple else 0


def _count_hashes(values: list[Any], container: Any) -> int | None:
    """Count the hashes of the items of a list, dict or set.

    Values whose hash is unknown, and constants that cannot collide, are not counted.

    Returns:
        The highest count of a hash that one of the values has, or None if none of them was counted.
    """
    most: int | None = None
    for value in values:
        kind = type(value)
        if kind is bytes:
            if value[0] in _NEVER_COLLIDE:
                continue
        elif kind is not tuple or value[1] is None:
            continue
        if type(container) is not list:
            return None
        if container[1] is None:
            container[1] = {}
        counts = container[1]
        found = hash(_constant(value))
        counts[found] = count = counts.get(found, 0) + 1
        most = count if most is None or count > most else most
    return most


def _constant(value: Any) -> Any:
    """Return the Python value of a constant, or of a tuple of constants."""
    if type(value) is tuple:
        return tuple(map(_constant, value[1]))
    opcode, argument = value[0], value[1:]
    if opcode == _BININT:
        return int.from_bytes(argument, "little", signed=True)
    if opcode == _BINFLOAT:
        return struct.unpack(">d", argument)[0] if len(argument) == 8 else 0.0
    if opcode in (_LONG1, _LONG4):
        return int.from_bytes(argument[_LENGTH_BYTES[opcode] :], "little", signed=True)
    if opcode in (_BININT1, _BININT2):
        return int.from_bytes(argument, "little")
    return _SINGLETONS[opcode]


def _tuple(values: list[Any], *, is_set: bool = False) -> Any:
    """Return what represents a tuple, or a frozenset, of some values. Raise ValueError if it is nested too deeply."""
    depth = flags = constants = 0
    weight = 1
    containers: Any = ()
    for at, value in enumerate(values):
        kind = type(value)
        if kind is bytes:
            weight += 1 + len(value) // 8
            constants += 1
            if at == 0 and value[0] in _NUMBERS:
                flags |= _BEGINS_WITH_NUMBER
            continue
        if kind is list:
            containers = (*containers, value)
            weight += 1
            continue
        if kind is tuple:
            if value[2]:
                containers = (*containers, *value[2]) if containers else value[2]
            constants += value[1] is not None
            value = value[0]
        depth = max(depth, value & _DEPTHS)
        weight += value >> _SHIFT
        flags |= value & (_COLLIDES | _HOLDS_MANY)
        if at == 0:
            flags |= value & (_ALLOCATES | _COPIES)
    if depth >= MAX_DEPTH * _DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} tuples are nested")
    if len(containers) > _MAX_CONTAINERS:
        containers, flags = containers[:_MAX_CONTAINERS], flags | _HOLDS_MANY
    known: Any = None
    if constants == len(values) and not flags & _COLLIDES:
        if weight <= _MAX_CONSTANTS and not is_set:
            known = tuple(values)
        else:
            flags |= _COLLIDES
    header = weight << _SHIFT | (depth + _DEPTH) | flags | (0 if is_set else _IS_TUPLE)
    return (header, known, containers) if containers or known is not None else header
