"""Protocols on features made by hand, where the answer is known."""

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from mmfm_jax.data.study import ColumnSpec, Schema
from mmfm_jax.evaluate import protocols
from mmfm_jax.evaluate.features import Embedding, Features

BOOTSTRAP = protocols.Bootstrap(resamples=100, seed=0)


def features(labels, fused=None, embeddings=None, same=None, seed=0):
    """Features of as many studies as there are labels, one patient each."""
    n = len(labels)
    noise = np.random.default_rng(seed).normal(size=(n, 4))
    return Features(
        rows=np.arange(n),
        patients=np.array([f"p{i}" for i in range(n)]),
        labels={"disease": np.asarray(labels)},
        fused=fused or {"fused": noise},
        heads={},
        embeddings=embeddings or {},
        same=same or {"image": np.arange(n), "text": np.arange(n)},
    )


def log_odds(scores):
    return scores[:, 1] - scores[:, 0]


def test_linear_probe_of_each_view_is_fitted_on_labelled_training_studies_alone():
    rng = np.random.default_rng(0)
    train_label, test_label = rng.integers(0, 2, 200), rng.integers(0, 2, 100)
    train_label[:50] = -1

    def view(label, informative, rng):
        return rng.normal(size=(len(label), 3)) + informative * 3 * (label == 1)[:, None]

    train, test = (
        features(label, {"fused": view(label, 1, rng), "fused_without_image": view(label, 0, rng)})
        for label in (train_label, test_label)
    )
    train.fused["fused"][:50] = 1e6  # unlabelled studies must not even move the standardisation
    probes = protocols.linear_probes(train, test, "disease", 2)
    assert set(probes) == {"linear_probe", "linear_probe_without_image"}
    assert roc_auc_score(test_label, log_odds(probes["linear_probe"])) > 0.95
    assert roc_auc_score(test_label, log_odds(probes["linear_probe_without_image"])) < 0.7

    x = train.fused["fused"][50:]
    standard = [(a - x.mean(0)) / x.std(0) for a in (x, test.fused["fused"])]
    plain = LogisticRegression(max_iter=2000).fit(standard[0], train_label[50:])
    np.testing.assert_allclose(probes["linear_probe"], plain.predict_log_proba(standard[1]), atol=1e-8)


def test_probes_and_baselines_are_left_out_when_training_holds_one_class():
    one = features([1, 1, -1, 1])
    table = protocols.Table(np.zeros((4, 1)), ("size",), (0,))
    assert protocols.linear_probes(one, one, "disease", 2) == {}
    assert protocols.baselines(table, one.labels["disease"], table, {"size": ("size",)}, ("size",), 2, 0) == {}


SCHEMA = Schema(
    columns={
        "diameter": ColumnSpec(kind="number", unit="mm"),
        "lobe": ColumnSpec(kind="category", vocabulary=("upper", "middle", "lower")),
        "empty": ColumnSpec(kind="number"),
    }
)


def test_table_keeps_missing_values_missing():
    rows = [{"diameter": 4.0, "lobe": "lower"}, {}, {"lobe": "elsewhere"}]
    table = protocols.make_table(rows, ("lobe", "diameter"), SCHEMA)
    np.testing.assert_array_equal(table.values, [[2, 4], [np.nan, np.nan], [np.nan, np.nan]])
    assert table.vocabulary_sizes == (3, 0)
    np.testing.assert_array_equal(table.select(("diameter",)).values[:, 0], [4, np.nan, np.nan])


def clinical_table(rng, label):
    """Diameter tells the label when measured; the lobe tells it a little; one column is always missing."""
    rows = []
    for value in label:
        row: dict[str, float | str] = {
            "lobe": str(rng.choice(SCHEMA.columns["lobe"].vocabulary, p=[0.6, 0.2, 0.2] if value else [0.2, 0.2, 0.6]))
        }
        if rng.random() < 0.8:
            row["diameter"] = float(rng.normal(6 + 3 * value, 2))
        rows.append(row)
    return protocols.make_table(rows, ("diameter", "lobe", "empty"), SCHEMA)


def test_baselines_equal_scikit_learn_fitted_on_the_same_rows():
    rng = np.random.default_rng(0)
    train_label, test_label = rng.integers(-1, 2, 300), rng.integers(0, 2, 150)
    train, test = clinical_table(rng, train_label), clinical_table(rng, test_label)
    whole = ("diameter", "lobe", "empty")
    fitted = protocols.baselines(
        train, train_label, test, {"diameter": ("diameter",), "mixed": ("lobe", "diameter")}, whole, 2, 0
    )
    assert set(fitted) == {"baseline_diameter", "baseline_mixed", "baseline_table"}
    known = train_label >= 0
    boosting = HistGradientBoostingClassifier(random_state=0).set_params(categorical_features=[False, True])
    boosting.fit(train.values[known, :2], train_label[known])  # the third column is empty
    np.testing.assert_allclose(fitted["baseline_table"], np.log(boosting.predict_proba(test.values[:, :2])), atol=1e-9)
    measured = ~np.isnan(test.values[:, 0])
    of_measured = log_odds(fitted["baseline_diameter"])[measured]
    assert np.array_equal(np.argsort(of_measured), np.argsort(test.values[measured, 0]))
    assert roc_auc_score(test_label, log_odds(fitted["baseline_mixed"])) > roc_auc_score(
        test_label, log_odds(fitted["baseline_diameter"])
    )


def test_a_class_that_training_lacks_is_never_predicted():
    rng = np.random.default_rng(0)
    label = rng.permutation(np.r_[np.zeros(30), np.full(30, 2)]).astype(int)
    train = features(label, {"fused": rng.normal(size=(60, 2)) + label[:, None]})
    scores = protocols.linear_probes(train, train, "disease", 3)["linear_probe"]
    assert (scores[:, 1] == -np.inf).all()
    np.testing.assert_allclose(np.exp(scores).sum(1), 1)


def test_predictions_measure_only_studies_with_the_label_and_the_input():
    test = features([0, 1, -1, 1, 0])
    scores = np.stack([np.zeros(5), np.arange(5.0)], 1)
    kept = protocols.predictions(test, "disease", ("no", "yes"), {"x": scores}, np.array([1, 1, 1, 0, 1], bool))
    assert kept.label.tolist() == [0, 1, 0] and kept.patients.tolist() == ["p0", "p1", "p4"]
    np.testing.assert_array_equal(kept.by_predictor["x"], scores[[0, 1, 4]])
    assert kept.measurable
    assert not protocols.predictions(features([1, 1]), "disease", ("no", "yes"), {"x": scores[:2]}).measurable
    assert not protocols.predictions(test, "disease", ("no", "yes"), {}).measurable


def test_gain_over_a_baseline_is_paired():
    """A fused score equal to the baseline gains exactly nothing in every resample, however wide either interval is."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 60)
    score = np.log(rng.dirichlet([1, 1], 60))
    both = protocols.Predictions(
        ("no", "yes"), label, np.arange(60), {"fused": score, "baseline_size": score, "baseline_none": 0 * score}
    )
    measures = both.measures(BOOTSTRAP)
    gain = measures["fused_minus_baseline_size/auroc"]
    assert (gain.value, gain.low, gain.high) == (0, 0, 0)
    fused, none = measures["fused/auroc"], measures["fused_minus_baseline_none/auroc"]
    assert None not in (fused.low, fused.high)
    np.testing.assert_allclose(np.array([none.low, none.high]), np.array([fused.low, fused.high]) - 0.5)
    assert fused.value == pytest.approx(roc_auc_score(label, score[:, 1]))
    assert measures["fused/calibration_error"].n == 60


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_zero_shot_is_the_mean_similarity_to_positive_minus_negative_prompts():
    rng = np.random.default_rng(0)
    images, positive, negative = (unit(rng.normal(size=(n, 8))) for n in (5, 3, 2))
    scores = protocols.zero_shot(Embedding(images, np.ones(5, bool)), positive, negative)
    expected = [np.mean([i @ p for p in positive]) - np.mean([i @ p for p in negative]) for i in images]
    np.testing.assert_allclose(log_odds(scores), expected)


def test_retrieval_is_perfect_for_equal_embeddings_and_leaves_incomplete_studies_out():
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(30, 16)))
    image, text = np.ones(30, bool), np.ones(30, bool)
    image[:4], text[26:] = False, False
    pair = {"image": Embedding(vectors, image), "text": Embedding(vectors, text)}
    measures = protocols.retrieval(features(np.zeros(30, int), embeddings={"task": pair}), "task", (1, 5), BOOTSTRAP)
    assert measures["image_to_text/recall@1"] == protocols.Measure(1, 1, 1, 22)
    assert measures["text_to_image/median_rank"] == protocols.Measure(1, 1, 1, 22)
    assert measures["image_to_text/recall@5_chance"].value == pytest.approx(5 / 22)
    assert measures["image_to_text/median_rank_chance"].value == 11.5


def test_identical_texts_share_the_expected_rank_one_way_and_cost_nothing_the_other():
    """Two studies of six differ only by rounding, which happens to favour the right partner."""
    rng = np.random.default_rng(0)
    vectors = unit(unit(rng.normal(size=(6, 16)))[[0, 0, 2, 3, 4, 5]] + 1e-4 * rng.normal(size=(6, 16)))
    pair = {modality: Embedding(vectors, np.ones(6, bool)) for modality in ("image", "text")}
    same = {"image": np.arange(6), "text": np.array([0, 0, 2, 3, 4, 5])}
    measures = protocols.retrieval(
        features(np.zeros(6, int), embeddings={"t": pair}, same=same), "t", (1, 2), BOOTSTRAP
    )
    assert measures["image_to_text/recall@1"].value == pytest.approx(5 / 6)
    assert measures["image_to_text/recall@2"].value == 1
    assert measures["text_to_image/recall@1"].value == 1


def test_retrieval_needs_two_studies():
    lone = {m: Embedding(np.ones((3, 1)), np.array([True, False, False])) for m in ("image", "text")}
    assert protocols.retrieval(features([0, 0, 0], embeddings={"t": lone}), "t", (1,), BOOTSTRAP) == {}
