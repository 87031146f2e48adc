"""MONAI's way to random crops of NIfTI volumes, timed in a process of its own (its workers are forks).

    python -m mmfm_jax.bench.monai_loader FOLDER WORKERS BATCH Z Y X

prints crops a second as JSON: `plain` reads the whole file for each crop, `persistent` has what was read kept as
tensors on disk (PersistentDataset, its cache filled before the clock starts), both in the dtype of the file, which
halves what they move; `persistent_float32` is in the dtype that LoadImage has by default.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np

from mmfm_jax.extras import pip_install

WAYS = {"plain": (1, None), "persistent": (8, None), "persistent_float32": (8, np.float32)}
"""Batches that each worker makes, and the dtype."""


def why_not() -> str | None:
    """Why MONAI cannot be compared with, or None."""
    missing = [name for name in ("monai", "nibabel") if find_spec(name) is None]
    if not missing:
        return None
    return f"{' and '.join(missing)} not installed; {pip_install('reference', 'ingest')}"


def write(path: Path, voxels: np.ndarray, spacing_mm: Sequence[float]) -> None:
    """Voxels [z, y, x, 1] as .nii.gz, compressed as nibabel does by default."""
    import nibabel

    nibabel.Nifti1Image(voxels[..., 0].T, np.diag([*reversed(spacing_mm), 1.0])).to_filename(path)


def main(folder: str, workers: int, size: int, crop: Sequence[int]) -> dict[str, float]:
    import monai.data
    import monai.transforms

    data_of, transforms = cast(Any, monai.data), cast(Any, monai.transforms)

    files = sorted(map(str, Path(folder).glob("*.nii.gz")))
    cut = transforms.RandSpatialCrop(crop[::-1], random_size=False)
    rates = {}
    for name, (batches, dtype) in WAYS.items():
        with tempfile.TemporaryDirectory() as cache:
            transform = transforms.Compose([transforms.LoadImage(ensure_channel_first=True, dtype=dtype), cut])
            total = batches * workers * size
            paths = [files[i % len(files)] for i in range(total)]
            plain = name == "plain"
            data = data_of.Dataset(paths, transform) if plain else data_of.PersistentDataset(paths, transform, cache)
            if not plain:
                for i in range(len(files)):
                    data[i]
            started = time.perf_counter()
            made = sum(len(batch) for batch in data_of.DataLoader(data, batch_size=size, num_workers=workers))
            rates[name] = made / (time.perf_counter() - started)
    return rates


if __name__ == "__main__":
    path, *numbers = sys.argv[1:]
    print(json.dumps(main(path, int(numbers[0]), int(numbers[1]), [int(n) for n in numbers[2:]])))
