"""Ranks in a gallery against plain loops, with ties, in blocks, and of what is not finite."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_jax.metrics import ranks as module
from mmfm_jax.metrics.ranks import in_steps, retrieval_ranks

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=50, deadline=None)


def brute_force_found(scores, own, k):
    """Share of all orders of the tied entries in which `own` is among the first k, by counting places."""
    places = [1 + (scores > scores[own]).sum() + t for t in range((scores == scores[own]).sum())]
    return np.mean([place <= k for place in places])


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """So that galleries of some tens are several blocks, most of them not full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 8)
        patch.setattr(module, "LEAST", 8)
        yield


@few
@given(seeds, st.integers(1, 25), st.integers(1, 6))
def test_retrieval_equals_brute_force_over_every_place_a_tie_may_take(seed, n, k):
    rng = np.random.default_rng(seed)
    same = rng.integers(0, max(1, n // 2), n)
    query = rng.integers(-2, 3, (n, 3)).astype(np.float32)
    gallery = rng.integers(-2, 3, (n, 3)).astype(np.float32)[same]
    ranks = retrieval_ranks(query, gallery, same)
    for i, scores in enumerate(query @ gallery.T):
        assert ranks.found(k)[i] == pytest.approx(brute_force_found(scores, i, k))
        places = [1 + (scores > scores[i]).sum() + t for t in range((scores == scores[i]).sum())]
        assert ranks.expected[i] == np.mean(places)


def unit(rng, n, width):
    x = rng.normal(size=(n, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@few
@given(seeds, st.integers(1, 40), st.sampled_from([1, 5, 200]))
def test_scores_are_exact_products_of_whole_steps_and_near_those_of_the_vectors(seed, n, width):
    rng = np.random.default_rng(seed)
    query, gallery = unit(rng, n, width), unit(rng, n, width)
    ranks = retrieval_ranks(query, gallery, np.arange(n))
    exact = in_steps(query).astype(int) @ in_steps(gallery).T.astype(int)
    own = exact.diagonal()[:, None]
    np.testing.assert_array_equal(ranks.above, (exact > own).sum(axis=1))
    np.testing.assert_array_equal(ranks.tied, (exact == own).sum(axis=1) - 1)
    true = query.astype(float) @ gallery.T.astype(float)
    lead = true - true.diagonal()[:, None]
    off = 2 * width**0.5 * 2.0**-14  # of a difference of scores at most, each vector being off by half a step a number
    assert ((lead > off).sum(axis=1) <= ranks.above).all()
    assert (ranks.above + ranks.tied + 1 <= (lead >= -off).sum(axis=1)).all()


def test_a_model_that_maps_all_studies_to_one_point_ranks_by_chance():
    n = 21
    point = np.repeat(unit(np.random.default_rng(0), 1, 100), n, axis=0)
    ranks = retrieval_ranks(point, point, np.arange(n))
    assert (ranks.above == 0).all() and (ranks.tied == n - 1).all()


@pytest.mark.parametrize("spoilt", [np.nan, np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_vector_that_is_not_finite_leaves_no_rank(spoilt, side):
    sides = np.stack([np.eye(9)] * 2)
    sides[side, 4, 2] = spoilt
    ranks = retrieval_ranks(sides[0], sides[1], np.arange(9))
    assert np.isnan(ranks.expected).all() and np.isnan(ranks.found(5)).all()


def test_equal_inputs_tie_even_when_rounding_parted_their_embeddings():
    query = np.eye(2)[[0, 0, 1]]
    gallery = np.array([[1.0, 0], [1.0 + 1e-6, 0], [0, 1]])
    ranks = retrieval_ranks(query, gallery, np.array([7, 7, 9]))
    assert ranks.tied.tolist() == [1, 1, 0]
    np.testing.assert_allclose(ranks.found(1), [0.5, 0.5, 1])


def test_an_uninformative_query_finds_its_partner_exactly_as_often_as_chance():
    n = 40
    ranks = retrieval_ranks(np.zeros((n, 3)), np.random.default_rng(0).normal(size=(n, 3)), np.arange(n))
    np.testing.assert_allclose(ranks.found(5), 5 / n)
    assert (ranks.expected == (n + 1) / 2).all()
