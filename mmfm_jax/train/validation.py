"""What a run measures on the store's validation patients while it trains."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mmfm_jax.data.batch import Batch, InputSpec
from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.pipeline import evaluation_batches
from mmfm_jax.errors import UserError
from mmfm_jax.experiment import Experiment
from mmfm_jax.parallel import sharding
from mmfm_jax.parallel.processes import meet
from mmfm_jax.train.state import TrainState, learner_shapes
from mmfm_jax.train.step import make_validation


class Validation:
    """The tasks' losses and metrics over the first batches of the validation patients; the same ones each time.

    Sums and counts are added over batches and divided once: a batch that is padded, or holds few labels, weighs as much
    as what it holds.
    """

    def __init__(self, experiment: Experiment, graph, samples: Samples, spec: InputSpec, mesh: Mesh, rows: np.ndarray):
        self._config, self._samples, self._mesh, self._rows = experiment.train, samples, mesh, rows
        self._studies = min(
            len(samples.store.rows("validation")), self._config.validate_batches * self._config.batch_size
        )
        self._validate = jax.jit(make_validation(graph, experiment, spec), out_shardings=sharding.replicated(mesh))
        self._compiled: Any = None
        learner = nnx.merge(*learner_shapes(experiment, spec))
        self._divide = jax.jit(learner.metrics)

    def __call__(self, params, buffers) -> dict[str, float]:
        """By `validation/METRIC`."""
        size, total = self._config.batch_size, None
        batches = evaluation_batches(self._samples, "validation", size, self._rows, self._studies)
        for count, local in enumerate(batches, 1):
            given = (params, buffers, sharding.global_batch(local, self._rows, size, self._mesh), jnp.int32(count))
            if self._compiled is None:
                self._compiled = self._validate.lower(*given).compile()
                meet("validation compiled")
            sums = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(self._compiled(*given)))
            total = sums if total is None else jax.tree.map(np.add, total, sums)
        return {f"validation/{name}": float(value) for name, value in jax.device_get(self._divide(total)).items()}


def loss_parts(experiment: Experiment, graph: Any, spec: InputSpec, state: TrainState, batch: Batch) -> list[str]:
    """The parts of the tasks' losses, as metrics name them; nothing is computed.

    Raises UserError when `checkpoint.best` is none of the metrics that validation gives.
    """
    best, validate = experiment.checkpoint.best, make_validation(graph, experiment, spec)

    def measured(params: Any, buffers: Any, batch: Batch) -> Any:
        sums = validate(params, buffers, batch, np.int32(1))
        return sums.losses, nnx.merge(graph, params, buffers).metrics(sums)

    losses, metrics = jax.eval_shape(measured, state.params, state.buffers, batch)
    names = sorted(f"validation/{name}" for name in metrics)
    if best is not None and best not in names:
        raise UserError(f"checkpoint.best: {best} is no metric of this run; there are {', '.join(names)}, or null")
    return [f"{task}/{part}" for task, parts in losses.items() for part in parts]
