"""Patches and where they are."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmfm_jax.config.model import VisionConfig
from mmfm_jax.data.batch import ImagePart, ImageShape, PackedPart
from mmfm_jax.model.vision import VisionEncoder, as_patches, patch_centres_mm, patches

SHAPE = ImageShape(size=(4, 6, 8), patch=(2, 3, 4), channels=2, window=(0, 1))


def test_patches_are_the_blocks_of_the_volume_in_order():
    voxels = np.random.default_rng(0).normal(size=(3, 4, 6, 8, 2))
    got = np.asarray(patches(jnp.asarray(voxels), SHAPE))
    index = 0
    for z in range(0, 4, 2):
        for y in range(0, 6, 3):
            for x in range(0, 8, 4):
                block = voxels[:, z : z + 2, y : y + 3, x : x + 4].reshape(3, -1)
                np.testing.assert_allclose(got[:, index], block, rtol=1e-6)
                index += 1
    assert got.shape[1] == index


def test_centres_are_in_millimetres_from_the_middle_of_the_crop():
    spacing = np.array([[2.0, 1.0, 0.5], [1.0, 1.0, 1.0]], np.float32)
    got = np.asarray(patch_centres_mm(jnp.asarray(spacing), SHAPE))
    assert got.shape == (2, 8, 3)
    np.testing.assert_allclose(got.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(got[0, 0], [-2.0, -1.5, -1.0])
    np.testing.assert_allclose(got[1, -1], [1.0, 1.5, 2.0])


def encoder(size, patch):
    shape = ImageShape(size=size, patch=patch, channels=1, window=(0, 1))
    config = VisionConfig(width=24, depth=2, heads=2, registers=2)
    return VisionEncoder(config, {"ct": shape}, jnp.dtype("float32"), nnx.Rngs(params=0)), shape


def test_spacing_matters_and_a_single_slice_is_2d():
    model, shape = encoder((1, 8, 8), (1, 4, 4))
    voxels = np.random.default_rng(0).random((2, *shape.size, 1), np.float32)
    near, far = (
        model("ct", ImagePart(jnp.asarray(voxels), jnp.full((2, 3), spacing), jnp.ones(2, bool))).x
        for spacing in (1.0, 3.0)
    )
    assert near.shape == (2, 2 + 4, 24)
    assert np.abs(np.asarray(near) - np.asarray(far)).max() > 1e-3


def test_the_encoder_sees_the_kept_patches_alone_wherever_they_stand():
    """The tokens of kept patches do not depend on the voxels of others, nor on the order in which they are named."""
    model, shape = encoder((4, 8, 8), (2, 4, 4))
    rng = np.random.default_rng(1)
    voxels = rng.random((2, *shape.size, 1), np.float32)
    kept = jnp.array([[0, 3, 5], [1, 2, 7]])

    def encode(voxels, kept):
        whole = as_patches(ImagePart(jnp.asarray(voxels), jnp.ones((2, 3)), jnp.ones(2, bool)), shape)
        content, centres = (jnp.take_along_axis(x, kept[..., None], 1) for x in (whole.patches, whole.centres_mm))
        return np.asarray(model("ct", PackedPart(content, centres, None, whole.present)).x)

    first = encode(voxels, kept)
    changed = voxels.copy()
    changed[0, :2, :4, 4:] += 1  # patch 1, hidden in the first study and kept in the second
    np.testing.assert_array_equal(encode(changed, kept)[0], first[0])
    assert np.abs(encode(np.concatenate([changed[:1], changed[:1]]), kept)[1] - first[1]).max() > 1e-3
    turned = encode(voxels, kept[:, ::-1])
    np.testing.assert_allclose(turned[:, 2:], first[:, 2:][:, ::-1], atol=1e-5)
