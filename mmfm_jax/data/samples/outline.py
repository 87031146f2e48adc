"""Outlines drawn on the slices of a scan, as solid regions and as volumes on a grid in millimetres."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Outline:
    """A closed outline on one slice."""

    slice: int
    """Index of the slice in the scan."""
    points: np.ndarray
    """Pixels of the outline, int [points, 2], y x."""
    included: bool
    """Whether it encloses the nodule, or a part to leave out."""


@dataclass(frozen=True)
class Region:
    """What one reader outlined, on the pixels of the scan, with its place and size in millimetres."""

    slices: np.ndarray
    """Index in the scan of each outlined slice, ascending, int [slice]."""
    corner: tuple[int, int]
    """Pixel y x of the scan at which the arrays start."""
    inside: np.ndarray
    """Pixels of the nodule, bool [slice, y, x]."""
    outlined: np.ndarray
    """Pixels of the nodule and of its outline, bool [slice, y, x]."""
    slabs_mm: np.ndarray
    """Where each slice begins and ends along z, float [slice, 2]."""
    spacing_mm: float
    """Of pixels, the same along y and x."""

    @property
    def volume_mm3(self) -> float:
        area = self.inside.sum((1, 2)) * self.spacing_mm**2
        return float(area @ (self.slabs_mm[:, 1] - self.slabs_mm[:, 0]))

    @property
    def centroid_mm(self) -> np.ndarray:
        """z y x of the centre of mass, float [3]; pixel 0 is at 0 and y and x grow with the pixel."""
        weight = self.inside * (self.slabs_mm[:, 1] - self.slabs_mm[:, 0])[:, None, None]
        z = weight.sum((1, 2)) @ self.slabs_mm.mean(1)
        y = weight.sum((0, 2)) @ (np.arange(weight.shape[1]) + self.corner[0]) * self.spacing_mm
        x = weight.sum((0, 1)) @ (np.arange(weight.shape[2]) + self.corner[1]) * self.spacing_mm
        return np.array([z, y, x]) / weight.sum()


def region(outlines: Sequence[Outline], slice_z_mm: np.ndarray, spacing_mm: float) -> Region:
    """The region within one reader's outlines on a scan with slices at `slice_z_mm` (ascending).

    An outline runs along the first pixels outside of what it encloses, as LIDC readers drew it (McNitt-Gray et al.,
    doi:10.1016/j.acra.2007.07.021): its own pixels do not belong to the nodule, and the pixels of an outline around a
    part left out do. Where an outline is too small to have pixels within, its own stand for the nodule.
    A slice reaches half-way to its neighbours; over slices that the reader skipped, half-way to the next one drawn.
    """
    slices = np.unique([outline.slice for outline in outlines])
    points = np.concatenate([outline.points for outline in outlines])
    corner, shape = points.min(0), np.ptp(points, 0) + 1
    inside = np.zeros((len(slices), *shape), bool)
    outlined = np.zeros_like(inside)
    for outline in sorted(outlines, key=lambda o: not o.included):
        at = np.searchsorted(slices, outline.slice)
        within, border = fill(outline.points - corner, (shape[0], shape[1]))
        if outline.included:
            inside[at] |= within if within.any() else border
            outlined[at] |= within | border
        else:
            inside[at] &= ~within
    return Region(
        slices=slices,
        corner=(int(corner[0]), int(corner[1])),
        inside=inside,
        outlined=outlined,
        slabs_mm=_slabs(slices, slice_z_mm),
        spacing_mm=spacing_mm,
    )


def fill(points: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels strictly within a closed outline and pixels on it, both bool [y, x].

    `points`: int [points, 2], y x, within `shape`. Even-odd rule by scanlines: an edge that crosses a row flips all
    pixels to the right of the crossing; rows count as crossed at their lower end, so a vertex is not counted twice.
    """
    start, step = points, np.roll(points, -1, axis=0) - points
    pieces = np.maximum(np.gcd(step[:, 0], step[:, 1]), 1)
    border = np.zeros(shape, bool)
    edge = np.repeat(np.arange(len(points)), pieces)
    along = np.arange(len(edge)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    y, x = (start[edge] + along[:, None] * (step // pieces[:, None])[edge]).T
    border[y, x] = True

    rows = np.abs(step[:, 0])
    edge = np.repeat(np.arange(len(points)), rows)
    along = np.arange(len(edge)) - np.repeat(np.cumsum(rows) - rows, rows)
    crossed_y = np.minimum(start[edge, 0], start[edge, 0] + step[edge, 0]) + along
    crossed_x = start[edge, 1] + (crossed_y - start[edge, 0]) * step[edge, 1] / step[edge, 0]
    flips = np.zeros(shape, np.int32)
    np.add.at(flips, (crossed_y, np.ceil(crossed_x).astype(np.int64)), 1)
    return (np.cumsum(flips, axis=1) % 2 == 1) & ~border, border


def to_grid(region: Region, centre_mm: np.ndarray, voxels: int, voxel_mm: float) -> np.ndarray:
    """Share of each voxel that lies in the region, float32 [z, y, x], axes towards superior, anterior, right (RAS).

    The grid is a cube of `voxels` along each axis, centred on `centre_mm` (as `Region.centroid_mm`). Pixels are boxes
    and the grid is parallel to them, so the shares are products of overlaps along each axis and exact: the volume is
    kept, whatever the spacing, and nothing is rescaled. What lies outside the grid is cut off.

    Columns of an axial slice run to the patient's left and rows to posterior, so both are reversed.
    """
    edges = (np.arange(voxels + 1) - voxels / 2) * voxel_mm
    along_z = _overlaps(region.slabs_mm - centre_mm[0], edges)
    along_y, along_x = (
        _overlaps(-(corner + np.arange(size)[:, None] + [0.5, -0.5]) * region.spacing_mm + centre, edges)
        for corner, size, centre in zip(region.corner, region.inside.shape[1:], centre_mm[1:])
    )
    touched = tuple(_touched(along) for along in (along_z, along_y, along_x))  # most of the grid is empty
    along_z, along_y, along_x = (along[cells] for along, cells in zip((along_z, along_y, along_x), touched))
    in_plane = along_y @ (region.inside.astype(np.float32) @ along_x.T)
    grid = np.zeros((voxels, voxels, voxels), np.float32)
    grid[touched] = np.tensordot(along_z, in_plane, axes=1)
    return grid


def _overlaps(intervals: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Share of each cell between `edges` that each of `intervals` [n, 2] covers, float32 [cells, n]."""
    low = np.maximum(edges[:-1, None], intervals[None, :, 0])
    high = np.minimum(edges[1:, None], intervals[None, :, 1])
    return (np.maximum(high - low, 0) / np.diff(edges)[:, None]).astype(np.float32)


def _touched(along: np.ndarray) -> slice:
    """The cells of `_overlaps` from the first to the last that anything covers."""
    cells = np.flatnonzero(along.any(axis=1))
    return slice(cells[0], cells[-1] + 1) if len(cells) else slice(0, 0)


def _slabs(slices: np.ndarray, slice_z_mm: np.ndarray) -> np.ndarray:
    """Where each of `slices` begins and ends along z, float [slice, 2]."""
    half = np.median(np.diff(slice_z_mm)) / 2  # not the neighbour's distance: a scan may lack slices there
    z = slice_z_mm[slices]
    between = (z[1:] + z[:-1]) / 2
    return np.stack([np.concatenate([[z[0] - half], between]), np.concatenate([between, [z[-1] + half]])], axis=1)


def extent_mm(outlines: Sequence[Outline], spacing_mm: float) -> float:
    """The longest straight line within one slice of what the outlines enclose.

    It is the largest distance between two pixels of an outline less one pixel, for those pixels lie just outside.
    """
    largest = 0.0
    for outline in outlines:
        if outline.included:
            y, x = outline.points.T
            squared = np.subtract.outer(y, y) ** 2 + np.subtract.outer(x, x) ** 2
            largest = max(largest, float(np.sqrt(squared.max())))
    return max(largest - 1, 1) * spacing_mm
