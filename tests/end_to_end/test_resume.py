"""A run that is killed or stopped anywhere and started again ends bitwise where the uninterrupted one ends.

With all that a state may hold: an average, Muon beside AdamW, moments in bfloat16, steps of two parts.
"""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from mmfm_jax.cli import main
from mmfm_jax.experiment import to_yaml
from mmfm_jax.train.checkpoint import load_run
from mmfm_jax.train.lock import RunLock

STEPS = 60
INTERRUPTIONS = ("Ctrl-C before a step", "kill in a save", "SIGTERM", "kill in a save", "SIGINT", "kill")


@pytest.fixture(scope="module")
def config(make_tiny, tmp_path_factory) -> Path:
    changes = {
        "tasks": {"disease": {"kind": "classification", "label": "disease"}},
        "inputs.images": {},
        "inputs.texts": {},
        "optimizer": {"kind": "muon", "state_dtype": "bfloat16", "learning_rate": 3e-3, "warmup_steps": 4},
        "train": {
            "steps": STEPS, "batch_size": 16, "accumulate": 2, "ema_decay": 0.9, "log_every": 1, "validate_every": 10,
            "validate_batches": 1,
        },
        "checkpoint": {"every": 2},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("config") / "resume.yaml"
    path.write_text(to_yaml(make_tiny(changes)))
    return path


def final_leaves(run: Path) -> dict[str, np.ndarray]:
    with ocp.PyTreeCheckpointer() as plain:
        held = plain.restore(run / "checkpoints" / str(STEPS) / "default")
    return {name: np.asarray(leaf) for name, leaf in held.items()}


@pytest.fixture(scope="module")
def history(lines):
    def read(run: Path) -> dict[int, tuple]:
        """Batch and loss of each step logged; a step is logged once."""
        steps = [line for line in lines(run) if "loss" in line]
        assert len({line["step"] for line in steps}) == len(steps)
        return {line["step"]: (line["batch_checksum"], line["loss"]) for line in steps}

    return read


@pytest.fixture(scope="module")
def uninterrupted(mmfm, config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = mmfm("train", config, "--run", run)
    assert done.returncode == 0, done.stderr
    return run


def measured(lines: list[dict]) -> dict[int, float]:
    return {line["step"]: line["validation/loss"] for line in lines if "validation/loss" in line}


def newest(lines, run: Path) -> int:
    return max((line["step"] for line in lines(run)), default=0)


def interrupt(process: subprocess.Popen, run: Path, how: str, lines, rng: random.Random) -> bool:
    """Once the process has taken some steps, or while a checkpoint is being written; whether it was still alive."""
    if how == "Ctrl-C before a step":
        return interrupt_before_a_step(process, run)
    before = newest(lines, run)
    until = before + rng.randint(1, 5)
    while process.poll() is None and (newest(lines, run) < until or newest(lines, run) == before):
        time.sleep(0.02)
    if how == "kill in a save":
        while process.poll() is None and not any((run / "checkpoints").glob("*orbax-checkpoint-tmp*")):
            time.sleep(0.001)
    alive = process.poll() is None
    process.send_signal(getattr(signal, how, signal.SIGKILL))
    out, err = process.communicate(timeout=120)
    if how.startswith("SIG") and alive:
        assert process.returncode == 0, err
        saved = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
        assert saved < STEPS and f"Stopped at step {saved} of {STEPS} and saved, by {how}; the same command goes" in out
        assert err == f"mmfm: {how}: saves after the step under way and stops; a second signal leaves at once.\n"
        assert f"step {saved} of {STEPS}: loss " in out and lines(run)[-1]["ended"] == how
    return alive


def interrupt_before_a_step(process: subprocess.Popen, run: Path) -> bool:
    """While the step is traced and compiled."""
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err.count("\n") == 1, err
    assert err.startswith("mmfm: SIGINT: left before the first step; nothing is lost; the same command goes on")
    return True


def test_resume_is_bitwise_equal_after_sigkill_and_sigterm(
    mmfm, config, environment, uninterrupted, lines, history, tmp_path
):
    run, rng, interrupted = tmp_path / "killed", random.Random(0), 0
    command = [sys.executable, "-m", "mmfm_jax.cli", "train", str(config), "--run", str(run)]
    for how in INTERRUPTIONS:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        interrupted += interrupt(process, run, how, lines, rng)
    assert interrupted >= 5  # a slow machine may let a run finish; then there is nothing left to interrupt
    done = mmfm("train", config, "--run", run)
    assert done.returncode == 0 and not done.stderr, done.stderr
    best = min(measured(lines(run)), key=lambda step: (measured(lines(run))[step], -step))
    assert f"Best validation/loss: {measured(lines(run))[best]:.4g} at step {best}." in done.stdout
    assert done.stdout.rstrip().endswith(f"Next: mmfm evaluate {run}") and lines(run)[-1]["ended"] == "finished"
    mine, whole = final_leaves(run), final_leaves(uninterrupted)
    assert mine.keys() == whole.keys()
    assert {"bfloat16", "float32"} <= {str(leaf.dtype) for leaf in whole.values()}
    assert any(name.startswith("average.") for name in whole) and any("muon" in name for name in whole)
    for name in whole:
        np.testing.assert_array_equal(mine[name], whole[name], err_msg=name)
    assert history(run) == history(uninterrupted)


def test_a_finished_run_has_nothing_left_to_train(config, uninterrupted, capsys):
    main(["train", str(config), "--run", str(uninterrupted)])
    assert "nothing is left to train" in capsys.readouterr().out


def test_a_folder_in_which_a_run_trains_is_refused_with_status_2(config, uninterrupted, capsys):
    lock = RunLock(uninterrupted)
    lock.take()
    with pytest.raises(SystemExit) as exit:
        main(["train", str(config), "--run", str(uninterrupted)])
    lock.close()
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"mmfm: {uninterrupted}: another run trains into this folder (process ")


def test_the_latest_checkpoints_and_the_best_are_kept_and_no_others(uninterrupted, lines):
    kept = sorted(int(path.name) for path in (uninterrupted / "checkpoints").iterdir() if path.name.isdigit())
    validated = measured(lines(uninterrupted))
    best = min(validated, key=lambda step: (validated[step], -step))
    assert kept == sorted({best, STEPS - 2, STEPS})
    assert load_run(uninterrupted).step == best


def test_the_run_learns(uninterrupted, history):
    losses = [loss for _, (_, loss) in sorted(history(uninterrupted).items())]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
