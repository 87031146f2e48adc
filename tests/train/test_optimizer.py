"""Optimizers against float64 computations of their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mmfm_jax.config.model import TransformerConfig
from mmfm_jax.config.training import OptimizerConfig
from mmfm_jax.model.layers import Linear, Table
from mmfm_jax.model.transformer import Transformer
from mmfm_jax.train.groups import names, rates
from mmfm_jax.train.optimizer import kinds, make_optimizer, schedule

STEPS = 3
DTYPES = (jnp.float32, jnp.bfloat16)


class Encoder(nnx.Module):
    """A stack of three layers between an embedding and a head."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = Table(5, 8, rngs, kind="embedding")
        self.transformer = Transformer(TransformerConfig(width=8, depth=3, heads=2, mlp_ratio=3), rngs)
        self.head = Linear(8, 4, ("width", None), rngs, bias=True)


@pytest.fixture(scope="module")
def params():
    return nnx.state(Encoder(nnx.Rngs(params=jax.random.key(0))))


@pytest.fixture(scope="module")
def gradients(params):
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    return [
        structure.unflatten([jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])
        for _ in range(STEPS)
    ]


def config_of(**changes) -> OptimizerConfig:
    return OptimizerConfig(
        **{"learning_rate": 0.01, "warmup_steps": 2, "clip_norm": 1e9, "weight_decay": 0.1} | changes
    )


def trained(config, params, gradients):
    """The parameters after each step, and the last state."""
    optimizer = make_optimizer(config, 100)
    state, history = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history, state


def orthogonalised(matrix):
    """Five Newton-Schulz iterations of the quintic in Muon's publication, in float64."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def muon_alone(start, gradients, rate):
    """Muon with Nesterov momentum and Moonlight's scale on one matrix of one layer, in float64."""
    momentum, weight = np.zeros_like(start), start
    for step, gradient in enumerate(gradients, 1):
        momentum = 0.95 * momentum + 0.05 * gradient
        ahead = 0.95 * momentum / (1 - 0.95 ** (step + 1)) + 0.05 * gradient / (1 - 0.95**step)
        update = 0.2 * np.sqrt(max(weight.shape)) * orthogonalised(ahead)
        weight = weight - rate(step - 1) * (update + 0.1 * weight)
    return weight


def test_muon_of_a_stack_is_muon_of_each_layer_and_the_rest_is_adamw(params, gradients):
    config = config_of(kind="muon")
    history, _ = trained(config, params, gradients)
    adamw, _ = trained(config_of(), params, gradients)
    flat = [jax.tree.leaves(tree) for tree in (params, history[-1], adamw[-1])]
    matrices = 0
    for number, (name, start, end, by_adamw) in enumerate(zip(names(params), *flat)):
        if ".blocks." in name and name.endswith("kernel"):
            for layer in range(3):
                own = [np.asarray(jax.tree.leaves(gradient)[number][layer], np.float64) for gradient in gradients]
                alone = muon_alone(np.asarray(start[layer], np.float64), own, schedule(config, 100))
                np.testing.assert_allclose(end[layer], alone, atol=2e-5, err_msg=name)
            matrices += 1
        else:
            np.testing.assert_array_equal(end, by_adamw, err_msg=name)
    assert matrices == 6  # query, key, value, out, up, down


def test_muon_is_for_the_matrices_of_stacks_alone(params):
    found = dict(zip(names(params), jax.tree.leaves(kinds(params))))
    norms = {"blocks.attend_norm", "blocks.mlp_norm", "blocks.attend.query_norm", "blocks.attend.key_norm", "norm"}
    others = {"embed.table", "head.kernel", "head.bias"} | {f"transformer.{norm}.scale" for norm in norms}
    assert {name for name, kind in found.items() if kind == "adamw"} == others


@pytest.mark.parametrize("shape", [(64, 64), (32, 256), (256, 32)])
def test_an_update_of_muon_is_as_large_as_one_of_adamw(shape):
    """Moonlight's reason for the scale: AdamW's updates have a root mean square of 0.2 to 0.4."""
    value = jnp.asarray(np.random.default_rng(0).normal(size=(2, *shape)), jnp.float32)
    params = nnx.State({"kernel": nnx.Param(value, kind="matrix", axes=("width", "mlp"), stacked=True)})
    optimizer = make_optimizer(config_of(kind="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0), 100)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert 0.15 < float(jnp.sqrt(jnp.mean(jnp.square(jax.tree.leaves(updates)[0])))) < 0.25


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_bfloat16_state_halves_the_first_moment_and_leaves_the_second(kind, params):
    def bytes_of(state_dtype) -> list[int]:
        optimizer = make_optimizer(config_of(kind=kind, state_dtype=state_dtype), 100)
        leaves = [leaf for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, params)) if leaf.ndim]
        return [sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.dtype == of) for of in DTYPES]

    sizes = [(leaf.size, of) for leaf, of in zip(jax.tree.leaves(params), jax.tree.leaves(kinds(params)))]
    first = sum(size for size, _ in sizes)
    second = sum(size for size, of in sizes if kind == "adamw" or of == "adamw")
    coefficients = 3 if kind == "muon" else 0  # of the iteration, which optax keeps in its state
    assert bytes_of("float32") == [4 * (first + second + coefficients), 0]
    assert bytes_of("bfloat16") == [4 * (second + coefficients), 2 * first]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_bfloat16_first_moment_solves_an_ill_conditioned_problem_as_well(kind):
    rng = np.random.default_rng(0)
    a = jnp.asarray(rng.normal(size=(64, 16)) * np.geomspace(1, 30, 16), jnp.float32)
    target = a @ jnp.asarray(rng.normal(size=(2, 16, 4)), jnp.float32)
    params = nnx.State({"kernel": nnx.Param(jnp.zeros((2, 16, 4)), kind="matrix", axes=(None, None), stacked=True)})

    def loss(params):
        return jnp.mean(jnp.square(a @ params["kernel"].get_value() - target))

    def final(state_dtype):
        config = config_of(kind=kind, state_dtype=state_dtype, learning_rate=0.05, weight_decay=0, b2=0.99)
        optimizer = make_optimizer(config, 500)

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (end, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=500))(params)
        return float(loss(end))

    wide, narrow = final("float32"), final("bfloat16")
    assert max(wide, narrow) < 1e-3 * float(loss(params))
    assert narrow < 2 * wide + 1e-5 * float(loss(params))


def test_a_bfloat16_second_moment_would_stand_still():
    """Why it stays in float32: at b2 = 0.999 a gradient of twice the mean square is rounded away for ever."""
    moment = jnp.ones((), jnp.bfloat16)
    for _ in range(100):
        moment = (0.999 * moment.astype(jnp.float32) + 0.001 * 2.0).astype(jnp.bfloat16)
    assert float(moment) == 1.0
    assert 2 - 0.999**100 > 1.09


def test_a_group_multiplies_the_whole_update_of_its_parameters(params, gradients):
    plain = config_of()
    grouped = config_of(groups=({"match": "transformer.*", "learning_rate_scale": 0.5, "layer_decay": 0.7},))
    scaled, _ = trained(grouped, params, gradients[:1])
    whole, _ = trained(plain, params, gradients[:1])
    factors = rates(params, grouped.groups)
    for before, a, b, factor in zip(*map(jax.tree.leaves, (params, scaled[0], whole[0], factors))):
        np.testing.assert_allclose(a - before, factor * (b - before), atol=1e-7)
    assert any(np.ndim(factor) > 0 and np.unique(factor).size == 3 for factor in jax.tree.leaves(factors))
