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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._weights_only_unpickler import Unpickler
from torch.overrides import TorchFunctionMode

from ...planner.errors import CheckpointError
from ...planner.index import Kind
from ..errors import (
    CorruptCheckpointError,
    DestinationError,
    DtypeError,
    UnsafeObjectError,
    UnsupportedFormatError,
    UnsupportedValueError,
)
from ..state_dict import Path, flatten
from ..tensors import dtype_name
from .foreign import ForeignSource, whole_tensor
from .pickle_ops import check_operations
from .reads import Reads
from .weight_map import Found, WeightMap, present, select, two_files
from .zip_head import is_row_major

TAIL_BYTES = 1024 * 1024
"""What the first request reads: the directory of some thousand tensors."""
_LOCAL_HEADER_BYTES = 30
_LAST_RECORD = b"PK\x05\x06"
_LAST_RECORD_BYTES = 22
"""Without the comment."""
FIRST_BYTES = 32
LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""What the files of torch before 1.6 begin with, after the pickle's protocol."""


class TorchSaveSource(ForeignSource):
    """The tensors of torch.save files, by the names that they have in the state dict of their file."""

    format = "torch"

    def __init__(self, reads: Reads, names: Sequence[str], weight_map: WeightMap | None = None) -> None:
        """
        Args:
            names: the files: one, or several that hold parts of one state dict.
            weight_map: the index that says which of them holds which tensor.

        Raises CorruptCheckpointError, UnsafeObjectError, UnsupportedFormatError, ObjectNotFoundError, StoreError.
        """
        super().__init__(reads, present(reads, names, weight_map))
        self._is_folder = weight_map is not None or len(self.objects) > 1
        if self._is_folder:
            self.info |= {"files": len(self.objects)}
        files = reads.many(lambda at: _File(reads, at, *self.objects[at]), range(len(self.objects)))
        found: Found[_Value] = {}
        for file in files:
            for name, value in file.values.items():
                found.setdefault(name, []).append((file.at, value))
        for name, parts in (found if weight_map is None else select(self, found, weight_map)).items():
            if len(parts) > 1:
                raise two_files(self, name, [self.objects[at][0] for at, _ in parts])
            self._add(name, *parts[0])

    def _add(self, name: str, at: int, value: _Value) -> None:
        if value.refused is not None:
            self.refuse(name, *value.refused, self.objects[at][0])
            return
        self.paths[name] = value.path
        if not isinstance(value.value, _Stored):
            self.add_object(name, value.value)
            return
        dtype, shape, order = value.value.dtype, value.value.shape, value.value.order
        row_major = order == tuple(range(len(shape)))
        shards = whole_tensor(dtype, shape, at, value.value.start)
        self.add(name, Kind.TENSOR, dtype, shape, shards, None if row_major else order)

    @property
    def location(self) -> str:
        return self.store.location if self._is_folder else f"{self.store.location}/{self.objects[0][0]}"


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor whose values are one range of bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    order: tuple[int, ...]
    """The dimensions from the outermost to the innermost in the file."""


@dataclass(frozen=True, slots=True)
class _Value:
    """What a file has under one name: a `_Stored`, or an object; or why it cannot be read."""

    path: Path
    value: Any = None
    refused: tuple[type[CheckpointError], str] | None = None


class _File:
    """One torch.save file: what it holds, and where."""

    def __init__(self, reads: Reads, at: int, name: str, nbytes: int) -> None:
        self._reads = reads
        self.at = at
        """Its position in the source's objects."""
        self._name = name
        self._nbytes = nbytes
        self._where = f"the torch.save file {name!r} in {reads.store.location}"
        self.values: dict[str, _Value] = {}
        self._tail_start = max(0, nbytes - TAIL_BYTES)
        self._tail = reads.whole(name, self._tail_start, max(nbytes, 1))
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
        try:
            with zipfile.ZipFile(_Tail(self._tail, self._tail_start, self._nbytes)) as archive:
                return archive.infolist()
        except _NeedMoreError as need:
            self._tail = self._reads.exactly(self._name, need.start, self._tail_start) + self._tail
            self._tail_start = need.start
            return self._directory()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, LookupError, struct.error) as error:
            start = self._reads.whole(self._name, 0, FIRST_BYTES)
            if start[:1] == b"\x80" or LEGACY_MAGIC in start:
                raise UnsupportedFormatError(
                    f"{self._where} was written before torch 1.6, or with _use_new_zipfile_serialization=False: "
                    "read it with torch.load and save it anew"
                ) from error
            end = self._end()
            why = str(error)
            if end is not None and end < self._nbytes:
                why = f"{self._nbytes - end} bytes too many follow its end at byte {end}"
            raise CorruptCheckpointError(f"{self._where} is no zip, as torch.save writes it: {why}") from error

    def _end(self) -> int | None:
        """Where the zip seems to end, by the record that is the last of it; None if that is not in the last bytes."""
        at = self._tail.rfind(_LAST_RECORD)
        if at < 0 or at + _LAST_RECORD_BYTES > len(self._tail):
            return None
        (comment_bytes,) = struct.unpack_from("<H", self._tail, at + _LAST_RECORD_BYTES - 2)
        return self._tail_start + at + _LAST_RECORD_BYTES + int(comment_bytes)

    def _begins(self, infos: list[zipfile.ZipInfo]) -> list[int]:
        """Where the contents of records begin: behind their local headers, which are padded."""

        def begin(info: zipfile.ZipInfo) -> int:
            at = info.header_offset
            header = self._reads.exactly(self._name, at, at + _LOCAL_HEADER_BYTES)
            if header[:4] != b"PK\x03\x04":
                raise CorruptCheckpointError(f"{self._where} has no record {info.filename!r} at byte {at}")
            names, extra = struct.unpack_from("<HH", header, 26)
            return at + _LOCAL_HEADER_BYTES + int(names) + int(extra)

        return self._reads.many(begin, infos)

    def _contents(self, infos: list[zipfile.ZipInfo]) -> tuple[bytes, bytes]:
        begins = self._begins(infos)
        pairs = zip(infos, begins, strict=True)
        first, *rest = [self._reads.exactly(self._name, at, at + info.file_size) for info, at in pairs]
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
            try:
                with _WithoutValues():
                    return unpickler.load()
            finally:
                _forget_sparse()
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
            for name, leaf in flatten(state).items():
                if isinstance(leaf.value, torch.Tensor):
                    self._add_tensor(name, leaf.path, leaf.value, keys, begins, ends)
                elif _has_values(leaf.value):
                    self._refuse(name, leaf.path, "as tensors inside of a value that is no dict and no list")
                else:
                    self.values[name] = _Value(leaf.path, leaf.value)
        except (RecursionError, DestinationError, UnsupportedValueError) as error:
            raise CorruptCheckpointError(f"{self._where} has a state dict that has no names: {error}") from error

    def _refuse(self, name: str, path: Path, why: str) -> None:
        """Note that byte ranges do not give a value."""
        reason = (
            f"{self._where} has {name!r} {why}, which byte ranges do not give: read it with torch.load, and save it as "
            "a contiguous tensor"
        )
        self.values[name] = _Value(path, refused=(UnsupportedFormatError, reason))

    def _add_tensor(
        self,
        name: str,
        path: Path,
        tensor: torch.Tensor,
        keys: dict[int, str],
        begins: dict[str, int],
        ends: dict[str, int],
    ) -> None:
        if isinstance(tensor, _NeedsValues):
            self._refuse(
                name, path, "as a tensor of a kind that can only be read whole, by torch.load (quantized, nested)"
            )
            return
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            self._refuse(name, path, f"as a {type(tensor).__name__} of layout {tensor.layout}")
            return
        try:
            dtype = dtype_name(name, tensor.dtype)
        except DtypeError:
            reason = (
                f"{self._where} has {name!r} of dtype {tensor.dtype}, which reshard cannot read: read it with "
                "torch.load. The other tensors can be read"
            )
            self.values[name] = _Value(path, refused=(DtypeError, reason))
            return
        shape, key, order = tuple(tensor.shape), keys.get(tensor.untyped_storage()._cdata), _order_of(tensor)
        if tensor.is_conj() or tensor.is_neg():
            self._refuse(name, path, "as the conjugate or the negative of what is stored")
        elif tensor.numel() and key is None:
            self._refuse(name, path, "without values")
        elif order is None and tensor.numel():
            self._refuse(name, path, f"with strides {tensor.stride()} for its shape {shape}")
        else:
            start = begins.get(key or "", 0) + int(tensor.storage_offset()) * tensor.itemsize
            if tensor.numel() and (key not in begins or start + tensor.nbytes > ends[key]):
                raise CorruptCheckpointError(f"{self._where} does not have the values of {name!r}")
            stored = _Stored(dtype, shape, start, order or tuple(range(len(shape))))
            self.values[name] = _Value(path, stored)


def _forget_sparse() -> None:
    """Take the sparse tensors without memory out of those that the next `torch.load` of this process would check."""
    to_validate = torch._utils._sparse_tensors_to_validate
    if any(tensor.is_meta for tensor in to_validate):
        to_validate[:] = [tensor for tensor in to_validate if not tensor.is_meta]


class _NeedsValues(torch.Tensor):
    """Stands for a tensor that torch makes only where its values are."""

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        """Take no storage: it has no values."""
        return self


class _WithoutValues(TorchFunctionMode):
    """Makes a `_NeedsValues` of each tensor that torch cannot make without memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except NotImplementedError:
            return torch.empty(0, device="meta").as_subclass(_NeedsValues)


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
