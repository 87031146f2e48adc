"""The whole experiment as frozen, typed data: YAML in, dotted overrides on top, one JSON schema for editors.

The parts lie in `config/`. What a task can be configured with lives in the task's own file (`tasks/`);
`experiment_type` joins those to the rest, so a new task needs no edit here.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, create_model, model_validator

from mmfm_jax.config.base import Config, Seed
from mmfm_jax.config.data import DataConfig, changed_image
from mmfm_jax.config.evaluation import EvaluateConfig
from mmfm_jax.config.files import as_json, dump, read_yaml
from mmfm_jax.config.flags import apply_flags
from mmfm_jax.config.inputs import Inputs
from mmfm_jax.config.mistakes import describe
from mmfm_jax.config.model import ModelConfig
from mmfm_jax.config.tasks.base import TaskConfig
from mmfm_jax.config.training import CheckpointConfig, MeshConfig, OptimizerConfig, TrainConfig
from mmfm_jax.errors import UserError
from mmfm_jax.tasks import task_configs


class Experiment(Config):
    """Everything a run depends on; saved, resolved, with the run."""

    name: str
    """Of the experiment, as reports show it."""
    seed: Seed = 0
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
        if self.train.patience and not self.checkpoint.best:
            raise ValueError("train.patience waits for a better checkpoint.best, which is null; name a metric there")
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
    return _experiment_of(tuple(task_configs().values()))


@functools.cache
def _experiment_of(configs: tuple[type[TaskConfig], ...]) -> type[Experiment]:
    union: Any = functools.reduce(operator.or_, configs)
    tasks: Any = dict[str, Annotated[union, Field(discriminator="kind")]]
    told = Field(description=Experiment.model_fields["tasks"].description)
    return create_model("Experiment", __base__=Experiment, __doc__=Experiment.__doc__, tasks=(tasks, told))


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads a YAML experiment and applies dotted overrides (`["--train.steps", "500"]`); nothing here needs JAX.

    Raises UserError with one sentence that names the file, the field and what is wrong.
    """
    return validate(read_yaml(path, "an experiment in YAML, such as `mmfm init demo` writes"), str(path), overrides)


def changed(experiment: Experiment, overrides: Sequence[str], source: str) -> Experiment:
    """An experiment with dotted overrides applied. Raises UserError, which names `source`."""
    return validate(experiment.model_dump(mode="json"), source, overrides) if overrides else experiment


def validate(raw: Any, source: str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment in parsed YAML; `source` is named in errors."""
    model = experiment_type()
    if not isinstance(raw, dict) or not any(key in model.model_fields for key in raw):
        raise UserError(
            f"{source}: holds no experiment; it must be a mapping with inputs, data, model, tasks and train"
        )
    held, flags = apply_flags(as_json(raw, source), overrides, model)
    held = as_json(held, "the command line")
    try:
        return model.model_validate_json(json.dumps(held), strict=True)
    except ValidationError as error:
        raise UserError(describe(error, source, held, model, flags=flags)) from error


def to_yaml(experiment: Experiment) -> str:
    """The resolved experiment as YAML that `load_experiment` reads back to an equal value."""
    return dump(experiment.model_dump(mode="json"))
