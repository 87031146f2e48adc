"""Numbers that anyone may take of an image, in millimetres, without learning: baselines of what a model sees in it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Float, Num

SHAPE = (
    "log_volume_mm3",
    "log_sum_mm3",
    "log_surface_mm2",
    "log_variation_mm2",
    "log_extent_z_mm",
    "log_extent_y_mm",
    "log_extent_x_mm",
    "sphericity",
    "disagreement",
    "middle_to_long",
    "short_to_long",
    "fill",
    "largest_compactness",
    "mean_compactness",
)
INTENSITY = (
    "log_volume_mm3",
    "log_extent_z_mm",
    "log_extent_y_mm",
    "log_extent_x_mm",
    "log_long_mm",
    "log_middle_mm",
    "log_short_mm",
    "mean",
    "sd",
    "skewness",
    "percentile_5",
    "percentile_25",
    "median",
    "percentile_75",
    "percentile_95",
    "mean_difference",
)
OUTLINE_SHARE = 0.2
"""Of the voxels above 0 of an outline, how many hold the full value at least."""


def outline_scale(images: Iterable[Num[np.ndarray, "..."]]) -> float | None:
    """The value of a voxel that wholly belongs to what is outlined, where images show outlines; None for intensities.

    Images show outlines (masks, shares of readers, with partial volume or without) where nothing lies below 0 and
    OUTLINE_SHARE of all voxels above 0 hold one value, the highest. Intensities reach their highest value seldom.
    """
    highest, full, above = 0.0, 0, 0
    for image in images:
        if image.min() < 0:
            return None
        if image.max() > highest:
            highest, full = float(image.max()), 0
        full += int((image == highest).sum())
        above += int((image > 0).sum())
    return highest if above and full >= OUTLINE_SHARE * above else None


def shape_numbers(share: Float[np.ndarray, "z y x"], spacing_mm: tuple[float, float, float]) -> Float[np.ndarray, "14"]:
    """SHAPE of an outline: `share` is how far a voxel belongs to it, 0 to 1, and the outline is where it is a half.

    - volume and sum: of the outline, and of the shares, mm3; surface: faces between voxels, mm2 (of a ball 1.5 times
      its own); variation: absolute differences of shares over faces, mm2; extents of the bounding box;
    - sphericity: surface of the ball of that volume to the surface (Wadell 1935); disagreement: of the voxels above 0,
      the share below 1; ratios of the eigenvalues of the second moments of the shares; fill of the bounding box;
    - compactness: perimeter squared over area of a slice, the largest and the mean over slices.

    Padding by 0 changes nothing. What is of the outline is NaN where no share is a half, all where none is above 0.
    """
    if not (share > 0).any():
        return np.full(len(SHAPE), np.nan)
    share = np.pad(share[bounding_box(share > 0)].astype(np.float64), 1)
    spacing = np.asarray(spacing_mm, float)
    voxel = spacing.prod()
    inside = share >= 0.5
    faces = [voxel / step * np.abs(np.diff(inside.astype(np.int8), axis=axis)) for axis, step in enumerate(spacing)]
    variation = sum(voxel / step * np.abs(np.diff(share, axis=axis)).sum() for axis, step in enumerate(spacing))
    present = share[share > 0]
    long, middle, short = principal_variances(share, spacing)
    of_shares = {
        "log_sum_mm3": np.log(present.sum() * voxel),
        "log_variation_mm2": np.log(variation),
        "disagreement": (present < 1).mean(),
        "middle_to_long": middle / long,
        "short_to_long": short / long,
    }
    return np.array([(of_shares | _outline_numbers(inside, faces, spacing)).get(name, np.nan) for name in SHAPE])


def _outline_numbers(
    inside: Bool[np.ndarray, "z y x"], faces: list[Float[np.ndarray, "..."]], spacing: Float[np.ndarray, "3"]
) -> dict[str, float]:
    if not inside.any():
        return {}
    volume, surface = inside.sum() * spacing.prod(), sum(of.sum() for of in faces)
    extents = np.array(inside[bounding_box(inside)].shape) * spacing
    area = inside.sum(axis=(1, 2)) * spacing[1] * spacing[2]
    perimeter = (faces[1].sum(axis=(1, 2)) + faces[2].sum(axis=(1, 2))) / spacing[0]
    compactness = perimeter[area > 0] ** 2 / area[area > 0]
    return {
        "log_volume_mm3": np.log(volume),
        "log_surface_mm2": np.log(surface),
        **{f"log_extent_{axis}_mm": np.log(extent) for axis, extent in zip("zyx", extents)},
        "sphericity": np.pi ** (1 / 3) * (6 * volume) ** (2 / 3) / surface,
        "fill": volume / extents.prod(),
        "largest_compactness": compactness.max(),
        "mean_compactness": compactness.mean(),
    }


def intensity_numbers(
    voxels: Num[np.ndarray, "z y x"], spacing_mm: tuple[float, float, float]
) -> Float[np.ndarray, "16"]:
    """INTENSITY of any image, of its content: what lies above its lowest value, which is where it is empty or padded.

    Volume and extents of the content; its size along its three principal axes, weighted by how far it lies above the
    lowest value; statistics of its values; the mean absolute difference of neighbours. All NaN of one value.
    """
    content = voxels > voxels.min()
    if not content.any():
        return np.full(len(INTENSITY), np.nan)
    box = bounding_box(content)
    x, content, spacing = voxels[box].astype(np.float64), content[box], np.asarray(spacing_mm, float)
    held = x[content]
    mean, sd = held.mean(), held.std()
    neighbours = [
        (np.abs(np.diff(x, axis=axis)), np.minimum(*(np.take(content, range(a, n + a - 1), axis) for a in (0, 1))))
        for axis, n in enumerate(x.shape)
    ]
    pairs = sum(int(both.sum()) for _, both in neighbours)
    difference = sum(gap[both].sum() for gap, both in neighbours) / max(pairs, 1)
    variances = principal_variances(np.where(content, x - float(voxels.min()), 0), spacing)
    return np.array(
        [
            np.log(len(held) * spacing.prod()),
            *np.log(np.array(x.shape) * spacing),
            *np.log(variances) / 2,
            mean,
            sd,
            ((held - mean) ** 3).mean() / sd**3 if sd > 0 else 0,
            *np.percentile(held, [5, 25, 50, 75, 95]),
            difference,
        ]
    )


def bounding_box(held: Bool[np.ndarray, "z y x"]) -> tuple[slice, slice, slice]:
    """The smallest box around what is held, which is something."""
    z, y, x = (np.flatnonzero(held.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3))
    return slice(z[0], z[-1] + 1), slice(y[0], y[-1] + 1), slice(x[0], x[-1] + 1)


def principal_variances(weight: Float[np.ndarray, "z y x"], spacing: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3"]:
    """Eigenvalues of the second central moments of a density, mm2, the largest first; a voxel is a box, not a point."""
    total = weight.sum()
    sums = {axes: weight.sum(axis=tuple({0, 1, 2} - set(axes))) / total for axes in ((0, 1), (0, 2), (1, 2))}
    places = [np.arange(n) * step for n, step in zip(weight.shape, spacing)]
    alone = [sums[0, 1].sum(1), sums[0, 1].sum(0), sums[0, 2].sum(0)]
    centred = [place - place @ of for place, of in zip(places, alone)]
    moments = np.diag([of @ place**2 for place, of in zip(centred, alone)] + spacing**2 / 12)
    for (a, b), of in sums.items():
        moments[a, b] = moments[b, a] = centred[a] @ of @ centred[b]
    return np.linalg.eigvalsh(moments)[::-1]
