"""Whether a folder is a run, or can become one: asked before JAX is imported, so nothing here needs it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mmfm_jax.errors import UserError
from mmfm_jax.files import PARTIAL, refuse_links

CONFIG, INPUTS, TOKENIZER, LOCK = "config.yaml", "inputs.json", "tokenizer.json", ".lock"
VERSIONS = "versions.json"


def exists(run: Path) -> bool:
    return (run / CONFIG).exists()


def checked(run: str | Path) -> Path:
    """Where a run is to be. Raises UserError when that can be no folder of this machine, before anything is made."""
    run = local(run)
    check_free(run)
    return run


def local(run: str | Path) -> Path:
    """Raises UserError for a URL, of which a path makes a folder with a colon in its name."""
    if url := re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/+", str(run)):
        raise UserError(
            f"{url[1]}://{str(run)[url.end() :]}: a run lies in a folder of this machine, not in a bucket; give a path "
            "(a store may be a URL)"
        )
    return Path(run)


def check_run(run: Path) -> None:
    """Raises UserError when a folder holds no run."""
    local(run)
    if not os.path.exists(run / CONFIG):
        raise UserError(f"{run}: is not a run (it has no {CONFIG}); give the folder that `mmfm train` wrote")


def check_free(run: Path) -> None:
    """Raises UserError when a folder is no run and cannot become one: others' files lie there, or it cannot be made.

    A folder that holds a link is refused whether it is a run or not."""
    try:
        os.lstat(run / CONFIG)
        holds_run = True
    except (FileNotFoundError, NotADirectoryError):
        holds_run = False
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "that is no name of a folder"
        raise UserError(f"{run}: cannot be used: {reason}; give another --run") from error
    refuse_links(run)
    if holds_run:
        return
    there = next(place for place in (run.absolute(), *run.absolute().parents) if os.path.exists(place))
    if not there.is_dir():
        raise UserError(f"{run}: cannot be made, since {there} is a file; give another --run")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{run}: cannot be made, since {there} may not be written to; give another --run")
    if there == run.absolute() and not _only_leftovers(run):
        raise UserError(f"{run}: holds files but no run; give another --run, or an empty folder")


def _only_leftovers(run: Path) -> bool:
    """Whether a start that was cut off wrote all there is."""
    ours = {TOKENIZER, INPUTS, LOCK, VERSIONS}
    return all(path.name in ours or path.name.endswith(PARTIAL) for path in run.iterdir())
