"""What a run's folder allows: one run at a time, more steps where the schedule lets it, a trace of some steps."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from rich.console import Console

from mmfm_jax.errors import UserError
from mmfm_jax.parallel.mesh import make_mesh
from mmfm_jax.train import loop
from mmfm_jax.train.checkpoint import CHECKPOINTS, load_run
from mmfm_jax.train.lock import RunLock
from mmfm_jax.train.loop import train
from mmfm_jax.train.optimizer import constant_until, schedule


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Of the virtual ones; steps without collectives are fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def make(make_experiment):
    """A run on the table alone, which compiles fast."""

    def table(changes: dict | None = None):
        stack = {"width": 8, "depth": 1, "heads": 1}
        small = {
            "inputs.images": {}, "inputs.texts": {},
            "model": {"vision": stack, "text": stack, "table": {**stack, "frequencies": 2},
                      "fusion": {**stack, "latents": 2}, "dtype": "float32"},
            "tasks": {"disease": {"kind": "classification", "label": "disease"}},
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 4, "schedule": "wsd", "decay_fraction": 0.3},
            "train": {"steps": 20, "batch_size": 8, "log_every": 1, "validate_every": 100, "validate_batches": 1},
            "checkpoint": {"every": 4, "keep": 1},
        }  # fmt: skip
        return make_experiment(small | (changes or {}))

    return table


def steps_in(run: Path) -> set[int]:
    return {int(path.name) for path in (run / CHECKPOINTS).iterdir() if path.name.isdigit()}


def leaves(run: Path, step: int) -> dict[str, np.ndarray]:
    with ocp.PyTreeCheckpointer() as plain:
        return {
            name: np.asarray(leaf) for name, leaf in plain.restore(run / CHECKPOINTS / str(step) / "default").items()
        }


def rates(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["learning_rate"] for line in lines if "learning_rate" in line]


@pytest.fixture(scope="module")
def finished(make, tmp_path_factory) -> Path:
    """A run of 20 steps, constant until 14, with a trace of three."""
    run, printed = tmp_path_factory.mktemp("finished") / "run", io.StringIO()
    train(make({"train.profile": {"start": 5, "steps": 3}}), run, Console(file=printed, width=80))
    (run.parent / "printed").write_text(printed.getvalue())
    return run


def test_a_prolonged_run_is_bitwise_one_that_was_long_from_its_start(make, finished, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(finished, run)
    assert steps_in(run) == {14, 20}  # the branch is kept, though only the latest is asked for
    long = make({"train.steps": 40})
    assert train(long, run).step == train(long, whole).step == 40
    mine, other = leaves(run, 40), leaves(whole, 40)
    assert mine.keys() == other.keys() and any(name.startswith("params.") for name in mine)
    for name in mine:
        np.testing.assert_array_equal(mine[name], other[name], err_msg=name)
    assert rates(run) == rates(whole) and len(rates(run)) == 40
    assert steps_in(run) == {28, 40}

    decayed = load_run(run / "steps-20")  # what was the end of the shorter run is still there
    assert decayed.step == 20 and decayed.experiment.train.steps == 20
    for name, leaf in leaves(run / "steps-20", 20).items():
        np.testing.assert_array_equal(leaf, leaves(finished, 20)[name])


@pytest.mark.parametrize("fraction, warmup", [(0.3, 4), (0.0, 0), (1.0, 6), (0.5, 15)])
def test_schedules_of_two_lengths_are_equal_until_the_decay_of_the_shorter(make, fraction, warmup):
    config = make({"optimizer.decay_fraction": fraction, "optimizer.warmup_steps": warmup}).optimizer
    short, long = (np.asarray([schedule(config, steps)(i) for i in range(20)]) for steps in (20, 47))
    end = constant_until(config, 20)
    np.testing.assert_array_equal(short[:end], long[:end])
    if end < 19:
        assert short[end + 1] < config.learning_rate


def test_what_cannot_be_prolonged_is_said(make, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with pytest.raises(UserError, match="cannot become one of 10;"):
        train(make({"train.steps": 10}), run)
    shutil.rmtree(run / CHECKPOINTS / "14")
    with pytest.raises(UserError, match="holds no checkpoint of the constant part of the schedule, up to step 14"):
        train(make({"train.steps": 40}), run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("schedule: wsd", "schedule: cosine"))
    with pytest.raises(UserError, match=r"the cosine schedule falls .* wsd"):
        train(make({"train.steps": 40, "optimizer.schedule": "cosine"}), run)
    assert steps_in(run) == {20} and not (run / "steps-20").exists()


def test_without_a_terminal_a_run_says_how_it_goes_what_is_best_and_what_comes_next(finished):
    first, *middle, end, next_command = (finished.parent / "printed").read_text().splitlines()
    assert first.startswith("First step after ") and "Goodput " in middle[-1]
    assert middle[0].startswith("step 1 of 20: loss ") and "; validation at step 20: loss " in middle[-2]
    validated = json.loads((finished / CHECKPOINTS / "20" / "validation" / "metadata").read_text())["validation/loss"]
    assert end == f"Finished at step 20. Best validation/loss: {validated:.4g} at step 20."
    assert next_command == f"Next: mmfm evaluate {finished}"


def test_a_run_that_goes_on_says_which_releases_and_store_are_no_longer_the_same(make, finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    (entry,) = json.loads((run / "versions.json").read_text())
    entry["releases"]["jax"] = "0.1"
    entry["stores"]["store"] |= {"sha256": "other", "studies": 3}
    (run / "versions.json").write_text(json.dumps([entry]))
    train(make(), run)
    of_releases, of_store = capsys.readouterr().err.splitlines()
    assert f"{run}: goes on under other releases (jax 0.1 is now {jax.__version__})" in of_releases
    assert "(store.json differs: store had 3 studies and has 120)" in of_store


def test_a_trace_of_the_steps_asked_for_lies_in_the_folder(finished):
    (trace,) = (finished / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000


def test_a_run_stopped_before_its_first_validation_can_be_loaded(finished):
    assert load_run(finished).step == 20


@pytest.mark.parametrize("best", ["validation/los", "validation/disease/auroc"])
def test_a_best_metric_that_there_is_not_is_refused_at_the_start(make, tmp_path, best):
    mode = {"best": best, "best_mode": "min"}
    with pytest.raises(UserError, match=f"checkpoint.best: {best} is no metric of this run; there are validation/dis"):
        train(make({"checkpoint": mode}), tmp_path / "run")
    assert not steps_in(tmp_path / "run")


HOLDS = """
import sys, time
from pathlib import Path
from mmfm_jax.train.lock import RunLock
RunLock(Path(sys.argv[1])).take()
print("taken", flush=True)
time.sleep(600)
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended_or_was_killed(make, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    command = [sys.executable, "-c", HOLDS, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}) as first:
        assert first.stdout and first.stdout.readline() == "taken\n"
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        with pytest.raises(UserError, match=f"another run trains into this folder .process {first.pid} on "):
            train(make({"train.steps": 40}), run)
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
        first.send_signal(signal.SIGKILL)
    lock = RunLock(run)
    lock.take()
    with pytest.raises(UserError, match="another run trains"):
        RunLock(run).take()
    lock.close()
    assert train(make(), run).step == 20
