"""How a run starts in an empty folder, or goes on in its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mmfm_jax.data.batch import InputSpec
from mmfm_jax.data.feed.spec import make_spec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.store.studies import Studies
from mmfm_jax.errors import UserError
from mmfm_jax.experiment import Experiment
from mmfm_jax.parallel.processes import meet
from mmfm_jax.train import folder, versions
from mmfm_jax.train.held import check_held
from mmfm_jax.train.lock import RunLock
from mmfm_jax.train.place import check_free
from mmfm_jax.train.prolong import check_steps, set_decay_aside
from mmfm_jax.train.state import learner_shapes


def start_or_resume(
    experiment: Experiment,
    store: Studies,
    run: Path,
    writes: bool,
    lock: RunLock | None = None,
    tell: Callable[[str], None] = print,
) -> tuple[InputSpec, Tokenizer]:
    """The specification and tokenizer of a run: those in its folder, or new ones written there by the first process.

    `lock` is taken once the run may go on, before anything is written. `tell` prints one line of what changed since.
    """
    for split in ("train", "validation"):
        store.rows(split)
    held = None
    if folder.exists(run):
        held, spec, tokenizer = folder.read(run)
        folder.check_same(run, held, experiment)
        check_steps(run, held, experiment)
        now = make_spec(
            experiment.inputs, store.schema, store.stats, tokenizer, store.windows(experiment.inputs.images)
        )
        if now != spec:
            raise UserError(
                f"{store.url}: is not the store that {run} was trained on (its shapes, vocabularies or "
                "statistics differ); give that store, or another --run to start anew"
            )
    else:
        check_free(run)
        tokenizer = make_tokenizer(experiment, store)
        spec = make_spec(
            experiment.inputs, store.schema, store.stats, tokenizer, store.windows(experiment.inputs.images)
        )
        check_held(experiment, store)
        learner_shapes(experiment, spec)  # every task agrees with the inputs before anything is written
    meet("run folder read")
    if lock:
        lock.take()
        changed = folder.exists(run) != (held is not None)
        meet("run folder locked")  # all have looked before the first process writes
        if changed:
            raise UserError(f"{run}: another run was started here at this moment; give another --run")
    if writes:
        if held:
            set_decay_aside(run, held, experiment)
        now = versions.current(store)
        for sentence in versions.changed(run, now):
            tell(sentence)
        run.mkdir(parents=True, exist_ok=True)
        versions.record(run, now)
        folder.write(run, experiment, spec, tokenizer)
    meet("run folder written")
    return spec, tokenizer


def make_tokenizer(experiment: Experiment, store: Studies) -> Tokenizer:
    """The given tokenizer, or one trained on the texts of the store's training patients."""
    if experiment.data.tokenizer:
        return Tokenizer.load(experiment.data.tokenizer)
    return Tokenizer.train(store.texts(store.rows("train")), experiment.data.vocabulary_size)
