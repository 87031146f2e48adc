"""`data`: where studies come from and how they are read."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from mmfm_jax.config.base import (
    ZYX,
    Bytes,
    Config,
    Count,
    Fraction,
    NotNegative,
    PositiveFloat,
    PositiveInt,
    Probability,
)
from mmfm_jax.config.inputs import Foreground, ImageInput, Window, check_windows


def _absolute(place: str) -> str:
    return place if not place or "://" in place else os.path.abspath(os.path.expanduser(place))


Place = Annotated[str, AfterValidator(_absolute)]
"""A path, made absolute so that a run holds what it was started with wherever it goes on; a URL stays as it is."""


class Augment(Config):
    """Random changes to training images, made on the device inside the jitted step."""

    flip: Probability | Annotated[tuple[Probability, Probability, Probability], ZYX] = 0.0
    """Chance of a mirror image along z, y and x (foot to head, back to front, left to right, as voxels lie in RAS); a
    number is that of each. A task that aligns images with texts takes none unless `flip_with_text` is set."""
    flip_with_text: bool = False
    """Says that no text names left or right, upper or lower, front or back."""
    shift_mm: NotNegative = 0.0
    """Largest shift along each axis, in millimetres."""
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation about each axis."""
    intensity: Probability = 0.0
    """Largest relative change of contrast, and largest shift of brightness, of the windowed image."""

    @property
    def swapped(self) -> tuple[str, ...]:
        """What mirror images swap."""
        chances = self.flip if isinstance(self.flip, tuple) else (self.flip,) * 3
        ends = ("head and foot", "front and back", "left and right")
        return tuple(names for chance, names in zip(chances, ends) if chance)


class ImageOptions(Config):
    """What is otherwise for the images of one store of a mix; what is not given is as in `inputs.images`."""

    window: Window | tuple[Window, ...] | None = None
    """Raw values that map to 0 and 1."""
    crop: Literal["centre", "random"] | None = None
    """Where training crops are taken."""
    foreground: Foreground | None = None
    """What a share of the random crops is centred on."""

    @model_validator(mode="after")
    def _window_is_one(self):
        if self.window is not None:
            check_windows(self.window)
        return self


def changed_image(image: ImageInput, options: ImageOptions | None) -> ImageInput:
    """How an image enters the model from a store with options of its own."""
    given = {name: value for name in ImageOptions.model_fields if (value := getattr(options, name, None)) is not None}
    return image.model_copy(update=given)


class MixedStore(Config):
    """One of several stores that training draws from."""

    store: Place
    """A StudyStore: a folder or a TensorStore URL."""
    weight: PositiveFloat = 1.0
    """Studies drawn from it, relative to the other stores; every stretch of the order keeps the proportion."""
    augment: Augment | None = None
    """In place of `data.augment`."""
    images: dict[str, ImageOptions] = {}
    """By role."""


class DataConfig(Config):
    """Where studies come from and how they are read."""

    store: Place = ""
    """A StudyStore: a folder, from the working directory on, or a TensorStore URL (file:// gs:// s3:// memory://)."""
    mix: dict[str, MixedStore] = {}
    """Several stores by a name of yours, in place of `store`. A part that one of them lacks is missing there."""
    vocabulary_size: PositiveInt = 4096
    """Entries of the tokenizer trained on the store's training texts."""
    train_share: Fraction = 1.0
    """Share of the training patients, by a hash of each, so that a smaller share is part of a larger: the model, the
    tokenizer and an evaluation's probes learn from it. Means and deviations of columns stay those of all of them."""
    tokenizer: Place | None = None
    """A Hugging Face tokenizer.json to use instead of training one."""
    augment: Augment = Augment()
    """Random changes of training images."""
    reader_threads: PositiveInt = 8
    """Threads that read and crop studies ahead of the step; they change the speed, never the batches."""
    workers: Count = 0
    """Processes that read studies, with those threads shared out; 0 reads in this one. For studies that one
    process of Python cannot read fast enough, such as films: each takes some 150 MB, `cache_bytes` and two batches.
    They change the speed, never the batches."""
    prefetch_batches: PositiveInt = 4
    """Batches held ready on the host."""
    max_damaged: Count = 8
    """Images that a process may find damaged before it stops: training goes on without such an image, the study's other
    parts stay, and its row is told. 0 stops at the first. An evaluation always stops."""
    cache_bytes: Bytes = 128 * 2**20
    """Memory for chunks and shard indices that a process keeps, of all its stores together. Crops at random places of
    many volumes seldom meet a chunk again, so more of it helps where the volumes are few."""

    @model_validator(mode="after")
    def _store_or_mix(self):
        if bool(self.store) == bool(self.mix):
            raise ValueError("give either `store` or, for several stores, `mix`")
        return self

    @property
    def places(self) -> tuple[str, ...]:
        """Where the studies are, store by store."""
        return tuple(self.mix[name].store for name in sorted(self.mix)) or (self.store,)

    @property
    def augments(self) -> tuple[Augment, ...]:
        """Of each store, in the order of names; one where there is one store."""
        return tuple(self.mix[name].augment or self.augment for name in sorted(self.mix)) or (self.augment,)
