"""Check a pickle before an unpickler reads it: what it would make a process hash, copy, and take memory for.

An unpickler does as it is told. A few bytes can have it hash a tuple that holds another one twice, forty times over;
copy one list again and again; or take memory for a number of bytes that nobody sends. None of this is an error that
could be caught, and much of it runs in C, where no signal is heeded.
"""

from __future__ import annotations

from typing import Any

MAX_BYTES = 2**30
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
"""How many values those keys may hold that anybody can give the same hash: large integers, and tuples of numbers."""
BYTES_OF_SET = 8
"""How many bytes of a pickle each set takes at least, so that a byte is not a set of 216 bytes."""
TEXT_BYTES = 64
"""Each of these bytes of a string counts as a value."""

# A value is an integer of flags, depth and weight. The weight is the number of values that it holds, those that are
# shared counted each time. A value that can grow is a list instead: the weight of what was added to it, and of that
# what can collide. A tuple of such values, or one that can collide itself, is a tuple of its integer and those values.
_COLLIDES = 1
"""Its hash can be chosen. Such a value is never a mere integer."""
_NUMBER = 2
"""It is a number, or a tuple of nothing else."""
_ALLOCATES = 4
"""It is a class or function that takes memory by a number. Of a tuple, the first value is."""
_COPIES = 8
"""It is a class or function that copies the items of what it is given. Of a tuple, the first value is."""
_IS_BYTEARRAY = 16
_BEGINS_WITH_NUMBER = 32
_CALLABLE = 64
_DEPTH = 128
_DEPTHS = 127 * _DEPTH
_WEIGHT = 128 * _DEPTH
_SHIFT = _WEIGHT.bit_length() - 1
_ATOM = _WEIGHT
_INTEGER = _WEIGHT | _NUMBER
_MADE = _WEIGHT | _CALLABLE
"""A class, a function, or what one made."""
_MOST_GROWING = 256
"""Of the values in a tuple that can grow, so many are followed: nothing copies what is deeper."""

_VALUES = {
    **dict.fromkeys(b"N\x88\x89)", (0, _ATOM)), b"K"[0]: (1, _INTEGER), b"M"[0]: (2, _INTEGER),
    b"J"[0]: (4, _INTEGER), b"G"[0]: (8, _INTEGER),
}  # fmt: skip
"""Operations that push None, a boolean, a number or an empty tuple; the bytes of their argument, and the value."""
_COUNTED = {
    **dict.fromkeys(b"\x8cCU\x8a", 1), **dict.fromkeys(b"XBT\x8b", 4), **dict.fromkeys(b"\x8d\x8e\x96", 8),
}  # fmt: skip
"""Those that push a string, bytes, a bytearray or a long integer; and the bytes of its length."""
_LONGS = b"\x8a\x8b"
_COPYING = {
    *((module, name) for module in ("builtins", "__builtin__") for name in ("set", "frozenset", "bytearray")),
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
"""Where the classes are of which each can be called with a size, as torch.FloatTensor(10)."""


def check_pickle(data: bytes, *, calls: bool = True) -> None:
    """Follow a pickle to its end without making anything of it. It may use what protocols 2 to 5 write.

    Args:
        calls: whether what is called in it will be torch's and Python's own classes and functions, as by torch.load.

    Raises ValueError or LookupError where it does what no honest one does.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"the pickle has {len(data)} bytes, more than {MAX_BYTES}")
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
            raise ValueError(
                f"it has keys that hold more than {MAX_COLLIDING} numbers, of a kind that can be chosen to collide: "
                "large integers, and tuples of numbers"
            )

    def _follow(self) -> None:
        data = self._data
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}
        tuples: dict[int, Any] = {}
        """Of a value, the tuple of it alone."""
        at, most = 0, len(data)
        last = 0
        push, pop = stack.append, stack.pop
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
            elif operation in _VALUES:
                nbytes, value = _VALUES[operation]
                at += nbytes
                push(value)
            elif operation in _COUNTED:
                begin = at + _COUNTED[operation]
                nbytes = int.from_bytes(data[at:begin], "little")
                at = begin + nbytes
                if at > most:  # an unpickler takes memory for a bytearray before it reads it
                    raise ValueError(f"it has the operation {operation:#04x} of {nbytes} bytes, and {most} in all")
                if operation in _LONGS:
                    value = (1 + nbytes // 8) * _WEIGHT | _NUMBER
                    push((value | _COLLIDES,) if nbytes > 7 else value)
                else:
                    push((1 + nbytes // TEXT_BYTES) * _WEIGHT)
            elif operation == 0x85:  # TUPLE1
                value = stack[-1]
                if type(value) is int:
                    if value not in tuples:
                        tuples[value] = _tuple([value])
                    stack[-1] = tuples[value]
                else:
                    stack[-1] = _tuple([value])
            elif operation == 0x52 or operation == 0x81:  # REDUCE, NEWOBJ
                given = pop()
                called = stack[-1]
                if type(called) is not int or not called & _CALLABLE:
                    raise ValueError("it calls what is no class and no function")
                if called & (_COPIES | _ALLOCATES):
                    stack[-1] = self._call(called, given)
                else:
                    self._copied += given >> _SHIFT if type(given) is int else _weight(given)
                    stack[-1] = _MADE
            elif operation == 0x62:  # BUILD
                given = pop()
                self._copied += _weight(given) + _grown_weight(given)
                if not stack:
                    raise IndexError("the stack is empty")
            elif operation == 0x28:  # MARK
                marks.append(len(stack))
            elif operation == 0x75:  # SETITEMS
                begin = marks.pop()
                items = stack[begin:]
                del stack[begin:]
                self._hash(items[::2])
                _grow(stack[-1], items)
            elif operation == 0x7D or operation == 0x5D:  # EMPTY_DICT, EMPTY_LIST
                push([0, 0])
            elif operation == 0x86 or operation == 0x87:  # TUPLE2, TUPLE3
                begin = len(stack) - (2 if operation == 0x86 else 3)
                if begin < 0:
                    raise IndexError("the stack is empty")
                stack[begin:] = [_tuple(stack[begin:])]
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
                self._hash(items[:1])
                _grow(stack[-1], items)
            elif operation == 0x61:  # APPEND
                item = pop()
                _grow(stack[-1], [item])
            elif operation == 0x65:  # APPENDS
                begin = marks.pop()
                items = stack[begin:]
                del stack[begin:]
                _grow(stack[-1], items)
            elif operation == 0x63:  # GLOBAL
                middle = data.index(b"\n", at)
                end = data.index(b"\n", middle + 1)
                of = data[at:middle].decode(), data[middle + 1 : end].decode()
                push(_global(*of) if self._calls else _MADE)
                at = end + 1
            elif operation == 0x51:  # BINPERSID
                stack[-1] = _ATOM
            elif operation == 0x8F:  # EMPTY_SET
                self._count_set()
                push([0, 0])
            elif operation == 0x90:  # ADDITEMS
                begin = marks.pop()
                items = stack[begin:]
                del stack[begin:]
                self._hash(items)
                _grow(stack[-1], items)
            elif operation == 0x91:  # FROZENSET
                self._count_set()
                begin = marks.pop()
                self._hash(stack[begin:])
                stack[begin:] = [_tuple(stack[begin:])]
            elif operation == 0x92:  # NEWOBJ_EX
                named, given = pop(), pop()
                self._copied += _weight(named) + _grown_weight(named) + _weight(given)
                if stack[-1] != _MADE:
                    raise ValueError("it calls what takes no arguments by name")
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

    def _call(self, called: int, given: Any) -> list[int]:
        """Return what a class or function makes that takes memory by what it is given: it can grow."""
        if called & _ALLOCATES:
            raise ValueError("it makes a tensor or storage of a size, which has no values in the file")
        flags = given if isinstance(given, int) else given[0] if isinstance(given, tuple) else 0
        if flags & (_ALLOCATES | _COPIES):
            raise ValueError("it calls a class that takes memory through another one")
        if called & _IS_BYTEARRAY and flags & _BEGINS_WITH_NUMBER:
            raise ValueError("it makes a bytearray by the number of its bytes")
        weight = _weight(given) + _grown_weight(given)
        self._copied += weight
        self._hashed += weight
        self._colliding += sum(part[1] for part in given[1:]) if isinstance(given, tuple) else 0
        return [weight, 0]

    def _count_set(self) -> None:
        self._sets += 1
        if self._sets * BYTES_OF_SET > len(self._data):
            raise ValueError("it has more sets than its bytes can fill")

    def _hash(self, keys: list[Any]) -> None:
        try:
            self._hashed += sum(keys) >> _SHIFT
        except TypeError:
            for key in keys:
                self._hashed += _weight(key)
                if isinstance(key, tuple) and key[0] & _COLLIDES:
                    self._colliding += key[0] >> _SHIFT


def _global(module: str, name: str) -> int:
    """Return the value of a class or function."""
    if (module, name) in _COPYING:
        return _MADE | _COPIES | (_IS_BYTEARRAY if name == "bytearray" else 0)
    is_tensor = module in _TENSOR_MODULES and name.endswith(("Tensor", "Storage"))
    if is_tensor or (module, name) in _ALLOCATING:
        return _MADE | _ALLOCATES
    return _MADE


def _weight(value: Any) -> int:
    """Return how many values it holds, without those that were added to lists, dicts and sets."""
    if isinstance(value, tuple):
        value = value[0]
    return 1 if isinstance(value, list) else value >> _SHIFT


def _grown_weight(value: Any) -> int:
    """Return how many values the lists, dicts and sets in it hold."""
    if isinstance(value, list):
        return int(value[0])
    return sum(part[0] for part in value[1:]) if isinstance(value, tuple) else 0


def _grow(container: Any, items: list[Any]) -> None:
    """Add items to a list, dict or set."""
    if not isinstance(container, list):
        return
    try:
        container[0] += sum(items) >> _SHIFT
    except TypeError:
        for item in items:
            container[0] += _weight(item)
            if isinstance(item, tuple) and item[0] & _COLLIDES:
                container[1] += item[0] >> _SHIFT


def _tuple(values: list[Any]) -> Any:
    """Return a tuple or a frozenset of some values. Raises ValueError."""
    depth = flags = 0
    weight = 1
    numbers = _NUMBER if values else 0
    growing: list[Any] = []
    for at, value in enumerate(values):
        if isinstance(value, list):
            growing.append(value)
            weight += 1
            numbers = 0
            continue
        if isinstance(value, tuple):
            growing.extend(value[1:])
            value = value[0]
        depth = max(depth, value & _DEPTHS)
        weight += value >> _SHIFT
        flags |= value & _COLLIDES
        numbers &= value
        if at == 0:
            flags |= value & (_ALLOCATES | _COPIES)
            if value & _NUMBER and not value & _DEPTHS:
                flags |= _BEGINS_WITH_NUMBER
    if depth >= MAX_DEPTH * _DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} tuples are nested in each other")
    if numbers and weight > 3:
        flags |= _COLLIDES
    made = weight << _SHIFT | (depth + _DEPTH) | flags | numbers
    return (made, *growing[:_MOST_GROWING]) if growing or flags & _COLLIDES else made
