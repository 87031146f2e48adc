"""Resampling keeps places and ranges, and no value is lost on its way into a role's dtype."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_jax.data.geometry import Volume, check_grid, for_store, resample, to_dtype, to_ras
from mmfm_jax.data.refuse import Refused


def reason(function, *arguments, **more) -> str:
    with pytest.raises(Refused) as raised:
        function(*arguments, **more)
    return raised.value.reason


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1))
def test_resampling_equals_simpleitk_where_nothing_is_averaged(seed):
    sitk = pytest.importorskip("SimpleITK")
    rng = np.random.default_rng(seed)
    voxels = rng.normal(size=(*rng.integers(2, 9, 3), 1)).astype(np.float32)
    old, new = rng.uniform(1, 3, 3), rng.uniform(0.4, 1, 3)
    ours = resample(voxels, old.tolist(), new.tolist())
    image = sitk.GetImageFromArray(voxels[..., 0])
    image.SetSpacing(old[::-1].tolist())
    # The same centre; beyond the outermost voxels we continue the edge, so compare only within them.
    size = np.array(ours.shape[:3])
    origin = (np.array(voxels.shape[:3]) - 1) / 2 * old - (size - 1) / 2 * new
    grid = sitk.Resample(
        image, size[::-1].tolist(), sitk.Transform(), sitk.sitkLinear, origin[::-1].tolist(), new[::-1].tolist(),
        np.eye(3).ravel().tolist(), np.nan,
    )  # fmt: skip
    theirs = sitk.GetArrayFromImage(grid)
    at = [(origin[a] + np.arange(size[a]) * new[a]) / old[a] for a in range(3)]
    within = np.ix_(*[(c >= 0) & (c <= voxels.shape[a] - 1) for a, c in enumerate(at)])
    assert theirs[within].size
    np.testing.assert_allclose(ours[..., 0][within], theirs[within], atol=1e-4)


def test_coarser_voxels_are_means_as_in_jax_and_stay_in_range():
    import jax

    rng = np.random.default_rng()  # one draw, since JAX compiles for each shape
    shape = rng.integers(8, 20, 3)
    voxels = rng.normal(size=(*shape, 2)).astype(np.float32)
    old, new = rng.uniform(0.5, 1, 3), rng.uniform(1, 4, 3)
    ours = resample(voxels, old.tolist(), new.tolist())
    assert ours.min() >= voxels.min() - 1e-6 and ours.max() <= voxels.max() + 1e-6
    size = np.maximum(1, np.rint(shape * old / new))
    np.testing.assert_array_equal(ours.shape[:3], size)
    scale = old / new
    theirs = jax.image.scale_and_translate(
        voxels,
        ours.shape,
        (0, 1, 2),
        scale,
        size / 2 - shape / 2 * scale,
        method="linear",
        precision=jax.lax.Precision.HIGHEST,
    )
    # Beyond the outermost voxels we continue the edge and JAX leaves it out, so compare where the kernel is within.
    at = [((np.arange(size[a]) - (size[a] - 1) / 2) / scale[a]) + (shape[a] - 1) / 2 for a in range(3)]
    within = np.ix_(*[(c >= 1 / scale[a]) & (c <= shape[a] - 1 - 1 / scale[a]) for a, c in enumerate(at)])
    np.testing.assert_allclose(ours[within], np.asarray(theirs)[within], atol=1e-5)


def test_a_grid_that_is_finer_than_asked_does_not_alias():
    stripes = np.broadcast_to(np.array([0.0, 1.0] * 32)[:, None], (1, 1, 64, 1))
    assert np.abs(resample(stripes, (1, 1, 1), (1, 1, 4))[0, 0, 2:-2] - 0.5).max() < 0.01


def test_values_that_a_dtype_cannot_hold_are_refused():
    assert reason(to_dtype, np.array([40000]), "int16") == "out_of_range"
    assert reason(to_dtype, np.array([-1], np.int16), "uint8") == "out_of_range"
    assert reason(to_dtype, np.array([0.25, 0.5]), "int16") == "would_round"
    assert reason(to_dtype, np.array([0.0, np.nan]), "float32") == "not_finite"
    assert reason(to_dtype, np.array([np.inf]), "int16") == "not_finite"
    np.testing.assert_array_equal(to_dtype(np.array([-1024.0, 3000.4]), "int16"), np.array([-1024, 3000], np.int16))
    np.testing.assert_array_equal(to_dtype(np.array([1.0, 3.0]), "uint8"), np.array([1, 3], np.uint8))
    assert to_dtype(np.array([1], ">i2"), "int16").dtype == np.int16


def test_what_is_stored_is_ras_with_the_spacing_of_its_axes():
    voxels = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4, 1)  # k j i
    affine = np.zeros((4, 4))
    affine[1, 0], affine[2, 1], affine[0, 2], affine[3, 3] = -2, 3, 5, 1  # i runs to P, j to S, k to R
    stored, spacing = for_store(Volume(voxels, affine), dtype="int16", channels=1)
    assert spacing == (3.0, 2.0, 5.0)
    np.testing.assert_array_equal(stored[..., 0], voxels[..., 0].transpose(1, 2, 0)[:, ::-1])


def test_what_a_role_does_not_take():
    volume = Volume(np.zeros((2, 3, 4, 2), np.int16), np.eye(4))
    take = {"dtype": "int16", "channels": 2}
    assert for_store(volume, **take)[0].shape == (2, 3, 4, 2)
    assert for_store(volume, dtype="int16", channels=1, frame=1)[0].shape == (2, 3, 4, 1)
    assert reason(for_store, volume, dtype="int16", channels=1) == "channels"
    assert reason(for_store, volume, dtype="int16", channels=1, frame=2) == "channels"
    assert reason(for_store, volume, **take, shape=(2, 3, 5)) == "shape"
    assert reason(for_store, Volume(volume.voxels, None), **take) == "spacing_unknown"
    assert for_store(Volume(volume.voxels, None), **take, unknown_spacing_mm=(1, 2, 3))[1] == (1.0, 2.0, 3.0)
    sheared = np.eye(4)
    sheared[0, 1] = 0.1
    assert reason(check_grid, sheared) == "sheared"
    assert reason(check_grid, np.diag([1.0, 0, 1, 1])) == "spacing_unknown"


def test_an_image_without_a_place_keeps_its_rows_and_columns():
    volume = Volume(np.arange(6).reshape(1, 2, 3, 1), None)
    assert to_ras(volume) is volume
