"""The records of the zip that torch.save writes, from the zip's directory.

Only zips as torch.save writes them are accepted: without comments or compression, and with nothing before the first
record or between records except their headers. In other zips, different programs can find different records. In these,
all programs find the same records.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

MAX_TRAILING = 2**16
"""How many bytes may follow the zip. torch's reader allows as many."""
END_BYTES = 22 + 20 + 56 + MAX_TRAILING
"""How many last bytes of a file must be read to find the directory: three records, and the bytes that may follow."""
_END = struct.Struct("<4sHHHHIIH")
_LOCATOR = struct.Struct("<4sIQI")
_END_64 = struct.Struct("<4sQHHIIQQQQ")
_ENTRY = struct.Struct("<4sHHHHHHIIIHHHHHII")
LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
LOCAL_MAGIC = b"PK\3\4"
_END_MAGIC = b"PK\5\6"
_MAX_32 = 2**32 - 1
_ENCRYPTED = 1
_DESCRIPTOR_BYTES = 24
"""The largest size of the descriptor after a record."""


class NotATorchZipError(ValueError):
    """The bytes are not a zip as torch.save writes it."""


@dataclass(frozen=True, slots=True)
class ZipRecord:
    """A record of a zip, as the directory describes it."""

    name: str
    header: int
    """The first byte of its local header in the file."""
    nbytes: int
    crc: int
    """The CRC-32 of its content."""
    name_bytes: int
    """The size of its name in UTF-8."""


@dataclass(frozen=True, slots=True)
class ZipDirectory:
    """The byte range of a zip's directory, and the number of its records."""

    start: int
    stop: int
    records: int


def probable_end(tail: bytes) -> int | None:
    """Return the byte of `tail` where a zip seems to end, by its end record. None if the tail does not contain it."""
    at = tail.rfind(_END_MAGIC)
    if at < 0 or at + _END.size > len(tail):
        return None
    *_, comment_bytes = _END.unpack_from(tail, at)
    return at + _END.size + int(comment_bytes)


def find_directory(tail: bytes, nbytes: int) -> ZipDirectory:
    """Find the directory of a zip.

    Args:
        tail: the last END_BYTES of the file or more, or the whole file.
        nbytes: the size of the file.

    Raises:
        NotATorchZipError: there is no directory, or it is not as torch.save writes it.
    """
    start = nbytes - len(tail)
    found = tail.rfind(_END_MAGIC, max(0, len(tail) - MAX_TRAILING - _END.size), len(tail) - _END.size + 4)
    if found < 0:
        raise NotATorchZipError("it does not end as a zip does")
    at = start + found
    _, disk, first_disk, here, count, size, offset, comment = _END.unpack_from(tail, found)
    if comment:
        raise NotATorchZipError("it has a comment")
    end = at
    locator = at - _LOCATOR.size
    if locator >= start and tail.startswith(b"PK\6\7", locator - start):
        _, _, end_offset, _ = _LOCATOR.unpack_from(tail, locator - start)
        end = locator - _END_64.size
        if end_offset != end or end < start or not tail.startswith(b"PK\6\6", end - start):
            raise NotATorchZipError("the two ends of the zip contradict each other")
        in_first_end = (here, count, size, offset)
        _, left, _, _, disk, first_disk, here, count, size, offset = _END_64.unpack_from(tail, end - start)
        if left != _END_64.size - 12:
            raise NotATorchZipError("the two ends of the zip contradict each other")
        most = (2**16 - 1, 2**16 - 1, _MAX_32, _MAX_32)
        pairs = zip(in_first_end, zip(most, (here, count, size, offset), strict=True), strict=True)
        if any(short not in longer for short, longer in pairs):
            raise NotATorchZipError("the two ends of the zip contradict each other")
    if disk or first_disk or here != count or offset + size != end or size < count * _ENTRY.size:
        raise NotATorchZipError("its directory is not where its end says")
    return ZipDirectory(offset, end, count)


def read_directory(data: bytes, directory: ZipDirectory) -> list[ZipRecord]:
    """Return the records in file order from the bytes of the directory. Raise NotATorchZipError."""
    records = []
    at = 0
    for _ in range(directory.records):
        if at + _ENTRY.size > len(data):
            raise NotATorchZipError("its directory is cut short")
        magic, _, _, flags, method, _, _, crc, packed, size, names, extras, comment, disk, _, _, header = (
            _ENTRY.unpack_from(data, at)
        )
        if magic != b"PK\1\2":
            raise NotATorchZipError("its directory has an entry that is not a record")
        at += _ENTRY.size
        name, extra = data[at : at + names], data[at + names : at + names + extras]
        at += names + extras + comment
        size, packed, header, disk = _with_64(extra, size, packed, header, disk)
        if at > len(data) or comment or disk or flags & _ENCRYPTED:
            raise NotATorchZipError(f"the record {name[:100]!r} is not as torch.save writes it")
        if method or size != packed:
            raise NotATorchZipError(f"the record {name[:100]!r} is compressed; torch.save compresses none")
        try:
            text = name.decode("utf-8")
        except UnicodeDecodeError:
            raise NotATorchZipError(f"the name of the record {name[:100]!r} is not UTF-8") from None
        records.append(ZipRecord(text, header, size, crc, len(name)))
    if at != len(data):
        raise NotATorchZipError("its directory has bytes after its last record")
    records.sort(key=lambda record: record.header)
    _check_positions(records, directory)
    return records


def _with_64(extra: bytes, size: int, packed: int, header: int, disk: int) -> tuple[int, int, int, int]:
    """Return the sizes and position of a record, with 64-bit values from the extra field that has them."""
    values = [size, packed, header, disk]
    lacking = [i for i, most in enumerate((_MAX_32, _MAX_32, _MAX_32, 2**16 - 1)) if values[i] == most]
    at, seen = 0, False
    while at < len(extra):
        if at + 4 > len(extra):
            raise NotATorchZipError("a record has a damaged extra field")
        tag, nbytes = struct.unpack_from("<HH", extra, at)
        at += 4
        if at + nbytes > len(extra):
            raise NotATorchZipError("a record has a damaged extra field")
        if tag == 1:
            widths = [4 if i == 3 else 8 for i in lacking]
            if seen or sum(widths) > nbytes:
                raise NotATorchZipError("a record has a damaged extra field")
            seen, position = True, at
            for i, width in zip(lacking, widths, strict=True):
                values[i] = int.from_bytes(extra[position : position + width], "little")
                position += width
        at += nbytes
    if lacking and not seen:
        raise NotATorchZipError("a record lacks the extra field with its size")
    return values[0], values[1], values[2], values[3]


def _check_positions(records: list[ZipRecord], directory: ZipDirectory) -> None:
    """Check that only headers, padding and descriptors are between records. Raise NotATorchZipError."""
    end = 0
    names: set[str] = set()
    for record in records:
        slack = record.header - end
        if not 0 <= slack <= (2**16 + _DESCRIPTOR_BYTES if end else 0):
            raise NotATorchZipError(
                f"the record {record.name[:100]!r} overlaps another one, or follows bytes that belong to none"
            )
        if record.name in names:
            raise NotATorchZipError(f"it has two records {record.name[:100]!r}")
        names.add(record.name)
        end = record.header + LOCAL_HEADER.size + record.name_bytes + record.nbytes
    if not 0 <= directory.start - end <= 2**16 + _DESCRIPTOR_BYTES:
        raise NotATorchZipError("its records do not end where its directory begins")


def content_begins(record: ZipRecord, header: bytes) -> int:
    """Return the first byte of a record's content in the file.

    Args:
        record: the record.
        header: its local header with the name, LOCAL_HEADER.size + `record.name_bytes` bytes.

    Raises:
        NotATorchZipError: the header is that of another record.
    """
    if len(header) < LOCAL_HEADER.size:
        raise NotATorchZipError(f"it has no record {record.name[:100]!r} at byte {record.header}")
    magic, _, _, method, *_, names, extra = LOCAL_HEADER.unpack_from(header)
    if magic != LOCAL_MAGIC or method or header[LOCAL_HEADER.size : LOCAL_HEADER.size + names] != record.name.encode():
        raise NotATorchZipError(f"it has no record {record.name[:100]!r} at byte {record.header}")
    return record.header + LOCAL_HEADER.size + int(names) + int(extra)


def keys_of(records: list[ZipRecord]) -> list[str]:
    """Return the names of records in the folder that contains all of them. Raise NotATorchZipError if there is none."""
    if len({record.name.partition("/")[0] for record in records}) > 1:
        raise NotATorchZipError("its records are not all in one folder")
    return [record.name.partition("/")[2] for record in records]


def contents(data: memoryview) -> list[tuple[ZipRecord, memoryview]]:
    """Return all records of a whole file with their contents. Raise NotATorchZipError."""
    directory = find_directory(bytes(data[-END_BYTES:]), len(data))
    records = read_directory(bytes(data[directory.start : directory.stop]), directory)
    ends = [*(record.header for record in records[1:]), directory.start]
    with_contents = []
    for record, end in zip(records, ends, strict=False):
        begin = content_begins(
            record, bytes(data[record.header : record.header + LOCAL_HEADER.size + record.name_bytes])
        )
        if begin + record.nbytes > end:
            raise NotATorchZipError(f"the record {record.name[:100]!r} overlaps the next one")
        with_contents.append((record, data[begin : begin + record.nbytes]))
    return with_contents
