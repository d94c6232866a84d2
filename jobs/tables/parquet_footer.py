"""Reading and checking a Parquet file's footer before pyarrow does, which crashes on encrypted or contradictory
footers.

The footer and the page headers are structs in Thrift's compact protocol. Here, a struct is a dict from field number to
value; parquet.thrift defines the numbers.
"""

import os
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from batchinfer.errors import Refused

MAX_FOOTER_BYTES = 1 << 28
DEEPEST = 32  # most levels of structs within structs; a valid footer has 6
HEADER_BYTES = 64  # read of a page's header, which begins with its kind and sizes
INT96, BYTE_ARRAY, FIXED_LEN_BYTE_ARRAY = 3, 6, 7  # physical types
DICTIONARY_PAGE = 2
MEASURED_BYTES = 1 << 26  # a larger dictionary is not decompressed to be measured
CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
LENGTH = struct.Struct("<I")  # before each value of a dictionary


@dataclass(frozen=True)
class Chunk:
    """A column chunk: a column's values in a row group."""

    column: str  # the table's column that has it; it may be nested in that column
    values: int  # nulls included; one for each row if the column is not nested
    of_bytes: bool  # whether values have no fixed size
    codec: int  # by which its pages are compressed; 0: they are not
    start: int  # offset of its first page in the file
    end: int  # offset of its end


@dataclass(frozen=True)
class RowGroup:
    """A row group of a Parquet file."""

    rows: int
    bytes: int  # decompressed, but not decoded
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Footer:
    """A footer whose row counts and offsets are consistent. `rows` is the sum over its row groups."""

    path: Path
    groups: tuple[RowGroup, ...]
    int96: tuple[str, ...] = ()  # the table's columns with values of 96 bits, which are timestamps
    bare16: tuple[str, ...] = ()  # the table's columns with values of 16 bytes that are not said to be anything

    @staticmethod
    def read(path: Path) -> "Footer":
        """Read a file's footer. Raises `Refused` if it is not Parquet, is encrypted, or contradicts itself."""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            metadata = _metadata(path, file, size)
        try:
            groups = tuple(_row_group(group) for group in metadata[4])
            leaves = list(_leaves(metadata[2]))
            encrypted = 8 in metadata or any(8 in chunk for group in metadata[4] for chunk in group[1])
            claimed = int(metadata[3])
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise _damaged(path, "its footer lacks fields that every footer has") from error
        if encrypted:
            raise Refused(f"{path} is encrypted Parquet; decrypt it first")
        int96 = [column for column, element in leaves if element.get(1) == INT96]
        bare16 = [column for column, element in leaves if _is_bare16(element)]
        footer = Footer(path, groups, tuple(dict.fromkeys(int96)), tuple(dict.fromkeys(bare16)))
        if footer.rows != claimed:
            raise Refused(
                f"{path}: the footer counts {claimed} rows, its row groups {footer.rows}; write the file anew"
            )
        for number, group in enumerate(groups):
            if len(group.chunks) != len(leaves):
                raise _damaged(path, f"row group {number} has {len(group.chunks)} columns; expected {len(leaves)}")
            for chunk in group.chunks:
                if not 0 <= group.rows <= chunk.values:
                    raise _damaged(
                        path, f"row group {number} counts {group.rows} rows, its column {chunk.column!r} {chunk.values}"
                    )
                if not 4 <= chunk.start < chunk.end <= size and group.rows:
                    raise _damaged(path, f"column {chunk.column!r} of row group {number} ends after the file's end")
        return footer

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.groups)

    def largest_row(self, number: int, columns: Collection[str], small: int) -> int:
        """Return an estimate of the bytes of the largest row that a row group has in these columns.

        It is no less than the average row, nor than a row with the largest value of each chunk's dictionary. The
        dictionary has the values that are repeated, and is the first page of its chunk. Dictionaries of at most `small`
        bytes together are not measured: each counts as one value. So does that of a column of lists, since some lists
        may have many more values than the average one.
        """
        group = self.groups[number]
        if not group.rows:
            return 1
        chunks = [chunk for chunk in group.chunks if chunk.of_bytes and chunk.column in columns]
        with self.path.open("rb") as file:
            sizes = [_dictionary_bytes(file, chunk) * -(-chunk.values // group.rows) for chunk in chunks]
            if sum(sizes) > small:
                sizes = [
                    _largest_value(file, chunk) if chunk.values == group.rows else size
                    for chunk, size in zip(chunks, sizes, strict=True)
                ]
        return max(1, sum(sizes), group.bytes // group.rows)


def _metadata(path: Path, file: BinaryIO, size: int) -> dict[int, Any]:
    file.seek(max(0, size - 8))
    tail = file.read()
    if tail[4:] == b"PARE":
        raise Refused(f"{path} is encrypted Parquet; decrypt it first")
    if len(tail) < 8 or tail[4:] != b"PAR1":
        raise _damaged(path, "Parquet magic bytes not found in its footer; it is not Parquet, or was cut off")
    length = int.from_bytes(tail[:4], "little")
    if length > min(size - 12, MAX_FOOTER_BYTES):
        raise _damaged(
            path, f"its footer claims {length} bytes; it can have at most {min(size - 12, MAX_FOOTER_BYTES)}"
        )
    file.seek(size - 8 - length)
    try:
        return dict(_Compact(file.read(length)).fields())
    except (LookupError, ValueError, struct.error) as error:
        raise _damaged(path, "its footer is garbled") from error


def _leaves(elements: list[dict[int, Any]]) -> Iterator[tuple[str, dict[int, Any]]]:
    """Yield (the table's column, element) for each element of the schema that has values; parents come first."""
    column, left = "", 0  # elements of this column that are still to come
    for element in elements[1:]:
        if not left:
            column, left = element[4].decode(), 1
        children = element.get(5, 0)
        left += children - 1
        if not children:
            yield column, element


def _is_bare16(element: dict[int, Any]) -> bool:
    return element.get(1) == FIXED_LEN_BYTE_ARRAY and element.get(2) == 16 and not {6, 10} & element.keys()


def _row_group(group: dict[int, Any]) -> RowGroup:
    # A chunk without field 3 is encrypted.
    chunks = tuple(_chunk(chunk[3]) for chunk in group[1] if 3 in chunk)
    return RowGroup(int(group[3]), int(group[2]), chunks)


def _chunk(metadata: dict[int, Any]) -> Chunk:
    codec, values, size, start, dictionary = (int(metadata.get(field, 0)) for field in (4, 5, 7, 9, 11))
    first = dictionary if 0 < dictionary < start else start
    return Chunk(metadata[3][0].decode(), values, metadata[1] == BYTE_ARRAY, codec, first, first + size)


def _dictionary_bytes(file: BinaryIO, chunk: Chunk) -> int:
    file.seek(chunk.start)
    fields = _Compact(file.read(HEADER_BYTES)).fields()
    try:
        (_, kind), (_, size) = next(fields), next(fields)
    except (LookupError, ValueError, StopIteration):
        return 0  # not a page header: pyarrow will refuse the file
    return size if kind == DICTIONARY_PAGE and isinstance(size, int) else 0


def _largest_value(file: BinaryIO, chunk: Chunk) -> int:
    """Return the bytes of the largest value of a chunk's dictionary; of the whole dictionary if it is not measured."""
    size = _dictionary_bytes(file, chunk)
    if not 0 < size <= MEASURED_BYTES:
        return size
    try:
        return max(_lengths(_dictionary(file, chunk, size)), default=0)
    except (LookupError, TypeError, ValueError, struct.error, OSError, pa.ArrowException):
        return size  # damaged, which pyarrow will refuse, or compressed as only pyarrow's reader knows


def _dictionary(file: BinaryIO, chunk: Chunk, size: int) -> bytes:
    """Return the values of a chunk's dictionary, of `size` bytes, as they are written."""
    file.seek(chunk.start)
    header = _Compact(file.read(HEADER_BYTES))
    compressed = dict(header.fields())[3]
    if not 0 <= compressed <= 2 * MEASURED_BYTES:
        raise ValueError("the page is too large")
    file.seek(chunk.start + header.at)
    data = file.read(compressed)
    return data if chunk.codec == 0 else bytes(pa.Codec(CODECS[chunk.codec]).decompress(data, size, asbytes=True))


def _lengths(values: bytes) -> Iterator[int]:
    """Yield the length of each value of a dictionary."""
    at = 0
    while at < len(values):
        (length,) = LENGTH.unpack_from(values, at)
        yield length
        at += LENGTH.size + length
    if at > len(values):
        raise ValueError("the last value is cut off")


def _damaged(path: Path, what: str) -> Refused:
    return Refused(f"{path} cannot be read as Parquet: {what}")


class _Compact:
    """A reader of Thrift's compact protocol. Garbled bytes raise `LookupError`, `ValueError` or `struct.error`."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0  # bytes that are read

    def fields(self, depth: int = 0) -> Iterator[tuple[int, Any]]:
        """Yield (number, value) of each field of the struct that begins at the current position."""
        if depth > DEEPEST:
            raise ValueError("structs are nested too deep")
        number = 0
        while head := self._byte():
            delta, kind = head >> 4, head & 15
            number = number + delta if delta else self._integer()
            yield number, kind == 1 if kind in (1, 2) else self._value(kind, depth)

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 8:
            return self._take(self._varint())
        if kind == 12:
            return dict(self.fields(depth + 1))
        if kind in (9, 10):
            return self._list(depth + 1)
        if kind in (1, 2, 3):  # an element of a list: true, false or a number of one byte
            return self._byte()
        if kind == 7:
            return struct.unpack("<d", self._take(8))[0]
        raise ValueError(f"a field has the unknown kind {kind}")

    def _list(self, depth: int) -> list[Any]:
        head = self._byte()
        count = head >> 4 if head >> 4 < 15 else self._varint()
        if count > len(self._data):
            raise ValueError("a list is longer than the footer")
        return [self._value(head & 15, depth) for _ in range(count)]

    def _integer(self) -> int:
        coded = self._varint()
        return (coded >> 1) ^ -(coded & 1)

    def _varint(self) -> int:
        number = shift = 0
        while (byte := self._byte()) & 128:
            number |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise ValueError("a number has more than 64 bits")
        return number | byte << shift

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _take(self, count: int) -> bytes:
        taken = self._data[self.at : self.at + count]
        if len(taken) < count:
            raise LookupError("the bytes end")
        self.at += count
        return taken
