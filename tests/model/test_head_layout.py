"""The kernel that cuts, normalises and turns heads, interpreted, against the plain form of it."""

from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfm_jax.model import head_layout as heads
from mmfm_jax.model.head_layout import fused, heads_of
from mmfm_jax.parallel.mesh import AXES


def both(x, count, scale, angles, weights):
    """Heads and gradients by the kernel, and by the plain form."""

    def of(function):
        def loss(x, scale):
            out = function(x, count, scale, angles)
            return (out * weights).sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, scale)
        return jax.tree.map(np.asarray, (out, *gradients))

    return of(fused), of(heads_of)


@pytest.mark.parametrize(
    ("batch", "tokens", "count", "head", "turned"),
    [(2, 384, 3, 128, "each"), (2, 300, 1, 256, "all"), (3, 7, 2, 128, None), (1, 130, 19, 128, "all")],
)
def test_the_kernel_is_norm_then_rotation_with_its_gradients(batch, tokens, count, head, turned, seed=None):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(batch, tokens, count * head)) * rng.uniform(0.1, 9), jnp.float32)
    scale = jnp.asarray(rng.uniform(0.5, 2, head), jnp.float32)
    rows = {"each": batch, "all": 1, None: 0}[turned]
    angles = jnp.asarray(rng.uniform(-9, 9, (rows, tokens, head // 2)), jnp.float32) if rows else None
    weights = jnp.asarray(rng.normal(size=(batch, tokens, count, head)), jnp.float32)
    # Three blocks of tokens and, of 19 heads, of heads, the last of them not full.
    with patch.object(heads, "BLOCK", 4 * 128 * count * head), patch.object(heads, "LARGEST_BLOCK", 4 * 128**2 * 8):
        kernel, plain = both(x, count, scale, angles, weights)
    for mine, expected in zip(kernel, plain, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_the_kernel_on_a_mesh_is_the_kernel_on_one_device(seed=None):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(2, 32, 512)), jnp.float32)
    scale = jnp.asarray(rng.uniform(0.5, 2, 128), jnp.float32)
    angles = jnp.asarray(rng.uniform(-9, 9, (2, 32, 64)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(2, 32, 4, 128)), jnp.float32)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(1, 2, 2, 2), AXES)
    with jax.set_mesh(mesh):
        kernel, plain = both(x, 4, scale, angles, weights)
    for mine, expected in zip(kernel, plain, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_cut_and_join_swap_heads_and_tokens(seed=None):
    x, y = np.random.default_rng(seed).normal(size=(2, 2, 300, 11, 128)).astype(np.float32)
    with patch.object(heads, "BLOCK", 0), patch.object(heads, "LARGEST_BLOCK", 4 * 128**2 * 8):
        by_head = jax.jit(heads.cut)(x)
        np.testing.assert_array_equal(by_head, x.swapaxes(1, 2))
        np.testing.assert_array_equal(jax.jit(heads.join)(by_head), x)
        same, inner = jax.jit(heads.cut_with_inner)(x, y)
    np.testing.assert_array_equal(same, by_head)
    np.testing.assert_allclose(inner, (x.astype(float) * y).sum(-1).swapaxes(1, 2), atol=1e-4)
