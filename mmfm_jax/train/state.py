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
from mmfm_jax.parallel import sharding
from mmfm_jax.train import groups
from mmfm_jax.train.learner import Learner


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    params: nnx.State
    """Float32."""
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


def learner_shapes(experiment: Experiment, spec: InputSpec) -> tuple[nnx.GraphDef, nnx.State]:
    """The structure of the learner and the shapes of its parameters; nothing is allocated.

    Raises UserError when a task or a parameter group does not fit it.
    """
    graph, params = nnx.split(nnx.eval_shape(lambda: Learner(experiment, spec, nnx.Rngs(params=jax.random.key(0)))))
    groups.check(experiment.optimizer.groups, params)
    return graph, params


def initial_state(experiment: Experiment, spec: InputSpec, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, a function of `experiment.seed`."""
    key = jax.random.key(experiment.seed)
    params = nnx.state(Learner(experiment, spec, nnx.Rngs(params=jax.random.fold_in(key, 0))))
    return TrainState(
        params=params,
        optimizer=optimizer.init(groups.split(params, experiment.optimizer.groups)[0]),
        average=None if experiment.train.ema_decay is None else jax.tree.map(jnp.copy, params),
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.fold_in(key, 1)),
    )


def state_shardings(state: TrainState, mesh: Mesh) -> Any:
    """Where each leaf of the state lives: parameters, their moments and average by the rule table, scalars everywhere.

    `state` may be shapes alone.
    """
    params = sharding.of_parameters(state.params, mesh)
    everywhere: Any = sharding.replicated(mesh)
    return TrainState(
        params=params,
        optimizer=sharding.like_parameters(state.optimizer, state.params, params, mesh),
        average=None if state.average is None else params,
        step=everywhere,
        skipped=everywhere,
        skipped_in_a_row=everywhere,
        key=everywhere,
    )
