"""A task is one file: written, trained, evaluated and reported with no other edit."""

import functools
import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from mmfm_jax import tasks
from mmfm_jax.evaluate.evaluate import evaluate
from mmfm_jax.tasks.base import Task
from mmfm_jax.train.loop import train

BRIGHTNESS = '''
"""Brightness of an image, predicted from the other modalities of the study."""

import functools
from typing import Literal

import jax.numpy as jnp
import numpy as np

from mmfm_jax.losses.mean import Mean
from mmfm_jax.metrics.findings import Findings, Forest
from mmfm_jax.metrics.statistics import weighted_mean
from mmfm_jax.model.layers import Linear
from mmfm_jax.tasks.base import Losses, Needs, Task, TaskConfig


class BrightnessConfig(TaskConfig):
    """Squared error of the mean of the windowed voxels of a role."""

    kind: Literal["brightness"] = "brightness"
    role: str

    def needs(self):
        return Needs(modalities={"role": ("image",)})


class Brightness(Task):
    Config = BrightnessConfig

    def __init__(self, name, config, model, spec, rngs):
        super().__init__(name, config, model, spec, rngs)
        self.head = Linear(model.fusion.width, 1, ("width", None), rngs, bias=True)

    def answer(self, views):
        """Predicted and true brightness of each study, and whether it has the image."""
        image = views.batch.images[self.config.role]
        predicted = self.head(views.fused({"image"}).astype(jnp.float32).mean(axis=1))[:, 0]
        return predicted, image.voxels.mean(axis=(1, 2, 3, 4)), image.present

    def loss(self, views, keys):
        predicted, true, present = self.answer(views)
        return Losses({"loss": Mean.over(jnp.square(predicted - true), present)})

    def predict(self, views):
        return dict(zip(("predicted", "true", "present"), self.answer(views)))

    def measure(self, held_out):
        of = held_out.predicted
        error = np.abs(of["predicted"] - of["true"])[of["present"]]
        patients = held_out.test.patients[of["present"]]
        found = {f"{self.name}/absolute_error": held_out.bootstrap(functools.partial(weighted_mean, error), patients)}
        return Findings(found, (Forest("How bright", "Mean absolute error.", "grey level", found),))
'''


def test_a_file_of_under_60_lines_is_a_task_from_training_to_the_report(make_experiment, tmp_path, monkeypatch):
    assert len(BRIGHTNESS.strip().splitlines()) < 60
    (tmp_path / "brightness.py").write_text(BRIGHTNESS)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    monkeypatch.setattr(tasks, "_import_all", functools.cache(tasks._import_all.__wrapped__))
    try:
        experiment = make_experiment(
            {
                "tasks": {"shine": {"kind": "brightness", "role": "ct"}},
                "train.steps": 2,
                "train.validate_every": 2,
                "evaluate": {"bootstrap": 20},
                "model.vision.depth": 1,
                "model.text.depth": 1,
            }
        )
        run, printed = tmp_path / "run", Console(file=io.StringIO(), width=200)
        assert train(experiment, run, printed).step == 2
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert any("shine/loss" in line for line in lines) and any("validation/shine/loss" in line for line in lines)
        evaluate(run, printed)
        found = json.loads((run / "evaluation.json").read_text())["shine/absolute_error"]
        assert 0 < found["low"] <= found["value"] <= found["high"] < 3 and found["n"] > 10
        page = Path(run / "report.html").read_text()
        assert "<h2>How bright</h2>" in page and "shine/absolute_error" in page
    finally:
        Task.kinds.pop("brightness", None)
        sys.modules.pop("mmfm_jax.tasks.brightness", None)


@pytest.mark.parametrize("kind", sorted(tasks.task_types()))
def test_every_task_is_documented_where_a_user_configures_it(kind):
    config = tasks.task_types()[kind].Config
    assert config.__doc__
    for name, field in config.model_fields.items():
        assert field.description or name in ("kind", "label", "field"), f"{kind}.{name}"
