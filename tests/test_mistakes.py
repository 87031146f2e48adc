"""What a person gets wrong in a configuration or on the command line, and the one sentence that each is told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmfm_jax.cli import main
from mmfm_jax.config.files import LARGEST_BYTES, dump, parse
from mmfm_jax.errors import UserError
from mmfm_jax.experiment import experiment_type, load_experiment, to_yaml
from mmfm_jax.train.clock import Clock
from mmfm_jax.train.place import check_free

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
BASE = """\
name: small
seed: 0
inputs:
  images:
    ct: {size: [4, 8, 8], patch: [2, 4, 4], window: [0, 255], crop: random}
  texts:
    report: {length: 16}
  columns: [age]
data:
  store: nowhere
  augment: {shift_mm: 1}
model:
  vision: {width: 16, depth: 1, heads: 2}
  text: {width: 16, depth: 1, heads: 2}
  table: {width: 16, depth: 1, heads: 2}
  fusion: {width: 16, depth: 1, heads: 2, latents: 2}
  dtype: float32
tasks:
  masked: {kind: masked}
  disease: {kind: classification, label: disease}
optimizer: {learning_rate: 1e-3, groups: [{match: model.text.*, frozen: true}]}
train: {steps: 4, batch_size: 16}
"""
NAME = "Doe"  # of a patient, in files that are no configurations and in values; never to be told


def swap(old: str, new: str) -> str:
    assert BASE.count(old) == 1
    return BASE.replace(old, new)


LAUGHS = "l0: &l0 [Doe, Doe]\n" + "".join(f"l{i}: &l{i} [*l{i - 1}, *l{i - 1}]\n" for i in range(1, 40))
FILES = {
    # unknown fields come first, with what was probably meant
    "a field without its underscore": (swap("batch_size", "batchsize"), "train.batchsize: is not a known field; did you mean batch_size?\n"),
    "a field in camel case": (swap("learning_rate", "learningRate"), "optimizer.learningRate: is not a known field; did you mean learning_rate?"),
    "a field with a letter missing": (swap("depth: 1, heads: 2, latents", "dept: 1, heads: 2, latents"), "model.fusion.dept: is not a known field; did you mean depth?"),
    "a section with a letter missing": (swap("optimizer:", "optimiser:"), "optimiser: is not a known field; did you mean optimizer?"),
    "a field of another section": (BASE + "batch_size: 3\n", "batch_size: is not a known field here; move it to evaluate.batch_size or train.batch_size"),
    "a field of an abbreviation": (BASE + "lr: 3\n", "lr: is not a known field; known are name, seed, inputs"),
    "a field of a task's that another kind has": (swap("{kind: masked}", "{kind: masked, smoothing: 0.1}"), "tasks.masked.smoothing: is not a known field here; move it to tasks.NAME.smoothing"),
    "an unknown and a wrong field": (swap("steps: 4, batch_size: 16", "steps: no, batchsize: 16"), "train.batchsize: is not a known field; did you mean batch_size? (and 1 more)"),
    "two wrong fields": (swap("steps: 4, batch_size: 16", "steps: no, batch_size: no"), "(and 1 more)"),
    "questions where evaluation had them": (BASE + "evaluate: {zero_shot: {}}\n", "evaluate.zero_shot: is not a known field here; move it to tasks.NAME.zero_shot"),
    "a key that is a sentence": (swap("steps: 4", "Mrs Doe was seen: 4, steps: 4"), "train.NAME: is not a known field"),
    # what is missing
    "a missing field": (swap("steps: 4, ", ""), "train.steps: is missing; give a whole number above 0"),
    "a missing section": (swap("train: {steps: 4, batch_size: 16}", ""), "train: is missing; give a mapping with steps, batch_size"),
    "a missing kind": (swap("{kind: masked}", "{depth: 1}"), "tasks.masked.kind: is missing; give one of caption, classification"),
    "a missing label": (swap(", label: disease", ""), "tasks.disease.label: is missing; give a text"),
    "an empty value": (swap("steps: 4", "steps: "), "train.steps: is empty; give a whole number above 0"),
    "an empty section": (swap("train: {steps: 4, batch_size: 16}", "train:"), "train: is empty; give a mapping"),
    "no tasks": (swap("  masked: {kind: masked}\n  disease: {kind: classification, label: disease}\n", "  {}\n"), "tasks is empty; name at least one"),
    "no store": (swap("store: nowhere", 'store: ""'), "give either `store` or"),
    # lists of a length
    "two sizes": (swap("[4, 8, 8]", "[8, 8]"), "inputs.images.ct.size: is a list of 2; give three whole numbers above 0 (z y x)"),
    "four sizes": (swap("[4, 8, 8]", "[1, 4, 8, 8]"), "inputs.images.ct.size: is a list of 4; give three whole numbers"),
    "one size": (swap("[4, 8, 8]", "8"), "inputs.images.ct.size: is 8; give three whole numbers"),
    "a size of zero": (swap("[4, 8, 8]", "[0, 8, 8]"), "inputs.images.ct.size: is a list of 3; give three whole numbers above 0"),
    "a size beyond all memory": (swap("[4, 8, 8]", "[40000, 80000, 80000]"), "inputs.images.ct: size [40000, 80000, 80000] is 256000000000000 voxels; give 2147483647 at most"),
    "sizes as a text": (swap("[4, 8, 8]", "4x8x8"), "inputs.images.ct.size: is a text; give three whole numbers"),
    "two sizes of a patch": (swap("[2, 4, 4]", "[4, 4]"), "inputs.images.ct.patch: is a list of 2; give three whole numbers above 0 (z y x)"),
    "a patch that does not divide": (swap("[2, 4, 4]", "[3, 4, 4]"), "inputs.images.ct: patch [3, 4, 4] does not divide size [4, 8, 8]"),
    "two spacings": (swap("crop: random", "spacing_mm: [1, 1]"), "inputs.images.ct.spacing_mm: is a list of 2; give three numbers above 0 (z y x)"),
    "a negative spacing": (swap("crop: random", "spacing_mm: [1, 1, -1]"), "inputs.images.ct.spacing_mm: is a list of 3; give three numbers above 0"),
    "a window of one number": (swap("[0, 255]", "[255]"), "inputs.images.ct.window: is a list of 1; give two numbers (low and high) or a list of such"),
    "a window of three": (swap("[0, 255]", "[0, 128, 255]"), "inputs.images.ct.window: is a list of 3; give two numbers (low and high)"),
    "a window that is a number": (swap("[0, 255]", "255"), "inputs.images.ct.window: is 255; give two numbers (low and high)"),
    "one of several windows": (swap("[0, 255]", "[[0, 255], [3]]"), "inputs.images.ct.window: is a list of 2; give two numbers"),
    "a window upside down": (swap("[0, 255]", "[255, 0]"), "inputs.images.ct: window [255.0, 0.0] is empty"),
    "one percentile": (swap("window: [0, 255]", "normalise: {percentiles: [1]}"), "inputs.images.ct.normalise.percentiles: is a list of 1; give two numbers from 0 to 100 (low and high)"),
    "a percentile above all": (swap("window: [0, 255]", "normalise: {percentiles: [1, 101]}"), "inputs.images.ct.normalise.percentiles: is a list of 2; give two numbers from 0 to 100"),
    "one wavelength": (swap("vision: {width: 16", "vision: {wavelengths_mm: [4], width: 16"), "model.vision.wavelengths_mm: is a list of 1; give two numbers above 0 (shortest and longest)"),
    "two chances to flip": (swap("{shift_mm: 1}", "{flip: [0.5, 0.5]}"), "data.augment.flip: is a list of 2; give a number of 0 or more and below 1 or three numbers"),
    "a chance of two": (swap("{shift_mm: 1}", "{flip: 2}"), "data.augment.flip: is 2; give a number of 0 or more and below 1"),
    "a column instead of several": (swap("[age]", "age"), "inputs.columns: is a text; give a list of texts"),
    "a column that is a number": (swap("[age]", "[age, 3]"), "inputs.columns.1: is 3; give a text"),
    "groups without a list": (swap("[{match: model.text.*, frozen: true}]", "{match: model.text.*}"), "optimizer.groups: is a mapping; give a list of mappings with match"),
    "a betas of PyTorch's": (swap("learning_rate: 1e-3", "betas: [0.9, 0.95]"), "optimizer.betas: is not a known field"),
    # numbers
    "half a step": (swap("steps: 4", "steps: 1.5"), "train.steps: is 1.5; give a whole number above 0"),
    "a whole number with a point": (swap("steps: 4", "steps: 4.0"), "train.steps: is 4.0; give a whole number above 0"),
    "negative steps": (swap("steps: 4", "steps: -4"), "train.steps: is -4; give a whole number above 0"),
    "no steps": (swap("steps: 4", "steps: 0"), "train.steps: is 0; give a whole number above 0"),
    "true steps": (swap("steps: 4", "steps: true"), "train.steps: is true; give a whole number above 0"),
    "a number in quotes": (swap("batch_size: 16", 'batch_size: "16"'), "train.batch_size: is a text; give a whole number above 0, without quotes"),
    "a number in words": (swap("batch_size: 16", "batch_size: sixteen"), "train.batch_size: is a text; give a whole number above 0"),
    "a date for a number": (swap("steps: 4", "steps: 2026-01-01"), "train.steps: is a text; give a whole number above 0"),
    "a time for a number": (swap("steps: 4", "steps: 1:30"), "train.steps: is a text; give a whole number above 0"),
    "a list for a number": (swap("steps: 4", "steps: [4]"), "train.steps: is a list of 1; give a whole number above 0"),
    "a mapping for a number": (swap("steps: 4", "steps: {n: 4}"), "train.steps: is a mapping; give a whole number above 0"),
    "no number": (swap("1e-3", ".nan"), "optimizer.learning_rate: is not a number; give a number above 0"),
    "an infinite number": (swap("1e-3", ".inf"), "optimizer.learning_rate: is infinite; give a number above 0"),
    "a number beyond the floats": (swap("1e-3", "1e999"), "optimizer.learning_rate: is infinite; give a number above 0"),
    "an infinite window": (swap("[0, 255]", "[-.inf, 255]"), "inputs.images.ct.window: is a list of 2; give two numbers"),
    "a learning rate of nothing": (swap("1e-3", "0"), "optimizer.learning_rate: is 0; give a number above 0"),
    "a learning rate in quotes": (swap("1e-3", '"1e-3"'), "optimizer.learning_rate: is a text; give a number above 0, without quotes"),
    "a seed below nothing": (swap("seed: 0", "seed: -1"), "seed: is -1; give a whole number of 0 or more"),
    "a seed as a formula": (swap("seed: 0", "seed: 2**70"), "seed: is a text; give a whole number of 0 or more"),
    "a seed beyond the machine": (swap("seed: 0", f"seed: {2**70}"), "seed: is too large; give a whole number of 0 or more, 4294967295 at most"),
    "a number of 5,000 digits": (swap("seed: 0", f"seed: {'9' * 5000}"), "line 2, column 7: a number that is too long"),
    "a number of 4,000 digits": (swap("seed: 0", f"seed: {'9' * 4000}"), "seed: is too large"),
    "a batch of a million millions": (swap("batch_size: 16", "batch_size: 1000000000000"), "train.batch_size: is too large; give a whole number above 0, 2147483647 at most"),
    "a share above one": (BASE + "evaluate: {max_gallery: 1}\n", "evaluate.max_gallery: is 1; give a whole number of 2 or more"),
    "a mesh of two rests": (BASE + "mesh: {data: -1, fsdp: -1}\n", "mesh: sizes are positive, and at most one is -1"),
    "parts that do not divide": (swap("batch_size: 16", "batch_size: 16, accumulate: 3"), "train.accumulate 3 does not divide train.batch_size 16"),
    "heads that do not divide": (swap("vision: {width: 16, depth: 1, heads: 2}", "vision: {width: 16, depth: 1, heads: 3}"), "model.vision: heads 3 do not divide width 16"),
    # words
    "a dtype of PyTorch's": (swap("dtype: float32", "dtype: float16"), "model.dtype: is none of float32, bfloat16; did you mean"),
    "a dtype of no likeness": (swap("dtype: float32", "dtype: half"), "model.dtype: is a text; give one of float32, bfloat16"),
    "a kind misspelt": (swap("kind: masked", "kind: maskd"), "tasks.masked.kind: is none of caption, classification, contrastive, image_numbers, masked; did you mean masked?"),
    "a kind that is none": (swap("kind: masked", "kind: Doe"), "tasks.masked.kind: is none of caption"),
    "a kind that is a number": (swap("kind: masked", "kind: 3"), "tasks.masked.kind: is none of caption"),
    "a word in capitals": (swap("crop: random", "crop: Random"), "inputs.images.ct.crop: is none of centre, random; did you mean random?"),
    "American spelling": (swap("crop: random", "crop: center"), "inputs.images.ct.crop: is none of centre, random; did you mean centre?"),
    "a text for a switch": (swap("frozen: true", "frozen: maybe"), "optimizer.groups.0.frozen: is a text; give true or false"),
    "a number for a switch": (swap("frozen: true", "frozen: 1"), "optimizer.groups.0.frozen: is 1; give true or false"),
    "modalities that are none": (swap("{kind: masked}", "{kind: contrastive, between: [image, video]}"), "tasks.masked.between: is a list of 2; give two words among image, text, table"),
    "a number for a name": (swap("name: small", "name: 5"), "name: is 5; give a text"),
    "a switch for a name": (swap("name: small", "name: yes"), "name: is true; give a text"),
    "a list of tasks": (swap("  masked: {kind: masked}\n  disease: {kind: classification, label: disease}\n", "  - {kind: masked}\n"), "tasks: is a list of 1; give a mapping of names"),
    "a task that is a word": (swap("{kind: masked}", "masked"), "tasks.masked: is a text; give a mapping with kind"),
    "a section that is a word": (swap("augment: {shift_mm: 1}", "augment: all"), "data.augment: is a text; give a mapping with flip"),
    "a sentence for a number": (swap("steps: 4", "steps: Mrs Doe was seen"), "train.steps: is a text"),
    # YAML
    "a key twice": (BASE + "seed: 3\n", "line 23, column 1: the key seed stands twice, first in line 2; leave one of them out"),
    "a key twice within": (swap("steps: 4, ", "steps: 4, steps: 5, "), "line 22, column 19: the key steps stands twice"),
    "a key twice that is a sentence": ("Mrs Doe: 1\nMrs Doe: 2\n", "line 2, column 1: the key stands twice, first in line 1"),
    "5,000 open brackets": ("[" * 5000, "is nested too deep"),
    "200 indents": (swap("seed: 0", "seed: " + "[" * 200 + "]" * 200), "is nested too deep"),
    "a billion laughs": (LAUGHS + BASE, "entries once aliases are written out"),
    "an alias of itself": ("name: &a [*a]\n", "line 1, column 7: an alias stands inside of what it is an alias of"),
    "an alias of nothing": (swap("name: small", "name: *Doe"), "line 1, column 7: not valid YAML"),
    "a tag of Python's": (swap("name: small", "name: !!python/name:os.system Doe"), "line 1, column 7: not valid YAML"),
    "tabs": (swap("  store: nowhere", "\tstore: Doe"), "not valid YAML; indent with spaces, not with tabs"),
    "a colon in a text": (swap("name: small", "name: seen: Doe"), "line 1, column 11: not valid YAML; a text that holds a colon stands in quotes"),
    "an open quote": (swap("name: small", 'name: "Doe'), "not valid YAML"),
    "an open bracket": (swap("columns: [age]", "columns: [age"), "not valid YAML"),
    "two documents": (BASE + "---\nname: Doe\n", "not valid YAML"),
    "a character of no text": ("name: Doe\x07\n", "line 1 holds a character that no text has"),
    "half a character": (swap("name: small", 'name: "\\ud800"'), "name: holds half a character"),
    "a list at the top": ("- Doe\n", "holds no experiment; it must be a mapping"),
    "a text at the top": ("Mrs Doe was seen.\n", "holds no experiment; it must be a mapping"),
    "an empty file": ("", "holds no experiment; it must be a mapping"),
    "a mapping of something else": ("patient: Doe\nreport: seen\n", "holds no experiment; it must be a mapping"),
    "a table": ("id,report\n1,Doe: seen\n2,\"Doe\n", "not valid YAML"),
    "a key that is a number": (swap("seed: 0", "1: x"), "a key is a number where a name is meant; put it in quotes"),
    "a key that is a switch": (swap("  masked: {kind: masked}", "  no: {kind: masked}"), "tasks: a key is true, yes or the like"),
    "a key that is empty": (swap("  masked: {kind: masked}", "  ~: {kind: masked}"), "tasks: a key is empty where a name is meant"),
    "a key that is a list": (swap("seed: 0", "[Doe]: x"), "not valid YAML; a key is a name"),
    "a set": (swap("columns: [age]", "columns: !!set {age}"), "inputs.columns: is of a kind that no field takes"),
    "bytes": (swap("name: small", "name: !!binary aGVsbG8="), "name: is of a kind that no field takes"),
    "bytes that are none": (swap("name: small", "name: !!binary Doe"), "line 1, column 7"),
}  # fmt: skip
BYTES = {
    "another encoding": (BASE.replace("small", "Müller").encode("latin-1"), "line 1 is not text in UTF-8"),
    "two bytes a character": (BASE.encode("utf-16"), "line 1 is not text in UTF-8"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "line 1 is not text in UTF-8"),
    "zeros": (bytes(1000), "line 1 holds a character that no text has"),
    "a volume": (b"a" * (LARGEST_BYTES + 1), f"holds more than {LARGEST_BYTES} bytes"),
}
FLAGS = {
    "a field misspelt": (["--train.batchsize", "8"], "--train.batchsize: is not a known field; did you mean batch_size?"),
    "a section misspelt": (["--trian.steps", "8"], "--trian: is not a known field; did you mean train?"),
    "a field without its section": (["--steps", "8"], "--steps: is not a known field here; move it to train.profile.steps or train.steps"),
    "an option of the verb misspelt": (["--rnu", "x"], "--rnu: is no option; did you mean --run?"),
    "a role misspelt": (["--inputs.images.cd.size", "[4, 8, 8]"], "--inputs.images.cd.patch: is missing"),
    "a task misspelt": (["--tasks.maskd.depth", "2"], "--tasks.maskd.kind: is missing; give one of caption, classification, contrastive, image_numbers, masked; was --tasks.masked meant?"),
    "half of an optional mapping": (["--inputs.images.ct.pack.studies", "8"], "--inputs.images.ct.pack.tokens: is missing; give a whole number above 0"),
    "a wrong type": (["--train.steps", "many"], "--train.steps: is a text; give a whole number above 0"),
    "half a step": (["--train.steps=1.5"], "--train.steps: is 1.5; give a whole number above 0"),
    "true for a number": (["--train.steps", "True"], "--train.steps: is true; give a whole number above 0"),
    "no value": (["--train.steps"], "--train.steps: has no value; write it as --train.steps VALUE"),
    "no value before another": (["--train.steps", "--seed", "3"], "--train.steps: has no value"),
    "two sizes": (["--inputs.images.ct.size", "8", "8"], "--inputs.images.ct.size: is a list of 2; give three whole numbers"),
    "several for one": (["--train.steps", "8", "9"], "--train.steps: is a list of 2; give a whole number above 0"),
    "a place beyond the list": (["--optimizer.groups.3.frozen", "true"], "--optimizer.groups.3.frozen: 3 is no place in a list of 1; give 0 to 0, or 1 for one more"),
    "a name in a list": (["--optimizer.groups.text.frozen", "true"], "--optimizer.groups.text.frozen: text is no place in a list of 1"),
    "a mapping for a number": (["--train.steps", "{a: 1}"], "--train.steps: is a mapping; give a whole number"),
    "a number for a mapping": (["--train", "3"], "--train: is 3; give a mapping with steps, batch_size"),
    "an open bracket": (["--train.steps", "[Doe"], "--train.steps: line 1, column 5: not valid YAML"),
    "5,000 open brackets": (["--seed", "[" * 300 + "]" * 300], "is nested too deep"),
    "a field of 5,000 dots": (["--data.mix" + ".a" * 5000, "1"], "is nested too deep"),
    "dots without names": (["--train..steps", "3"], "--train..steps: is no field; write it as --train.steps 500"),
    "dashes alone": (["--", "3"], "is no field"),
    "both of two": (["--data.mix.a.store", "x"], "with --data.mix.a.store: data: give either `store` or, for several stores, `mix`"),
    "a word out of place": (["--train.steps", "3", "--data.augment.flip", "0.2", "Doe"], "--data.augment.flip: is a list of 2"),
    "an infinite rate": (["--optimizer.learning_rate", ".inf"], "--optimizer.learning_rate: is infinite"),
    "what does not fit together": (["--train.accumulate", "3"], "with --train.accumulate: train.accumulate 3 does not divide"),
}  # fmt: skip
WORDS = {
    "no verb": ([], "required: VERB"),
    "a verb misspelt": (["trian"], "trian: is no verb; did you mean train?"),
    "a verb of nothing": (["xyz"], "xyz: is no verb; `mmfm --help` lists them"),
    "no configuration": (["train"], "train: the following arguments are required: config; `mmfm train --help` tells more"),
    "a field before the configuration": (["train", "--train.steps", "3", "x.yaml"], "required: config"),
    "no run": (["train", str(DEMO)], "train: give the folder of the run, such as --run runs/demo"),
    "no file": (["train", "nowhere.yaml"], "nowhere.yaml: there is no such file; give the path of an experiment in YAML"),
    "a folder": (["train", "."], ".: cannot be read: Is a directory"),
    "a file in a file": (["train", f"{DEMO}/x"], "cannot be read: Not a directory"),
    "a name that is too long": (["train", "x" * 300], "cannot be read: File name too long"),
    "a store that is not there": (["train", str(DEMO), "--run", "no/run", "--data.store", "nowhere"], "nowhere: there is no store here"),
    "a run under a file": (["train", str(DEMO), "--run", f"{DEMO}/run"], "demo.yaml/run: cannot be made, since"),
    "a run that is a file": (["train", str(DEMO), "--run", str(DEMO)], "cannot be made, since"),
    "a run among other files": (["train", str(DEMO), "--run", str(DEMO.parent)], "holds files but no run"),
    "a run whose name is too long": (["train", str(DEMO), "--run", "x" * 300], "cannot be used: File name too long"),
    "nothing to evaluate": (["evaluate", "nowhere"], "nowhere: is not a run (it has no config.yaml)"),
    "an option of nothing": (["evaluate", "nowhere", "--fast"], "unrecognized arguments: --fast"),
    "a plan of nothing": (["plan", "nowhere.yaml", "--topology", "v5e:4x4"], "nowhere.yaml: there is no such file"),
    "a pod that is not given": (["plan", str(DEMO)], "plan: give the pod to compile for"),
    "a pod that is not known": (["plan", str(DEMO), "--topology", "v5e:9x9"], "--topology v5e:9x9: is not known; known are"),
    "no price": (["plan", str(DEMO), "--price", "nan"], "argument --price: nan is not a number above 0"),
    "half a slice": (["plan", str(DEMO), "--slices", "half"], "argument --slices"),
    "a field of the plan misspelt": (["plan", str(DEMO), "--trian.steps", "3"], "--trian: is not a known field"),
    "a bench of nothing": (["bench", "speed"], "invalid choice: 'speed'"),
    "turns below one": (["bench", "train", "--rounds", "0"], "argument --rounds: 0 is not a number above 0"),
    "a bench of a wrong field": (["bench", "data", str(DEMO), "--trian.steps", "3"], "--trian: is not a known field"),
    "infinite memory": (["ingest", "x.yaml", "--out", "y", "--memory", "inf"], "argument --memory: inf is not a number above 0"),
    "a sample that is not known": (["sample", "mnist", "--out", "x"], "invalid choice: 'mnist'"),
}  # fmt: skip


def told(words: list[str], capsys) -> str:
    """The one sentence on the screen."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and not printed.out
    assert printed.err.count("\n") == 1 and printed.err.startswith("mmfm: ")
    for address in ("Traceback", "[type=", "pydantic", "tuple[", "function-", "Input should", NAME):
        assert address not in printed.err
    return printed.err


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("what", FILES)
def test_a_mistake_in_a_file_is_told_in_a_sentence(what, capsys):
    text, sentence = FILES[what]
    Path("own.yaml").write_text(text)
    said = told(["train", "own.yaml"], capsys)
    assert said.startswith("mmfm: own.yaml: ") and sentence in said


@pytest.mark.parametrize("what", BYTES)
def test_a_file_that_is_no_text_is_told_in_a_sentence(what, capsys):
    held, sentence = BYTES[what]
    Path("own.yaml").write_bytes(held)
    assert f"own.yaml: {sentence}" in told(["train", "own.yaml"], capsys)


@pytest.mark.parametrize("what", FLAGS)
def test_a_mistake_in_a_field_of_the_command_line_is_told_in_a_sentence(what, capsys):
    words, sentence = FLAGS[what]
    Path("own.yaml").write_text(BASE)
    assert sentence in told(["train", "own.yaml", *words], capsys)


@pytest.mark.parametrize("what", WORDS)
def test_a_mistake_in_words_is_told_in_a_sentence(what, capsys):
    words, sentence = WORDS[what]
    assert sentence in told(words, capsys)


@pytest.mark.parametrize(
    "words, path, value",
    [
        (["--train.steps", "500"], "train.steps", 500),
        (["--train.steps=500"], "train.steps", 500),
        (["--train.batch-size", "32"], "train.batch_size", 32),
        (["--train.steps", "5", "--train.steps", "6"], "train.steps", 6),
        (["--seed", "3"], "seed", 3),
        (["--name", "5"], "name", "5"),
        (["--name", "yes: no"], "name", "yes: no"),
        (["--model.vision.gated", "true"], "model.vision.gated", True),
        (["--optimizer.learning_rate", "2e-4"], "optimizer.learning_rate", 2e-4),
        (["--mesh.data", "-1", "--mesh.fsdp", "1"], "mesh.data", -1),
        (["--inputs.images.ct.size", "4", "16", "16"], "inputs.images.ct.size", (4, 16, 16)),
        (["--inputs.images.ct.size", "[4, 16, 16]"], "inputs.images.ct.size", (4, 16, 16)),
        (["--inputs.images.ct.window.0", "-1000"], "inputs.images.ct.window", (-1000.0, 255.0)),
        (["--inputs.images.ct.foreground.share", "0.5"], "inputs.images.ct.foreground.share", 0.5),
        (["--inputs.texts.history.length", "8"], "inputs.texts.history.length", 8),
        (["--inputs.columns.1", "weight"], "inputs.columns", ("age", "weight")),
        (["--optimizer.groups.0.frozen", "False"], "optimizer.groups.0.frozen", False),
        (["--optimizer.groups.1.match", "model.*"], "optimizer.groups.1.match", "model.*"),
        (["--model.vision.wavelengths_mm.1", "512"], "model.vision.wavelengths_mm", (4.0, 512.0)),
        (["--evaluate.recall_at.0", "2"], "evaluate.recall_at", (2, 5, 10)),
        (["--data.store", "", "--data.mix.a.store", "s3://a"], "data.mix.a.store", "s3://a"),
        (["--tasks.again.kind", "masked", "--tasks.again.weights.text", "2"], "tasks.again.weights.text", 2.0),
        (["--train.profile.start", "3"], "train.profile.steps", 3),
        (["--train.profile", "{start: 3, steps: 2}"], "train.profile.steps", 2),
        (["--checkpoint.best", "null"], "checkpoint.best", None),
        (["--checkpoint.best", "None"], "checkpoint.best", None),
        (["--inputs.images.ct.window", "null", "--inputs.images.ct.normalise.percentiles", "1", "99"],
         "inputs.images.ct.normalise.percentiles", (1.0, 99.0)),
    ],
)  # fmt: skip
def test_any_field_can_be_set_on_the_command_line(words, path, value):
    Path("own.yaml").write_text(BASE)
    found = load_experiment("own.yaml", words)
    for part in path.split("."):
        held = found
        found = (
            held[part]
            if isinstance(held, dict)
            else held[int(part)]
            if isinstance(held, tuple)
            else getattr(held, part)
        )
    assert found == value and type(found) is type(value)


def test_help_lists_every_field_of_the_schema(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", str(DEMO), "--help"])
    printed = capsys.readouterr().out
    schema = experiment_type().model_json_schema()
    for part in [schema, *schema["$defs"].values()]:
        for name, field in part.get("properties", {}).items():
            assert f".{name}" in printed or f"--{name}" in printed or f"{name}:" in printed, name
            text = " ".join(field.get("description", "").split())
            leaf = "$ref" not in json.dumps(field)
            assert not leaf or (text and text in " ".join(printed.split())), name
    assert ended.value.code == 0 and "--train.batch_size  a whole number above 0; required" in printed
    assert "--optimizer.b2  a number of 0 or more and below 1; default 0.95" in printed
    assert "tasks.NAME, kind: caption:" in printed


def test_mistakes_and_help_are_told_without_jax():
    lines = [["train", str(DEMO), "--run", "run"], ["train", str(DEMO), "--help"], ["train", str(DEMO), "--x.y", "1"],
             ["evaluate", "run"], ["plan", str(DEMO), "--topology", "x"], ["bench", "data", str(DEMO), "--x", "1"],
             ["--version"], ["schema"]]  # fmt: skip
    code = (
        "import contextlib, json, sys\n"
        "from mmfm_jax.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    with contextlib.suppress(SystemExit): main(words)\n"
        "    assert not {'jax', 'flax', 'orbax'} & set(sys.modules), words\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(lines)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("mmfm: ") == 5, done.stderr


def test_the_version_names_what_a_report_of_a_fault_needs(capsys):
    import platform

    import jax

    import mmfm_jax

    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    printed = capsys.readouterr().out
    versions = f"mmfm_jax {mmfm_jax.__version__}, jax {jax.__version__}, python {platform.python_version()}\n"
    assert ended.value.code == 0 and printed == versions


@pytest.mark.parametrize("field, flags", [("data.store", []), ("data.tokenizer", ["--data.tokenizer", "nowhere"])])
def test_a_run_holds_the_place_of_its_data_wherever_it_goes_on(field, flags, tmp_path, monkeypatch):
    Path("own.yaml").write_text(BASE)
    Path("run.yaml").write_text(to_yaml(load_experiment("own.yaml", flags)))
    Path("deeper").mkdir()
    monkeypatch.chdir("deeper")
    again = load_experiment("../run.yaml")
    assert getattr(again.data, field.partition(".")[2]) == str(tmp_path / "nowhere")


@pytest.mark.parametrize("place", ["gs://bucket/store", "file:///data/store", "memory://x/", "/data/store"])
def test_a_url_or_a_whole_path_stays_as_it_is(place):
    Path("own.yaml").write_text(BASE)
    assert load_experiment("own.yaml", ["--data.store", place]).data.store == place


@pytest.mark.parametrize(
    "text", ["1e3", "-1E-5", "012", "1:30", "2026-01-01", "yes", "null", "0x1F", ".inf", "1_000", "~", ""]
)
def test_a_text_that_looks_like_something_else_stays_one(text):
    assert parse(dump({"a": text, "b": [text]}), "x") == {"a": text, "b": [text]}


@pytest.mark.parametrize(
    "text, value",
    [("1e-3", 1e-3), ("1.5E+3", 1500.0), ("-2", -2), ("1_000", 1000), ("0x1F", 31), (".5", 0.5), ("3.", 3.0)],
)
def test_numbers_are_those_of_yaml_1_2(text, value):
    found = parse(f"a: {text}", "x")["a"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["012", "1:30", "2026-01-01", "2026-01-01 10:00:00"])
def test_what_older_yaml_makes_numbers_and_dates_of_stays_as_it_was_written(text):
    assert parse(f"a: {text}", "x") == {"a": text} and not isinstance(yaml.safe_load(f"a: {text}")["a"], str)


def test_aliases_and_merged_mappings_are_read():
    text = "a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, y: 3}\n"
    assert parse(text, "x") == yaml.safe_load(text)


def test_a_folder_of_leftovers_may_become_a_run_and_one_that_may_not_be_written_to_cannot(tmp_path, monkeypatch):
    run = tmp_path / "run"
    check_free(run / "deeper")
    run.mkdir()
    (run / "tokenizer.json").write_text("{}")
    check_free(run)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match=r"cannot be made, since .* may not be written to"):
        check_free(run / "deeper")


def test_what_is_called_before_an_activity_is_called_when_it_begins():
    calls = []
    clock = Clock(before={"compile": lambda: calls.append(clock.activity)})
    with clock("store"):
        pass
    assert calls == []
    with clock("compile"):
        assert calls == ["other"]
