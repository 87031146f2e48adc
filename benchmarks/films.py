"""What a film costs the host, and how many a second come out of the pipeline, by worker processes.

Run by `make films`, a minute. A synthetic store in a temporary folder: films of 224 x 224 uint8 in one array, a report
of 60 words and six columns each. Time is that of cores, of this process and its workers together, and hardly feels what
else the machine does; the first turn of each way fills the caches and is not counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from rich.table import Table

from mmfm_jax.bench.cores import core_seconds
from mmfm_jax.config.inputs import Inputs
from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.order import training_rows
from mmfm_jax.data.feed.pipeline import local_batches
from mmfm_jax.data.feed.spec import make_spec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import ColumnSpec, Image, ImageSpec, LabelSpec, Schema, Study
from mmfm_jax.screen import make_console

SIDE, WORDS, BATCH = 224, 60, 64
SCHEMA = Schema(
    images={"film": ImageSpec(dtype="uint8", shape=(1, SIDE, SIDE))},
    texts={"report": ""},
    columns={
        **{name: ColumnSpec(kind="number") for name in ("age", "weight", "kilovolts")},
        **{name: ColumnSpec(kind="category", vocabulary=("a", "b", "c")) for name in ("sex", "view", "site")},
    },
    labels={"finding": LabelSpec(classes=("no", "yes"))},
)
INPUTS = {
    "images": {"film": {"size": [1, SIDE, SIDE], "patch": [1, 16, 16], "window": [0, 255]}},
    "texts": {"report": {"length": 128}},
    "columns": list(SCHEMA.columns),
}


def studies(count: int) -> Iterator[Study]:
    """Smooth shapes with noise, which compress to two thirds, and words of a vocabulary of 600."""
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, rng.integers(3, 10)))) for _ in range(600)]
    y, x = np.mgrid[:SIDE, :SIDE]
    for i in range(count):
        smooth = 120 + 60 * np.sin(x / rng.uniform(20, 60)) + 40 * np.cos(y / rng.uniform(20, 60))
        film = (smooth + rng.normal(0, 4, (SIDE, SIDE))).clip(0, 255).astype(np.uint8)[None, ..., None]
        text = " ".join(" ".join(rng.choice(words, 12)) + "." for _ in range(WORDS // 12))
        row: dict[str, float | str] = {}
        for name, column in SCHEMA.columns.items():
            row[name] = float(rng.normal(60, 9)) if column.kind == "number" else "abc"[rng.integers(3)]
        image = Image(film, (1.0, 0.15, 0.15))
        yield Study(f"p{i}", "train", {"film": image}, {"report": (text,)}, row, {"finding": i % 2})


def measure(samples: Samples, workers: int, threads: int, batches: int, turns: int) -> tuple[float, float, float]:
    """Milliseconds of cores a film, those of them in this process, and films a second: the best of some turns."""
    order = training_rows(samples, "train", 0)
    reading = local_batches(order, BATCH, np.arange(BATCH), 0, threads, 4, {}, workers)
    best = [float("inf")] * 3
    for turn in range(turns + 1):
        if turn == 0:
            next(reading)  # once the workers have begun
        here, cores = time.process_time(), core_seconds()
        started = time.perf_counter()
        for _ in range(batches):
            next(reading)
        seconds = time.perf_counter() - started
        if turn:
            found = core_seconds() - cores, time.process_time() - here, seconds
            best = [min(a, b / (batches * BATCH)) for a, b in zip(best, found)]
    reading.close()
    return 1e3 * best[0], 1e3 * best[1], 1 / best[2]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--films", type=int, default=4096)
    options.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--threads", type=int, default=2, help="data.reader_threads")
    options.add_argument("--cache-bytes", type=int, default=2**29, help="data.cache_bytes; 0 decodes every film")
    options.add_argument("--turns", type=int, default=3)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_store(folder + "/store", SCHEMA, studies(args.films))
        store = StudyStore.open(folder + "/store", cache_bytes=args.cache_bytes)
        tokenizer = Tokenizer.train(store.texts(store.rows("train")[:2000]), 4096)
        inputs = Inputs.model_validate(INPUTS)
        samples = Samples(store, inputs, make_spec(inputs, store.schema, store.stats, tokenizer), tokenizer)
        table = Table(
            "workers", "core-ms a film", "of this process", "films/s", title=f"{SIDE} x {SIDE}, {WORDS} words"
        )
        for workers in args.workers:
            cost, here, rate = measure(samples, workers, args.threads, max(1, args.films // BATCH), args.turns)
            table.add_row(str(workers), f"{cost:.3f}", f"{here:.3f}", f"{rate:,.0f}")
    make_console().print(table)


if __name__ == "__main__":
    main()
