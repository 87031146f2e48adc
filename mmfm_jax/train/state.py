"""Everything a run changes as it goes: a pytree, nothing hidden."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt32

from mmfm_jax.data.batch import InputSpec
from mmfm_jax.experiment import Experiment
from mmfm_jax.model.layers import Linear
from mmfm_jax.model.parameter import check_parameters
from mmfm_jax.parallel import sharding
from mmfm_jax.train import groups
from mmfm_jax.train.learner import Learner


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    params: nnx.State
    """Float32: what is learnt, and nothing else."""
    buffers: nnx.State
    """Every other variable of the learner, of any dtype, as the loss of a step leaves it to the next. Neither
    differentiated nor averaged."""
    optimizer: optax.OptState
    """Of the parameters that are not frozen."""
    average: nnx.State | None
    """Exponential moving average of `params`, if the run keeps one."""
    step: Int[Array, ""]
    """Steps taken, skipped ones included."""
    skipped: Int[Array, ""]
    """Steps whose gradient was not finite, so that nothing was updated."""
    skipped_in_a_row: Int[Array, ""]
    key: UInt32[Array, "word"]
    """Raw random key of the run; step s draws from `fold_in(key, s)`."""


def learner_shapes(experiment: Experiment, spec: InputSpec) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The structure of the learner, and the shapes of its parameters and buffers; nothing is allocated.

    Raises UserError when a task or a parameter group does not fit it.
    """
    learner = nnx.eval_shape(lambda: Learner(experiment, spec, nnx.Rngs(params=jax.random.key(0))))
    for _, module in nnx.iter_modules(learner):
        if isinstance(module, Linear):
            module.reduce_dtype = experiment.train.reduce_dtype
    graph, params, buffers = nnx.split(learner, nnx.Param, ...)
    check_parameters(params)
    groups.check(experiment.optimizer.groups, params)
    return graph, params, buffers


def initial_learner(experiment: Experiment, spec: InputSpec) -> Learner:
    """The learner before the first step, a function of `experiment.seed`."""
    return Learner(experiment, spec, nnx.Rngs(params=jax.random.fold_in(jax.random.key(experiment.seed), 0)))


def initial_state(experiment: Experiment, spec: InputSpec, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, a function of `experiment.seed`."""
    key = jax.random.key(experiment.seed)
    _, params, buffers = nnx.split(initial_learner(experiment, spec), nnx.Param, ...)
    return TrainState(
        params=params,
        buffers=buffers,
        optimizer=optimizer.init(groups.split(params, experiment.optimizer.groups)[0]),
        average=None if experiment.train.ema_decay is None else jax.tree.map(jnp.copy, params),
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.fold_in(key, 1)),
    )


def state_shardings(state: TrainState, mesh: Mesh) -> Any:
    """Where each leaf of the state lives: parameters, their moments and average, and buffers by the rule
    table, scalars everywhere.

    `state` may be shapes alone.
    """
    params = sharding.of_variables(state.params, mesh)
    everywhere: Any = sharding.replicated(mesh)
    return TrainState(
        params=params,
        buffers=sharding.of_variables(state.buffers, mesh),
        optimizer=sharding.like_parameters(state.optimizer, state.params, params, mesh),
        average=None if state.average is None else params,
        step=everywhere,
        skipped=everywhere,
        skipped_in_a_row=everywhere,
        key=everywhere,
    )
