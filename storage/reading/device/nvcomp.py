"""Decompresses zstd frames on a CUDA device with nvCOMP, if it is installed (`pip install reshard[cuda]`)."""

from __future__ import annotations

import functools
import importlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ...runtime.logs import logger_of
from .frames import Decompressor, HostDecompressor, PackedFrames, UndecodableFrameError

logger = logger_of(__name__)


def nvcomp_decompressor(device: torch.device) -> Decompressor | None:
    """Return a decompressor for a device. None if nvCOMP 6 or later is not installed or cannot be used."""
    nvcomp = _nvcomp()
    return None if nvcomp is None else NvcompDecompressor.of(nvcomp, device)


@functools.cache
def _nvcomp() -> Any:
    try:
        nvcomp = importlib.import_module("nvidia.nvcomp")
    except ModuleNotFoundError:
        return None
    except Exception as error:  # it does not find a library or a driver
        logger.warning("nvCOMP is installed but cannot be loaded, so the host decompresses: %s", error)
        return None
    if not hasattr(nvcomp, "BatchArray"):  # since version 6: a batch is one buffer with offsets
        logger.warning("nvCOMP %s is too old and not used: install version 6 or later", nvcomp.__version__)
        return None
    return nvcomp


class NvcompDecompressor:
    """Decompresses with nvCOMP. Its codec belongs to one thread, which all calls share.

    nvCOMP reports no error for a frame that it cannot decompress. So the sizes of all results are checked, and one
    frame of each call is compared with the result of the host.

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
        self._host = HostDecompressor()
        self._failed = False
        self._has_warned = False

    @classmethod
    def of(cls, nvcomp: Any, device: torch.device) -> NvcompDecompressor | None:
        """Return a decompressor that has been tried. None if nvCOMP cannot be used, such as with an old driver."""
        found = cls(nvcomp, device)
        try:
            found._thread.submit(found._open).result()
        except Exception as error:
            if not _is_out_of_memory(error):
                logger.warning("nvCOMP cannot be used, so the host decompresses: %s: %s", type(error).__name__, error)
                found._thread.shutdown(wait=False)
                return None
        found.release()
        return found

    def decompress(self, frames: PackedFrames) -> None:
        """See `Decompressor`."""
        if not self._failed:
            ready = torch.cuda.current_stream(self._device).record_event()
            try:
                self._thread.submit(self._decompress_or_retry, ready, frames).result()
                self._host.check_one(frames)
                return
            except UndecodableFrameError:
                raise
            except Exception as error:
                self._failed = not _is_out_of_memory(error)
                if self._failed or not self._has_warned:
                    logger.warning("nvCOMP failed, so the host decompresses: %s: %s", type(error).__name__, error)
                self._has_warned = True
        self._host.decompress(frames)

    def release(self) -> None:
        """Return nvCOMP's scratch memory to the device: about three times the bytes that one call decompresses."""
        self._thread.submit(self._close)

    def _close(self) -> None:
        self._codec = None

    def _decompress_or_retry(self, ready: torch.cuda.Event, frames: PackedFrames) -> None:
        try:
            self._decompress(ready, frames)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            torch.cuda.empty_cache()  # nvCOMP cannot use the memory that torch keeps
            self._decompress(ready, frames)

    def _open(self) -> torch.cuda.Stream:
        """Create the codec, unless there is one. Return its stream."""
        nvcomp = self._nvcomp
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream = torch.cuda.Stream(self._device)
            with torch.cuda.stream(self._stream):
                if self._codec is None:
                    self._codec = nvcomp.Codec(
                        algorithm="Zstd",
                        bitstream_kind=nvcomp.BitstreamKind.RAW,
                        device_id=self._device.index,
                        cuda_stream=self._stream.cuda_stream,
                    )
        return self._stream

    def _decompress(self, ready: torch.cuda.Event, frames: PackedFrames) -> None:
        nvcomp, own_stream = self._nvcomp, self._open()
        with torch.cuda.device(self._device), torch.cuda.stream(own_stream):
            own_stream.wait_event(ready)
            stream = own_stream.cuda_stream
            try:
                stored = nvcomp.as_arrays(frames.packed, list(frames.starts), list(frames.sizes), cuda_stream=stream)
                out = nvcomp.as_arrays(
                    frames.values, list(frames.value_starts), list(frames.numels), cuda_stream=stream
                )
                decoded = self._codec.decode(stored, out=out)
                own_stream.synchronize()  # unlike nvCOMP, torch lets other threads run while it waits
                sizes = list(decoded.buffer_sizes)
            finally:  # also after an error: the memory must not be used by others before
                own_stream.synchronize()
        if sizes != list(frames.numels):
            raise RuntimeError(f"{sum(a != b for a, b in zip(sizes, frames.numels, strict=True))} frames are too short")


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether the device had too little memory at that moment. Then the next call may succeed."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "memory allocation" in text
