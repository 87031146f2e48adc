"""Measures of held-out performance, each computed for many bootstrap resamples at once.

A resample of N studies is a row of weights: how often each study was drawn. So every statistic here takes
`weights [resamples, N]` and returns one number a resample, and a weight of one everywhere gives the plain statistic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped

Weights = Num[np.ndarray, "resample study"]
Statistic = Callable[[Weights], Float[np.ndarray, "resample"]]

CALIBRATION_BINS = 10
BLOCK = 1 << 22  # largest number of elements of a matrix held at once (weights, similarities)


# ---------------------------------------------------------------- intervals


@dataclass(frozen=True)
class Measure:
    """One result: `low` and `high` bound its 95% interval (None for a level known exactly), `n` studies measured."""

    value: float
    low: float | None
    high: float | None
    n: int


def measure(statistic: Statistic, patients: Shaped[np.ndarray, "study"], resamples: int, seed: int) -> Measure:
    """The statistic with its 95% percentile interval over patients drawn with replacement.

    Studies of one patient are drawn together, since they are alike (cluster bootstrap: Field and Welsh,
    J. R. Statist. Soc. B 69, 2007). Resamples in which the statistic is undefined (NaN) are left out. One seed draws
    the same patients for every statistic of the same studies, so intervals can be compared.
    """
    n = len(patients)
    unique, patient_of_study = np.unique(patients, return_inverse=True)
    rng = np.random.default_rng(seed)
    chunk = max(1, BLOCK // max(n, 1))
    values = [
        statistic(rng.multinomial(len(unique), np.full(len(unique), 1 / len(unique)), size=size)[:, patient_of_study])
        for size in np.diff(np.r_[0:resamples:chunk, resamples])
    ]
    defined = np.concatenate(values)
    defined = defined[np.isfinite(defined)]
    low, high = (float(v) for v in np.percentile(defined, [2.5, 97.5])) if len(defined) else (None, None)
    return Measure(float(statistic(np.ones((1, n)))[0]), low, high, n)


def chance(value: float, n: int) -> Measure:
    """A level known exactly, so without an interval."""
    return Measure(float(value), None, None, n)


# ---------------------------------------------------------------- discrimination


def auroc(
    scores: Float[np.ndarray, "study"], positive: Bool[np.ndarray, "study"], weights: Weights
) -> Float[np.ndarray, "resample"]:
    """Area under the ROC curve: the weighted chance that a positive study scores above a negative one, ties as half.

    NaN for a resample without both classes, and for all of them where a score is NaN: it has no rank.
    """
    if np.isnan(scores).any():
        return np.full(len(weights), np.nan)
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])  # of each run of equal scores
    weights = weights[:, order].astype(np.float64)
    positives = np.add.reduceat(weights * positive[order], starts, axis=1)
    negatives = np.add.reduceat(weights * ~positive[order], starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    wins = (positives * (below + negatives / 2)).sum(axis=1)
    return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def class_auroc(
    log_probability: Float[np.ndarray, "study label_class"], label: Int[np.ndarray, "study"], weights: Weights
) -> Float[np.ndarray, "resample"]:
    """AUROC of the second of two classes, or the mean over classes of one against the rest (those a resample holds)."""
    if np.isnan(log_probability).any():
        return np.full(len(weights), np.nan)
    if log_probability.shape[1] == 2:
        return auroc(_log_odds(log_probability, 1), label == 1, weights)
    each = np.stack(
        [auroc(_log_odds(log_probability, c), label == c, weights) for c in range(log_probability.shape[1])]
    )
    defined = np.isfinite(each)
    count = defined.sum(axis=0)
    return np.divide(np.where(defined, each, 0).sum(axis=0), count, out=np.full(each.shape[1], np.nan), where=count > 0)


def _log_odds(log_probability: Float[np.ndarray, "study label_class"], c: int) -> Float[np.ndarray, "study"]:
    """Of class `c` against all others: ranks like its probability but does not saturate into ties near 1."""
    own = log_probability[:, c].astype(np.float64)
    return own - np.logaddexp.reduce(np.delete(log_probability, c, axis=1).astype(np.float64), axis=1)


# ---------------------------------------------------------------- calibration


@dataclass(frozen=True)
class Confidence:
    """What a model claims and if it came true: chance of the second of two classes, or of the likeliest of many."""

    probability: Float[np.ndarray, "study"]
    outcome: Bool[np.ndarray, "study"]

    @property
    def bin(self) -> Int[np.ndarray, "study"]:
        """Of CALIBRATION_BINS of equal width; 1.0 falls in the last."""
        return np.minimum((self.probability * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)


def confidence(log_probability: Float[np.ndarray, "study label_class"], label: Int[np.ndarray, "study"]) -> Confidence:
    probability = np.exp(log_probability)
    if probability.shape[1] == 2:
        return Confidence(probability[:, 1], label == 1)
    return Confidence(probability.max(axis=1), probability.argmax(axis=1) == label)


def calibration_error(claimed: Confidence, weights: Weights) -> Float[np.ndarray, "resample"]:
    """Expected calibration error (arXiv:1706.04599): mean over studies of their bin's |mean claim - share true|."""
    gap = claimed.probability - claimed.outcome
    by_bin = (claimed.bin[:, None] == np.arange(CALIBRATION_BINS)) * gap[:, None]
    return np.abs(weights @ by_bin).sum(axis=1) / weights.sum(axis=1)


# ---------------------------------------------------------------- retrieval


@dataclass(frozen=True)
class Ranks:
    """Where each query finds its own partner in the gallery, were equal scores put in random order."""

    above: Int[np.ndarray, "query"]
    """Gallery entries that score higher than the partner."""
    tied: Int[np.ndarray, "query"]
    """Other entries that score the same."""

    @property
    def expected(self) -> Float[np.ndarray, "query"]:
        """Expected rank, the best being 1."""
        return 1 + self.above + self.tied / 2

    def found(self, k: int) -> Float[np.ndarray, "query"]:
        """Chance that the partner is among the first k: its rank is uniform over above+1 ... above+tied+1."""
        return np.clip(k - self.above, 0, self.tied + 1) / (self.tied + 1)


def retrieval_ranks(
    query: Float[np.ndarray, "study width"],
    gallery: Float[np.ndarray, "study width"],
    same: Int[np.ndarray, "study"],
) -> Ranks:
    """Ranks of each study's own gallery entry by inner product.

    Entries that share a number in `same` come from equal inputs (two reports in the same words): they are exact ties,
    whatever rounding did to their embeddings, so nothing is won by the luck of the order.
    """
    _, first, entry, count = np.unique(same, return_index=True, return_inverse=True, return_counts=True)
    distinct = gallery[first].astype(np.float64)
    above, tied = np.empty(len(query), int), np.empty(len(query), int)
    rows = max(1, BLOCK // len(distinct))
    for start in range(0, len(query), rows):
        block = slice(start, start + rows)
        scores = query[block].astype(np.float64) @ distinct.T
        own = np.take_along_axis(scores, entry[block, None], axis=1)
        above[block] = (scores > own) @ count
        tied[block] = (scores == own) @ count - 1
    return Ranks(above, tied)


def weighted_mean(values: Num[np.ndarray, "study"], weights: Weights) -> Float[np.ndarray, "resample"]:
    return weights @ values / weights.sum(axis=1)


def weighted_median(values: Num[np.ndarray, "study"], weights: Weights) -> Float[np.ndarray, "resample"]:
    """The median of each value repeated `weight` times (whole weights); the mean of the two middle ones if even."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[:, order], axis=1)
    half = reached[:, -1:] / 2
    lower, upper = (reached < half).sum(axis=1), (reached <= half).sum(axis=1)
    ordered = values[order]
    return (ordered[lower] + ordered[upper]) / 2
