"""How fast this machine reads studies and trains on them, with the demo's configuration. Run by `make bench`."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from rich.table import Table

from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.order import training_rows
from mmfm_jax.data.feed.pipeline import local_batches
from mmfm_jax.data.feed.spec import make_spec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.experiment import load_experiment
from mmfm_jax.screen import make_console

CONFIG, STORE = "configs/demo.yaml", "data/lidc"
READ_S = 10
STEPS, WARM_UP = 60, 20
MMFM = Path(sys.executable).with_name("mmfm")


def reading_rate() -> float:
    """Studies a second that come out of the training pipeline when nothing is done with them."""
    experiment = load_experiment(CONFIG, ["--data.store", STORE])
    store, size = StudyStore.open(STORE), experiment.train.batch_size
    tokenizer = Tokenizer.train(store.texts(store.rows("train")), experiment.data.vocabulary_size)
    spec = make_spec(experiment.inputs, store.schema, store.stats, tokenizer)
    order = training_rows(Samples(store, experiment.inputs, spec, tokenizer), "train", experiment.seed)
    batches = local_batches(
        order, size, np.arange(size), 0, experiment.data.reader_threads, experiment.data.prefetch_batches
    )
    for _ in range(experiment.data.prefetch_batches):  # what was read ahead before the clock started
        next(batches)
    start, read = time.perf_counter(), 0
    while time.perf_counter() - start < READ_S:
        next(batches)
        read += size
    seconds = time.perf_counter() - start
    batches.close()
    return read / seconds


def training_metrics() -> dict[str, float]:
    """Median over the logged steps of a short run, the first ones left out."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        changes = {"train.steps": STEPS, "train.log_every": 5, "train.validate_every": STEPS, "data.store": STORE}
        overrides = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
        subprocess.run([MMFM, "train", CONFIG, "--run", str(run), *overrides], check=True)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    warm = [line for line in lines if line["step"] > WARM_UP and "samples_per_second" in line]
    names = ("samples_per_second", "data_wait", "model_tflops_per_second", "mfu")
    return {name: median(line[name] for line in warm) for name in names if name in warm[0]}


def main() -> None:
    subprocess.run([MMFM, "sample", "lidc", "--out", STORE], check=True)
    table = Table("measure", "value", title=f"{CONFIG} on {platform.processor() or platform.machine()}")
    table.add_row("studies read per second", f"{reading_rate():.0f}")
    for name, value in training_metrics().items():
        table.add_row(name.replace("_", " "), f"{value:.3g}")
    make_console().print(table)


if __name__ == "__main__":
    main()
