"""What is fitted on the training split and nothing else: probes of the fused features, and baselines on the table.

Each gives every study of the test split a log-probability for each class of a label.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mmfm_jax.data.study import Schema
from mmfm_jax.metrics.held_out import LogProbability, Split, View, view_name
from mmfm_jax.metrics.label import BASELINE

WHOLE_TABLE = "table"  # the baseline that sees every column of the inputs
BOOSTING_CATEGORIES = 255  # scikit-learn's limit to a column treated as categories


def linear_probes(train: Split, test: Split, label: str, classes: int, denied: View) -> dict[str, LogProbability]:
    """Logistic regression on the frozen fused features of the view that lacks the `denied` modalities, and of those
    that lack one more; `{}` when training holds less than two classes."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known = train.labels[label] >= 0
    y = train.labels[label][known]
    if len(np.unique(y)) < 2:
        return {}
    scores = {}
    for view, x in train.fused.items():
        if view >= denied and len(view - denied) <= 1:
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
            scores[view_name(view, "linear_probe")] = _fit_predict(model, x[known], y, test.fused[view], classes)
    return scores


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
            fitted[f"{BASELINE}{name}"] = scores
    return fitted


def _regression(table: Table):
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

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
    from sklearn.ensemble import HistGradientBoostingClassifier

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
