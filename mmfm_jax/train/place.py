"""Whether a folder is a run, or can become one: asked before JAX is imported, so nothing here needs it."""

from __future__ import annotations

import os
from pathlib import Path

from mmfm_jax.errors import UserError

CONFIG, INPUTS, TOKENIZER, LOCK = "config.yaml", "inputs.json", "tokenizer.json", ".lock"


def exists(run: Path) -> bool:
    return (run / CONFIG).exists()


def check_run(run: Path) -> None:
    """Raises UserError when a folder holds no run."""
    if not os.path.exists(run / CONFIG):
        raise UserError(f"{run}: is not a run (it has no {CONFIG}); give the folder that `mmfm train` wrote")


def check_free(run: Path) -> None:
    """Raises UserError when a folder is no run and cannot become one: others' files lie there, or it cannot be made."""
    try:
        os.lstat(run / CONFIG)
        return
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "that is no name of a folder"
        raise UserError(f"{run}: cannot be used: {reason}; give another --run") from error
    there = next(place for place in (run.absolute(), *run.absolute().parents) if os.path.exists(place))
    if not there.is_dir():
        raise UserError(f"{run}: cannot be made, since {there} is a file; give another --run")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{run}: cannot be made, since {there} may not be written to; give another --run")
    if there == run.absolute() and not _only_leftovers(run):
        raise UserError(f"{run}: holds files but no run; give another --run, or an empty folder")


def _only_leftovers(run: Path) -> bool:
    """Whether a start that was cut off wrote all there is."""
    ours = {TOKENIZER, INPUTS, LOCK}
    return all(path.name in ours or path.name.endswith(".partial") for path in run.iterdir())
