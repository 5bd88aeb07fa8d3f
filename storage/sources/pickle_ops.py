"""Pickles looked over before they are read, for what an unpickler would do to this process.

Python's own takes memory for its memo by the largest number that a pickle names, and hashes tuples however deeply they
are nested, until the stack ends. Neither is an error that could be caught.
"""

from __future__ import annotations

MOST_NESTED = 100
"""Tuples and frozensets in each other."""
_VALUES = {
    **dict.fromkeys(b"N\x88\x89])}\x8f", 0), **dict.fromkeys(b"K", 1), **dict.fromkeys(b"M", 2),
    **dict.fromkeys(b"J", 4), **dict.fromkeys(b"G", 8),
}  # fmt: skip
"""Operations that push None, a boolean, a number or something empty; and the bytes of their argument."""
_COUNTED = {
    **dict.fromkeys(b"\x8cCU\x8a", 1), **dict.fromkeys(b"XBT\x8b", 4), **dict.fromkeys(b"\x8d\x8e\x96", 8),
}  # fmt: skip
"""Those that push a string, bytes, a bytearray or a long integer; and the bytes of its length."""
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}


def check_operations(data: bytes) -> None:
    """Follow a pickle to its end without making anything of it. It may use what protocols 2 to 5 write.

    Raises ValueError or IndexError where it does what no honest one does.
    """
    stack: list[int] = []
    """How deeply tuples and frozensets are nested in each value."""
    marks: list[int] = []
    memo: dict[int, int] = {}
    at, most = 0, len(data)
    push, pop = stack.append, stack.pop
    while True:
        operation = data[at]
        at += 1
        if operation == 0x94:  # MEMOIZE
            memo[len(memo)] = stack[-1]
        elif operation in _VALUES:
            at += _VALUES[operation]
            push(0)
        elif operation == 0x68:  # BINGET
            push(memo[data[at]])
            at += 1
        elif operation == 0x6A:  # LONG_BINGET
            push(memo[int.from_bytes(data[at : at + 4], "little")])
            at += 4
        elif operation in _TUPLES:
            _nest(stack, len(stack) - _TUPLES[operation])
        elif operation in _COUNTED:
            begin = at + _COUNTED[operation]
            nbytes = int.from_bytes(data[at:begin], "little")
            at = begin + nbytes
            if operation == 0x96 and at > most:  # an unpickler takes memory for a bytearray before it reads it
                raise ValueError(f"it has the operation 0x96 of {nbytes} bytes, and {most} bytes in all")
            push(0)
        elif operation in b"R\x81\x93b":  # REDUCE, NEWOBJ, STACK_GLOBAL, BUILD: two values to one
            pop()
            stack[-1] = 0
        elif operation == 0x28:  # MARK
            marks.append(len(stack))
        elif operation in b"ue\x90":  # SETITEMS, APPENDS, ADDITEMS
            del stack[marks.pop() :]
        elif operation == 0x74 or operation == 0x91:  # TUPLE, FROZENSET
            _nest(stack, marks.pop())
        elif operation == 0x73:  # SETITEM
            del stack[-2:]
        elif operation == 0x61:  # APPEND
            pop()
        elif operation == 0x71 or operation == 0x72:  # BINPUT, LONG_BINPUT
            begin, at = at, at + (1 if operation == 0x71 else 4)
            number = int.from_bytes(data[begin:at], "little")
            if number > most:
                raise ValueError(f"it numbers a value {number}, and has {most} bytes")
            memo[number] = stack[-1]
        elif operation == 0x63:  # GLOBAL
            at = data.index(b"\n", data.index(b"\n", at) + 1) + 1
            push(0)
        elif operation == 0x51:  # BINPERSID
            stack[-1] = 0
        elif operation == 0x92:  # NEWOBJ_EX
            del stack[-2:]
            stack[-1] = 0
        elif operation == 0x80:  # PROTO
            at += 1
        elif operation == 0x95:  # FRAME
            at += 8
        elif operation == 0x2E:  # STOP
            return
        else:
            raise ValueError(f"it has the operation {operation:#04x}, which nothing that is stored here needs")


def _nest(stack: list[int], begin: int) -> None:
    """The values from `begin` on become a tuple or a frozenset."""
    if begin < 0:
        raise IndexError("the stack is empty")
    depth = max(stack[begin:], default=0) + 1
    if depth > MOST_NESTED:
        raise ValueError(f"more than {MOST_NESTED} tuples are nested in each other")
    del stack[begin:]
    stack.append(depth)
