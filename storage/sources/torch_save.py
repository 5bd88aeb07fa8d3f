"""A file of torch.save as a source: read by byte ranges, as far as torch.load(weights_only=True) would read it.

The file is a zip. Its structure, a pickle, is read by torch's own unpickler with its allow-list, with storages that
have no memory; its values, one uncompressed record for each storage, stay where they are. The zip's directory, at the
end, tells where the records are.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch._weights_only_unpickler import Unpickler

from ...planner.index import Kind
from ...planner.read_plan import Want
from ..errors import (
    CorruptCheckpointError,
    DestinationError,
    UnsafeObjectError,
    UnsupportedFormatError,
    UnsupportedValueError,
)
from ..state_dict import flatten
from ..tensors import dtype_name
from .foreign import ForeignSource, Shards, whole_tensor
from .pickle_ops import check_operations
from .reads import Reads
from .zip_head import is_row_major

TAIL_BYTES = 1024 * 1024
"""What the first request reads: the directory of some thousand tensors."""
_LOCAL_HEADER_BYTES = 30


class TorchSaveSource(ForeignSource):
    """The tensors of a torch.save file, by the names that they have in its state dict."""

    format = "torch"

    def __init__(self, reads: Reads, name: str) -> None:
        """Raises CorruptCheckpointError, UnsafeObjectError, UnsupportedFormatError, StoreError."""
        self._where = f"the torch.save file {name!r} in {reads.store.location}"
        self._refused: dict[str, str] = {}
        """What the file has and byte ranges do not give, and why."""
        nbytes = reads.size(name)
        super().__init__(reads, [(name, nbytes)])
        self._tail_start = max(0, nbytes - TAIL_BYTES)
        self._tail = reads.read(name, self._tail_start, max(nbytes, 1))
        records = {info.filename.partition("/")[2]: info for info in self._directory()}
        if "data.pkl" not in records:
            raise CorruptCheckpointError(f"{self._where} is a zip, and has no data.pkl: it is not of torch.save")
        for info in records.values():
            stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
            if not stored or info.header_offset < 0 or info.header_offset + info.file_size > nbytes:
                raise CorruptCheckpointError(
                    f"{self._where} has the record {info.filename!r} of {info.file_size} bytes, stored as "
                    f"{info.compress_size} from byte {info.header_offset} on; torch.save compresses none"
                )
        pickled, order = self._contents([records[key] for key in ("data.pkl", "byteorder") if key in records])
        if order not in (b"", b"little"):
            raise UnsupportedFormatError(f"{self._where} has values of byte order {order!r}")
        storages: dict[str, Any] = {}
        state = self._unpickled(pickled, storages)
        self._add_all(state, storages, records)

    def _directory(self) -> list[zipfile.ZipInfo]:
        name, nbytes = self.objects[0]
        try:
            with zipfile.ZipFile(_Tail(self._tail, self._tail_start, nbytes)) as archive:
                return archive.infolist()
        except _NeedMoreError as need:
            self._tail = self._reads.exactly(name, need.start, self._tail_start) + self._tail
            self._tail_start = need.start
            return self._directory()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, LookupError, struct.error) as error:
            start = self._reads.read(name, 0, 8)
            if start[:1] == b"\x80":
                raise UnsupportedFormatError(
                    f"{self._where} was written before torch 1.6, or with _use_new_zipfile_serialization=False: "
                    "read it with torch.load and save it anew"
                ) from error
            raise CorruptCheckpointError(f"{self._where} is no zip, as torch.save writes it: {error}") from error

    def _begins(self, infos: list[zipfile.ZipInfo]) -> list[int]:
        """Where the contents of records begin: behind their local headers, which are padded."""
        name = self.objects[0][0]

        def begin(info: zipfile.ZipInfo) -> int:
            at = info.header_offset
            header = self._reads.exactly(name, at, at + _LOCAL_HEADER_BYTES)
            if header[:4] != b"PK\x03\x04":
                raise CorruptCheckpointError(f"{self._where} has no record {info.filename!r} at byte {at}")
            names, extra = struct.unpack_from("<HH", header, 26)
            return at + _LOCAL_HEADER_BYTES + int(names) + int(extra)

        return self._reads.many(begin, infos)

    def _contents(self, infos: list[zipfile.ZipInfo]) -> tuple[bytes, bytes]:
        begins = self._begins(infos)
        pairs = zip(infos, begins, strict=True)
        first, *rest = [self._reads.exactly(self.objects[0][0], at, at + info.file_size) for info, at in pairs]
        return first, rest[0].strip() if rest else b""

    def _unpickled(self, data: bytes, storages: dict[str, Any]) -> Any:
        """What was saved, its tensors without memory. `storages` is filled by the keys of their records."""

        def storage_of(pid: Any) -> Any:
            _, kind, key, _, numel = pid
            if key not in storages:
                if type(key) is not str or type(numel) is not int or numel < 0:
                    raise pickle.UnpicklingError(f"a storage {key!r} of {numel!r} elements")
                dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
                untyped = torch.UntypedStorage(numel * dtype.itemsize, device="meta")
                storages[key] = torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
            return storages[key]

        unpickler: Any = Unpickler(io.BytesIO(data), encoding="utf-8")
        unpickler.persistent_load = storage_of
        try:
            check_operations(data)
            return unpickler.load()
        except NotImplementedError as error:
            raise UnsupportedFormatError(
                f"{self._where} has tensors of a kind that can only be read whole, by torch.load: {error}"
            ) from error
        except Exception as error:
            text = str(error)
            if "GLOBAL" in text or "Unsupported" in text or "weights_only" in text:
                raise UnsafeObjectError(
                    f"{self._where} needs more of pickle than torch.load(weights_only=True) allows: "
                    f"{text.splitlines()[0]}"
                ) from error
            raise CorruptCheckpointError(f"{self._where} cannot be read: {error!r}") from error

    def _add_all(self, state: Any, storages: dict[str, Any], records: dict[str, zipfile.ZipInfo]) -> None:
        if not isinstance(state, dict):
            state = {"value": state}
        keys = {storage._untyped_storage._cdata: key for key, storage in storages.items()}
        sizes = {key: records[f"data/{key}"].file_size for key in storages if f"data/{key}" in records}
        used = [key for key, nbytes in sizes.items() if storages[key]._untyped_storage.nbytes() == nbytes]
        begins = dict(zip(used, self._begins([records[f"data/{key}"] for key in used]), strict=True))
        ends = {key: begins[key] + sizes[key] for key in used}
        try:
            leaves = flatten(state)
            self.paths = {name: leaf.path for name, leaf in leaves.items()}
            for name, leaf in leaves.items():
                if isinstance(leaf.value, torch.Tensor):
                    self._add_tensor(name, leaf.value, keys, begins, ends)
                elif _has_values(leaf.value):
                    self._refused[name] = "as tensors inside of a value that is no dict and no list"
                    self.add(name, Kind.TORCH_SAVE, "uint8", (0,), Shards.of([], 1))
                else:
                    self.add_object(name, leaf.value)
        except (RecursionError, DestinationError, UnsupportedValueError) as error:
            raise CorruptCheckpointError(f"{self._where} has a state dict that has no names: {error}") from error
        self._unread |= self._refused.keys()

    def _add_tensor(
        self, name: str, tensor: torch.Tensor, keys: dict[int, str], begins: dict[str, int], ends: dict[str, int]
    ) -> None:
        dtype, shape = dtype_name(name, tensor.dtype), tuple(tensor.shape)
        dense = tensor.layout is torch.strided and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        key = keys.get(tensor.untyped_storage()._cdata) if dense else None
        order = _order_of(tensor) if dense else None
        if not dense:
            self._refused[name] = f"as a {type(tensor).__name__} of layout {tensor.layout}"
        elif tensor.is_conj() or tensor.is_neg():
            self._refused[name] = "as the conjugate or the negative of what is stored"
        elif tensor.numel() and key is None:
            self._refused[name] = "without values"
        elif tensor.numel() and order is None:
            self._refused[name] = f"with strides {tensor.stride()} for its shape {shape}"
        if key is None or order is None or name in self._refused:
            self.add(name, Kind.TENSOR, dtype, shape, Shards.of([], len(shape)))
            return
        start = begins.get(key, 0) + int(tensor.storage_offset()) * tensor.itemsize
        if tensor.numel() and (key not in begins or start + tensor.nbytes > ends[key]):
            raise CorruptCheckpointError(f"{self._where} does not have the values of {name!r}")
        row_major = order == tuple(range(len(shape)))
        self.add(name, Kind.TENSOR, dtype, shape, whole_tensor(dtype, shape, 0, start), None if row_major else order)

    @property
    def location(self) -> str:
        return f"{self.store.location}/{self.objects[0][0]}"

    def locate(self, wants: list[Want]) -> None:
        for want in wants:
            if want.name in self._refused:
                raise UnsupportedFormatError(
                    f"{self._where} has {want.name!r} {self._refused[want.name]}, which byte ranges do not give: read "
                    "it with torch.load, and save it as a contiguous tensor"
                )


def _has_values(value: Any) -> bool:
    """Whether a value that is no tensor has tensors inside, or bytes of one: their values are not here."""
    if isinstance(value, (torch.Tensor, torch.UntypedStorage, torch.storage.TypedStorage)):
        return True
    if isinstance(value, Mapping):
        return any(map(_has_values, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_has_values, value))


def _order_of(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """A tensor's dimensions from the outermost to the innermost in memory; None where it has gaps, or overlaps."""
    strides = [0 if n == 1 else stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    order = tuple(sorted(range(tensor.dim()), key=lambda d: (tensor.shape[d] != 1, -strides[d])))
    dense = is_row_major(tuple(tensor.shape[d] for d in order), tuple(strides[d] for d in order))
    return order if dense else None


class _NeedMoreError(Exception):
    """The directory begins before the bytes that are here."""

    def __init__(self, start: int) -> None:
        super().__init__(start)
        self.start = start


class _Tail(io.BytesIO):
    """A file of which only the last bytes are here."""

    def __init__(self, tail: bytes, start: int, nbytes: int) -> None:
        super().__init__(tail)
        self._start = start
        self._nbytes = nbytes

    def seek(self, offset: int, whence: int = 0, /) -> int:
        at = offset if whence == 0 else (self.tell() if whence == 1 else self._nbytes) + offset
        if at < self._start:
            raise _NeedMoreError(max(0, at)) if at >= 0 else OSError("before the begin")
        return super().seek(at - self._start) + self._start

    def tell(self) -> int:
        return super().tell() + self._start
