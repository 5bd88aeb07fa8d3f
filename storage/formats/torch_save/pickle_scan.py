"""Check a pickle before an unpickler reads it: what it would make a process hash, copy, and take memory for.

A few bytes can make an unpickler hash a tuple that contains another one twice, forty levels deep; copy one list many
times; or allocate memory for bytes that do not follow. None of this raises an error, and much of it runs in C, where
Python does not handle signals.
"""

from __future__ import annotations

import struct
from typing import Any

from torch._utils import IMPORT_MAPPING, NAME_MAPPING

from ...tensors.plain_json import MAX_HASH_COLLISIONS

MAX_PICKLE_BYTES = 2**30
"""No pickle is larger."""
MAX_DEPTH = 100
"""How deeply tuples and frozensets may be nested in each other."""
MAX_HASHED = 64
"""How many values all keys may hold, for each byte of the pickle."""
MAX_COPIED = 1
"""How many values all that classes and functions are given may hold, for each byte of the pickle."""
FREE = 64 * 1024
"""How many values both may hold in a pickle of any size."""
MAX_COLLIDING = 20_000
"""How many values those keys may hold whose hashes can be chosen, and are not known before they are made."""
BYTES_OF_SET = 8
"""How many bytes of a pickle each set takes at least, so that a byte is not a set of 216 bytes."""
TEXT_BYTES = 64
"""Each of these bytes of a string counts as a value."""

# A value is one of these:
# - bytes: the operation of a constant whose hash anybody can know, as a number or None.
# - an integer of flags, depth and weight. The weight is the number of values that it holds, those that are shared
#   counted each time.
# - a list, where it can grow: the weight of what was added to it, and how many of that have each hash. Both are noted
#   only if something can copy it.
# - a tuple, for a tuple: its integer; the constants in it, if it holds nothing else; the values in it that can grow.
_COLLIDES = 1
"""Its hash can be chosen, and is not known here."""
_IS_TUPLE = 2
_ALLOCATES = 4
"""It is a class or function that takes memory by a number. Of a tuple, the first value is."""
_COPIES = 8
"""It is a class or function that copies the items of what it is given. Of a tuple, the first value is."""
_IS_BYTEARRAY = 16
_BEGINS_WITH_NUMBER = 32
_CALLABLE = 64
_MANY = 128
"""More values in it can grow than are followed."""
_DEPTH = 256
_DEPTHS = 127 * _DEPTH
_WEIGHT = 128 * _DEPTH
_SHIFT = _WEIGHT.bit_length() - 1
_ATOM = _WEIGHT
_MADE = _WEIGHT | _CALLABLE
"""A class, a function, or what one made."""
_EMPTY_TUPLE = (_WEIGHT | _DEPTH | _IS_TUPLE, (), ())
_MAX_GROWING = 16
_MAX_LONG = 128
"""Bytes of an integer whose hash is worked out."""
_MAX_CONSTANTS = 1000
"""In a tuple whose hash is worked out."""

_CONSTANTS = {**dict.fromkeys(b"N\x88\x89", 0), b"K"[0]: 1, b"M"[0]: 2, b"J"[0]: 4, b"G"[0]: 8}
"""Operations that push None, a boolean or a number; and the bytes of their argument."""
_COUNTED = {
    **dict.fromkeys(b"\x8cCU\x8a", 1), **dict.fromkeys(b"XBT\x8b", 4), **dict.fromkeys(b"\x8d\x8e\x96", 8),
}  # fmt: skip
"""Those that push a string, bytes, a bytearray or a long integer; and the bytes of its length."""
_LONGS = b"\x8a\x8b"
_NUMBERS = b"KMJG\x8a\x8b"
_NEVER_COLLIDE = b"N\x88\x89KMJGE"
"""Constants of which only a few different ones have the same hash. E is an empty string."""
_COPYING = {
    *(("builtins", name) for name in ("set", "frozenset", "bytearray")),
    ("collections", "OrderedDict"),
    ("collections", "Counter"),
    ("_codecs", "encode"),
    ("torch", "Size"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch._utils", "_rebuild_parameter_with_state"),
}
"""What copies the items of a list or dict that it is given."""
_ALLOCATING = {
    ("torch._utils", "_rebuild_device_tensor_from_numpy"),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"),
}
_TENSOR_MODULES = {"torch", "torch.cuda", "torch.sparse", "torch.cuda.sparse", "torch.storage"}
"""Modules with classes that can be called with a size, as torch.FloatTensor(10)."""


def check_pickle(data: bytes, *, calls: bool = True) -> None:
    """Follow a pickle to its end without making anything of it. It may use what protocols 2 to 5 write.

    Args:
        calls: whether what is called in it will be torch's and Python's own classes and functions, as by torch.load.

    Raises ValueError or LookupError where it does what no honest one does.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise ValueError(f"the pickle has {len(data)} bytes, more than {MAX_PICKLE_BYTES}")
    _Check(data, calls).run()


class _Check:
    """What a pickle would make an unpickler do."""

    def __init__(self, data: bytes, calls: bool = True) -> None:
        self._data = data
        self._calls = calls
        self._hashed = 0
        self._copied = 0
        self._colliding = 0
        self._sets = 0

    def run(self) -> None:
        """Raises ValueError, LookupError."""
        self._follow()
        nbytes = len(self._data)
        if self._copied > FREE + MAX_COPIED * nbytes:
            raise ValueError("it has the same values copied again and again")
        if self._hashed > FREE + MAX_HASHED * nbytes:
            raise ValueError("its keys hold the same values again and again")
        if self._colliding > MAX_COLLIDING:
            raise ValueError(f"its keys hold more than {MAX_COLLIDING} values that can be chosen to have the same hash")

    def _follow(self) -> None:
        data = self._data
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}
        at, most = 0, len(data)
        last = 0
        push, pop = stack.append, stack.pop
        calls = self._calls
        while True:
            operation = data[at]
            at += 1
            if operation == 0x94:  # MEMOIZE
                if last == 0x94:
                    raise ValueError("it numbers a value twice")
                memo[len(memo)] = stack[-1]
            elif operation == 0x68:  # BINGET
                push(memo[data[at]])
                at += 1
            elif operation in _CONSTANTS:
                begin, at = at - 1, at + _CONSTANTS[operation]
                push(data[begin:at])
            elif operation in _COUNTED:
                first = at - 1
                begin = at + _COUNTED[operation]
                nbytes = int.from_bytes(data[at:begin], "little")
                at = begin + nbytes
                if at > most:  # an unpickler takes memory for a bytearray before it reads it
                    raise ValueError(f"it has the operation {operation:#04x} of {nbytes} bytes, and {most} in all")
                if operation in _LONGS and nbytes <= _MAX_LONG:
                    push(data[first:at])
                elif operation in _LONGS:
                    push((1 + nbytes // 8) * _WEIGHT | _COLLIDES)
                else:
                    push((1 + nbytes // TEXT_BYTES) * _WEIGHT if nbytes else b"E")
            elif operation == 0x85:  # TUPLE1
                stack[-1] = _tuple([stack[-1]])
            elif operation == 0x52 or operation == 0x81:  # REDUCE, NEWOBJ
                given = pop()
                if given is _EMPTY_TUPLE and stack[-1] == _MADE:
                    stack[-1] = _MADE
                else:
                    stack[-1] = self._call(stack[-1], given, is_reduced=operation == 0x52)
            elif operation == 0x62:  # BUILD
                given = pop()
                if calls:
                    self._copied += _weight(given) + _grown_weight(given)
                if not stack:
                    raise IndexError("the stack is empty")
            elif operation == 0x28:  # MARK
                marks.append(len(stack))
            elif operation == 0x75:  # SETITEMS
                begin = marks.pop()
                items = stack[begin:]
                del stack[begin:]
                if calls:
                    _grow(stack[-1], items)
                self._hash(items[::2], stack[-1])
            elif operation == 0x7D or operation == 0x5D:  # EMPTY_DICT, EMPTY_LIST
                push([0, None])
            elif operation == 0x86 or operation == 0x87:  # TUPLE2, TUPLE3
                begin = len(stack) - (2 if operation == 0x86 else 3)
                if begin < 0:
                    raise IndexError("the stack is empty")
                stack[begin:] = [_tuple(stack[begin:])]
            elif operation == 0x29:  # EMPTY_TUPLE
                push(_EMPTY_TUPLE)
            elif operation == 0x6A:  # LONG_BINGET
                push(memo[int.from_bytes(data[at : at + 4], "little")])
                at += 4
            elif operation == 0x71 or operation == 0x72:  # BINPUT, LONG_BINPUT
                begin, at = at, at + (1 if operation == 0x71 else 4)
                number = int.from_bytes(data[begin:at], "little")
                if number > most:
                    raise ValueError(f"it numbers a value {number}, and has {most} bytes")
                memo[number] = stack[-1]
            elif operation == 0x74:  # TUPLE
                begin = marks.pop()
                stack[begin:] = [_tuple(stack[begin:])]
            elif operation == 0x93:  # STACK_GLOBAL
                pop()
                stack[-1] = _MADE
            elif operation == 0x73:  # SETITEM
                items = stack[-2:]
                del stack[-2:]
                if calls:
                    _grow(stack[-1], items)
                self._hash(items[:1], stack[-1])
            elif operation == 0x61:  # APPEND
                items = [pop()]
                if calls:
                    _grow(stack[-1], items)
                    _note_hashes(items, stack[-1])
            elif operation == 0x65:  # APPENDS
                begin = marks.pop()
                items = stack[begin:]
                del stack[begin:]
                if calls:
                    _grow(stack[-1], items)
                    _note_hashes(items, stack[-1])
            elif operation == 0x63:  # GLOBAL
                middle = data.index(b"\n", at)
                end = data.index(b"\n", middle + 1)
                of = data[at:middle].decode(), data[middle + 1 : end].decode()
                push(_global(*of) if calls else _MADE)
                at = end + 1
            elif operation == 0x51:  # BINPERSID
                stack[-1] = _ATOM
            elif operation == 0x8F:  # EMPTY_SET
                self._count_set()
                push([0, None])
            elif operation == 0x90:  # ADDITEMS
                begin = marks.pop()
                items = stack[begin:]
                del stack[begin:]
                if calls:
                    _grow(stack[-1], items)
                self._hash(items, stack[-1])
            elif operation == 0x91:  # FROZENSET
                self._count_set()
                begin = marks.pop()
                items = stack[begin:]
                self._hash(items, [0, None])
                stack[begin:] = [_tuple(items, is_set=True)]
            elif operation == 0x92:  # NEWOBJ_EX
                named, given = pop(), pop()
                self._copied += _weight(named) + _grown_weight(named)
                if stack[-1] != _MADE:
                    raise ValueError("it calls what takes no arguments by name")
                stack[-1] = self._call(stack[-1], given, is_reduced=False)
            elif operation == 0x80:  # PROTO
                at += 1
            elif operation == 0x95:  # FRAME
                at += 8
            elif operation == 0x2E:  # STOP
                if not stack:
                    raise IndexError("the stack is empty")
                return
            else:
                raise ValueError(f"it has the operation {operation:#04x}, which nothing that is stored here needs")
            last = operation

    def _call(self, called: Any, given: Any, *, is_reduced: bool) -> Any:
        """Return what a class or function makes of its arguments."""
        if type(called) is not int or not called & _CALLABLE:
            raise ValueError("it calls what is no class and no function")
        flags = given[0] if type(given) is tuple else given if type(given) is int else 0
        if not flags & _IS_TUPLE:
            raise ValueError("it calls a class or function with what is no tuple")
        self._copied += flags >> _SHIFT
        if not called & (_COPIES | _ALLOCATES):
            return _MADE | _COLLIDES if is_reduced or self._calls else _MADE
        if called & _ALLOCATES:
            raise ValueError("it makes a tensor or storage of a size, which has no values in the file")
        if flags & (_ALLOCATES | _COPIES):
            raise ValueError("it calls a class that takes memory through another one")
        if called & _IS_BYTEARRAY and flags & _BEGINS_WITH_NUMBER:
            raise ValueError("it makes a bytearray by the number of its bytes")
        if flags & _MANY:
            raise ValueError("it gives a class many lists at once")
        grown = _grown_weight(given)
        self._copied += grown
        self._hashed += grown + (flags >> _SHIFT)
        for part in given[2] if type(given) is tuple else ():
            if part[1] and max(part[1].values()) > MAX_HASH_COLLISIONS:
                raise _too_many_collisions()
        return [grown + (flags >> _SHIFT), None]

    def _hash(self, keys: list[Any], container: Any) -> None:
        """Count what it takes to make keys of a dict or set of some values."""
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
        if self._hashed > FREE + MAX_HASHED * len(self._data):
            raise ValueError("its keys hold the same values again and again")
        if constants:
            noted = _note_hashes(constants, container)
            if noted is not None and noted > MAX_HASH_COLLISIONS:
                raise _too_many_collisions()

    def _count_set(self) -> None:
        self._sets += 1
        if self._sets * BYTES_OF_SET > len(self._data):
            raise ValueError("it has more sets than its bytes can fill")


def _too_many_collisions() -> ValueError:
    return ValueError(f"more than {MAX_HASH_COLLISIONS} keys of a dict or set have the same hash")


def _global(module: str, name: str) -> int:
    """Return the value of a class or function, as torch finds it."""
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
    """Return how many values it holds, without those that were added to lists, dicts and sets."""
    kind = type(value)
    if kind is int:
        return int(value >> _SHIFT)
    if kind is bytes:
        return 1 + len(value) // 8
    return int(value[0] >> _SHIFT) if kind is tuple else 1


def _grown_weight(value: Any) -> int:
    """Return how many values the lists, dicts and sets in it hold."""
    if type(value) is list:
        return int(value[0])
    return sum(part[0] for part in value[2]) if type(value) is tuple else 0


def _grow(container: Any, items: list[Any]) -> None:
    """Add items to a list, dict or set."""
    if type(container) is list:
        container[0] += sum(map(_weight, items))


def _note_hashes(values: list[Any], container: Any) -> int | None:
    """Count the hashes of values in a list, dict or set. Return the largest count among these, None if there is none.

    Constants of which few can have one hash are left out, and so are values whose hash is not known.
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
    """Return the Python value of a constant, or of a tuple of them."""
    if type(value) is tuple:
        return tuple(map(_constant, value[1]))
    operation, argument = value[0], value[1:]
    if operation == 0x4A:
        return int.from_bytes(argument, "little", signed=True)
    if operation == 0x47:
        return struct.unpack(">d", argument)[0] if len(argument) == 8 else 0.0
    if operation == 0x8A or operation == 0x8B:
        return int.from_bytes(argument[1 if operation == 0x8A else 4 :], "little", signed=True)
    if operation == 0x4B or operation == 0x4D:
        return int.from_bytes(argument, "little")
    return {0x4E: None, 0x88: True, 0x89: False, 0x45: ""}[operation]


def _tuple(values: list[Any], *, is_set: bool = False) -> Any:
    """Return a tuple or a frozenset of some values. Raises ValueError."""
    depth = flags = constants = 0
    weight = 1
    growing: Any = ()
    for at, value in enumerate(values):
        kind = type(value)
        if kind is bytes:
            weight += 1 + len(value) // 8
            constants += 1
            if at == 0 and value[0] in _NUMBERS:
                flags |= _BEGINS_WITH_NUMBER
            continue
        if kind is list:
            growing = (*growing, value)
            weight += 1
            continue
        if kind is tuple:
            if value[2]:
                growing = (*growing, *value[2]) if growing else value[2]
            constants += value[1] is not None
            value = value[0]
        depth = max(depth, value & _DEPTHS)
        weight += value >> _SHIFT
        flags |= value & (_COLLIDES | _MANY)
        if at == 0:
            flags |= value & (_ALLOCATES | _COPIES)
    if depth >= MAX_DEPTH * _DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} tuples are nested in each other")
    if len(growing) > _MAX_GROWING:
        growing, flags = growing[:_MAX_GROWING], flags | _MANY
    known: Any = None
    if constants == len(values) and not flags & _COLLIDES:
        if weight <= _MAX_CONSTANTS and not is_set:
            known = tuple(values)
        else:
            flags |= _COLLIDES
    made = weight << _SHIFT | (depth + _DEPTH) | flags | (0 if is_set else _IS_TUPLE)
    return (made, known, growing) if growing or known is not None else made
