"""A study without its voxels as bytes that are read and decoded alone, column by column.

A record is little-endian:

    4 bytes   CRC-32 of the row number (8 bytes) and of all that follows, so that neither damage nor the record of
              another study passes
    fixed     a place for each column of `studies.parquet` in its order, but for patient, split and checksums:
              number float64, NaN when missing; category and label int32, an index into the vocabulary or classes in
              `store.json`, -1 when missing; spacing 3 float64, NaN when missing; shape 3 int32; voxels of each class
              of a mask int64, -1 when missing; text 2 uint32, from where to where its texts are
    texts     of each field that the study has, a JSON array of strings in UTF-8

Places are fixed, so a column is decoded without the ones beside it.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any
from zlib import crc32

from mmfm_jax.data.study import Schema

_CHECKSUM = struct.Struct("<I")
_ROW = struct.Struct("<Q")


@dataclass(frozen=True)
class _Field:
    """A column's place in the fixed part."""

    name: str
    format: str
    kind: str
    """number, word, text, or vector, which has several numbers."""
    missing: tuple[Any, ...]
    words: tuple[str | None, ...] = ()
    """Of a word, what its index means; last, where -1 points, None."""


class RecordLayout:
    """How the studies of a schema are records."""

    def __init__(self, schema: Schema):
        self._fields = _fields(schema)
        self._fixed = struct.Struct("<" + "".join(field.format for field in self._fields))
        self._codes = {
            field.name: {word: (code,) for code, word in enumerate(field.words[:-1])}
            for field in self._fields
            if field.kind == "word"
        }
        self.decoder = functools.lru_cache(64)(self._decoder)

    def pack(self, number: int, row: Mapping[str, Any]) -> bytes:
        """The record of a row of `studies.parquet` (`rows.encode`) with a row number."""
        values, texts = [], bytearray()
        first_text = _CHECKSUM.size + self._fixed.size
        for field in self._fields:
            value = row.get(field.name)
            if value is None:
                values.extend(field.missing)
            elif field.kind == "number":
                values.append(value)
            elif field.kind == "word":
                values.extend(self._codes[field.name][value])
            elif field.kind == "vector":
                values.extend(value)
            else:
                start = first_text + len(texts)
                texts += json.dumps(value, ensure_ascii=False).encode()
                values += [start, first_text + len(texts)]
        held = self._fixed.pack(*values) + texts
        return _CHECKSUM.pack(_checksum(number, held)) + held

    def _decoder(self, names: Sequence[str]) -> Callable[[bytes], dict[str, Any]]:
        """What gives the values of some columns of a record; missing ones are None."""
        wanted, places, at = set(names), {}, 0
        formats = [f"<{_CHECKSUM.size}x"]
        for field in self._fields:
            if field.name in wanted:
                formats.append(field.format)
                places[field.name] = at
                at += len(field.missing)
            else:
                formats.append(f"{struct.calcsize('<' + field.format)}x")
        fixed = struct.Struct("".join(formats))
        held = [field for field in self._fields if field.name in wanted]
        assert len(held) == len(wanted), f"no such columns: {wanted - {field.name for field in held}}"
        numbers = [(field.name, places[field.name]) for field in held if field.kind == "number"]
        words = [(field.name, places[field.name], field.words) for field in held if field.kind == "word"]
        texts = [(field.name, places[field.name]) for field in held if field.kind == "text"]
        vectors = [(field, places[field.name]) for field in held if field.kind == "vector"]

        def decode(record: bytes) -> dict[str, Any]:
            values = fixed.unpack_from(record)
            out: dict[str, Any] = {}
            for name, i in numbers:
                value = values[i]
                out[name] = None if value != value else value
            for name, i, of in words:
                out[name] = of[values[i]]
            for name, i in texts:
                start, end = values[i], values[i + 1]
                out[name] = _texts(record[start:end]) if end > start else None
            for field, i in vectors:
                first, missing = values[i], field.missing[0]
                absent = first != first if missing != missing else first == missing
                out[field.name] = None if absent else values[i : i + len(field.missing)]
            return out

        return decode


def _texts(data: bytes) -> list[str]:
    """Raises ValueError for what is no array of strings."""
    texts = json.loads(data)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("texts of a record are none")
    return texts


def is_whole(number: int, record: bytes) -> bool:
    """Whether bytes are the record of the row of that number, undamaged."""
    if len(record) < _CHECKSUM.size:
        return False
    return _CHECKSUM.unpack_from(record)[0] == _checksum(number, memoryview(record)[_CHECKSUM.size :])


def _checksum(number: int, held: bytes | memoryview) -> int:
    return crc32(held, crc32(_ROW.pack(number)))


def _fields(schema: Schema) -> list[_Field]:
    fields = []
    for role, image in schema.images.items():
        fields.append(_Field(f"image/{role}/spacing_mm", "3d", "vector", (nan,) * 3))
        if image.shape is None:
            fields.append(_Field(f"image/{role}/shape", "3i", "vector", (-1,) * 3))
    fields += [_Field(f"text/{name}", "2I", "text", (0, 0)) for name in schema.texts]
    for name, column in schema.columns.items():
        if column.kind == "number":
            fields.append(_Field(f"column/{name}", "d", "number", (nan,)))
        else:
            fields.append(_Field(f"column/{name}", "i", "word", (-1,), (*column.vocabulary, None)))
    fields += [
        _Field(f"label/{name}", "i", "word", (-1,), (*label.classes, None)) for name, label in schema.labels.items()
    ]
    fields += [
        _Field(f"mask/{name}/voxels", f"{len(mask.classes)}q", "vector", (-1,) * len(mask.classes))
        for name, mask in schema.masks.items()
    ]
    return fields
