"""The fingerprint of a store: what normalisation and a first look need to know of its train split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import sqrt
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mmfm_jax.data.store.foreground import otsu
from mmfm_jax.data.store.masks import MaskSummary
from mmfm_jax.data.study import Image, Schema, Study

PERCENTILES = (0.0, 0.5, 1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0, 99.5, 100.0)
_SAMPLED_VOLUMES = 2048
_SAMPLED_VOXELS = 4096


Number = Annotated[int, Field(ge=0, le=10**18)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NumberColumn(_Frozen):
    """Of the values present, in the column's unit; an empty column has mean 0 and sd 1."""

    mean: float
    sd: float
    low: float
    high: float
    missing: Number


class CategoryColumn(_Frozen):
    counts: dict[str, Number]
    missing: Number


class TextField(_Frozen):
    studies: Number
    """Studies that have the field."""
    texts: Number
    words_mean: float
    words_max: Number


class ImageRole(_Frozen):
    volumes: Number
    percentiles: dict[str, float]
    """Of intensity, from an even sample of voxels of an even sample of volumes."""
    spacing_mm_median: tuple[float, float, float]
    """z y x."""
    shape_median: tuple[float, float, float]
    """Voxels z y x."""
    spacing_mm_min: tuple[float, float, float] | None = None
    """The finest along each of z y x, of all volumes."""
    foreground_above: float | None = None
    """Intensity that parts the same voxels best in two (Otsu's threshold)."""


class MaskVoxels(_Frozen):
    """By class name, background left out."""

    masks: Number
    volumes: dict[str, Number]
    """Masks that hold a voxel of the class."""
    voxels: dict[str, Number]


class Stats(_Frozen):
    """`stats.json`: measured on the train split alone, so nothing of a held-out patient enters a model."""

    numbers: dict[str, NumberColumn]
    categories: dict[str, CategoryColumn]
    texts: dict[str, TextField]
    images: dict[str, ImageRole]
    masks: dict[str, MaskVoxels] = {}

    def check(self, schema: Schema) -> None:
        """Raises ValueError unless it is of what a schema declares, and in whole."""
        numbers = {name for name, column in schema.columns.items() if column.kind == "number"}
        held = [self.numbers, self.categories, self.texts, self.images, self.masks]
        declared = [numbers, schema.columns.keys() - numbers, schema.texts, schema.images, schema.masks]
        if any(set(ours) != set(theirs) for ours, theirs in zip(held, declared)):
            raise ValueError("it is of other parts than the store declares")
        percentiles = {f"{p:g}" for p in PERCENTILES}
        if any(set(role.percentiles) not in (set(), percentiles) for role in self.images.values()):
            raise ValueError("it lacks percentiles of images")
        classes = [(of, set(schema.masks[name].classes)) for name, of in self.masks.items()]
        if any(set(of.volumes) != names or set(of.voxels) != names for of, names in classes):
            raise ValueError("it is of other classes of masks than the store declares")
        if any(set(of.counts) != set(schema.columns[name].vocabulary) for name, of in self.categories.items()):
            raise ValueError("it is of other words than the store declares")


class StatsBuilder:
    """Gathers `Stats` from training studies one at a time, in memory that does not grow with their number."""

    def __init__(self, schema: Schema):
        self._studies = 0
        self._numbers = {name: _Moments() for name, column in schema.columns.items() if column.kind == "number"}
        self._categories = {
            name: Counter(dict.fromkeys(column.vocabulary, 0))
            for name, column in schema.columns.items()
            if column.kind == "category"
        }
        self._texts = {name: _Words() for name in schema.texts}
        self._images = {role: _Intensities() for role in schema.images}
        self._masks = {name: _Classes(spec.classes) for name, spec in schema.masks.items()}

    def add(self, study: Study, masks: Mapping[str, MaskSummary] | None = None) -> None:
        """`masks`: summaries of the study's masks."""
        self._studies += 1
        for name, moments in self._numbers.items():
            if name in study.row:
                moments.add(float(study.row[name]))
        for name, counts in self._categories.items():
            if name in study.row:
                counts[str(study.row[name])] += 1
        for name, words in self._texts.items():
            if study.texts.get(name):
                words.add(study.texts[name])
        for role, intensities in self._images.items():
            if role in study.images:
                intensities.add(study.images[role])
        for name, mask in (masks or {}).items():
            self._masks[name].add(mask.voxels)

    def build(self) -> Stats:
        n = self._studies
        categories = {
            name: CategoryColumn(counts=dict(c), missing=n - c.total()) for name, c in self._categories.items()
        }
        return Stats(
            numbers={name: moments.build(n) for name, moments in self._numbers.items()},
            categories=categories,
            texts={name: words.build() for name, words in self._texts.items()},
            images={role: intensities.build() for role, intensities in self._images.items()},
            masks={name: classes.build() for name, classes in self._masks.items()},
        )


class _Moments:
    """Running mean and variance (Welford 1962)."""

    def __init__(self):
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        self.low, self.high = float("inf"), float("-inf")

    def add(self, value: float) -> None:
        self.count += 1
        delta = value - self.mean
        self.mean += delta / self.count
        self.squares += delta * (value - self.mean)
        self.low, self.high = min(self.low, value), max(self.high, value)

    def build(self, studies: int) -> NumberColumn:
        if not self.count:
            return NumberColumn(mean=0.0, sd=1.0, low=0.0, high=0.0, missing=studies)
        sd = sqrt(self.squares / self.count)
        return NumberColumn(mean=self.mean, sd=sd, low=self.low, high=self.high, missing=studies - self.count)


class _Words:
    def __init__(self):
        self.studies, self.texts, self.words, self.longest = 0, 0, 0, 0

    def add(self, texts: tuple[str, ...]) -> None:
        self.studies += 1
        for text in texts:
            length = len(text.split())
            self.texts, self.words, self.longest = self.texts + 1, self.words + length, max(self.longest, length)

    def build(self) -> TextField:
        mean = self.words / max(1, self.texts)
        return TextField(studies=self.studies, texts=self.texts, words_mean=mean, words_max=self.longest)


class _Classes:
    def __init__(self, names: tuple[str, ...]):
        self.names, self.masks = names, 0
        self.volumes, self.voxels = (np.zeros(len(names), np.int64) for _ in range(2))

    def add(self, voxels: np.ndarray) -> None:
        self.masks += 1
        self.volumes += voxels > 0
        self.voxels += voxels

    def build(self) -> MaskVoxels:
        volumes, voxels = (dict(zip(self.names, held.tolist())) for held in (self.volumes, self.voxels))
        return MaskVoxels(masks=self.masks, volumes=volumes, voxels=voxels)


class _Intensities:
    """An even sample of volumes: every `stride`-th, where the stride doubles whenever the sample is full."""

    def __init__(self):
        self.volumes, self.stride = 0, 1
        self.voxels: list[np.ndarray] = []
        self.geometry: list[tuple[float, ...]] = []
        self.finest: tuple[float, float, float] | None = None

    def add(self, image: Image) -> None:
        if self.volumes % self.stride == 0:
            if len(self.voxels) == _SAMPLED_VOLUMES:
                self.voxels, self.geometry = self.voxels[::2], self.geometry[::2]
                self.stride *= 2
            if self.volumes % self.stride == 0:
                flat = image.voxels.reshape(-1)
                at = np.linspace(0, flat.size - 1, min(flat.size, _SAMPLED_VOXELS)).astype(np.int64)
                self.voxels.append(flat[at])
                self.geometry.append((*image.spacing_mm, *image.voxels.shape[:3]))
        z, y, x = map(min, image.spacing_mm, self.finest or image.spacing_mm)
        self.finest = z, y, x
        self.volumes += 1

    def build(self) -> ImageRole:
        if not self.voxels:
            return ImageRole(volumes=0, percentiles={}, spacing_mm_median=(1, 1, 1), shape_median=(0, 0, 0))
        flat = np.concatenate(self.voxels).astype(np.float64)
        z, y, x, *shape = (float(v) for v in np.median(np.asarray(self.geometry), axis=0))
        return ImageRole(
            volumes=self.volumes,
            percentiles={f"{p:g}": float(v) for p, v in zip(PERCENTILES, np.percentile(flat, PERCENTILES))},
            spacing_mm_median=(z, y, x),
            shape_median=(shape[0], shape[1], shape[2]),
            spacing_mm_min=self.finest,
            foreground_above=otsu(flat),
        )
