"""`mmfm bench train`: our training step beside that of PyTorch's `transformers`, on this machine, in turns."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import jax
from rich.table import Table

from mmfm_jax.bench import peer
from mmfm_jax.bench.models import FOR_PLATFORM, MODELS, builtin
from mmfm_jax.bench.ours import Ours, matmul_peak
from mmfm_jax.errors import UserError
from mmfm_jax.experiment import Experiment, changed, load_experiment
from mmfm_jax.extras import check_installed
from mmfm_jax.screen import make_console

WARM_UP = 2
ROUND_SECONDS = 4.0  # a side takes steps for about as long before the other has its turn


class Side(Protocol):
    name: str
    parameters: int
    flops: float
    """Model FLOPs of a step."""
    loss: float

    def step(self, steps: int) -> None: ...


@dataclass(frozen=True)
class Comparison:
    experiment: Experiment
    device: str
    peak_flops: float
    """Of large matrix products in the model's dtype, measured here."""
    sides: tuple[Side, Side]
    seconds: tuple[list[float], list[float]]
    """Of a step, by side and round."""

    @property
    def ratio(self) -> float:
        """Our speed over the peer's, the median over rounds."""
        ours, theirs = self.seconds
        return median(b / a for a, b in zip(ours, theirs))


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    """The verb. Raises UserError when a side is not installed or knows nothing like the experiment."""
    check_installed("bench train", ["torch", "transformers"], "reference")
    where = jax.default_backend()
    if where not in FOR_PLATFORM:
        raise UserError(f"bench train: PyTorch is compared with on cpu and gpu, and this machine's devices are {where}")
    names = [args.config] if args.config else list(FOR_PLATFORM[where])
    found = []
    for name in names:
        made = compare(_experiment(name, overrides), where, args.rounds)
        found.append(as_json(made))
        if not args.json:
            make_console().print(report(made))
        del made
        gc.collect()  # the state and batch of both, before the next is made
    if args.json:
        print(json.dumps(found, indent=1))


def _experiment(name: str, overrides: list[str]) -> Experiment:
    if name not in MODELS:
        if not Path(name).exists():
            raise UserError(f"{name}: is neither a file nor one of {', '.join(MODELS)}")
        return load_experiment(name, overrides)
    return changed(builtin(name), overrides, f"bench train {name}")


def compare(experiment: Experiment, where: str, rounds: int) -> Comparison:
    """Both sides in turns, `rounds` times, so that what else the machine does meets both alike."""
    peer.check_comparable(experiment)
    device = jax.devices()[0]
    ours = Ours(experiment)
    theirs = peer.Peer(experiment, "cuda" if where == "gpu" else "cpu", None if where == "gpu" else _cores())
    steps = []
    for side in (ours, theirs):
        side.step(WARM_UP)
        steps.append(max(1, round(ROUND_SECONDS / _timed(side, 1))))
    seconds = ([], [])
    for number in range(rounds):
        turn = [(ours, 0), (theirs, 1)]
        for side, index in turn if number % 2 == 0 else reversed(turn):
            side.step(1)  # untimed: on a CPU the other has given its memory back, and each page of ours is new
            seconds[index].append(_timed(side, steps[index]))
    peak = matmul_peak(experiment.model.dtype, device)
    return Comparison(experiment, device.device_kind, peak, (ours, theirs), seconds)


def _timed(side: Side, steps: int) -> float:
    """Seconds a step."""
    started = time.perf_counter()
    side.step(steps)
    return (time.perf_counter() - started) / steps


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def as_json(made: Comparison) -> dict[str, Any]:
    import torch
    import transformers  # pyright: ignore[reportMissingImports]  it is an extra

    size = made.experiment.train.batch_size
    return {
        "model": made.experiment.name,
        "dtype": made.experiment.model.dtype,
        "batch_size": size,
        "device": made.device,
        "processor": platform.processor() or platform.machine(),
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "matmul_peak_flops": made.peak_flops,
        "ratio": made.ratio,
        "differences": peer.DIFFERENCES,
        "sides": {
            side.name: {
                "step_seconds": median(seconds),
                "step_seconds_each": seconds,
                "samples_per_second": size / median(seconds),
                "model_flops": side.flops,
                "mfu": side.flops / median(seconds) / made.peak_flops,
                "parameters": side.parameters,
                "loss": side.loss,
            }
            for side, seconds in zip(made.sides, made.seconds)
        },
    }


def report(made: Comparison) -> Table:
    data = as_json(made)
    table = Table(
        title=f"{data['model']}, {data['dtype']}, {data['batch_size']} studies a step on {made.device}",
        caption=f"mmfm_jax is {made.ratio:.2f} times as fast: the median of {len(made.seconds[0])} turns. MFU is of "
        f"{made.peak_flops / 1e12:,.2f} TFLOP/s, measured here with large products. {peer.DIFFERENCES}",
    )
    table.add_column("", no_wrap=True)
    for side, version in zip(made.sides, (f"jax {data['versions']['jax']}", f"torch {data['versions']['torch']}")):
        table.add_column(f"{side.name}\n{version}", justify="right")
    rows = {
        "step, median": lambda s: f"{1e3 * s['step_seconds']:,.1f} ms",
        "- the fastest": lambda s: f"{1e3 * min(s['step_seconds_each']):,.1f} ms",
        "- the slowest": lambda s: f"{1e3 * max(s['step_seconds_each']):,.1f} ms",
        "studies a second": lambda s: f"{s['samples_per_second']:,.2f}",
        "model FLOPs utilisation": lambda s: f"{100 * s['mfu']:.1f}%",
        "model FLOPs of a step": lambda s: f"{s['model_flops']:.4g}",
        "parameters trained": lambda s: f"{s['parameters'] / 1e6:,.2f} million",
        "loss at the end": lambda s: f"{s['loss']:.4g}",
    }
    for name, of in rows.items():
        table.add_row(name, *(of(side) for side in data["sides"].values()))
    return table
