"""`mmfm plan` as it is typed, on a machine without a TPU."""

import copy
import io
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest
import yaml
from rich.console import Console

from mmfm_jax.cli import main
from mmfm_jax.errors import UserError
from mmfm_jax.experiment import validate
from mmfm_jax.plan import lower, sweep
from mmfm_jax.plan.chips import GIB
from mmfm_jax.plan.plan import make_plan
from mmfm_jax.plan.report import readable, report

TINY = {
    "name": "tiny",
    "inputs": {
        "images": {"ct": {"size": [4, 16, 16], "patch": [2, 8, 8], "window": [-1000, 1000]}},
        "texts": {"report": {"length": 8}},
    },
    "data": {"store": "nowhere", "vocabulary_size": 128},
    "model": {
        "vision": {"width": 128, "depth": 3, "heads": 1, "registers": 0},
        "text": {"width": 128, "depth": 2, "heads": 1},
        "table": {"width": 128, "depth": 1, "heads": 1},
        "fusion": {"width": 128, "depth": 1, "heads": 1, "latents": 8},
    },
    "tasks": {"disease": {"kind": "classification", "label": "disease"}},
    "train": {"steps": 1000, "batch_size": 32},
}
needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed")


def tiny(**train):
    raw = copy.deepcopy(TINY)
    raw["train"] |= train
    return validate(raw, "the test")


def written(tmp_path) -> str:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    return str(config)


def mmfm(tmp_path, *arguments, **environment):
    """The command in a process of its own; JAX_PLATFORMS is not set, as for a user."""
    of_pods = ("JAX_PLATFORMS", "TPU_", "LIBTPU_")
    held = {name: value for name, value in os.environ.items() if not name.startswith(of_pods)}
    return subprocess.run(
        [sys.executable, "-m", "mmfm_jax.cli", "plan", written(tmp_path), *arguments],
        env=held | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@needs_libtpu
def test_a_plan_for_a_pod_answers_in_json_what_can_be_checked_by_hand(tmp_path):
    done = mmfm(tmp_path, "--topology", "v5e:4x4", "--price", "1.5", "--json", "--train.steps", "2000")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["estimate"] is True and plan["fits"] is True
    assert (plan["topology"], plan["chips"], plan["steps"]) == ("v5e:4x4", 16, 2000)
    assert plan["mesh"] == {"data": 1, "fsdp": 16, "sequence": 1, "tensor": 1}
    assert 0 < plan["hbm_bytes"] < plan["hbm_limit_bytes"] == 15.75 * GIB
    assert sum(plan["hbm"].values()) == pytest.approx(plan["hbm_bytes"])
    # Matrices are split over all 16, so little more than a sixteenth is held; two moments beside the parameters.
    assert 4 * plan["parameters"] / 16 <= plan["hbm"]["parameters"] < 4 * plan["parameters"] / 14
    assert plan["hbm"]["optimizer"] == pytest.approx(2 * plan["hbm"]["parameters"], rel=1e-3)
    assert plan["hbm"]["batch"] == pytest.approx(2 * 4 * 16 * 16 * 2, rel=0.1)  # two studies a chip, of int16
    step = plan["step_seconds"]
    assert sum(plan["by_category"].values()) == pytest.approx(step)
    assert plan["samples_per_second"] == pytest.approx(32 / step)
    assert plan["tokens_per_second"] == pytest.approx(32 * (8 + 8) / step)
    assert plan["days"] == pytest.approx(2000 * step / 86400)
    assert plan["price_usd"] == pytest.approx(plan["days"] * 24 * 16 * 1.5)
    assert plan["mfu"] == pytest.approx(plan["model_flops"] / (step * 16 * 197e12))
    # Every block's weights must reach every chip at least once, in bf16.
    blocks = (3 + 2) * (4 + 8) * 128 * 128 + (8 + 8) * 128 * 128
    received = sum(count for by_link in plan["collective_bytes"].values() for count in by_link.values())
    assert received > 2 * blocks * 15 / 16
    # Four hosts of four chips read eight studies each; one line of progress a phase, away from what a program reads.
    fed = plan["feed"]
    assert (fed["hosts"], fed["times_a_study_is_read"], fed["assumed_store"]) == (4, 1, True)
    assert fed["studies_per_second_of_a_host"] == pytest.approx(8 / step)
    assert fed["needs"]["host cores"]["have"] == 112 and fed["needs"]["network"]["have"] == pytest.approx(12.5e9)
    assert done.stderr.splitlines()[:5] == [f"plan: {p} ..." for p in ("shapes", "trace", "lower", "compile", "read")]
    assert done.stderr.splitlines()[5].startswith("plan: seconds of each: shapes ")
    times = [item["seconds"] for item in plan["largest"]]
    assert len(times) == 10 and times == sorted(times, reverse=True)


@needs_libtpu
def test_a_step_that_does_not_fit_says_by_how_much_and_what_would_help(make_pod):
    plan = make_plan(tiny(batch_size=2**21), make_pod("v5e:2x2"))
    assert not plan.fits and plan.step_seconds is None and plan.mfu is None
    assert plan.hbm_bytes > plan.pod.chip.hbm_bytes
    assert sum(plan.hbm.values()) == pytest.approx(plan.hbm_bytes)
    assert any("--model.vision.remat full" in what for what in plan.helps)
    assert any("--train.batch_size 1048576" in what for what in plan.helps)
    printed = io.StringIO()
    Console(width=200, file=printed).print(report(plan))
    over = (plan.hbm_bytes - plan.pod.chip.hbm_bytes) / GIB
    assert f"{over:.2f} more than the 15.75 it has. What would help:" in printed.getvalue()


@needs_libtpu
@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--topology", "v9:2x2"), "--topology v9:2x2: is not known; known are v4:{"),
        (("--topology", "v5e:3x3"), "is not known"),
        (("--topology", "v5e:2x2", "--slices", "0"), "--slices 0"),
        (("--topology", "v5e:2x2", "--mesh.fsdp", "3"), "does not fit 4 devices"),
        (("--topology", "v5e:2x2", "--slices", "2"), "mesh.data: 1 is not a multiple of the 2 slices"),
        (("--topology", "v5e:2x2", "--train.batch_size", "6"), "train.batch_size: 6 does not split"),
        (("--topology", "v5e:2x2", "--mesh.tensor", "2"), "model.vision.heads: 1 heads do not divide over mesh.tensor"),
        (("--topology", "v5e:2x2", "--mesh.sequence", "4", "--model.vision.registers", "3"), "vision.registers 4, or"),
        (("--topology", "v5e:2x2", "--store"), "nowhere"),
        ((), "--topology v5e:16x16, or --measure"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("make_pod")  # puts the environment back
def test_what_cannot_be_planned_is_one_sentence(tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit) as exit:
        main(["plan", written(tmp_path), *arguments])
    *phases, told = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and told.startswith("mmfm: ") and said in told
    assert all(line.startswith("plan: ") for line in phases)


@needs_libtpu
def test_a_process_that_cannot_plan_says_so_in_its_last_line(tmp_path):
    done = mmfm(tmp_path, "--topology", "v5e:2x2", "--mesh.fsdp", "3")
    assert done.returncode == 2 and "does not fit 4 devices" in done.stderr.splitlines()[-1], done.stderr
    assert done.stderr.count("mmfm:") == 1 and "Traceback" not in done.stderr


def test_without_libtpu_the_extra_is_named(monkeypatch):
    from mmfm_jax.plan import environment

    monkeypatch.setattr(environment, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mmfm_jax\[tpu\]'"):
        environment.compile_without_devices()


def test_the_step_is_timed_on_the_devices_of_this_machine(tmp_path):
    done = mmfm(tmp_path, "--measure", "--json", JAX_PLATFORMS="cpu", MMFM_CPU_DEVICES="2")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["estimate"] is False and measured["estimated_step_seconds"] is None
    assert (measured["devices"], measured["mesh"]["fsdp"]) == (2, 2)
    each = measured["step_seconds_each"]
    assert min(each) <= measured["step_seconds"] <= max(each)
    assert measured["samples_per_second"] == pytest.approx(32 / measured["step_seconds"])


def test_a_sweep_goes_from_what_is_closest_and_tries_nothing_twice(make_pod):
    of, config = make_pod("v5e:4x4"), tiny()
    variants = sweep.variants(config, of)
    own = variants[0]
    assert own.train == config.train and own.model == config.model and own.mesh.fsdp == 16
    changed = [(v.mesh != own.mesh) + (v.model != own.model) + (v.train != own.train) for v in variants]
    assert changed == sorted(changed) and {1, 2, 3} <= set(changed)
    assert all(v != w for i, v in enumerate(variants) for w in variants[:i])
    assert all(v.train.batch_size % (v.mesh.data * v.mesh.fsdp) == 0 for v in variants)


@needs_libtpu
def test_what_does_not_fit_counts_its_arguments(make_pod, mesh_over):
    mesh = mesh_over(make_pod("v5e:2x2"), "x")
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    size = 2**15  # an argument of bf16 is 2 GiB, a temporary or result of f32 4 GiB

    def run(*arguments):
        return jnp.sort(sum(x.astype(jnp.float32) for x in arguments) @ jnp.ones((size, size)), axis=0)

    shapes = [jax.ShapeDtypeStruct((size, size), jnp.bfloat16)] * 5
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        jax.jit(run, in_shardings=whole, out_shardings=whole).lower(*shapes).compile()
    assert lower._excess(str(raised.value)) == ((5 * 2 + 4 + 4) * GIB, 15.75 * GIB)


@pytest.mark.parametrize(
    "message, by_hand",
    [
        ("HLO temporaries (18.57G) exceeds available HBM (15.75G).", (18.57 * GIB, 15.75 * GIB)),
        ("Ran out of memory in memory space hbm. Used 1.5T of 95.74G hbm. Exceeded", (1.5 * 1024 * GIB, 95.74 * GIB)),
        ("INVALID_ARGUMENT: something else", None),
    ],
)
def test_what_the_compiler_says_of_memory_is_read(message, by_hand):
    assert lower._excess(message) == by_hand


def test_an_operation_is_named_by_its_way_and_its_place():
    name = "jit(step)/transpose(jvp())/while/body/closed_call/checkpoint/rematted_computation/dot_general"
    assert readable(name) == "backward: recomputed/dot_general"
    assert readable("jit(step)/jvp()/while/body/closed_call/tanh") == "forward: tanh"
    assert readable("jit(step)/sqrt") == "update: sqrt"
