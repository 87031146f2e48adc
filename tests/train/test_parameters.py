"""What parameters are, beside a list by hand."""

from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmfm_jax.model.layers import Linear, stack
from mmfm_jax.model.parameter import check_parameters, parameter
from mmfm_jax.train.groups import names
from mmfm_jax.train.optimizer import bounded, kinds, make_optimizer, matrices
from mmfm_jax.train.state import learner_shapes

# Everything that the small experiment's learner is made of, written down from the definitions of the layers. The groups
# are those of timm, big_vision and MAE: only kernels decay, and neither class, register and mask tokens, nor positions,
# nor the words' vectors.
DECAYED = (
    "model.*.transformer.blocks.*.kernel",
    "model.vision.embed.ct.kernel",
    "model.table.numbers.kernel",
    "model.fusion.project.*.kernel",
    "tasks.*.pool.*.attend.*.kernel",
    "tasks.*.pool.*.project.kernel",
    "tasks.masked.decoder.transformer.blocks.*.kernel",
    "tasks.masked.place.kernel",
    "tasks.masked.voxels.ct.kernel",
    "tasks.masked.tokens.kernel",
    "tasks.masked.columns.kernel",
    "tasks.caption.decoder.transformer.blocks.*.kernel",
    "tasks.caption.decoder.memory.kernel",
    "tasks.caption.decoder.head.kernel",
    "tasks.disease.head.kernel",
)
NOT_DECAYED = (
    "*.blocks.*.scale",
    "model.*.blocks.*_scale.scale",
    "*.norm.scale",
    "*_norm.scale",
    "*.bias",
    "*.log_scale",
    "model.vision.registers.table",
    "model.text.embed.table",
    "model.table.numbers.turns",
    "model.table.categories.table",
    "model.table.column.table",
    "model.table.missing.table",
    "model.table.masked.table",
    "model.fusion.part.table",
    "model.fusion.latents.table",
    "tasks.masked.query.table",
    "tasks.*.pool.*.query.table",
    "tasks.caption.decoder.embed.table",
)


def fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@pytest.fixture(scope="module")
def params(make_experiment, material):
    caption = {"kind": "caption", "field": "report", "decoder": {"width": 16, "depth": 1, "heads": 2}}
    scaled = {f"model.{stack}.layer_scale": 0.1 for stack in ("vision", "text", "table", "fusion")}
    return learner_shapes(make_experiment({"tasks.caption": caption, **scaled}), material.spec)[1]


def test_matrices_alone_decay(params):
    flags = dict(zip(names(params), jax.tree.leaves(matrices(params)), strict=True))
    for name, decays in flags.items():
        assert fits(name, DECAYED) != fits(name, NOT_DECAYED), name
        assert decays == fits(name, DECAYED), name
    for pattern in DECAYED + NOT_DECAYED:
        assert any(fnmatchcase(name, pattern) for name in flags), pattern


def test_muon_is_for_the_kernels_of_blocks_alone(params):
    for name, kind in zip(names(params), jax.tree.leaves(kinds(params)), strict=True):
        assert (kind == "muon") == (".blocks." in name and name.endswith(".kernel")), name


def test_what_decays_shrinks_by_the_rate_and_nothing_else_moves(make_experiment, params):
    """Without a gradient an update is the decay."""
    config = make_experiment({"optimizer.weight_decay": 0.5, "optimizer.warmup_steps": 0}).optimizer
    optimizer = make_optimizer(config, 100)
    ones, zeros = (jax.tree.map(lambda x, of=of: jnp.full(x.shape, of), params) for of in (1.0, 0.0))
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(ones), ones)
    for name, update in zip(names(params), jax.tree.leaves(updates), strict=True):
        np.testing.assert_allclose(update, -0.5 * config.learning_rate * fits(name, DECAYED), err_msg=name)


def test_a_parameter_that_says_not_what_it_is_is_refused():
    class Loose(nnx.Module):
        def __init__(self):
            self.inner = Linear(2, 3, (None, None), nnx.Rngs(params=0))
            self.loose = nnx.Param(jnp.zeros(3), axes=(None,))

    with pytest.raises(TypeError, match=r"^loose: make it with"):
        check_parameters(nnx.state(Loose()))
    with pytest.raises(TypeError, match="not wool"):
        parameter(jnp.zeros(3), "wool", (None,))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="1 axes has 2 names"):
        parameter(jnp.zeros(3), "bias", (None, None))


def test_a_bound_holds_a_parameter_and_lets_it_come_back():
    state: Any = nnx.State({"a": parameter(jnp.array([1.0, 5.0]), "scale", (None,), largest=2.0)})
    held: Any = bounded(state)
    np.testing.assert_array_equal(held["a"].get_value(), [1.0, 2.0])
    stacked: Any = nnx.state(stack(lambda rngs: Linear(2, 3, (None, None), rngs, bias=True), 4, nnx.Rngs(params=0)))
    jax.tree.map(np.testing.assert_array_equal, bounded(stacked), stacked)


def test_a_contrastive_scale_at_its_bound_comes_down_again():
    """Pairs that do not fit want a small scale; two steps beyond the bound first, as an update may leave it."""
    from mmfm_jax.losses.pairs import contrast
    from mmfm_jax.tasks.contrastive import LARGEST_SCALE

    rng = np.random.default_rng(0)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 8, 4)).astype(np.float32))
    state: Any = nnx.State({"log_scale": parameter(jnp.log(120.0), "scale", (), largest=float(np.log(LARGEST_SCALE)))})

    def loss(state):
        found, _ = contrast("softmax", a, b, jnp.ones(8, bool), jnp.exp(state["log_scale"].get_value()))
        return found.value

    scales = []
    for _ in range(3):
        state = bounded(jax.tree.map(lambda x, g: x - 0.01 * g, state, jax.jit(jax.grad(loss))(state)))
        scales.append(float(jnp.exp(state["log_scale"].get_value())))
    assert scales[0] <= LARGEST_SCALE * (1 + 1e-6) and scales[2] < scales[1] < scales[0] + 1e-3
    assert scales[2] < 0.99 * LARGEST_SCALE
