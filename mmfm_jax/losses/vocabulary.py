"""Cross-entropy over a vocabulary a few tokens at a time, so that the logits of all tokens are never held.

Each device works on its tokens and its part of the vocabulary (as Megatron-LM, arXiv:1909.08053, section 3); backward
makes the logits anew. The collectives are written out, so that the kernel's gradient is summed over a device's tokens
in float32 and over devices once, on every platform and not only where the compiler moves that sum out of the loop.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from mmfm_jax.data.batch import Array
from mmfm_jax.parallel.loops import scan
from mmfm_jax.parallel.sharding import partition

LARGEST_LOGITS = 2**24  # held at a time on a device: 64 MiB in float32


def chunked_cross_entropy(
    x: Float[Array, "batch token width"],
    kernel: Float[Array, "width entry"],
    bias: Float[Array, "entry"] | None,
    target: Int[Array, "batch token"],
) -> tuple[Float[Array, "batch token"], Bool[Array, "batch token"]]:
    """Of each token: the cross-entropy of its target under the logits x @ kernel + bias, and whether that has the
    largest of them.

    Products are in the dtype of `x`, sums and exponentials in float32.
    """
    kernel, mesh = kernel.astype(x.dtype), jax.sharding.get_abstract_mesh()
    bias = jnp.zeros(kernel.shape[1]) if bias is None else bias
    if mesh.empty:
        return _on_device((), (), x, kernel, bias, target)
    tokens = partition(("batch", "tokens"), target.shape, mesh)
    vocabulary = partition(("vocabulary",), bias.shape, mesh)
    names = (tuple(jax.tree.leaves(tuple(split))) for split in (tokens, vocabulary))
    local = jax.shard_map(
        functools.partial(_on_device, *names),
        in_specs=(tokens, PartitionSpec(None, *vocabulary), vocabulary, tokens),
        out_specs=tokens,
    )
    return local(x, kernel, bias, target)


def _on_device(
    tokens: tuple[str, ...],
    vocabulary: tuple[str, ...],
    x: Float[Array, "batch token width"],
    kernel: Float[Array, "width entry"],
    bias: Float[Array, "entry"],
    target: Int[Array, "batch token"],
):
    """`tokens` and `vocabulary`: the mesh axes that those are split over."""
    # Varying over the tokens' devices from here on, and float32: gradients are summed over tokens before devices.
    kernel, bias = (jax.lax.pcast(p.astype(jnp.float32), tokens, to="varying") for p in (kernel, bias))
    first = jax.lax.axis_index(vocabulary) * len(bias) if vocabulary else 0
    entries = first + jnp.arange(len(bias))

    def over_vocabulary(collective, x):
        return collective(x, vocabulary) if vocabulary else x

    def chunk(_, part):
        x, target = part
        logits = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32) + bias
        peak = over_vocabulary(jax.lax.pmax, jax.lax.stop_gradient(logits).max(axis=-1))
        total = over_vocabulary(jax.lax.psum, jnp.exp(logits - peak[:, None]).sum(axis=-1))
        own = over_vocabulary(jax.lax.psum, jnp.where(entries == target[:, None], logits, 0).sum(axis=-1))
        return (), (jnp.log(total) + peak - own, own >= peak)

    parts = math.ceil(target.size * len(bias) / LARGEST_LOGITS)
    size = math.ceil(target.size / parts)

    def cut(flat):
        padded = jnp.pad(flat, [(0, parts * size - len(flat))] + [(0, 0)] * (flat.ndim - 1))
        return padded.reshape(parts, size, *flat.shape[1:])

    chunks = cut(x.reshape(-1, x.shape[-1])), cut(target.reshape(-1))
    _, answers = scan(jax.checkpoint(chunk, prevent_cse=False), (), chunks)
    return tuple(answer.reshape(-1)[: target.size].reshape(target.shape) for answer in answers)
