"""The training step against plain optax, and its guards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mmfm_jax.config.training import CheckpointConfig, MeshConfig, OptimizerConfig
from mmfm_jax.data.feed.transforms import prepare
from mmfm_jax.parallel import sharding
from mmfm_jax.parallel.mesh import make_mesh
from mmfm_jax.plan.lower import make_program
from mmfm_jax.train.checkpoint import Checkpoints
from mmfm_jax.train.flops import model_flops
from mmfm_jax.train.groups import names
from mmfm_jax.train.optimizer import make_optimizer, schedule
from mmfm_jax.train.state import initial_state, learner_shapes
from mmfm_jax.train.step import checksum, make_step, split

CAPTION = {"kind": "caption", "field": "report", "decoder": {"width": 16, "depth": 1, "heads": 2}}


def build(experiment, spec):
    optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
    graph, *_ = learner_shapes(experiment, spec)
    state = jax.jit(lambda: initial_state(experiment, spec, optimizer))()
    return graph, state, jax.jit(make_step(graph, experiment, spec, optimizer))


ONE_TASK = {
    "tasks": {"disease": {"kind": "classification", "label": "disease"}},
    "data.augment": {"flip": 0.0},
    "model.fusion.drop": 0.0,
}


@pytest.fixture(scope="module")
def simple(make_experiment, material):
    experiment = make_experiment({**ONE_TASK, "train.ema_decay": 0.9, "train.max_skipped": 3})
    return experiment, *build(experiment, material.spec)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_program_of_48_layers_is_as_long_as_that_of_12(make_experiment, material, remat):
    def lines(depth: int) -> int:
        deep = {f"model.{name}.depth": depth for name in ("vision", "text", "fusion")}
        kept = {f"model.{name}.remat": remat for name in ("vision", "text", "fusion")}
        experiment = make_experiment({**ONE_TASK, **deep, **kept})
        program = make_program(experiment, material.spec, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
        with jax.set_mesh(program.mesh):
            return program.step.lower(program.state, program.batch).as_text().count("\n")

    assert lines(48) == lines(12) > 1000


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_a_step_is_clipped_adamw_on_the_gradient_of_the_loss(simple, material):
    experiment, graph, state, step = simple
    config = experiment.optimizer

    def loss(params):
        batch = prepare(material.batch, material.spec, None, None)
        return nnx.merge(graph, params).loss(batch, jax.random.key(0), train=False)[0]

    def kernels(params):
        return jax.tree.unflatten(jax.tree.structure(params), [name.endswith(".kernel") for name in names(params)])

    value, gradient = jax.jit(jax.value_and_grad(loss))(state.params)
    plain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config, experiment.train.steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=kernels,
        ),
    )
    updates, _ = plain.update(gradient, plain.init(state.params), state.params)
    expected = optax.apply_updates(state.params, updates)
    following, metrics = step(state, material.batch)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert_trees_close(following.params, expected, atol=2e-6)
    norm = np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-4)
    moved = [float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (state.params, expected)))]
    assert np.mean(np.array(moved) > 0) > 0.9


def test_the_average_follows_the_parameters(simple, material):
    _, _, state, step = simple
    expected = jax.tree.map(np.asarray, state.params)
    for update in range(3):
        state, _ = step(state, material.batch)
        decay = min(0.9, (1 + update) / (10 + update))
        expected = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * np.asarray(p), expected, state.params)
    assert_trees_close(state.average, expected, atol=1e-6)


def test_a_non_finite_gradient_is_skipped_and_counted(simple, material):
    _, _, state, step = simple
    poisoned = dataclasses.replace(state, params=jax.tree.map(lambda x: x.at[...].set(jnp.nan), state.params))
    skipped, metrics = step(poisoned, material.batch)
    skipped, metrics = step(skipped, material.batch)
    assert (int(skipped.step), int(skipped.skipped), int(metrics["skipped_in_a_row"])) == (2, 2, 2)
    for name in ("optimizer", "average"):
        jax.tree.map(np.testing.assert_array_equal, getattr(skipped, name), getattr(poisoned, name))
    np.testing.assert_allclose(metrics["learning_rate"], schedule_at(simple, 0))
    healed, metrics = step(dataclasses.replace(skipped, params=state.params), material.batch)
    assert (int(healed.step), int(healed.skipped), int(healed.skipped_in_a_row)) == (3, 2, 0)
    assert np.isfinite(metrics["loss"])


def schedule_at(simple, step):
    return schedule(simple[0].optimizer, simple[0].train.steps)(step)


def uneven(batch):
    """The batch with what it holds dealt unevenly over parts of it: part i of n takes every row that is i modulo n."""
    rows = np.arange(len(batch.study))
    label, image, text = batch.labels["disease"], batch.images["ct"], batch.texts["report"]
    return dataclasses.replace(
        batch,
        labels={"disease": dataclasses.replace(label, present=label.present & (rows % 4 == 1))},
        images={"ct": dataclasses.replace(image, present=image.present & (rows % 4 < 2))},
        texts={"report": dataclasses.replace(text, present=text.present & ((rows % 4 == 2) | (rows < 4)))},
    )


DENSE = {
    "tasks": {
        "disease": {"kind": "classification", "label": "disease"},
        "masked": {"kind": "masked", "depth": 1, "weights": {"text": 0.5}},
        "caption": CAPTION,
        "numbers": {"kind": "image_numbers"},
    },
    "data.augment": {"flip": 0.0},
    "model.text.depth": 1,
    "optimizer.clip_norm": 1e9,
    **{f"model.{stack}.dropout": 0.1 for stack in ("vision", "fusion")},
    "model.vision.drop_path": 0.3,
    "model.vision.layer_scale": 0.5,
}


def test_parts_mesh_and_missing_modalities_never_change_the_objective(make_experiment, material):
    """Of accumulate 1 and 4 on one device and 2 on two, with labels, images and texts that lie unevenly; what is
    hidden and dropped is drawn too, of a step always the same."""
    batch, results = uneven(material.batch), {}
    for parts, devices in ((1, 1), (4, 1), (2, 2)):
        experiment = make_experiment(DENSE | {"train.accumulate": parts})
        mesh = make_mesh(MeshConfig(fsdp=devices), jax.devices()[:devices])
        program = make_program(experiment, material.spec, mesh, {"ct": "uint8"})
        optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
        places = jax.tree.map(lambda leaf: leaf.sharding, program.state)
        with jax.set_mesh(mesh):
            begin = jax.jit(lambda e=experiment, o=optimizer: initial_state(e, material.spec, o), out_shardings=places)
            placed = jax.device_put(batch, sharding.by_study(mesh))
            following, metrics = program.step(begin(), placed)
            if devices == 1:
                again, _ = program.step(begin(), placed)
                assert bits(again) == bits(following)
                start = begin()
                later = dataclasses.replace(start, step=jnp.full_like(start.step, 5))
                other = program.step(later, placed)[1]["caption/loss"]  # of which nothing but the noise is drawn
                assert abs(other - metrics["caption/loss"]) > 1e-4
        results[parts, devices] = jax.device_get((following.optimizer[1].mu, metrics))
    moments, expected = results.pop((1, 1))
    assert float(optax.tree.norm(moments)) > 1e-3
    for case, (got, metrics) in results.items():
        for name in expected:
            np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=f"{case} {name}")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-6), got, moments)


def test_counting_what_a_batch_holds_costs_no_products(make_experiment, material):
    """Parts are counted before they are learnt from; all but the counting falls away when it is compiled."""

    def products(parts: int) -> int:
        experiment = make_experiment({**ONE_TASK, "train.accumulate": parts})
        _, state, step = build(experiment, material.spec)
        return str(step.lower(state, material.batch).compile().as_text()).count(" dot(")

    assert products(2) == products(1) > 50


def test_parts_of_a_batch_hold_every_study_once(material):
    parts, _ = split(material.batch, jax.random.split(jax.random.key(0), 16), 4)
    np.testing.assert_array_equal(parts.study, material.batch.study.reshape(4, 4).T)
    assert parts.images["ct"].voxels.shape == (4, 4, *material.batch.images["ct"].voxels.shape[1:])


def test_the_checksum_sees_every_value_and_its_place(material):
    batch = material.batch
    same = int(checksum(jax.tree.map(jnp.asarray, batch)))
    assert same == int(jax.jit(checksum)(batch))
    rng = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten(batch)
    for number, leaf in enumerate(leaves):
        if leaf.size:
            changed = leaf.copy()
            at = tuple(int(rng.integers(size)) for size in leaf.shape)
            changed[at] = ~changed[at] if leaf.dtype == bool else changed[at] + 1
            assert int(checksum(structure.unflatten([*leaves[:number], changed, *leaves[number + 1 :]]))) != same
    turned = jax.tree.map(lambda leaf: leaf[::-1], batch)
    assert int(checksum(turned)) != same


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_learning_rate_rises_to_its_peak_and_falls_to_its_end(kind):
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=10, schedule=kind, final_fraction=0.1, decay_fraction=0.3)
    rate = np.array([schedule(config, 100)(step) for step in range(101)])
    assert (np.diff(rate[:11]) > 0).all() and rate[0] > 0
    np.testing.assert_allclose([rate[10], rate[100]], [0.5, 0.05], rtol=1e-5)
    if kind == "cosine":
        middle = 0.5 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * np.arange(91) / 90)))
        np.testing.assert_allclose(rate[10:], middle, rtol=1e-5)
    else:
        np.testing.assert_allclose(rate[10:71], 0.5)
        np.testing.assert_allclose(rate[70:], np.linspace(0.5, 0.05, 31), rtol=1e-5)


GROUPED = {
    **ONE_TASK,
    "train.ema_decay": 0.9,
    "optimizer.kind": "muon",
    "optimizer.state_dtype": "bfloat16",
    "optimizer.weight_decay": 0.5,
    "optimizer.groups": [
        {"match": "model.vision.*", "frozen": True},
        {"match": "model.text.*", "learning_rate_scale": 0.1, "layer_decay": 0.75},
    ],
}


@pytest.fixture(scope="module")
def grouped(make_experiment, material):
    experiment = make_experiment(GROUPED)
    return experiment, *build(experiment, material.spec)


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_frozen_parameters_keep_every_bit_and_have_no_optimizer_state(grouped, material):
    _, _, start, step = grouped
    state = start
    for _ in range(2):
        state, _ = step(state, material.batch)
    moved = 0
    rows = zip(names(start.params), *map(bits, (start.params, state.params, state.average)))
    for name, before, after, average in rows:
        if name.startswith("model.vision."):
            assert before == after == average, name
        else:
            moved += before != after
    assert moved > 30
    states = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.optimizer)}
    assert any("['text']" in path for path in states) and not any("['vision']" in path for path in states)


def test_the_clipped_norm_is_that_of_the_trained_parameters(grouped, material):
    _, graph, state, step = grouped

    def loss(params):
        batch = prepare(material.batch, material.spec, None, None)
        return nnx.merge(graph, params).loss(batch, jax.random.key(0), train=False)[0]

    gradient = jax.jit(jax.grad(loss))(state.params)
    squares = [np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(gradient)]
    trained = [s for name, s in zip(names(gradient), squares) if not name.startswith("model.vision.")]
    assert sum(trained) < 0.999 * sum(squares)
    _, metrics = step(state, material.batch)
    np.testing.assert_allclose(metrics["gradient_norm"], np.sqrt(sum(trained)), rtol=1e-4)


def test_no_gradient_is_computed_of_a_frozen_model(make_experiment, material):
    """The forward pass alone remains, but for the head: two products of three are spared."""

    def flops(match: str | None) -> float:
        groups = [{"match": match, "frozen": True}] if match else []
        experiment = make_experiment({**ONE_TASK, "optimizer.groups": groups})
        optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
        graph, *_ = learner_shapes(experiment, material.spec)
        state = jax.eval_shape(lambda: initial_state(experiment, material.spec, optimizer))
        return model_flops(make_step(graph, experiment, material.spec, optimizer), state, material.batch)

    whole, frozen = flops(None), flops("model.*")
    assert whole / 3 < 1.02 * frozen < 1.1 * whole / 3


def test_a_restored_state_of_muon_groups_and_bfloat16_goes_on_bitwise(grouped, material, tmp_path):
    experiment, _, state, step = grouped
    state, _ = step(state, material.batch)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(best=None))
    checkpoints.save(1, state, {})
    checkpoints.wait()
    optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
    shapes = jax.eval_shape(lambda: initial_state(experiment, material.spec, optimizer))
    restored = checkpoints.restore(1, shapes, None)
    checkpoints.close()
    assert {leaf.dtype for leaf in jax.tree.leaves(restored.optimizer)} >= {jnp.dtype("bfloat16"), jnp.dtype("float32")}
    assert bits(restored) == bits(state)
    assert bits(step(restored, material.batch)) == bits(step(state, material.batch))
