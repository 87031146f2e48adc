"""A run's folder: what is in it, and the rules by which a run may go on in it.

config.yaml        the resolved experiment
inputs.json        shapes, vocabularies and normalisation that the model was built for
tokenizer.json     Hugging Face format
versions.json      releases that made the run and stores that it was trained on, by when they changed
checkpoints/       orbax, a folder a step
metrics.jsonl      one line a logged step
.lock              held while a process trains into the folder
steps-N/           the decay of a run of N steps that was prolonged: a run of its own, to evaluate
profile/           a trace of some steps, by `train.profile`
tensorboard/
stalls/            Python stacks of each process that stood still
evaluation.json, report.html   by `mmfm evaluate`
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmfm_jax.data.batch import InputSpec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.errors import UserError
from mmfm_jax.experiment import Experiment, load_experiment, to_yaml
from mmfm_jax.files import replace
from mmfm_jax.train.place import CONFIG, INPUTS, TOKENIZER, check_run
from mmfm_jax.train.place import exists as exists

MAY_CHANGE = (  # what a run may go on with changed: none of it alters the mathematics of a step
    "name",
    "mesh",
    "checkpoint",
    "evaluate",
    "data.store",  # it may have moved; inputs.json must still agree
    "data.mix.*.store",
    "data.reader_threads",
    "data.prefetch_batches",
    "data.workers",
    "data.cache_bytes",
    "train.log_every",
    "train.validate_every",
    "train.validate_batches",
    "train.max_skipped",
    "train.patience",
    "train.stall_minutes",
    "train.profile",
    "train.steps",  # may grow where the schedule lets it (`prolong.py`)
)


def read(run: Path) -> tuple[Experiment, InputSpec, Tokenizer]:
    """What a run was started with. Raises UserError when `run` holds none."""
    check_run(run)
    experiment = load_experiment(run / CONFIG)
    try:
        spec = InputSpec.model_validate_json((run / INPUTS).read_text())
    except (OSError, ValidationError) as error:
        raise UserError(f"{run / INPUTS}: is missing or damaged; start the run again in a new folder") from error
    tokenizer = Tokenizer.load(str(run / TOKENIZER))
    if spec.vocabulary_size != tokenizer.vocabulary_size:
        raise UserError(f"{run / INPUTS}: is of another tokenizer than that in {TOKENIZER}; copy the run again")
    return experiment, spec, tokenizer


def write(run: Path, experiment: Experiment, spec: InputSpec, tokenizer: Tokenizer) -> None:
    """Writes each file whole or not at all; `config.yaml`, last, makes the folder a run."""
    run.mkdir(parents=True, exist_ok=True)
    replace(run / TOKENIZER, tokenizer.to_json())
    replace(run / INPUTS, spec.model_dump_json(indent=1))
    replace(run / CONFIG, to_yaml(experiment))


@contextlib.contextmanager
def writing(run: Path) -> Iterator[None]:
    """What the file system refuses below a run's folder, or for want of room, as a UserError."""
    try:
        yield
    except OSError as error:
        below = error.filename is not None and _is_of(Path(os.fsdecode(error.filename)), run)
        if not below and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{run}: cannot be written ({error.strerror}); mend that, and the same command goes on, or give another "
            "folder"
        ) from error


def _is_of(path: Path, run: Path) -> bool:
    """Whether a path is the run's folder, within it, or a folder that it would be made in."""
    path, run = path.absolute(), run.absolute()
    return path.is_relative_to(run) or run.is_relative_to(path)


def check_same(run: Path, held: Experiment, asked: Experiment) -> None:
    """Raises UserError that names every field in which a run may not go on as asked."""
    before, now = (_flat(experiment.model_dump(mode="json")) for experiment in (held, asked))
    of_tasks = (f"tasks.{name}.{field}" for name, task in asked.tasks.items() for field in task.of_evaluation)
    free_fields = (*MAY_CHANGE, *of_tasks)
    differ = [
        f"{field} {before.get(field, 'not set')} and is now asked to go on with {now.get(field, 'not set')}"
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field)
        and not any(fnmatchcase(f"{field}.", f"{free}.*") for free in free_fields)
    ]
    if differ:
        same = "value" if len(differ) == 1 else f"values of these {len(differ)} fields"
        raise UserError(
            f"{run / CONFIG}: this run was started with {', with '.join(differ)}; give the same {same}, or another "
            "--run to start anew"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat
