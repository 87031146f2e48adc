"""The model with the heads of its tasks: everything a run learns."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, PRNGKeyArray

from mmfm_jax.data.batch import Array, Batch, InputSpec
from mmfm_jax.experiment import Experiment
from mmfm_jax.losses.mean import Mean
from mmfm_jax.model.multimodal import MultimodalModel
from mmfm_jax.tasks import task_types
from mmfm_jax.tasks.base import Scalars, Task, Views

ByTask = dict[str, dict[str, Mean]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """Losses and metrics of all tasks as sums and counts: those of two batches add up leaf by leaf."""

    losses: ByTask
    metrics: ByTask


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

    def loss(self, batch: Batch, rng: PRNGKeyArray, train: bool) -> tuple[Float[Array, ""], Scalars]:
        """The objective on a prepared batch in one piece, and all metrics."""
        metrics = self.metrics(self.sums(batch, jax.random.split(rng, len(batch.study)), train))
        return metrics["loss"], metrics

    def sums(self, batch: Batch, keys: PRNGKeyArray, train: bool) -> Sums:
        """Of a prepared batch; `keys`: one a study [batch], from which all that is drawn of it comes."""

        def keys_of(number: int) -> PRNGKeyArray:
            return jax.vmap(jax.random.fold_in, (0, None))(keys, number)

        views = Views(self.model, batch, keys_of(0), train, self.drop)
        losses = {n: self.tasks[n].loss(views, keys_of(i)) for i, n in enumerate(sorted(self.tasks), 1)}
        return Sums({n: of.parts for n, of in losses.items()}, {n: of.metrics for n, of in losses.items()})

    def objective(self, losses: ByTask) -> Float[Array, ""]:
        """What a run minimises: the weighted sum of the tasks' losses."""
        total = jnp.zeros(())
        for name, parts in losses.items():
            total += self.tasks[name].config.weight * self._loss(name, parts)
        return total

    def _loss(self, name: str, parts: dict[str, Mean]) -> Float[Array, ""]:
        task = self.tasks[name]
        return sum((task.part_weight(part) * mean.value for part, mean in parts.items()), start=jnp.zeros(()))

    def metrics(self, sums: Sums) -> Scalars:
        """`loss`, and by `task/metric` the loss of each task, its parts and its metrics. Asks parameters nothing."""
        found = {"loss": self.objective(sums.losses)}
        for name, parts in sums.losses.items():
            means = {metric: mean.value for metric, mean in (parts | sums.metrics[name]).items()}
            means["loss"] = self._loss(name, parts)
            means |= self.tasks[name].derived(means)
            found |= {f"{name}/{metric}": value for metric, value in means.items()}
        return found
