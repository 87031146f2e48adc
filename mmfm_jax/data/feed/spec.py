"""What a model for given inputs and a given store is built for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mmfm_jax.config.inputs import ImageInput, Inputs, Window
from mmfm_jax.data.feed import resample
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.parts import ImageShape, InputSpec, NumberStats, PackedShape
from mmfm_jax.data.store.stats import Stats
from mmfm_jax.data.study import Schema
from mmfm_jax.errors import UserError


def make_spec(
    inputs: Inputs,
    schema: Schema,
    stats: Stats,
    tokenizer: Tokenizer,
    windows: Mapping[str, tuple[Window | tuple[Window, ...], ...]] | None = None,
) -> InputSpec:
    """What a model for `inputs` is built for. Raises UserError that names an input which the store lacks.

    Every label of the store is in it, whether a task uses it or not. `windows`: of each store of a mix, by role, where
    they differ.
    """
    _check_held("images", inputs.images, schema.images)
    _check_held("texts", inputs.texts, schema.texts)
    _check_held("columns", inputs.columns, schema.columns)
    columns = {name: schema.columns[name] for name in inputs.columns}
    return InputSpec(
        images={
            role: ImageShape(
                size=image.size,
                patch=image.patch,
                channels=_channels(role, image, schema.images[role].channels),
                window=image.window,
                normalise=image.own_window,
                windows=(windows or {}).get(role, ()),
                spacing_mm=image.spacing_mm,
                read=image.spacing_mm and _raw_extent(role, image, stats),
                pack=image.pack and PackedShape(studies=image.pack.studies, tokens=image.pack.tokens),
            )
            for role, image in inputs.images.items()
        },
        texts={field: text.length for field, text in inputs.texts.items()},
        readings={field: text.readings for field, text in inputs.texts.items() if text.readings > 1},
        excerpts=tuple(field for field, text in inputs.texts.items() if text.excerpt is not None),
        vocabulary_size=tokenizer.vocabulary_size,
        mask_token=tokenizer.mask_token,
        # A column that never varies has sd 0; it is then only centred.
        numbers={
            name: NumberStats(mean=stats.numbers[name].mean, sd=stats.numbers[name].sd or 1.0)
            for name, column in columns.items()
            if column.kind == "number"
        },
        categories={name: column.vocabulary for name, column in columns.items() if column.kind == "category"},
        labels={name: label.classes for name, label in schema.labels.items()},
        label_texts={name: label.from_text for name, label in schema.labels.items() if label.from_text},
    )


def _channels(role: str, image: ImageInput, held: int) -> int:
    """Of the model's voxels. Raises UserError where one window would be of several channels."""
    if image.windows:
        return held * len(image.windows)
    if held > 1:
        raise UserError(
            f"inputs.images.{role}.normalise: images of {role} have {held} channels, and the store samples intensities "
            "of the largest alone; give a window, or store each channel as a role of its own"
        )
    return held


def _raw_extent(role: str, image: ImageInput, stats: Stats) -> tuple[int, int, int]:
    """Of the finest training image, the voxels from which a crop of the target spacing is made."""
    finest = stats.images[role].spacing_mm_min
    if image.spacing_mm is None or finest is None:
        raise UserError(
            f"inputs.images.{role}.spacing_mm: the store does not say how fine its finest image of {role} is, as it "
            "was written by an earlier release or holds none for training; build it anew, or leave spacing_mm out"
        )
    return resample.extent(image.size, image.spacing_mm, finest)


def _check_held(kind: str, wanted: Iterable[str], held: dict[str, Any]) -> None:
    for name in wanted:
        if name not in held:
            raise UserError(
                f"inputs.{kind}: the store has no {name}; it has {', '.join(held) or 'none'} "
                "(`mmfm inspect STORE` describes them)"
            )
