"""`mmfm plan --measure`: the step timed on the devices of this machine, on random studies that have every part."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from mmfm_jax.config.inputs import as_channels
from mmfm_jax.data.batch import Batch, ImagePart, InputSpec, LabelPart, PackedPart, TablePart, TextPart
from mmfm_jax.experiment import Experiment
from mmfm_jax.parallel import sharding
from mmfm_jax.parallel.mesh import make_mesh
from mmfm_jax.parallel.processes import start_processes
from mmfm_jax.plan import lower
from mmfm_jax.plan.chips import GIB, chip_of
from mmfm_jax.plan.estimate import Estimate
from mmfm_jax.plan.plan import estimate_step, tokens_of
from mmfm_jax.train.flops import peak_flops, step_flops
from mmfm_jax.train.optimizer import make_optimizer
from mmfm_jax.train.state import initial_state

WARM_UP, SECONDS, FEWEST, MOST = 2, 20.0, 5, 50  # steps before the first is timed; how long to time, in how many steps


@dataclass(frozen=True)
class Measured:
    experiment: Experiment
    device: str
    devices: int
    mesh: dict[str, int]
    seconds: tuple[float, ...]
    """Of each step, one after another and none overlapping."""
    compile_seconds: float
    model_flops: float
    tokens: int
    peak_flops: float | None
    """Of all devices, where the vendor publishes it."""
    memory: lower.Memory | None
    """Of a device, as the compiler says."""
    estimated: Estimate | None
    """By the same program, on a TPU alone: the compilers of other devices give no cycles."""

    @property
    def step_seconds(self) -> float:
        return float(np.median(self.seconds))

    @property
    def mfu(self) -> float | None:
        return self.model_flops / (self.step_seconds * self.peak_flops) if self.peak_flops else None


def measure(experiment: Experiment, spec: InputSpec, voxels: dict[str, str] | None = None) -> Measured:
    """Compiles the step that `train` would, and times it. Raises UserError when experiment and devices do not fit."""
    start_processes()
    mesh = make_mesh(experiment.mesh)
    program = lower.make_program(experiment, spec, mesh, voxels)
    optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
    size, device = experiment.train.batch_size, mesh.devices.flat[0]
    rows = sharding.local_rows(size, mesh)
    batch = sharding.global_batch(random_batch(spec, experiment.labels, len(rows), voxels), rows, size, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: initial_state(experiment, spec, optimizer), out_shardings=places)()
        started = time.perf_counter()
        step = program.step.lower(state, batch).compile()
        compile_seconds = time.perf_counter() - started
        seconds: list[float] = []
        while len(seconds) < WARM_UP + FEWEST or (sum(seconds) < SECONDS and len(seconds) < WARM_UP + MOST):
            started = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - started)
    peak, chip = peak_flops(device), chip_of(device)
    return Measured(
        experiment=experiment,
        device=device.device_kind,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        seconds=tuple(seconds[WARM_UP:]),
        compile_seconds=compile_seconds,
        model_flops=step_flops(program.graph, experiment, spec, program.state, program.batch),
        tokens=tokens_of(spec),
        peak_flops=peak and peak * mesh.size,
        memory=lower.memory(step) if step.memory_analysis() is not None else None,
        estimated=chip and estimate_step(step, chip, mesh.devices.flat),
    )


NOISE = (0.0, 100.0)  # limits of a volume that has its own; any dtype of voxels holds them


def random_batch(spec: InputSpec, labels: tuple[str, ...], studies: int, voxels: dict[str, str] | None = None) -> Batch:
    """Raw studies of noise, every part present and texts of full length."""
    rng = np.random.default_rng(0)
    shapes, whole = lower.batch_shapes(spec, labels, studies, voxels), np.ones(studies, bool)

    def voxels_like(role: str, raw) -> np.ndarray:
        low, high = as_channels(spec.images[role].window or NOISE)[0]  # the first of several
        return rng.integers(round(low), max(round(high), round(low) + 1), raw.shape).astype(raw.dtype)

    def limits(role: str) -> np.ndarray | None:
        return None if spec.images[role].normalise is None else np.tile(np.array(NOISE, np.float32), (studies, 1))

    def packed(role: str, part: PackedPart) -> PackedPart:
        """Its tokens shared out evenly, none left over."""
        rows, tokens = part.patches.shape[:2]
        segment = np.tile(1 + np.arange(tokens, dtype=np.int32) * part.studies // tokens, (rows, 1))
        centres_mm = rng.normal(0, 50, (rows, tokens, 3)).astype(np.float32)
        return PackedPart(voxels_like(role, part.patches), centres_mm, segment, whole, limits(role))

    def drawn(below: int, shape: tuple[int, ...]) -> np.ndarray:
        return rng.integers(below, size=shape, dtype=np.int32)

    table, classes = shapes.table, {name: len(of) for name, of in spec.labels.items()}
    return Batch(
        study=np.arange(studies, dtype=np.int32),
        images={
            role: ImagePart(voxels_like(role, part.voxels), np.ones((studies, 3), np.float32), whole, limits(role))
            for role, part in shapes.images.items()
        },
        texts={
            field: TextPart(
                1 + drawn(spec.vocabulary_size - 1, part.tokens.shape),
                whole,
                drawn(2**31 - 1, part.digest.shape).view(np.uint32),
                None if part.excerpt is None else 1 + drawn(spec.vocabulary_size - 1, part.excerpt.shape),
            )
            for field, part in shapes.texts.items()
        },
        table=TablePart(
            rng.standard_normal(table.numbers.shape, np.float32),
            np.ones(table.number_present.shape, bool),
            drawn(min((len(v) for v in spec.categories.values()), default=1), table.categories.shape),
            np.ones(table.category_present.shape, bool),
        ),
        labels={name: LabelPart(drawn(classes[name], (studies,)), whole) for name in shapes.labels},
        packed={role: packed(role, part) for role, part in shapes.packed.items()},
    )


def as_json(measured: Measured) -> dict[str, Any]:
    step, size = measured.step_seconds, measured.experiment.train.batch_size
    return {
        "estimate": False,
        "device": measured.device,
        "devices": measured.devices,
        "mesh": measured.mesh,
        "jax": jax.__version__,
        "step_seconds": step,
        "step_seconds_each": list(measured.seconds),
        "compile_seconds": measured.compile_seconds,
        "mfu": measured.mfu,
        "model_flops": measured.model_flops,
        "samples_per_second": size / step,
        "tokens_per_second": size / step * measured.tokens,
        "memory_bytes": measured.memory and measured.memory.total,
        "estimated_step_seconds": measured.estimated and measured.estimated.seconds,
    }


def report(measured: Measured) -> RenderableType:
    data, size = as_json(measured), measured.experiment.train.batch_size
    table = Table(title=f"{measured.experiment.name} on {measured.devices} x {measured.device}")
    table.add_column("what")
    table.add_column("measured", justify="right")
    each = measured.seconds
    table.add_row("step, median", f"{1e3 * measured.step_seconds:.2f} ms")
    table.add_row(f"step, range of {len(each)}", f"{1e3 * min(each):.2f} to {1e3 * max(each):.2f} ms")
    if measured.estimated:
        table.add_row("step, estimate by the same program", f"{1e3 * measured.estimated.seconds:.2f} ms")
    if measured.mfu is not None:
        table.add_row("model FLOPs utilisation", f"{100 * measured.mfu:.1f}%")
    table.add_row("model TFLOP/s", f"{measured.model_flops / measured.step_seconds / 1e12:,.2f}")
    table.add_row("studies a second", f"{size / measured.step_seconds:,.1f}")
    table.add_row("tokens a second", f"{data['tokens_per_second']:,.0f}")
    if measured.memory:
        table.add_row("memory of a device", f"{measured.memory.total / GIB:.2f} GiB")
    table.add_row("compiled in", f"{measured.compile_seconds:.1f} s")
    note = "" if measured.estimated else "No estimate beside it: only TPU programs say how long their parts take."
    return Group(table, f"Measured on random studies that have every part; reading data is not in it. {note}")
