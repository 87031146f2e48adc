"""Finding a partner, where the answer is known."""

import numpy as np
import pytest

from mmfm_jax.metrics.bootstrap import Bootstrap
from mmfm_jax.metrics.retrieval import Side, gallery, ranks_both_ways, retrieval, zero_shot
from mmfm_jax.metrics.statistics import Measure

BOOTSTRAP = Bootstrap(resamples=100, seed=0)


def measured(sides, patients, recall_at, most=100):
    one, other = sides.values()
    among = gallery(one.present & other.present, patients, most)
    return retrieval(ranks_both_ways(sides, among), patients, among, recall_at, BOOTSTRAP)


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
    measures = measured(pair, np.arange(30), (1, 5))
    assert measures["image_to_text/recall@1"] == Measure(1, 1, 1, 22)
    assert measures["text_to_image/median_rank"] == Measure(1, 1, 1, 22)
    assert measures["image_to_text/recall@5_chance"].value == pytest.approx(5 / 22)
    assert measures["image_to_text/median_rank_chance"].value == 11.5


def test_identical_texts_share_the_expected_rank_one_way_and_cost_nothing_the_other():
    """Of six studies two differ a little, which happens to favour the right partner."""
    rng = np.random.default_rng(0)
    vectors = unit(unit(rng.normal(size=(6, 16)))[[0, 0, 2, 3, 4, 5]] + 1e-2 * rng.normal(size=(6, 16)))
    same = {"image": np.arange(6), "text": np.array([0, 0, 2, 3, 4, 5])}
    pair = {modality: Side(vectors, np.ones(6, bool), alike) for modality, alike in same.items()}
    measures = measured(pair, np.arange(6), (1, 2))
    assert measures["image_to_text/recall@1"].value == pytest.approx(5 / 6)
    assert measures["image_to_text/recall@2"].value == 1
    assert measures["text_to_image/recall@1"].value == 1


def test_of_a_large_split_whole_patients_are_drawn_the_same_each_time():
    patients, present = np.arange(300) // 3, np.arange(300) % 10 > 0
    among = gallery(present, patients, 60)
    assert len(among.studies) == 60 and among.of == 270 and among.drawn and present[among.studies].all()
    cut = [
        p for p in set(patients[among.studies]) if (patients[among.studies] == p).sum() < present[patients == p].sum()
    ]
    assert len(cut) <= 1
    assert set(gallery(present, patients, 30).studies) < set(among.studies)
    order = np.random.default_rng(0).permutation(300)
    shuffled = gallery(present[order], patients[order], 60)
    assert len(set(patients[order][shuffled.studies]) ^ set(patients[among.studies])) == 0
    whole = gallery(present, patients, 270)
    np.testing.assert_array_equal(whole.studies, np.flatnonzero(present))
    assert not whole.drawn


def test_a_drawn_gallery_says_so_and_its_chance_is_of_its_size():
    rng = np.random.default_rng(0)
    vectors, patients = unit(rng.normal(size=(30, 16))), np.arange(30)
    pair = {m: Side(vectors, np.ones(30, bool), np.arange(30)) for m in ("image", "text")}
    measures = measured(pair, patients, (1,), most=12)
    assert measures["image_to_text/recall@1"] == Measure(1, 1, 1, 12)
    assert measures["image_to_text/recall@1_chance"].value == pytest.approx(1 / 12)
    assert measures["text_to_image/gallery_share"] == Measure(0.4, None, None, 12)
    assert not any("gallery" in name for name in measured(pair, patients, (1,)))


def test_an_embedding_that_is_nan_makes_every_measure_nan():
    vectors = np.eye(5)
    vectors[3] = np.nan
    pair = {
        "image": Side(np.eye(5), np.ones(5, bool), np.arange(5)),
        "text": Side(vectors, np.ones(5, bool), np.arange(5)),
    }
    for name, found in measured(pair, np.arange(5), (1,)).items():
        assert np.isnan(found.value) != name.endswith("_chance")
    absent = {side: Side(of.vectors, np.arange(5) != 3, of.same) for side, of in pair.items()}
    assert measured(absent, np.arange(5), (1,))["image_to_text/recall@1"].value == 1
