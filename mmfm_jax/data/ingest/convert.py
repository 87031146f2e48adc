"""What a worker does with files: looks at one, turns a series into voxels for the store, cleans texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmfm_jax.data.deid import presidio
from mmfm_jax.data.deid.scrub import scrub
from mmfm_jax.data.deid.sections import section
from mmfm_jax.data.geometry import for_store, mask_for_store
from mmfm_jax.data.ingest.dataset import ImageRole
from mmfm_jax.data.readers import DICOM, kind_of, read_volume
from mmfm_jax.data.readers.dicom import Header, read_header
from mmfm_jax.data.readers.legend import Legend
from mmfm_jax.data.readers.masks import MaskSource, read_mask
from mmfm_jax.data.refuse import Refused
from mmfm_jax.data.study import Image
from mmfm_jax.files import written


@dataclass(frozen=True)
class Look:
    """A file to look at."""

    path: Path
    tags: tuple[str, ...]
    voxel_limit: int


def look(task: Look) -> tuple[str, Header | None]:
    """The kind of a file and, of DICOM, its header. Raises Refused."""
    kind = kind_of(task.path)
    if kind != DICOM:
        return kind, None
    header = read_header(task.path, task.tags)
    if header.voxels > task.voxel_limit:
        raise Refused("too_large", f"its header announces {header.voxels:,} voxels")
    return kind, header


@dataclass(frozen=True)
class MaskOf:
    """A mask to bring onto the voxels of its image."""

    name: str
    files: tuple[MaskSource, ...]
    legend: Legend


@dataclass(frozen=True)
class Conversion:
    """A series to turn into an image of a role, with its masks."""

    kind: str
    paths: tuple[Path, ...]
    role: ImageRole
    out: Path
    """Where the voxels go, without suffix."""
    voxel_limit: int
    masks: tuple[MaskOf, ...] = ()
    refused: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Reason and detail of masks that are refused already."""


def convert(task: Conversion) -> None:
    """Writes `OUT.npy` [z, y, x, channel], `OUT.MASK.npy` [z, y, x] and `OUT.json`; the first last: it makes the set.

    Raises Refused. A mask that is refused is left out, with the reason in `OUT.json`.
    """
    role = task.role
    frames_as_channels = role.channels > 1 or role.frame is not None
    slice_mm = role.unknown_spacing_mm[0] if role.unknown_spacing_mm else 0.0
    volume = read_volume(task.kind, task.paths, task.voxel_limit, frames_as_channels, slice_mm)
    voxels, spacing_mm = for_store(
        volume,
        dtype=role.dtype,
        channels=role.channels,
        frame=role.frame,
        spacing_mm=role.spacing_mm,
        shape=role.shape,
        unknown_spacing_mm=role.unknown_spacing_mm,
    )
    refused, taken = dict(task.refused), []
    for mask in task.masks:
        try:
            on_image = read_mask(mask.files, volume, mask.legend, task.voxel_limit)
            on_image = mask_for_store(
                on_image, volume, spacing_mm=role.spacing_mm, unknown_spacing_mm=role.unknown_spacing_mm
            )
        except Refused as why:
            refused[mask.name] = (why.reason, why.detail)
            continue
        _put(_of_mask(task.out, mask.name), lambda file, held=on_image: np.save(file, held, allow_pickle=False))
        taken.append(mask.name)
    kept = {"spacing_mm": spacing_mm, "masks": taken, "refused": refused}
    _put(task.out.with_suffix(".json"), lambda file: file.write(json.dumps(kept).encode()))
    _put(task.out.with_suffix(".npy"), lambda file: np.save(file, voxels, allow_pickle=False))


def _of_mask(out: Path, name: str) -> Path:
    return out.with_suffix(f".{name}.npy")


def _put(path: Path, write: Callable[[Any], object]) -> None:
    with written(path) as file:
        write(file)


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote, its voxels mapped and not read."""

    image: Image
    masks: dict[str, np.ndarray]
    refused: dict[str, Refused]


def converted(out: Path) -> Converted | None:
    """None when it is not there or not whole."""
    try:
        kept = json.loads(out.with_suffix(".json").read_bytes())
        z_mm, y_mm, x_mm = kept["spacing_mm"]
        image, *masks = (
            np.load(path, mmap_mode="r", allow_pickle=False)
            for path in (out.with_suffix(".npy"), *(_of_mask(out, name) for name in kept["masks"]))
        )
    except (OSError, ValueError):
        return None
    refused = {name: Refused(*why) for name, why in kept["refused"].items()}
    return Converted(Image(image, (z_mm, y_mm, x_mm)), dict(zip(kept["masks"], masks)), refused)


@dataclass(frozen=True)
class Cleaning:
    """Texts of one patient's study to clean."""

    texts: tuple[str, ...]
    section: str
    scrub: bool
    presidio: str
    """As the description says."""
    known: frozenset[str]


def clean(tasks: Sequence[Cleaning]) -> list[list[str | Refused]]:
    """The texts of each task, cut to their section and scrubbed."""
    return [[_cleaned(text, task) for text in task.texts] for task in tasks]


def _cleaned(text: str, task: Cleaning) -> str | Refused:
    if task.section:
        found = section(text, task.section)
        if found is None:
            return Refused("no_section", "it has no such heading, or nothing under it")
        text = found
    found = presidio.loaded(task.presidio).find(text) if task.presidio else set()
    text = scrub(text, task.known | found) if task.scrub else text
    return text.strip() or Refused("empty", "it is an empty text")
