"""How well each way of using the model, and each baseline, tells a label or finds a partner on held-out patients.

A predictor gives every study of the split a log-probability for each class of a label. What is fitted (linear probes
and baselines) is fitted on the training split and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from mmfm_jax.data.study import Schema
from mmfm_jax.evaluate.features import FUSED, Embedding, Features
from mmfm_jax.metrics.statistics import (
    Measure,
    Statistic,
    Weights,
    calibration_error,
    chance,
    class_auroc,
    confidence,
    measure,
    retrieval_ranks,
    weighted_mean,
    weighted_median,
)

WHOLE_TABLE = "table"  # the baseline that sees every column of the inputs
BOOSTING_CATEGORIES = 255  # scikit-learn's limit to a column treated as categories
LogProbability = Float[np.ndarray, "study label_class"]
Measures = dict[str, Measure]


@dataclass(frozen=True)
class Bootstrap:
    resamples: int
    seed: int

    def __call__(self, statistic: Statistic, patients: np.ndarray) -> Measure:
        return measure(statistic, patients, self.resamples, self.seed)


@dataclass(frozen=True)
class Predictions:
    """What every predictor of one label says of the studies that carry it."""

    classes: tuple[str, ...]
    label: Int[np.ndarray, "study"]
    patients: Shaped[np.ndarray, "study"]
    by_predictor: dict[str, LogProbability]

    @property
    def measurable(self) -> bool:
        """Whether there are two classes to tell apart, and something that tells them."""
        return len(np.unique(self.label)) > 1 and bool(self.by_predictor)

    def measures(self, bootstrap: Bootstrap) -> Measures:
        """AUROC of each predictor, what `fused` gains over each baseline (paired), and its calibration error."""
        aurocs = {
            name: functools.partial(class_auroc, scores, self.label) for name, scores in self.by_predictor.items()
        }
        measures = {f"{name}/auroc": bootstrap(auroc, self.patients) for name, auroc in aurocs.items()}
        if FUSED in aurocs:
            for name in (name for name in aurocs if name.startswith("baseline_")):
                gain = functools.partial(_difference, aurocs[FUSED], aurocs[name])
                measures[f"{FUSED}_minus_{name}/auroc"] = bootstrap(gain, self.patients)
            claimed = confidence(self.by_predictor[FUSED], self.label)
            measures[f"{FUSED}/calibration_error"] = bootstrap(
                functools.partial(calibration_error, claimed), self.patients
            )
        return measures


def _difference(a: Statistic, b: Statistic, weights: Weights) -> Float[np.ndarray, "resample"]:
    return a(weights) - b(weights)


def predictions(
    test: Features,
    label: str,
    classes: tuple[str, ...],
    by_predictor: dict[str, LogProbability],
    measured: Bool[np.ndarray, "study"] | None = None,
) -> Predictions:
    """Those of the test studies that carry the label, among the `measured` ones if given."""
    kept = test.labels[label] >= 0
    if measured is not None:
        kept &= measured
    scores = {name: log_probability[kept] for name, log_probability in by_predictor.items()}
    return Predictions(classes, test.labels[label][kept], test.patients[kept], scores)


# ---------------------------------------------------------------- fitted on the training split


def linear_probes(train: Features, test: Features, label: str, classes: int) -> dict[str, LogProbability]:
    """Logistic regression on the frozen fused features of each view; `{}` when training holds less than two classes."""
    known = train.labels[label] >= 0
    y = train.labels[label][known]
    if len(np.unique(y)) < 2:
        return {}
    return {
        view.replace(FUSED, "linear_probe"): _fit_predict(
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)), x[known], y, test.fused[view], classes
        )
        for view, x in train.fused.items()
    }


@dataclass(frozen=True)
class Table:
    """Columns side by side; a category is its index in the vocabulary, and a missing value is NaN."""

    values: Float[np.ndarray, "study column"]
    columns: tuple[str, ...]
    vocabulary_sizes: tuple[int, ...]
    """Of each column; 0 for a number."""

    def select(self, columns: tuple[str, ...]) -> Table:
        at = [self.columns.index(column) for column in columns]
        return Table(self.values[:, at], columns, tuple(self.vocabulary_sizes[i] for i in at))


def make_table(rows: list[dict[str, float | str]], columns: tuple[str, ...], schema: Schema) -> Table:
    """Study rows as a matrix; a category outside its vocabulary counts as missing."""
    values = np.full((len(rows), len(columns)), np.nan)
    vocabularies = [schema.columns[column].vocabulary for column in columns]
    for j, (column, vocabulary) in enumerate(zip(columns, vocabularies)):
        code = {value: float(i) for i, value in enumerate(vocabulary)}
        for i, row in enumerate(rows):
            value = row.get(column, np.nan)
            values[i, j] = code.get(value, np.nan) if isinstance(value, str) else value
    return Table(values, columns, tuple(len(v) for v in vocabularies))


def baselines(
    train: Table,
    train_label: Int[np.ndarray, "study"],
    test: Table,
    regressions: dict[str, tuple[str, ...]],
    whole: tuple[str, ...],
    classes: int,
    seed: int,
) -> dict[str, LogProbability]:
    """Logistic regressions on the named columns, and gradient boosting on the `whole` table; `{}` as for the probes."""
    known = train_label >= 0
    y = train_label[known]
    if len(np.unique(y)) < 2:
        return {}

    models: dict[str, tuple[Callable[[Table], Any], tuple[str, ...]]]
    models = {name: (_regression, columns) for name, columns in regressions.items()}
    models[WHOLE_TABLE] = functools.partial(_boosting, seed=seed), whole
    fitted = {}
    for name, (model_of, columns) in models.items():
        seen = tuple(c for c in columns if np.isfinite(train.select((c,)).values[known]).any())
        if seen:  # a column that no training study holds teaches nothing
            x = train.select(seen)
            scores = _fit_predict(model_of(x), x.values[known], y, test.select(seen).values, classes)
            fitted[f"baseline_{name}"] = scores
    return fitted


def _regression(table: Table):
    is_number = [size == 0 for size in table.vocabulary_sizes]
    # A missing number becomes the mean, beside a column that says so; a missing category is a category of its own.
    numbers = make_pipeline(SimpleImputer(add_indicator=True), StandardScaler())
    columns = ColumnTransformer(
        [
            ("numbers", numbers, [i for i, number in enumerate(is_number) if number]),
            (
                "categories",
                OneHotEncoder(handle_unknown="ignore"),
                [i for i, number in enumerate(is_number) if not number],
            ),
        ]
    )
    return make_pipeline(columns, LogisticRegression(max_iter=2000))


def _boosting(table: Table, seed: int):
    categorical = [0 < size <= BOOSTING_CATEGORIES for size in table.vocabulary_sizes]
    return HistGradientBoostingClassifier(random_state=seed).set_params(categorical_features=categorical)


def _fit_predict(model, x_train, y_train, x_test, classes: int) -> LogProbability:
    """Log-probabilities on the test rows; a class that training lacks has probability 0."""
    model.fit(x_train, y_train)
    if classes == 2:  # a sure model's probability rounds to 0 or 1, which would tie studies; its log-odds do not
        log_odds = model.decision_function(x_test)
        return -np.logaddexp(0, np.stack([log_odds, -log_odds], axis=1))
    scores = np.full((len(x_test), classes), -np.inf)
    scores[:, model.classes_] = np.log(np.maximum(model.predict_proba(x_test), np.finfo(float).tiny))
    return scores


# ---------------------------------------------------------------- contrastive


def zero_shot(
    image: Embedding, positive: Float[np.ndarray, "prompt width"], negative: Float[np.ndarray, "prompt width"]
) -> LogProbability:
    """Mean cosine similarity of the image to the positive prompts minus that to the negative ones.

    Given as two columns whose difference it is (they rank studies like log-odds, but are no probabilities). CLIP
    (arXiv:2103.00020) with mean prompt embeddings.
    """
    score = image.vectors @ (positive.mean(axis=0) - negative.mean(axis=0))
    return np.stack([np.zeros_like(score), score], axis=1)


def retrieval(test: Features, task: str, recall_at: tuple[int, ...], bootstrap: Bootstrap) -> Measures:
    """Both ways between the two modalities of a contrastive task: recall@k and median rank, with their chance levels.

    The gallery is every study that holds both modalities; a resample draws queries from it. Identical entries are
    ties, counted as their expected rank in random order.
    """
    (a, first), (b, second) = test.embeddings[task].items()
    both = first.present & second.present
    n = int(both.sum())
    if n < 2:
        return {}
    patients = test.patients[both]
    measures = {}
    for source, query, target, gallery in ((a, first, b, second), (b, second, a, first)):
        ranks = retrieval_ranks(query.vectors[both], gallery.vectors[both], test.same[target][both])
        way = f"{source}_to_{target}"
        for k in recall_at:
            measures[f"{way}/recall@{k}"] = bootstrap(functools.partial(weighted_mean, ranks.found(k)), patients)
            measures[f"{way}/recall@{k}_chance"] = chance(min(k / n, 1), n)
        measures[f"{way}/median_rank"] = bootstrap(functools.partial(weighted_median, ranks.expected), patients)
        measures[f"{way}/median_rank_chance"] = chance((n + 1) / 2, n)
    return measures
