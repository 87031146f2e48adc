"""Packed images against whole ones on this machine: studies a second, and the share of tokens that hold nothing.

Run from the checkout: python benchmarks/packing.py. Runs alternate, since a shared machine drifts.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from rich.table import Table

from mmfm_jax.data.batch import ImageShape
from mmfm_jax.data.feed import packing
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.experiment import load_experiment
from mmfm_jax.screen import make_console

ROLE, STORE, MMFM = "nodule", "data/lidc", [sys.executable, "-m", "mmfm_jax.cli"]
WHOLE = ["--inputs.images.nodule.size", "36", "36", "36"]  # the demo at the largest extent that is packed
RUNS = {
    "demo, 24 mm": ("configs/demo.yaml", []),
    "packed, to 36 mm": ("configs/packed.yaml", []),
    "demo at 36 mm": ("configs/demo.yaml", WHOLE),
}
ROUNDS, STEPS, WARM_UP, DRAWN = 2, 40, 10, 800
ROWS = ((8, 192), (8, 224), (16, 384), (32, 832))


def trained(config: str, overrides: list[str]) -> list[dict]:
    """The lines of a short run's metrics, the first steps left out."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        changes = {"train.steps": STEPS, "train.log_every": 5, "train.validate_every": STEPS, "data.store": STORE}
        words = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
        subprocess.run([*MMFM, "train", config, "--run", str(run), *words, *overrides], check=True)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] > WARM_UP and "samples_per_second" in line]


def grids(config: str, overrides: list[str]) -> tuple[list[packing.Grid], packing.Grid]:
    """Patches along z y x that nodules drawn at random fill, and those of the whole crop."""
    image = load_experiment(config, ["--data.store", STORE, *overrides]).inputs.images[ROLE]
    shape = ImageShape(size=image.size, patch=image.patch, channels=1, window=image.window)
    store, found = StudyStore.open(STORE), []
    for row in np.random.default_rng(0).choice(store.rows("train"), DRAWN, replace=False):
        info = store.volume_info(ROLE, int(row))
        assert info is not None
        z, y, x = ((held - size) // 2 for held, size in zip(info[0], image.size))
        part = packing.cut(store.crop(ROLE, int(row), (z, y, x), image.size), info[1], shape, trim=True)
        found.append(part.patches.shape[:3])
    return found, shape.grid


def patches(of: Sequence[packing.Grid]) -> int:
    return sum(math.prod(grid) for grid in of)


def rows() -> Table:
    """What rows of other lengths would leave empty, and what they would cut off."""
    table = Table("studies a row", "tokens", "padding", "patches cut off")
    found, _ = grids(*RUNS["packed, to 36 mm"])
    for studies, tokens in ROWS:
        kept = sum(
            patches(packing.fit(found[i : i + studies], tokens)) for i in range(0, len(found) - studies + 1, studies)
        )
        whole = len(found) // studies * studies
        padding, cut = 1 - kept / (whole // studies * tokens), 1 - kept / patches(found[:whole])
        table.add_row(str(studies), str(tokens), f"{100 * padding:.0f}%", f"{100 * cut:.0f}%")
    return table


def main() -> None:
    subprocess.run([*MMFM, "sample", "lidc", "--out", STORE], check=True)
    lines = {name: [] for name in RUNS}
    for _ in range(ROUNDS):
        for name, given in RUNS.items():
            lines[name] += trained(*given)
    speed = {name: median(line["samples_per_second"] for line in of) for name, of in lines.items()}
    first = next(iter(speed.values()))
    table = Table("configuration", "studies a second", "over the first", "GFLOP a study", "tokens without content")
    for name, given in RUNS.items():
        of = lines[name]
        flops = median(line["model_tflops_per_second"] / line["samples_per_second"] for line in of)
        logged = [line["padding"] for line in of if "padding" in line]
        found, whole = grids(*given)
        empty = float(np.mean(logged)) if logged else 1 - patches(found) / (len(found) * math.prod(whole))
        row = (f"{speed[name]:.0f}", f"{speed[name] / first:.2f}", f"{1e3 * flops:.2f}", f"{100 * empty:.0f}%")
        table.add_row(name, *row)
    make_console().print(table, rows())


if __name__ == "__main__":
    main()
