"""Checkpoints of a run: asynchronous, sharded, whole or not there; the best and the latest are kept."""

from __future__ import annotations

import contextlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from mmfm_jax.config.training import CheckpointConfig
from mmfm_jax.data.batch import InputSpec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.errors import UserError
from mmfm_jax.experiment import Experiment
from mmfm_jax.train import folder
from mmfm_jax.train.learner import Learner
from mmfm_jax.train.optimizer import make_optimizer
from mmfm_jax.train.state import TrainState, initial_state, learner_shapes

CHECKPOINTS = "checkpoints"


class Checkpoints:
    """The checkpoints in a run's folder."""

    def __init__(self, run: Path, config: CheckpointConfig):
        self.config = config
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax narrates every save, and raises what goes wrong
        kept: list[keep.PreservationPolicy] = [keep.LatestN(config.keep)]
        if config.best:
            kept.append(
                keep.BestN(
                    get_metric_fn=lambda metrics: metrics[config.best],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.CheckpointManager(
            (run / CHECKPOINTS).absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep.AnyPreservationPolicy(kept),
                best_fn=(lambda metrics: metrics[config.best]) if config.best else None,
                best_mode="min",
                cleanup_tmp_directories=True,
            ),
        )

    def latest(self) -> int | None:
        """Step of the newest checkpoint that is whole."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Step of the checkpoint with the best metric, or the newest where none has one."""
        return self._manager.best_step() if self.config.best else self.latest()

    def save(self, step: int, state: TrainState, metrics: dict[str, float]) -> None:
        """Starts a save and returns once the state is copied; `metrics` may lack the best-of metric.

        Raises UserError when this save could not be started, or the one before could not be finished.
        """
        if step in self._manager.all_steps():
            return
        named = {self.config.best: metrics[self.config.best]} if self.config.best in metrics else None
        with self._writing():
            self._manager.save(step, args=ocp.args.StandardSave(plain(state)), metrics=named, force=True)

    def restore(self, step: int, shapes: TrainState, shardings: TrainState | None) -> TrainState:
        """The state at a step, straight into its shards (on one device where `shardings` is None).

        Raises UserError when the checkpoint is damaged or of another model.
        """
        if shardings is None:
            shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), shapes)
        wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        try:
            found = self._manager.restore(step, args=ocp.args.StandardRestore(plain(wanted)))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(
                f"{self._manager.directory / str(step)}: is damaged or of another model; delete this checkpoint to go "
                f"on from the one before ({' '.join(str(error).split())[:200]})"
            ) from error
        return jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(found))

    def wait(self) -> None:
        """Returns when nothing is left to write. Raises UserError when something could not be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except (ValueError, OSError) as error:  # TensorStore raises what the disk says as a ValueError
            reason = re.sub(r" \[.*", "", str(error)).rpartition(": ")[2]
            raise UserError(
                f"{self._manager.directory}: a checkpoint could not be written ({reason}); the ones before it are "
                "sound: mend that, and the same command goes on from the last"
            ) from error


def plain(state: TrainState) -> dict[str, Any]:
    """The state as nested dictionaries of arrays in the order of its leaves, for files that any orbax can read."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    tree: dict[str, Any] = {}
    for number, (path, leaf) in enumerate(leaves):
        names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
        names = [name for name in names if name not in ("value", "")]
        tree[f"{number:05d}.{'.'.join(names)}"] = leaf
    return tree


@dataclass(frozen=True)
class TrainedRun:
    """A run's model as evaluation and export need it."""

    experiment: Experiment
    spec: InputSpec
    tokenizer: Tokenizer
    step: int
    learner: Learner


def load_run(run: str | Path) -> TrainedRun:
    """The best checkpoint of a run (averaged parameters, if it keeps them) on one device.

    Raises UserError when there is no run, or none of its checkpoints is whole.
    """
    run = Path(run)
    experiment, spec, tokenizer = folder.read(run)
    checkpoints = Checkpoints(run, experiment.checkpoint)
    step = checkpoints.best()
    if step is None:
        raise UserError(f"{run / CHECKPOINTS}: holds no checkpoint yet; train first with `mmfm train ... --run {run}`")
    optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
    shapes = jax.eval_shape(lambda: initial_state(experiment, spec, optimizer))
    state = checkpoints.restore(step, shapes, None)
    checkpoints.close()
    graph, *_ = learner_shapes(experiment, spec)
    learner = nnx.merge(graph, state.params if state.average is None else state.average, state.buffers)
    return TrainedRun(experiment, spec, tokenizer, step, learner)
