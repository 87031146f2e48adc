"""`kind: classification`."""

from __future__ import annotations

from typing import Literal

from mmfm_jax.config.base import Probability
from mmfm_jax.config.tasks.base import Needs, TaskConfig


class ClassificationConfig(TaskConfig):
    """Cross-entropy of one of the store's labels."""

    kind: Literal["classification"] = "classification"
    """Which task it is."""
    label: str
    """Of the store."""
    smoothing: Probability = 0.0
    """Share of the target spread over all classes (arXiv:1512.00567)."""
    dropout: Probability = 0.0
    """Training only: chance of each feature that enters the head to be zero (JMLR 15:1929)."""
    without: tuple[Literal["image", "text", "table"], ...] | None = None
    """Modalities that the head is not shown. By default the texts if the label was read out of one (`from_text` of the
    label in the store), else none."""

    def needs(self) -> Needs:
        return Needs(labels={"label": self.label})
