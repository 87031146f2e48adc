"""Which checkpoints of a run are kept, and which of them is the best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from mmfm_jax.config.training import CheckpointConfig

Metrics = Mapping[str, float]


def finite(metrics: Metrics) -> dict[str, float]:
    """Without what is no number: a metric that is not finite is none."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def best(measured: Mapping[int, Metrics], config: CheckpointConfig) -> int | None:
    """The step with the best metric, the later of equals; None where no step has that metric.

    `measured`: finite metrics by step.
    """
    values = {step: metrics[config.best] for step, metrics in measured.items() if config.best in metrics}
    sign = 1 if config.higher_is_better else -1
    return max(values, key=lambda step: (sign * values[step], step), default=None)


def kept(
    steps: Iterable[int], measured: Mapping[int, Metrics], config: CheckpointConfig, constant_until: int
) -> set[int]:
    """The latest, the best, and the last one up to `constant_until`, from which a longer run can go on."""
    steps = sorted(steps)
    chosen = set(steps[-config.keep :])
    chosen.add(best({step: measured.get(step, {}) for step in steps}, config) or steps[-1])
    if constant := [step for step in steps if step <= constant_until]:
        chosen.add(constant[-1])
    return chosen
