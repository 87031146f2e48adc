"""The comparison is of equal work, and says plainly what it cannot compare."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

from mmfm_jax import extras
from mmfm_jax.bench import peer
from mmfm_jax.bench.models import builtin
from mmfm_jax.cli import main
from mmfm_jax.config.training import MeshConfig
from mmfm_jax.experiment import to_yaml, validate
from mmfm_jax.parallel.mesh import make_mesh
from mmfm_jax.plan import lower
from mmfm_jax.train import groups
from mmfm_jax.train.flops import step_flops

both_installed = pytest.mark.skipif(
    not all(map(find_spec, ("torch", "transformers"))), reason="torch or transformers is not installed"
)


@both_installed
@pytest.mark.parametrize("name", ["vit-s", "vit-l-3d"])
def test_both_sides_have_as_many_flops_and_parameters(name):
    experiment = builtin(name)
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    program = lower.make_program(experiment, lower.assumed_spec(experiment), mesh)
    trained, _ = groups.split(program.state.params, experiment.optimizer.groups)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(trained))
    theirs, their_flops = peer.size_of(experiment)
    flops = step_flops(program.graph, experiment, program.spec, program.state, program.batch)
    assert flops == pytest.approx(their_flops, rel=0.005)
    assert parameters == pytest.approx(theirs, rel=0.02)


def tiny() -> dict:
    raw = builtin("vit-s").model_dump(mode="json")
    tower = {"width": 16, "depth": 2, "heads": 2}
    raw["inputs"]["images"]["image"] |= {"size": [4, 16, 16], "patch": [2, 8, 8]}
    raw["inputs"]["texts"]["report"]["length"] = 4
    raw["model"] |= {"vision": {**tower, "registers": 0}, "text": tower}
    raw["data"]["vocabulary_size"] = 64
    raw["train"]["batch_size"] = 4
    return raw


@both_installed
def test_the_command_times_both_sides_of_an_experiment(tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(to_yaml(validate(tiny(), "the test")))
    done = subprocess.run(
        [sys.executable, "-m", "mmfm_jax.cli", "bench", "train", config, "--rounds", "3", "--json"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    ours, theirs = found["sides"]["mmfm_jax"], found["sides"]["transformers"]
    for side in (ours, theirs):
        assert len(side["step_seconds_each"]) == 3 and 0 < side["loss"] < 100
        assert side["samples_per_second"] == pytest.approx(4 / side["step_seconds"])
        assert side["mfu"] == pytest.approx(side["model_flops"] / side["step_seconds"] / found["matmul_peak_flops"])
    each = zip(ours["step_seconds_each"], theirs["step_seconds_each"])
    assert found["ratio"] == pytest.approx(sorted(b / a for a, b in each)[1])


@both_installed
def test_both_sides_learn_to_tell_their_batch_apart(tmp_path):
    from mmfm_jax.bench.ours import Ours

    experiment = validate(tiny(), "the test")
    for side in (Ours(experiment), peer.Peer(experiment, "cpu")):
        side.step(1)
        first = side.loss
        side.step(60)
        assert side.loss < first - 0.1


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"inputs": {"columns": ["age"]}}, "no columns"),
        ({"train": {"accumulate": 2}}, "train.accumulate"),
        ({"tasks": {"image_text": {"kind": "contrastive", "loss": "softmax"}}}, "one sigmoid contrast"),
    ],
)
def test_what_siglip_does_not_know_is_refused_in_one_sentence(changes, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: name)
    raw = tiny()
    for part, fields in changes.items():
        raw[part] |= fields
    path = tmp_path / "experiment.yaml"
    path.write_text(to_yaml(validate(raw, "the test")))
    assert said in refused(capsys, path)


def test_what_is_not_installed_or_not_known_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: name)
    assert "resnet: is neither a file nor one of vit-s, vit-b" in refused(capsys, "resnet")
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    said = refused(capsys, "vit-s")
    assert (
        "bench train needs torch and transformers, which are not installed" in said
        and "pip install 'mmfm_jax[reference]'" in said
    )


def refused(capsys, config: Path | str) -> str:
    with pytest.raises(SystemExit) as exit:
        main(["bench", "train", str(config)])
    captured = capsys.readouterr().err
    assert exit.value.code == 2 and captured.count("\n") == 1 and captured.startswith("mmfm: ")
    return captured
