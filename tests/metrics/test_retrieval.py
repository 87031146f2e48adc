"""Finding a partner, where the answer is known."""

import numpy as np
import pytest

from mmfm_jax.metrics.bootstrap import Bootstrap
from mmfm_jax.metrics.retrieval import Side, retrieval, zero_shot
from mmfm_jax.metrics.statistics import Measure

BOOTSTRAP = Bootstrap(resamples=100, seed=0)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_zero_shot_is_the_mean_similarity_to_positive_minus_negative_prompts():
    rng = np.random.default_rng(0)
    images, positive, negative = (unit(rng.normal(size=(n, 8))) for n in (5, 3, 2))
    scores = zero_shot(images, positive, negative)
    expected = [np.mean([i @ p for p in positive]) - np.mean([i @ p for p in negative]) for i in images]
    np.testing.assert_allclose(scores[:, 1] - scores[:, 0], expected)


def test_retrieval_is_perfect_for_equal_embeddings_and_leaves_incomplete_studies_out():
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(30, 16)))
    image, text = np.ones(30, bool), np.ones(30, bool)
    image[:4], text[26:] = False, False
    pair = {"image": Side(vectors, image, np.arange(30)), "text": Side(vectors, text, np.arange(30))}
    measures = retrieval(pair, np.arange(30), (1, 5), BOOTSTRAP)
    assert measures["image_to_text/recall@1"] == Measure(1, 1, 1, 22)
    assert measures["text_to_image/median_rank"] == Measure(1, 1, 1, 22)
    assert measures["image_to_text/recall@5_chance"].value == pytest.approx(5 / 22)
    assert measures["image_to_text/median_rank_chance"].value == 11.5


def test_identical_texts_share_the_expected_rank_one_way_and_cost_nothing_the_other():
    """Two studies of six differ only by rounding, which happens to favour the right partner."""
    rng = np.random.default_rng(0)
    vectors = unit(unit(rng.normal(size=(6, 16)))[[0, 0, 2, 3, 4, 5]] + 1e-4 * rng.normal(size=(6, 16)))
    same = {"image": np.arange(6), "text": np.array([0, 0, 2, 3, 4, 5])}
    pair = {modality: Side(vectors, np.ones(6, bool), alike) for modality, alike in same.items()}
    measures = retrieval(pair, np.arange(6), (1, 2), BOOTSTRAP)
    assert measures["image_to_text/recall@1"].value == pytest.approx(5 / 6)
    assert measures["image_to_text/recall@2"].value == 1
    assert measures["text_to_image/recall@1"].value == 1


def test_retrieval_needs_two_studies():
    lone = {m: Side(np.ones((3, 1)), np.array([True, False, False]), np.arange(3)) for m in ("image", "text")}
    assert retrieval(lone, np.arange(3), (1,), BOOTSTRAP) == {}
