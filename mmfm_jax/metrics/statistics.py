"""Measures of held-out performance, each computed for many bootstrap resamples at once.

A resample of N studies is a row of weights: how often each study was drawn. So every statistic here takes
`weights [resamples, N]` and returns one number a resample, and a weight of one everywhere gives the plain statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped

Weights = Num[np.ndarray, "resample study"]
Statistic = Callable[[Weights], Float[np.ndarray, "resample"]]

CALIBRATION_BINS = 10
BLOCK = 1 << 22  # largest number of elements of a matrix held at once (weights)
KEPT = 1 << 30  # bytes of resamples that are held


# ---------------------------------------------------------------- intervals


@dataclass(frozen=True)
class Measure:
    """One result: `low` and `high` bound its 95% interval (None for a level known exactly), `n` studies measured."""

    value: float
    low: float | None
    high: float | None
    n: int


class Resamples:
    """Patients drawn with replacement, so many times; all studies of one that is drawn.

    Studies of one patient are drawn together, since they are alike (cluster bootstrap: Field and Welsh,
    J. R. Statist. Soc. B 69, 2007). The draws are those of the seed and are kept, one byte a patient and resample where
    that is at most KEPT bytes, so that every statistic of the same studies has the same patients and none draws anew.
    """

    def __init__(self, patients: Shaped[np.ndarray, "study"], resamples: int, seed: int):
        self.studies = len(patients)
        unique, self._patient_of_study = np.unique(patients, return_inverse=True)
        self._patients, self._seed = len(unique), seed
        chunk = max(1, BLOCK // max(self.studies, 1))
        self._sizes = np.diff(np.r_[0:resamples:chunk, resamples]).tolist()
        self._kept: list[np.ndarray] | None = [] if resamples * self._patients <= KEPT else None

    def __iter__(self) -> Iterator[Weights]:
        """Blocks of resamples: how often each study was drawn."""
        if self._kept:
            for counts in self._kept:
                yield counts[:, self._patient_of_study]
            return
        rng, kept = np.random.default_rng(self._seed), []
        for size in self._sizes:
            counts = rng.multinomial(self._patients, np.full(self._patients, 1 / self._patients), size=size)
            counts = counts.astype(np.min_scalar_type(int(counts.max(initial=0))))
            if self._kept is not None:
                kept.append(counts)
            yield counts[:, self._patient_of_study]
        if self._kept is not None:
            self._kept = kept

    def measure(self, statistic: Statistic) -> Measure:
        """The statistic with its 95% percentile interval; resamples in which it is undefined (NaN) are left out."""
        defined = np.concatenate([statistic(weights) for weights in self])
        defined = defined[np.isfinite(defined)]
        low, high = (float(v) for v in np.percentile(defined, [2.5, 97.5])) if len(defined) else (None, None)
        return Measure(float(statistic(np.ones((1, self.studies)))[0]), low, high, self.studies)


def measure(statistic: Statistic, patients: Shaped[np.ndarray, "study"], resamples: int, seed: int) -> Measure:
    """One statistic with its interval over patients; `Resamples` shares the draws among several."""
    return Resamples(patients, resamples, seed).measure(statistic)


def chance(value: float, n: int) -> Measure:
    """A level known exactly, so without an interval."""
    return Measure(float(value), None, None, n)


# ---------------------------------------------------------------- discrimination


class Auroc:
    """Area under the ROC curve: the weighted chance that a positive study scores above a negative one, ties as half.

    NaN for a resample without both classes, and for all of them where a score is NaN: it has no rank. Scores are sorted
    once, whatever the number of resamples.
    """

    def __init__(self, scores: Float[np.ndarray, "study"], positive: Bool[np.ndarray, "study"]):
        self._order = np.argsort(scores, kind="stable")
        ordered = scores[self._order]
        self._starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])  # of each run of equal scores
        self._positive = positive[self._order]
        self._ranked = not np.isnan(scores).any()

    def __call__(self, weights: Weights) -> Float[np.ndarray, "resample"]:
        if not self._ranked:
            return np.full(len(weights), np.nan)
        weights = weights[:, self._order].astype(np.float64)
        positives = np.add.reduceat(weights * self._positive, self._starts, axis=1)
        negatives = np.add.reduceat(weights * ~self._positive, self._starts, axis=1)
        below = np.cumsum(negatives, axis=1) - negatives
        pairs = positives.sum(axis=1) * negatives.sum(axis=1)
        wins = (positives * (below + negatives / 2)).sum(axis=1)
        return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def auroc(
    scores: Float[np.ndarray, "study"], positive: Bool[np.ndarray, "study"], weights: Weights
) -> Float[np.ndarray, "resample"]:
    """See Auroc."""
    return Auroc(scores, positive)(weights)


class ClassAuroc:
    """AUROC of the second of two classes, or the mean over classes of one against the rest (those a resample holds)."""

    def __init__(self, log_probability: Float[np.ndarray, "study label_class"], label: Int[np.ndarray, "study"]):
        classes = log_probability.shape[1]
        spoilt = np.isnan(log_probability).any()  # then no class is measured, not even one without a NaN of its own
        self._each = [
            Auroc(np.full(len(label), np.nan) if spoilt else _log_odds(log_probability, c), label == c)
            for c in ([1] if classes == 2 else range(classes))
        ]

    def __call__(self, weights: Weights) -> Float[np.ndarray, "resample"]:
        each = np.stack([auroc(weights) for auroc in self._each])
        defined = np.isfinite(each)
        count, mean = defined.sum(axis=0), np.full(each.shape[1], np.nan)
        return np.divide(np.where(defined, each, 0).sum(axis=0), count, out=mean, where=count > 0)


def class_auroc(
    log_probability: Float[np.ndarray, "study label_class"], label: Int[np.ndarray, "study"], weights: Weights
) -> Float[np.ndarray, "resample"]:
    """See ClassAuroc."""
    return ClassAuroc(log_probability, label)(weights)


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


def tempered(
    log_probability: Float[np.ndarray, "study label_class"], temperature: float
) -> Float[np.ndarray, "study label_class"]:
    """Log-probabilities of a softmax whose logits are divided by `temperature`; 1 normalises them."""
    scaled = log_probability.astype(np.float64) / temperature
    return scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True)


def fitted_temperature(
    log_probability: Float[np.ndarray, "study label_class"], label: Int[np.ndarray, "study"]
) -> float:
    """The temperature of the smallest cross-entropy (arXiv:1706.04599), between 0.05 and 20; 1 where the studies are
    not of two classes, or what is claimed of one is not finite."""
    from scipy.optimize import minimize_scalar

    if len(np.unique(label)) < 2 or not np.isfinite(log_probability).all():
        return 1.0

    def cross_entropy(log_temperature: float) -> float:
        of_class = tempered(log_probability, np.exp(log_temperature))
        return -float(of_class[np.arange(len(label)), label].mean())

    found: Any = minimize_scalar(cross_entropy, bounds=np.log([0.05, 20.0]), method="bounded")
    return float(np.exp(found.x))


# ---------------------------------------------------------------- regression


def explained_variance(
    predicted: Float[np.ndarray, "study"], true: Float[np.ndarray, "study"], weights: Weights
) -> Float[np.ndarray, "resample"]:
    """R2: 1 less the squared error over the squared distance from the mean; NaN where all are alike."""
    weights = weights.astype(np.float64)
    count = weights.sum(axis=1)
    mean = weights @ true / count
    spread = weights @ np.square(true) / count - np.square(mean)
    error = weights @ np.square(predicted - true) / count
    return 1 - np.divide(error, spread, out=np.full(len(count), np.nan), where=spread > 1e-12)


# ---------------------------------------------------------------- averages


def weighted_mean(values: Num[np.ndarray, "study"], weights: Weights) -> Float[np.ndarray, "resample"]:
    return weights @ values / weights.sum(axis=1)


def weighted_median(values: Num[np.ndarray, "study"], weights: Weights) -> Float[np.ndarray, "resample"]:
    """The median of each value repeated `weight` times (whole weights); the mean of the two middle ones if even.

    NaN for all resamples where a value is NaN: it has no place among the others.
    """
    if np.isnan(values).any():
        return np.full(len(weights), np.nan)
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[:, order], axis=1)
    half = reached[:, -1:] / 2
    lower, upper = (reached < half).sum(axis=1), (reached <= half).sum(axis=1)
    ordered = values[order]
    return (ordered[lower] + ordered[upper]) / 2
