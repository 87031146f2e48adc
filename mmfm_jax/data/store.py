"""StudyStore: reads a store at a path or any TensorStore URL, only what is asked for and nothing whole."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorstore as ts
from pydantic import ValidationError

from mmfm_jax.data.format import (
    PART_STUDIES,
    SplitCounts,
    StoreFile,
    array_spec,
    context,
    open_kvstore,
    read_store_file,
)
from mmfm_jax.data.rows import StudyRows
from mmfm_jax.data.stats import Stats
from mmfm_jax.data.study import Schema
from mmfm_jax.data.writer import checksum_under, write_store
from mmfm_jax.errors import UserError

__all__ = ["StudyStore", "write_store"]

_INDEX_READERS = 16
_OPEN_VOLUMES = 4096

Extent = tuple[int, int, int]
TableRow = tuple[dict[str, tuple[str, ...]], dict[str, float | str], dict[str, int]]


class StudyStore:
    """Studies by row number. Safe to use from many threads; pickles as its URL.

    Memory: 128 MiB of chunks and shard indices a process (resident about three times that, for the allocator keeps
    room between them), some 33,000 rows of text and table, one byte a study for the splits; none of it grows with the
    volumes.
    """

    def __init__(self, url: str, kvstore: ts.KvStore, file: StoreFile, stats: Stats):
        self.url, self.file, self.stats = url, file, stats
        self._kvstore = kvstore
        self._rows = StudyRows(kvstore, url)
        self._volume = functools.lru_cache(_OPEN_VOLUMES)(self._open_array)

    @classmethod
    def open(cls, url: str) -> StudyStore:
        """Raises UserError when there is no store at `url`, or it is of a newer format or damaged."""
        url = str(url)
        kvstore = open_kvstore(url)
        file = read_store_file(kvstore, url)
        if file is None:
            raise UserError(
                f"{url}: there is no store here (no store.json); build one with `mmfm sample` or mend the path"
            )
        try:
            stats = Stats.model_validate_json(kvstore.read("stats.json").result().value)
        except (ValidationError, ValueError) as error:
            raise UserError(
                f"{url}/stats.json: is missing or damaged; copy the store again or build it again"
            ) from error
        return cls(url, kvstore, file, stats)

    def __reduce__(self):
        return StudyStore.open, (self.url,)

    def __len__(self) -> int:
        return sum(counts.studies for counts in self.counts.values())

    @property
    def schema(self) -> Schema:
        return self.file.declared

    @property
    def counts(self) -> dict[str, SplitCounts]:
        """By split."""
        return self.file.counts

    # ------------------------------------------------------------ which studies

    def rows(self, split: str) -> np.ndarray:
        """Rows of a split in store order, int64 [studies]. Raises UserError when it has no patients."""
        names = list(self.counts)
        if split not in names:
            held = ", ".join(f"{name} ({counts.patients})" for name, counts in self.counts.items())
            raise UserError(f"{self.url}: the split {split} has no patients; the store has the splits {held}")
        return np.flatnonzero(self._split_codes == names.index(split)).astype(np.int64)

    def patients(self, rows: np.ndarray) -> np.ndarray:
        """Keyed patient hash of each row, str [rows]."""
        rows = np.asarray(rows, np.int64)
        out = np.empty(len(rows), dtype=object)
        for part in np.unique(rows // PART_STUDIES):
            here = rows // PART_STUDIES == part
            column = self._rows.whole_part("index", int(part), ["patient"]).column("patient")
            out[here] = column.take(rows[here] % PART_STUDIES).to_numpy(zero_copy_only=False)
        return out.astype(str)

    @functools.cached_property
    def _split_codes(self) -> np.ndarray:
        """Index of each study's split in `counts`, int8 [studies]."""
        names = list(self.counts)

        def read(part: int) -> np.ndarray:
            column = (
                self._rows.whole_part("index", part, ["split"]).column("split").combine_chunks().dictionary_encode()
            )
            code_of = np.array([names.index(name) for name in column.dictionary.to_pylist()], np.int8)
            return code_of[column.indices.to_numpy()]

        with ThreadPoolExecutor(_INDEX_READERS) as pool:
            return np.concatenate(list(pool.map(read, range(self._parts))))

    @property
    def _parts(self) -> int:
        return -(-len(self) // PART_STUDIES)

    # ------------------------------------------------------------ texts, table, labels

    def table(self, row: int) -> TableRow:
        """Texts by field, table values by column and label indices of one study; what is missing has no key."""
        texts, values, labels = self._columns
        held = self._rows.get(self._checked(row), [*texts, *values, *labels])
        return (
            {name: tuple(held[key]) for key, name in texts.items() if held[key]},
            {name: held[key] for key, name in values.items() if held[key] is not None},
            {name: codes[held[key]] for key, (name, codes) in labels.items() if held[key] is not None},
        )

    def texts(self, rows: Iterable[int]) -> Iterator[str]:
        """Every text of the studies at `rows`, fields in schema order; ascending rows are read fastest."""
        names = [f"text/{name}" for name in self.schema.texts]
        for row in rows:
            for held in self._rows.get(self._checked(row), names).values():
                yield from held or ()

    @functools.cached_property
    def _columns(self) -> tuple[dict[str, str], dict[str, str], dict[str, tuple[str, dict[str, int]]]]:
        """Parquet columns of texts, table and labels, each with the name it has in the schema."""
        schema = self.schema
        labels = {
            f"label/{name}": (name, {value: i for i, value in enumerate(label.classes)})
            for name, label in schema.labels.items()
        }
        return (
            {f"text/{name}": name for name in schema.texts},
            {f"column/{name}": name for name in schema.columns},
            labels,
        )

    # ------------------------------------------------------------ volumes

    def volume_info(self, role: str, row: int) -> tuple[Extent, tuple[float, float, float]] | None:
        """Shape (voxels z y x) and spacing (mm, z y x) of a volume, or None when the study lacks it."""
        shape = self.schema.images[role].shape
        names = [f"image/{role}/spacing_mm", *([] if shape else [f"image/{role}/shape"])]
        spacing, *own_shape = self._rows.get(self._checked(row), names).values()
        if spacing is None:
            return None
        return (shape or tuple(own_shape[0])), tuple(spacing)

    def crop(self, role: str, row: int, start: Extent, size: Extent, fill: float = 0) -> np.ndarray:
        """Voxels [z, y, x, channel] of the box at `start` (may be negative), in the role's dtype; `fill` outside.

        Reads only the chunks that the box touches. Raises UserError when the study lacks the role or a chunk is
        missing, cut short or corrupt.
        """
        info = self.volume_info(role, row)
        if info is None:
            raise UserError(f"{self.url}: study {row} has no image {role}")
        spec = self.schema.images[role]
        low = np.clip(start, 0, info[0])
        high = np.clip(np.add(start, size), low, info[0])
        first = row * spec.channels if spec.shape else 0
        box = tuple(slice(int(a), int(b)) for a, b in zip(low, high))
        key = "0" if spec.shape else f"{row:08d}/0"
        try:
            voxels = self._volume(role, key)[(slice(first, first + spec.channels), *box)].read().result()
        except ValueError as error:
            raise UserError(
                f"{self.url}/volumes/{role}/{key}: a chunk of study {row} is missing, cut short or corrupt; "
                f"copy the store again or build it again ({_first_sentence(error)})"
            ) from error
        voxels = np.moveaxis(voxels, 0, -1)
        if voxels.shape[:3] != tuple(size):
            out = np.full((*size, spec.channels), fill, spec.dtype)
            at = tuple(slice(int(a - s), int(b - s)) for a, b, s in zip(low, high, start))
            out[at] = voxels
            return out
        return np.ascontiguousarray(voxels)

    def _open_array(self, role: str, key: str) -> ts.TensorStore:
        return ts.open(array_spec(self._kvstore, f"volumes/{role}/{key}"), open=True, context=context()).result()

    # ------------------------------------------------------------ the whole

    def verify(self) -> None:
        """Reads every file and compares checksums. Raises UserError that names the first bad file."""
        for path, expected in self.file.files.items():
            found = self._kvstore.read(path).result()
            if found.state == "missing" or hashlib.sha256(found.value).hexdigest() != expected:
                state = "is missing" if found.state == "missing" else "is not what was written"
                raise UserError(f"{self.url}/{path}: {state}; copy the store again or build it again")
        for role in (role for role, spec in self.schema.images.items() if spec.shape is None):
            for part in range(self._parts):
                column = self._rows.whole_part("studies", part, [f"image/{role}/sha256"]).column(0)
                for offset, expected in enumerate(column.to_pylist()):
                    path = f"volumes/{role}/{part * PART_STUDIES + offset:08d}"
                    if expected is not None and checksum_under(self._kvstore, path) != expected:
                        raise UserError(f"{self.url}/{path}: is not what was written; copy or build the store again")

    def _checked(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a store of {len(self)} studies")
        return int(row)


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).split(": ", 2)[1][:200] if ": " in str(error) else str(error)[:200]
