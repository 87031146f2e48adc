"""How long an H100's training step would wait for this machine to read CT volumes.

Run by `make feed`, two minutes on 2 cores. The loop and the pipeline are those of `mmfm train`; the device is a clock:
steps queue up on it and each takes what ViT-L on crops of 96 x 192 x 192 would take an H100 at 40% of its peak. The
store is synthetic, 12 volumes of 512 x 512 voxels and 200 to 300 slices of int16, in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import jax
import numpy as np
from rich.table import Table

from mmfm_jax.bench.models import builtin
from mmfm_jax.bench.volumes import SCHEMA, ct_studies
from mmfm_jax.config.training import MeshConfig
from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.order import training_rows
from mmfm_jax.data.feed.pipeline import local_batches
from mmfm_jax.data.feed.spec import make_spec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.experiment import Experiment, validate
from mmfm_jax.parallel.mesh import make_mesh
from mmfm_jax.plan.lower import assumed_spec, make_program
from mmfm_jax.screen import make_console
from mmfm_jax.train import loop
from mmfm_jax.train.flops import PEAK_TFLOPS, step_flops

MODEL = "vit-l-3d"
PEAK, UTILISATION = PEAK_TFLOPS["NVIDIA H100 80GB HBM3"] * 1e12, 0.4
SPLITS = ("train",) * 10 + ("validation", "test")
STEPS, LOG_EVERY = 200, 20


def step_seconds(experiment: Experiment) -> float:
    """Of an H100 on a step of the experiment."""
    program = make_program(experiment, assumed_spec(experiment), make_mesh(MeshConfig(), jax.devices()[:1]))
    flops = step_flops(program.graph, experiment, program.spec, program.state, program.batch)
    return flops / (PEAK * UTILISATION)


def reading(experiment: Experiment, store: str, threads: int) -> Experiment:
    """The same inputs and batch from a store, with a model that takes no time to make."""
    tower = {"width": 8, "depth": 1, "heads": 1}
    raw = experiment.model_dump(mode="json")
    raw["inputs"]["images"]["image"]["crop"] = "random"
    raw["data"] |= {"store": store, "vocabulary_size": 512, "reader_threads": threads}
    raw["model"] |= {"vision": tower, "text": tower, "table": tower, "fusion": {**tower, "latents": 1}}
    raw["optimizer"] = {}
    raw["train"] |= {"steps": STEPS, "log_every": LOG_EVERY, "validate_every": STEPS}
    raw["checkpoint"] = {"every": STEPS, "best": None}
    return validate(raw, "feed")


class Device:
    """Takes steps one after another, each for so long, while the host goes on; metrics are there when it is done."""

    def __init__(self, seconds: float):
        self._seconds, self._free_at = seconds, 0.0
        self.idle: list[float] = []
        """Seconds before each step in which the device had nothing to do."""

    def lower(self, *_) -> Device:
        return self

    compile = lower

    def __call__(self, state, batch):
        now = time.perf_counter()
        self.idle.append(max(0.0, now - self._free_at))
        self._free_at = max(now, self._free_at) + self._seconds
        return state, {name: Pending(self._free_at) for name in ("loss", "skipped", "skipped_in_a_row")}


class Pending:
    """A zero that can be read from a moment on."""

    def __init__(self, ready_at: float):
        self._ready_at = ready_at

    def block_until_ready(self) -> Pending:
        time.sleep(max(0.0, self._ready_at - time.perf_counter()))
        return self

    def is_ready(self) -> bool:
        return time.perf_counter() >= self._ready_at

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        self.block_until_ready()
        return np.zeros((), dtype or np.float32)


def trained(experiment: Experiment, seconds: float, folder: Path) -> tuple[float, float]:
    """Share of the time that the loop waited for data, and that the device stood idle, once it runs."""
    device = Device(seconds)
    replaced = {"jitted_step": lambda *_: device, "Validation": lambda *_: lambda params: {}}
    before = {name: getattr(loop, name) for name in replaced}
    try:
        for name, value in replaced.items():
            setattr(loop, name, value)
        loop.train(experiment, folder, make_console(quiet=True))
    finally:
        for name, value in before.items():
            setattr(loop, name, value)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    waits = [line["data_wait"] for line in lines if "data_wait" in line][1:]
    idle = sum(device.idle[LOG_EVERY:])
    return median(waits), idle / (idle + seconds * (STEPS - LOG_EVERY))


def crops_per_second(experiment: Experiment, steps: int = 40) -> tuple[float, float]:
    """That come out of the pipeline when nothing is done with them, and the seconds of a core that each costs."""
    store, size = StudyStore.open(experiment.data.store), experiment.train.batch_size
    tokenizer = Tokenizer.train(store.texts(store.rows("train")), experiment.data.vocabulary_size)
    spec = make_spec(experiment.inputs, store.schema, store.stats, tokenizer)
    order = training_rows(Samples(store, experiment.inputs, spec, tokenizer), "train", experiment.seed)
    data = experiment.data
    batches = local_batches(order, size, np.arange(size), 0, data.reader_threads, data.prefetch_batches)
    for _ in range(data.prefetch_batches + 1):  # what was read ahead before the clock starts
        next(batches)
    started, busy = time.perf_counter(), time.process_time()
    for _ in range(steps):
        next(batches)
    seconds, core_seconds = time.perf_counter() - started, time.process_time() - busy
    batches.close()
    return steps * size / seconds, core_seconds / (steps * size)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--threads", type=int, default=8, help="data.reader_threads (8)")
    options.add_argument("--step-seconds", type=float, help="of the device, instead of an H100's")
    args = options.parse_args()
    seconds = args.step_seconds or step_seconds(builtin(MODEL))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        slices = np.random.default_rng(0).integers(200, 301, len(SPLITS)).tolist()
        started = time.perf_counter()
        write_store(str(place / "store"), SCHEMA, ct_studies(slices, SPLITS))
        written = time.perf_counter() - started
        experiment = reading(builtin(MODEL), str(place / "store"), args.threads)
        wait, idle = trained(experiment, seconds, place / "run")
        rate, cost = crops_per_second(experiment)
    size = experiment.train.batch_size
    table = Table("what", "figure", title=f"{MODEL}, {size} crops of 96 x 192 x 192 int16 a step")
    table.add_row("step of the device", f"{1e3 * seconds:.1f} ms, {size / seconds:.0f} crops/s")
    table.add_row("loop waited for data (data_wait)", f"{100 * wait:.2f}%")
    table.add_row("device stood idle", f"{100 * idle:.2f}%")
    table.add_row("pipeline alone", f"{rate:.0f} crops/s, {rate * 96 * 192 * 192 * 2 / 1e9:.2f} GB/s of voxels")
    table.add_row("a crop costs", f"{1e3 * cost:.1f} ms of a core: the step needs {cost * size / seconds:.1f} cores")
    table.add_row("store written", f"{written:.1f} s")
    make_console().print(table)


if __name__ == "__main__":
    main()
