"""`evaluate`: what is measured on held-out patients."""

from __future__ import annotations

from pydantic import PositiveInt

from mmfm_jax.config.base import Config


class ZeroShot(Config):
    """A label read off image-text similarity: mean over positive minus mean over negative prompts."""

    label: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    task: str = "image_text"
    """The contrastive task whose embeddings are compared."""


class EvaluateConfig(Config):
    """What `mmfm evaluate` measures on held-out patients."""

    split: str = "test"
    batch_size: PositiveInt = 128
    bootstrap: PositiveInt = 1000
    """Patient-level resamples behind each 95% interval."""
    zero_shot: dict[str, ZeroShot] = {}
    baselines: dict[str, tuple[str, ...]] = {}
    """Logistic regressions on these columns, by name; `table` (boosting on `inputs.columns`) is always there."""
    recall_at: tuple[PositiveInt, ...] = (1, 5, 10)
