"""Decompresses zstd frames on a CUDA device with nvCOMP, if it is installed (`pip install reshard[cuda]`)."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ...runtime.logs import logger_of
from .frames import Decompressor, HostDecompressor

logger = logger_of(__name__)


def nvcomp_decompressor(device: torch.device) -> Decompressor | None:
    """Return a decompressor for a device. None if nvCOMP 6 or later is not installed or cannot be loaded."""
    nvcomp = _nvcomp()
    return None if nvcomp is None else NvcompDecompressor(nvcomp, device)


@functools.cache
def _nvcomp() -> Any:
    try:
        nvcomp = importlib.import_module("nvidia.nvcomp")
    except (ImportError, OSError) as error:
        logger.debug("nvCOMP is not used: %s", error)
        return None
    if not hasattr(nvcomp, "BatchArray"):  # since version 6: a batch is one buffer with offsets
        logger.warning("nvCOMP %s is too old and not used: install version 6 or later", nvcomp.__version__)
        return None
    return nvcomp


class NvcompDecompressor:
    """Decompresses with nvCOMP. Its codec belongs to one thread, which all calls share.

    Args:
        nvcomp: the module `nvidia.nvcomp`.
        device: the device.
    """

    def __init__(self, nvcomp: Any, device: torch.device) -> None:
        self._nvcomp = nvcomp
        self._device = device
        self._thread = ThreadPoolExecutor(1, "reshard-nvcomp")
        self._codec: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._instead: Decompressor | None = None
        """Used after nvCOMP has failed."""

    def decompress(
        self,
        packed: torch.Tensor,
        starts: Sequence[int],
        sizes: Sequence[int],
        values: torch.Tensor,
        value_starts: Sequence[int],
        numels: Sequence[int],
    ) -> None:
        """See `Decompressor`."""
        if self._instead is None:
            ready = torch.cuda.current_stream(self._device).record_event()
            done = self._thread.submit(self._decompress, ready, packed, starts, sizes, values, value_starts, numels)
            try:
                done.result()
                return
            except Exception as error:
                logger.warning("nvCOMP failed, so the host decompresses instead: %s: %s", type(error).__name__, error)
                self._instead = HostDecompressor()
        self._instead.decompress(packed, starts, sizes, values, value_starts, numels)

    def _decompress(
        self,
        ready: torch.cuda.Event,
        packed: torch.Tensor,
        starts: Sequence[int],
        sizes: Sequence[int],
        values: torch.Tensor,
        value_starts: Sequence[int],
        numels: Sequence[int],
    ) -> None:
        nvcomp = self._nvcomp
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream = torch.cuda.Stream(self._device)
                self._codec = nvcomp.Codec(
                    algorithm="Zstd",
                    bitstream_kind=nvcomp.BitstreamKind.RAW,
                    device_id=self._device.index,
                    cuda_stream=self._stream.cuda_stream,
                )
            self._stream.wait_event(ready)
            stream = self._stream.cuda_stream
            frames = nvcomp.as_arrays(packed, list(starts), list(sizes), cuda_stream=stream)
            out = nvcomp.as_arrays(values, list(value_starts), list(numels), cuda_stream=stream)
            self._codec.decode(frames, out=out)
            self._stream.synchronize()
