"""Several stores read as one: their studies one after another, their schemas joined, each drawn by its weight.

A study keeps one row number for good: that in its own store plus the studies of the stores before it, which stand in
the order of their names. So what is read of a mix (batches, evaluations, probes) need not know that it is one.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import Any

import numpy as np
import pyarrow as pa

from mmfm_jax.config.data import DataConfig, MixedStore, changed_image
from mmfm_jax.config.inputs import ImageInput, Window
from mmfm_jax.data.store.stats import CategoryColumn, ImageRole, MaskVoxels, NumberColumn, Stats, TextField
from mmfm_jax.data.store.studies import Studies
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.study import ColumnSpec, ImageSpec, LabelSpec, MaskSpec, Schema
from mmfm_jax.errors import UserError


def open_data(data: DataConfig) -> Studies:
    """The store or the stores that a configuration names. Raises UserError when one cannot be read or they differ."""
    if not data.mix:
        return StudyStore.open(data.store, data.train_share, data.cache_bytes)
    stores = {name: StudyStore.open(of.store, data.train_share, data.cache_bytes) for name, of in data.mix.items()}
    return StoreMix(stores, data.mix)


def check_there(data: DataConfig) -> None:
    """Raises UserError when one of the stores that a configuration names cannot be opened."""
    for url in [data.store] if data.store else [of.store for of in data.mix.values()]:
        StudyStore.open(url, cache_bytes=data.cache_bytes)


class StoreMix(Studies):
    """Stores by name, read as one."""

    mixed = True

    def __init__(self, stores: Mapping[str, StudyStore], config: Mapping[str, MixedStore]):
        """Raises UserError when stores disagree about a part that they share, or a patient is in two splits."""
        self.names = tuple(sorted(stores))
        self.stores = [stores[name] for name in self.names]
        self.config = [config[name] for name in self.names]
        self._schema = _joined_schema({name: store.schema for name, store in zip(self.names, self.stores)})
        self._first = np.cumsum([0, *map(len, self.stores)])
        _check_splits(self.names, self.stores)

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def schema(self) -> Schema:
        return self._schema

    @property
    def url(self) -> str:
        return " + ".join(store.url for store in self.stores)

    @functools.cached_property
    def stats(self) -> Stats:
        """Of all training studies of all stores, whatever their weights."""
        return _joined_stats([store.stats for store in self.stores], self.stores, self.schema)

    # ------------------------------------------------------------ which studies

    def source(self, row: int) -> int:
        """Which store, in the order of names, a study is of."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of stores of {len(self)} studies")
        return int(np.searchsorted(self._first, row, "right")) - 1

    def sources(self, split: str) -> list[tuple[float, np.ndarray]]:
        """Weight and rows of each store. Raises UserError when one has no patients in the split."""
        return [(c.weight, s.rows(split) + first) for c, s, first in zip(self.config, self.stores, self._first)]

    def rows(self, split: str) -> np.ndarray:
        """Rows of a split, int64 [studies], the stores evenly among each other, so that the first n are of all.

        Raises UserError when no store has patients in it.
        """
        held = [(s.rows(split) + first) for s, first in zip(self.stores, self._first) if split in s.counts]
        if not held:
            return self.stores[0].rows(split)  # which says what is missing
        place = np.concatenate([(np.arange(len(rows)) + 0.5) / len(rows) for rows in held])
        return np.concatenate(held)[np.argsort(place, kind="stable")]

    def patients(self, rows: np.ndarray) -> np.ndarray:
        """Keyed patient hash of each row, str [rows]."""
        return self._of_stores(lambda store, rows: store.patients(rows), rows, object).astype(str)

    def shares(self, rows: np.ndarray) -> np.ndarray:
        """Place of each row's patient among all, by hash (`share_of`), uint32 [rows]."""
        return self._of_stores(lambda store, rows: store.shares(rows), rows, np.uint32)

    def _of_stores(
        self, ask: Callable[[StudyStore, np.ndarray], np.ndarray], rows: np.ndarray, dtype: Any
    ) -> np.ndarray:
        """What the store of each row answers for its own rows."""
        rows = np.asarray(rows, np.int64)
        out = np.empty(len(rows), dtype)
        of = np.searchsorted(self._first, rows, "right") - 1
        for number, store in enumerate(self.stores):
            out[of == number] = ask(store, rows[of == number] - self._first[number])
        return out

    def locate(self, row: int) -> tuple[StudyStore, int]:
        """The store of a study, and its row there."""
        number = self.source(row)
        return self.stores[number], int(row - self._first[number])

    def without_intensities(self, role: str) -> str | None:
        held = [store for store in self.stores if role in store.schema.images]
        return next((url for store in held if (url := store.without_intensities(role))), None)

    # ------------------------------------------------------------ how the images of each store enter

    def image_input(self, role: str, image: ImageInput, row: int) -> ImageInput:
        """How an image of the study's store enters the model."""
        return changed_image(image, self.config[self.source(row)].images.get(role))

    def image_inputs(self, role: str, image: ImageInput) -> list[ImageInput]:
        """Likewise, of every store that has the role."""
        held = [c for c, store in zip(self.config, self.stores) if role in store.schema.images]
        return [changed_image(image, config.images.get(role)) for config in held]

    def windows(self, images: Mapping[str, ImageInput]) -> dict[str, tuple[Window | tuple[Window, ...], ...]]:
        """By role, the window of each store, of roles where they differ."""
        found = {
            role: tuple(
                window
                for config in self.config
                if (window := changed_image(image, config.images.get(role)).window) is not None
            )
            for role, image in images.items()
        }
        return {role: windows for role, windows in found.items() if len(set(windows)) > 1}


# ---------------------------------------------------------------- one schema


def _joined_schema(schemas: Mapping[str, Schema]) -> Schema:
    """Every part of every schema. Raises UserError when two stores mean different things by one name."""
    images: dict[str, ImageSpec] = {}
    columns: dict[str, ColumnSpec] = {}
    labels: dict[str, LabelSpec] = {}
    masks: dict[str, MaskSpec] = {}
    texts: dict[str, str] = {}
    said: dict[tuple[str, str], str] = {}  # by which store a part was declared first

    def agree(part: str, name: str, store: str, ours: object, held: object) -> None:
        first = said.setdefault((part, name), store)
        if held is not None and ours != held:
            raise UserError(
                f"data.mix: {part} {name} is {_words(held)} in {first} and {_words(ours)} in {store}; build one of the "
                "stores anew so that they agree, or give one of the two another name"
            )

    for store, schema in schemas.items():
        for role, spec in schema.images.items():
            held = images.get(role)
            agree("image", role, store, (spec.dtype, spec.channels), held and (held.dtype, held.channels))
            shape = spec.shape if held is None or held.shape == spec.shape else None
            images[role] = (held or spec).model_copy(update={"shape": shape})
        for name, column in schema.columns.items():
            before = columns.get(name)
            agree("column", name, store, (column.kind, column.unit), before and (before.kind, before.unit))
            words = tuple(dict.fromkeys([*(before.vocabulary if before else ()), *column.vocabulary]))
            columns[name] = (before or column).model_copy(update={"vocabulary": words})
        for name, label in schema.labels.items():
            known = labels.get(name)
            agree("label", name, store, label.classes, known and known.classes)
            labels[name] = known or label
        for name, mask in schema.masks.items():
            ours = masks.get(name)
            agree("mask", name, store, (mask.image, *mask.classes), ours and (ours.image, *ours.classes))
            masks[name] = ours or mask
        texts = schema.texts | texts
    return Schema(images=images, texts=texts, columns=columns, labels=labels, masks=masks)


def _words(values: object) -> str:
    return " ".join(str(v) for v in values if v != "") if isinstance(values, tuple) else str(values)


def _check_splits(names: tuple[str, ...], stores: list[StudyStore]) -> None:
    """Raises UserError when a patient is in one split here and in another there. Reads every `index.parquet` once."""
    index = pa.concat_tables([store.index() for store in stores]).unify_dictionaries()
    splits = index.group_by("patient").aggregate([("split", "count_distinct")])
    several = sum(n > 1 for n in splits.column("split_count_distinct").to_pylist())
    if several:
        raise UserError(
            f"data.mix: {several} patients are in one split in one of {', '.join(names)} and in another split in "
            "another, so training would see held-out patients; build the stores with one key and one split rule"
        )


# ---------------------------------------------------------------- one fingerprint


def _joined_stats(stats: list[Stats], stores: Sequence[StudyStore], schema: Schema) -> Stats:
    train = [store.counts["train"].studies if "train" in store.counts else 0 for store in stores]

    def missing_elsewhere(held: list[bool]) -> int:
        return sum(n for n, has in zip(train, held) if not has)

    def number(name: str) -> NumberColumn:
        of = [(s.numbers[name], n - s.numbers[name].missing) for s, n in zip(stats, train) if name in s.numbers]
        missing = sum(c.missing for c, _ in of) + missing_elsewhere([name in s.numbers for s in stats])
        there = [(c, n) for c, n in of if n]
        if not there:
            return NumberColumn(mean=0.0, sd=1.0, low=0.0, high=0.0, missing=missing)
        total = sum(n for _, n in there)
        mean = sum(n * c.mean for c, n in there) / total
        sd = sqrt(sum(n * (c.sd**2 + (c.mean - mean) ** 2) for c, n in there) / total)
        return NumberColumn(
            mean=mean, sd=sd, low=min(c.low for c, _ in there), high=max(c.high for c, _ in there), missing=missing
        )

    def category(name: str) -> CategoryColumn:
        counts = dict.fromkeys(schema.columns[name].vocabulary, 0)
        of = [s.categories[name] for s in stats if name in s.categories]
        for column in of:
            for value, n in column.counts.items():
                counts[value] += n
        missing = sum(c.missing for c in of) + missing_elsewhere([name in s.categories for s in stats])
        return CategoryColumn(counts=counts, missing=missing)

    def text(name: str) -> TextField:
        of = [s.texts[name] for s in stats if name in s.texts]
        texts = sum(t.texts for t in of)
        return TextField(
            studies=sum(t.studies for t in of),
            texts=texts,
            words_mean=sum(t.words_mean * t.texts for t in of) / max(1, texts),
            words_max=max((t.words_max for t in of), default=0),
        )

    def image(role: str) -> ImageRole:
        """Of the store that has most volumes, as percentiles of several cannot be joined; the finest spacing of all."""
        of = [s.images[role] for s in stats if role in s.images]
        finest = [r.spacing_mm_min for r in of if r.spacing_mm_min is not None]
        least = tuple(map(min, *finest)) if len(finest) > 1 else (finest or [None])[0]
        return max(of, key=lambda r: r.volumes).model_copy(update={"spacing_mm_min": least})

    def mask(name: str) -> MaskVoxels:
        of = [s.masks[name] for s in stats if name in s.masks]
        volumes, voxels = (sum((Counter(getattr(m, part)) for m in of), Counter()) for part in ("volumes", "voxels"))
        classes = schema.masks[name].classes
        return MaskVoxels(
            masks=sum(m.masks for m in of),
            volumes={c: volumes[c] for c in classes},
            voxels={c: voxels[c] for c in classes},
        )

    kinds = {name: column.kind for name, column in schema.columns.items()}
    return Stats(
        numbers={name: number(name) for name, kind in kinds.items() if kind == "number"},
        categories={name: category(name) for name, kind in kinds.items() if kind == "category"},
        texts={name: text(name) for name in schema.texts},
        images={role: image(role) for role in schema.images},
        masks={name: mask(name) for name in schema.masks},
    )
