"""Built-in data sets: each is written as a folder of files and tables with a description, and ingested as any other."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from mmfm_jax.data.ingest.dataset import Dataset
from mmfm_jax.data.ingest.pool import Limits
from mmfm_jax.data.ingest.run import ingest, schema_of, source_of
from mmfm_jax.data.store.format import local_folder, open_kvstore, read_store_file
from mmfm_jax.data.store.writer import check_free
from mmfm_jax.errors import UserError
from mmfm_jax.extras import check_installed
from mmfm_jax.screen import make_console

_CHANGED = 946_684_800
"""Time of change of every file, 2000-01-01, so that the same sample is the same store whenever it is built."""
_MEMORY_BYTES, _SECONDS = 4 * 2**30, 600.0


@dataclass(frozen=True)
class Sample:
    """A data set that comes with a package."""

    dataset: dict[str, Any]
    """What `dataset.yaml` says of it."""
    source: dict[str, str]
    """Where it is from, for the store to say."""
    write: Callable[[Path, Console], None]
    """Writes the files and tables that the description names into a folder."""


def build_sample(sample: Sample, out: str, key: str, console: Console | None = None) -> bool:
    """Builds the store at `out` (a path or TensorStore URL) and returns True, or False when it is already there.

    `key`: of the hashes that stand for patients and deal them to splits; no secret, for the data is public.
    Raises UserError when the package that holds the data is not installed, or when `out` holds something else.
    """
    dataset = Dataset.model_validate(sample.dataset)
    source = source_of(dataset, key) | sample.source
    there = read_store_file(open_kvstore(out), out)
    if there is not None:
        kept = {name: value for name, value in there.source.items() if name != "inputs"}
        if kept != source or there.declared != schema_of(dataset):  # either may change from release to release
            raise UserError(
                f"{out}: already holds a store with another source, split key, fractions or schema; "
                "give another place or remove it"
            )
        return False
    console = console or make_console(stderr=True)
    with _source_folder(out) as folder:
        (folder / "dataset.yaml").write_text(yaml.safe_dump(sample.dataset, sort_keys=False))
        sample.write(folder, console)
        for path in folder.rglob("*"):
            os.utime(path, (_CHANGED, _CHANGED))
        limits = Limits(os.cpu_count() or 1, _MEMORY_BYTES, _SECONDS)
        ingest(
            folder / "dataset.yaml",
            out,
            limits,
            work=folder / ".work",
            console=console,
            key=key,
            about=sample.source,
            whole=True,
        )
    return True


@contextmanager
def _source_folder(out: str) -> Iterator[Path]:
    """A folder for the files: beside the store, where there is room for it, and gone at the end."""
    place = local_folder(out)
    if place is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    check_free(place, out)
    folder = place.with_name(f".{place.name}.source")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True, mode=0o700)
        yield folder
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    """Writes voxels [z, y, x] with the affine of (x, y, z, 1) to RAS mm; the same voxels give the same bytes."""
    check_installed("a sample with images", ["nibabel"], "samples")
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(voxels.T, affine)
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
