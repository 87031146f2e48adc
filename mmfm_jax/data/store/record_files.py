"""Files of records, each record reached by one ranged read at a place that an index tells.

A file holds the studies of a part, 65,536. First its index, in blocks of 4,096 studies: where each record starts in
the file and where the last one ends (uint64), and a CRC-32 of that (uint64); then the records (`records.py`).
"""

from __future__ import annotations

import functools
import itertools
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import tensorstore as ts

from mmfm_jax.data.store import records
from mmfm_jax.data.store.bounded import BytesCache
from mmfm_jax.data.store.format import PART_STUDIES, local_folder
from mmfm_jax.data.store.records import RecordLayout
from mmfm_jax.data.study import Schema
from mmfm_jax.errors import UserError

BLOCK_STUDIES = 4096
INDEX_BYTES = 64 * 2**20  # of index kept, 4 bytes a study: of 16 million studies
RECORD_BYTES = 4 * 2**20  # of records kept, for a study is asked for its table, then for each of its images
_AHEAD_BYTES, _AHEAD_STUDIES = 256 * 2**10, 256  # read at once by who reads one study after another
_OPEN_FILES = 256
_MOST_RECORD_BYTES = 2**28


def file_name(part: int) -> str:
    return f"rows/{part:05d}.rows"


def write_file(held: Sequence[bytes]) -> bytes:
    """A file of the records of one part."""
    blocks = -(-len(held) // BLOCK_STUDIES)
    index_bytes = 8 * (len(held) + 2 * blocks)
    starts = index_bytes + np.cumsum([0, *map(len, held)])
    index = b"".join(_sealed(starts[i : i + BLOCK_STUDIES + 1]) for i in range(0, len(held), BLOCK_STUDIES))
    assert len(index) == index_bytes
    return index + b"".join(held)


def _sealed(starts: np.ndarray) -> bytes:
    data = starts.astype("<u8").tobytes()
    return data + crc32(data).to_bytes(8, "little")


class StudyRecords:
    """Rows of a store by number, each one ranged read and only the wanted columns of it decoded.

    Safe to use from many threads. Memory: `INDEX_BYTES` and `RECORD_BYTES`, whatever the size of the store.
    """

    def __init__(self, kvstore: ts.KvStore, url: str, schema: Schema, studies: int):
        self._kvstore, self._url, self._studies = kvstore, url, studies
        self._layout = RecordLayout(schema)
        self._index = BytesCache(INDEX_BYTES, lambda block: block[1].nbytes)
        self._records = BytesCache(RECORD_BYTES, len)
        self._folder = local_folder(url)
        self._file = functools.lru_cache(_OPEN_FILES)(_File)

    def get(self, row: int, names: tuple[str, ...]) -> dict[str, Any]:
        """Values of columns of `studies.parquet` at a row; missing ones are None.

        Raises UserError when the file is missing, or the study's record in it damaged or cut off.
        """
        record = self._records.get(row)
        if record is None:
            record = self._read_record(row)
        try:
            return self._layout.decoder(names)(record)
        except (struct.error, ValueError, IndexError, RecursionError) as error:
            raise self._bad_record(row) from error

    def _read_record(self, row: int) -> bytes:
        block, at = divmod(row, BLOCK_STUDIES)
        first, starts = self._index.made(block, lambda: self._read_block(block))
        until = at + 1
        if row - 1 in self._records:  # read in order: some at once
            reach = int(np.searchsorted(starts, int(starts[at]) + _AHEAD_BYTES, "right")) - 1
            until = min(max(until, reach), at + _AHEAD_STUDIES, len(starts) - 1)
        ends = starts[at : until + 1].tolist()
        part = row // PART_STUDIES
        data = self._read(part, first + ends[0], first + ends[-1])
        found = [data[start - ends[0] : end - ends[0]] for start, end in itertools.pairwise(ends)]
        if not records.is_whole(row, found[0]):
            raise self._bad_record(row)
        self._records.put(row, found[0])
        for number, record in enumerate(found[1:], row + 1):
            if records.is_whole(number, record):
                self._records.put(number, record)
        return found[0]

    def _bad_record(self, row: int) -> UserError:
        return UserError(
            f"{self._url}/{file_name(row // PART_STUDIES)}: the record of study {row} is damaged or cut off; copy the "
            "store again or build it again"
        )

    def _read_block(self, block: int) -> tuple[int, np.ndarray]:
        """Where the first record of a block starts in its file, and where each starts from there, with the end."""
        row = block * BLOCK_STUDIES
        part, before = divmod(row, PART_STUDIES)
        count = min(BLOCK_STUDIES, PART_STUDIES - before, self._studies - row)
        offset = 8 * (before + 2 * (before // BLOCK_STUDIES))
        data = self._read(part, offset, offset + 8 * (count + 2))
        whole = len(data) == 8 * (count + 2) and crc32(data[:-8]) == int.from_bytes(data[-8:], "little")
        starts = np.frombuffer(data[:-8], "<u8") if whole else np.zeros(0, np.uint64)
        sizes = np.diff(starts.astype(np.float64))
        if not whole or starts.max() > 2**62 or sizes.min() < 0 or sizes.max() > _MOST_RECORD_BYTES:
            raise UserError(
                f"{self._url}/{file_name(part)}: is damaged or cut short; copy the store again or build it again"
            )
        starts = starts.astype(np.int64)
        own = starts - starts[0]
        return int(starts[0]), own.astype(np.uint32) if own[-1] < 2**32 else own

    def _read(self, part: int, start: int, end: int) -> bytes:
        """Bytes of a file; fewer where it is too short. A file of this machine is read without TensorStore's detour."""
        name = file_name(part)
        try:
            if self._folder is not None:
                return self._file(self._folder / name).read(start, end)
            found = self._kvstore.read(name, byte_range=slice(start, end)).result()
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self._url}/{name}: cannot be read or is cut short; copy the store again or build it again"
            ) from error
        else:
            if found.state != "missing":
                return found.value
        raise UserError(f"{self._url}/{name}: is missing from the store; copy the store again or build it again")


class _File:
    """An open file, closed when nobody holds it any more."""

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))

    def read(self, start: int, end: int) -> bytes:
        return os.pread(self._descriptor, end - start, start)

    def __del__(self):
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)
