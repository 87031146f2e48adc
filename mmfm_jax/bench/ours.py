"""Our side of a comparison: the step that `mmfm train` compiles, on one device, on random studies."""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from mmfm_jax.config.training import MeshConfig
from mmfm_jax.experiment import Experiment
from mmfm_jax.parallel import sharding
from mmfm_jax.parallel.mesh import make_mesh
from mmfm_jax.plan import lower
from mmfm_jax.plan.measure import random_batch
from mmfm_jax.train import groups
from mmfm_jax.train.flops import step_flops
from mmfm_jax.train.optimizer import make_optimizer
from mmfm_jax.train.state import initial_state


class Ours:
    """The compiled step with its state; `step(n)` takes n steps and waits for the last."""

    name = "mmfm_jax"

    def __init__(self, experiment: Experiment):
        """Raises UserError when the experiment does not fit together or one device."""
        spec, device = lower.assumed_spec(experiment), jax.devices()[0]
        self._mesh = make_mesh(MeshConfig(), [device])
        program = lower.make_program(experiment, spec, self._mesh)
        optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
        size = experiment.train.batch_size
        rows = sharding.local_rows(size, self._mesh)
        self._batch = sharding.global_batch(random_batch(spec, experiment.labels, size), rows, size, self._mesh)
        places = jax.tree.map(lambda leaf: leaf.sharding, program.state)
        with jax.set_mesh(self._mesh):
            self._state = jax.jit(lambda: initial_state(experiment, spec, optimizer), out_shardings=places)()
            self._step = program.step.lower(self._state, self._batch).compile()
        trained, _ = groups.split(program.state.params, experiment.optimizer.groups)
        self.parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trained))
        self.flops = step_flops(program.graph, experiment, spec, program.state, program.batch)
        self.loss = math.nan

    def step(self, steps: int) -> None:
        with jax.set_mesh(self._mesh):
            for _ in range(steps):
                self._state, metrics = self._step(self._state, self._batch)
            self.loss = float(metrics["loss"])
            jax.block_until_ready(self._state)


def matmul_peak(dtype: str, device: Any) -> float:
    """FLOP/s of large square products on a device, the best of several runs: what a step is held against."""
    size, turns = (2048, 4) if device.platform == "cpu" else (8192, 16)

    @jax.jit
    def products(x, y):
        return jax.lax.fori_loop(0, turns, lambda _, x: (x @ y).astype(x.dtype), x)

    x = jax.device_put(jnp.eye(size, dtype=dtype), device)
    products(x, x).block_until_ready()
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        products(x, x).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 * turns / best
