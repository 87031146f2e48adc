"""Heads as attention wants them: cut from a projection, normalised (arXiv:2302.05442) and turned by position.

On TPUs Pallas kernels read a projection once and write it once, heads before tokens as the attention kernel takes them.
Left to XLA, norm, rotation and transposition pass through memory several times, partly in float32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Float

from mmfm_jax.data.batch import Array
from mmfm_jax.model.layers import EPSILON, rms_norm
from mmfm_jax.model.position import rotate
from mmfm_jax.parallel.platform import platform
from mmfm_jax.parallel.sharding import partition

LANES = 128  # of a TPU's vectors; heads of a multiple of it are cut without moving a number from lane to lane
BLOCK = 2**19  # bytes of a projection that a core holds at a time; backward has three such blocks, each twice, in VMEM
LARGEST_BLOCK = 2**21  # where 128 tokens of all heads are more, some heads at a time: 12 of the 16 MiB that v4 has
SUBLANES = 8  # of a TPU's vectors: heads at a time are a multiple of it


def heads_of(
    x: Float[Array, "batch tokens width"],
    heads: int,
    scale: Float[Array, "head"],
    angles: Float[Array, "#batch tokens pair"] | None = None,
) -> Float[Array, "batch tokens heads head"]:
    """The heads of a projection, normalised to root mean square `scale`, then turned by `angles` if there are any."""
    if platform() == "tpu" and (x.shape[-1] // heads) % LANES == 0:
        return fused(x, heads, scale, angles)
    x = rms_norm(x.reshape(*x.shape[:-1], heads, -1), scale)
    return x if angles is None else rotate(x, angles)


def fused(x, heads: int, scale, angles=None) -> jax.Array:
    """`heads_of` by the kernel, on the mesh in force. A head is a multiple of 128 wide."""
    table = None if angles is None else jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1).astype(jnp.float32)
    by_head: jax.Array = _fused(x.shape[-1] // heads, x, scale.astype(jnp.float32)[None], table)
    return by_head.swapaxes(1, 2)


def by_head(x: Float[Array, "batch tokens heads head"]) -> jax.Array:
    """Heads before tokens [batch, heads, tokens, head], of the arrays of one device."""
    return cut(x) if platform() == "tpu" and x.shape[-1] % LANES == 0 else jnp.swapaxes(x, 1, 2)


def by_token(x: Float[Array, "batch heads tokens head"]) -> jax.Array:
    """Tokens before heads [batch, tokens, heads, head], of the arrays of one device."""
    return join(x) if platform() == "tpu" and x.shape[-1] % LANES == 0 else jnp.swapaxes(x, 1, 2)


def by_head_with_inner(gradient, out) -> tuple[jax.Array, jax.Array]:
    """`by_head` of the gradient of `out`, and the inner product of both by head and token [batch, heads, tokens]."""
    if platform() == "tpu" and out.shape[-1] % LANES == 0:
        return cut_with_inner(gradient, out)
    inner = jnp.einsum("bthd,bthd->bht", gradient, out, preferred_element_type=jnp.float32)
    return by_head(gradient), inner


def cut(x) -> jax.Array:
    """`by_head` by a kernel."""
    batch, tokens, heads, head = x.shape
    flat = x.reshape(batch, tokens, -1)
    call = _call(head, flat, None)
    shape = jax.ShapeDtypeStruct((batch, heads, tokens, head), x.dtype)
    return pl.pallas_call(
        _cut_kernel, in_specs=[call.flat], out_specs=call.by_head, out_shape=shape, name="heads_cut", **call.how
    )(flat)


def cut_with_inner(gradient, out) -> tuple[jax.Array, jax.Array]:
    """`by_head_with_inner` by a kernel."""
    batch, tokens, heads, head = gradient.shape
    flat = gradient.reshape(batch, tokens, -1)
    call = _call(head, flat, None)
    return pl.pallas_call(
        _inner_kernel,
        in_specs=[call.flat, call.flat],
        out_specs=(call.by_head, pl.BlockSpec((1, call.heads, call.rows), lambda b, h, t: (b, h, t))),
        out_shape=(
            jax.ShapeDtypeStruct((batch, heads, tokens, head), gradient.dtype),
            jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32),
        ),
        name="heads_inner",
        **call.how,
    )(flat, out.reshape(batch, tokens, -1))


def join(x) -> jax.Array:
    """`by_token` by a kernel."""
    batch, heads, tokens, head = x.shape
    shape = jax.ShapeDtypeStruct((batch, tokens, heads * head), x.dtype)
    call = _call(head, shape, None)
    flat = pl.pallas_call(
        _join_kernel, in_specs=[call.by_head], out_specs=call.flat, out_shape=shape, name="heads_join", **call.how
    )(x)
    return flat.reshape(batch, tokens, heads, head)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(head: int, x, scale, table):
    """[batch, heads, tokens, head] of `x`. `table`: cosine beside sine, of all rows or one for all."""
    split = _split(head, x, table)
    return _on_mesh(functools.partial(_forward, head), split[:3], split.by_head)(x, scale, table)


def _fused_forward(head: int, x, scale, table):
    return _fused(head, x, scale, table), (x, scale, table)


def _fused_backward(head: int, held, gradient):
    x, scale, table = held
    split = _split(head, x, table)
    of_scale = PartitionSpec(*split.flat)  # each device's own part of it
    backward = _on_mesh(functools.partial(_backward, head), (*split[:3], split.by_head), (split.flat, of_scale))
    dx, parts = backward(x, scale, table, gradient)
    # The table is of positions, which nothing learns.
    return dx, parts.reshape(-1, head).sum(axis=0)[None], None if table is None else jnp.zeros_like(table)


_fused.defvjp(_fused_forward, _fused_backward)


# ---------------------------------------------------------------- on the mesh


class _Split(NamedTuple):
    flat: PartitionSpec
    scale: PartitionSpec
    table: PartitionSpec
    by_head: PartitionSpec


def _split(head: int, x, table) -> _Split:
    """How the mesh in force splits each array."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _Split(*[PartitionSpec()] * 4)
    batch, tokens, width = x.shape
    of_batch, of_tokens, of_heads, _ = partition(
        ("batch", "tokens", "heads", None), (batch, tokens, width // head, head), mesh
    )
    of_rows = None if table is None or len(table) == 1 else of_batch
    return _Split(
        PartitionSpec(of_batch, of_tokens, of_heads),
        PartitionSpec(),
        PartitionSpec(of_rows, of_tokens),
        PartitionSpec(of_batch, of_heads, of_tokens),
    )


def _on_mesh(function, in_specs, out_specs):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    # check_vma: the kernels do not say over which axes their results vary.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


# ---------------------------------------------------------------- on a device


def _forward(head: int, x, scale, table):
    batch, tokens, width = x.shape
    call = _call(head, x, table)
    return pl.pallas_call(
        _forward_kernel if table is not None else functools.partial(_without_table, _forward_kernel),
        in_specs=call.given,
        out_specs=call.by_head,
        out_shape=jax.ShapeDtypeStruct((batch, width // head, tokens, head), x.dtype),
        name="heads_forward",
        **call.how,
    )(x, scale, *([] if table is None else [table]))


def _backward(head: int, x, scale, table, gradient):
    """The gradient of `x`, and of the scale a sum [batch, 1, head] over this device's tokens and heads of each row."""
    call = _call(head, x, table)
    kernel = functools.partial(_backward_kernel, x.shape[1], x.shape[2] // head)
    return pl.pallas_call(
        kernel if table is not None else functools.partial(_without_table, kernel),
        in_specs=[*call.given, call.by_head],
        out_specs=(call.flat, call.sums),
        out_shape=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((len(x), 1, head), jnp.float32),
        ),
        name="heads_backward",
        **call.how,
    )(x, scale, *([] if table is None else [table]), gradient)


class _Call(NamedTuple):
    rows: int
    """Tokens of a block."""
    heads: int
    """Of a block."""
    flat: pl.BlockSpec
    by_head: pl.BlockSpec
    sums: pl.BlockSpec
    given: list[pl.BlockSpec]
    how: dict


def _call(head: int, x, table) -> _Call:
    """Blocks of some tokens of one row, with all heads that are here or, of wide projections, some."""
    batch, tokens, width = x.shape
    rows, heads = block_of(tokens, width, head, x.dtype.itemsize)
    flat = pl.BlockSpec((1, rows, heads * head), lambda b, h, t: (b, t, h))
    given = [flat, pl.BlockSpec((1, head), lambda b, h, t: (0, 0))]
    if table is not None:
        one = len(table) == 1
        given.append(pl.BlockSpec((1, rows, head), lambda b, h, t: (0 if one else b, t, 0)))
    return _Call(
        rows,
        heads,
        flat,
        pl.BlockSpec((1, heads, rows, head), lambda b, h, t: (b, h, t, 0)),
        pl.BlockSpec((1, 1, head), lambda b, h, t: (b, 0, 0)),
        given,
        {
            "grid": (batch, pl.cdiv(width // head, heads), pl.cdiv(tokens, rows)),
            "compiler_params": pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
            "interpret": platform() != "tpu",
        },
    )


def block_of(tokens: int, width: int, head: int, itemsize: int) -> tuple[int, int]:
    """Tokens and heads of a block; neither need divide what there is."""
    rows = min(max(LANES, BLOCK // (width * itemsize) // LANES * LANES), tokens)
    heads = LARGEST_BLOCK // (rows * head * itemsize)
    return rows, width // head if heads * head >= width else max(heads // SUBLANES, 1) * SUBLANES


def _cut_kernel(flat_ref, by_head_ref):
    head = by_head_ref.shape[-1]
    for index in range(by_head_ref.shape[1]):
        by_head_ref[0, index] = flat_ref[0, :, pl.ds(index * head, head)]


def _inner_kernel(gradient_ref, out_ref, by_head_ref, inner_ref):
    head = by_head_ref.shape[-1]
    for index in range(by_head_ref.shape[1]):
        lanes = pl.ds(index * head, head)
        gradient = gradient_ref[0, :, lanes]
        by_head_ref[0, index] = gradient
        product = gradient.astype(jnp.float32) * out_ref[0, :, lanes].astype(jnp.float32)
        # The sum along lanes as a product with ones, which leaves the tokens along lanes.
        sums = jax.lax.dot_general(
            jnp.ones((8, head), jnp.float32), product, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
        )
        inner_ref[0, pl.ds(index, 1)] = sums[:1]


def _join_kernel(by_head_ref, flat_ref):
    head = by_head_ref.shape[-1]
    for index in range(by_head_ref.shape[1]):
        flat_ref[0, :, pl.ds(index * head, head)] = by_head_ref[0, index]


def _without_table(kernel, x, scale, *others):
    kernel(x, scale, None, *others)


def _forward_kernel(x_ref, scale_ref, table_ref, out_ref):
    turns = _turns(table_ref)
    for index in range(out_ref.shape[1]):
        y, _, _ = _normalised(x_ref, index, out_ref.shape[-1])
        y = y * scale_ref[...]
        if turns is not None:
            cosine, sine = turns
            y = y * cosine + _partner(y) * sine
        out_ref[0, index] = y.astype(out_ref.dtype)


def _backward_kernel(tokens: int, heads: int, x_ref, scale_ref, table_ref, gradient_ref, dx_ref, dscale_ref):
    turns, head = _turns(table_ref), gradient_ref.shape[-1]
    rows = gradient_ref.shape[2]
    within = pl.program_id(2) * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0) < tokens
    first_head = pl.program_id(1) * gradient_ref.shape[1]

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
        dscale_ref[...] = jnp.zeros_like(dscale_ref)

    for index in range(gradient_ref.shape[1]):
        y, inverse, lanes = _normalised(x_ref, index, head)
        gradient = gradient_ref[0, index].astype(jnp.float32)
        if turns is not None:
            cosine, sine = turns
            gradient = gradient * cosine + _partner(gradient * sine)
        counts = within & (first_head + index < heads)
        dscale_ref[0] += jnp.sum(jnp.where(counts, gradient * y, 0), axis=0, keepdims=True)
        gradient = gradient * scale_ref[...]
        along = jnp.mean(gradient * y, axis=-1, keepdims=True)
        dx_ref[0, :, lanes] = (inverse * (gradient - y * along)).astype(dx_ref.dtype)


def _normalised(x_ref, index: int, head: int):
    """A head at root mean square 1, what it was multiplied by for that, and its lanes."""
    lanes = pl.ds(index * head, head)
    x = x_ref[0, :, lanes].astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPSILON)
    return x * inverse, inverse, lanes


def _turns(table_ref):
    """Cosines, and sines with the sign of the partner that each multiplies."""
    if table_ref is None:
        return None
    table = table_ref[0]
    swapped = _partner(table)
    first = jax.lax.broadcasted_iota(jnp.int32, table.shape, 1) < table.shape[1] // 2
    return jnp.where(first, table, swapped), jnp.where(first, -swapped, table)


def _partner(x):
    """Feature i + head / 2 in the place of feature i, and the other way round."""
    return pltpu.roll(x, x.shape[-1] // 2, 1)
