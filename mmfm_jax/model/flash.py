"""Attention of some queries over some of the keys, in the two halves that exact softmax over many blocks is made of.

`forward` also gives the log of the softmax's denominator, by which results over different keys are joined (`merge`);
`backward` takes the denominator over all keys, so each block's gradient is right by itself (FlashAttention-2,
arXiv:2307.08691). Neither ever holds all scores.

A query meets a key of its own segment; segment 0 is absent and meets nothing.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Bool, Float, Int

from mmfm_jax.data.batch import Array
from mmfm_jax.model.head_layout import LANES, by_head, by_head_with_inner, by_token
from mmfm_jax.parallel.platform import device_kind, platform, vmem_bytes

NOTHING = -1e30  # log of the denominator of a query that meets no key
SCORES = 2**24  # held at once by XLA's form: 64 MiB of float32
LARGEST_TILE = 1024  # of the TPU kernel: tiles of scores this wide keep the matrix unit busy
TILE_COST = 64  # tokens in whose time a tile is begun: what a small tile costs beside padding to a larger one
FUSED_BYTES = 2**33  # of gradients of queries, one for each tile of keys, that may be made before they are summed

Kernel = Literal["xla", "splash"]


class Segments(NamedTuple):
    """Which segment each query and each key is of. Without `queries` each meets every key that is not absent."""

    queries: Int[Array, "batch query"] | None = None
    keys: Int[Array, "batch key"] | None = None

    @classmethod
    def present(cls, keys: Bool[Array, "batch key"]) -> Segments:
        """Every query meets the keys that are present."""
        return cls(None, jnp.asarray(keys, jnp.int32))

    @classmethod
    def packed(cls, tokens: Int[Array, "batch token"]) -> Segments:
        """Tokens of several sequences side by side, each of which meets itself."""
        return cls(tokens, tokens)


ALL = Segments()


class Attended(NamedTuple):
    """Attention over some keys, and the log of its softmax's denominator."""

    out: Float[Array, "batch query heads head"]
    log_sum: Float[Array, "batch heads query"]


def merge(a: Attended, b: Attended) -> Attended:
    """Attention over the keys of both. `out` in float32."""
    log_sum = jnp.logaddexp(a.log_sum, b.log_sum)

    def share(part: Attended):
        weight = jnp.exp(part.log_sum - log_sum).swapaxes(1, 2)[..., None]
        return part.out.astype(jnp.float32) * weight

    return Attended(share(a) + share(b), log_sum)


def forward(kernel: Kernel, causal: bool, q, k, v, segments: Segments) -> Attended:
    """Attention [batch, query, heads, head] of `q` over `k` and `v`."""
    if kernel == "splash":
        return _splash_forward(causal, q, k, v, segments)
    pieces = Pieces.of(q.shape, k.shape[1])

    def piece(given):
        first, q, of_queries = given
        return _xla_forward(causal, first, q, k, v, Segments(of_queries, segments.keys))

    done = jax.lax.map(piece, (pieces.firsts, pieces.cut(q), pieces.cut(segments.queries)))
    return Attended(pieces.join(done.out), pieces.join(done.log_sum.swapaxes(2, 3)).swapaxes(1, 2))


def backward(
    kernel: Kernel, causal: bool, q, k, v, segments: Segments, whole: Attended, gradient
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, given attention over all keys, of which `k` may be a part, and its gradient."""
    if kernel == "splash":
        return _splash_backward(causal, q, k, v, segments, whole, gradient)
    pieces = Pieces.of(q.shape, k.shape[1])
    inner = jnp.einsum("bqhd,bqhd->bqh", gradient, whole.out, preferred_element_type=jnp.float32)
    by_query = (q, gradient, whole.log_sum.swapaxes(1, 2), inner)

    def piece(total, given):
        first, (q, gradient, log_sum, inner), of_queries = given
        by_piece = Segments(of_queries, segments.keys)
        dq, *per_key = _xla_backward(causal, first, q, gradient, log_sum, inner, k, v, by_piece)
        return jax.tree.map(jnp.add, total, tuple(per_key)), dq

    zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    # Queries that fill up the last piece have a gradient of zero, and so has what they attended to.
    cut = (pieces.firsts, jax.tree.map(pieces.cut, by_query), pieces.cut(segments.queries))
    (dk, dv), dq = jax.lax.scan(piece, zeros, cut)
    return pieces.join(dq), dk, dv


# ---------------------------------------------------------------- XLA, some queries at a time


class Pieces(NamedTuple):
    """How axis 1, of queries, is cut so that the scores of a piece are at most SCORES; the last is filled up."""

    queries: int
    count: int
    size: int

    @classmethod
    def of(cls, shape: tuple[int, ...], keys: int) -> Pieces:
        batch, queries, heads, _ = shape
        count = -(-queries // max(SCORES // (batch * heads * keys), 1))
        return cls(queries, count, -(-queries // count))

    @property
    def firsts(self) -> jax.Array:
        """The position of each piece's first query."""
        return jnp.arange(self.count) * self.size

    def cut(self, x) -> Any:
        if x is None:
            return None
        x = _pad(x, self.count * self.size)
        return x.reshape(len(x), self.count, self.size, *x.shape[2:]).swapaxes(0, 1)

    def join(self, x):
        x = x.swapaxes(0, 1)
        return x.reshape(len(x), self.count * self.size, *x.shape[3:])[:, : self.queries]


def _meet(causal: bool, first: Array | int, queries: int, keys: int, segments: Segments):
    """Which queries (from position `first` on) and keys meet, [batch or 1, 1, query, key]; None where all do."""
    meets = None
    if segments.keys is not None:
        of_keys = segments.keys[:, None, None, :]
        meets = of_keys > 0
        if segments.queries is not None:
            meets &= of_keys == segments.queries[:, None, :, None]
    if causal:
        before = jnp.arange(keys) <= (first + jnp.arange(queries))[:, None]
        meets = before[None, None] if meets is None else meets & before
    return meets


def _xla_forward(causal: bool, first, q, k, v, segments: Segments) -> Attended:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    meets = _meet(causal, first, q.shape[1], k.shape[1], segments)
    if meets is not None:
        scores = jnp.where(meets, scores, NOTHING)
    log_sum = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - log_sum[..., None])
    if meets is not None:
        weights = jnp.where(meets, weights, 0)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return Attended(out.astype(q.dtype), log_sum)


def _xla_backward(causal: bool, first, q, gradient, log_sum, inner, k, v, segments: Segments):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jnp.exp(scores - log_sum.swapaxes(1, 2)[..., None])
    meets = _meet(causal, first, q.shape[1], k.shape[1], segments)
    if meets is not None:
        weights = jnp.where(meets, weights, 0)
    of_weights = jnp.einsum("bqhd,bkhd->bhqk", gradient, v, preferred_element_type=jnp.float32)
    of_scores = (weights * (of_weights - inner.swapaxes(1, 2)[..., None])).astype(q.dtype)
    dq = jnp.einsum("bhqk,bkhd->bqhd", of_scores, k, preferred_element_type=jnp.float32)
    dk = jnp.einsum("bhqk,bqhd->bkhd", of_scores, q, preferred_element_type=jnp.float32)
    dv = jnp.einsum("bhqk,bqhd->bkhd", weights.astype(q.dtype), gradient, preferred_element_type=jnp.float32)
    return dq.astype(q.dtype), dk, dv


# ---------------------------------------------------------------- TPU: JAX's Pallas splash attention


def tile(tokens: int, widest: int = LARGEST_TILE) -> tuple[int, int]:
    """Length to which the kernel's tokens are padded, and its tile: what costs least, padding and tiles together.

    With tiles of up to 1,024 the padding is at most a tenth beyond the next multiple of 128, and a tile at least 384
    wide, or all that there is.
    """

    def length(tile: int) -> int:
        return -(-tokens // tile) * tile

    best = min(range(LANES, widest + 1, LANES), key=lambda tile: (length(tile) * (1 + TILE_COST / tile), -tile))
    return length(best), best


def tile_bytes(block_q: int, block_k: int, tile: int, head: int, itemsize: int) -> int:
    """VMEM of the kernel of all gradients, which takes the most: blocks that come and go are there twice."""
    by_query, by_key = 3 * block_q, 4 * block_k  # q, its gradient and that of the result; k, v and their gradients
    sums = 4 * head * (block_q + 2 * block_k)
    segments = 2 * 4 * LANES * block_k
    return 2 * (by_query + by_key) * head * itemsize + sums + segments + 2 * 4 * block_q * tile


class _Shape(NamedTuple):
    """What a kernel is made for."""

    queries: int
    """Padded, as the keys are."""
    keys: int
    block_q: int
    block_k: int
    causal: bool
    fused: bool
    """One kernel makes the gradients of queries, keys and values."""
    long: bool
    """It takes two tiles of keys at a time, which leaves fewer partial gradients of queries to be summed, and half as
    many queries, which makes room for them."""
    device_kind: str

    @classmethod
    def of(cls, q, k, causal: bool) -> _Shape:
        """Of q and k [batch, tokens, heads, head]."""
        head, itemsize, kind = q.shape[3], q.dtype.itemsize, device_kind()
        vmem = vmem_bytes(kind)
        fitting = (t for t in range(LARGEST_TILE, LANES, -LANES) if tile_bytes(t, t, t, head, itemsize) <= vmem)
        widest = next(fitting, LANES)
        (queries, block_q), (keys, block_k) = tile(q.shape[1], widest), tile(k.shape[1], widest)
        # Five products in place of seven. But a gradient of the queries is left for each tile of keys: at times too
        # many bytes, and slow to sum for wide heads, whose tiles cannot be longer.
        tiles, narrow = keys // block_k, head <= LANES
        of_queries = q.shape[0] * queries * q.shape[2] * head * itemsize
        fused = tiles <= 4 or (narrow and of_queries * tiles <= FUSED_BYTES)
        halved = tiles % 2 == 0 and block_q % (2 * LANES) == 0
        fits = tile_bytes(block_q // 2, 2 * block_k, block_k, head, itemsize) <= vmem
        return cls(queries, keys, block_q, block_k, causal, fused, fused and narrow and halved and fits, kind)


@lru_cache
def _kernel(of: _Shape) -> splash.SplashAttentionKernel:
    """Of one head; its map over rows and heads has them as leading axes of its grid, which chips of two cores part."""
    queries, keys = of.queries, of.keys
    blocks = splash.BlockSizes(
        block_q=of.block_q,
        block_kv=of.block_k,
        block_q_dkv=of.block_q // 2 if of.long else of.block_q,
        block_kv_dkv=2 * of.block_k if of.long else of.block_k,
        block_kv_dkv_compute=of.block_k,
        block_q_dq=None if of.fused else of.block_q,
        block_kv_dq=None if of.fused else of.block_k,
        use_fused_bwd_kernel=of.fused,
    )
    one = splash_mask.CausalMask((queries, keys)) if of.causal else splash_mask.FullMask((queries, keys))
    make = functools.partial(
        splash.make_splash_mha,
        splash_mask.MultiHeadMask([one]),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        save_residuals=True,
        interpret=platform() != "tpu",  # off a TPU it is only ever run to test it
    )
    # It computes arrays at once. A thread of its own knows neither the trace under way nor the mesh in force, whose
    # devices need not be there.
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(make).result()


def _splash_forward(causal: bool, q, k, v, segments: Segments) -> Attended:
    queries, shape = q.shape[1], _Shape.of(q, k, causal)
    (q, k, v), ids = _for_kernel(shape, q, k, v, segments)
    kernel = _kernel(shape)
    out, (log_sum,) = _map(kernel, ids)(q, k, v)
    return Attended(by_token(out)[:, :queries], log_sum[:, :, :queries])


def _splash_backward(causal: bool, q, k, v, segments: Segments, whole: Attended, gradient):
    """What the kernel's own gradient does, with the denominator over all keys in place of its own."""
    queries, keys, shape = q.shape[1], k.shape[1], _Shape.of(q, k, causal)
    (q, k, v), ids = _for_kernel(shape, q, k, v, segments)
    log_sum = _pad(whole.log_sum.swapaxes(1, 2), q.shape[2]).swapaxes(1, 2)
    gradient, inner = by_head_with_inner(*(_pad(x, q.shape[2]) for x in (gradient, whole.out)))
    kernel = _kernel(shape)
    fixed, blocks = kernel.kwargs, kernel.kwargs["block_sizes"]
    common = {name: fixed[name] for name in ("is_mqa", "mask_value", "mask_function", "interpret")}
    common |= {name: getattr(blocks, name) for name in ("q_layout", "k_layout", "v_layout")}
    common |= {"attn_logits_soft_cap": None}

    of_q: Any = kernel.dq_mask_info
    of_keys: Any = kernel.dkv_mask_info

    def gradients(q, k, v, ids, log_sum, gradient, inner):
        dq, dk, dv = splash._splash_attention_bwd_dkv(
            q, k, v, ids, None, log_sum, gradient, inner,
            bq=blocks.block_q_dkv, bkv=blocks.block_kv_dkv, bkv_compute=blocks.block_kv_dkv_compute,
            mask_info=of_keys, use_fused_bwd_kernel=blocks.use_fused_bwd_kernel, **common,
        )  # fmt: skip
        if not blocks.use_fused_bwd_kernel:
            dq = splash._splash_attention_bwd_dq(
                q, k, v, ids, None, log_sum, gradient, inner,
                bq=blocks.block_q_dq, bkv=blocks.block_kv_dq, mask_info=of_q, **common,
            )  # fmt: skip
        return dq, dk, dv

    dq, dk, dv = _map(gradients, ids)(q, k, v, log_sum, gradient, inner)
    return dq.swapaxes(1, 2)[:, :queries], dk.swapaxes(1, 2)[:, :keys], by_token(dv)[:, :keys]


def _map(function, ids):
    """`function(q, k, v, ids, ...)` of single heads, over rows and heads; `ids` are of rows."""

    def of_head(ids, q, k, v, *others):
        some = function(*(x[None] for x in (q, k, v)), ids, *(x[None] for x in others))
        return jax.tree.map(lambda x: x[0], some)

    def of_row(ids, *given):
        return jax.vmap(functools.partial(of_head, ids))(*given)

    return functools.partial(jax.vmap(of_row), ids)


def _for_kernel(shape: _Shape, q, k, v, segments: Segments):
    """Heads before tokens, tokens padded to tiles, and segments where anything is absent, padding included."""
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    padded_q, padded_k = shape.queries, shape.keys
    ids = None
    if segments.keys is not None or padded_k != keys:
        of_keys = jnp.ones((batch, keys), jnp.int32) if segments.keys is None else segments.keys.astype(jnp.int32)
        if segments.queries is None:
            of_keys, of_queries = (of_keys > 0).astype(jnp.int32), jnp.ones((batch, queries), jnp.int32)
        else:
            of_queries = jnp.where(segments.queries > 0, segments.queries, -1).astype(jnp.int32)
        ids = splash.SegmentIds(_pad(of_queries, padded_q, -1), _pad(of_keys, padded_k, 0))
    # Queries and keys come from a kernel that wrote heads first, so that this swap is undone by another.
    q, k = (_pad(x, length).swapaxes(1, 2) for x, length in ((q, padded_q), (k, padded_k)))
    return (q, k, by_head(_pad(v, padded_k))), ids


def _pad(x: Array, length: int, value: int = 0) -> jax.Array:
    """Axis 1 to `length`."""
    if x.shape[1] == length:
        return jnp.asarray(x)
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2), constant_values=value)
