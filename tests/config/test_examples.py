"""`mmfm init` writes what the commands that it names then take."""

import shlex
from pathlib import Path

import pytest
import yaml

from mmfm_jax.cli import main
from mmfm_jax.config import examples as module
from mmfm_jax.config.examples import DATASET, EXPERIMENT, PLACES, examples, write_example
from mmfm_jax.data.ingest.load import load_dataset
from mmfm_jax.errors import UserError
from mmfm_jax.experiment import load_experiment

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.rglob("*.yaml"))


def test_every_configuration_of_the_checkout_is_an_example_under_a_name_of_its_own():
    assert sorted(examples()) == NAMES
    assert all(example.path.is_relative_to(CONFIGS) for example in examples().values())


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_taken_where_it_was_written(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said, example = write_example(name), examples()[name]
    written = tmp_path / f"{name}.yaml"
    if example.kind == EXPERIMENT:
        assert load_experiment(written) == load_experiment(example.path)
    else:
        assert load_dataset(written).model_dump(exclude={"root"}) == load_dataset(example.path).model_dump(
            exclude={"root"}
        )
    text = written.read_text()
    assert "configs/" not in text and "$schema" not in text and "../" not in text  # nothing that a wheel lacks
    commands = [shlex.split(line, comments=True) for line in said.splitlines() if line.startswith("    ")]
    assert all(" ".join(command) in text for command in commands)
    verbs = {command[1] for command in commands if command[0] == "mmfm" and f"{name}.yaml" in command}
    assert verbs == (
        {"ingest"} if example.kind == DATASET else {"train"} if name in ("demo", "packed") else {"plan", "train"}
    )


def test_the_list_names_each_example_and_what_it_is(capsys):
    main(["init"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    assert sorted(lines) == NAMES
    assert lines["demo"] == "Three modalities of lung nodules on a CPU"
    assert all(len(about) > 10 for about in lines.values())


def test_commands_name_the_file_that_was_asked_for(tmp_path, capsys):
    out = tmp_path / "of mine" / "x.yaml"
    main(["init", "chest_xray", "--out", str(out)])
    said = capsys.readouterr().out
    assert shlex.split(said.splitlines()[-1])[:3] == ["mmfm", "ingest", str(out)]
    key = shlex.split(said.splitlines()[-2], comments=True)[-1]
    assert key == str(out.parent / yaml.safe_load(out.read_text())["key"]["file"])  # read from beside the description
    assert yaml.safe_load(out.read_text())["root"] == "exports"


def test_a_file_that_is_there_is_left_as_it_is(tmp_path, capsys):
    out = tmp_path / "demo.yaml"
    out.write_text("mine")
    with pytest.raises(SystemExit) as exit:
        main(["init", "demo", "--out", str(out)])
    assert exit.value.code == 2 and out.read_text() == "mine"
    assert "is there already; name another file with --out" in capsys.readouterr().err


def test_what_cannot_be_written_or_is_not_known_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/demo\.yaml: cannot be written: "):
        write_example("demo", tmp_path / "file" / "demo.yaml")
    with pytest.raises(UserError, match="there is no example dmeo; there are demo, packed, pod, "):
        write_example("dmeo", tmp_path / "x.yaml")


def test_an_installation_without_the_examples_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "PLACES", (tmp_path,))
    with pytest.raises(UserError, match="the examples are missing"):
        examples()
    assert PLACES[0].name == "examples"
