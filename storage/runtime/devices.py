"""Choose the device of a thread, and wait for a device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device the current one of this thread, in a `with` block.

    A thread begins with the first device. Operations for another device would also take memory of the first.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def synchronize(device: torch.device) -> None:
    """Wait for everything that has been queued on a device, on all of its streams. On the host, nothing is queued."""
    if device.type != "cpu":
        with current_device(device):
            torch.accelerator.synchronize(device)
