"""Page-lock host memory, so that a CUDA device can copy from it and to it while the host works."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from .logs import logger_of

logger = logger_of(__name__)
_PORTABLE = 1
"""cudaHostRegisterPortable: the memory counts as page-locked for all devices."""


def pin(memory: npt.NDArray[np.uint8]) -> bool:
    """Page-lock memory. If CUDA refuses, log a warning and return False: copies are then slower, but still right."""
    status = int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, _PORTABLE))
    if status:
        logger.warning(
            "CUDA cannot page-lock %d bytes of host memory (error %d), so copies between host and device are slower",
            memory.nbytes,
            status,
        )
    return status == 0


def unpin(memory: npt.NDArray[np.uint8]) -> None:
    """Undo `pin`."""
    torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data)
