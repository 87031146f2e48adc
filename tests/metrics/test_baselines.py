"""What is fitted on training patients alone, where the answer is known."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from mmfm_jax.data.study import ColumnSpec, Schema
from mmfm_jax.metrics.baselines import STRENGTHS, Plain, Table, baselines, linear_probes, make_table
from mmfm_jax.metrics.held_out import Split

WHOLE, BLIND = frozenset(), frozenset({"image"})
SCHEMA = Schema(
    columns={
        "diameter": ColumnSpec(kind="number", unit="mm"),
        "lobe": ColumnSpec(kind="category", vocabulary=("upper", "middle", "lower")),
        "empty": ColumnSpec(kind="number"),
    }
)


def split(labels, fused=None, seed=0):
    """As many studies as there are labels, one patient each."""
    n = len(labels)
    noise = np.random.default_rng(seed).normal(size=(n, 4))
    return Split(
        rows=np.arange(n),
        patients=np.array([f"p{i}" for i in range(n)]),
        labels={"disease": np.asarray(labels)},
        fused=fused or {WHOLE: noise},
        predicted={},
        same={},
    )


def alone(table):
    """Studies of nothing but a table, one patient each."""
    return Plain(np.arange(len(table.values)), table)


def log_odds(scores):
    return scores[:, 1] - scores[:, 0]


def test_linear_probe_of_each_view_is_fitted_on_labelled_training_studies_alone():
    rng = np.random.default_rng(0)
    train_label, test_label = rng.integers(0, 2, 200), rng.integers(0, 2, 100)
    train_label[:50] = -1

    def view(label, informative, rng):
        return rng.normal(size=(len(label), 3)) + informative * 3 * (label == 1)[:, None]

    train, test = (
        split(label, {WHOLE: view(label, 1, rng), BLIND: view(label, 0, rng)}) for label in (train_label, test_label)
    )
    train.fused[WHOLE][:50] = 1e6  # unlabelled studies must not even move the standardisation
    probes = linear_probes(train.fused, train_label, test.fused, 2)
    assert set(probes) == {WHOLE, BLIND}
    assert roc_auc_score(test_label, log_odds(probes[WHOLE])) > 0.95
    assert roc_auc_score(test_label, log_odds(probes[BLIND])) < 0.7

    x = train.fused[WHOLE][50:]
    standard = [(a - x.mean(0)) / x.std(0) for a in (x, test.fused[WHOLE])]
    plain = LogisticRegression(max_iter=2000).fit(standard[0], train_label[50:])
    np.testing.assert_allclose(probes[WHOLE], plain.predict_log_proba(standard[1]), atol=1e-8)


def test_probes_and_baselines_are_left_out_when_training_holds_one_class():
    one = split([1, 1, -1, 1])
    table = Table(np.zeros((4, 1)), ("size",), (0,))
    plain = Plain(one.patients, table)
    assert linear_probes(one.fused, one.labels["disease"], one.fused, 2) == {}
    assert baselines(plain, one.labels["disease"], plain, {"size": ("size",)}, ("size",), 2, 0) == {}


def test_table_keeps_missing_values_missing():
    rows = [{"diameter": 4.0, "lobe": "lower"}, {}, {"lobe": "elsewhere"}]
    table = make_table(rows, ("lobe", "diameter"), SCHEMA)
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
    return make_table(rows, ("diameter", "lobe", "empty"), SCHEMA)


def test_baselines_equal_scikit_learn_fitted_on_the_same_rows():
    rng = np.random.default_rng(0)
    train_label, test_label = rng.integers(-1, 2, 300), rng.integers(0, 2, 150)
    train, test = clinical_table(rng, train_label), clinical_table(rng, test_label)
    whole = ("diameter", "lobe", "empty")
    fitted = baselines(
        alone(train), train_label, alone(test), {"diameter": ("diameter",), "mixed": ("lobe", "diameter")}, whole, 2, 0
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
    train = split(label, {WHOLE: rng.normal(size=(60, 2)) + label[:, None]})
    scores = linear_probes(train.fused, label, train.fused, 3)[WHOLE]
    assert (scores[:, 1] == -np.inf).all()
    np.testing.assert_allclose(np.exp(scores).sum(1), 1)


def told_by_bag_and_image(rng, label):
    """Two studies a patient, of which a bag tells the label a little and a number of the image more."""
    bag = csr_matrix(
        (rng.random((len(label), 6)) < 0.3 + 0.3 * (label == 1)[:, None] * [1, 0, 0, 0, 0, 0]).astype(float)
    )
    image = rng.normal(size=(len(label), 3)) + (label == 1)[:, None] * [1.5, 0, 0]
    image[rng.random(len(label)) < 0.2] = np.nan
    table = Table(rng.normal(size=(len(label), 1)), ("age",), (0,))
    return Plain(np.arange(len(label)) // 2, table, {"words": bag}, image)


def test_a_bag_is_fitted_with_the_strength_that_is_best_over_folds_of_training_patients():
    rng = np.random.default_rng(np.random.SeedSequence().entropy)
    train_label, test_label = rng.integers(0, 2, 160), rng.integers(0, 2, 40)
    train, test = told_by_bag_and_image(rng, train_label), told_by_bag_and_image(rng, test_label)
    fitted = baselines(train, train_label, test, {}, ("age",), 2, 0)
    assert set(fitted) == {f"baseline_{name}" for name in ("table", "words", "words_and_table", "image")}
    x, losses = train.bags["words"].toarray(), []
    for strength in STRENGTHS:
        loss = []
        for a, b in StratifiedGroupKFold(5).split(x, train_label, train.patients):
            assert not set(train.patients[a]) & set(train.patients[b])
            model = LogisticRegression(C=strength, max_iter=2000).fit(x[a], train_label[a])
            loss.append(log_loss(train_label[b], model.predict_proba(x[b]), labels=[0, 1]))
        losses.append(np.mean(loss))
    best = LogisticRegression(C=STRENGTHS[int(np.argmin(losses))], max_iter=2000).fit(x, train_label)
    expected = best.predict_log_proba(test.bags["words"].toarray())
    np.testing.assert_allclose(fitted["baseline_words"], expected, atol=1e-4)
    np.testing.assert_allclose(np.exp(fitted["baseline_image"]).sum(axis=1), 1)


def test_what_reads_a_text_that_states_the_label_is_no_baseline():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 60)
    plain = told_by_bag_and_image(rng, label)
    fitted = baselines(plain, label, plain, {}, ("age",), 2, 0, told=True)
    assert set(fitted) == {"baseline_table", "told_words", "baseline_image"}


def test_fits_see_neither_unlabelled_studies_nor_other_test_studies():
    rng = np.random.default_rng(1)
    train_label, test_label = rng.integers(0, 2, 80), rng.integers(0, 2, 20)
    train, test = told_by_bag_and_image(rng, train_label), told_by_bag_and_image(rng, test_label)
    train_label[:20] = -1
    before = baselines(train, train_label, test, {}, ("age",), 2, 0)
    for of, rows in ((train, slice(0, 20)), (test, slice(0, 10))):  # poison
        assert of.image is not None
        of.table.values[rows], of.image[rows] = 1e9, -1e9
        bag = of.bags["words"].toarray()
        bag[rows] = 1e9
        of.bags["words"] = csr_matrix(bag)
    after = baselines(train, train_label, test, {}, ("age",), 2, 0)
    for name, scores in before.items():
        np.testing.assert_array_equal(after[name][10:], scores[10:])


@pytest.mark.parametrize("patients", [np.zeros(6), np.array([0, 0, 0, 1, 1, 1])])
def test_with_too_few_patients_to_choose_by_the_strength_stays_one(patients):
    label = np.array([0, 0, 0, 1, 1, 1])
    bag = csr_matrix(np.eye(6))
    plain = Plain(patients, Table(np.zeros((6, 0)), (), ()), {"words": bag})
    fitted = baselines(plain, label, plain, {}, (), 2, 0)
    expected = LogisticRegression().fit(bag, label).predict_log_proba(bag)
    np.testing.assert_allclose(fitted["baseline_words"], expected, atol=1e-6)
