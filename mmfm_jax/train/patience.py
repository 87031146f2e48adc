"""When a run ends before its last step, since validation has not become better for long."""

from __future__ import annotations

from collections.abc import Mapping

from mmfm_jax.config.training import CheckpointConfig, TrainConfig
from mmfm_jax.train import keep


class Patience:
    """Validations since the one of the best `checkpoint.best`, over all starts of a run."""

    def __init__(
        self, train: TrainConfig, checkpoint: CheckpointConfig, measured: Mapping[int, keep.Metrics], first: int
    ):
        """`measured`: finite metrics of the checkpoints up to step `first`, from which the run goes on."""
        self._config, self._patience = checkpoint, train.patience
        best, every = keep.best(measured, checkpoint), train.validate_every
        self._best = {} if best is None else measured[best]
        self.without = 0 if best is None else first // every - best // every
        """Validations since the best."""

    @property
    def is_over(self) -> bool:
        return self._patience is not None and self.without >= self._patience

    def told(self) -> str:
        return (
            f"{self.without} validations in a row gave no better {self._config.best} (train.patience {self._patience})"
        )

    def validated(self, metrics: Mapping[str, float]) -> None:
        """A metric that is not finite, or equals the best, is no better."""
        name, now = self._config.best or "", keep.finite(metrics)
        if name not in now:
            self.without += 1
            return
        sign = 1 if self._config.higher_is_better else -1
        better = name not in self._best or sign * now[name] > sign * self._best[name]
        self.without = 0 if better else self.without + 1
        self._best = now if better else self._best
