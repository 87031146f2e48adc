"""The small layers everything is made of. Parameters name their axes; how those are sharded is decided elsewhere."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from mmfm_jax.data.batch import Array
from mmfm_jax.model import precision, product
from mmfm_jax.model.parameter import Kind, parameter

EPSILON = 1e-6
STATISTIC = "statistic"  # name of the one number a token that a norm divides by, which backward may keep
Axes = tuple[str | None, str | None]


class Linear(nnx.Module):
    """x @ kernel (+ bias), in the dtype of `x` over float32 parameters.

    `axes` names the input and the output axis; `gain` scales the initial standard deviation sqrt(1 / input width).
    `precision` may be set to that of eight-bit products, `reduce_dtype` to what devices sum gradients in.
    """

    precision: precision.Precision = "dtype"
    reduce_dtype: product.ReduceDtype = "float32"

    def __init__(self, inputs: int, outputs: int, axes: Axes, rngs: nnx.Rngs, bias=False, gain=1.0):
        scale = gain * inputs**-0.5
        self.kernel = parameter(_truncated_normal(rngs.params(), (inputs, outputs), scale), "matrix", axes)
        self.bias = parameter(jnp.zeros(outputs), "bias", axes[1:]) if bias else None

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        if self.precision == "dtype":
            y: Any = product.matmul(x, self.kernel[...], self.reduce_dtype)
        else:
            y = precision.matmul(x, self.kernel[...], self.precision)
        return y if self.bias is None else product.add_bias(y, self.bias[...], self.reduce_dtype)


def rms_norm(x: Float[Array, "*batch width"], scale: Float[Array, "width"]) -> Float[Array, "*batch width"]:
    """Root mean square normalisation in float32 (arXiv:1910.07467)."""
    wide = x.astype(jnp.float32)
    inverse = checkpoint_name(jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1) + EPSILON), STATISTIC)
    return (wide * inverse[..., None] * scale).astype(x.dtype)


class RMSNorm(nnx.Module):
    def __init__(self, width: int):
        self.scale = parameter(jnp.ones(width), "scale", (None,))

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        return rms_norm(x, self.scale[...])


class LayerScale(nnx.Module):
    """A learnt factor a feature (arXiv:2103.17239)."""

    def __init__(self, width: int, initial: float):
        self.scale = parameter(jnp.full(width, initial), "scale", (None,))

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        return (x.astype(jnp.float32) * self.scale[...]).astype(x.dtype)


class Table(nnx.Module):
    """Learned vectors by index, such as the embeddings of a vocabulary."""

    def __init__(self, entries: int, width: int, rngs: nnx.Rngs, *, kind: Kind, axis: str | None = None):
        self.table = parameter(_truncated_normal(rngs.params(), (entries, width), 0.02), kind, (axis, "width"))

    def __call__(self, index: Array) -> Float[Array, "*batch width"]:
        return jnp.take(self.table[...], index, axis=0)

    @property
    def all(self) -> Float[Array, "entries width"]:
        return self.table[...]


def stack(make, depth: int, rngs: nnx.Rngs):
    """`depth` modules of one kind as a single module whose parameters have a leading layer axis.

    `make(rngs)` builds one. Applied by `jax.lax.scan`, so a stack compiles as fast as one layer.
    """
    graphs = []

    def initialise(key):
        graph, state = nnx.split(make(nnx.Rngs(params=key)))
        graphs.append(graph)
        return state

    states = jax.vmap(initialise)(jax.random.split(rngs.params(), depth))
    made = nnx.merge(graphs[0], states)
    for _, variable in nnx.iter_graph(made):
        if isinstance(variable, nnx.Variable):
            variable.set_metadata(stacked=True)
    return made


def _truncated_normal(key, shape, scale: float):
    return jax.random.truncated_normal(key, -2, 2, shape) * (scale / 0.87962566)  # the sd of what truncation leaves
