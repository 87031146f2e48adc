"""Names of parameters, the groups they fall into, and the learning rates that follow."""

import functools
from collections.abc import Mapping

import jax
import numpy as np
import pytest
from flax import nnx

from mmfm_jax.config.training import ParameterGroup
from mmfm_jax.errors import UserError
from mmfm_jax.train.groups import check, names, rates, split
from mmfm_jax.train.learner import Learner
from mmfm_jax.train.state import learner_shapes


@pytest.fixture(scope="module")
def learner(material):
    return nnx.eval_shape(lambda: Learner(material.experiment, material.spec, nnx.Rngs(params=jax.random.key(0))))


@pytest.fixture(scope="module")
def params(learner):
    return nnx.state(learner)


def by_name(tree) -> dict:
    return dict(zip(names(tree), (variable.get_value() for _, variable in nnx.to_flat_state(tree)), strict=True))


def group(match: str, **options) -> ParameterGroup:
    return ParameterGroup(match=match, **options)


def test_a_name_is_the_way_from_the_learner_to_the_parameter(learner, params):
    def step(place, part):
        if isinstance(place, nnx.List):
            return place[int(part)]
        return place[part] if isinstance(place, Mapping) else getattr(place, part)

    assert len(set(names(params))) == len(jax.tree.leaves(params))
    assert "model.vision.transformer.blocks.attend.query.kernel" in names(params)
    assert "model.fusion.project.0.kernel" in names(params)
    for name, leaf in zip(names(params), jax.tree.leaves(params)):
        assert functools.reduce(step, name.split("."), learner).get_value().shape == leaf.shape, name


def beit_scales(depth: int, decay: float) -> list[float]:
    """As BEiT's `LayerDecayValueAssigner` has them: one for the embeddings, one a block, one for what follows."""
    return [decay ** (depth + 1 - layer) for layer in range(depth + 2)]


def test_layers_of_an_encoder_learn_at_the_rates_of_beit(params):
    found = by_name(rates(params, [group("model.vision.*", layer_decay=0.5, learning_rate_scale=0.1)]))
    expected = 0.1 * np.array(beit_scales(2, 0.5))
    for name, rate in found.items():
        if not name.startswith("model.vision."):
            np.testing.assert_array_equal(rate, 1)
        elif ".blocks." in name:
            assert rate.shape == (2, *[1] * (by_name(params)[name].ndim - 1))
            np.testing.assert_allclose(rate.ravel(), expected[1:-1], rtol=1e-6)
        elif name == "model.vision.transformer.norm.scale":
            np.testing.assert_allclose(rate, expected[-1], rtol=1e-6)
        else:
            np.testing.assert_allclose(rate, expected[0], rtol=1e-6, err_msg=name)


def test_each_encoder_counts_its_own_blocks_and_heads_do_not_decay(params):
    found = by_name(rates(params, [group("*", layer_decay=0.5)]))
    np.testing.assert_allclose(found["model.text.embed.table"], 0.5**3)  # two blocks
    np.testing.assert_allclose(found["model.fusion.latents.table"], 0.5**2)  # one
    np.testing.assert_allclose(found["tasks.disease.head.kernel"], 1)


def test_a_parameter_belongs_to_the_first_group_that_fits(params):
    groups = [group("model.vision.embed.*", learning_rate_scale=3), group("model.vision.*", frozen=True)]
    trained, frozen = map(names, split(params, groups))
    assert [name for name in trained if name.startswith("model.vision.")] == [
        "model.vision.embed.ct.bias",
        "model.vision.embed.ct.kernel",
    ]
    assert frozen and all(name.startswith("model.vision.") for name in frozen)
    assert sorted(trained + frozen) == sorted(names(params))


def test_split_and_merged_the_parameters_are_the_same_tree(params):
    for groups in ([], [group("model.*.blocks.*", frozen=True)], [group("model.fusion.project.1.*", frozen=True)]):
        assert jax.tree.structure(nnx.merge_state(*split(params, groups))) == jax.tree.structure(params)


@pytest.mark.parametrize(
    "matches, said",
    [
        (["model.vison.*"], r"groups.0.match: model.vison.\* fits no parameter; names near it are model.vision.\*"),
        (["model.*", "model.text"], r"groups.1.match: model.text fits no parameter; .*model.text.\*"),
        (["model.*", "model.text.*"], r"groups.1.match: model.text.\* fits only parameters that a group before it"),
        (["*"], "every parameter is frozen"),
    ],
)
def test_a_group_without_parameters_is_refused(params, matches, said):
    with pytest.raises(UserError, match=said):
        check([group(match, frozen=True) for match in matches], params)


def test_a_run_is_refused_for_a_group_that_fits_nothing(make_experiment, material):
    experiment = make_experiment({"optimizer.groups": [{"match": "vision.*", "frozen": True}]})
    with pytest.raises(UserError, match=r"vision.\* fits no parameter"):
        learner_shapes(experiment, material.spec)


def test_a_frozen_group_with_a_learning_rate_is_refused(make_experiment):
    with pytest.raises(UserError, match="is frozen and has a learning rate"):
        make_experiment({"optimizer.groups": [{"match": "model.*", "frozen": True, "layer_decay": 0.5}]})
