"""Products in eight bits against float64: their error, their gradients, and that tokens do not meet."""

import builtins
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmfm_jax.config.model import TransformerConfig
from mmfm_jax.errors import UserError
from mmfm_jax.model.precision import matmul
from mmfm_jax.model.transformer import Transformer

pytest.importorskip("qwix")
SEEDS = st.integers(0, 2**32 - 1)
RELATIVE = {jnp.float8_e4m3fn: 2.0**-4, jnp.float8_e5m2: 2.0**-3}  # half the last bit of 3 and of 2


def step_of(x, axis):
    """Half of what rounding to 8-bit integers can move an entry, with a scale along an axis."""
    return np.abs(x).max(axis=axis, keepdims=True) / 127 / 2


def bound(x, kernel, dx, dkernel):
    """Largest error of x @ kernel when entries of the two move by at most these."""
    return np.abs(x) @ dkernel + dx @ np.abs(kernel) + dx @ dkernel


def spread(rng, shape):
    """Rows and columns of very different size, and outliers."""
    x = rng.normal(size=shape) * np.exp(rng.normal(size=(shape[0], 1))) * np.exp(rng.normal(size=(1, shape[1])))
    return np.where(rng.random(shape) < 0.02, 30 * x, x).astype(np.float32)


@settings(max_examples=10)
@given(seed=SEEDS)
def test_the_error_of_int8_is_within_what_absmax_scales_allow(seed):
    rng = np.random.default_rng(seed)
    x, kernel, g = spread(rng, (24, 32)), spread(rng, (32, 16)), spread(rng, (24, 16))
    exact = x.astype(np.float64) @ kernel
    y, back = jax.vjp(lambda x, kernel: matmul(x, kernel, "int8"), jnp.asarray(x), jnp.asarray(kernel))
    dx, dkernel = np.broadcast_to(step_of(x, 1), x.shape), np.broadcast_to(step_of(kernel, 0), kernel.shape)
    error = np.abs(np.asarray(y, np.float64) - exact)
    allowed = bound(x, kernel, dx, dkernel)
    assert (error <= 1.001 * allowed).all() and error.max() > 0
    to_x, to_kernel = back(jnp.asarray(g))
    dg, dkernel = np.broadcast_to(step_of(g, 1), g.shape), np.broadcast_to(step_of(kernel, 1), kernel.shape)
    error = np.abs(np.asarray(to_x, np.float64) - g.astype(np.float64) @ kernel.T)
    assert (error <= 1.001 * bound(g, kernel.T, dg, dkernel.T)).all() and error.max() > 0
    np.testing.assert_allclose(to_kernel, x.astype(np.float64).T @ g, rtol=1e-4, atol=1e-4 * np.abs(to_kernel).max())


@settings(max_examples=10)
@given(seed=SEEDS)
def test_the_error_of_fp8_is_within_its_rounding(seed):
    rng = np.random.default_rng(seed)
    x, kernel, g = (rng.normal(size=shape).astype(np.float32) for shape in ((24, 32), (32, 16), (24, 16)))
    y, back = jax.vjp(lambda x, kernel: matmul(x, kernel, "fp8"), jnp.asarray(x), jnp.asarray(kernel))
    own, wide = RELATIVE.values()
    tiny = 1e-4  # below the smallest normal number the error is of a fixed size
    error = np.abs(np.asarray(y, np.float64) - x.astype(np.float64) @ kernel)
    assert (error <= bound(x, kernel, own * np.abs(x) + tiny, own * np.abs(kernel) + tiny)).all() and error.max() > 0
    error = np.abs(np.asarray(back(jnp.asarray(g))[0], np.float64) - g.astype(np.float64) @ kernel.T)
    assert (error <= bound(g, kernel.T, wide * np.abs(g) + tiny, own * np.abs(kernel.T) + tiny)).all()
    assert error.max() > 0


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_token_is_not_changed_by_the_others(precision):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 5, 8)).astype(np.float32), jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)
    before = matmul(jnp.asarray(x), kernel, precision)
    x[0, 3], x[1, 0] = 1e6, np.nan
    after = np.asarray(matmul(jnp.asarray(x), kernel, precision))
    others = np.ones((2, 5), bool)
    others[0, 3] = others[1, 0] = False
    np.testing.assert_array_equal(after[others], np.asarray(before)[others])
    np.testing.assert_array_equal(np.asarray(matmul(jnp.zeros((3, 8)), kernel, precision)), 0)


def stack(precision, remat):
    noise: Any = {"dropout": 0.1, "drop_path": 0.2, "layer_scale": 0.5}
    config = TransformerConfig(width=16, depth=2, heads=2, gated=True, precision=precision, remat=remat, **noise)
    return nnx.split(Transformer(config, nnx.Rngs(params=jax.random.key(0))))


@pytest.mark.parametrize("precision, types", [("int8", {"i8"}), ("fp8", {"f8E4M3FN", "f8E5M2"})])
def test_every_linear_layer_of_a_block_multiplies_in_eight_bits(precision, types):
    """A gated block has 7: each multiplies forward and for the gradient of its input; the scan holds them once."""
    graph, params = stack(precision, "none")
    x = jax.ShapeDtypeStruct((2, 4, 16), jnp.bfloat16)
    lowered = jax.jit(jax.grad(lambda p, x: nnx.merge(graph, p)(x).astype(jnp.float32).sum())).lower(params, x)
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    narrow = [line for line in products if any(f"x{kind}>" in line.split(") ->")[0] for kind in types)]
    assert len(narrow) == 14
    assert all(any(f"x{kind}>" in line for line in narrow) for kind in types)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_rematerialised_and_whole_have_the_same_gradient(precision):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 16)), jnp.float32)
    keys, found = jax.random.split(jax.random.key(0), 2), []
    for remat in ("none", "full"):
        graph, params = stack(precision, remat)

        def loss(params, graph=graph):
            return jnp.square(nnx.merge(graph, params)(x, keys=keys) - 1).sum()

        found.append(jax.jit(jax.grad(loss))(params))
    for one, other in zip(*map(jax.tree.leaves, found)):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_a_missing_qwix_is_one_sentence_that_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "qwix":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        UserError, match=r"precision int8 needs qwix, which is not installed; run `pip install 'mmfm_jax\[quantised"
    ):
        stack("int8", "none")
    stack("dtype", "none")


def test_a_student_learns_its_teacher_in_eight_bits_as_in_bfloat16():
    """A stack learns what another answers, for 150 steps of AdamW; its loss ends within 5% of bfloat16's."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(32, 8, 16)), jnp.bfloat16)
    graph, start = stack("dtype", "none")
    teacher = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, jnp.float32), start)
    answers = nnx.merge(graph, teacher)(x).astype(jnp.float32)
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, 150))

    def losses(precision):
        graph, params = stack(precision, "none")

        def loss(params):
            return jnp.mean(jnp.square(nnx.merge(graph, params)(x).astype(jnp.float32) - answers))

        def step(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        return np.asarray(jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=150)[1])(params))

    wide = losses("dtype")
    assert wide[-1] < 0.3 * wide[0]
    for precision in ("int8", "fp8"):
        found = losses(precision)
        assert abs(found[-1] - wide[-1]) < 0.05 * wide[-1], (precision, found[-1], wide[-1])
        assert (found != wide).any()


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_product_split_over_a_mesh_is_that_of_one_device(precision):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 4, 16)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(16, 12)), jnp.float32)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"))

    def both(x, kernel):
        y, back = jax.vjp(lambda x, kernel: cast(jax.Array, matmul(x, kernel, precision)), x, kernel)
        return y, *back(jnp.cos(y))

    def split(*axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    whole = jax.jit(both)(x, kernel)
    for of_x, of_kernel in ((("fsdp",), ("fsdp", "tensor")), (("fsdp", None, "tensor"), ("tensor", "fsdp"))):
        for mine, alone in zip(jax.jit(both, in_shardings=(split(*of_x), split(*of_kernel)))(x, kernel), whole):
            np.testing.assert_allclose(mine, alone, rtol=1e-5, atol=1e-5)
