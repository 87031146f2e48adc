"""What a task is, and the views of a batch that tasks share."""

from __future__ import annotations

import abc
import functools
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, PRNGKeyArray

from mmfm_jax.config.model import ModelConfig
from mmfm_jax.config.tasks.base import Needs, TaskConfig
from mmfm_jax.data.batch import Array, Batch, InputSpec
from mmfm_jax.errors import UserError
from mmfm_jax.losses.mean import Mean
from mmfm_jax.metrics.findings import Findings
from mmfm_jax.metrics.held_out import HeldOut
from mmfm_jax.model.multimodal import Encoded, MultimodalModel, drop_modalities, modality
from mmfm_jax.model.regularise import fold

Scalars = dict[str, Float[Array, ""]]
NOISE = 2**16  # more than a task splits a key into


def check_needs(needs: Needs, task: str, spec: InputSpec) -> None:
    """Raises UserError that names the field of the task `task` that asks for what is not there."""
    for at, sides in needs.modalities.items():
        for side in sides:
            if side not in spec.modalities:
                held = ", ".join(spec.modalities)
                raise UserError(f"tasks.{task}.{at}: the inputs hold no {side}; they hold {held}")
    for at, text in needs.texts.items():
        if text not in spec.texts:
            held = ", ".join(spec.texts) or "none"
            raise UserError(f"tasks.{task}.{at}: the inputs hold no text {text}; they hold {held}")
    for at, label in needs.labels.items():
        if label not in spec.labels:
            held = ", ".join(spec.labels) or "none"
            raise UserError(f"tasks.{task}.{at}: the store has no label {label}; it has {held}")


class Views:
    """A prepared batch as the model sees it; each view is computed when first asked for and shared by all tasks."""

    def __init__(
        self,
        model: MultimodalModel,
        batch: Batch,
        keys: PRNGKeyArray | None = None,
        train: bool = False,
        drop: float = 0.0,
    ):
        """`keys`: one a study [batch], of training. `drop`: chance that the fusion does not see a modality, in training
        alone."""
        self.model, self.batch, self.train = model, batch, train
        self._keys, self._drop = keys, drop
        self._fused: dict[tuple[frozenset[str], bool], Any] = {}

    @functools.cached_property
    def encoded(self) -> Encoded:
        """Every part, whole."""
        return self.model.encode(self.batch, keys=self.noise(self._keys))

    def fused(self, without: Collection[str] = (), drop: bool = True) -> Float[Array, "batch latent width"]:
        """The fusion of `encoded`, blind to the modalities `without`; in training some of the others are dropped, if
        `drop`."""
        view = frozenset(without), drop
        if view not in self._fused:
            self._fused[view] = self._fuse(*view)
        return self._fused[view]

    @property
    def latents(self) -> Float[Array, "batch latent width"]:
        """The fusion of all."""
        return self.fused()

    def _fuse(self, without: frozenset[str], drop: bool):
        keep = dict.fromkeys(sorted(without), jnp.zeros(self.batch.study.shape, bool))
        if drop and self.train and self._drop > 0 and self._keys is not None:
            seen = {part: tokens for part, tokens in self.encoded.items() if modality(part) not in without}
            keep |= drop_modalities(seen, self._drop, self._keys) if seen else {}
        return self.model.fuse(self.encoded, keep, self.noise(self._keys))

    def noise(self, keys: PRNGKeyArray | None) -> PRNGKeyArray | None:
        """From keys of studies those of dropout and stochastic depth, apart from all else that is drawn by them; None,
        for neither, outside training."""
        return fold(keys, NOISE) if self.train else None


@dataclass(frozen=True)
class Losses:
    """What a task makes of a batch, as sums and counts."""

    parts: dict[str, Mean]
    """What is minimised, by name: the sum of these means, each times its weight (`Task.part_weight`)."""
    metrics: dict[str, Mean] = field(default_factory=dict)
    """What is only looked at."""


class Task(nnx.Module):
    """A proxy task, whole: its head, its loss, what it predicts of a study and how well it does on held-out patients.

    A subclass with a `Config` of its own is a task, by the `kind` of that; one without is a base for others. Nothing
    that it gives may depend on parts that are absent.
    """

    Config: ClassVar[type[TaskConfig]]
    kinds: ClassVar[dict[str, type[Task]]] = {}
    """Every task that was imported, by its kind."""

    def __init_subclass__(cls, **arguments: Any):
        super().__init_subclass__(**arguments)
        if "Config" in cls.__dict__:
            (kind,) = get_args(cls.Config.model_fields["kind"].annotation)
            known = Task.kinds.setdefault(kind, cls)
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(f"{cls.__qualname__}: the kind {kind} is that of {known.__qualname__}; give it another")
            Task.kinds[kind] = cls
        elif any("Config" in base.__dict__ for base in cls.__mro__[1:-1] if base is not Task):
            raise TypeError(f"{cls.__qualname__}: has no Config with a kind of its own; give it one")

    def __init__(self, name: str, config: TaskConfig, model: ModelConfig, spec: InputSpec, rngs: nnx.Rngs):
        """`name` is the task's in the run. Raises UserError when the inputs lack what the task needs."""
        check_needs(config.needs(), name, spec)
        self.name, self.config = name, config

    @abc.abstractmethod
    def loss(self, views: Views, keys: PRNGKeyArray) -> Losses:
        """Of a batch; `keys`: one a study [batch], so that what is drawn of a study depends on nothing else."""

    def part_weight(self, part: str) -> float:
        """Factor of a part of the loss."""
        return 1.0

    def derived(self, means: Scalars) -> Scalars:
        """Metrics made of the means of this task's parts and metrics, and of `loss`, their weighted sum."""
        return {}

    def predict(self, views: Views) -> dict[str, Array]:
        """What the task says of each study, by name: arrays [batch, ...]."""
        return {}

    def measure(self, held_out: HeldOut) -> Findings:
        """How good what `predict` gives is on held-out patients, and what the report shows of it."""
        return Findings()
