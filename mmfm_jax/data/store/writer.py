"""Writes a store from a stream of studies, and leaves nothing that could be taken for a store unless it is whole."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import tensorstore as ts

from mmfm_jax.data.split import share_of
from mmfm_jax.data.store import record_files, rows
from mmfm_jax.data.store.arrays import Stack, StackedRole, VolumeRole, keys_under, put
from mmfm_jax.data.store.foreground import intensities
from mmfm_jax.data.store.format import (
    GROUP_STUDIES,
    PART_STUDIES,
    SHARD_SAMPLES,
    SplitCounts,
    StoreFile,
    group_metadata,
    intensities_metadata,
    local_folder,
    open_kvstore,
    positions_metadata,
    positions_per_shard,
    read_store_file,
)
from mmfm_jax.data.store.masks import summarise
from mmfm_jax.data.store.records import RecordLayout
from mmfm_jax.data.store.stats import StatsBuilder
from mmfm_jax.data.study import Schema, Study, check_study
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
    A path is built beside its place and renamed when it is whole, and only its owner may enter it. At any other URL
    `store.json` is written last.

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
        partial.mkdir(parents=True, mode=0o700)
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
    prefixes = ("volumes/", "positions/", "intensities/", "studies.parquet/", "index.parquet/", "rows/")
    ours = kvstore.read(_UNFINISHED).result().state != "missing"
    for prefix in prefixes:
        if not ours and kvstore.list(keys_under(prefix)).result():
            raise UserError(f"{url}: already holds {prefix} that is of no store; give another place or remove it")
        kvstore.delete_range(keys_under(prefix)).result()
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
        role: (StackedRole if spec.shape else VolumeRole)(kvstore, role, spec, schema.masks_of(role), files)
        for role, spec in schema.images.items()
    }
    positions = {
        name: Stack(
            kvstore,
            f"positions/{name}",
            positions_metadata(len(spec.classes)),
            len(spec.classes) * positions_per_shard(len(spec.classes)),
            files,
        )
        for name, spec in schema.masks.items()
    }
    samples = {
        role: Stack(kvstore, f"intensities/{role}", intensities_metadata(spec.dtype), SHARD_SAMPLES, files)
        for role, spec in schema.images.items()
    }
    tables = _Tables(kvstore, schema, files)
    counts, stats, split_of = {}, StatsBuilder(schema), {}
    for row, study in enumerate(studies):
        check_study(study, schema, row)
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
        put(kvstore, "positions/zarr.json", group_metadata("positions"), files)
    if roles:
        put(kvstore, "intensities/zarr.json", group_metadata("intensities"), files)
        put(kvstore, "volumes/zarr.json", group_metadata("volumes"), files)
    for name, data in beside.items():
        put(kvstore, name, data, files)
    put(kvstore, "stats.json", stats.build().model_dump_json(indent=1).encode(), files)
    store = StoreFile(
        description=description,
        source=source,
        declared=schema,
        counts=dict(sorted(counts.items())),
        files=dict(sorted(files.items())),
    )
    kvstore.write("store.json", store.model_dump_json(indent=1, by_alias=True).encode()).result()


class _Tables:
    """Buffers rows up to a part, encoded, then writes it with its part of the index and of the records."""

    def __init__(self, kvstore: ts.KvStore, schema: Schema, files: dict[str, str]):
        self._kvstore, self._files, self._schema = kvstore, files, rows.arrow_schema(schema)
        self._layout = RecordLayout(schema)
        self._share = functools.lru_cache(PART_STUDIES)(share_of)
        self._group: list[dict] = []
        self._index: list[pa.RecordBatch] = []
        self._studies: list[pa.RecordBatch] = []
        self._records: list[bytes] = []
        self._parts = 0

    def add(self, row: dict) -> None:
        self._group.append(row | {"share": self._share(row["patient"])})
        self._records.append(self._layout.pack(self._parts * PART_STUDIES + len(self._records), row))
        if len(self._group) == GROUP_STUDIES:
            self._finish_group()
        if len(self._records) == PART_STUDIES:
            self.finish()

    def _finish_group(self) -> None:
        """A group takes less room in Arrow than as Python's objects."""
        if self._group:
            self._index.append(pa.RecordBatch.from_pylist(self._group, schema=rows.INDEX_SCHEMA))
            self._studies.append(pa.RecordBatch.from_pylist(self._group, schema=self._schema))
            self._group = []

    def finish(self) -> None:
        self._finish_group()
        if not self._records:
            return
        for name, data in (
            (rows.part_name("index", self._parts), rows.write_part(self._index, PART_STUDIES)),
            (rows.part_name("studies", self._parts), rows.write_part(self._studies, GROUP_STUDIES)),
            (record_files.file_name(self._parts), record_files.write_file(self._records)),
        ):
            put(self._kvstore, name, data, self._files)
        self._index, self._studies, self._records = [], [], []
        self._parts += 1


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
