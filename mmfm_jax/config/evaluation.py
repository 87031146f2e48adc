"""`evaluate`: what is measured on held-out patients."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PositiveInt, model_validator

from mmfm_jax.config.base import Config


class EvaluateConfig(Config):
    """What `mmfm evaluate` measures on held-out patients."""

    split: str = "test"
    """Split of the store whose patients are measured."""
    batch_size: PositiveInt = 128
    """Studies at a time, rounded up to a multiple of the devices."""
    bootstrap: PositiveInt = 1000
    """Patient-level resamples behind each 95% interval."""
    baselines: dict[str, tuple[str, ...]] = {}
    """Logistic regressions on these columns, by name; those on the whole table, on bags of the texts and on simple
    numbers of the images are always there."""
    fit_studies: PositiveInt = 20_000
    """Training studies that probes and baselines are fitted on, at most: those of the patients of the lowest keyed
    hash."""
    max_texts: PositiveInt = 8
    """Of a study with several texts of a field, so many are given, one after the other, and what is predicted is
    averaged; the first alone is measured beside it."""
    untrained: bool = True
    """Also probes the model as it was before its training, which takes its parameters' memory once more."""
    recall_at: tuple[PositiveInt, ...] = (1, 5, 10)
    """The k of each recall@k of retrieval."""
    max_gallery: Annotated[int, Field(ge=2)] = 10_000
    """Studies among which retrieval finds a study's partner; of more, that many are drawn by a hash of patients, the
    same for every run. Recall@k falls as a gallery grows, so compare it between galleries of one size."""

    @model_validator(mode="before")
    @classmethod
    def _questions_are_of_tasks(cls, given: Any) -> Any:
        if isinstance(given, dict) and "zero_shot" in given:
            raise ValueError("zero_shot is of the contrastive task that answers it; move it to tasks.NAME.zero_shot")
        return given
