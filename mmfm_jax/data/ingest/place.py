"""The place of the store: what may be there already, how it is added to, and where converted images wait."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from mmfm_jax.data.store.format import local_folder, open_kvstore, read_store_file
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import Schema, Study
from mmfm_jax.errors import UserError


def already(out: str, source: Mapping[str, str], append: bool) -> StudyStore | None:
    """The store that is at `out`. Raises UserError when it is of something else, or would be added to unasked."""
    folder = local_folder(out)
    if folder is not None:
        _recover(folder)
    there = read_store_file(open_kvstore(out), out)
    if there is None:
        return None
    for name in ("builder", "split_key_fingerprint", "described"):
        if there.source.get(name) != source[name]:
            words = {
                "builder": "another source",
                "split_key_fingerprint": "another key",
                "described": "another description",
            }
            raise UserError(f"{out}: already holds a store made with {words[name]}; give another place or remove it")
    if there.source["inputs"] != source["inputs"]:
        if not append:
            raise UserError(f"{out}: already holds a store of other inputs; add what is new with --append")
        if folder is None:
            raise UserError(f"{out}: only a store in a folder can be added to; build the whole at another place")
    return StudyStore.open(out)


def check_old(old: StudyStore, splits: Mapping[str, str], out: str) -> None:
    """Raises UserError when a patient of the store would be lost or change its split."""
    lost = moved = 0
    for split in old.counts:
        for patient in set(old.patients(old.rows(split)).tolist()):
            lost += patient not in splits
            moved += splits.get(patient, split) != split
    if lost or moved:
        raise UserError(
            f"{out}: of its patients {lost} would be lost and {moved} change their split; bring their inputs back, or "
            "build at another place"
        )


def work_folder(out: str, work: Path | None) -> Path:
    """A folder of ours that nobody else may enter, beside the store or in `work`; one that a killed run left, again.

    Raises UserError when it cannot be made, or is a link or of another user.
    """
    folder = local_folder(out)
    if work is not None:
        place = work / f".{hashlib.sha256(out.encode()).hexdigest()[:16]}.ingest"
    elif folder is not None:
        place = folder.with_name(f".{folder.name}.ingest")
    else:
        raise UserError(f"{out}: is not a folder, so name one for converted images with --work")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            place.mkdir(mode=0o700)
        held = place.lstat()
        if not stat.S_ISDIR(held.st_mode) or held.st_uid != os.geteuid():
            raise UserError(f"{place}: is a link or of another user; remove it, or name another folder with --work")
        place.chmod(0o700)
    except OSError as error:
        raise UserError(f"{place}: cannot be written: {error.strerror or error}") from error
    return place


def write(
    out: str,
    old: StudyStore | None,
    schema: Schema,
    studies: Iterator[Study],
    description: str,
    source: dict[str, str],
    beside: dict[str, bytes],
) -> None:
    """Writes the store; one that is added to is replaced when the new one is whole, which has its rights."""
    if old is None:
        write_store(out, schema, studies, description=description, source=source, beside=beside)
        return
    folder = local_folder(out)
    assert folder is not None
    after, before = _neighbours(folder)
    write_store(str(after), schema, studies, description=description, source=source, beside=beside)
    after.chmod(stat.S_IMODE(folder.stat().st_mode))
    os.rename(folder, before)
    os.rename(after, folder)
    shutil.rmtree(before)


def _neighbours(folder: Path) -> tuple[Path, Path]:
    """Where the new store is built, and where the old one waits while they change places."""
    return folder.with_name(f".{folder.name}.ingest-new"), folder.with_name(f".{folder.name}.ingest-old")


def _recover(folder: Path) -> None:
    """Ends a change of places that was broken off."""
    after, before = _neighbours(folder)
    if before.is_dir() and not before.is_symlink() and not folder.exists():
        os.rename(after if after.exists() else before, folder)
    for leftover in (after, before):
        if leftover.is_symlink():
            leftover.unlink()
        shutil.rmtree(leftover, ignore_errors=True)
