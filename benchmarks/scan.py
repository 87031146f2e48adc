"""Compile time of the demo's step by depth of its encoders: layers are scanned, so it should hardly grow.

Run by `make scan`, two minutes on 2 cores. Nothing is executed, and no compiled program is taken from a cache.
"""

from __future__ import annotations

import time
from statistics import median

import jax
from rich.table import Table

from mmfm_jax.experiment import load_experiment
from mmfm_jax.parallel.mesh import make_mesh
from mmfm_jax.plan.lower import assumed_spec, make_program
from mmfm_jax.screen import make_console

CONFIG = "configs/demo.yaml"
DEPTHS = (12, 48)
ROUNDS = 3  # of all depths, one after another


def seconds(depth: int) -> tuple[float, float]:
    """That tracing and lowering, and compiling, the training step take."""
    stacks = [word for name in ("vision", "text") for word in (f"--model.{name}.depth", str(depth))]
    loops = [word for name in ("vision", "text") for word in (f"--model.{name}.unroll", "1")]
    experiment = load_experiment(CONFIG, [*stacks, *loops])
    program = make_program(experiment, assumed_spec(experiment), make_mesh(experiment.mesh))
    jax.clear_caches()
    started = time.perf_counter()
    with jax.set_mesh(program.mesh):
        lowered = program.step.lower(program.state, program.batch)
        traced = time.perf_counter()
        lowered.compile()
    return traced - started, time.perf_counter() - traced


def main() -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    seconds(DEPTHS[0])  # what the first compilation of a process loads
    measured = {depth: [] for depth in DEPTHS}
    for _ in range(ROUNDS):
        for depth in DEPTHS:
            measured[depth].append(seconds(depth))
    table = Table(title=f"{CONFIG} with vision and text of some layers, median of {ROUNDS} in turn")
    for column in ("layers of each", "traced and lowered, s", "compiled, s", "together, s"):
        table.add_column(column, justify="right")
    for depth, runs in measured.items():
        table.add_row(str(depth), *(f"{median(times):.2f}" for times in (*zip(*runs), [sum(run) for run in runs])))
    few, many = measured.values()
    ratios = [sum(b) / sum(a) for a, b in zip(few, many)]
    make_console().print(table)
    make_console().print(
        f"{DEPTHS[1]} layers take {median(ratios):.2f} times what {DEPTHS[0]} take "
        f"({min(ratios):.2f} to {max(ratios):.2f})."
    )


if __name__ == "__main__":
    main()
