"""Disable the caller's torch modes, such as a default device or inference mode, while reshard reads or writes.

A model may be built in `with torch.device("meta")`, evaluated in `torch.inference_mode()` or traced with fake tensors.
In such a mode torch creates other tensors than reshard needs, and refuses to write to some tensors. Modes belong to a
thread: reshard's own threads have none, and its calls disable those of the caller's thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._C._dynamo.eval_frame import set_eval_frame
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.profiler import record_function

from .forks import generation

# It imports a module when it is first called. A fork during that import, in another thread, would leave the module
# locked in the child, where the next call would wait forever. See `forks.py`.
with record_function("reshard.import"):
    pass


@contextmanager
def without_torch_modes() -> Iterator[None]:
    """Disable the torch modes of this thread, as a context manager or a decorator.

    These are the default device, function and dispatch modes (such as fake tensors), inference mode, and gradients.
    New tensors are then ordinary tensors with memory. The default dtype belongs to the process and stays as it is, so
    code that creates a tensor must pass a dtype. `torch.compile` does not compile the functions that are called.

    In a forked child process, torch uses one thread meanwhile. It would wait forever for the threads of the parent.
    """
    compile_frame = set_eval_frame(None)
    modes = [_pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    try:
        with ExitStack() as stack:
            if torch._C._len_torch_dispatch_stack():
                from torch.utils._python_dispatch import _disable_current_modes  # a slow import

                stack.enter_context(_disable_current_modes())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            if generation() and torch.get_num_threads() > 1:
                stack.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(1)
            yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)
        set_eval_frame(compile_frame)


def leave_mode(mode: Any) -> None:
    """Leave a function or dispatch mode of this thread that need not be the last one entered.

    `mode.__exit__` would remove the last one. Do nothing if something else has removed the mode.
    """
    from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack  # a slow import

    kind: Any = TorchFunctionMode if isinstance(mode, TorchFunctionMode) else TorchDispatchMode
    stack = _get_current_function_mode_stack() if kind is TorchFunctionMode else _get_current_dispatch_mode_stack()
    if all(other is not mode for other in stack):
        return
    above: list[Any] = []
    while stack[-1] is not mode:
        above.append(stack.pop())
        kind.__exit__(above[-1], None, None, None)
    kind.__exit__(mode, None, None, None)
    for other in reversed(above):
        kind.__enter__(other)


def writing_to(tensor: torch.Tensor) -> torch.inference_mode:
    """Return the inference mode in which a tensor can be written: enabled if the tensor was created in it."""
    return torch.inference_mode(tensor.is_inference())
