"""Every way to attend, in value and gradient, against a plain float64 computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfm_jax.model import flash
from mmfm_jax.model.attention import attention
from mmfm_jax.model.flash import Segments
from mmfm_jax.parallel.mesh import AXES


@pytest.fixture
def seed() -> int:
    """Fresh in each run; a test that fails shows it."""
    fresh = int(np.random.default_rng().integers(2**32))
    print("seed", fresh)
    return fresh


def plain(inputs, weight, segments: Segments, causal: bool):
    """Softmax attention with all scores at once, and its gradients when that of its result is `weight`; float64."""
    q, k, v = inputs
    scores = np.einsum("bqhd,bkhd->bhqk", q, k)
    meets = np.ones((len(q), 1, q.shape[1], k.shape[1]), bool)
    if segments.keys is not None:
        meets &= (np.asarray(segments.keys) > 0)[:, None, None, :]
        if segments.queries is not None:
            meets &= np.asarray(segments.queries)[:, None, :, None] == np.asarray(segments.keys)[:, None, None, :]
    if causal:
        meets &= np.tril(np.ones((q.shape[1], k.shape[1]), bool))
    share = np.where(meets, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    total = share.sum(axis=-1, keepdims=True)
    share /= np.where(total == 0, 1, total)
    of_share = np.einsum("bqhd,bkhd->bhqk", weight, v)
    of_scores = share * (of_share - (share * of_share).sum(axis=-1, keepdims=True))
    return (
        np.einsum("bhqk,bkhd->bqhd", share, v),
        np.einsum("bhqk,bkhd->bqhd", of_scores, k),
        np.einsum("bhqk,bqhd->bkhd", of_scores, q),
        np.einsum("bhqk,bqhd->bkhd", share, weight),
    )


def draw(seed: int, queries: int, keys: int, mask: str, batch=2, heads=2, head=8):
    rng = np.random.default_rng(seed)
    q, k, v, weight = (rng.normal(size=(batch, n, heads, head)) for n in (queries, keys, keys, queries))
    of_keys = rng.integers(0, 2, (batch, keys)) if mask == "present" else rng.integers(0, 4, (batch, keys))
    of_queries = of_keys if queries == keys else rng.integers(0, 5, (batch, queries))
    if mask == "present":
        of_keys[0] = 0  # a study of which nothing is there
    segments = {
        "none": Segments(None, None),
        "present": Segments(None, jnp.asarray(of_keys)),
        "packed": Segments(jnp.asarray(of_queries), jnp.asarray(of_keys)),
    }[mask]
    return (q, k, v), weight, segments


def got(inputs, weight, segments, causal, implementation):
    @jax.jit
    def both(q, k, v, segments, weight):
        out, gradient = jax.vjp(
            lambda q, k, v: attention(q, k, v, segments=segments, causal=causal, implementation=implementation), q, k, v
        )
        return out, *gradient(weight)

    return both(*(jnp.asarray(x, jnp.float32) for x in inputs), segments, jnp.asarray(weight, jnp.float32))


def assert_equal(mine, reference, atol=3e-5):
    for name, a, b in zip(("out", "dq", "dk", "dv"), mine, reference, strict=True):
        np.testing.assert_allclose(a, b, atol=atol, err_msg=name)


CASES = [(24, 24, "none", False), (24, 24, "none", True)]
CASES += [(queries, 24, mask, False) for queries in (24, 8) for mask in ("present", "packed")]
CASES += [(23, 23, "packed", True), (23, 17, "none", False), (13, 23, "present", False)]  # the last piece is not full


@pytest.mark.parametrize("queries, keys, mask, causal", CASES)
def test_blocks_and_all_at_once_equal_float64(queries, keys, mask, causal, seed, monkeypatch):
    monkeypatch.setattr(flash, "SCORES", 2 * 2 * keys * 6)  # 6 queries at a time
    inputs, weight, segments = draw(seed, queries, keys, mask)
    reference = plain(inputs, weight, segments, causal)
    for implementation in ("xla", "blocks"):
        assert_equal(got(inputs, weight, segments, causal, implementation), reference)


@given(st.integers(1, 4), st.integers(1, 10**6), st.integers(1, 16), st.integers(1, 10**6))
def test_no_more_pieces_are_made_than_the_scores_need(batch, queries, heads, keys):
    count, size = flash.Pieces.of((batch, queries, heads, 64), keys)[1:]
    per_query = batch * heads * keys
    assert size == 1 or size * per_query <= flash.SCORES
    assert count == 1 or (count - 1) * max(flash.SCORES // per_query, 1) < queries  # one fewer would be too large
    assert 0 <= count * size - queries < count  # what is filled up is less than a query a piece


def test_a_prime_number_of_queries_takes_as_many_pieces_as_its_neighbour():
    prime, even = (flash.Pieces.of((16, tokens, 6, 64), tokens).count for tokens in (1733, 1728))
    assert (prime, even) == (18, 18)


@given(st.integers(1, 10**6))
def test_a_tile_is_wide_and_costs_at_most_a_tenth_of_padding(tokens):
    padded, tile = flash.tile(tokens)
    least = -(-tokens // 128) * 128
    assert padded % tile == 0 and padded - tokens < tile <= 1024 and tile % 128 == 0
    assert least <= padded <= 1.1 * least
    assert tile >= 384 or tile == padded == least


def test_seventeen_times_128_tokens_take_wide_tiles():
    assert flash.tile(2100) == (2304, 768)


def test_the_kernel_equals_float64_padded_beyond_the_next_128(seed, monkeypatch):
    monkeypatch.setattr(flash, "LARGEST_TILE", 256)
    inputs, weight, segments = draw(seed, 600, 130, "packed", batch=1, heads=1)
    q, k = (jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in inputs[:2])
    assert flash._Shape.of(q, k, False)[:4] == (768, 256, 256, 256)
    assert_equal(got(inputs, weight, segments, False, "splash"), plain(inputs, weight, segments, False), 2e-4)


@pytest.mark.parametrize(
    "queries, keys, mask, causal",
    [(256, 256, "none", False), (200, 130, "present", False), (150, 150, "packed", True)],
)
def test_the_tpu_kernel_equals_float64_padded_and_not(queries, keys, mask, causal, seed):
    inputs, weight, segments = draw(seed, queries, keys, mask, batch=2, heads=1)
    assert_equal(got(inputs, weight, segments, causal, "splash"), plain(inputs, weight, segments, causal), 2e-4)


def mesh_of(**sizes):
    shape = [sizes.get(axis, 1) for axis in AXES]
    return jax.sharding.Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), AXES)


RING, ALL = {"sequence": 8}, {"fsdp": 2, "sequence": 2, "tensor": 2}


@pytest.mark.parametrize(
    "sizes, queries, mask",
    [(RING, 32, "none"), (RING, 32, "packed"), (RING, 5, "packed"), (ALL, 32, "present"), (ALL, 5, "present")],
    ids=str,
)
def test_tokens_split_over_devices_equal_float64(sizes, queries, mask, seed):
    inputs, weight, segments = draw(seed, queries, 32, mask)
    with jax.set_mesh(mesh_of(**sizes)):
        mine = got(inputs, weight, segments, False, "blocks")
    assert_equal(mine, plain(inputs, weight, segments, False))


def test_a_ring_sends_to_its_neighbour_and_gathers_nothing():
    inputs, weight, segments = draw(0, 32, 32, "packed")
    given = tuple(jnp.asarray(x, jnp.float32) for x in inputs)

    def loss(q, k, v):
        return (attention(q, k, v, segments=segments, implementation="blocks") * weight).sum()

    with jax.set_mesh(mesh_of(sequence=8)):
        tokens = jax.sharding.PartitionSpec(None, "sequence")
        split = tuple(jax.device_put(x, jax.sharding.NamedSharding(mesh_of(sequence=8), tokens)) for x in given)
        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*split).compile().as_text() or ""
    assert "collective-permute" in text
    assert "all-gather" not in text


def test_the_kernel_and_blocks_agree_over_a_ring(seed):
    inputs, weight, segments = draw(seed, 256, 256, "present", batch=1, heads=1)
    with jax.set_mesh(mesh_of(sequence=2)):
        mine = got(inputs, weight, segments, False, "splash")
    assert_equal(mine, plain(inputs, weight, segments, False), 2e-4)


def test_no_array_of_all_queries_by_all_keys_is_made_in_blocks():
    q = jax.ShapeDtypeStruct((1, 2**13, 2, 8), jnp.float32)

    def loss(q, k, v):
        return attention(q, k, v, implementation="blocks").sum()

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, q, q))
    assert f"{2**13},{2**13}]" not in text and f"{2**12},{2**13}]" not in text
    assert f",{2**13}]" in text
