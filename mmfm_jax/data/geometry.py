"""Where voxels are: affines in RAS millimetres, and volumes turned, resampled and typed for a store.

The world is that of NIfTI and nibabel: x to the patient's right, y to the front, z to the head (RAS), in mm. DICOM and
ITK count x to the left and y to the back (LPS).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmfm_jax.data.refuse import Refused

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
OFF_GRID = 0.1
"""Voxels by which a mask may be off its image's grid: files round positions."""
_RIGHT_ANGLE = 0.01
"""Cosine between two axes above which a grid counts as sheared: 0.6 degrees."""


@dataclass(frozen=True)
class Volume:
    """An image as its file holds it."""

    voxels: np.ndarray
    """[k, j, i, channel], values in their unit (HU, counts), any real dtype."""
    affine: np.ndarray | None
    """float64 [4, 4], from (i, j, k, 1) to RAS mm; None when the file does not say where its pixels are."""
    pixel_mm: tuple[float, float, float] | None = None
    """Along k, j, i, for a file that says only how far apart its pixels are, such as a radiograph."""

    @property
    def spacing_mm(self) -> tuple[float, float, float] | None:
        """Along k, j, i."""
        if self.affine is None:
            return self.pixel_mm
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return k, j, i


def to_ras(volume: Volume) -> Volume:
    """Axes put in the order z, y, x and turned so that indices grow to S, A, R, as nearly as the grid allows.

    Only whole axes move, so no value changes. An image that does not say where it is keeps its rows and columns.
    """
    if volume.affine is None:
        return volume
    axes, flips = nearest_axes(volume.affine)
    voxels, affine = volume.voxels, volume.affine.copy()
    for axis in range(3):  # of the file: i, j, k
        if flips[axis]:
            last = voxels.shape[2 - axis] - 1
            affine[:3, 3] += affine[:3, axis] * last
            affine[:3, axis] *= -1
            voxels = np.flip(voxels, 2 - axis)
    order = [axes.index(world) for world in range(3)]  # the file's axis for R, A, S
    affine[:3, :3] = affine[:3, :3][:, order]
    voxels = voxels.transpose([2 - order[2], 2 - order[1], 2 - order[0], 3])
    return Volume(np.ascontiguousarray(voxels), affine)


def nearest_axes(affine: np.ndarray) -> tuple[list[int], list[bool]]:
    """For each axis i, j, k of a grid the nearest world axis (0 R, 1 A, 2 S), and whether it runs against that.

    Pairs are taken from the largest cosine down, so every world axis is given once.
    """
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    left = np.abs(cosines)
    axes, flips = [0, 0, 0], [False] * 3
    for _ in range(3):
        world, axis = np.unravel_index(int(left.argmax()), left.shape)
        axes[axis], flips[axis] = int(world), bool(cosines[world, axis] < 0)
        left[world, :] = left[:, axis] = -1
    return axes, flips


def check_grid(affine: np.ndarray) -> None:
    """Raises Refused unless the grid is finite, not flat and has right angles."""
    linear = affine[:3, :3]
    lengths = np.linalg.norm(linear, axis=0)
    if not np.isfinite(affine).all() or (lengths <= 0).any():
        raise Refused("spacing_unknown", "its grid has no extent along an axis")
    cosines = (linear / lengths).T @ (linear / lengths)
    worst = float(np.abs(cosines - np.eye(3)).max())
    if worst > _RIGHT_ANGLE:
        raise Refused("sheared", f"its axes are {np.degrees(np.arcsin(min(1.0, worst))):.1f} degrees off right angles")


def onto(mask: Volume, image: Volume) -> np.ndarray:
    """Voxels [k, j, i] of a mask of one channel with its axes in the order and direction of its image's.

    Raises Refused unless the grids are the same to a tenth of a voxel.
    """
    if mask.affine is None or image.affine is None:
        if mask.affine is not image.affine or mask.voxels.shape[:3] != image.voxels.shape[:3]:
            raise Refused("off_grid", "it has another shape than its image, or one of them says where it is")
        return mask.voxels[..., 0]
    for one in (mask, image):
        check_grid(one.affine)  # pyright: ignore[reportArgumentType]
    size, space = np.array(mask.voxels.shape[2::-1]), np.array(image.voxels.shape[2::-1])  # along i, j, k
    step = np.linalg.solve(image.affine, mask.affine)  # from the mask's indices to the image's
    whole = np.rint(step[:3])
    corners = np.array([*np.ndindex(2, 2, 2)]) * (size - 1)
    exact, rounded = (corners @ m[:3, :3].T + m[:3, 3] for m in (step, whole))
    turned = np.abs(whole[:, :3])
    if (
        (turned.sum(0) != 1).any()
        or (turned.sum(1) != 1).any()
        or np.abs(exact - rounded).max() > OFF_GRID
        or (rounded.min(0) != 0).any()
        or (rounded.max(0) != space - 1).any()
    ):
        raise Refused("off_grid", "its grid is not that of its image")
    axis_of = turned.argmax(1)  # the mask's axis for each of the image's
    flipped = np.flip(mask.voxels[..., 0], tuple(2 - int(axis_of[a]) for a in range(3) if whole[a, axis_of[a]] < 0))
    return flipped.transpose([2 - axis_of[2], 2 - axis_of[1], 2 - axis_of[0]])


def resample(voxels: np.ndarray, spacing_mm: Sequence[float], target_mm: Sequence[float]) -> np.ndarray:
    """Voxels [z, y, x, channel] on a grid of another spacing about the same centre, float32.

    Linear, axis after axis; where the target is coarser the kernel widens with it, so what is finer than the target is
    averaged and does not alias. Every value is a weighted mean, so none leaves the range of the image. The extent is
    rounded to whole voxels, and beyond the first and last voxel the edge is continued.
    """
    out = voxels.astype(np.float32)
    for axis, (old, new) in enumerate(zip(spacing_mm, target_mm)):
        n = out.shape[axis]
        if n == 1 or np.isclose(old, new, rtol=1e-6):
            continue
        weights = _weights(n, _extent(n, old, new), new / old)
        out = np.moveaxis(np.tensordot(weights, out, axes=(1, axis)), 0, axis)
    return np.ascontiguousarray(out)


def nearest(voxels: np.ndarray, spacing_mm: Sequence[float], target_mm: Sequence[float]) -> np.ndarray:
    """Class numbers [z, y, x] on the grid that `resample` makes, each that of the nearest voxel."""
    for axis, (old, new) in enumerate(zip(spacing_mm, target_mm)):
        n = voxels.shape[axis]
        if n > 1 and not np.isclose(old, new, rtol=1e-6):
            at = np.rint(_places(n, _extent(n, old, new), new / old)).astype(int).clip(0, n - 1)
            voxels = voxels.take(at, axis)
    return voxels


def _extent(n: int, old: float, new: float) -> int:
    """How many voxels of another spacing fill n."""
    return max(1, int(n * old / new + 0.5 + 1e-6))


def _places(n: int, m: int, step: float) -> np.ndarray:
    """Where m new samples, `step` old ones apart, lie among n old ones about a common centre."""
    return (np.arange(m) - (m - 1) / 2) * step + (n - 1) / 2


def _weights(n: int, m: int, step: float) -> np.ndarray:
    """float32 [m, n]: of the n old samples in each of m new ones, `step` old samples apart, about a common centre."""
    at = _places(n, m, step)
    width = max(1.0, step)
    reach = int(np.ceil(width))
    weights = np.zeros((m, n), np.float64)
    for offset in range(-reach, reach + 2):
        old = np.floor(at).astype(int) + offset
        np.add.at(weights, (np.arange(m), old.clip(0, n - 1)), np.maximum(0, 1 - np.abs(old - at) / width))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def to_dtype(voxels: np.ndarray, dtype: str) -> np.ndarray:
    """Voxels in a role's dtype. Raises Refused when values would be lost: out of range, not finite, rounded away."""
    target = np.dtype(dtype)
    if voxels.dtype == target and target.kind != "f":
        return voxels
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise Refused("not_finite", "it holds NaN or infinite voxels")
    if target.kind == "f":
        return voxels.astype(target)
    low, high = float(voxels.min()), float(voxels.max())
    limits = np.iinfo(target)
    if low < limits.min - 0.5 or high > limits.max + 0.5:
        raise Refused("out_of_range", f"its values reach from {low:g} to {high:g} and {dtype} cannot hold them")
    if voxels.dtype.kind != "f":
        return voxels.astype(target)
    rounded = np.rint(voxels)
    if high - low < 100 and not np.allclose(rounded, voxels, atol=1e-3):
        raise Refused(
            "would_round", f"its fractional values reach only from {low:g} to {high:g} and {dtype} rounds them"
        )
    return rounded.clip(limits.min, limits.max).astype(target)


def for_store(
    volume: Volume,
    *,
    dtype: str,
    channels: int,
    frame: int | None = None,
    spacing_mm: Sequence[float] | None = None,
    shape: Sequence[int] | None = None,
    unknown_spacing_mm: Sequence[float] | None = None,
) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Voxels [z, y, x, channel] in RAS order and a role's dtype, and their spacing in mm. Raises Refused."""
    if volume.voxels.size == 0:
        raise Refused("empty", "it has no voxels")
    if frame is not None:
        if frame >= volume.voxels.shape[3]:
            raise Refused("channels", f"it has {volume.voxels.shape[3]} frames and frame {frame} was asked for")
        volume = replace(volume, voxels=volume.voxels[..., frame : frame + 1])
    if volume.voxels.shape[3] != channels:
        raise Refused("channels", f"it has {volume.voxels.shape[3]} channels and the role has {channels}")
    if volume.affine is not None:
        check_grid(volume.affine)
    volume = to_ras(volume)
    native = volume.spacing_mm or unknown_spacing_mm
    if native is None:
        raise Refused("spacing_unknown", "it does not say how far apart its pixels are")
    voxels = volume.voxels
    z_mm, y_mm, x_mm = native
    if spacing_mm is not None:
        whole = voxels.dtype.kind in "iub"
        voxels = resample(voxels, native, spacing_mm)
        z_mm, y_mm, x_mm = (new if n > 1 else old for n, old, new in zip(volume.voxels.shape, native, spacing_mm))
        if whole and np.dtype(dtype).kind in "iu":
            voxels = np.rint(voxels)  # of whole numbers rounding loses no more than half of one
    voxels = to_dtype(voxels, dtype)
    if shape is not None and voxels.shape[:3] != tuple(shape):
        found = " x ".join(map(str, voxels.shape[:3]))
        raise Refused("shape", f"it is {found} voxels and the role has {' x '.join(map(str, shape))}")
    return np.ascontiguousarray(voxels), (float(z_mm), float(y_mm), float(x_mm))


def mask_for_store(
    mask: np.ndarray,
    image: Volume,
    *,
    spacing_mm: Sequence[float] | None = None,
    unknown_spacing_mm: Sequence[float] | None = None,
) -> np.ndarray:
    """A mask uint8 [k, j, i] on the voxels of `image`, as [z, y, x] on those that `for_store` makes of it."""
    turned = to_ras(Volume(mask[..., None], image.affine, image.pixel_mm))
    native = turned.spacing_mm or unknown_spacing_mm
    voxels = turned.voxels[..., 0]
    if spacing_mm is not None and native is not None:
        voxels = nearest(voxels, native, spacing_mm)
    return np.ascontiguousarray(voxels)
