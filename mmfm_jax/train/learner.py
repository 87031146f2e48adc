"""The model with the heads of its tasks: everything a run learns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from mmfm_jax.data.batch import Array, Batch, InputSpec
from mmfm_jax.experiment import Experiment
from mmfm_jax.model.multimodal import MultimodalModel
from mmfm_jax.tasks import task_types
from mmfm_jax.tasks.base import Metrics, Task, Views


class Learner(nnx.Module):
    tasks: nnx.Dict[Task]

    def __init__(self, experiment: Experiment, spec: InputSpec, rngs: nnx.Rngs):
        """Raises UserError when a task needs what the inputs lack."""
        self.drop = experiment.model.fusion.drop
        self.model = MultimodalModel(experiment.model, spec, rngs)
        self.tasks = nnx.Dict(
            {
                name: task_types()[config.kind](name, config, experiment.model, spec, rngs)
                for name, config in experiment.tasks.items()
            }
        )

    def loss(self, batch: Batch, rng: jax.Array, train: bool) -> tuple[Float[Array, ""], Metrics]:
        """The weighted sum of the tasks' losses on a prepared batch, and metrics as `task/metric`."""
        views_rng, *task_rngs = jax.random.split(rng, 1 + len(self.tasks))
        views = Views(self.model, batch, views_rng, train, self.drop)
        total, metrics = jnp.zeros(()), {}
        for task_rng, name in zip(task_rngs, sorted(self.tasks)):
            task = self.tasks[name]
            loss, own = task.loss(views, task_rng)
            total += task.config.weight * loss
            metrics |= {f"{name}/loss": loss} | {f"{name}/{metric}": value for metric, value in own.items()}
        return total, metrics
