"""`mmfm bench data`: our input pipeline beside plain TensorStore reads of the same crops, and beside MONAI."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tensorstore as ts
from rich.table import Table

from mmfm_jax.bench import monai_loader
from mmfm_jax.bench.cores import core_seconds
from mmfm_jax.bench.volumes import SCHEMA, ct_studies
from mmfm_jax.data.feed.example import Drawn, Samples
from mmfm_jax.data.feed.order import training_rows
from mmfm_jax.data.feed.pipeline import local_batches
from mmfm_jax.data.feed.spec import make_spec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.store.mix import open_data
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.errors import UserError
from mmfm_jax.experiment import Experiment, experiment_type, load_experiment, validate
from mmfm_jax.screen import screen

BUILTIN = "ct-96"
VOLUMES, SLICES = 8, 256
MONAI_VOLUMES = 4
TURN_SECONDS = 3.0


@dataclass(frozen=True)
class Speed:
    """Of one way to read, the median over turns."""

    crops_per_second: float
    megabytes_per_second: float
    """Of voxels handed out, in their raw dtype."""
    core_ms_per_crop: float | None = None
    """Time of all cores on a crop; unlike the others it hardly feels what else the machine does."""


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    """The verb. Raises UserError when there is no such experiment, or it reads no images."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        experiment = _experiment(args.config or BUILTIN, overrides, place)
        found = measure(experiment, args.rounds, place, monai_workers=_cores())
    print(json.dumps(found, indent=1)) if args.json else screen().print(report(found))


def _experiment(name: str, overrides: list[str], place: Path) -> Experiment:
    if name != BUILTIN:
        if not Path(name).exists():
            raise UserError(f"{name}: is neither a file nor {BUILTIN}, the built-in volumes")
        return load_experiment(name, overrides)
    write_store(str(place / "store"), SCHEMA, ct_studies([SLICES] * VOLUMES, ["train"] * VOLUMES))
    experiment = builtin(str(place / "store"))
    if not overrides:
        return experiment
    import tyro

    return tyro.cli(experiment_type(), default=experiment, args=overrides, prog=f"mmfm bench data {name}")


def builtin(store: str) -> Experiment:
    """Batches of 8 crops of 96^3 voxels from a store of `volumes.SCHEMA`; its model is not meant to be trained."""
    tower = {"width": 8, "depth": 1, "heads": 1}
    raw = {
        "name": BUILTIN,
        "inputs": {
            "images": {"image": {"size": [96] * 3, "patch": [16] * 3, "window": [-1000, 1000], "crop": "random"}},
        },
        "data": {"store": store, "vocabulary_size": 512, "reader_threads": _cores()},
        "model": {"vision": tower, "text": tower, "table": tower, "fusion": {**tower, "latents": 1}},
        "tasks": {"masked": {"kind": "masked", "depth": 1}},
        "train": {"steps": 1, "batch_size": 8},
    }
    return validate(raw, f"bench {BUILTIN}")


class Reading:
    """The training batches of an experiment, and the crops that they are made of."""

    def __init__(self, experiment: Experiment):
        """Raises UserError when the store cannot be read or no image is."""
        data, inputs = experiment.data, experiment.inputs
        if not inputs.images:
            raise UserError("bench data: the experiment reads no images; name one under inputs.images")
        self.store = open_data(data)
        texts = self.store.texts(self.store.rows("train"))
        tokenizer = Tokenizer.load(data.tokenizer) if data.tokenizer else Tokenizer.train(texts, data.vocabulary_size)
        spec = make_spec(inputs, self.store.schema, self.store.stats, tokenizer, self.store.windows(inputs.images))
        self.samples = Samples(self.store, inputs, spec, tokenizer)
        self.order = training_rows(self.samples, "train", experiment.seed)
        self.size, self.threads, self.workers = experiment.train.batch_size, data.reader_threads, data.workers
        self.ahead = max(data.prefetch_batches, 2 * data.workers)

    def bytes_of_crop(self) -> float:
        """Mean over the images of the first batch."""
        crops = [(role, box) for i in range(self.size) for role, box in self._drawn(i).boxes.items()]
        images = self.store.schema.images
        sizes = [np.prod(b.size) * images[r].channels * np.dtype(images[r].dtype).itemsize for r, b in crops]
        if not sizes:
            raise UserError("bench data: none of the studies of the first batch has an image; train on others")
        return float(np.mean(sizes))

    def batches(self, start: int, steps: int) -> Iterator[int]:
        """The crops of each batch as it comes, once the pipeline is running."""
        batches = local_batches(
            self.order,
            self.size,
            np.arange(self.size),
            start,
            self.threads,
            self.ahead,
            self.samples.packed,
            self.workers,
        )
        for _ in range(self.ahead + 1):  # what is read ahead before the clock starts
            next(batches)
        yield 0
        for _ in range(steps):
            batch = next(batches)
            yield sum(int(np.sum(part.present)) for part in [*batch.images.values(), *batch.packed.values()])
        batches.close()

    def crops(self, start: int, steps: int) -> Iterator[int]:
        """The same crops as plain TensorStore reads, as many under way as the pipeline has."""
        first, last = (step * self.size for step in (start, start + self.ahead + 1 + steps))
        places = deque(self._array(i, role) for i in range(first, last) for role in self._drawn(i).boxes)
        ahead = min(self.ahead * self.size, len(places) - 1)
        under_way = deque(places.popleft().read() for _ in range(ahead))
        for _ in range(self.size):  # the pipeline too has begun when the clock starts
            under_way.popleft().result()
            under_way.append(places.popleft().read())
        yield 0
        while places:
            under_way.popleft().result()
            under_way.append(places.popleft().read())
            yield 1

    def _drawn(self, index: int) -> Drawn:
        return self.order[index]

    def _array(self, index: int, role: str) -> ts.TensorStore:
        drawn = self._drawn(index)
        box = drawn.boxes[role]
        return self.store.inside(role, drawn.row, box.start, box.size)


def measure(experiment: Experiment, rounds: int, place: Path, monai_workers: int) -> dict[str, Any]:
    """What is reported. The pipeline and the ceiling have turns, so that what else the machine does meets both."""
    reading = Reading(experiment)
    size = reading.bytes_of_crop()
    steps = _steps(reading)
    turns: dict[str, list[tuple[float, float]]] = {"pipeline": [], "ceiling": []}
    for number in range(rounds):
        ways = [("pipeline", reading.batches), ("ceiling", reading.crops)]
        for name, way in ways if number % 2 == 0 else reversed(ways):
            turns[name].append(_timed(way(number * steps, steps)))
    pipeline, ceiling = (_speed(turns[name], size) for name in turns)
    monai, why_not = None, monai_loader.why_not()
    if why_not is None:
        monai, why_not = _monai(reading, place, monai_workers)
    found: dict[str, Any] = {
        "experiment": experiment.name,
        "crop": [list(shape.size) for shape in reading.samples.spec.images.values()],
        "batch_size": reading.size,
        "reader_threads": reading.threads,
        "cores": _cores(),
        "processor": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("tensorstore", "grain")},
        "pipeline": {"batches_per_second": pipeline.crops_per_second / reading.size, **vars(pipeline)},
        "ceiling": vars(ceiling),
        "share_of_ceiling": median(a[0] / b[0] for a, b in zip(turns["pipeline"], turns["ceiling"])),
        "doubt": doubt([a[0] / b[0] for a, b in zip(turns["pipeline"], turns["ceiling"])]),
        "share_of_ceiling_each": [a[0] / b[0] for a, b in zip(turns["pipeline"], turns["ceiling"])],
        "monai": monai,
        "without_monai": why_not,
    }
    if monai is not None:
        found["versions"]["monai"] = version("monai")
        found["times_monai"] = {n: pipeline.crops_per_second / s["crops_per_second"] for n, s in monai.items()}
    return found


def _steps(reading: Reading) -> int:
    """Batches of a turn of about TURN_SECONDS: few are not asked, for what is read ahead comes in bursts."""
    steps = 8
    while True:
        started = time.perf_counter()
        for _ in reading.batches(0, steps):
            pass
        seconds = time.perf_counter() - started
        if seconds > TURN_SECONDS / 2:
            return max(8, round(steps * TURN_SECONDS / seconds))
        steps *= 2


def _timed(turn: Iterator[int]) -> tuple[float, float]:
    """Crops a second, and seconds of a core a crop, from the first thing that a turn yields to its last."""
    crops = next(turn)
    started = ended = (time.perf_counter(), core_seconds())
    for more in turn:
        crops, ended = crops + more, (time.perf_counter(), core_seconds())
    return crops / (ended[0] - started[0]), (ended[1] - started[1]) / crops


def _speed(turns: list[tuple[float, float]], size: float) -> Speed:
    rate = median(rate for rate, _ in turns)
    return Speed(rate, rate * size / 1e6, 1e3 * median(cost for _, cost in turns))


def _monai(reading: Reading, place: Path, workers: int) -> tuple[dict[str, Any] | None, str | None]:
    """MONAI's speeds on the first volumes of the store, in a process of its own; or why there are none."""
    store, spec = reading.store, reading.samples.spec
    role, shape = next(iter(spec.images.items()))
    if spec.images[role].raw_channels != 1:
        return None, "the first image role has several channels, and MONAI is given volumes of one"
    rows = [int(row) for row in store.rows("train")[:256]]
    held = {row: info for row in rows if (info := store.volume_info(role, row))}
    whole = [row for row, info in held.items() if all(h >= s for h, s in zip(info[0], shape.size))][:MONAI_VOLUMES]
    if not whole:
        return None, "no volume is as large as the crop, and MONAI's would be of another size"
    folder = place / "nifti"
    folder.mkdir()
    for row in whole:
        monai_loader.write(folder / f"{row}.nii.gz", store.crop(role, row, (0, 0, 0), held[row][0]), held[row][1])
    command = [
        sys.executable,
        "-m",
        monai_loader.__name__,
        str(folder),
        *map(str, (workers, reading.size, *shape.size)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return None, f"MONAI ended with {done.stderr.strip().splitlines()[-1][:200]}"
    size = np.prod(shape.size) * np.dtype(store.schema.images[role].dtype).itemsize / 1e6
    rates = json.loads(done.stdout.splitlines()[-1])
    return {name: {"crops_per_second": r, "megabytes_per_second": r * float(size)} for name, r in rates.items()}, None


def doubt(shares: Sequence[float]) -> str | None:
    """Why the shares of the ceiling that the turns gave say little; None when nothing speaks against them."""
    if max(shares) > 1:
        return (
            "No pipeline is faster than its reads: above 100% other work on the machine slowed the ceiling's turns, or "
            "the crops are of one array, which the pipeline reads together and the ceiling one by one."
        )
    if max(shares) > 1.5 * min(shares):
        return "The turns differ by more than half, so other work on the machine met them; repeat it on an idle one."
    return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def report(found: dict[str, Any]) -> Table:
    monai = found["monai"] or {}
    table = Table(
        title=f"{found['experiment']}: {found['batch_size']} studies a batch on {found['cores']} cores",
        caption=f"The pipeline reaches {100 * found['share_of_ceiling']:.0f}% of the ceiling, the median of "
        f"{len(found['share_of_ceiling_each'])} turns. {found['doubt'] or ''} "
        + (f"MONAI is left out: {found['without_monai']}." if not monai else ""),
    )
    for name in ("", "batches/s", "crops/s", "MB/s", "core-ms a crop", "pipeline is"):
        table.add_column(name, justify="right" if name else "left")
    rows = {
        "pipeline, whole batches": found["pipeline"],
        "ceiling: plain TensorStore": found["ceiling"],
        "MONAI, LoadImage and RandSpatialCrop": monai.get("plain"),
        "MONAI, PersistentDataset": monai.get("persistent"),
        "MONAI, PersistentDataset of float32, its default": monai.get("persistent_float32"),
    }
    for name, speed in rows.items():
        if speed:
            rate, cost = speed["crops_per_second"], speed.get("core_ms_per_crop")
            table.add_row(
                name, f"{rate / found['batch_size']:,.2f}", f"{rate:,.1f}", f"{speed['megabytes_per_second']:,.0f}",
                "" if cost is None else f"{cost:.2f}", f"{found['pipeline']['crops_per_second'] / rate:,.2f} x",
            )  # fmt: skip
    return table
