"""Parquet from elsewhere, decoded only when what it becomes fits a bound.

A few bytes of Parquet can stand for gigabytes: a page of zeros, or one long word that is told to repeat. So what the
header of every page announces is added up before a page is decoded, each word of a dictionary counted as its longest.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MOST_BYTES = 512 * 2**20
"""Rows of 256 studies with a megabyte of text each take half of that."""
_VALUE_BYTES = 8  # that a value takes at least, with the levels that place it
_DICTIONARY_BYTES = 32 * 2**20  # Arrow ends a dictionary at one megabyte
_COMPRESSIONS = {"ZSTD": "zstd", "SNAPPY": "snappy", "UNCOMPRESSED": ""}
_PLAIN, _ENCODINGS = 0, {0, 2, 3, 8}  # plain, by dictionary (2 and 8), runs
_DICTIONARY_PAGE = 2


def read(
    data: bytes, schema: pa.Schema, columns: Sequence[str] | None = None, most: int | None = None, keep: Sequence = ()
) -> pa.Table:
    """Every row of a file; as `read_groups`."""
    try:
        footer = pq.read_metadata(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise ValueError("it is no Parquet") from error
    return read_groups(data, 0, footer, range(footer.num_row_groups), schema, columns, most, keep)


def read_groups(
    data: bytes,
    start: int,
    footer: pq.FileMetaData,
    groups: Iterable[int],
    schema: pa.Schema,
    columns: Sequence[str] | None = None,
    most: int | None = None,
    keep: Sequence[str] = (),
) -> pa.Table:
    """Columns (all of `schema`, unless some are named) of row groups of a file of which `data` begins at `start`.

    `most`: bytes that they may become (MOST_BYTES). `keep`: columns of words that stay a dictionary.
    Raises ValueError when the file is damaged, does not hold what the schema says or would become more.
    """
    names, groups, most = list(columns or schema.names), list(groups), most or MOST_BYTES
    try:
        held = 0
        for chunk in (chunk for group in groups for chunk in _chunks(footer.row_group(group))):
            path = chunk.path_in_schema.split(".")  # names may hold dots too
            within = {".".join(path[:end]) for end in range(1, len(path) + 1)}
            if not within.isdisjoint(names):
                held += _decoded_bytes(data, start, chunk, most, not within.isdisjoint(keep))
        if held > most:
            raise ValueError(f"it would take more than {most:,} bytes")
        file = pq.ParquetFile(_Window(data, start), metadata=footer, read_dictionary=list(keep) or None)
        table = file.read_row_groups(groups, names, use_threads=False)
        return pa.table({n: table[n] if n in keep else table[n].cast(schema.field(n).type) for n in names})
    except (pa.ArrowException, OSError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise ValueError("it is damaged, or is not what its store describes") from error


def _chunks(group: pq.RowGroupMetaData) -> list[pq.ColumnChunkMetaData]:
    return [group.column(i) for i in range(group.num_columns)]


def first_byte(chunk: pq.ColumnChunkMetaData) -> int:
    """Where a column of a row group starts in its file."""
    return chunk.dictionary_page_offset or chunk.data_page_offset


# ---------------------------------------------------------------- sizes that pages announce


def _decoded_bytes(data: bytes, start: int, chunk: pq.ColumnChunkMetaData, most: int, kept: bool) -> int:
    """Bytes that a column of a row group takes at most. Raises ValueError for more than `most` in one page."""
    if chunk.compression not in _COMPRESSIONS:
        raise ValueError("it is compressed in another way than ours")
    view, total, longest = memoryview(data), 0, 0
    at = first_byte(chunk) - start
    end = at + chunk.total_compressed_size
    if not 0 <= at <= end <= len(data):
        raise ValueError("it is cut short")
    while at < end:
        header, at = _struct(view, at)
        kind, size, stored = (header.get(field, -1) for field in (1, 2, 3))
        page: dict[int, Any] = header.get(5) or header.get(7) or header.get(8) or {}
        values, encoding = page.get(1, -1), page.get(4 if 8 in header else 2)
        if not all(isinstance(n, int) and n >= 0 for n in (size, stored, values)) or encoding not in _ENCODINGS:
            raise ValueError("a page of it is none of ours")
        total += size + values * _VALUE_BYTES
        if kind == _DICTIONARY_PAGE and chunk.physical_type == "BYTE_ARRAY" and not kept:
            longest = _longest_word(view[at : at + stored], size, chunk.compression)
        elif kind != _DICTIONARY_PAGE and encoding != _PLAIN:
            total += values * longest
        if total > most:
            raise ValueError(f"it would take more than {most:,} bytes")
        at += stored
    return total


def _longest_word(page: memoryview, size: int, compression: str) -> int:
    """Of a dictionary: each word behind its length, uint32."""
    if size > _DICTIONARY_BYTES:
        raise ValueError("its dictionary is too large")
    codec = _COMPRESSIONS[compression]
    words = pa.Codec(codec).decompress(page, decompressed_size=size, asbytes=True) if codec else bytes(page)
    at = longest = 0
    while at < len(words):
        length = int.from_bytes(words[at : at + 4], "little")
        longest, at = max(longest, length), at + 4 + length
    return longest


def _struct(data: memoryview, at: int, depth: int = 4) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol, its whole numbers and structs by field, and where it ends."""
    if not depth:
        raise ValueError("a page's header is nested too deep")
    out: dict[int, Any] = {}
    field = 0
    while (byte := data[at]) & 0x0F:
        at += 1
        if byte >> 4:
            field += byte >> 4
        else:
            field, at = _zigzag(data, at)
        out[field], at = _value(data, at, byte & 0x0F, depth)
    return out, at + 1


def _value(data: memoryview, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true, false
        return None, at
    if kind == 3:
        return None, at + 1
    if kind in (4, 5, 6):
        return _zigzag(data, at)
    if kind == 7:
        return None, at + 8
    if kind == 8:
        length, at = _varint(data, at)
        return None, at + length
    if kind == 12:
        return _struct(data, at, depth - 1)
    raise ValueError("a page's header is none")  # lists, sets and maps have no place in one


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a page's header holds a number without end")


def _zigzag(data: memoryview, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at


# ---------------------------------------------------------------- part of a file


class _Window(io.RawIOBase):
    """Part of a file, already read, under the offsets that it has in the whole file."""

    def __init__(self, data: bytes, start: int):
        self._data, self._start, self._at = data, start, start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        end = self._start + len(self._data)
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: end}[whence]
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        at = self._at - self._start
        if at < 0:
            raise OSError("read before the window")
        data = self._data[at:] if size < 0 else self._data[at : at + size]
        self._at += len(data)
        return data
