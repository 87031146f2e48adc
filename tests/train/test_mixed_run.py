"""A run on a mix of stores meets each by its weight, and goes on from a checkpoint as if it had never stopped."""

import json
import shutil
from typing import Any

from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.order import training_rows
from mmfm_jax.data.store.mix import open_data
from mmfm_jax.experiment import Experiment
from mmfm_jax.train import folder
from mmfm_jax.train.loop import train


def logged(run) -> dict[int, tuple]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["batch_checksum"], line["loss"]) for line in lines if "loss" in line}


def mixed(make_experiment, stores: dict[str, str]) -> Experiment:
    changes = {
        "data.store": "",
        "data.mix": {
            "near": {"store": stores["near"], "weight": 3},
            "far": {"store": stores["far"], "images": {"ct": {"window": [0, 99]}}, "augment": {"flip": 0.0}},
        },
        "tasks": {"disease": {"kind": "classification", "label": "disease"}},
        "inputs.texts": {},
        "mesh": {"data": 8},
        "train": {"steps": 4, "batch_size": 16, "log_every": 1, "validate_every": 100},
        "checkpoint.every": 2,
    }
    return make_experiment(changes)


def test_a_mixed_run_trains_and_resumes_bitwise(make_experiment, make_small_store, tmp_path):
    experiment = mixed(make_experiment, {"near": make_small_store(40), "far": make_small_store(24)})
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(experiment, whole).step == 4
    shutil.copytree(whole, stopped)
    shutil.rmtree(next(path for path in (stopped / "checkpoints").iterdir() if path.name.endswith("4")))
    (stopped / "metrics.jsonl").write_text("")
    assert train(experiment, stopped).step == 4
    assert sorted(logged(stopped)) == [3, 4]
    assert logged(stopped) == {step: of for step, of in logged(whole).items() if step > 2}

    _, spec, tokenizer = folder.read(whole)
    store: Any = open_data(experiment.data)
    order: Any = training_rows(Samples(store, experiment.inputs, spec, tokenizer), "train", experiment.seed)
    of = [store.stores[store.source(order[i].row)].url for i in range(64)]
    assert of.count(experiment.data.mix["near"].store) == 48
