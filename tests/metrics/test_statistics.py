"""Metrics against scikit-learn, and against plain loops that do what the definition says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import r2_score, roc_auc_score

from mmfm_jax.metrics import statistics as metrics
from mmfm_jax.metrics.bootstrap import Bootstrap

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=50, deadline=None)


def bounds(measure):
    """The interval, which these tests know to be there."""
    assert measure.low is not None and measure.high is not None
    return np.array([measure.low, measure.high])


def width(measure):
    low, high = bounds(measure)
    return high - low


def two_classes(rng, n):
    """Labels with both classes present."""
    return rng.permutation(np.arange(n) % 2 if n < 4 else np.r_[0, 1, rng.integers(0, 2, n - 2)])


@few
@given(seeds, st.integers(2, 60), st.sampled_from([2, 5, 10_000]))
def test_auroc_equals_scikit_learn_with_ties_and_weights(seed, n, levels):
    rng = np.random.default_rng(seed)
    label = two_classes(rng, n)
    scores = rng.integers(0, levels, n) / levels
    weights = rng.integers(1, 5, (3, n))
    ours = metrics.auroc(scores, label == 1, weights)
    theirs = [roc_auc_score(label, scores, sample_weight=w) for w in weights]
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
    np.testing.assert_allclose(metrics.auroc(scores, label == 1, np.ones((1, n))), roc_auc_score(label, scores))


@few
@given(seeds, st.integers(2, 40))
def test_auroc_of_a_resample_equals_scikit_learn_on_the_repeated_studies(seed, n):
    rng = np.random.default_rng(seed)
    label, scores = two_classes(rng, n), rng.integers(0, 4, n).astype(float)
    drawn = rng.integers(0, n, n)
    ours = metrics.auroc(scores, label == 1, np.bincount(drawn, minlength=n)[None])[0]
    if len(set(label[drawn])) == 2:
        assert ours == pytest.approx(roc_auc_score(label[drawn], scores[drawn]))
    else:
        assert np.isnan(ours)


@few
@given(seeds, st.integers(3, 5))
def test_several_classes_are_the_mean_of_one_against_the_rest(seed, classes):
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.r_[np.arange(classes), rng.integers(0, classes, 30)])
    logits = rng.normal(size=(len(label), classes))
    log_probability = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ours = metrics.class_auroc(log_probability, label, np.ones((1, len(label))))[0]
    assert ours == pytest.approx(roc_auc_score(label, np.exp(log_probability), multi_class="ovr"))


def test_a_class_that_a_resample_lacks_is_left_out_of_its_mean():
    label = np.array([0, 0, 1, 1, 2])
    log_probability = np.log(np.random.default_rng(0).dirichlet(np.ones(3), 5))
    without = np.array([[1, 1, 1, 1, 0]])
    one, two = (metrics.auroc(log_probability[:, c], label == c, without)[0] for c in (0, 1))
    assert metrics.class_auroc(log_probability, label, without)[0] == pytest.approx((one + two) / 2)


def test_confident_probabilities_do_not_saturate_into_ties():
    logits = np.array([20.0, 40.0, 60.0, 80.0])
    log_probability = np.stack([-logits, np.zeros(4)], 1)  # probability 1.0 in float64 from 40 on
    label = np.array([0, 0, 1, 1])
    assert metrics.class_auroc(log_probability, label, np.ones((1, 4)))[0] == 1.0


@few
@given(seeds, st.integers(1, 80))
def test_calibration_error_equals_a_plain_loop(seed, n):
    rng = np.random.default_rng(seed)
    probability = rng.choice([rng.random(n), np.round(rng.random(n), 1)])  # also on the edges of bins
    probability[0] = 1
    outcome = rng.random(n) < probability - (np.arange(n) == 0)  # the sure one is wrong
    weights = rng.integers(0, 3, (2, n)) + (np.arange(n) == 0)
    ours = metrics.calibration_error(metrics.Confidence(probability, outcome), weights)
    for row, value in zip(weights, ours):
        p, y = np.repeat(probability, row), np.repeat(outcome, row)
        expected = 0.0
        for b in range(10):
            inside = np.array([min(int(v * 10), 9) == b for v in p])
            if inside.any():
                expected += inside.mean() * abs(p[inside].mean() - y[inside].mean())
        assert value == pytest.approx(expected)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 30))
def test_explained_variance_equals_scikit_learn_with_weights(seed, n):
    rng = np.random.default_rng(seed)
    true, predicted = rng.normal(5, 2, (2, n))
    weights = rng.integers(1, 4, (3, n))
    ours = metrics.explained_variance(predicted, true, weights)
    theirs = [r2_score(true, predicted, sample_weight=of) for of in weights]
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)
    assert np.isnan(metrics.explained_variance(predicted, np.full(n, 5.0), weights)).all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(2, 4), true=st.floats(0.2, 8))
def test_the_temperature_of_claims_that_are_too_sure_is_found(seed, classes, true):
    """Labels drawn by a softmax whose logits the claims give `true` times."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (20_000, classes))
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    label = (probability.cumsum(axis=1) < rng.random((len(logits), 1))).sum(axis=1)
    label = np.minimum(label, classes - 1)
    claimed = metrics.tempered(logits, 1 / true)
    np.testing.assert_allclose(np.exp(claimed).sum(axis=1), 1)
    found = metrics.fitted_temperature(claimed, label)
    assert found == pytest.approx(true, rel=0.1)
    np.testing.assert_allclose(np.exp(metrics.tempered(claimed, true)), probability, atol=1e-9)
    np.testing.assert_array_equal(claimed.argmax(axis=1), metrics.tempered(claimed, found).argmax(axis=1))


@pytest.mark.parametrize("claimed, label", [(np.zeros((3, 2)), [1, 1, 1]), (np.full((2, 2), np.nan), [0, 1])])
def test_no_temperature_is_fitted_on_one_class_or_to_nan(claimed, label):
    assert metrics.fitted_temperature(claimed, np.array(label)) == 1.0


def test_confidence_is_of_the_second_of_two_classes_and_of_the_likeliest_of_many():
    two = metrics.confidence(np.log([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1]))
    np.testing.assert_allclose(two.probability, [0.1, 0.8])
    assert two.outcome.tolist() == [False, True]
    three = metrics.confidence(np.log([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]), np.array([1, 2]))
    np.testing.assert_allclose(three.probability, [0.5, 0.7])
    assert three.outcome.tolist() == [False, True]


@few
@given(seeds, st.integers(1, 30))
def test_weighted_mean_and_median_are_those_of_repeated_values(seed, n):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 10, n) / 2
    weights = rng.integers(0, 4, (3, n)) + (np.arange(n) == 0)
    repeated = [np.repeat(values, w) for w in weights]
    np.testing.assert_allclose(metrics.weighted_mean(values, weights), [r.mean() for r in repeated])
    np.testing.assert_allclose(metrics.weighted_median(values, weights), [np.median(r) for r in repeated])


def test_the_median_of_a_nan_is_nan_whatever_the_others_are():
    assert np.isnan(
        metrics.weighted_median(np.array([1.0, np.nan, 1, 1, 1]), np.array([[1, 1, 1, 1, 1], [1, 0, 9, 9, 9]]))
    ).all()


def test_interval_of_independent_studies_is_that_of_a_plain_bootstrap():
    rng = np.random.default_rng(0)
    values = rng.normal(size=300)
    ours = metrics.measure(lambda w: metrics.weighted_mean(values, w), np.arange(300).astype(str), 4000, seed=1)
    plain = np.percentile([values[rng.integers(0, 300, 300)].mean() for _ in range(4000)], [2.5, 97.5])
    assert ours.value == pytest.approx(values.mean()) and ours.n == 300
    np.testing.assert_allclose(bounds(ours), plain, atol=0.012)  # two Monte Carlo errors of a percentile


def test_studies_of_one_patient_count_once_in_the_width_of_the_interval():
    rng = np.random.default_rng(0)
    values = rng.normal(size=100)
    once = metrics.measure(lambda w: metrics.weighted_mean(values, w), np.arange(100), 2000, seed=0)
    nine = np.repeat(values, 9)
    copied = metrics.measure(lambda w: metrics.weighted_mean(nine, w), np.repeat(np.arange(100), 9), 2000, seed=0)
    apart = metrics.measure(lambda w: metrics.weighted_mean(nine, w), np.arange(900), 2000, seed=0)
    assert width(copied) == pytest.approx(width(once))
    assert width(apart) == pytest.approx(width(once) / 3, rel=0.15)


def test_interval_does_not_depend_on_how_resamples_are_chunked(monkeypatch):
    values, patients = np.random.default_rng(0).normal(size=40), np.arange(40) // 3
    whole = metrics.measure(lambda w: metrics.weighted_mean(values, w), patients, 100, seed=3)
    monkeypatch.setattr(metrics, "BLOCK", 40 * 7)
    assert metrics.measure(lambda w: metrics.weighted_mean(values, w), patients, 100, seed=3) == whole


def test_statistics_of_the_same_studies_share_their_draws(monkeypatch):
    rng = np.random.default_rng(0)
    values, patients = rng.normal(size=60), rng.permutation(60) % 25
    monkeypatch.setattr(metrics, "BLOCK", 60 * 16)  # blocks of 16 resamples
    seen = []
    bootstrap = Bootstrap(50, 3)
    for _ in range(2):
        blocks = []
        bootstrap(lambda w, blocks=blocks: blocks.append(w) or metrics.weighted_mean(values, w), patients)
        seen.append(np.concatenate(blocks[:-1]))
    np.testing.assert_array_equal(*seen)
    assert seen[0].shape == (50, 60) and seen[0].dtype.itemsize == 1
    drawn = np.random.default_rng(3).multinomial(25, np.full(25, 1 / 25), size=50)
    np.testing.assert_array_equal(seen[0], drawn[:, np.unique(patients, return_inverse=True)[1]])
    monkeypatch.setattr(np.random, "default_rng", lambda *_: pytest.fail("drawn again"))
    again = bootstrap(lambda w: metrics.weighted_mean(values, w), patients)
    monkeypatch.undo()
    assert again == metrics.measure(lambda w: metrics.weighted_mean(values, w), patients, 50, 3)
    monkeypatch.setattr(metrics, "KEPT", 0)  # too many to keep: drawn anew, and the same
    unkept = Bootstrap(50, 3)
    for _ in range(2):
        assert unkept(lambda w: metrics.weighted_mean(values, w), patients) == again


def test_a_thousand_resamples_of_five_hundred_studies_are_a_few_products_of_matrices():
    rng = np.random.default_rng(0)
    label, scores, patients = rng.integers(0, 2, 500), rng.normal(size=500), rng.integers(0, 170, 500)
    shapes = []

    def auroc(weights):
        shapes.append(weights.shape)
        return metrics.auroc(scores, label == 1, weights)

    metrics.measure(auroc, patients, 1000, seed=0)
    assert shapes == [(1000, 500), (1, 500)]


def test_auroc_of_many_classes_does_not_tie_probabilities_that_float32_rounds_to_one():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(0, 50, (300, 4)), rng.integers(0, 4, 300)
    exact = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    odds = [exact[:, c] - np.logaddexp.reduce(np.delete(exact, c, 1), axis=1) for c in range(4)]
    pairs = [(o[label == c][:, None], o[label != c]) for c, o in enumerate(odds)]
    by_hand = np.mean([(p > n).mean() for p, n in pairs])
    found = metrics.class_auroc(exact.astype(np.float32), label, np.ones((1, 300)))
    assert found[0] == pytest.approx(by_hand, abs=1e-5)
    assert np.unique(np.exp(exact.astype(np.float32))[:, 0]).size < 290  # what ranking by probability would tie


@pytest.mark.parametrize("classes", [2, 3])
def test_auroc_of_scores_that_are_nan_is_nan_whatever_the_order_of_rows(classes):
    scores = np.zeros((20, classes))
    scores[3, 0] = np.nan
    assert np.isnan(metrics.class_auroc(scores, np.arange(20) % classes, np.ones((2, 20)))).all()
