"""In what devices sum the gradients of linear layers, read off the program that is compiled for a TPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmfm_jax.config.model import TransformerConfig
from mmfm_jax.config.training import MeshConfig
from mmfm_jax.model.layers import Linear
from mmfm_jax.model.transformer import Transformer
from mmfm_jax.parallel import sharding
from mmfm_jax.parallel.mesh import make_mesh
from mmfm_jax.plan import hlo

WIDTH, DEPTH = 256, 2


def small_stack(reduce_dtype: Any):
    model = Transformer(TransformerConfig(width=WIDTH, depth=DEPTH, heads=2, remat="full"), nnx.Rngs(params=0))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            module.reduce_dtype = reduce_dtype
    return nnx.split(model)


def gradient_of(graph):
    def loss(params, x):
        return jnp.square(nnx.merge(graph, params)(x).astype(jnp.float32)).mean()

    return jax.grad(loss)


def sent(text: str) -> dict[tuple[str, str], float]:
    """Bytes that collectives of whole matrices make, by kind and dtype, each turn of a loop once."""
    found: dict[tuple[str, str], float] = {}
    for computation in hlo.parse(text).computations.values():
        for instruction in computation.instructions:
            for kind in ("all-gather", "all-reduce", "reduce-scatter"):
                if instruction.opcode in (kind, f"{kind}-start"):
                    for shape in instruction.shapes:
                        if shape.size >= WIDTH * WIDTH // 4:
                            found[kind, shape.dtype] = found.get((kind, shape.dtype), 0) + shape.bytes
    return found


@pytest.mark.parametrize("data", [1, 2])
@pytest.mark.parametrize(("reduce_dtype", "dtype"), [("float32", "f32"), ("bfloat16", "bf16")])
def test_gradients_are_summed_in_the_dtype_asked_for_and_kernels_gathered_in_bfloat16(
    make_pod, data, reduce_dtype, dtype
):
    mesh = make_mesh(MeshConfig(data=data), make_pod("v5e:2x2").devices)
    graph, params = small_stack(reduce_dtype)
    places = sharding.of_variables(params, mesh)
    x = jax.ShapeDtypeStruct((16, 64, WIDTH), jnp.bfloat16, sharding=sharding.by_study(mesh))
    shapes = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params, places)
    with jax.set_mesh(mesh):
        program = jax.jit(gradient_of(graph), out_shardings=places).lower(shapes, x).compile().as_text()
    found = sent(program or "")
    assert {of for kind, of in found if kind != "all-gather"} == {dtype}, found
    assert {of for kind, of in found if kind == "all-gather"} == {"bf16"}, found


def test_a_kernel_gradient_of_four_devices_keeps_the_bits_that_bfloat16_would_lose():
    rng, mesh = np.random.default_rng(0), make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    x, target = (jnp.asarray(rng.normal(size=(64, 8, 32)), jnp.bfloat16) for _ in range(2))
    expected = np.einsum("bti,bto->io", *(np.asarray(of, np.float64) for of in (x, target)))
    of_bias = np.asarray(target, np.float64).sum(axis=(0, 1))
    errors = {}
    for reduce_dtype in ("float32", "bfloat16"):
        linear = Linear(32, 32, ("width", "mlp"), nnx.Rngs(params=0), bias=True)
        linear.reduce_dtype = reduce_dtype
        graph, params = nnx.split(linear)
        with jax.set_mesh(mesh):
            rows = sharding.by_study(mesh)
            placed = jax.device_put((params, x, target), (sharding.of_variables(params, mesh), rows, rows))
            found = jax.jit(jax.grad(functools.partial(agreement, graph)))(*placed)
        kernel, bias = found["kernel"].get_value(), found["bias"].get_value()
        errors[reduce_dtype] = np.abs(kernel - expected).max() / np.abs(expected).max()
        np.testing.assert_allclose(bias, of_bias, rtol=0, atol=1e-5 if reduce_dtype == "float32" else 2.0)
    assert errors["float32"] < 1e-6 and 1e-4 < errors["bfloat16"] < 1e-2, errors


def agreement(graph, params, x, target):
    return (nnx.merge(graph, params)(x) * target).astype(jnp.float32).sum()
