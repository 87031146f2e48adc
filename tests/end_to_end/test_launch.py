"""What a launcher and its operator see of a run: its outcome, where its start went, who stalls it, its goodput."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmfm_jax.experiment import to_yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(make_tiny, tmp_path_factory) -> Path:
    """One task on the table alone, which compiles fast."""
    disease = {"disease": {"kind": "classification", "label": "disease"}}
    experiment = make_tiny({"inputs.images": {}, "inputs.texts": {}, "tasks": disease})
    path = tmp_path_factory.mktemp("config") / "table.yaml"
    path.write_text(to_yaml(experiment))
    return path


def start(config, run, environment, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "mmfm_jax.cli", "train", str(config), "--run", str(run), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_run_tells_its_outcome_where_it_keeps_programs_and_where_its_time_went(config, environment, lines, tmp_path):
    without = {"JAX_COMPILATION_CACHE_DIR", "JAX_PLATFORMS"}  # a machine with libtpu and no TPU must choose the CPU
    mine = {name: value for name, value in environment.items() if name not in without}
    mine |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "MMFM_OUTCOME": str(tmp_path / "outcome")}
    options = ("--train.steps", "1000", "--train.validate-every", "1000", "--checkpoint.every", "1000")
    process = start(config, tmp_path / "run", mine, *options)
    while process.poll() is None and not any("loss" in line for line in lines(tmp_path / "run")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err.count("\n") == 1 and err.startswith("mmfm: SIGTERM: saves after the step"), (
        err
    )
    assert (tmp_path / "outcome").read_text() == "stopped\n"
    compiled = tmp_path / "cache" / "mmfm_jax" / "compiled"
    assert f"Compiled programs are kept in {compiled}" in out and any(compiled.rglob("*-cache"))
    (first,) = [line for line in lines(tmp_path / "run") if "start/total" in line]
    parts = {name: seconds for name, seconds in first.items() if name.startswith("start/") and name != "start/total"}
    assert {
        f"start/{name}" for name in ("import", "devices", "store", "init", "compile", "data", "train")
    } <= parts.keys()
    assert abs(sum(parts.values()) - first["start/total"]) < 0.01
    assert f"First step after {first['start/total']:.1f} s: import " in out

    done = start(config, tmp_path / "run", mine, *options)
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0 and err == "", err  # programs read from the cache say nothing
    assert (tmp_path / "outcome").read_text() == "finished\n" and "over 2 starts" in out
    held = lines(tmp_path / "run")
    shares = {name: value for name, value in held[-1].items() if name == "goodput" or name.startswith("badput/")}
    assert abs(sum(shares.values()) - 1) < 1e-6 and shares["badput/down"] > 0 and shares["badput/restore"] > 0


def test_a_stopped_process_of_two_is_named_and_the_run_goes_on_when_it_does(config, environment, lines, tmp_path):
    run, port = tmp_path / "run", "29517"
    options = ("--train.steps", "2000", "--train.validate-every", "2000", "--train.stall-minutes", str(3 / 60))
    group = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "MMFM_CPU_DEVICES": "2"}
    both = [start(config, run, environment | group | {"JAX_PROCESS_ID": str(i)}, *options) for i in range(2)]
    try:
        while all(process.poll() is None for process in both) and not any(line["step"] > 2 for line in lines(run)):
            time.sleep(0.05)
        stacks = run / "stalls" / "process-0.txt"

        def stalls() -> int:  # compiling takes longer than three seconds, and is told too
            return stacks.read_text().count("After step") if stacks.exists() else 0

        before = stalls()
        os.kill(both[1].pid, signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while stalls() == before and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)
        before = lines(run)[-1]["step"]
        os.kill(both[1].pid, signal.SIGCONT)
        while lines(run)[-1]["step"] < before + 5 and both[0].poll() is None:
            time.sleep(0.05)
        for process in both:
            process.send_signal(signal.SIGTERM)
        told = [process.communicate(timeout=120)[1] for process in both]
        assert [process.returncode for process in both] == [0, 0], told
    finally:
        for process in both:
            process.kill()
    told = [text for text in told[0].splitlines() if "No step ended" in text]
    # While it compiles a process may not have been heard of yet.
    blaming = [text for text in told if "no sign of life" in text and "(after step 0" not in text]
    assert blaming and all("on process 0 (after step " in text for text in blaming), told
    assert all(": process 1 (after step " in text for text in blaming), told
    assert "loop.py" in stacks.read_text() and str(ROOT) not in stacks.read_text()
