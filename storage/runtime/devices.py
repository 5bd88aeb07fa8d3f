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
    if device.type not in ("cpu", "meta"):
        with current_device(device):
            torch.accelerator.synchronize(device)


class DeviceWaits:
    """Waits for the values of tensors on devices, from several threads.

    A device as a whole is waited for only once. After that, a thread waits only for what it has queued itself: values
    are copied to the host meanwhile, and other threads need not wait for that.
    """

    def __init__(self) -> None:
        self._waited: set[torch.device] = set()

    def wait(self, device: torch.device) -> None:
        """Wait for values that were queued before this object was created, or by this thread."""
        if device.type == "cuda" and device in self._waited:
            torch.cuda.current_stream(device).synchronize()
        else:
            synchronize(device)
            self._waited.add(device)
