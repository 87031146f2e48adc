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
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmfm_jax.data.batch import InputSpec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.errors import UserError
from mmfm_jax.experiment import Experiment, load_experiment, to_yaml

CONFIG, INPUTS, TOKENIZER = "config.yaml", "inputs.json", "tokenizer.json"

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


def exists(run: Path) -> bool:
    return (run / CONFIG).exists()


def read(run: Path) -> tuple[Experiment, InputSpec, Tokenizer]:
    """What a run was started with. Raises UserError when `run` holds none."""
    if not exists(local(run)):
        raise UserError(f"{run}: is not a run (it has no {CONFIG}); give the folder that `mmfm train` wrote")
    experiment = load_experiment(run / CONFIG)
    try:
        spec = InputSpec.model_validate_json((run / INPUTS).read_text())
    except (OSError, ValidationError) as error:
        raise UserError(f"{run / INPUTS}: is missing or damaged; start the run again in a new folder") from error
    return experiment, spec, Tokenizer.load(str(run / TOKENIZER))


def write(run: Path, experiment: Experiment, spec: InputSpec, tokenizer: Tokenizer) -> None:
    """Writes each file whole or not at all; `config.yaml`, last, makes the folder a run."""
    run.mkdir(parents=True, exist_ok=True)
    replace(run / TOKENIZER, tokenizer.to_json())
    replace(run / INPUTS, spec.model_dump_json(indent=1))
    replace(run / CONFIG, to_yaml(experiment))


def replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all. Raises UserError when it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path.parent):
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):  # what keeps it from being written
                partial.unlink(missing_ok=True)
            raise


def checked(run: str | Path) -> Path:
    """Where a run is to be. Raises UserError when that can be no folder of this machine, before anything is made."""
    run = local(run)
    with writing(run):
        if run.exists() and not run.is_dir():
            raise UserError(f"{run}: is a file; give a folder, or a --run that is not there yet")
        there = next(place for place in (run, *run.absolute().parents) if place.exists())
        if not there.is_dir():
            raise UserError(f"{run}: {there} is a file, so that no folder can be made in it; give another --run")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))
    return run


def local(run: str | Path) -> Path:
    """Raises UserError for a URL, of which a path makes a folder with a colon in its name."""
    if url := re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/+", str(run)):
        raise UserError(
            f"{url[1]}://{str(run)[url.end() :]}: a run lies in a folder of this machine, not in a bucket; give a path "
            "(a store may be a URL)"
        )
    return Path(run)


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
