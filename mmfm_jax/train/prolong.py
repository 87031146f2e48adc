"""More steps for a run than it was started with: on from the constant part of its schedule.

A run's warmup-stable-decay schedule is constant until its decay (arXiv:2405.18392), so that a longer run takes the very
same steps until there. The last checkpoint of that part is never deleted. What the decay gave is set aside, as a run of
its own within the folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from mmfm_jax.errors import UserError
from mmfm_jax.experiment import Experiment
from mmfm_jax.files import refuse_links, replace
from mmfm_jax.train import folder
from mmfm_jax.train.checkpoint import CHECKPOINTS
from mmfm_jax.train.optimizer import constant_until, warmup_of


def check_steps(run: Path, held: Experiment, asked: Experiment) -> None:
    """Raises UserError when a run of `held.train.steps` steps cannot become one of `asked.train.steps`."""
    before, now = held.train.steps, asked.train.steps
    if before == now:
        return
    place = f"{run / folder.CONFIG}: this run was started with train.steps {before}"
    if now < before:
        raise UserError(f"{place} and cannot become one of {now}; give the same value, or another --run to start anew")
    if held.optimizer.schedule == "cosine":
        raise UserError(
            f"{place}, and the cosine schedule falls from its first steps to an end at {before}, so that it cannot "
            f"become one of {now}; give another --run to start anew, with optimizer.schedule wsd that can"
        )
    if warmup_of(held.optimizer, before) != warmup_of(asked.optimizer, now):
        raise UserError(f"{place}, all of them warm-up, and cannot become one of {now}; give another --run")
    branch = constant_until(held.optimizer, before)
    steps = _steps(run)
    if steps and min(steps) > branch:
        raise UserError(
            f"{run / CHECKPOINTS}: holds no checkpoint of the constant part of the schedule, up to step {branch}, from "
            f"which a run of {now} steps could go on; give another --run to start anew"
        )


def set_decay_aside(run: Path, held: Experiment, asked: Experiment) -> None:
    """Moves the checkpoints of the decay, which a longer run does not go on from, to `steps-N/` in the run's folder,
    which `mmfm evaluate` takes as a run. Cut off, it goes on where it was."""
    before = held.train.steps
    if before == asked.train.steps:
        return
    decayed = [step for step in _steps(run) if step > constant_until(held.optimizer, before)]
    aside = run / f"steps-{before}"
    if decayed:
        (aside / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        refuse_links(aside)
        for name in (folder.TOKENIZER, folder.INPUTS, folder.CONFIG):
            replace(aside / name, (run / name).read_bytes())
    for step in decayed:
        os.rename(run / CHECKPOINTS / str(step), aside / CHECKPOINTS / str(step))


def _steps(run: Path) -> list[int]:
    place = run / CHECKPOINTS
    return sorted(int(path.name) for path in place.iterdir() if path.name.isdigit()) if place.exists() else []
