"""StudyStore: reads a store at a path or any TensorStore URL, only what is asked for and nothing whole."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa
import tensorstore as ts
from pydantic import ValidationError

from mmfm_jax.config.inputs import ImageInput, Window
from mmfm_jax.data.split import share_of
from mmfm_jax.data.store.arrays import checksum_under
from mmfm_jax.data.store.foreground import places
from mmfm_jax.data.store.format import (
    CACHE_BYTES,
    GROUP_STUDIES,
    JSON_BYTES,
    PART_STUDIES,
    ROWS_VERSION,
    SplitCounts,
    StoreFile,
    array_spec,
    check_array,
    context,
    mask_image,
    open_kvstore,
    read_file,
    read_store_file,
)
from mmfm_jax.data.store.masks import POSITIONS
from mmfm_jax.data.store.record_files import StudyRecords
from mmfm_jax.data.store.rows import StudyTables, part_name
from mmfm_jax.data.store.stats import Stats
from mmfm_jax.data.store.studies import Extent, Studies, TableRow, Wanted
from mmfm_jax.data.study import MOST_VOXELS, ImageSpec, Schema
from mmfm_jax.errors import UserError

_INDEX_READERS = 16
_LEAST_MM, _MOST_MM = 1e-6, 1e6  # between voxels
_MOST_BESIDE_BYTES, _MOST_VERIFIED_BYTES = 2**30, 2**34
_OPEN_VOLUMES = 4096
_PASSING = (
    "ABORTED",
    "CANCELLED",
    "DEADLINE_EXCEEDED",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
)  # as TensorStore begins the errors of a server, or of its key, and not of a file

_Columns = tuple[tuple[str, ...], list[tuple[str, str]], list[tuple[str, str]], list[tuple[str, str, dict[str, int]]]]


class DamagedImage(UserError):
    """A file of a study's image or mask is missing, cut short or corrupt; to try again would not help."""


class StudyStore(Studies):
    """Studies by row number. Safe to use from many threads; pickles as its URL.

    Memory: `cache_bytes` of chunks and shard indices a process, 68 MiB at most for where rows are and what they hold,
    one byte a study for the splits; none of it grows with the volumes.
    """

    mixed = False
    names = ("store",)

    def __init__(
        self,
        url: str,
        kvstore: ts.KvStore,
        file: StoreFile,
        stats: Stats,
        train_share: float = 1.0,
        cache_bytes: int = CACHE_BYTES,
    ):
        self.cache_bytes = cache_bytes
        self._url, self.file, self._stats, self.train_share = url, file, stats, train_share
        self._kvstore = kvstore
        self.stores = (self,)
        self._array = functools.lru_cache(_OPEN_VOLUMES)(self._open_array)
        self._info = functools.lru_cache(_OPEN_VOLUMES)(self._read_info)
        self._columns = functools.lru_cache(64)(self._read_columns)
        self._studies = file.studies
        self._tables = StudyTables(kvstore, url, file.declared, self._studies)
        alone = file.format_version >= ROWS_VERSION
        self._rows = StudyRecords(kvstore, url, file.declared, self._studies) if alone else self._tables

    @classmethod
    def open(cls, url: str, train_share: float = 1.0, cache_bytes: int = CACHE_BYTES) -> StudyStore:
        """`train_share`: of the training patients, by hash; the others are left out of `rows("train")`.
        `cache_bytes`: of chunks and shard indices, for all stores of the process that are opened with the same number.

        Raises UserError when there is no store at `url`, or it is of a newer format or damaged."""
        url = str(url)
        kvstore = open_kvstore(url, cache_bytes)
        file = read_store_file(kvstore, url)
        if file is None:
            raise UserError(
                f"{url}: there is no store here (no store.json); build one with `mmfm sample` or mend the path"
            )
        try:
            stats = Stats.model_validate_json(read_file(kvstore, url, "stats.json", JSON_BYTES) or b"")
            stats.check(file.declared)
        except (ValidationError, ValueError) as error:
            raise UserError(
                f"{url}/stats.json: is missing or damaged; copy the store again or build it again"
            ) from error
        return cls(url, kvstore, file, stats, train_share, cache_bytes)

    def __reduce__(self):
        return StudyStore.open, (self.url, self.train_share, self.cache_bytes)

    def __len__(self) -> int:
        return self._studies

    @property
    def url(self) -> str:
        return self._url

    @property
    def stats(self) -> Stats:
        return self._stats

    @property
    def schema(self) -> Schema:
        return self.file.declared

    @functools.cached_property
    def checksum(self) -> str:
        """SHA-256 of `store.json`, which has those of the other files."""
        return hashlib.sha256(self._kvstore.read("store.json").result().value).hexdigest()

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
        rows = np.flatnonzero(self._split_codes == names.index(split)).astype(np.int64)
        if not len(rows):
            raise UserError(
                f"data.train_share: {self.train_share} leaves none of the {self.counts['train'].patients} training "
                f"patients of {self.url}; make it larger"
            )
        return rows

    def patients(self, rows: np.ndarray) -> np.ndarray:
        """Keyed patient hash of each row, str [rows]."""
        return self._indexed("patient", rows, object).astype(str)

    def shares(self, rows: np.ndarray) -> np.ndarray:
        """Place of each row's patient among all, by hash (`share_of`), uint32 [rows]."""
        if self.file.format_version >= ROWS_VERSION:
            return self._indexed("share", rows, np.uint32)
        patients, of_row = np.unique(self.patients(rows), return_inverse=True)
        return np.array([share_of(str(patient)) for patient in patients], np.uint32)[of_row]

    def _indexed(self, name: str, rows: np.ndarray, dtype: Any) -> np.ndarray:
        """A column of the index at these rows."""
        rows = np.asarray(rows, np.int64)
        out = np.empty(len(rows), dtype)
        for part in np.unique(rows // PART_STUDIES):
            here = rows // PART_STUDIES == part
            column = self._tables.index(int(part), [name]).column(name)
            out[here] = column.take(rows[here] % PART_STUDIES).to_numpy(zero_copy_only=False)
        return out

    def index(self) -> pa.Table:
        """Patient (keyed hash) and split of every study."""
        with ThreadPoolExecutor(_INDEX_READERS) as pool:
            read = functools.partial(self._tables.index, columns=["patient", "split"])
            return pa.concat_tables(pool.map(read, range(self._parts)))

    @functools.cached_property
    def _split_codes(self) -> np.ndarray:
        """Index of each study's split in `counts`, int8 [studies]; -1 where `train_share` leaves a patient out."""
        names = list(self.counts)
        train = names.index("train") if "train" in names and self.train_share < 1 else None
        stored = self.file.format_version >= ROWS_VERSION
        more = [] if train is None else ["share" if stored else "patient"]

        def read(part: int) -> np.ndarray:
            try:
                return codes_of(part)
            except (ValueError, IndexError, pa.ArrowException) as error:
                raise UserError(
                    f"{self.url}/{part_name('index', part)}: is not what store.json says; copy the store again or "
                    "build it again"
                ) from error

        def codes_of(part: int) -> np.ndarray:
            table = self._tables.index(part, ["split", *more])
            column = table.column("split").unify_dictionaries().combine_chunks()
            code_of = np.array([names.index(name) for name in column.dictionary.to_pylist()], np.int8)
            codes = code_of[column.indices.to_numpy()]
            if train is not None:
                ours = np.flatnonzero(codes == train)
                held = table.column(more[0]).take(ours)
                shares = held.to_numpy() if stored else np.array([share_of(p) for p in held.to_pylist()], np.uint32)
                codes[ours[shares >= self.train_share * 2**32]] = -1
            return codes

        with ThreadPoolExecutor(_INDEX_READERS) as pool:
            codes = np.concatenate(list(pool.map(read, range(self._parts))))
        pa.default_memory_pool().release_unused()  # which Arrow would keep for next time: there is none
        return codes

    @property
    def _parts(self) -> int:
        return -(-len(self) // PART_STUDIES)

    # ------------------------------------------------------------ texts, table, labels

    def table(self, row: int, wanted: Wanted | None = None) -> TableRow:
        """Texts by field, table values by column and label indices of one study; what is missing has no key.

        `wanted`: what is decoded, where that is not everything.
        """
        names, texts, values, labels = self._columns(wanted)
        held = self._rows.get(self._checked(row), names)
        return (
            {name: tuple(found) for key, name in texts if (found := held[key])},
            {name: found for key, name in values if (found := held[key]) is not None},
            {name: codes[found] for key, name, codes in labels if (found := held[key]) is not None},
        )

    def texts(self, rows: Iterable[int]) -> Iterator[str]:
        """Every text of the studies at `rows`, fields in schema order; ascending rows are read fastest."""
        names = tuple(f"text/{name}" for name in self.schema.texts)
        for row in rows:
            for held in self._rows.get(self._checked(row), names).values():
                yield from held or ()

    def row_groups(self, most: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(first row, all columns of `rows.arrow_schema`) of at most `most` groups of 256 studies, spread evenly."""
        groups = -(-len(self) // GROUP_STUDIES)
        for group in np.unique(np.linspace(0, groups - 1, min(most, groups)).round().astype(int)).tolist():
            first = group * GROUP_STUDIES
            yield first, self._tables.read_group(first // PART_STUDIES, first % PART_STUDIES // GROUP_STUDIES)

    def _read_columns(self, wanted: Wanted | None) -> _Columns:
        schema = self.schema
        wanted = wanted or Wanted(frozenset(schema.texts), frozenset(schema.columns), frozenset(schema.labels))
        texts = [(f"text/{name}", name) for name in schema.texts if name in wanted.texts]
        values = [(f"column/{name}", name) for name in schema.columns if name in wanted.columns]
        labels = [
            (f"label/{name}", name, {value: i for i, value in enumerate(label.classes)})
            for name, label in schema.labels.items()
            if name in wanted.labels
        ]
        return tuple(key for key, *_ in [*texts, *values, *labels]), texts, values, labels

    # ------------------------------------------------------------ volumes

    def volume_info(self, role: str, row: int) -> tuple[Extent, tuple[float, float, float]] | None:
        """Shape (voxels z y x) and spacing (mm, z y x) of a volume, or None when the study lacks it."""
        return self._info(role, self._checked(row))

    def _read_info(self, role: str, row: int) -> tuple[Extent, tuple[float, float, float]] | None:
        shape = self.schema.images[role].shape
        place = f"image/{role}/spacing_mm"
        held = self._rows.get(row, (place,) if shape else (place, f"image/{role}/shape"))
        if held[place] is None:
            return None
        extent: Any
        extent, spacing_mm = shape or tuple(held[f"image/{role}/shape"] or ()), tuple(held[place])
        channels = self.schema.images[role].channels
        possible = len(extent) == len(spacing_mm) == 3 and min(extent) > 0 and prod(extent) * channels <= MOST_VOXELS
        if not possible or not all(_LEAST_MM <= mm <= _MOST_MM for mm in spacing_mm):
            raise DamagedImage(
                f"{self.url}: the size or spacing of image {role} of study {row} cannot be; copy the store again or "
                "build it again"
            )
        return extent, spacing_mm

    def crop(self, role: str, row: int, start: Extent, size: Extent, fill: float = 0) -> np.ndarray:
        """Voxels [z, y, x, channel] of the box at `start` (may be negative), in the role's dtype; `fill` outside.

        Reads only the chunks that the box touches. Raises UserError when the study lacks the role or a chunk is
        missing, cut short or corrupt.
        """
        spec = self.schema.images[role]
        out = np.empty((*size, spec.channels), spec.dtype)
        self.begin_crop(out, role, row, start, fill)()
        return out

    def begin_crop(self, out: np.ndarray, role: str, row: int, start: Extent, fill: float = 0) -> Callable[[], None]:
        """Begins to read a `crop` into `out` [z, y, x, channel]; what is returned waits for it and raises its errors.

        `out` may be a study's place in a batch, so no voxel is copied twice, and a thread can begin many reads.
        """
        info = self.volume_info(role, row)
        if info is None:
            raise UserError(f"{self.url}: study {row} has no image {role}")
        spec, path = self.schema.images[role], f"{self._group(role, row)}/0"
        return self._begin(out, spec, path, row, info[0], start, fill)

    def begin_crops(
        self, out: np.ndarray, places: Sequence[int], role: str, rows: Sequence[int], start: Extent
    ) -> Callable[[], None] | None:
        """Begins to read one box of many studies into out[places] [study, z, y, x, channel]; as `begin_crop` does.

        One read, a hundredth of the Python of a read for each. None, and nothing is read, unless the role's images
        stand in one array, and the box within them.
        """
        spec, path = self.schema.images[role], f"volumes/{role}/0"
        end = [s + n for s, n in zip(start, out.shape[1:4])]
        if spec.shape is None or min(start) < 0 or any(last > n for last, n in zip(end, spec.shape)):
            return None
        studies = np.asarray(rows, np.int64)[:, None] * spec.channels + np.arange(spec.channels)
        box = tuple(map(slice, start, end))

        def failed(error: Exception) -> UserError:
            """That of the study which cannot be read."""
            for row in rows:
                self._read(path, _voxels(spec, row, start, end), row)
            return self._bad_chunk(path, rows[0], error)

        try:
            target = ts.array(out.transpose(0, 4, 1, 2, 3), copy=False, write=True)[np.asarray(places, np.int64)]
            reading = target.write(self._array(path)[(studies, *box)])
        except (ValueError, IndexError) as error:
            raise failed(error) from error

        def wait() -> None:
            try:
                reading.result()
            except ValueError as error:
                raise failed(error) from error

        return wait

    def _group(self, role: str, row: int) -> str:
        """The group of arrays that holds an image of a study, and its masks."""
        return f"volumes/{role}" if self.schema.images[role].shape else f"volumes/{role}/{row:08d}"

    def _begin(
        self, out: np.ndarray, spec: ImageSpec, path: str, row: int, shape: Extent, start: Extent, fill: float
    ) -> Callable[[], None]:
        """Begins to read the box at `start` of a study's volume of `shape` in the array at `path`."""
        low, high = _clipped(start, out.shape, shape)
        inside = [last - first for first, last in zip(low, high)]
        if inside != [*out.shape[:3]]:
            out[...] = fill
            if 0 in inside:
                return _done
            out = out[tuple(slice(first - s, last - s) for first, last, s in zip(low, high, start))]
        target = out.transpose(3, 0, 1, 2)
        try:
            voxels = self._array(path)[_voxels(spec, row, low, high)]
            reading = ts.array(target, copy=False, write=True).write(voxels)
        except (ValueError, IndexError) as error:
            raise self._bad_chunk(path, row, error) from error

        def wait() -> None:
            try:
                reading.result()
            except (ValueError, IndexError) as error:
                raise self._bad_chunk(path, row, error) from error

        return wait

    def inside(self, role: str, row: int, start: Extent, size: Extent) -> ts.TensorStore:
        """The box [channel, z, y, x] of a volume, clipped to it and not read yet, for who wants TensorStore's own."""
        info = self.volume_info(role, row)
        assert info is not None
        low, high = _clipped(start, size, info[0])
        return self._array(f"{self._group(role, row)}/0")[_voxels(self.schema.images[role], row, low, high)]

    def _read(self, path: str, box: tuple[slice | int, ...], row: int) -> np.ndarray:
        try:
            return self._array(path)[box].read().result()
        except (ValueError, IndexError) as error:
            raise self._bad_chunk(path, row, error) from error

    def _bad_chunk(self, path: str, row: int, error: Exception) -> UserError:
        if str(error).startswith(_PASSING):
            return UserError(f"{self.url}/{path}: a chunk of study {row} cannot be read now; {_first_sentence(error)}")
        return DamagedImage(
            f"{self.url}/{path}: a chunk of study {row} is missing, cut short or corrupt; copy the store again or "
            f"build it again ({_first_sentence(error)})"
        )

    def _open_array(self, path: str) -> ts.TensorStore:
        array = ts.open(array_spec(self._kvstore, path), open=True, context=context(self.cache_bytes)).result()
        check_array(array)
        return array

    # ------------------------------------------------------------ masks

    def mask_voxels(self, name: str, row: int) -> np.ndarray | None:
        """How many voxels of each class a mask holds, int64 [class], or None when the study lacks the mask."""
        (held,) = self._rows.get(self._checked(row), (f"mask/{name}/voxels",)).values()
        if held is None:
            return None
        if len(held) != len(self.schema.masks[name].classes) or min(held) < 0:
            raise UserError(f"{self.url}: mask {name} of study {row} is damaged; copy or build the store again")
        return np.asarray(held, np.int64)

    def mask_crop(self, name: str, row: int, start: Extent, size: Extent) -> np.ndarray:
        """A mask in the box at `start` of its image, uint8 [z, y, x]: 0, or 1 + index into the classes; 0 outside.

        Reads only the chunks that the box touches, as `crop` does. Raises UserError when the study lacks the mask or a
        chunk is missing, cut short or corrupt.
        """
        mask = self.schema.masks[name]
        info = None if self.mask_voxels(name, row) is None else self.volume_info(mask.image, row)
        if info is None:
            raise UserError(f"{self.url}: study {row} has no mask {name}")
        spec = mask_image(mask, self.schema.images[mask.image])
        path = f"{self._group(mask.image, row)}/labels/{name}/0"
        out = np.empty((*size, 1), np.uint8)
        self._begin(out, spec, path, row, info[0], start, 0)()
        return out[..., 0]

    def mask_positions(self, name: str, row: int, index: int) -> np.ndarray:
        """Places of voxels of class `index`, int32 [n, 3] as z y x in raster order; n is at most `masks.POSITIONS`.

        They were drawn at random when the store was written, all of them where there are few, and none when the study
        lacks mask or class. One chunk of some kilobytes is read.
        Raises UserError when it is missing, cut short or corrupt.
        """
        voxels = self.mask_voxels(name, row)
        if voxels is None or not voxels[index]:
            return np.zeros((0, 3), np.int32)
        held = slice(0, min(POSITIONS, int(voxels[index])))
        return self._read(f"positions/{name}", (row * len(voxels) + index, held), row)

    # ------------------------------------------------------------ foreground

    def foreground(self, role: str, row: int, above: float | None = None) -> np.ndarray:
        """Sampled places of an image that are brighter than `above` (by default the fingerprint's threshold).

        int64 [n, 3] as z y x, n at most `foreground.SAMPLED`; none when the study lacks the image. One chunk of some
        kilobytes is read. Raises UserError when it is missing, cut short or corrupt.
        """
        info, threshold = self.volume_info(role, row), self.stats.images[role].foreground_above
        if info is None:
            return np.zeros((0, 3), np.int64)
        limit = threshold if above is None else above
        assert limit is not None  # `foreground.check` was asked first
        return places(info[0])[self.intensities(role, row) > limit]

    def intensities(self, role: str, row: int) -> np.ndarray:
        """Those at `foreground.places` of an image that the study has, in its dtype: the largest channel at each.

        One chunk of some kilobytes is read. Raises UserError when it is missing, cut short or corrupt.
        """
        return self._read(f"intensities/{role}", (row,), row)

    def without_intensities(self, role: str) -> str | None:
        """The URL of the store when it was written without samples of the role's intensities."""
        return None if f"intensities/{role}/zarr.json" in self.file.files else self.url

    def sources(self, split: str) -> list[tuple[float, np.ndarray]]:
        """Of one store there is one."""
        return [(1.0, self.rows(split))]

    def source(self, row: int) -> int:
        return 0

    def locate(self, row: int) -> tuple[StudyStore, int]:
        return self, row

    def image_input(self, role: str, image: ImageInput, row: int) -> ImageInput:
        return image

    def image_inputs(self, role: str, image: ImageInput) -> list[ImageInput]:
        """How images of a role enter the model: in one way here, in one for each store of a mix."""
        return [image]

    def windows(self, images: Mapping[str, ImageInput]) -> dict[str, tuple[Window | tuple[Window, ...], ...]]:
        """Windows of one store do not differ; those of a mix may."""
        return {}

    # ------------------------------------------------------------ the whole

    def beside(self, name: str) -> bytes | None:
        """A file that whoever built the store put beside its studies; None when there is none of that name."""
        if name not in self.file.files:
            return None
        found = read_file(self._kvstore, self.url, name, _MOST_BESIDE_BYTES)
        if found is None:
            raise UserError(f"{self.url}/{name}: is missing from the store; copy the store again or build it again")
        return found

    def verify(self) -> None:
        """Reads every file and compares checksums. Raises UserError that names the first bad file."""
        for path, expected in self.file.files.items():
            found = read_file(self._kvstore, self.url, path, _MOST_VERIFIED_BYTES)
            if found is None or hashlib.sha256(found).hexdigest() != expected:
                state = "is missing" if found is None else "is not what was written"
                raise UserError(f"{self.url}/{path}: {state}; copy the store again or build it again")
        for role in (role for role, spec in self.schema.images.items() if spec.shape is None):
            for part in range(self._parts):
                column = self._tables.whole_part(part, [f"image/{role}/sha256"]).column(0)
                for offset, expected in enumerate(column.to_pylist()):
                    path = f"volumes/{role}/{part * PART_STUDIES + offset:08d}"
                    if expected is not None and checksum_under(self._kvstore, path) != expected:
                        raise UserError(f"{self.url}/{path}: is not what was written; copy or build the store again")

    def _checked(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a store of {len(self)} studies")
        return int(row)


def _clipped(start: Sequence[int], size: Sequence[int], shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """The part of a box that lies in a volume, first and last + 1; in plain numbers, for each crop passes here."""
    low = [min(max(s, 0), n) for s, n in zip(start, shape)]
    return low, [min(max(s + room, first), n) for s, room, first, n in zip(start, size, low, shape)]


def _voxels(spec: ImageSpec, row: int, low: Sequence[int], high: Sequence[int]) -> tuple[slice, ...]:
    """Of a study's volume in its array [channel, z, y, x], or in that of all studies [study * channel, z, y, x]."""
    first = row * spec.channels if spec.shape else 0
    return slice(first, first + spec.channels), *map(slice, low, high)


def _done() -> None:
    """Of a read of nothing."""


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).split(": ", 2)[1][:200] if ": " in str(error) else str(error)[:200]
