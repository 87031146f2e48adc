"""Outlines fill what geometry says they enclose, and the grid in millimetres keeps it true to scale."""

from math import pi

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.path import Path

from mmfm_jax.data.samples.outline import Outline, extent_mm, fill, region, to_grid

SIZE = 24
polygons = st.lists(st.tuples(*[st.integers(0, SIZE - 1)] * 2), min_size=3, max_size=12).map(np.array)
seeds = st.integers(0, 2**32)


def star(seed: int) -> np.ndarray:
    """A polygon on whole pixels that does not cross itself: its corners by their direction from (12, 12)."""
    rng = np.random.default_rng(seed)
    points = rng.integers(0, SIZE, (int(rng.integers(8, 40)), 2)) - SIZE // 2
    points = points[np.abs(points).sum(1) > 0]
    angle = np.arctan2(points[:, 0], points[:, 1])
    _, first = np.unique(np.round(angle, 9), return_index=True)  # one corner a direction
    return points[first] + SIZE // 2


@given(polygons)
def test_fill_is_the_even_odd_rule_even_where_the_outline_crosses_itself(points):
    within, border = fill(points, (SIZE, SIZE))
    pixels = np.argwhere(np.ones((SIZE, SIZE)))
    a, b = points[:, None], np.roll(points, -1, axis=0)[:, None]
    (side_y, side_x), (y, x) = np.moveaxis(b - a, -1, 0), np.moveaxis(pixels - a, -1, 0)
    collinear = side_y * x == side_x * y
    between = ((np.minimum(a, b) <= pixels) & (pixels <= np.maximum(a, b))).all(-1)
    np.testing.assert_array_equal(border.ravel(), (collinear & between).any(0))
    inside = Path(np.concatenate([points, points[:1]])).contains_points(pixels).reshape(SIZE, SIZE)
    np.testing.assert_array_equal(within, inside & ~border)


@given(seeds)
def test_pixels_within_and_on_an_outline_obey_picks_theorem(seed):
    points = star(seed)
    gaps = np.diff(np.arctan2(*(points - SIZE // 2).T), append=np.arctan2(*(points[0] - SIZE // 2)) + 2 * pi)
    if gaps.max() >= pi:  # then (12, 12) is outside and the sides may cross
        return
    within, border = fill(points, (SIZE, SIZE))
    after = np.roll(points, -1, axis=0)
    area = abs((points[:, 0] * after[:, 1] - points[:, 1] * after[:, 0]).sum()) / 2
    assert area == within.sum() + border.sum() / 2 - 1


# ---------------------------------------------------------------- regions


def square(slice: int, low: int, high: int, included: bool = True) -> Outline:
    """Encloses the pixels low + 1 ... high - 1 of y and x."""
    return Outline(slice, np.array([(low, low), (low, high), (high, high), (high, low)]), included)


def test_an_outline_is_just_outside_and_a_left_out_part_keeps_its_outline():
    held = region([square(3, 10, 21), square(3, 13, 17, included=False)], np.arange(10.0), 0.5)
    assert held.inside.sum() == 10**2 - 3**2
    assert held.volume_mm3 == (10**2 - 3**2) * 0.25
    assert held.outlined.sum() == 12**2


def test_the_order_of_outlines_does_not_matter():
    outlines = [square(3, 13, 17, included=False), square(4, 10, 21), square(3, 10, 21)]
    held, again = (region(each, np.arange(10.0), 0.5) for each in (outlines, outlines[::-1]))
    np.testing.assert_array_equal(held.inside, again.inside)


def test_an_outline_too_small_to_enclose_a_pixel_stands_for_itself():
    held = region([Outline(0, np.array([(5, 5), (5, 6), (6, 6), (6, 5)]), True)], np.arange(3.0), 1.0)
    assert held.volume_mm3 == 4


def test_a_slice_reaches_half_way_to_the_next_one_drawn():
    z = np.array([0.0, 2.0, 4.0, 6.0, 8.0])
    held = region([square(1, 0, 3), square(3, 0, 3), square(4, 0, 3)], z, 1.0)
    np.testing.assert_array_equal(held.slabs_mm, [[1, 4], [4, 7], [7, 9]])
    assert held.volume_mm3 == 4 * 8


def test_extent_is_the_longest_line_within():
    assert extent_mm([square(0, 0, 31), square(1, 0, 11)], 0.5) == pytest.approx((np.hypot(31, 31) - 1) * 0.5)
    assert extent_mm([square(0, 5, 6), square(1, 0, 9, included=False)], 0.5) == pytest.approx(0.5)


# ---------------------------------------------------------------- the grid


def drawn(seed: int, spacing: float, slice_mm: float):
    """A region of random polygons on 1 to 6 slices in a row."""
    rng = np.random.default_rng(seed)
    slices = range(5, 5 + int(rng.integers(1, 7)))
    outlines = [Outline(s, star(int(rng.integers(2**32))), True) for s in slices]
    return region(outlines, np.arange(20) * slice_mm - 300, spacing)


@given(seed=seeds, spacing=st.floats(0.4, 1.0), slice_mm=st.floats(0.6, 5.0), voxel_mm=st.floats(0.5, 2.5))
def test_the_grid_keeps_volume_and_centre_whatever_the_spacing(seed, spacing, slice_mm, voxel_mm):
    held = drawn(seed, spacing, slice_mm)
    voxels = 2 * int(np.ceil(40 / voxel_mm))
    grid = to_grid(held, held.centroid_mm, voxels, voxel_mm)
    assert grid.min() >= 0 and grid.max() <= 1 + 1e-5
    np.testing.assert_allclose(grid.sum(dtype=np.float64) * voxel_mm**3, held.volume_mm3, rtol=1e-4)
    at = (np.arange(voxels) + 0.5 - voxels / 2) * voxel_mm
    centre = [(grid.sum(axes, dtype=np.float64) @ at) / grid.sum(dtype=np.float64) for axes in ((1, 2), (0, 2), (0, 1))]
    np.testing.assert_allclose(centre, 0, atol=voxel_mm / 4)  # a voxel partly covered counts at its centre


@given(seed=seeds, factor=st.floats(0.5, 3.0))
def test_a_scene_twice_the_size_on_voxels_twice_the_size_is_the_same(seed, factor):
    small, large = (drawn(seed, 0.7 * f, 1.5 * f) for f in (1.0, factor))
    grids = to_grid(small, small.centroid_mm, 40, 1.0), to_grid(large, large.centroid_mm, 40, factor)
    np.testing.assert_allclose(*grids, atol=1e-4)


def test_whole_pixels_on_voxels_of_their_size_are_copied_with_both_axes_reversed():
    """Rows of a slice run to posterior and columns to the left; the grid runs to anterior and right."""
    rng = np.random.default_rng(0)
    held = drawn(1, 1.0, 1.0)
    held.inside[:] = rng.random(held.inside.shape) < 0.5
    n, height, width = held.inside.shape
    middle = np.array([held.slabs_mm.mean(), *(np.array(held.corner) + (np.array([height, width]) - 1) / 2)])
    grid = to_grid(held, middle + np.array([n, height, width]) % 2 / 2 * [1, -1, -1], 32, 1.0)
    z, y, x = (np.flatnonzero(grid.any(axes)) for axes in ((1, 2), (0, 2), (0, 1)))
    found = grid[z[0] : z[-1] + 1, y[0] : y[-1] + 1, x[0] : x[-1] + 1]
    np.testing.assert_array_equal(found, held.inside[:, ::-1, ::-1])


def test_a_ball_is_the_same_ball_on_scans_of_different_spacing():
    def ball(spacing: float, slice_mm: float, radius: float = 9.0) -> np.ndarray:
        z = np.arange(-30, 30) * slice_mm
        outlines = []
        for i in np.flatnonzero(np.abs(z) < radius):
            angle = np.linspace(0, 2 * pi, 200, endpoint=False)
            reach = np.sqrt(radius**2 - z[i] ** 2) / spacing + 0.5
            points = np.rint(np.stack([np.sin(angle), np.cos(angle)], 1) * reach + 100).astype(int)
            outlines.append(Outline(int(i), points, True))
        held = region(outlines, z, spacing)
        return to_grid(held, held.centroid_mm, 32, 1.0)

    fine = ball(0.4, 0.5)
    assert fine.sum() == pytest.approx(4 / 3 * pi * 9**3, rel=0.03)
    for spacing, slice_mm in ((0.8, 0.5), (0.6, 2.5), (0.9, 3.0)):
        coarse = ball(spacing, slice_mm)
        assert coarse.sum() == pytest.approx(fine.sum(), rel=0.06)
        assert np.minimum(fine, coarse).sum() > 0.85 * fine.sum()


def test_what_lies_outside_the_grid_is_cut_off():
    held = region([square(5, 0, 41)], np.arange(10.0), 1.0)
    assert to_grid(held, held.centroid_mm, 16, 1.0).sum() == pytest.approx(16 * 16)
    assert not to_grid(held, held.centroid_mm + 1000, 16, 1.0).any()
