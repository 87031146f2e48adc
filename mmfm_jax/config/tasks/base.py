"""What every task can be configured with, and what it says that it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mmfm_jax.config.base import Config, NotNegative
from mmfm_jax.config.inputs import Inputs
from mmfm_jax.config.model import TransformerConfig


@dataclass(frozen=True)
class Needs:
    """What a task reads of a batch, by the field of its configuration that asks for it. Nothing else is read for it."""

    modalities: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """`image`, `text` or `table`, of which the inputs must hold some part."""
    texts: dict[str, str] = field(default_factory=dict)
    """Fields of the inputs."""
    labels: dict[str, str] = field(default_factory=dict)
    """Labels of the store."""


class TaskConfig(Config):
    """What every task has; each file in `tasks/` extends it with a `kind` of its own."""

    of_evaluation: ClassVar[tuple[str, ...]] = ()
    """Fields that training does not read, so that a run may go on with others."""

    kind: str
    """Which task it is."""
    weight: NotNegative = 1.0
    """Factor of this task's loss in the sum."""

    def needs(self) -> Needs:
        return Needs()

    @property
    def aligns_text(self) -> bool:
        """Whether what a text says, of sides too, is learned as true of the image that it comes with."""
        return False

    def stacks(self) -> dict[str, TransformerConfig]:
        """The task's own transformers, by the field that sizes them."""
        return {}

    def sequence_lengths(self, inputs: Inputs, registers: int) -> dict[str, tuple[int, ...]]:
        """Tokens of each sequence that the task encodes otherwise than the inputs give it, `registers` of each image
        included, by the field that sizes them."""
        return {}
