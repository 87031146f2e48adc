"""What a task may ask of an evaluation: studies of a split as the frozen model sees them, and the means to measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from jaxtyping import Float, Int, Shaped

from mmfm_jax.data.inspect.slices import Slice
from mmfm_jax.metrics.bootstrap import Bootstrap

Words = dict[str, str]
"""A text by field."""
View = frozenset[str]
"""Modalities that the fusion does not see."""
LogProbability = Float[np.ndarray, "study label_class"]


def view_name(left_out: View, of: str = "fused") -> str:
    """`fused`, `fused_without_text`, `fused_without_image_table`."""
    return f"{of}_without_{'_'.join(sorted(left_out))}" if left_out else of


def views_of(modalities: tuple[str, ...], denied: View = frozenset()) -> tuple[View, ...]:
    """What is denied alone, then that with every further set of modalities left out that leaves one."""
    rest = [m for m in modalities if m not in denied]
    return tuple(denied | set(more) for n in range(max(len(rest), 1)) for more in combinations(rest, n))


@dataclass(frozen=True)
class Split:
    """The studies of a split, in one order."""

    rows: Int[np.ndarray, "study"]
    """Of the store."""
    patients: Shaped[np.ndarray, "study"]
    labels: dict[str, Int[np.ndarray, "study"]]
    """Index into the label's classes, -1 where the study has none."""
    fused: dict[View, Float[np.ndarray, "study width"]]
    """By view: mean over the fusion's latents."""
    predicted: dict[str, dict[str, Shaped[np.ndarray, "study *value"]]]
    """By task, what it predicts of each study."""
    same: dict[str, Shaped[np.ndarray, "study"]]
    """By modality: studies whose inputs are identical share a value."""
    untrained: dict[View, Float[np.ndarray, "study width"]] = field(default_factory=dict)
    """As `fused`, of the model before its training; empty where that is not asked for."""
    all_texts: dict[str, dict[str, Shaped[np.ndarray, "study *value"]]] = field(default_factory=dict)
    """As `predicted`, each the mean over a study's texts, given one after the other; empty where no study of the split
    has several."""


@dataclass(frozen=True)
class HeldOut:
    """An evaluation as one task sees it."""

    test: Split
    predicted: dict[str, Shaped[np.ndarray, "study *value"]]
    """The task's own of the test split, by name, given the first text of each field."""
    all_texts: dict[str, Shaped[np.ndarray, "study *value"]]
    """Likewise, the mean over what is predicted with each of a study's texts; empty where no study has several."""
    validation: Callable[[], Split | None]
    """The studies that training was watched on: neither learnt from nor measured. None where there are none."""
    task: str
    """The name under which splits hold what the task predicts."""
    classes: dict[str, tuple[str, ...]]
    """Of each label of the store."""
    bootstrap: Bootstrap
    seed: int
    split: str
    """The name of the test split."""
    recall_at: tuple[int, ...]
    max_gallery: int
    """Studies among which one is looked for."""
    fitted: Callable[[str, View], dict[str, LogProbability]]
    """Of a label and what a task that answers it may not see: what is fitted on the training split, by name: linear
    probes of the fused features and baselines on the table."""
    of_texts: Callable[[list[Words], tuple[str, ...]], dict[str, np.ndarray]]
    """The task's predictions of these names for studies that hold nothing but these words."""
    tokens: Callable[[list[Words]], Int[np.ndarray, "study token"]]
    """What the model is given of these words, all fields one after another."""
    first_text: str
    """The field of texts that a prompt stands in."""
    readings: Callable[[], list[list[Words]]]
    """Of each test study, the first text of every field, then the second of every field, and so on."""
    training_texts: Callable[[], list[Words]]
    """Readings of some training studies, in which prompts can stand."""
    picture: Callable[[int], Slice]
    """The middle slice of the first image of a study, by its row."""
