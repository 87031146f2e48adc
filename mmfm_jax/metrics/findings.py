"""What a task hands to an evaluation: its measures, and what the report shows of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmfm_jax.metrics.statistics import Measure

if TYPE_CHECKING:  # a second to import
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Forest:
    """Measures in one figure under a heading, beside those that other tasks put there: a dot each, a line along its
    interval, a mark at its `NAME_chance`."""

    heading: str
    note: str
    """What the measure means, in a sentence."""
    unit: str
    measures: dict[str, Measure]
    """By the name that stands beside it."""
    reference: float | None = None
    """Where a dotted line stands, such as chance."""


@dataclass(frozen=True)
class Panel:
    """A figure under a heading, beside those that other tasks put there."""

    heading: str
    note: str
    description: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Passage:
    """HTML under a heading of its own; all that is not ours is escaped by who makes it."""

    heading: str
    note: str
    html: str


Exhibit = Forest | Panel | Passage


@dataclass(frozen=True)
class Findings:
    measures: dict[str, Measure] = field(default_factory=dict)
    """By name, such as `malignancy/fused/auroc`; `NAME_chance` is the level of chance of NAME."""
    exhibits: tuple[Exhibit, ...] = ()
    notes: tuple[str, ...] = ()
    """What could not be measured, and why: one sentence each."""
    answered: tuple[str, ...] = ()
    """Labels of the store that were measured."""
    headlines: tuple[str, ...] = ()
    """What a reader should know first: one sentence each."""
