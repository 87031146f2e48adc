"""What is fitted on the training split and nothing else: probes of the fused features, and baselines without a model.

Each gives every study of the test split a log-probability for each class of a label.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy.sparse import csr_matrix, hstack

from mmfm_jax.data.study import Schema
from mmfm_jax.metrics.held_out import LogProbability, View
from mmfm_jax.metrics.label import BASELINE, TOLD

WHOLE_TABLE = "table"  # the baseline that sees every column of the inputs
IMAGE = "image"  # and that which sees simple numbers of the images
AND_TABLE = "_and_table"
RESERVED = frozenset(
    {WHOLE_TABLE, IMAGE}
    | {first + of + table for first in ("", "first_") for of in ("sentences", "words") for table in ("", AND_TABLE)}
)
BOOSTING_CATEGORIES = 255  # scikit-learn's limit to a column treated as categories
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # inverse, of the regularisation among which cross-validation chooses
FOLDS = 5


def linear_probes(
    train: Mapping[View, Float[np.ndarray, "study width"]],
    label: Int[np.ndarray, "study"],
    test: Mapping[View, Float[np.ndarray, "test_study width"]],
    classes: int,
) -> dict[View, LogProbability]:
    """Logistic regression on the frozen fused features of each view; `{}` when training holds less than two classes."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known = label >= 0
    if len(np.unique(label[known])) < 2:
        return {}
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return {view: _fit_predict(model, x[known], label[known], test[view], classes) for view, x in train.items()}


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


@dataclass(frozen=True)
class Plain:
    """Studies of a split without a model: what baselines are fitted on and tried on."""

    patients: Shaped[np.ndarray, "study"]
    table: Table
    bags: dict[str, csr_matrix] = field(default_factory=dict)
    """By name, a bag of each study's texts [study, piece]."""
    image: Float[np.ndarray, "study number"] | None = None
    """Simple numbers of the images; NaN where a study has none."""


def baselines(
    train: Plain,
    label: Int[np.ndarray, "study"],
    test: Plain,
    regressions: Mapping[str, tuple[str, ...]],
    whole: tuple[str, ...],
    classes: int,
    seed: int,
    told: bool = False,
) -> dict[str, LogProbability]:
    """What simple methods make of a label, by name; `{}` as for the probes.

    - logistic regressions on the columns that `regressions` names, and gradient boosting on the `whole` table;
    - logistic regression on each bag of the texts, alone and (not where `told`) with the whole table;
    - the mean of logistic regression and gradient boosting on the simple numbers of the images.

    The regularisation of the last two is chosen by cross-validation over training patients. `told`: texts state the
    label, so what reads them is named TOLD and is no baseline.
    """
    known = np.flatnonzero(label >= 0)
    y = label[known]
    if len(np.unique(y)) < 2:
        return {}
    folds = _folds(y, train.patients[known])

    def of_table(columns: tuple[str, ...]) -> tuple[Table, Table]:
        """A column that no training study holds teaches nothing."""
        seen = tuple(c for c in columns if np.isfinite(train.table.select((c,)).values[known]).any())
        return train.table.select(seen), test.table.select(seen)

    fitted = {}
    for name, columns in regressions.items():
        x, of_test = of_table(columns)
        if x.columns:
            fitted[BASELINE + name] = _fit_predict(_regression(x), x.values[known], y, of_test.values, classes)
    x, of_test = of_table(whole)
    if x.columns:
        model = _boosting(seed, x.vocabulary_sizes)
        fitted[BASELINE + WHOLE_TABLE] = _fit_predict(model, x.values[known], y, of_test.values, classes)
        encoder = _encoder(x).fit(x.values[known])
        tables = encoder.transform(x.values), encoder.transform(of_test.values)
    else:
        tables = None
    for name, bag in train.bags.items():
        kind = TOLD if told else BASELINE
        inputs = {name: (bag, test.bags[name])}
        if tables and not told:
            both = (csr_matrix(hstack(pair)) for pair in zip(inputs[name], tables))
            inputs[name + AND_TABLE] = tuple(both)  # pyright: ignore[reportArgumentType]
        for key, (a, b) in inputs.items():
            fitted[kind + key] = _fit_predict(_chosen(folds), a[known], y, b, classes)
    if train.image is not None and test.image is not None:
        seen = np.isfinite(train.image[known]).any(axis=0)
        if seen.any():
            a, b = train.image[known][:, seen], test.image[:, seen]
            both = [_fit_predict(model, a, y, b, classes) for model in (_chosen(folds, _numbers()), _boosting(seed))]
            fitted[BASELINE + IMAGE] = np.logaddexp(*both) - np.log(2)
    return fitted


def _folds(y: np.ndarray, patients: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Parts of the training studies to choose the regularisation by, no patient in two; none where a class has too
    few patients."""
    from sklearn.model_selection import StratifiedGroupKFold

    folds = min(FOLDS, *(len(np.unique(patients[y == c])) for c in np.unique(y)))
    if folds < 2:
        return []
    parts = list(StratifiedGroupKFold(folds).split(y, y, patients))
    return [(train, test) for train, test in parts if len(np.unique(y[train])) == len(np.unique(y))]


def _chosen(folds: list[tuple[np.ndarray, np.ndarray]], *before: Any):
    """Logistic regression after these steps, with the strength of regularisation that is best over the folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(*before, LogisticRegression(max_iter=2000))
    if not folds:
        return model
    return GridSearchCV(model, {"logisticregression__C": STRENGTHS}, scoring=_likelihood, cv=folds)


def _likelihood(model, x, y) -> float:
    """Mean log-probability of the true classes."""
    at = np.searchsorted(model.classes_, y)
    given = model.predict_proba(x)[np.arange(len(y)), at]
    return float(np.log(np.maximum(given, np.finfo(float).tiny)).mean())


def _numbers():
    """A missing number becomes the mean, beside a column that says so."""
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(SimpleImputer(add_indicator=True), StandardScaler())


def _encoder(table: Table):
    """Columns for a regression; a missing category is a category of its own."""
    from sklearn.compose import ColumnTransformer
    from sklearn.preprocessing import OneHotEncoder

    is_number = [size == 0 for size in table.vocabulary_sizes]
    return ColumnTransformer(
        [
            ("numbers", _numbers(), [i for i, number in enumerate(is_number) if number]),
            (
                "categories",
                OneHotEncoder(handle_unknown="ignore"),
                [i for i, number in enumerate(is_number) if not number],
            ),
        ]
    )


def _regression(table: Table):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(_encoder(table), LogisticRegression(max_iter=2000))


def _boosting(seed: int, vocabulary_sizes: tuple[int, ...] = ()):
    from sklearn.ensemble import HistGradientBoostingClassifier

    categorical = [0 < size <= BOOSTING_CATEGORIES for size in vocabulary_sizes] or None
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
