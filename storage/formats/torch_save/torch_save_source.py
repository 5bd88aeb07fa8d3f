"""torch.save files as a source: read by byte ranges, if torch.load(weights_only=True) could load them.

The file is a zip. Its structure is a pickle, which torch's own unpickler reads with its allow-list and with storages
that have no memory. The values are one uncompressed record for each storage, and are read only when needed. The zip's
directory, at the end of the file, says where the records are.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._weights_only_unpickler import Unpickler
from torch.overrides import TorchFunctionMode

from ....planner.errors import CheckpointError
from ...errors import (
    CorruptCheckpointError,
    DestinationError,
    DtypeError,
    UnsafeValueError,
    UnsupportedFormatError,
    UnsupportedValueError,
)
from ...runtime.brief import MAX_CHARS, brief, reason, text_of
from ...tensors.dtypes import dtype_name
from ...tensors.state_dict import NameLimit, Path, flatten
from ..foreign import whole_tensor
from ..hf_index import FilesSource, TensorsByName, WeightMap, duplicate_tensor_error, select_by_index
from ..metadata_reader import MetadataReader
from ..source import RecordWithCrc
from ..tree_size import is_repetitive
from .pickle_scan import MAX_PICKLE_BYTES, check_pickle
from .zip_layout import is_row_major
from .zip_records import (
    END_BYTES,
    LOCAL_HEADER,
    NotATorchZipError,
    ZipRecord,
    content_begins,
    find_directory,
    keys_of,
    probable_end,
    read_directory,
)

TAIL_BYTES = 1024 * 1024
"""How many last bytes of a file the first request reads: the directory of some thousand tensors."""
"""Without the comment."""
LEGACY_SIGNATURE_BYTES = 32
"""How many first bytes of a file show that torch before 1.6 wrote it."""
MAX_BYTEORDER_BYTES = 32
"""The largest size of the record `byteorder`."""
MAX_NAME_CHARS_PER_BYTE = 256
"""How many characters all names of a file may have, for each byte of its pickle. The memory of values counts too."""
FREE_NAME_CHARS = 128 * 1024 * 1024
"""How many characters the names may have in addition, in all files of a checkpoint together."""
LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""The signature of files that torch before 1.6 wrote, after the protocol of the pickle."""


class TorchSaveSource(FilesSource):
    """The tensors in torch.save files, by their names in the state dict of their file."""

    format = "torch"

    def __init__(self, reader: MetadataReader, names: Sequence[str], weight_map: WeightMap | None = None) -> None:
        """Read the structure of the files.

        Args:
            reader: reads the store.
            names: the files: one, or several that contain parts of one state dict.
            weight_map: the index that says which file contains which tensor, if there is one.

        Raises:
            CorruptCheckpointError: a file is damaged.
            UnsafeValueError: a file needs more of pickle than weights_only=True allows.
            UnsupportedFormatError: a file is of a kind that only torch.load can read.
            ObjectNotFoundError: a file is missing.
            StoreError: the store cannot be read.
        """
        super().__init__(reader, names, weight_map)
        if self.is_folder:
            self.info |= {"files": len(self.objects)}
        limit = NameLimit(FREE_NAME_CHARS)
        files = reader.many(lambda at: _File(reader, at, *self.objects[at], limit), range(len(self.objects)))
        found: TensorsByName[_Value] = {}
        for file in files:
            self.records += file.records
            for name, value in file.values.items():
                found.setdefault(name, []).append((file.at, value))
        for name, parts in (found if weight_map is None else select_by_index(self, found, weight_map)).items():
            if len(parts) > 1:
                raise duplicate_tensor_error(self, name, [self.objects[at][0] for at, _ in parts])
            self._add(name, *parts[0])

    def _add(self, name: str, at: int, value: _Value) -> None:
        if value.refused is not None:
            self.refuse(name, *value.refused, self.objects[at][0])
            return
        self.paths[name] = value.path
        if not isinstance(value.value, _Stored):
            self.add_value(name, value.value)
            return
        dtype, shape, order = value.value.dtype, value.value.shape, value.value.order
        row_major = order == tuple(range(len(shape)))
        shards = whole_tensor(dtype, shape, at, value.value.start)
        self.add_tensor(name, dtype, shape, shards, None if row_major else order)


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor whose values are one byte range of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    order: tuple[int, ...]
    """The dimensions, from the outermost to the innermost in the file."""


@dataclass(frozen=True, slots=True)
class _Value:
    """What a file has under one name: a `_Stored` tensor or a value, or why it cannot be read."""

    path: Path
    value: Any = None
    refused: tuple[type[CheckpointError], str] | None = None


class _File:
    """One torch.save file: its contents, and where they are."""

    def __init__(self, reader: MetadataReader, at: int, name: str, nbytes: int, limit: NameLimit) -> None:
        """Read the structure of a file.

        Args:
            reader: reads the store.
            at: the position of the file in the source's `objects`.
            name: the name of the file.
            nbytes: the size of the file.
            limit: limits the names in all files.
        """
        self._reader = reader
        self.at = at
        """The position in the source's `objects`."""
        self._name = name
        self._nbytes = nbytes
        self._where = f"the torch.save file {name!r} in {reader.store.location}"
        self.values: dict[str, _Value] = {}
        self.records: list[RecordWithCrc] = []
        """The records with the values, unless the file was written without CRC-32s."""
        self._tail_start = max(0, nbytes - max(TAIL_BYTES, END_BYTES))
        self._tail = reader.whole(name, self._tail_start, max(nbytes, 1))
        try:
            directory = self._directory()
            records = dict(zip(keys_of(directory), directory, strict=True))
        except NotATorchZipError as error:
            raise self._not_a_zip(error) from error
        if "data.pkl" not in records:
            raise CorruptCheckpointError(f"{self._where} is a zip without data.pkl: torch.save did not write it")
        read = [records[key] for key in ("data.pkl", "byteorder") if key in records]
        begins = self._begins(read)
        pickled, order = self._read_contents(read, begins)
        if order not in (b"", b"little"):
            raise UnsupportedFormatError(f"{self._where} has values of byte order {order!r}")
        storages: dict[str, Any] = {}
        state = self._unpickled(pickled, storages)
        if is_repetitive(state):
            raise self._has_no_names("it contains itself, or the same dicts and lists many times")
        limit.add(MAX_NAME_CHARS_PER_BYTE * len(pickled))
        try:
            of_storages = self._add_all(state, storages, records, limit)
        except CheckpointError:
            raise
        except Exception as error:  # attributes of unexpected types can raise anything
            raise CorruptCheckpointError(f"{self._where} cannot be read: {reason(error)}") from error
        if any(record.crc for record in directory):
            self._add_record(records["data.pkl"], begins[0], self.values)
            for key, (begin, names) in of_storages.items():
                self._add_record(records[f"data/{key}"], begin, names)

    def _add_record(self, record: ZipRecord, begin: int, names: Iterable[str]) -> None:
        stop = begin + record.nbytes
        self.records.append(RecordWithCrc(record.name, self._name, begin, stop, record.crc, tuple(names)))

    def _has_no_names(self, why: str) -> UnsupportedFormatError:
        return UnsupportedFormatError(
            f"{self._where} has a state dict whose values cannot be listed by name: {why}. Load it with torch.load, "
            "and save it again without them"
        )

    def _directory(self) -> list[ZipRecord]:
        """Return the records of the zip. Raise NotATorchZipError."""
        directory = find_directory(self._tail, self._nbytes)
        if directory.start < self._tail_start:
            self._tail = self._reader.exactly(self._name, directory.start, self._tail_start) + self._tail
            self._tail_start = directory.start
        return read_directory(
            self._tail[directory.start - self._tail_start : directory.stop - self._tail_start], directory
        )

    def _not_a_zip(self, error: NotATorchZipError) -> CheckpointError:
        """Return the error for a file that is not what torch.save writes."""
        start = self._reader.whole(self._name, 0, LEGACY_SIGNATURE_BYTES)
        if start[:1] == b"\x80" or LEGACY_MAGIC in start:
            return UnsupportedFormatError(
                f"{self._where} was written before torch 1.6, or with _use_new_zipfile_serialization=False: "
                "load it with torch.load and save it again"
            )
        end = probable_end(self._tail)
        why = str(error)
        if end is not None and (trailing := len(self._tail) - end) > 0:
            why = f"{trailing} bytes too many follow its end at byte {self._nbytes - trailing}"
        return CorruptCheckpointError(f"{self._where} is not a zip as torch.save writes it: {why}")

    def _begins(self, records: list[ZipRecord]) -> list[int]:
        """Return where the contents of records begin: after their local headers, which are padded."""

        def begin(record: ZipRecord) -> int:
            stop = record.header + LOCAL_HEADER.size + record.name_bytes
            header = self._reader.exactly(self._name, record.header, stop)
            try:
                return content_begins(record, header)
            except NotATorchZipError as error:
                raise CorruptCheckpointError(f"{self._where} contradicts itself: {error}") from error

        return self._reader.many(begin, records)

    def _read_contents(self, records: list[ZipRecord], begins: list[int]) -> tuple[bytes, bytes]:
        for record, most in zip(records, (MAX_PICKLE_BYTES, MAX_BYTEORDER_BYTES), strict=False):
            if not 0 < record.nbytes <= most:
                raise CorruptCheckpointError(
                    f"{self._where} has a record {record.name!r} of {record.nbytes} bytes; it should have 1 to {most}"
                )
        pairs = zip(records, begins, strict=True)
        first, *rest = [self._reader.exactly(self._name, at, at + record.nbytes) for record, at in pairs]
        return first, rest[0].strip() if rest else b""

    def _unpickled(self, data: bytes, storages: dict[str, Any]) -> Any:
        """Return what was saved, with tensors that have no memory.

        Args:
            data: the pickle.
            storages: a dict to fill with the untyped and the typed storages, by the keys of their records.
        """

        def storage_of(pid: Any) -> Any:
            _, kind, key, _, numel = pid
            if type(key) is not str or key not in storages:
                if type(key) is not str or type(numel) is not int or not 0 <= numel < 2**60:
                    raise pickle.UnpicklingError(f"a storage {brief(key)} of {brief(numel)} elements")
                if isinstance(kind, torch.serialization.StorageType):
                    dtype = kind.dtype
                elif kind is torch.UntypedStorage:
                    dtype = torch.uint8
                else:
                    raise pickle.UnpicklingError(f"a storage of {brief(kind)}")
                untyped = torch.UntypedStorage(numel * dtype.itemsize, device="meta")
                typed = torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
                storages[key] = untyped, typed
            return storages[key][1]

        unpickler: Any = Unpickler(io.BytesIO(data), encoding="utf-8")
        unpickler.persistent_load = storage_of
        try:
            check_pickle(data)
            try:
                with _WithoutValues():
                    return unpickler.load()
            finally:
                _forget_sparse()
        except NotImplementedError as error:
            raise UnsupportedFormatError(
                f"{self._where} has tensors of a kind that only torch.load can read: {reason(error)}"
            ) from error
        except Exception as error:
            text = str(error)
            if "GLOBAL" in text or "Unsupported" in text or "weights_only" in text:
                raise UnsafeValueError(
                    f"{self._where} needs more of pickle than torch.load(weights_only=True) allows: "
                    f"{text.splitlines()[0][:MAX_CHARS]}"
                ) from error
            raise CorruptCheckpointError(f"{self._where} cannot be read: {reason(error)}") from error

    def _add_all(
        self, state: Any, storages: dict[str, Any], records: dict[str, ZipRecord], limit: NameLimit
    ) -> dict[str, tuple[int, list[str]]]:
        """Add all values. Return where each storage begins, and the names of the tensors in it, by its key."""
        if not isinstance(state, dict):
            state = {"value": state}
        keys = {untyped._cdata: key for key, (untyped, _) in storages.items()}
        sizes = {key: records[f"data/{key}"].nbytes for key in storages if f"data/{key}" in records}
        used = [key for key, nbytes in sizes.items() if storages[key][0].nbytes() == nbytes]
        begins = dict(zip(used, self._begins([records[f"data/{key}"] for key in used]), strict=True))
        ends = {key: begins[key] + sizes[key] for key in used}
        of_storages: dict[str, tuple[int, list[str]]] = {key: (begins[key], []) for key in used}
        try:
            for name, leaf in flatten(state, limit).items():
                if isinstance(leaf.value, torch.Tensor):
                    key = self._add_tensor(name, leaf.path, leaf.value, keys, begins, ends)
                    if key in of_storages:
                        of_storages[key][1].append(name)
                elif _has_values(leaf.value):
                    self._refuse(name, leaf.path, "as tensors inside a value that is neither a dict nor a list")
                else:
                    self.values[name] = _Value(leaf.path, leaf.value)
        except (RecursionError, DestinationError, UnsupportedValueError) as error:
            raise self._has_no_names(text_of(error)) from error
        return of_storages

    def _refuse(self, name: str, path: Path, why: str) -> None:
        """Note that a value cannot be read by byte ranges."""
        reason = (
            f"{self._where} has {name!r} {why}, which byte ranges cannot express: load it with torch.load, and save it "
            "as a contiguous tensor"
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
    ) -> str | None:
        """Add a tensor. Return the key of its storage, if it can be read."""
        if isinstance(tensor, _NeedsValues):
            self._refuse(name, path, "as a tensor of a kind that only torch.load can read (quantized, nested)")
            return None
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            self._refuse(name, path, f"as a {type(tensor).__name__} of layout {tensor.layout}")
            return None
        tensor = torch.Tensor.detach(tensor)  # drops attributes from the file, which could hide methods
        try:
            dtype = dtype_name(name, tensor.dtype)
        except DtypeError:
            reason = (
                f"{self._where} has {name!r} of dtype {tensor.dtype}, which reshard cannot read: load it with "
                "torch.load. The other tensors can be read"
            )
            self.values[name] = _Value(path, refused=(DtypeError, reason))
            return None
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
            return key
        return None


def _forget_sparse() -> None:
    """Remove sparse tensors without memory from those that the next `torch.load` of this process would check."""
    to_validate = torch._utils._sparse_tensors_to_validate
    if any(tensor.is_meta for tensor in to_validate):
        to_validate[:] = [tensor for tensor in to_validate if not tensor.is_meta]


class _NeedsValues(torch.Tensor):
    """Represents a tensor that torch cannot create without its values."""

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        """Ignore the storage, because it has no values."""
        return self


class _WithoutValues(TorchFunctionMode):
    """Creates a `_NeedsValues` for each tensor that torch cannot create without memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except NotImplementedError:
            return torch.empty(0, device="meta").as_subclass(_NeedsValues)


def _has_values(value: Any) -> bool:
    """Return whether a value contains tensors or storages, whose values have not been read."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if isinstance(current, (torch.Tensor, torch.UntypedStorage, torch.storage.TypedStorage)):
            return True
        if isinstance(current, (Mapping, list, tuple)) and id(current) not in seen:
            seen.add(id(current))
            waiting += current.values() if isinstance(current, Mapping) else current
    return False


def _order_of(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Return the dimensions from the outermost to the innermost in memory. None if the tensor has gaps or overlaps."""
    strides = [0 if n == 1 else stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    order = tuple(sorted(range(tensor.dim()), key=lambda d: (tensor.shape[d] != 1, -strides[d])))
    dense = is_row_major(tuple(tensor.shape[d] for d in order), tuple(strides[d] for d in order))
    return order if dense else None
