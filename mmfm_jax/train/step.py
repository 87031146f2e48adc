"""One training step as mathematics: prepare, gradient of the summed task losses, clipped update, average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt32

from mmfm_jax.data.batch import Batch, InputSpec
from mmfm_jax.data.feed.transforms import prepare
from mmfm_jax.experiment import Experiment
from mmfm_jax.parallel import sharding
from mmfm_jax.parallel.loops import scan
from mmfm_jax.tasks.base import Metrics
from mmfm_jax.train import groups
from mmfm_jax.train.optimizer import schedule
from mmfm_jax.train.state import TrainState


def make_step(
    graph: nnx.GraphDef, experiment: Experiment, spec: InputSpec, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function from a state and a raw global batch to the next state and the step's metrics."""
    config, rate = experiment.train, schedule(experiment.optimizer, experiment.train.steps)

    def gradient(params: nnx.State, frozen: nnx.State, batch: Batch, rng: jax.Array):
        """Mean loss, metrics and gradient over the parts of the batch, one part after another."""

        def loss_of(params: nnx.State, batch: Batch, rng: jax.Array) -> tuple[Float[Array, ""], Metrics]:
            return nnx.merge(graph, params, frozen).loss(batch, rng, train=True)

        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
        if config.accumulate == 1:
            return value_and_grad(params, batch, rng)

        def add(total, part_and_rng):
            return jax.tree.map(jnp.add, total, value_and_grad(params, *part_and_rng)), None

        parts = split(batch, config.accumulate)
        rngs = jax.random.split(rng, config.accumulate)
        shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], parts), rngs[0])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = scan(add, zeros, (parts, rngs))
        return jax.tree.map(lambda x: x / config.accumulate, total)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        augment_rng, loss_rng = jax.random.split(rng)
        prepared = prepare(batch, spec, experiment.data.augments, augment_rng)
        trained, frozen = groups.split(state.params, experiment.optimizer.groups)
        (loss, metrics), gradients = gradient(trained, frozen, prepared, loss_rng)

        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        updates, moments = optimizer.update(gradients, state.optimizer, trained)
        params: Any = optax.apply_updates(trained, updates)
        average = None
        if state.average is not None and config.ema_decay is not None:
            updates_before = (state.step - state.skipped).astype(jnp.float32)
            decay = jnp.minimum(
                config.ema_decay, (1 + updates_before) / (10 + updates_before)
            )  # forgets the start soon
            average, _ = groups.split(state.average, experiment.optimizer.groups)
            moved: Any = optax.incremental_update(params, average, 1 - decay)
            average = nnx.merge_state(moved, frozen)

        def if_finite(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        following = TrainState(
            params=if_finite(nnx.merge_state(params, frozen), state.params),
            optimizer=if_finite(moments, state.optimizer),
            average=if_finite(average, state.average),
            step=state.step + 1,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
            key=state.key,
        )
        metrics = (
            {
                "loss": loss,
                "gradient_norm": norm,
                "learning_rate": rate(state.step - state.skipped),  # the schedule counts updates
                "skipped": following.skipped,
                "skipped_in_a_row": following.skipped_in_a_row,
                "batch_checksum": checksum(batch),
            }
            | padding(batch)
            | metrics
        )
        return following, metrics

    return step


def jitted_step(
    graph: nnx.GraphDef,
    experiment: Experiment,
    spec: InputSpec,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    mesh: Mesh,
):
    """The step as a run and `mmfm plan` alike compile it: the state sharded and donated, the batch split by study."""
    return jax.jit(
        make_step(graph, experiment, spec, optimizer),
        in_shardings=(shardings, sharding.by_study(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )


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


def padding(batch: Batch) -> Metrics:
    """The share of the tokens of packed images that no image fills; nothing where none is packed."""
    segments = [part.segment for part in batch.packed.values() if part.segment is not None]
    if not segments:
        return {}
    filled = jnp.stack([(segment > 0).sum() for segment in segments]).sum()
    return {"padding": 1 - filled / sum(segment.size for segment in segments)}


def split(batch: Batch, parts: int) -> Batch:
    """[batch, ...] as [parts, batch / parts, ...]; part i takes every row that is i modulo `parts`, so each device
    keeps the studies it holds. A row is a study, or the studies whose images are packed together."""
    rows = len(batch.study) // max((part.studies for part in batch.packed.values()), default=1)

    def cut(x):
        dealt = x.reshape(rows // parts, parts, len(x) // rows, *x.shape[1:]).swapaxes(0, 1)
        return dealt.reshape(parts, len(x) // parts, *x.shape[1:])

    return jax.tree.map(cut, batch)
