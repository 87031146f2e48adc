"""All tasks together: what is absent cannot leak, encoders run once, and wrong configurations are named."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mmfm_jax import tasks
from mmfm_jax.data.feed.transforms import prepare
from mmfm_jax.errors import UserError
from mmfm_jax.losses.mean import mean_where
from mmfm_jax.model.multimodal import MultimodalModel
from mmfm_jax.tasks import task_types
from mmfm_jax.tasks.base import Task, Views
from mmfm_jax.tasks.classification import Classification, ClassificationConfig
from mmfm_jax.train.learner import Learner


@pytest.fixture(scope="module")
def learner(material):
    return Learner(material.experiment, material.spec, nnx.Rngs(params=0))


KEYS = jax.random.split(jax.random.key(0), (2, 16))
"""For the views and for the task, one a study."""


def spoil(batch, number, index):
    """The batch with `number` and `index` wherever something is absent."""

    def put(values, present, value):
        present = np.asarray(present).reshape(present.shape + (1,) * (np.ndim(values) - np.ndim(present)))
        return np.where(present, values, np.asarray(value, np.asarray(values).dtype))

    images = {
        role: dataclasses.replace(
            part,
            voxels=put(part.voxels.astype(np.float32), part.present, number),
            spacing_mm=put(part.spacing_mm, part.present, number),
        )
        for role, part in batch.images.items()
    }
    texts = {
        field: dataclasses.replace(part, tokens=put(part.tokens, part.present, index))
        for field, part in batch.texts.items()
    }
    table = dataclasses.replace(
        batch.table,
        numbers=put(batch.table.numbers, batch.table.number_present, number),
        categories=put(batch.table.categories, batch.table.category_present, index),
    )
    labels = {
        name: dataclasses.replace(part, value=put(part.value, part.present, index))
        for name, part in batch.labels.items()
    }
    return dataclasses.replace(batch, images=images, texts=texts, table=table, labels=labels)


@pytest.mark.parametrize("task", ["image_text", "image_table", "masked", "disease", "caption", "numbers"])
def test_what_stands_in_absent_parts_changes_neither_loss_nor_gradient(task, material, learner):
    graph, state = nnx.split(learner)

    @jax.jit
    def gradient(state, batch):
        def loss(state):
            learner = nnx.merge(graph, state)
            views = Views(learner.model, prepare(batch, material.spec, None, None), KEYS[0], True, 0.3)
            parts = learner.tasks[task].loss(views, KEYS[1]).parts
            return learner.objective({task: parts})

        return jax.value_and_grad(loss)(state)

    clean = spoil(material.batch, 0.0, 0)
    absent = sum(int((~part.present).sum()) for part in [*clean.images.values(), *clean.texts.values()])
    assert absent > 0 and (~clean.table.number_present).any() and (~clean.labels["disease"].present).any()
    expected = gradient(state, clean)
    assert np.isfinite(expected[0]) and float(optax.tree.norm(expected[1])) > 0
    for number, index in ((np.nan, 2**30), (1e30, -5)):
        got = gradient(state, spoil(material.batch, number, index))
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_the_loss_is_the_weighted_sum_of_the_tasks(make_experiment, material):
    experiment = make_experiment({"tasks.masked.weight": 0.25, "tasks.disease.weight": 3.0})
    learner = Learner(experiment, material.spec, nnx.Rngs(params=0))
    loss, metrics = learner.loss(prepare(material.batch, material.spec, None, None), jax.random.key(0), train=False)
    expected = sum(task.weight * metrics[f"{name}/loss"] for name, task in experiment.tasks.items())
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_tasks_share_one_encoding_of_the_whole_batch(material, learner, monkeypatch):
    calls = []
    encode = MultimodalModel.encode
    monkeypatch.setattr(
        MultimodalModel, "encode", lambda self, *args, **keys: calls.append(args) or encode(self, *args, **keys)
    )
    learner.loss(prepare(material.batch, material.spec, None, None), jax.random.key(0), train=True)
    assert sorted(map(len, calls)) == [1, 3]  # the whole view, and the one with parts hidden


def test_classification_ignores_studies_without_the_label(material, learner):
    batch = prepare(material.batch, material.spec, None, None)
    views = Views(learner.model, batch)
    task = learner.tasks["disease"]
    found = task.loss(views, KEYS[0])
    known = np.asarray(batch.labels["disease"].present)
    logits, label = (
        np.asarray(task.logits(views.latents), np.float64)[known],
        np.asarray(batch.labels["disease"].value)[known],
    )
    log_probability = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(
        found.parts["loss"].value, -log_probability[np.arange(len(label)), label].mean(), rtol=1e-5
    )
    np.testing.assert_allclose(found.metrics["accuracy"].value, (logits.argmax(1) == label).mean(), rtol=1e-6)


def test_a_mean_over_nothing_is_zero_and_has_no_gradient():
    value, slope = jax.value_and_grad(lambda x: mean_where(x, jnp.zeros(3, bool)))(jnp.full(3, jnp.nan))
    assert value == 0 and not np.asarray(slope).any()


QUESTION = {"label": "disease", "positive": ["large"], "negative": ["small"]}


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("tasks.disease.label", "grade", "tasks.disease.label: the store has no label grade; it has disease"),
        (
            "tasks.caption",
            {"kind": "caption", "field": "history", "decoder": {"width": 16, "depth": 1, "heads": 2}},
            "tasks.caption.field: the inputs hold no text history; they hold report",
        ),
        ("tasks.image_text.between", ["image", "image"], "between names image twice"),
        ("tasks.disease.without", ["image", "text", "table"], "tasks.disease.without: leaves the head none"),
        (
            "tasks.image_text.zero_shot.q",
            QUESTION | {"label": "x"},
            "image_text.zero_shot.q.label: x is not a label",
        ),
        ("tasks.image_text.zero_shot.q", QUESTION | {"negative": []}, "zero_shot.q.negative"),
        ("tasks.image_table.zero_shot.q", QUESTION, "zero_shot compares images with prompts"),
        ("evaluate.zero_shot", {"q": QUESTION}, "move it to tasks.NAME.zero_shot"),
        (
            "tasks.image_text.between",
            ["image", "video"],
            "tasks.image_text.between: is a list of 2; give two words among",
        ),
        ("tasks.image_text.kind", "contrastiv", "tasks.image_text"),
    ],
)
def test_wrong_task_configurations_are_named(make_experiment, material, field, value, said):
    with pytest.raises(UserError) as error:
        Learner(make_experiment({field: value}), material.spec, nnx.Rngs(params=0))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_every_file_of_tasks_gives_tasks_with_kinds_of_their_own():
    files = {path.stem for path in Path(tasks.__file__).parent.glob("*.py")} - {"__init__", "base"}
    assert {cls.__module__.rpartition(".")[2] for cls in task_types().values()} >= files
    for kind, cls in task_types().items():
        assert cls.Config.model_fields["kind"].default == kind


def test_a_task_may_inherit_from_a_task_and_from_a_shared_base():
    class OtherConfig(ClassificationConfig):
        kind: Literal["other"] = "other"  # pyright: ignore[reportIncompatibleVariableOverride]

    class Base(Task):
        """Without a Config: no task."""

    try:

        class Other(Classification):
            Config = OtherConfig

        assert task_types()["other"] is Other and Base not in task_types().values()
        with pytest.raises(TypeError, match="Nameless: has no Config with a kind of its own"):

            class Nameless(Classification):
                pass

        with pytest.raises(TypeError, match=r"Twice.*: the kind other is that of .*Other; give it another"):

            class Twice(Base):
                Config = OtherConfig

    finally:
        Task.kinds.pop("other", None)
