"""One training step as mathematics: prepare, gradient of the summed task losses, clipped AdamW, average."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, UInt32

from mmfm_jax.config import Experiment
from mmfm_jax.data.batch import Batch, InputSpec
from mmfm_jax.data.transforms import prepare
from mmfm_jax.tasks.base import Metrics
from mmfm_jax.train.optimizer import schedule
from mmfm_jax.train.state import TrainState


def make_step(
    graph: nnx.GraphDef, experiment: Experiment, spec: InputSpec, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function from a state and a raw global batch to the next state and the step's metrics."""
    config, rate = experiment.train, schedule(experiment.optimizer, experiment.train.steps)

    def loss_of(params: nnx.State, batch: Batch, rng: jax.Array) -> tuple[Float[Array, ""], Metrics]:
        return nnx.merge(graph, params).loss(batch, rng, train=True)

    def gradient(params: nnx.State, batch: Batch, rng: jax.Array):
        """Mean loss, metrics and gradient over the parts of the batch, one part after another."""
        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
        if config.accumulate == 1:
            return value_and_grad(params, batch, rng)

        def add(total, part_and_rng):
            return jax.tree.map(jnp.add, total, value_and_grad(params, *part_and_rng)), None

        parts = split(batch, config.accumulate)
        rngs = jax.random.split(rng, config.accumulate)
        shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], parts), rngs[0])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, (parts, rngs))
        return jax.tree.map(lambda x: x / config.accumulate, total)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        augment_rng, loss_rng = jax.random.split(rng)
        prepared = prepare(batch, spec, experiment.data.augment, augment_rng)
        (loss, metrics), gradients = gradient(state.params, prepared, loss_rng)

        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        average = None
        if state.average is not None and config.ema_decay is not None:
            updates_before = (state.step - state.skipped).astype(jnp.float32)
            decay = jnp.minimum(
                config.ema_decay, (1 + updates_before) / (10 + updates_before)
            )  # forgets the start soon
            average = optax.incremental_update(params, state.average, 1 - decay)

        def if_finite(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        following = TrainState(
            params=if_finite(params, state.params),
            optimizer=if_finite(moments, state.optimizer),
            average=if_finite(average, state.average),
            step=state.step + 1,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
            key=state.key,
        )
        metrics = {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": rate(state.step - state.skipped),  # the schedule counts updates
            "skipped": following.skipped,
            "skipped_in_a_row": following.skipped_in_a_row,
            "batch_checksum": checksum(batch),
        } | metrics
        return following, metrics

    return step


def make_validation(graph: nnx.GraphDef, experiment: Experiment, spec: InputSpec) -> Callable:
    """The function from parameters, a raw batch and the batch's number to the tasks' metrics, nothing augmented."""

    def validate(params: nnx.State, batch: Batch, number: Array) -> Metrics:
        rng = jax.random.fold_in(jax.random.key(experiment.seed), number)
        loss, metrics = nnx.merge(graph, params).loss(prepare(batch, spec, None, None), rng, train=False)
        return {"loss": loss} | metrics

    return validate


def checksum(batch: Batch) -> UInt32[Array, ""]:
    """A 32-bit hash of every value of a raw global batch and its place, the same on any mesh: by it two runs show that
    they saw the same data."""
    total = jnp.uint32(0)
    for number, leaf in enumerate(jax.tree.leaves(batch)):
        bits = leaf if leaf.dtype != jnp.float32 else jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        place = jnp.arange(leaf.size, dtype=jnp.uint32).reshape(leaf.shape) * jnp.uint32(2654435761) + number
        mixed = (bits.astype(jnp.uint32) + place) * jnp.uint32(0x2C1B3C6D)
        total += ((mixed ^ (mixed >> 15)) * jnp.uint32(0x297A2D39)).sum(dtype=jnp.uint32)
    return total


def split(batch: Batch, parts: int) -> Batch:
    """[batch, ...] as [parts, batch / parts, ...]; part i takes every study whose row is i modulo `parts`, so each
    device keeps the studies it holds."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
