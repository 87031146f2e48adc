"""Images of unequal size as rows of patches (NaViT, arXiv:2307.06304), on the host.

An image is cut into patches. Those at its border that hold nothing may be left out, and where the studies of a row have
more patches than the row has room for, the largest images lose their outermost layers until all fit. A patch that stays
keeps its content and its place in millimetres, so leaving some out changes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Shaped

from mmfm_jax.data.parts import ImageShape, PackedPart, PackedShape

Grid = tuple[int, ...]  # patches along z y x


def extent(held: Sequence[int], shape: ImageShape) -> tuple[int, int, int]:
    """Voxels z y x of the crop of a volume of `held` voxels: whole patches, at most `shape.size`."""
    z, y, x = (min(-(-h // p) * p, s) for h, p, s in zip(held, shape.patch, shape.size))
    return z, y, x


def cut(
    voxels: Shaped[np.ndarray, "z y x channel"],
    spacing_mm: Sequence[float],
    shape: ImageShape,
    trim: bool,
    limits: tuple[float, float] | None = None,
) -> PackedPart:
    """One crop as a grid of patches, its arrays [z, y, x, ...] over patches; with `trim` without empty borders.

    `limits`: raw values that map to 0 and 1 of a volume that has its own.
    """
    p, q, r = shape.patch
    patches = rearrange(voxels, "(z p) (y q) (x r) c -> z y x (p q r c)", p=p, q=q, r=r)
    index = np.stack(np.meshgrid(*map(np.arange, patches.shape[:3]), indexing="ij"), axis=-1)
    centres = (index + 0.5) * shape.patch - np.array(voxels.shape[:3]) / 2
    whole = PackedPart(
        patches,
        (centres * np.asarray(spacing_mm)).astype(np.float32),
        np.ones(patches.shape[:3], np.int32),
        np.asarray(True),
        None if limits is None else np.array(limits, np.float32),
    )
    return _boxed(whole, _filled(np.any(patches > shape.low(limits), axis=-1))) if trim else whole


def nothing(shape: ImageShape, dtype: str) -> PackedPart:
    """The grid of an image that is not there: of no patch."""
    return PackedPart(
        np.zeros((0, 0, 0, shape.raw_voxels_of_patch), dtype),
        np.zeros((0, 0, 0, 3), np.float32),
        np.zeros((0, 0, 0), np.int32),
        np.asarray(False),
        None if shape.normalise is None else np.zeros(2, np.float32),
    )


def fit(grids: Sequence[Grid], tokens: int) -> list[Grid]:
    """The grids, shrunk until they have at most `tokens` patches together: the largest loses a layer along its longest
    axis, again and again, so small ones stay whole. Needs a token for each grid."""
    grids = list(grids)
    sizes = [int(np.prod(grid)) for grid in grids]
    while sum(sizes) > tokens:
        largest = int(np.argmax(sizes))
        grid = list(grids[largest])
        grid[int(np.argmax(grid))] -= 1
        grids[largest] = tuple(grid)
        sizes[largest] = int(np.prod(grid))
    return grids


def room(
    studies: int, pack: PackedShape, voxels: int, limited: bool, dtype: np.typing.DTypeLike, allocate: Callable
) -> PackedPart:
    """For so many studies of patches of `voxels`, arrays of `allocate(shape, dtype)`; what stands there is not set.

    `limited`: whether volumes have windows of their own.
    """
    rows = studies // pack.studies
    return PackedPart(
        allocate((rows, pack.tokens, voxels), dtype),
        allocate((rows, pack.tokens, 3), np.float32),
        allocate((rows, pack.tokens), np.int32),
        allocate((studies,), bool),
        allocate((studies, 2), np.float32) if limited else None,
    )


def pack(parts: Sequence[PackedPart], studies: int, tokens: int, out: PackedPart | None = None) -> PackedPart:
    """Grids of patches as rows of `studies` studies and `tokens` tokens; those that do not fit lose their borders.

    Written into `out`, and that returned, where it is given.
    """
    first = np.asarray(parts[0].patches)
    shape = PackedShape(studies=studies, tokens=tokens)
    out = out or room(len(parts), shape, first.shape[-1], parts[0].limits is not None, first.dtype, np.empty)
    assert out.segment is not None
    out.present[:] = [bool(part.present) for part in parts]
    if out.limits is not None:
        out.limits[:] = [part.limits for part in parts]
    for i, row in enumerate(zip(out.patches, out.centres_mm, out.segment)):
        _row(parts[i * studies : (i + 1) * studies], *row)
    return out


def volume(part: PackedPart, shape: ImageShape) -> Shaped[np.ndarray, "z y x channel"]:
    """The voxels of a grid of patches: what `cut` was given, less what it trimmed."""
    p, q, r = shape.patch
    return rearrange(np.asarray(part.patches), "z y x (p q r c) -> (z p) (y q) (x r) c", p=p, q=q, r=r)


def _row(parts: Sequence[PackedPart], patches: np.ndarray, centres: np.ndarray, segment: np.ndarray) -> None:
    grids, at = [part.patches.shape[:3] for part in parts], 0
    for place, (part, held, grid) in enumerate(zip(parts, grids, fit(grids, len(patches))), start=1):
        box = tuple(slice((h - g) // 2, (h - g) // 2 + g) for h, g in zip(held, grid))
        kept, end = _boxed(part, box), at + int(np.prod(grid))
        patches[at:end] = np.asarray(kept.patches).reshape(end - at, patches.shape[-1])
        centres[at:end] = np.asarray(kept.centres_mm).reshape(end - at, 3)
        segment[at:end] = place
        at = end
    patches[at:], centres[at:], segment[at:] = 0, 0, 0


def _boxed(part: PackedPart, box: tuple[slice, ...]) -> PackedPart:
    assert part.segment is not None
    return PackedPart(part.patches[box], part.centres_mm[box], part.segment[box], part.present, part.limits)


def _filled(full: Any) -> tuple[slice, ...]:
    """The smallest box that holds every patch marked in `full` [z, y, x]; the middle patch where none is."""
    if not full.any():
        return tuple(slice(n // 2, n // 2 + 1) for n in full.shape)
    along = [np.flatnonzero(full.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return tuple(slice(int(at[0]), int(at[-1]) + 1) for at in along)
