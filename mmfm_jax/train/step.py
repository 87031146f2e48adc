"""One training step as mathematics: prepare, gradient of the summed task losses, clipped update, average."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray, UInt32

from mmfm_jax.data.batch import Batch, InputSpec
from mmfm_jax.data.feed.transforms import prepare
from mmfm_jax.experiment import Experiment
from mmfm_jax.parallel import sharding
from mmfm_jax.parallel.loops import scan
from mmfm_jax.tasks.base import Scalars
from mmfm_jax.train import groups
from mmfm_jax.train.learner import ByTask, Sums
from mmfm_jax.train.optimizer import bounded, schedule
from mmfm_jax.train.state import TrainState

Counts = dict[str, dict[str, Any]]
"""Of the parts of each task's loss."""


def make_step(
    graph: nnx.GraphDef, experiment: Experiment, spec: InputSpec, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Scalars]]:
    """The function from a state and a raw global batch to the next state and the step's metrics."""
    config, rate = experiment.train, schedule(experiment.optimizer, experiment.train.steps)

    def objective(params, frozen, buffers, counts: Counts | None, batch: Batch, keys):
        """What is minimised; its sums, and the buffers that it leaves. Divided by `counts`, if given, in place of those
        of this part."""
        # Variables belong to the trace that made them: those of buffers are made anew, so that a loss may change them.
        learner = nnx.merge(graph, params, frozen, jax.tree.map(lambda x: x, buffers))
        sums = learner.sums(batch, keys, train=True)
        total = learner.objective(sums.losses if counts is None else divided_by(sums.losses, counts))
        return total, (sums, nnx.state(learner, nnx.Not(nnx.Param)))

    def gradient(
        params: nnx.State, frozen: nnx.State, buffers: nnx.State, batch: Batch, rng: jax.Array
    ) -> tuple[nnx.State, Sums, nnx.State]:
        """The gradient of the objective of the whole batch, its sums, and the buffers that it leaves, over its parts
        one after another; each part gets the buffers of the one before.

        Each loss is divided by the count of the whole batch and not of a part, so parts that hold unequally many
        labels, tokens or images weigh as they would in one piece.
        """
        differentiate = jax.grad(objective, has_aux=True)
        keys = jax.random.split(rng, len(batch.study))  # of each study, so what is drawn of it does not depend on parts
        if config.accumulate == 1:
            gradients, (sums, after) = differentiate(params, frozen, buffers, None, batch, keys)
            return gradients, sums, after
        parts = split(batch, keys, config.accumulate)
        first = jax.tree.map(lambda x: x[0], parts)

        def total(function):
            """The sum of what a function of buffers and a part gives, and the buffers that the last part leaves."""

            def add(carried, part):
                of_part, after = function(carried[1], *part)
                return (jax.tree.map(jnp.add, carried[0], of_part), after), None

            shapes = jax.eval_shape(function, buffers, *first)[0]
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            return scan(add, (zeros, buffers), parts)[0]

        def counted(buffers, batch, keys):
            sums, after = objective(params, frozen, buffers, None, batch, keys)[1]
            return counts_of(sums.losses), after

        # A count is of what is present and hidden; that it is learnt from nothing lets the compiler drop all else.
        counts, _ = total(counted)

        def differentiated(buffers, batch, keys):
            gradients, (sums, after) = differentiate(params, frozen, buffers, counts, batch, keys)
            return (gradients, sums), after

        (gradients, sums), after = total(differentiated)
        return gradients, sums, after

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Scalars]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        augment_rng, loss_rng = jax.random.split(rng)
        prepared = prepare(batch, spec, experiment.data.augments, augment_rng)
        trained, frozen = groups.split(state.params, experiment.optimizer.groups)
        gradients, sums, buffers = gradient(trained, frozen, state.buffers, prepared, loss_rng)
        losses = nnx.merge(graph, trained, frozen, state.buffers).metrics(sums)
        loss = losses["loss"]

        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        updates, moments = optimizer.update(gradients, state.optimizer, trained)
        updated: Any = optax.apply_updates(trained, updates)
        params: Any = bounded(updated)
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
            buffers=if_finite(buffers, state.buffers),
            optimizer=if_finite(moments, state.optimizer),
            average=if_finite(average, state.average),
            step=state.step + 1,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
            key=state.key,
        )
        metrics = (
            {
                "gradient_norm": norm,
                "learning_rate": rate(state.step - state.skipped),  # the schedule counts updates
                "skipped": following.skipped,
                "skipped_in_a_row": following.skipped_in_a_row,
                "batch_checksum": checksum(batch),
            }
            | padding(batch)
            | losses
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
    """The function from parameters, buffers, a raw batch and the batch's number to sums of losses and metrics,
    unaugmented. The buffers stay as they are.

    Sums of several batches add up; `Learner.metrics` divides them.
    """

    def validate(params: nnx.State, buffers: nnx.State, batch: Batch, number: Array) -> Sums:
        rng = jax.random.fold_in(jax.random.key(experiment.seed), number)
        keys = jax.random.split(rng, len(batch.study))
        return nnx.merge(graph, params, buffers).sums(prepare(batch, spec, None, None), keys, train=False)

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


def padding(batch: Batch) -> Scalars:
    """The share of the tokens of packed images that no image fills; nothing where none is packed."""
    segments = [part.segment for part in batch.packed.values() if part.segment is not None]
    if not segments:
        return {}
    filled = jnp.stack([(segment > 0).sum() for segment in segments]).sum()
    return {"padding": 1 - filled / sum(segment.size for segment in segments)}


def counts_of(losses: ByTask) -> Counts:
    return {task: {name: part.count for name, part in of.items()} for task, of in losses.items()}


def divided_by(losses: ByTask, counts: Counts) -> ByTask:
    return {
        task: {name: replace(part, count=counts[task][name]) for name, part in of.items()}
        for task, of in losses.items()
    }


def split(batch: Batch, keys: PRNGKeyArray, parts: int) -> tuple[Batch, PRNGKeyArray]:
    """[batch, ...] as [parts, batch / parts, ...], of a batch and of a key a study; part i takes every row that is i
    modulo `parts`, so each device keeps the studies it holds. A row is a study, or the studies whose images are packed
    together."""
    rows = len(batch.study) // max((part.studies for part in batch.packed.values()), default=1)

    def cut(x):
        dealt = x.reshape(rows // parts, parts, len(x) // rows, *x.shape[1:]).swapaxes(0, 1)
        return dealt.reshape(parts, len(x) // parts, *x.shape[1:])

    return jax.tree.map(cut, (batch, keys))
