"""Intervals over patients, the same resamples for every statistic of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmfm_jax.metrics.statistics import Measure, Statistic, measure


@dataclass(frozen=True)
class Bootstrap:
    resamples: int
    seed: int

    def __call__(self, statistic: Statistic, patients: np.ndarray) -> Measure:
        return measure(statistic, patients, self.resamples, self.seed)
