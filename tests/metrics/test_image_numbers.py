"""Simple numbers of images: shapes whose numbers are known, and what may not change them."""

import numpy as np
import pytest
from scipy.stats import skew

from mmfm_jax.metrics.image_numbers import INTENSITY, SHAPE, intensity_numbers, outline_scale, shape_numbers


def named(share, spacing):
    return dict(zip(SHAPE, shape_numbers(share, spacing), strict=True))


def ellipsoid(radii, spacing):
    """Voxels whose centres lie within an ellipsoid, radii and spacing in mm."""
    n = [int(np.ceil(r / s)) + 1 for r, s in zip(radii, spacing)]
    places = np.meshgrid(*(np.arange(-k, k + 1) * s for k, s in zip(n, spacing)), indexing="ij")
    return (np.sum([(place / r) ** 2 for place, r in zip(places, radii)], axis=0) <= 1).astype(float)


def test_box_is_measured_exactly():
    size, spacing = np.array([3, 5, 4]), np.array([2.0, 0.5, 1.5])
    share = np.zeros((9, 9, 9))
    share[2:5, 1:6, 3:7] = 1
    found, (a, b, c) = named(share, tuple(spacing)), size * spacing
    surface, variances = 2 * (a * b + b * c + c * a), np.sort((size * spacing) ** 2 / 12)
    expected = {
        "log_volume_mm3": np.log(a * b * c),
        "log_sum_mm3": np.log(a * b * c),
        "log_surface_mm2": np.log(surface),
        "log_variation_mm2": np.log(surface),
        "log_extent_z_mm": np.log(a),
        "log_extent_y_mm": np.log(b),
        "log_extent_x_mm": np.log(c),
        "sphericity": (36 * np.pi * (a * b * c) ** 2) ** (1 / 3) / surface,
        "disagreement": 0,
        "middle_to_long": variances[1] / variances[2],
        "short_to_long": variances[0] / variances[2],
        "fill": 1,
        "largest_compactness": (2 * (b + c)) ** 2 / (b * c),
        "mean_compactness": (2 * (b + c)) ** 2 / (b * c),
    }
    assert found == pytest.approx(expected)


def test_ball_has_two_thirds_of_sphericity_by_faces():
    radius, spacing = 12.0, (0.8, 0.5, 0.6)
    found = named(ellipsoid([radius] * 3, spacing), spacing)
    assert np.exp(found["log_volume_mm3"]) == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.01)
    assert np.exp(found["log_surface_mm2"]) == pytest.approx(6 * np.pi * radius**2, rel=0.02)
    assert found["sphericity"] == pytest.approx(2 / 3, rel=0.02)
    assert found["fill"] == pytest.approx(np.pi / 6, rel=0.1)
    assert found["middle_to_long"] == pytest.approx(1, abs=0.01) == found["short_to_long"]
    assert found["largest_compactness"] == pytest.approx(64 / np.pi, rel=0.1)  # (8 r)^2 / (pi r^2)


def test_ellipsoid_turned_between_axes_keeps_the_ratios_of_its_moments():
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        radii, spacing = np.array([12.0, 9.0, 6.0])[order], (0.5, 0.7, 0.6)
        found = named(ellipsoid(radii, spacing), spacing)
        assert found["middle_to_long"] == pytest.approx((9 / 12) ** 2, rel=0.02)
        assert found["short_to_long"] == pytest.approx((6 / 12) ** 2, rel=0.02)


def test_shares_count_by_what_they_are():
    share = np.array([0.25, 1, 0.5, 0.75]).reshape(1, 1, 4)
    found = named(share, (1, 1, 1))
    assert np.exp(found["log_sum_mm3"]) == pytest.approx(2.5)
    assert np.exp(found["log_volume_mm3"]) == pytest.approx(3)
    assert found["disagreement"] == pytest.approx(3 / 4)
    along, across = 0.25 + 0.75 + 0.5 + 0.25 + 0.75, 4 * 2.5
    assert np.exp(found["log_variation_mm2"]) == pytest.approx(along + across)


@pytest.mark.parametrize("seed", np.random.SeedSequence().generate_state(2))
def test_numbers_do_not_depend_on_padding_or_place(seed):
    rng = np.random.default_rng(seed)
    share = np.maximum(rng.normal(0.2, 0.5, (5, 6, 7)), 0).clip(max=1)
    share[2, 3, 3] = 1
    grey = rng.integers(-1000, 400, (5, 6, 7)).astype(np.int16)
    grey[0, 0, 0] = -1000
    spacing = tuple(rng.uniform(0.5, 3, 3))
    room = ((1, 2), (3, 0), (2, 4))
    for of, image, empty in ((shape_numbers, share, 0), (intensity_numbers, grey, -1000)):
        padded = np.pad(image, room, constant_values=empty)
        np.testing.assert_allclose(of(padded, spacing), of(image, spacing), rtol=1e-9)
        assert np.isfinite(of(image, spacing)).all()


def test_intensities_are_those_of_the_content():
    rng = np.random.default_rng(np.random.SeedSequence().entropy)
    voxels, spacing = rng.integers(1, 200, (4, 5, 6)).astype(np.uint8), np.array([2.0, 1.0, 0.5])
    found: dict[str, float] = dict(zip(INTENSITY, intensity_numbers(np.pad(voxels, 1), tuple(spacing)), strict=True))
    x = voxels.astype(float)
    assert [found[k] for k in ("mean", "sd", "skewness")] == pytest.approx([x.mean(), x.std(), skew(x.ravel())])
    assert [found[k] for k in ("percentile_5", "median")] == pytest.approx(list(np.percentile(x, [5, 50])))
    assert found["log_volume_mm3"] == pytest.approx(np.log(x.size * spacing.prod()))
    assert found["log_extent_x_mm"] == pytest.approx(np.log(3))
    gaps = np.concatenate([np.abs(np.diff(x, axis=axis)).ravel() for axis in range(3)])
    assert found["mean_difference"] == pytest.approx(gaps.mean())
    places = np.stack([p.ravel() for p in np.indices(x.shape)]) * spacing[:, None]
    moments = np.cov(places, aweights=x.ravel(), bias=True) + np.diag(spacing**2 / 12)
    axes = [found[f"log_{of}_mm"] for of in ("short", "middle", "long")]
    np.testing.assert_allclose(np.exp(2 * np.array(axes)), np.linalg.eigvalsh(moments))


def test_of_nothing_there_is_no_number():
    assert np.isnan(shape_numbers(np.zeros((3, 3, 3)), (1, 1, 1))).all()
    assert np.isnan(intensity_numbers(np.full((3, 3, 3), 7), (1, 1, 1))).all()
    faint = named(np.full((1, 1, 1), 0.2), (1, 1, 1))
    assert np.isnan(faint["log_volume_mm3"]) and np.isfinite(faint["log_sum_mm3"])


def test_outlines_are_told_from_intensities():
    rng = np.random.default_rng(0)
    ball = ellipsoid([6.0] * 3, (1, 1, 1))
    shares = [np.rint(255 * ball * rng.choice([0.25, 1], ball.shape, p=[0.4, 0.6])).astype(np.uint8) for _ in range(3)]
    assert outline_scale(shares) == 255 and outline_scale([ball.astype(np.uint8)]) == 1
    assert outline_scale([rng.integers(0, 256, (9, 9, 9)).astype(np.uint8)]) is None
    assert outline_scale([rng.integers(-1000, 400, (9, 9, 9))]) is None
    assert outline_scale([np.zeros((3, 3, 3))]) is None and outline_scale([]) is None
    brighter = [ball, 3 * ball * rng.random(ball.shape)]  # what is full in one image is not so in another
    assert outline_scale(brighter) is None
