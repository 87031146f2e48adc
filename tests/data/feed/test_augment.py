"""Mirroring, moving and intensities against scipy, numpy and what must hold of them."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmfm_jax.config.data import Augment
from mmfm_jax.data.batch import ImagePart, ImageShape
from mmfm_jax.data.feed.augment import Strength, augment_images, augment_packed, flip, move
from mmfm_jax.errors import UserError
from mmfm_jax.model.vision import as_patches

move_jit = jax.jit(move)
volumes = st.sampled_from([(4, 5, 6), (1, 6, 5), (3, 1, 4), (2, 2, 1), (1, 1, 1)]).flatmap(
    lambda shape: hnp.arrays(np.float32, (2, *shape, 2), elements=st.floats(0, 1, width=32))
)
axes = hnp.arrays(bool, (2, 3))


@settings(max_examples=25, deadline=None)
@given(voxels=volumes, marked=axes)
def test_flips_mirror_the_marked_axes_and_undo_themselves(voxels, marked):
    flipped = flip(jnp.asarray(voxels), jnp.asarray(marked))
    for i in range(2):
        np.testing.assert_array_equal(flipped[i], np.flip(voxels[i], tuple(np.flatnonzero(marked[i]).tolist())))
    np.testing.assert_array_equal(flip(flipped, jnp.asarray(marked)), voxels)


@settings(max_examples=15, deadline=None)
@given(voxels=volumes, marked=axes)
def test_moving_by_nothing_is_the_identity_and_mirrors_like_flip(voxels, marked):
    spacing, nothing = jnp.array([[1.0, 2.0, 0.7]] * 2), jnp.zeros((2, 3))
    moved = move_jit(jnp.asarray(voxels), spacing, nothing, nothing, jnp.asarray(marked))
    np.testing.assert_allclose(moved, flip(jnp.asarray(voxels), jnp.asarray(marked)), atol=1e-6)


def turn(axis: int, angle: float) -> np.ndarray:
    """Rotation matrix on (z, y, x) vectors, written out by hand."""
    c, s = np.cos(angle), np.sin(angle)
    about_z = [[1, 0, 0], [0, c, -s], [0, s, c]]
    about_y = [[c, 0, -s], [0, 1, 0], [s, 0, c]]
    about_x = [[c, -s, 0], [s, c, 0], [0, 0, 1]]
    return np.array([about_z, about_y, about_x][axis])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), shape=st.sampled_from([(7, 8, 9), (2, 9, 5)]), mirrored=st.booleans())
def test_moving_is_the_affine_transform_of_scipy(seed, shape, mirrored):
    rng = np.random.default_rng(seed)
    volume = rng.random(shape).astype(np.float32)
    spacing, shift, angles = rng.uniform(0.5, 3, 3), rng.uniform(-4, 4, 3), rng.uniform(-0.6, 0.6, 3)
    marked = np.array([mirrored, False, mirrored])
    arrays = [jnp.asarray(a, jnp.float32)[None] for a in (spacing, shift, angles)]
    found = np.asarray(move_jit(jnp.asarray(volume)[None, ..., None], *arrays, jnp.asarray(marked)[None]))[0, ..., 0]
    forward = turn(2, angles[2]) @ turn(1, angles[1]) @ turn(0, angles[0])
    matrix = np.diag(1 / spacing) @ np.linalg.inv(forward) @ np.diag(spacing)
    centre = (np.array(shape) - 1) / 2
    offset: Any = centre - matrix @ (centre + shift / spacing)
    source = np.flip(volume, tuple(np.flatnonzero(marked).tolist()))
    # grid-constant fades to zero between the last voxel and one beyond it, as a volume surrounded by air does.
    expected = scipy.ndimage.affine_transform(source, matrix, offset, order=1, mode="grid-constant", cval=0)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_a_quarter_turn_about_z_is_that_of_numpy_and_a_shift_is_in_millimetres():
    volume = np.random.default_rng(0).random((3, 6, 6)).astype(np.float32)
    one, nothing, unmarked = jnp.ones((1, 3)), jnp.zeros((1, 3)), jnp.zeros((1, 3), bool)
    batch = jnp.asarray(volume)[None, ..., None]
    turned = move_jit(batch, one, nothing, jnp.array([[np.pi / 2, 0, 0]]), unmarked)[0, ..., 0]
    np.testing.assert_allclose(turned, np.rot90(volume, axes=(1, 2)), atol=1e-5)
    shifted = move_jit(batch, jnp.array([[1.0, 2.5, 1.0]]), jnp.array([[0, 5.0, 0]]), nothing, unmarked)[0, ..., 0]
    expected = np.zeros_like(volume)
    expected[:, 2:] = volume[:, :-2]
    np.testing.assert_allclose(shifted, expected, atol=1e-5)


def test_turning_is_rigid_in_physical_space():
    """A ball sampled on anisotropic voxels stays the same ball whichever way it is turned."""
    spacing = np.array([3.0, 1.0, 1.5])
    shape = (15, 45, 31)
    at = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing)]
    radius = np.sqrt(sum(a**2 for a in np.meshgrid(*at, indexing="ij")))
    ball = np.clip(18 - radius, 0, 6).astype(np.float32) / 6
    arguments = jnp.asarray(spacing, jnp.float32)[None], jnp.zeros((1, 3)), jnp.array([[0.5, -0.7, 0.9]])
    turned = move_jit(jnp.asarray(ball)[None, ..., None], *arguments, jnp.zeros((1, 3), bool))[0, ..., 0]
    assert np.abs(turned - ball).mean() < 0.01


def test_one_slice_is_turned_and_moved_only_in_its_plane():
    image = np.random.default_rng(0).random((1, 1, 9, 8, 1)).astype(np.float32)
    one, unmarked = jnp.ones((1, 3)), jnp.zeros((1, 3), bool)
    in_plane = move_jit(image, one, jnp.array([[0, 1.5, -2]]), jnp.array([[0.3, 0, 0]]), unmarked)
    with_more = move_jit(image, one, jnp.array([[5.0, 1.5, -2]]), jnp.array([[0.3, 0.8, -0.8]]), unmarked)
    np.testing.assert_array_equal(in_plane, with_more)
    assert np.asarray(in_plane).any()


# ---------------------------------------------------------------- chance


def volumes_of(volume: np.ndarray, n: int) -> Any:
    voxels = np.repeat(volume[None, ..., None], n, axis=0).astype(np.float32)
    return ImagePart(jnp.asarray(voxels), jnp.ones((n, 3)), jnp.ones(n, bool))


def augmented(part: ImagePart, config: Augment, seed: int) -> ImagePart:
    return jax.jit(lambda part, rng: augment_images(part, config, rng))(part, jax.random.key(seed))


def test_flips_happen_as_often_as_asked_along_each_axis():
    n = 600
    ramp = np.add.outer(np.add.outer(100.0 * np.arange(4), 10.0 * np.arange(5)), np.arange(6.0)) / 500
    out = np.asarray(augmented(volumes_of(ramp, n), Augment(flip=0.25), 0).voxels)[..., 0]
    flipped = np.stack([out[:, 0, 0, 0] > out[:, z, y, x] for z, y, x in np.eye(3, dtype=int)], axis=1)
    assert np.abs(flipped.mean(0) - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / n)


def test_intensity_changes_contrast_and_brightness_within_bounds():
    levels = np.stack([np.full((2, 2), 0.5), np.full((2, 2), 0.6)])
    out = np.asarray(augmented(volumes_of(levels, 200), Augment(flip=0, intensity=0.2), 0).voxels)
    brightness, contrast = out[:, 0, 0, 0, 0] - 0.5, (out[:, 1, 0, 0, 0] - out[:, 0, 0, 0, 0]) / 0.1
    for values, middle in ((brightness, 0), (contrast, 1)):
        assert np.abs(values - middle).max() <= 0.2 + 1e-5
        assert values.std() > 0.08
    assert abs(np.corrcoef(brightness, contrast)[0, 1]) < 0.3


def test_shifts_and_turns_stay_within_bounds_and_reach_them():
    """The centre of mass of a blob tells how far it was moved or turned."""
    at = np.stack(np.meshgrid(*[np.arange(25) - 12] * 3, indexing="ij"))
    n = 60

    def centres(blob: tuple[int, int, int], config: Augment) -> np.ndarray:
        volume = np.exp(-((at - np.reshape(blob, (3, 1, 1, 1))) ** 2).sum(0) / 4)
        out = np.asarray(augmented(volumes_of(volume, n), config, 1).voxels)[..., 0]
        return np.einsum("bzyx,azyx->ba", out, at) / out.sum((1, 2, 3))[:, None]

    shifts = centres((0, 0, 0), Augment(flip=0, shift_mm=4))
    assert np.abs(shifts).max() < 4.05 and (np.abs(shifts).max(0) > 3).all() and (np.abs(shifts.mean(0)) < 1.2).all()
    turned = centres((0, 0, 7), Augment(flip=0, rotate_degrees=30))
    assert np.allclose(np.linalg.norm(turned, axis=1), 7, atol=0.1)
    degrees = np.rad2deg(np.arctan2(turned[:, 1], turned[:, 2]))
    assert 20 < np.abs(degrees).max() < 65  # three turns of at most 30 about different axes


def test_an_absent_volume_makes_no_nan_on_the_way():
    """Runs that look for NaN (`jax_debug_nans`) must not stop at the spacing of zero that absent volumes have."""
    part = volumes_of(np.ones((1, 2, 1)), 2)
    part = ImagePart(part.voxels, part.spacing_mm.at[1].set(0), part.present.at[1].set(False))
    with jax.debug_nans(True):
        out = augment_images(part, Augment(shift_mm=1), jax.random.key(0))
    assert not np.asarray(out.voxels[1]).any()


# ---------------------------------------------------------------- mirror images by axis


def mirrors_of(voxels: np.ndarray, made: np.ndarray) -> list[tuple[bool, ...]]:
    """By study, along which of z y x `made` is mirrored: tried one after another, with numpy."""
    choices = list(itertools.product([False, True], repeat=3))
    found = []
    for study, image in zip(voxels, made, strict=True):
        flipped = [np.flip(study, tuple(np.flatnonzero(choice).tolist())) for choice in choices]
        (which,) = [i for i, tried in enumerate(flipped) if np.abs(tried - image).max() < 1e-5]
        found.append(choices[which])
    return found


@pytest.mark.parametrize("moved", [False, True], ids=["alone", "with shifts"])
@settings(max_examples=15, deadline=None)
@given(chances=st.tuples(*[st.sampled_from([0.0, 0.0, 0.3, 0.6])] * 3), seed=st.integers(0, 2**31))
def test_images_are_mirrored_along_the_axes_asked_for_and_no_other(chances, moved, seed):
    voxels = np.random.default_rng(seed).random((64, 3, 4, 5, 1), np.float32)
    part = ImagePart(jnp.asarray(voxels), jnp.ones((64, 3)), jnp.ones(64, bool))
    config = Augment(flip=chances, shift_mm=1e-6 if moved else 0.0)
    marked = np.array(mirrors_of(voxels, np.asarray(augment_images(part, config, jax.random.key(seed)).voxels)))
    for axis, chance in enumerate(chances):
        assert not marked[:, axis].any() if chance == 0 else abs(marked[:, axis].mean() - chance) < 0.31  # 5 sd


@settings(max_examples=10, deadline=None)
@given(chances=st.tuples(*[st.sampled_from([0.0, 0.5])] * 3), seed=st.integers(0, 2**31))
def test_packed_images_are_mirrored_as_whole_ones_are(chances, seed):
    shape = ImageShape(size=(4, 6, 8), patch=(2, 3, 4), channels=1, window=(0, 1))
    voxels = np.random.default_rng(seed).random((16, *shape.size, 1), np.float32)
    part = ImagePart(jnp.asarray(voxels), jnp.ones((16, 3)), jnp.ones(16, bool))
    config, key = Augment(flip=chances), jax.random.key(seed)
    packed = augment_packed(as_patches(part, shape), shape, config, key)
    made = np.zeros_like(voxels)
    for study, tokens, centres in zip(made, np.asarray(packed.patches), np.asarray(packed.centres_mm), strict=True):
        for token, centre in zip(tokens, centres, strict=True):
            corner = np.round(centre + np.array(shape.size) / 2 - np.array(shape.patch) / 2).astype(int)
            study[tuple(slice(a, a + p) for a, p in zip(corner, shape.patch))] = token.reshape(*shape.patch, 1)
    np.testing.assert_array_equal(made, augment_images(part, config, key).voxels)


def test_one_chance_is_that_of_each_axis_and_nothing_is_mirrored_unless_it_is_asked_for():
    voxels = np.random.default_rng(0).random((32, 3, 4, 5, 1), np.float32)
    part, key = ImagePart(jnp.asarray(voxels), jnp.ones((32, 3)), jnp.ones(32, bool)), jax.random.key(1)
    one, three = (augment_images(part, Augment(flip=flip), key).voxels for flip in (0.5, (0.5, 0.5, 0.5)))
    np.testing.assert_array_equal(one, three)
    np.testing.assert_array_equal(augment_images(part, Augment(), key).voxels, voxels)


def test_each_store_of_a_mix_has_mirror_images_along_its_own_axes():
    voxels, source = np.random.default_rng(0).random((96, 3, 4, 5, 1), np.float32), np.arange(96) % 3
    part = ImagePart(jnp.asarray(voxels), jnp.ones((96, 3)), jnp.ones(96, bool))
    strength = Strength.of((Augment(), Augment(flip=(0.0, 0.5, 0.0)), Augment(flip=0.5)), source)
    marked = np.array(mirrors_of(voxels, np.asarray(augment_images(part, strength, jax.random.key(2)).voxels)))
    seen = [marked[source == i].any(axis=0).tolist() for i in range(3)]
    assert seen == [[False] * 3, [False, True, False], [True] * 3]


MIRRORED = {"flip": [0, 0, 0.5]}
CAPTION = {"kind": "caption", "field": "report", "decoder": {"width": 16, "depth": 1, "heads": 2}}
OF_TABLE = {"kind": "contrastive", "between": ["image", "table"], "width": 16}
OF_TEXT = {"kind": "contrastive", "between": ["text", "image"], "width": 16}
LABEL = {"kind": "classification", "label": "disease"}


@pytest.mark.parametrize(
    ("flip", "swapped"),
    [
        (0.5, "left and right"),
        ([0, 0, 0.01], "left and right"),
        ([0, 0.5, 0], "front and back"),
        ([0.5, 0, 0], "head and foot"),
    ],
)
@pytest.mark.parametrize("task", [OF_TEXT, CAPTION], ids=["contrastive", "caption"])
def test_what_a_text_may_name_is_not_mirrored(make_experiment, task, flip, swapped):
    changes = {"data.augment": {"flip": flip}, "tasks": {"label": LABEL, "words": task}}
    with pytest.raises(UserError) as error:
        make_experiment(changes)
    assert str(error.value) == (
        f"the test: data.augment.flip: a mirror image swaps {swapped}, which texts of tasks.words may name; "
        "set flip to 0, or flip_with_text: true if no text does"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"data.augment": MIRRORED, "tasks": {"label": LABEL, "table": OF_TABLE}},
        {"data.augment": MIRRORED | {"flip_with_text": True}, "tasks": {"words": OF_TEXT}},
        {"data.augment": {}, "tasks": {"words": OF_TEXT, "caption": CAPTION}},
    ],
    ids=["no text", "said to name none", "not mirrored"],
)
def test_images_are_mirrored_where_no_text_is_aligned_with_them(make_experiment, changes):
    assert make_experiment(changes).data.augment == Augment.model_validate(changes["data.augment"])
