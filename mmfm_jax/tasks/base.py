"""What a task is, and the views of a batch that tasks share."""

from __future__ import annotations

import abc
import functools
from typing import Annotated, ClassVar

import jax
from flax import nnx
from jaxtyping import Float
from pydantic import Field

from mmfm_jax.config.base import Config
from mmfm_jax.config.model import ModelConfig
from mmfm_jax.data.batch import Array, Batch, InputSpec
from mmfm_jax.model.multimodal import Encoded, MultimodalModel, drop_modalities

Metrics = dict[str, Float[Array, ""]]


class TaskConfig(Config):
    """What every task has; each file in `tasks/` extends it with a `kind` of its own."""

    kind: str
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of this task's loss in the sum."""


class Views:
    """A prepared batch as the model sees it; each view is computed when first asked for and shared by all tasks."""

    def __init__(self, model: MultimodalModel, batch: Batch, rng: jax.Array, train: bool, drop: float = 0.0):
        """`drop`: chance that the fusion does not see a modality, in training alone."""
        self.model, self.batch, self.train = model, batch, train
        self._rng, self._drop = rng, drop

    @functools.cached_property
    def encoded(self) -> Encoded:
        """Every part, whole."""
        return self.model.encode(self.batch)

    @functools.cached_property
    def latents(self) -> Float[Array, "batch latent width"]:
        """The fusion of `encoded`."""
        if self.train and self._drop > 0:
            return self.model.fuse(self.encoded, drop_modalities(self.encoded, self._drop, self._rng))
        return self.model.fuse(self.encoded)


class Task(nnx.Module):
    """A proxy task: it owns its head, its loss and its metrics.

    A subclass has a `Config` with a `kind` of its own, and `loss`. Its losses must not depend on parts that are absent.
    """

    Config: ClassVar[type[TaskConfig]]

    def __init__(self, name: str, config: TaskConfig, model: ModelConfig, spec: InputSpec, rngs: nnx.Rngs):
        """`name` is the task's in the run. Raises UserError when the inputs lack what the task needs."""
        self.config = config

    @abc.abstractmethod
    def loss(self, views: Views, rng: jax.Array) -> tuple[Float[Array, ""], Metrics]:
        """The mean loss over what is present in the batch, and metrics by name."""
