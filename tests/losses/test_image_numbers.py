"""Numbers of an image on the device, beside those of the baselines and of NumPy."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from mmfm_jax.losses.image_numbers import NAMES, SCALES, image_numbers
from mmfm_jax.metrics.image_numbers import SHAPE, shape_numbers

SIZE, SPACING = (7, 9, 8), (2.5, 0.7, 1.3)
compiled = jax.jit(image_numbers)


def numbers(voxels, spacing=SPACING) -> dict[str, np.ndarray]:
    """By name, unscaled; of one image [z, y, x]."""
    found = np.asarray(compiled(voxels[None, ..., None].astype(np.float32), np.array([spacing], np.float32))[0, 0])
    return {name: found[i] * SCALES[name] for i, name in enumerate(NAMES)}


def smooth(seed) -> np.ndarray:
    """An image of a few bright places with values from 0 to 1, quarters as of four readers."""
    rng = np.random.default_rng(seed)
    field = gaussian_filter(rng.normal(size=SIZE), rng.uniform(0.8, 1.6))
    return np.clip(np.round(4 * (field / np.abs(field).max() + rng.uniform(-0.2, 0.4))), 0, 4) / 4


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_shape_is_that_of_the_baselines(seed):
    share = smooth(seed)
    if not (share >= 0.5).any():
        return
    ours, theirs = numbers(share), dict(zip(SHAPE, shape_numbers(share, SPACING)))
    size, spacing = np.array(SIZE), np.array(SPACING)
    voxel = spacing.prod()
    own = 2 * (voxel / spacing).sum()  # surface of a voxel
    crop, crop_surface = size.prod(), 2 * (size.prod() / size * voxel / spacing).sum()
    volume = np.exp(theirs["log_volume_mm3"]) / voxel
    surface = np.exp(theirs["log_surface_mm2"]) + own
    inside = share >= 0.5
    planes = [inside.any(axis=tuple(a for a in range(3) if a != axis)).sum() for axis in range(3)]
    present = share[share > 0]
    expected = {
        "log_volume": np.log((volume + 1) / crop),
        "log_sum": np.log((np.exp(theirs["log_sum_mm3"]) / voxel + 1) / crop),
        "log_surface": np.log(surface / crop_surface),
        "log_variation": np.log((np.exp(theirs["log_variation_mm2"]) + own) / crop_surface),
        **{f"log_occupied_{a}": np.log((n + 1) / (of + 1)) for a, n, of in zip("zyx", planes, SIZE)},
        "log_sphericity": np.log(np.pi ** (1 / 3) * (6 * (volume + 1) * voxel) ** (2 / 3) / surface),
        "partial": theirs["disagreement"],
        "log_largest_compactness": np.log(theirs["largest_compactness"] / 16 + 1),
        "log_mean_compactness": np.log(theirs["mean_compactness"] / 16 + 1),
        "mean": present.mean(),
        "sd": present.std(),
    }
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, abs=2e-4), name


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_principal_deviations_are_those_of_the_covariance_of_places(seed):
    rng = np.random.default_rng(seed)
    voxels = rng.random(SIZE) ** rng.integers(1, 8)
    places = np.stack(np.meshgrid(*map(np.arange, SIZE), indexing="ij"), axis=-1).reshape(-1, 3) * SPACING
    covariance = np.cov(places.T, aweights=voxels.ravel(), ddof=0) + np.diag(np.square(SPACING)) / 12
    short, middle, long = np.log(np.sqrt(np.linalg.eigvalsh(covariance)) / np.mean(np.array(SIZE) * SPACING))
    ours = numbers(voxels)
    expected = {"log_short": short, "log_middle": middle, "log_long": long, "log_middle_to_long": middle - long}
    for name, value in (expected | {"log_short_to_long": short - long}).items():
        assert ours[name] == pytest.approx(value, abs=2e-3), name


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mirror_image_has_the_same_numbers(axis):
    voxels = smooth(3)
    ours, mirrored = numbers(voxels), numbers(np.flip(voxels, axis))
    assert ours == pytest.approx(mirrored, abs=1e-4)


@pytest.mark.parametrize("size", [(1, 6, 5), (4, 4, 4)])
def test_numbers_of_empty_full_and_flat_images_are_finite_and_each_channel_has_its_own(size):
    images = np.stack([np.zeros(size), np.ones(size), np.full(size, 0.3)], axis=-1)[None].astype(np.float32)
    found = np.asarray(compiled(images, np.ones((1, 3), np.float32)))
    assert found.shape == (1, 3, len(NAMES)) and np.isfinite(found).all()
    for channel in range(3):
        alone = compiled(images[..., channel : channel + 1], np.ones((1, 3), np.float32))[:, 0]
        np.testing.assert_allclose(found[:, channel], alone, atol=1e-4)
    assert found[0, 1, NAMES.index("log_volume")] == pytest.approx(np.log(1 + 1 / np.prod(size)) / 1.5, abs=1e-5)


def test_numbers_of_absent_images_are_finite():
    found = compiled(np.zeros((2, 3, 3, 3, 1), np.float32), np.array([[1, 1, 1], [0, 0, 0]], np.float32))
    assert np.isfinite(np.asarray(found)).all()
