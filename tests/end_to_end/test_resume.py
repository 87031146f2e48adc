"""A run that is killed anywhere and started again ends bitwise where the uninterrupted one ends."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mmfm_jax.train.checkpoint import Checkpoints, load_run
from mmfm_jax.train.optimizer import make_optimizer
from mmfm_jax.train.state import initial_state

STEPS, KILLS = 40, 10
OPTIONS = ("--train.steps", str(STEPS), "--checkpoint.every", "2", "--train.validate-every", "10")


def final_leaves(run: Path) -> list[np.ndarray]:
    trained = load_run(run)
    checkpoints = Checkpoints(run, trained.experiment.checkpoint)
    optimizer = make_optimizer(trained.experiment.optimizer, STEPS)
    shapes = jax.eval_shape(lambda: initial_state(trained.experiment, trained.spec, optimizer))
    state = checkpoints.restore(STEPS, shapes, None)
    checkpoints.close()
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def history(run: Path) -> dict[int, tuple]:
    """Batch and loss of each step logged; a step is logged once."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len({line["step"] for line in steps}) == len(steps)
    return {line["step"]: (line["batch_checksum"], line["loss"]) for line in steps}


@pytest.fixture(scope="module")
def uninterrupted(mmfm, config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = mmfm("train", config, "--run", run, *OPTIONS)
    assert done.returncode == 0, done.stderr
    return run


def start(config, run, environment) -> subprocess.Popen:
    command = [sys.executable, "-m", "mmfm_jax.cli", "train", str(config), "--run", str(run), *OPTIONS]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def kill_somewhere(process, run: Path, during_save: bool, rng: random.Random) -> bool:
    """Sends SIGKILL once the process trains, at a random moment or while a checkpoint is being written."""
    before, deadline = steps_logged(run), time.monotonic() + 120
    while process.poll() is None and steps_logged(run) == before and time.monotonic() < deadline:
        time.sleep(0.002)
    if during_save:
        while process.poll() is None and not any((run / "checkpoints").glob("*orbax-checkpoint-tmp*")):
            time.sleep(0.0005)
    else:
        time.sleep(rng.uniform(0, 0.15))
    alive = process.poll() is None
    process.kill()
    process.communicate()
    return alive


def test_resume_is_bitwise_equal_after_sigkill(mmfm, config, environment, uninterrupted, tmp_path):
    run, rng, killed = tmp_path / "killed", random.Random(0), 0
    for attempt in range(KILLS):
        killed += kill_somewhere(start(config, run, environment), run, attempt % 2 == 1, rng)
    assert killed >= KILLS - 2  # a slow machine may let a run finish; then there is nothing left to kill
    done = mmfm("train", config, "--run", run, *OPTIONS)
    assert done.returncode == 0, done.stderr
    for a, b in zip(final_leaves(run), final_leaves(uninterrupted), strict=True):
        np.testing.assert_array_equal(a, b)
    assert history(run) == history(uninterrupted)


def test_sigterm_saves_says_how_to_go_on_and_the_run_ends_the_same(mmfm, config, environment, uninterrupted, tmp_path):
    run = tmp_path / "stopped"
    process = start(config, run, environment)
    while process.poll() is None and steps_logged(run) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "the same command goes on from there" in out
    saved = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    assert saved < STEPS and str(saved) in out
    done = mmfm("train", config, "--run", run, *OPTIONS)
    assert done.returncode == 0, done.stderr
    for a, b in zip(final_leaves(run), final_leaves(uninterrupted), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_finished_run_has_nothing_left_to_train(mmfm, config, uninterrupted):
    done = mmfm("train", config, "--run", uninterrupted, *OPTIONS)
    assert done.returncode == 0 and "nothing is left to train" in done.stdout


def test_the_latest_checkpoints_and_the_best_are_kept_and_no_others(uninterrupted):
    kept = sorted(int(path.name) for path in (uninterrupted / "checkpoints").iterdir() if path.name.isdigit())
    lines = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    validated = {line["step"]: line["validation/loss"] for line in lines if "validation/loss" in line}
    best = min(validated, key=lambda step: validated[step])
    assert kept == sorted({best, STEPS - 2, STEPS})
    assert load_run(uninterrupted).step == best


def test_the_run_learns(uninterrupted):
    losses = [loss for _, (_, loss) in sorted(history(uninterrupted).items())]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
