"""The whole experiment as frozen, typed data: YAML in, dotted overrides on top, one JSON schema for editors.

The parts lie in `config/`. What a task can be configured with lives in the task's own file (`tasks/`);
`experiment_type` joins those to the rest, so a new task needs no edit here.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, create_model, model_validator

from mmfm_jax.config.base import Config, Count
from mmfm_jax.config.data import DataConfig, changed_image
from mmfm_jax.config.evaluation import EvaluateConfig
from mmfm_jax.config.files import describe, read_yaml
from mmfm_jax.config.inputs import Inputs
from mmfm_jax.config.model import ModelConfig
from mmfm_jax.config.training import CheckpointConfig, MeshConfig, OptimizerConfig, TrainConfig
from mmfm_jax.errors import UserError
from mmfm_jax.tasks import task_types
from mmfm_jax.tasks.base import Task, TaskConfig


class Experiment(Config):
    """Everything a run depends on; saved, resolved, with the run."""

    name: str
    """Of the run, as its report is headed."""
    seed: Count = 0
    """Of initialisation, shuffling, augmentation and masking."""
    inputs: Inputs
    """What the model is given: images, texts and columns of a study."""
    data: DataConfig
    """Where studies are read and how they reach the model."""
    model: ModelConfig
    """Sizes of the encoders and of their fusion."""
    tasks: dict[str, TaskConfig]
    """Proxy tasks by a name of yours; the run minimises their weighted sum."""
    mesh: MeshConfig = MeshConfig()
    """How devices share the work."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How parameters move."""
    train: TrainConfig
    """How long the run is and how a step is taken."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What the run keeps."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What is measured on held-out patients."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the store that some task learns: all that training reads."""
        return tuple(sorted({label for task in self.tasks.values() for label in task.needs().labels.values()}))

    @model_validator(mode="after")
    def _fits_together(self):
        if not self.tasks:
            raise ValueError("tasks is empty; name at least one")
        if self.train.batch_size % self.train.accumulate:
            raise ValueError(
                f"train.accumulate {self.train.accumulate} does not divide train.batch_size {self.train.batch_size}"
            )
        for name, mixed in self.data.mix.items():
            for role in mixed.images:
                if role not in self.inputs.images:
                    raise ValueError(
                        f"data.mix.{name}.images: {role} is not among inputs.images ({', '.join(self.inputs.images)})"
                    )
                changed = changed_image(self.inputs.images[role], mixed.images[role])
                counts = [len(image.windows) for image in (self.inputs.images[role], changed)]
                if counts[0] != counts[1]:
                    raise ValueError(
                        f"data.mix.{name}.images.{role}.window: gives {counts[1]} windows where "
                        f"inputs.images.{role} has {counts[0]}, and each is a channel; give as many, or leave it out"
                    )
                if changed.foreground and changed.crop != "random":
                    raise ValueError(f"data.mix.{name}.images.{role}: foreground is of random crops; set crop: random")
        aligned = next((name for name, task in self.tasks.items() if task.aligns_text), None)
        if aligned and self.inputs.images:
            own = [
                f"data.mix.{name}.augment" if of.augment else "data.augment"
                for name, of in sorted(self.data.mix.items())
            ]
            for field, augment in zip(own or ["data.augment"], self.data.augments):
                if augment.swapped and not augment.flip_with_text:
                    raise ValueError(
                        f"{field}.flip: a mirror image swaps {augment.swapped[-1]}, which texts of tasks.{aligned} may "
                        "name; set flip to 0, or flip_with_text: true if no text does"
                    )
        packed = [role for role, image in self.inputs.images.items() if image.pack]
        if packed and any(augment.shift_mm or augment.rotate_degrees for augment in self.data.augments):
            raise ValueError(
                f"data.augment: shift_mm and rotate_degrees resample voxels across patches, which packed images "
                f"(inputs.images.{packed[0]}.pack) cannot do; set both to 0 (crop: random moves the crop instead)"
            )
        return self


def experiment_type() -> type[Experiment]:
    """`Experiment` with `tasks` narrowed to the union of every task's Config."""
    return _experiment_of(tuple(task_types().values()))


@functools.cache
def _experiment_of(types: tuple[type[Task], ...]) -> type[Experiment]:
    configs: Any = functools.reduce(operator.or_, (task.Config for task in types))
    tasks: Any = dict[str, Annotated[configs, Field(discriminator="kind")]]
    told = Field(description=Experiment.model_fields["tasks"].description)
    return create_model("Experiment", __base__=Experiment, __doc__=Experiment.__doc__, tasks=(tasks, told))


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads a YAML experiment and applies dotted overrides (`["--train.steps", "500"]`).

    Raises UserError with one sentence that names the file, the field and what is wrong.
    """
    import tyro

    raw = read_yaml(path, "an experiment in YAML, such as `mmfm init demo` writes")
    experiment = validate(raw, str(path))
    if not overrides:
        return experiment
    try:
        return tyro.cli(experiment_type(), default=experiment, args=list(overrides), prog=f"mmfm train {path}")
    except ValidationError as error:
        raise UserError(describe(error, "the command line")) from error


def validate(raw: Any, source: str) -> Experiment:
    """The experiment in parsed YAML; `source` is named in errors."""
    if not isinstance(raw, dict):
        raise UserError(
            f"{source}: holds no experiment; it must be a mapping with inputs, data, model, tasks and train"
        )
    try:
        return experiment_type().model_validate(raw)
    except ValidationError as error:
        raise UserError(describe(error, source)) from error


def to_yaml(experiment: Experiment) -> str:
    """The resolved experiment as YAML that `load_experiment` reads back to an equal value."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, width=120)
