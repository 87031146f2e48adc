"""Attention and positions against plain float64 computations."""

from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_jax.model import position
from mmfm_jax.model.attention import attention
from mmfm_jax.model.flash import Segments
from mmfm_jax.model.position import angles_1d, angles_3d, rotate, wavelengths

SEEDS = st.integers(0, 2**32 - 1)


def plain_attention(q, k, v, present):
    """Softmax attention in float64, a query and a head at a time."""
    batch, queries, heads, _ = q.shape
    out = np.zeros(q.shape)
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, present[b], h], v[b, present[b], h]
            for i in range(queries if len(keys) else 0):
                score = keys.astype(np.float64) @ q[b, i, h]
                weight = np.exp(score - score.max())
                out[b, i, h] = weight @ values / weight.sum()
    return out


@settings(max_examples=15)
@given(seed=SEEDS)
def test_attention_is_softmax_over_the_keys_present_and_zero_without_any(seed):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(3, tokens, 2, 4)).astype(np.float32) for tokens in (5, 7, 7))
    present = rng.random((3, 7)) < 0.6
    present[0] = False
    k[~present] = v[~present] = 1e3  # must not matter
    got = attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), Segments.present(present))
    np.testing.assert_allclose(got, plain_attention(q, k, v, present), atol=2e-5)
    k, v = k % 2, v % 2
    everything = attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v))
    np.testing.assert_allclose(everything, plain_attention(q, k, v, np.ones((3, 7), bool)), atol=2e-5)


@settings(max_examples=15)
@given(seed=SEEDS)
def test_causal_attention_is_that_over_the_keys_present_up_to_the_query(seed):
    rng = np.random.default_rng(seed)
    q, k, v = rng.normal(size=(3, 3, 6, 2, 4)).astype(np.float32)
    present = rng.random((3, 6)) < 0.6  # the first queries often have no key before them
    masked = attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), Segments.present(present), causal=True)
    free = attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), causal=True)
    for at in range(6):
        for got, held in ((masked, present), (free, np.ones_like(present))):
            expected = plain_attention(q[:, : at + 1], k[:, : at + 1], v[:, : at + 1], held[:, : at + 1])
            np.testing.assert_allclose(got[:, at], expected[:, at], atol=2e-5)


@pytest.mark.parametrize("where", ["cpu", "tpu"])
@settings(max_examples=15)
@given(seed=SEEDS)
def test_rotary_is_the_closed_form_in_millimetres(where, seed):
    """Feature i and i + half form a complex number that is multiplied by exp(2 pi i x / wavelength)."""
    rng = np.random.default_rng(seed)
    head, range_mm = 20, (3.0, 300.0)
    x, at = rng.normal(size=(2, 6, 3, head)), rng.uniform(-200, 200, (2, 6, 3))
    with patch.object(position, "platform", lambda: where):
        got = rotate(jnp.asarray(x, jnp.float32), angles_3d(jnp.asarray(at, jnp.float32), head, range_mm))
    each = head // 6
    lengths = range_mm[0] * (range_mm[1] / range_mm[0]) ** (np.arange(each) / (each - 1))
    turn = np.ones((2, 6, 1, head // 2), complex)
    for axis in range(3):
        for i, length in enumerate(lengths):
            turn[..., 0, axis * each + i] = np.exp(2j * np.pi * at[..., axis] / length)
    z = (x[..., : head // 2] + 1j * x[..., head // 2 :]) * turn
    np.testing.assert_allclose(got, np.concatenate([z.real, z.imag], -1), atol=5e-4)


@settings(max_examples=15)
@given(seed=SEEDS)
def test_scores_depend_on_where_tokens_are_to_one_another_alone(seed):
    rng = np.random.default_rng(seed)
    q, k = (jnp.asarray(rng.normal(size=(1, 4, 1, 12)), jnp.float32) for _ in range(2))
    at = jnp.asarray(rng.uniform(-50, 50, (1, 4, 3)), jnp.float32)

    def scores(at):
        angles = angles_3d(at, 12, (8.0, 500.0))
        return jnp.einsum("bqhd,bkhd->bqk", rotate(q, angles), rotate(k, angles))

    np.testing.assert_allclose(scores(at), scores(at + jnp.array([11.0, -7.0, 3.0])), atol=1e-3)
    assert np.abs(scores(at) - scores(at * 1.1)).max() > 1e-3


def test_text_angles_are_those_of_roformer():
    angles = angles_1d(5, 8)
    expected = np.arange(5)[:, None] / 10_000 ** (np.arange(4) / 3)
    np.testing.assert_allclose(angles, expected, rtol=1e-6)


def test_a_single_pair_has_the_shortest_wavelength():
    assert wavelengths(1, 4.0, 100.0).tolist() == [4.0]


def test_attention_has_no_gradient_into_absent_keys():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 3, 1, 4)) for i in range(3))
    present = jnp.array([[True, False, True]])
    dk, dv = jax.grad(lambda k, v: attention(q, k, v, Segments.present(present)).sum(), argnums=(0, 1))(k, v)
    assert not np.asarray(dk)[0, 1].any() and not np.asarray(dv)[0, 1].any()
    assert np.asarray(dv)[0, 0].any()
