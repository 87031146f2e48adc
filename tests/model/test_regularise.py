"""Dropout, stochastic depth and LayerScale beside what blocks and NumPy give by hand."""

import itertools
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmfm_jax.config.model import TransformerConfig
from mmfm_jax.data.feed.transforms import prepare
from mmfm_jax.model.flash import ALL
from mmfm_jax.model.regularise import Noise, dropped, noise_of
from mmfm_jax.model.transformer import Transformer
from mmfm_jax.tasks.base import Views
from mmfm_jax.train.learner import Learner

MANY, WIDTH = 4000, 16
SIZE: dict[str, Any] = {"width": WIDTH, "depth": 2, "heads": 2}


def stack_of(**options) -> Any:
    return Transformer(TransformerConfig(**SIZE | options), nnx.Rngs(params=0))


def noise(keys, tokens, segment=None, **options) -> Noise:
    return noise_of(keys, segment, tokens, TransformerConfig(**SIZE | options))


def test_stochastic_depth_rises_linearly_with_the_block_and_keeps_the_expectation():
    of, ones = (
        noise(jax.random.split(jax.random.key(0), MANY), (MANY, 2), depth=4, drop_path=0.6),
        jnp.ones((MANY, 2, 3)),
    )
    np.testing.assert_array_equal(of(0, 1, ones), ones)
    drawn = {}
    for block, rate in enumerate(np.linspace(0, 0.6, 4)):
        for branch in range(3):
            x = drawn[block, branch] = np.asarray(of(block, branch, ones))
            assert (x == x[:, :1, :1]).all()  # a study whole or not at all
            gone = x[:, 0, 0] == 0
            np.testing.assert_allclose(x[~gone], 1 / (1 - rate), rtol=1e-6)
            assert abs(gone.mean() - rate) < 4 * np.sqrt(0.25 / MANY)
            assert abs(x.mean() - 1) < 4 * np.sqrt(rate / (1 - rate) / MANY) + 1e-6
    for a, b in itertools.combinations([key for key in drawn if key[0]], 2):  # each drawn apart from the others
        together = np.corrcoef(*(drawn[key][:, 0, 0] for key in (a, b)))[0, 1]
        assert abs(together) < 4 / np.sqrt(MANY), (a, b)


def test_dropout_takes_its_share_of_every_feature_apart_and_keeps_the_expectation():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(MANY, 2, 3)), jnp.float32)
    of = noise(jax.random.split(jax.random.key(0), MANY), (MANY, 2), dropout=0.3)
    first, second = np.asarray(of(0, 1, x)), np.asarray(of(1, 1, x))
    gone = (first == 0).reshape(MANY, 6)
    np.testing.assert_allclose(first, np.where(first == 0, 0, x / np.float32(0.7)), rtol=1e-6)
    np.testing.assert_allclose(gone.mean(axis=0), 0.3, atol=4 * np.sqrt(0.21 / MANY))
    both = np.corrcoef(np.concatenate([gone, (second == 0).reshape(MANY, 6)], axis=1).T)
    assert np.abs(both - np.eye(12)).max() < 4.5 / np.sqrt(MANY)  # features, tokens and blocks are apart


def test_a_study_in_a_packed_row_has_the_noise_it_has_alone():
    """Its tokens may stand in pieces, as registers and patches do."""
    segment = np.array([[1, 2, 3, 1, 1, 2, 0, 0], [2, 3, 2, 2, 3, 3, 3, 0]], np.int32)
    keys, x = jax.random.split(jax.random.key(1), 6), jnp.ones((2, 8, WIDTH))
    both = {"dropout": 0.4, "drop_path": 0.4}
    packed = noise(keys, (2, 8), jnp.asarray(segment), **both)
    alone = noise(keys, (6, 8), **both)
    for branch in range(3):
        found, expected = np.asarray(packed(1, branch, x)), np.asarray(alone(1, branch, jnp.ones((6, 8, WIDTH))))
        for study in range(6):
            mine = found[study // 3][segment[study // 3] == 1 + study % 3]
            np.testing.assert_array_equal(mine, expected[study, : len(mine)])


def test_a_branch_is_passed_by_or_added_over_its_chance_to_be_kept():
    """Of the last of two blocks, by hand: each study has one of four."""
    stack, studies = stack_of(drop_path=0.5), 400
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, WIDTH)), jnp.float32)
    graph, layers = nnx.split(stack.blocks)
    first, last = (nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], layers)) for i in range(2))
    entered = first(x, ALL, None, None, ALL)
    expected = []
    for attends, feeds in itertools.product((0, 2), repeat=2):
        y = entered + attends * last.attend(last.attend_norm(entered))
        expected.append(stack.norm(y + feeds * last.mlp(last.mlp_norm(y)))[0])
    keys = jax.random.split(jax.random.key(0), studies)
    found = np.asarray(stack(jnp.repeat(x, studies, axis=0), keys=keys))
    fits = np.stack([np.isclose(found, one, atol=1e-4).all(axis=(1, 2)) for one in expected])
    assert (fits.sum(axis=0) == 1).all()
    np.testing.assert_allclose(fits.mean(axis=1), 0.25, atol=0.1)


def test_without_keys_or_without_chances_there_is_no_noise():
    x = jax.random.normal(jax.random.key(1), (4, 3, WIDTH))
    keys, plain = jax.random.split(jax.random.key(0), 4), stack_of()
    noisy = stack_of(dropout=0.2, drop_path=0.2)
    for same in (plain(x, keys=keys), noisy(x)):
        np.testing.assert_array_equal(same, plain(x))
    assert (np.abs(noisy(x, keys=keys) - plain(x)).max(axis=(1, 2)) > 1e-2).all()


def test_layer_scale_multiplies_each_feature_of_every_branch():
    x = jax.random.normal(jax.random.key(1), (2, 3, WIDTH))
    factors = np.random.default_rng(0).normal(size=(2, 3, WIDTH)).astype(np.float32)  # of branches and blocks
    options: Any = {"rngs": nnx.Rngs(params=0), "cross_attention": True}
    plain: Any = Transformer(TransformerConfig(**SIZE), **options)
    scaled: Any = Transformer(TransformerConfig(**SIZE, layer_scale=1e-4), **options | {"rngs": nnx.Rngs(params=0)})
    for i, (branch, last) in enumerate((("cross", "out"), ("attend", "out"), ("mlp", "down"))):
        scale, kernel = (
            getattr(scaled.blocks, f"{branch}_scale").scale,
            getattr(getattr(plain.blocks, branch), last).kernel,
        )
        np.testing.assert_array_equal(scale[...], np.full((2, WIDTH), np.float32(1e-4)))
        scale[...] = jnp.asarray(factors[:, i])
        kernel[...] = kernel[...] * factors[:, i, None, :]
    np.testing.assert_allclose(scaled(x, memory=x), plain(x, memory=x), atol=1e-5)


@pytest.fixture(scope="module")
def drawing(make_experiment, material):
    """The names and keys of all stacks that the tasks of a learner call, by a Transformer that only notes its keys."""
    chances = {"dropout": 0.1, "drop_path": 0.1}
    parts = {
        f"model.{stack}.{name}": c for stack in ("vision", "text", "table", "fusion") for name, c in chances.items()
    }
    caption = {"kind": "caption", "field": "report", "decoder": {"width": 16, "depth": 1, "heads": 2, **chances}}
    experiment = make_experiment({**parts, "tasks.caption": caption, "tasks.disease.dropout": 0.5})
    return Learner(experiment, material.spec, nnx.Rngs(params=0))


def stacks_called(learner, batch, monkeypatch, train: bool) -> dict[str, list]:
    names = {id(learner.model.fusion.transformer): "fusion"}
    names |= {id(getattr(learner.model, name).transformer): name for name in ("vision", "text", "table")}
    names |= {id(learner.tasks[name].decoder.transformer): name for name in ("masked", "caption")}
    calls = defaultdict(list)

    def note(self, x, *args, keys=None, **named):
        calls[names[id(self)]].append(None if keys is None else np.asarray(jax.random.key_data(keys)))
        return x

    monkeypatch.setattr(Transformer, "__call__", note)
    keys = jax.random.split(jax.random.key(0), len(batch.study))
    learner.sums(batch, keys, train=train)
    return calls


def test_in_training_every_stack_has_a_key_a_study_of_its_own_and_else_none(drawing, material, monkeypatch):
    """Whole, and as masked modelling shows it; the fusions of several views share theirs, its decoder has none. Of two
    texts side by side each has its own, and the one that a contrast reads apart."""
    batch = prepare(material.batch, material.spec, None, None)
    calls = stacks_called(drawing, batch, monkeypatch, train=True)
    assert {name: len(of) for name, of in calls.items() if name != "fusion"} == {
        "vision": 2, "text": 3, "table": 2, "masked": 1, "caption": 1,
    }  # fmt: skip
    assert calls.pop("masked") == [None]
    drawn = np.concatenate([keys for of in calls.values() for keys in of])
    apart = len(np.unique(drawn, axis=0)) / len(batch.study)
    assert apart == 2 + (2 + 1 + 1) + 2 + 1 + 2 and len(calls["fusion"]) > 2
    monkeypatch.undo()
    for of in stacks_called(drawing, batch, monkeypatch, train=False).values():
        assert of and all(keys is None for keys in of)


def test_dropout_before_the_head_is_of_its_inputs_and_of_training_alone(drawing, material):
    batch, task = prepare(material.batch, material.spec, None, None), drawing.tasks["disease"]
    latents, keys = jax.random.normal(jax.random.key(1), (16, 4, 16)), jax.random.split(jax.random.key(0), 16)
    entering = task.norm(latents.mean(axis=1))
    kept = np.asarray(dropped(jnp.ones((16, 16)), keys, 0.5))
    assert set(np.unique(kept)) == {0, 2} and abs((kept == 0).mean() - 0.5) < 0.13
    expected = np.asarray(entering) * kept @ np.asarray(task.head.kernel[...]) + np.asarray(task.head.bias[...])
    np.testing.assert_allclose(task.logits(latents, keys), expected, atol=1e-5)
    losses = []
    for train in (True, False):
        views = Views(drawing.model, batch, train=train)
        views._fused = {(task.denied, True): latents}
        losses.append([float(task.loss(views, keys).parts["loss"].value) for keys in (KEYS, OTHER)])
    assert losses[0][0] != losses[0][1] and losses[1][0] == losses[1][1]


KEYS, OTHER = jax.random.split(jax.random.key(5), (2, 16))
