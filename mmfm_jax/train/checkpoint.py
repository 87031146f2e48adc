"""Checkpoints of a run: asynchronous, sharded, whole or not there; leaves are held and found by their names."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from mmfm_jax.config.training import CheckpointConfig
from mmfm_jax.data.batch import InputSpec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.errors import UserError
from mmfm_jax.experiment import Experiment
from mmfm_jax.train import folder, keep
from mmfm_jax.train.learner import Learner
from mmfm_jax.train.leaves import differences, named, renamed, stored_names
from mmfm_jax.train.optimizer import make_optimizer
from mmfm_jax.train.state import initial_state, learner_shapes

CHECKPOINTS = "checkpoints"
STATE, VALIDATION = "default", "validation"  # items of a checkpoint: arrays, and finite metrics as JSON
METRICS_FILES = (f"{VALIDATION}/metadata", "metrics/metrics")  # the second of releases before named leaves

Tree = TypeVar("Tree")


class Checkpoints:
    """The checkpoints in a run's folder."""

    def __init__(self, run: Path, config: CheckpointConfig, constant_until: int = 0, writes: bool = True):
        """`constant_until`: last step of the schedule's constant part (`optimizer.constant_until`);
        the last checkpoint up to it is never deleted. Without `writes` the folder is left as it is, also what another
        process is writing there."""
        self.config, self._constant_until = config, constant_until
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax narrates every save, and raises what goes wrong
        # Orbax's own metrics would be read as it opens the folder, and one that is cut short would close all.
        self._manager = ocp.CheckpointManager(
            (run / CHECKPOINTS).absolute(),
            item_names=(STATE, VALIDATION),
            item_handlers={STATE: ocp.PyTreeCheckpointHandler(), VALIDATION: ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Kept(self), cleanup_tmp_directories=writes, read_only=not writes
            ),
        )
        self._measured = {step: self._read_metrics(step) for step in self._manager.all_steps()}

    @property
    def measured(self) -> dict[int, dict[str, float]]:
        """Finite validation metrics of the checkpoints that are there, by step."""
        return {step: self._measured.get(step, {}) for step in self._manager.all_steps()}

    def told(self) -> str:
        """Which checkpoint `mmfm evaluate` takes, as a sentence."""
        best, name = self.best(), self.config.best
        value = self.measured.get(-1 if best is None else best, {}).get(name or "")
        if value is None:
            return f"Newest checkpoint: step {best}."
        return f"Best {name}: {value:.4g} at step {best}."

    def latest(self) -> int | None:
        """Step of the newest checkpoint that is whole."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Step of the checkpoint with the best metric, or the newest where none has one."""
        return keep.best(self.measured, self.config) or self.latest()

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Which of these steps stay."""
        return keep.kept(steps, self._measured, self.config, self._constant_until)

    def save(self, step: int, state: Any, metrics: dict[str, float]) -> None:
        """Starts a save and returns once the state is copied; `metrics` are those of the validation at this step.

        Raises UserError when this save could not be started, or the one before could not be finished.
        """
        if step in self._manager.all_steps():
            return
        self._measured[step] = keep.finite(metrics)
        items = {STATE: ocp.args.PyTreeSave(named(state)), VALIDATION: ocp.args.JsonSave(self._measured[step])}
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, step: int, shapes: Tree, shardings: Any | None) -> Tree:
        """The state at a step, straight into its shards (on one device where `shardings` is None).

        Raises UserError when the checkpoint is damaged, or its leaves are not exactly those of `shapes`.
        """
        return self._restore(step, shapes, shardings, ("*",), surplus=True)

    def restore_matching(self, step: int, tree: Tree, shardings: Any | None, patterns: Sequence[str]) -> Tree:
        """`tree` with the leaves whose names fit a pattern (`params.model.vision.*`) read from a checkpoint, which may
        be of another run; the others stay what they are, and nothing of them is read. Leaves may be shapes alone.

        Raises UserError when the checkpoint is damaged, lacks such a leaf or has it of another shape, or a pattern fits
        nothing.
        """
        return self._restore(step, tree, shardings, patterns, surplus=False)

    def _restore(self, step: int, tree: Tree, shardings: Any, patterns: Sequence[str], surplus: bool) -> Tree:
        place = self._manager.directory / str(step)
        every = named(tree)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in every):
                raise UserError(f"{pattern}: fits no name of what is to be restored; one is {next(iter(every), '-')}")
        wanted = {name: leaf for name, leaf in every.items() if any(fnmatchcase(name, p) for p in patterns)}
        with self._reading(step):
            held: Any = self._manager.item_metadata(step)[STATE]
            stored = stored_names(held)
        if differ := differences({name: held[stored[name]] for name in stored}, wanted, surplus):
            raise UserError(f"{place}: is of another model than this run's: {differ}; give the run that it is of")
        one = SingleDeviceSharding(jax.local_devices()[0])
        where = named(jax.tree.map(lambda _: one, tree) if shardings is None else shardings)
        asked = {
            stored[name]: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where[name])
            for name, leaf in wanted.items()
        }
        how = ocp.args.PyTreeRestore(
            item=asked, restore_args=ocp.checkpoint_utils.construct_restore_args(asked), partial_restore=True
        )
        with self._reading(step):
            found = self._manager.restore(step, args=ocp.args.Composite(**{STATE: how}))[STATE]
        return renamed(tree, lambda name, leaf: found[stored[name]] if name in wanted else leaf)

    def wait(self) -> None:
        """Returns when nothing is left to write. Raises UserError when something could not be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._writing():
            self._manager.close()

    def _read_metrics(self, step: int) -> dict[str, float]:
        """Those saved with a checkpoint; a file that is damaged has none."""
        for file in METRICS_FILES:
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
                return keep.finite(json.loads((self._manager.directory / str(step) / file).read_text()))
        return {}

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Orbax, TensorStore and JSON each have errors of their own, by which file of a checkpoint is damaged."""
        try:
            yield
        except (
            ValueError,
            KeyError,
            TypeError,
            OSError,
        ) as error:
            raise UserError(
                f"{self._manager.directory / str(step)}: is damaged, a file of it is missing or cut short; delete this "
                "checkpoint, and the same command goes on from the one before"
            ) from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:  # TensorStore raises what the disk says as a ValueError
            reason = re.sub(r" \[.*", "", str(error)).rpartition(": ")[2]
            raise UserError(
                f"{self._manager.directory}: a checkpoint could not be written ({reason}); the ones before it are "
                "sound: mend that, and the same command goes on from the last"
            ) from error


@dataclass(frozen=True)
class _Kept:
    """Orbax's question which checkpoints stay, as ours."""

    checkpoints: Checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        kept = self.checkpoints.kept([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


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
    checkpoints = Checkpoints(run, experiment.checkpoint, writes=False)
    step = checkpoints.best()
    if step is None:
        raise UserError(f"{run / CHECKPOINTS}: holds no checkpoint yet; train first with `mmfm train ... --run {run}`")
    optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
    shapes = jax.eval_shape(lambda: initial_state(experiment, spec, optimizer))
    averaged = shapes.average is not None
    patterns = ["average.*" if averaged else "params.*", *(["buffers.*"] if jax.tree.leaves(shapes.buffers) else [])]
    state = checkpoints.restore_matching(step, shapes, None, patterns)
    checkpoints.close()
    graph, *_ = learner_shapes(experiment, spec)
    learner = nnx.merge(graph, state.average if averaged else state.params, state.buffers)
    return TrainedRun(experiment, spec, tokenizer, step, learner)
