"""The modes of torch that a caller is in, which must not change what is read or written.

A model is built in `with torch.device("meta")`, evaluated in `torch.inference_mode()`, traced with fake tensors. Inside
of such a block torch makes tensors of another kind than reshard needs, and refuses to write to others. These modes
belong to a thread: reshard's own threads have none, and its calls leave the caller's aside while they run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.overrides import _pop_mode, _push_mode


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave aside the modes of this thread while a block runs, or a function that this decorates.

    These are default devices, modes for functions and for dispatch (as of fake tensors), inference mode, and gradients.
    So tensors that are made have memory, and are ordinary ones. The default dtype belongs to the process: whoever makes
    a tensor names its dtype.
    """
    modes = [_pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    try:
        with ExitStack() as stack:
            if torch._C._len_torch_dispatch_stack():
                from torch.utils._python_dispatch import _disable_current_modes  # which imports much

                stack.enter_context(_disable_current_modes())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


def writing_to(tensor: torch.Tensor) -> torch.inference_mode:
    """Return the mode in which torch lets a tensor be written: what was made in inference mode, in inference mode."""
    return torch.inference_mode(tensor.is_inference())
