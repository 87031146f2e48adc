"""Losses over all pairs of a global batch without the matrix of all pairs.

Each device keeps its own studies, and the other side of everyone's goes round the ring of devices that the batch is
split over (the chunked loss of SigLIP, arXiv:2303.15343, section 3.3). Backward goes round again and makes each block
anew; the gradient of what travels travels with it. So a device holds its studies, one neighbour's, and a block of at
most `LARGEST_BLOCK` pairs, whatever the batch. On one device the ring has one stop, and the loss is the dense one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, UInt32

from mmfm_jax.data.batch import Array
from mmfm_jax.losses.mean import Mean
from mmfm_jax.parallel.loops import scan
from mmfm_jax.parallel.sharding import partition

LARGEST_BLOCK = 2**24  # pairs compared at a time on a device: 64 MiB a float32 matrix of them
Kind = Literal["sigmoid", "softmax"]
# In full float32: at a scale of 100 a product rounded to bfloat16 is wrong by tenths, and it is a small part of a step.
_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def contrast(
    kind: Kind,
    a: Float[Array, "batch embedding"],
    b: Float[Array, "batch embedding"],
    paired: Bool[Array, "batch"],
    scale: Float[Array, ""],
    bias: Float[Array, ""] | None = None,
    text: UInt32[Array, "batch way 2"] | None = None,
) -> tuple[Mean, Mean]:
    """The contrastive loss of the two sides, and the share of studies whose own b is nearer to a than any other's.

    Compared are the studies that are `paired`, but not two whose `text` is equal in one way or more: each way is 64
    bits, such as of the whole text and of the part of it that is shown. With logits scale a_i . b_j + bias:

    - sigmoid: each pair is a yes-no question, yes for a study with itself; the sum over the number of studies;
    - softmax: cross-entropy of each study's partner among those compared, both ways, averaged.

    An `a` or `b` that is not paired is not read, even if NaN.
    """
    a, b = (jnp.where(paired[:, None], side, 0) for side in (a, b))
    tags = _tags(paired, text)
    offset = jnp.broadcast_to(jnp.zeros(()) if bias is None else bias, paired.shape)
    losses, nearest = _row_losses(kind, scale * a, b, offset, tags)
    if kind == "softmax":
        losses = (losses + _row_losses(kind, scale * b, a, offset, tags)[0]) / 2
    return Mean.over(losses, paired), Mean.over(nearest.astype(jnp.float32), paired)


def _tags(paired, text) -> UInt32[Array, "batch word"]:
    """A number of its own for each study that is paired, 0 for others; then pairs of words, none of which two studies
    that are compared have in common."""
    number = jnp.arange(1, len(paired) + 1, dtype=jnp.uint32)
    held = jnp.where(paired, number, 0)[:, None]
    return held if text is None else jnp.concatenate([held, text.reshape(len(paired), -1)], axis=1)


def _values(kind: Kind, x, y, offset, tags) -> tuple[Float[Array, "batch"], Bool[Array, "batch"]]:
    """Of each x: its loss against all y, summed, and whether its own y has the largest logit x_i . y_j + offset_i."""
    return _with_residuals(kind, x, y, offset, tags)[0]


def _with_residuals(kind: Kind, x, y, offset, tags):
    total, own, nearest = _over_devices(functools.partial(_forward, kind), x, y, offset, tags)
    loss = total if kind == "sigmoid" else total - own
    return (loss, own > nearest), (x, y, offset, tags, total)


def _gradients(kind: Kind, residuals, cotangents):
    gradients = _over_devices(functools.partial(_backward, kind), *residuals, cotangents[0])
    return *gradients, None


_row_losses: Any = jax.custom_vjp(_values, nondiff_argnums=(0,))
_row_losses.defvjp(_with_residuals, _gradients)


@dataclass(frozen=True)
class _Ring:
    devices: int
    shift: Callable[[Any], Any]
    """Hands what each device holds to the one before it."""


def _over_devices(function, x, *arguments):
    """`function(ring, ...)` on what each device holds of the batch; devices that hold the same studies do the same."""
    mesh = jax.sharding.get_abstract_mesh()
    split = PartitionSpec(None) if mesh.empty else partition(("batch",), x.shape[:1], mesh)
    names = tuple(jax.tree.leaves(tuple(split)))
    devices = math.prod(mesh.shape[name] for name in names)
    before = [(device, (device - 1) % devices) for device in range(devices)]

    def shift(held):
        return held if devices == 1 else jax.tree.map(lambda x: jax.lax.ppermute(x, names, before), held)

    local = functools.partial(function, _Ring(devices, shift))
    if not mesh.empty:
        local = jax.shard_map(local, in_specs=split, out_specs=split)
    return local(x, *arguments)


def _forward(kind: Kind, ring: _Ring, x, y, offset, tags):
    """Of each row: the sum of its losses (sigmoid) or the logarithm of the sum of exponentials (softmax), the logit of
    its own partner, and the largest of the others."""

    def meet(rows, columns):
        total, own, nearest = rows
        logits, same, compared = _block(x, offset, tags, *columns)
        if kind == "sigmoid":
            total += jnp.where(compared, jax.nn.softplus(jnp.where(same, -logits, logits)), 0).sum(axis=1)
        else:
            part = jax.nn.logsumexp(jnp.where(compared, logits, -jnp.inf), axis=1)
            total = jnp.logaddexp(total, part)
        own += jnp.where(same, logits, 0).sum(axis=1)
        others = jnp.where(compared & ~same, logits, -jnp.inf).max(axis=1)
        return (total, own, jnp.maximum(nearest, others)), None

    def hop(carry, _):
        columns, rows = carry
        following = ring.shift(columns)  # before the work, so that both can run at once
        rows, _ = jax.lax.scan(meet, rows, _chunks(len(x), columns))
        return (following, rows), None

    none, lowest = jnp.zeros_like(offset), jnp.full_like(offset, -jnp.inf)
    rows = (none if kind == "sigmoid" else lowest, none, lowest)
    (_, rows), _ = scan(hop, ((y, tags), rows), length=ring.devices)
    return rows


def _backward(kind: Kind, ring: _Ring, x, y, offset, tags, total, cotangent):
    """Gradients of x, y and offset. That of y is one stop behind its columns and comes home with a last shift."""

    def meet(rows, columns):
        dx, doffset = rows
        logits, same, compared = _block(x, offset, tags, *columns)
        chance = jax.nn.sigmoid(logits) if kind == "sigmoid" else jnp.exp(logits - total[:, None])
        slope = jnp.where(compared, (chance - same) * cotangent[:, None], 0)
        return (dx + _product(slope, columns[0]), doffset + slope.sum(axis=1)), _product(slope.T, x)

    def hop(carry, _):
        columns, dy, rows = carry
        following, dy = ring.shift((columns, dy))
        rows, parts = jax.lax.scan(meet, rows, _chunks(len(x), columns))
        return (following, dy + parts.reshape(-1, y.shape[1])[: len(y)], rows), None

    start = ((y, tags), jnp.zeros_like(y), (jnp.zeros_like(x), jnp.zeros_like(offset)))
    (_, dy, (dx, doffset)), _ = scan(hop, start, length=ring.devices)
    return dx, ring.shift(dy), doffset


def _block(x, offset, tags, y, y_tags):
    """Logits of rows and columns, which pairs are a study with itself, and which are compared, those included."""
    logits = _product(x, y.T) + offset[:, None]
    both = (tags[:, None, 0] > 0) & (y_tags[None, :, 0] > 0)
    same = both & (tags[:, None, 0] == y_tags[None, :, 0])
    differ = jnp.ones_like(both)
    for way in range(1, tags.shape[1], 2):
        first, second = (tags[:, None, word] != y_tags[None, :, word] for word in (way, way + 1))
        differ &= first | second
    return logits, same, same | (both & differ)


def _chunks(rows: int, columns):
    """The columns in equal parts, [part, column, ...], padded with columns that are compared with none."""
    held = len(columns[0])
    parts = math.ceil(rows * held / LARGEST_BLOCK)
    size = math.ceil(held / parts)

    def cut(leaf):
        padded = jnp.pad(leaf, [(0, parts * size - held)] + [(0, 0)] * (leaf.ndim - 1))
        return padded.reshape(parts, size, *leaf.shape[1:])

    return jax.tree.map(cut, columns)
