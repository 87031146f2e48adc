"""Bad input gets one clear sentence and exit status 2, and leaves nothing half-written."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from mmfm_jax.cli import main


def said(capsys, *arguments) -> str:
    """What the command prints when it refuses."""
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    assert exit.value.code == 2
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1 and captured.startswith("mmfm: ") and "Traceback" not in captured
    return captured


@pytest.fixture
def changed(config, tmp_path):
    """`changed({"train.steps": "many"})`: the path of the small experiment with fields changed."""

    def make(changes: dict) -> Path:
        raw = yaml.safe_load(config.read_text())
        for field, value in changes.items():
            *path, last = field.split(".")
            place = raw
            for name in path:
                place = place[name]
            place[last] = value
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return make


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"train.stepz": 3}, "train.stepz: is not a known field; did you mean steps?"),
        ({"train.steps": "many"}, "train.steps: is a text; give a whole number above 0"),
        ({"train.steps": -1}, "train.steps: is -1; give a whole number above 0"),
        ({"tasks.masked.kind": "maskd"}, "tasks.masked"),
        ({"data.store": "/nowhere/store"}, "/nowhere/store: there is no store here"),
        ({"train.batch_size": 12}, "train.batch_size: 12"),
        ({"mesh": {"fsdp": 3}}, "mesh: data 1 x fsdp 3"),
        ({"mesh": {"tensor": 8}}, "model.vision.heads: 2 heads do not divide over mesh.tensor 8; make them a multiple"),
        ({"mesh": {"tensor": 8}}, "or mesh.tensor 2\n"),
        ({"mesh": {"sequence": 4}}, "8 patches and 2 registers do not divide over mesh.sequence 4; make model.vision."),
        ({"mesh": {"sequence": 4}}, "make model.vision.registers 4, or"),
        (
            {"mesh": {"sequence": 8}, "model.vision.registers": 0},
            "inputs.texts.report.length: 12 tokens do not divide over mesh.sequence 8; make it 16",
        ),
        (
            {
                "mesh": {"sequence": 4},
                "data.augment": {"flip": 0.5, "flip_with_text": True},
                "inputs.images.ct.pack": {"studies": 2, "tokens": 10},
            },
            "inputs.images.ct.pack.tokens: 10 and 4 registers do not divide over mesh.sequence 4; make it 12",
        ),
        (
            {"data.augment": {"flip": 0.5}},
            "data.augment.flip: a mirror image swaps left and right, which texts of tasks.image_text may name; "
            "set flip to 0, or flip_with_text: true if no text does",
        ),
        ({"inputs.images.ct.normalise": "zscore"}, "inputs.images.ct: an image has either a window"),
        ({"inputs.columns": ["age", "weight"]}, "weight"),
        ({"tasks.disease.label": "grade"}, "tasks.disease.label"),
        ({"data.vocabulary_size": 9}, "data.vocabulary_size 9"),
        ({"data.tokenizer": "/nowhere/tokenizer.json"}, "/nowhere/tokenizer.json"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_cannot_train(changed, capsys, tmp_path, changes, expected):
    run = tmp_path / "run"
    assert expected in said(capsys, "train", changed(changes), "--run", run)
    assert not run.exists() or not list(run.glob("*.yaml"))


def test_an_override_that_is_wrong(config, tmp_path):
    with pytest.raises(SystemExit) as exit:
        main(["train", str(config), "--run", str(tmp_path / "run"), "--train.steps", "many"])
    assert exit.value.code == 2 and not (tmp_path / "run").exists()


def test_files_that_are_no_experiment(capsys, tmp_path):
    assert "there is no such file" in said(capsys, "train", tmp_path / "no.yaml", "--run", tmp_path / "run")
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "holds no experiment" in said(capsys, "train", tmp_path / "list.yaml", "--run", tmp_path / "run")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    assert "not valid YAML" in said(capsys, "train", tmp_path / "broken.yaml", "--run", tmp_path / "run")


def test_a_folder_that_is_no_run(capsys, tmp_path, config):
    assert "is not a run" in said(capsys, "evaluate", tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds files but no run" in said(capsys, "train", config, "--run", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "run, expected",
    [
        ("gs://bucket/run", "gs://bucket/run: a run lies in a folder of this machine, not in a bucket"),
        ("s3://bucket/run", "s3://bucket/run: a run lies in a folder"),
        ("/proc/run", "/proc/run: cannot be written (No such file or directory)"),
        ("taken", "taken is a file; give another --run"),
        ("taken/run", "taken is a file; give another --run"),
    ],
)
def test_a_place_that_can_hold_no_run(capsys, config, tmp_path, monkeypatch, run, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("mine")
    assert expected in said(capsys, "train", config, "--run", run)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"] and (tmp_path / "taken").read_text() == "mine"


@pytest.fixture
def copied(small_store, tmp_path) -> Path:
    return Path(shutil.copytree(small_store, tmp_path / "store"))


def test_a_store_without_an_image_for_training(capsys, changed, copied, tmp_path):
    described = json.loads((copied / "store.json").read_text())
    del described["counts"]["train"]["images"]["ct"]
    (copied / "store.json").write_text(json.dumps(described))
    message = said(capsys, "train", changed({"data.store": str(copied)}), "--run", tmp_path / "run")
    assert f"inputs.images.ct: none of the 60 training studies of {copied} holds one" in message
    assert not (tmp_path / "run").exists()


def test_a_store_of_a_newer_format(capsys, copied):
    described = json.loads((copied / "store.json").read_text())
    (copied / "store.json").write_text(json.dumps(described | {"format_version": 99}))
    assert "upgrade mmfm_jax" in said(capsys, "inspect", copied)


def test_a_store_with_a_truncated_chunk(capsys, copied, changed, tmp_path):
    chunk = next(path for path in sorted((copied / "volumes").rglob("c/**/*")) if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 2])
    message = said(capsys, "train", changed({"data.store": str(copied)}), "--run", tmp_path / "run")
    assert "cut short" in message and "volumes/ct" in message
    assert "volumes/ct" in said(capsys, "inspect", copied, "--verify")


@pytest.mark.parametrize("empty", ["train", "validation"])
def test_a_store_without_patients_in_a_split(capsys, make_small_store, changed, tmp_path, empty):
    path = changed({"data.store": make_small_store(20, {"train", "validation", "test"} - {empty})})
    assert f"the split {empty} has no patients" in said(capsys, "train", path, "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()
