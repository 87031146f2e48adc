"""Writes a store from a stream of studies, and leaves nothing that could be taken for a store unless it is whole."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import tensorstore as ts

from mmfm_jax.data import rows
from mmfm_jax.data.foreground import intensities
from mmfm_jax.data.format import (
    GROUP_STUDIES,
    PART_STUDIES,
    SHARD_SAMPLES,
    SplitCounts,
    StoreFile,
    array_metadata,
    array_spec,
    context,
    group_metadata,
    intensities_metadata,
    local_folder,
    mask_image,
    open_kvstore,
    positions_metadata,
    positions_per_shard,
    read_store_file,
    stacked_studies_per_shard,
)
from mmfm_jax.data.masks import summarise
from mmfm_jax.data.stats import StatsBuilder
from mmfm_jax.data.study import Image, ImageSpec, MaskSpec, Schema, Study
from mmfm_jax.errors import UserError

_UNFINISHED = "unfinished"  # there while a store is written to a bucket, where nothing can be renamed


def write_store(
    url: str,
    schema: Schema,
    studies: Iterable[Study],
    *,
    description: str = "",
    source: dict[str, str] | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Writes `studies`, in their order, as a store at a path or TensorStore URL.

    `beside`: further files of the store by name, with checksums like the rest.

    The same studies give the same bytes. Memory holds one shard (64 MiB raw) of each stacked role and of its masks,
    12 MB of sampled positions of each mask, as much of sampled intensities of each role, the rows of one part of
    `studies.parquet`, and a hash of each patient to see that none is in two splits; never all volumes.
    A path is built beside its place and renamed when it is whole. At any other URL `store.json` is written last.

    Raises UserError when something is already there, or when a study does not fit the schema; then, as when killed, no
    store is left, and at a path nothing is.
    """
    folder = local_folder(url)
    if folder is None:
        kvstore = open_kvstore(url)
        if read_store_file(kvstore, url) is not None:
            raise UserError(f"{url}: already holds a store; give another place")
        _clear_unfinished(kvstore, url)
        _write(kvstore, schema, studies, description, source or {}, beside or {})
        kvstore.write(_UNFINISHED, None).result()  # that is, deleted
        return
    check_free(folder, url)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write(open_kvstore(str(partial)), schema, studies, description, source or {}, beside or {})
        os.rename(partial, folder)
    except OSError as error:
        raise UserError(f"{url}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(folder: Path, url: str) -> None:
    """Raises UserError unless a store can be written to a folder; `url` is named in errors."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{url}: already exists and is not empty; give another place or remove it")


def _clear_unfinished(kvstore: ts.KvStore, url: str) -> None:
    """Removes what a broken-off build left and marks the place as being built.

    Raises UserError when files are there without that mark: they are someone's.
    """
    prefixes = ("volumes/", "positions/", "intensities/", "studies.parquet/", "index.parquet/")
    ours = kvstore.read(_UNFINISHED).result().state != "missing"
    for prefix in prefixes:
        if not ours and kvstore.list(_keys_under(prefix)).result():
            raise UserError(f"{url}: already holds {prefix} that is of no store; give another place or remove it")
        kvstore.delete_range(_keys_under(prefix)).result()
    kvstore.write(_UNFINISHED, b"").result()


def _write(
    kvstore: ts.KvStore,
    schema: Schema,
    studies: Iterable[Study],
    description: str,
    source: dict[str, str],
    beside: Mapping[str, bytes],
) -> None:
    files: dict[str, str] = {}
    roles = {
        role: (_StackedRole if spec.shape else _VolumeRole)(kvstore, role, spec, schema.masks_of(role), files)
        for role, spec in schema.images.items()
    }
    positions = {
        name: _Stack(
            kvstore,
            f"positions/{name}",
            positions_metadata(len(spec.classes)),
            len(spec.classes) * positions_per_shard(len(spec.classes)),
            files,
        )
        for name, spec in schema.masks.items()
    }
    samples = {
        role: _Stack(kvstore, f"intensities/{role}", intensities_metadata(spec.dtype), SHARD_SAMPLES, files)
        for role, spec in schema.images.items()
    }
    tables = _Tables(kvstore, schema, files)
    counts, stats, split_of = {}, StatsBuilder(schema), {}
    for row, study in enumerate(studies):
        _check(study, schema, row)
        if split_of.setdefault(study.patient, study.split) != study.split:
            raise UserError(
                f"study {row}: its patient is in the splits {split_of[study.patient]} and {study.split}; "
                "a patient belongs to one"
            )
        checksums = {role: writer.add(row, study.images.get(role), study.masks) for role, writer in roles.items()}
        masks = {name: summarise(mask, len(schema.masks[name].classes)) for name, mask in study.masks.items()}
        for name, writer in positions.items():
            writer.add(masks[name].positions if name in masks else 0, len(schema.masks[name].classes))
        for role, writer in samples.items():
            writer.add(intensities(study.images[role].voxels) if role in study.images else 0, 1)
        tables.add(rows.encode(study, schema, {role: c for role, c in checksums.items() if c}, masks))
        _count(counts.setdefault(study.split, SplitCounts()), study, schema)
        if study.split == "train":
            stats.add(study, masks)
    if not counts:
        raise UserError("there are no studies to write; check what the store is built from")
    for split in split_of.values():
        counts[split].patients += 1
    for writer in [*roles.values(), *positions.values(), *samples.values()]:
        writer.finish()
    tables.finish()
    if positions:
        _put(kvstore, "positions/zarr.json", group_metadata("positions"), files)
    if roles:
        _put(kvstore, "intensities/zarr.json", group_metadata("intensities"), files)
        _put(kvstore, "volumes/zarr.json", group_metadata("volumes"), files)
    for name, data in beside.items():
        _put(kvstore, name, data, files)
    _put(kvstore, "stats.json", stats.build().model_dump_json(indent=1).encode(), files)
    store = StoreFile(
        description=description,
        source=source,
        declared=schema,
        counts=dict(sorted(counts.items())),
        files=dict(sorted(files.items())),
    )
    kvstore.write("store.json", store.model_dump_json(indent=1, by_alias=True).encode()).result()


class _Tables:
    """Buffers rows up to a part, then writes it with its part of the index."""

    def __init__(self, kvstore: ts.KvStore, schema: Schema, files: dict[str, str]):
        self._kvstore, self._files, self._schema = kvstore, files, rows.arrow_schema(schema)
        self._rows: list[dict] = []
        self._parts = 0

    def add(self, row: dict) -> None:
        self._rows.append(row)
        if len(self._rows) == PART_STUDIES:
            self.finish()

    def finish(self) -> None:
        if not self._rows:
            return
        index = rows.write_part(self._rows, rows.INDEX_SCHEMA, PART_STUDIES)
        _put(self._kvstore, rows.part_name("index", self._parts), index, self._files)
        part = rows.write_part(self._rows, self._schema, GROUP_STUDIES)
        _put(self._kvstore, rows.part_name("studies", self._parts), part, self._files)
        self._rows, self._parts = [], self._parts + 1


class _Stack:
    """An array that grows along its first axis, entries of all studies one after another, a shard at a time."""

    def __init__(self, kvstore: ts.KvStore, path: str, metadata: dict, per_shard: int, files: dict[str, str]):
        self._kvstore, self._path, self._files = kvstore, path, files
        self._array = _create(kvstore, path, metadata)
        self._buffer = np.zeros((per_shard, *metadata["shape"][1:]), metadata["data_type"])
        self._filled, self._shards = 0, 0

    def add(self, entries: np.ndarray | int, count: int) -> None:
        """Adds `count` entries along the first axis: an array, or a number for all of them."""
        self._buffer[self._filled : self._filled + count] = entries
        self._filled += count
        if self._filled == len(self._buffer):
            self._flush()

    def finish(self) -> None:
        if self._filled:
            self._flush()
        _checksum(self._kvstore, f"{self._path}/zarr.json", self._files)

    def _flush(self) -> None:
        start = self._array.shape[0]
        stop = start + self._filled
        self._array = self._array.resize(exclusive_max=[stop, *self._buffer.shape[1:]], expand_only=True).result()
        self._array[start:stop].write(self._buffer[: self._filled]).result()
        zeros = "/0" * (self._buffer.ndim - 1)
        _checksum(self._kvstore, f"{self._path}/c/{self._shards}{zeros}", self._files)
        self._filled, self._shards = 0, self._shards + 1


class _StackedRole:
    """All volumes of a role in one array [study * channel, z, y, x], its masks in one each [study, z, y, x].

    A study without one holds zeros there.
    """

    def __init__(
        self, kvstore: ts.KvStore, role: str, spec: ImageSpec, masks: dict[str, MaskSpec], files: dict[str, str]
    ):
        self._kvstore, self._role, self._files, self._masks = kvstore, role, files, masks
        self._spacings: set[tuple[float, float, float]] = set()
        self._image = self._stack(f"volumes/{role}/0", spec)
        self._stacks = {
            name: self._stack(f"volumes/{role}/labels/{name}/0", mask_image(mask, spec)) for name, mask in masks.items()
        }
        self._channels = spec.channels

    def _stack(self, path: str, spec: ImageSpec) -> _Stack:
        assert spec.shape is not None
        per_shard = stacked_studies_per_shard(spec, np.dtype(spec.dtype).itemsize)
        metadata = array_metadata(spec, spec.shape, per_shard)
        return _Stack(self._kvstore, path, metadata, per_shard * spec.channels, self._files)

    def add(self, row: int, image: Image | None, masks: Mapping[str, np.ndarray]) -> None:
        del row  # studies come in the order of their rows
        self._image.add(0 if image is None else np.moveaxis(image.voxels, -1, 0), self._channels)
        for name, stack in self._stacks.items():
            stack.add(masks.get(name, 0), 1)
        if image is not None and len(self._spacings) < 2:
            self._spacings.add(image.spacing_mm)

    def finish(self) -> None:
        for stack in (self._image, *self._stacks.values()):
            stack.finish()
        spacing = self._spacings.pop() if len(self._spacings) == 1 else None
        path = f"volumes/{self._role}"
        for key, metadata in _groups(path, self._role, "study", spacing, self._masks, list(self._masks)).items():
            _put(self._kvstore, key, metadata, self._files)


class _VolumeRole:
    """One array [channel, z, y, x] for each volume of a role, in a group of its own, and its masks in that group."""

    def __init__(
        self, kvstore: ts.KvStore, role: str, spec: ImageSpec, masks: dict[str, MaskSpec], files: dict[str, str]
    ):
        self._kvstore, self._role, self._spec, self._masks = kvstore, role, spec, masks
        _put(kvstore, f"volumes/{role}/zarr.json", group_metadata(role), files)

    def add(self, row: int, image: Image | None, masks: Mapping[str, np.ndarray]) -> str | None:
        """Writes a volume with its masks and returns the checksum of its files."""
        if image is None:
            return None
        path = f"volumes/{self._role}/{row:08d}"
        self._write(f"{path}/0", self._spec, np.moveaxis(image.voxels, -1, 0))
        held = [name for name in self._masks if name in masks]
        for name in held:
            self._write(f"{path}/labels/{name}/0", mask_image(self._masks[name], self._spec), masks[name][None])
        for key, metadata in _groups(path, self._role, "channel", image.spacing_mm, self._masks, held).items():
            self._kvstore.write(key, metadata).result()
        return checksum_under(self._kvstore, path)

    def _write(self, path: str, spec: ImageSpec, voxels: np.ndarray) -> None:
        z, y, x = voxels.shape[1:]
        array = _create(self._kvstore, path, array_metadata(spec, (z, y, x), None))
        array.write(np.ascontiguousarray(voxels)).result()

    def finish(self) -> None:
        """Every volume is already written."""


def _groups(
    path: str,
    role: str,
    first_axis: str,
    spacing_mm: tuple[float, float, float] | None,
    masks: Mapping[str, MaskSpec],
    held: list[str],
) -> dict[str, bytes]:
    """By path, the metadata of an image's group, and of the groups of those of its masks that it holds."""
    groups = {f"{path}/zarr.json": group_metadata(role, first_axis, spacing_mm)}
    if held:
        groups[f"{path}/labels/zarr.json"] = group_metadata("labels", labels=tuple(held))
    for name in held:
        metadata = group_metadata(name, first_axis, spacing_mm, classes=masks[name].classes)
        groups[f"{path}/labels/{name}/zarr.json"] = metadata
    return groups


def checksum_under(kvstore: ts.KvStore, path: str) -> str:
    """SHA-256 over the sorted names and contents of the files below `path`."""
    digest = hashlib.sha256()
    for key in sorted(kvstore.list(_keys_under(f"{path}/")).result()):
        digest.update(key.removeprefix(path.encode()) + b"\0")
        digest.update(hashlib.sha256(kvstore.read(key).result().value).digest())
    return digest.hexdigest()


def _create(kvstore: ts.KvStore, path: str, metadata: dict) -> ts.TensorStore:
    return ts.open({**array_spec(kvstore, path), "metadata": metadata}, create=True, context=context()).result()


def _keys_under(prefix: str) -> ts.KvStore.KeyRange:
    return ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))


def _put(kvstore: ts.KvStore, key: str, value: bytes, files: dict[str, str]) -> None:
    kvstore.write(key, value).result()
    files[key] = hashlib.sha256(value).hexdigest()


def _checksum(kvstore: ts.KvStore, key: str, files: dict[str, str]) -> None:
    """Hashes what TensorStore wrote by reading it back."""
    files[key] = hashlib.sha256(kvstore.read(key).result().value).hexdigest()


def _count(counts: SplitCounts, study: Study, schema: Schema) -> None:
    counts.studies += 1
    for role in study.images:
        counts.images[role] = counts.images.get(role, 0) + 1
    for name, texts in study.texts.items():
        counts.texts[name] = counts.texts.get(name, 0) + bool(texts)
    for name in study.masks:
        counts.masks[name] = counts.masks.get(name, 0) + 1
    for name, value in study.labels.items():
        of_label = counts.labels.setdefault(name, dict.fromkeys(schema.labels[name].classes, 0))
        of_label[schema.labels[name].classes[value]] += 1


def _check(study: Study, schema: Schema, row: int) -> None:
    """Raises UserError unless the study holds only what the schema declares, in the declared form."""
    parts = {"images": study.images, "texts": study.texts, "columns": study.row, "labels": study.labels}
    parts["masks"] = study.masks
    for part, held in parts.items():
        unknown = set(held) - set(getattr(schema, part))
        if unknown:
            raise UserError(f"study {row}: {min(unknown)} is not among the {part} of the schema; declare it there")
    for role, image in study.images.items():
        spec, voxels = schema.images[role], image.voxels
        expected = (*(spec.shape or voxels.shape[:3]), spec.channels)
        if voxels.ndim != 4 or voxels.shape != expected or voxels.size == 0:
            raise UserError(f"study {row}: image {role} has shape {voxels.shape} and the schema says {expected}")
        if voxels.dtype != np.dtype(spec.dtype):
            raise UserError(f"study {row}: image {role} is {voxels.dtype} and the schema says {spec.dtype}")
        if not all(np.isfinite(s) and s > 0 for s in image.spacing_mm):
            raise UserError(f"study {row}: image {role} has spacing {image.spacing_mm}; give positive millimetres")
    for name, mask in study.masks.items():
        spec = schema.masks[name]
        if spec.image not in study.images:
            raise UserError(f"study {row}: mask {name} is of image {spec.image}, which is not there; leave it out")
        expected = study.images[spec.image].voxels.shape[:3]
        if mask.shape != expected or mask.dtype != np.uint8:
            raise UserError(
                f"study {row}: mask {name} is {mask.dtype} of shape {mask.shape}; make it uint8 of {expected}, as its "
                "image is"
            )
        if mask.max() > len(spec.classes):
            classes = len(spec.classes)
            raise UserError(f"study {row}: mask {name} holds the value {mask.max()} and has {classes} classes")
    for name, value in study.row.items():
        column = schema.columns[name]
        if column.kind == "category" and value not in column.vocabulary:
            raise UserError(f"study {row}: column {name} has a value outside its vocabulary {list(column.vocabulary)}")
        if column.kind == "number" and not (isinstance(value, (int, float)) and np.isfinite(value)):
            raise UserError(f"study {row}: column {name} is not a finite number; leave a missing value out of the row")
    for name, value in study.labels.items():
        if not 0 <= value < len(schema.labels[name].classes):
            raise UserError(
                f"study {row}: label {name} is {value}, outside its {len(schema.labels[name].classes)} classes"
            )
