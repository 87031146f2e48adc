"""What is fitted on training patients alone, where the answer is known."""

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from mmfm_jax.data.study import ColumnSpec, Schema
from mmfm_jax.metrics.baselines import Table, baselines, linear_probes, make_table
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
    probes = linear_probes(train, test, "disease", 2, WHOLE)
    assert set(probes) == {"linear_probe", "linear_probe_without_image"}
    assert set(linear_probes(train, test, "disease", 2, BLIND)) == {"linear_probe_without_image"}
    assert roc_auc_score(test_label, log_odds(probes["linear_probe"])) > 0.95
    assert roc_auc_score(test_label, log_odds(probes["linear_probe_without_image"])) < 0.7

    x = train.fused[WHOLE][50:]
    standard = [(a - x.mean(0)) / x.std(0) for a in (x, test.fused[WHOLE])]
    plain = LogisticRegression(max_iter=2000).fit(standard[0], train_label[50:])
    np.testing.assert_allclose(probes["linear_probe"], plain.predict_log_proba(standard[1]), atol=1e-8)


def test_probes_and_baselines_are_left_out_when_training_holds_one_class():
    one = split([1, 1, -1, 1])
    table = Table(np.zeros((4, 1)), ("size",), (0,))
    assert linear_probes(one, one, "disease", 2, WHOLE) == {}
    assert baselines(table, one.labels["disease"], table, {"size": ("size",)}, ("size",), 2, 0) == {}


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
    train = split(label, {WHOLE: rng.normal(size=(60, 2)) + label[:, None]})
    scores = linear_probes(train, train, "disease", 3, WHOLE)["linear_probe"]
    assert (scores[:, 1] == -np.inf).all()
    np.testing.assert_allclose(np.exp(scores).sum(1), 1)
