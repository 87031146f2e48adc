"""Exact attention in blocks, also when the keys are split over devices: each device holds its own and no more.

Queries split like the keys: a ring (arXiv:2310.01889). Keys and values go from neighbour to neighbour, and the next
ones are sent while the present ones are attended to; in backward their gradients travel with them and arrive at home.
Queries that every device holds (latents): each attends to the keys it has, and the results are joined by one sum.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from mmfm_jax.model import flash
from mmfm_jax.model.flash import Attended, Kernel, Segments
from mmfm_jax.parallel.loops import scan
from mmfm_jax.parallel.sharding import RULES, partition, split_over

(AXIS,) = RULES["tokens"]  # of the mesh
SAVED = "attention"  # name of what a rematerialised block may keep, so that backward need not attend again


@dataclass(frozen=True)
class Plan:
    """How one call of attention runs."""

    kernel: Kernel
    causal: bool
    keys: Literal["here", "ring", "joined"]
    """All on this device; going round with the queries split alike; or split, with every query everywhere."""
    q: PartitionSpec | None = None
    """How the mesh in force splits each array; None on a single device."""
    k: PartitionSpec | None = None
    log_sum: PartitionSpec | None = None
    segments: tuple[PartitionSpec | None, PartitionSpec | None] = (None, None)


def blockwise(kernel: Kernel, q, k, v, segments: Segments, causal: bool) -> jax.Array:
    """softmax(q k^T) v over what each query meets, [batch, query, heads, head]; on the mesh in force.

    Batch and heads are split by the rule table; tokens too, unless attention is causal.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _attend(Plan(kernel, causal, "here"), q, k, v, segments)

    def spec(shape, *axes) -> PartitionSpec:
        return partition(axes, shape, mesh)

    split = not causal and split_over("tokens", k.shape[1], mesh)
    keys = "here" if not split else "ring" if split_over("tokens", q.shape[1], mesh) else "joined"
    of_queries, of_keys = ("tokens" if keys == "ring" else None), ("tokens" if split else None)
    plan = Plan(
        kernel,
        causal,
        keys,
        q=spec(q.shape, "batch", of_queries, "heads", None),
        k=spec(k.shape, "batch", of_keys, "heads", None),
        log_sum=spec((q.shape[0], q.shape[2], q.shape[1]), "batch", "heads", of_queries),
        segments=(
            None if segments.queries is None else spec(segments.queries.shape, "batch", of_queries),
            None if segments.keys is None else spec(segments.keys.shape, "batch", of_keys),
        ),
    )
    return _attend(plan, q, k, v, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v, segments: Segments) -> jax.Array:
    return _attend_forward(plan, q, k, v, segments)[0]


def _attend_forward(plan: Plan, q, k, v, segments: Segments):
    forward = _on_mesh(_forward, plan, (plan.q, plan.k, plan.k, plan.segments), (plan.q, plan.log_sum))
    out, log_sum = forward(q, k, v, tuple(segments))
    out, log_sum = _keep(out.reshape(*q.shape[:2], -1)).reshape(out.shape), _keep(log_sum)
    return out, (q, k, v, segments, out, log_sum)


def _keep(x):
    """Named SAVED, as integers of the same bits: of floats that it keeps, rematerialisation rounds to their own
    precision what a kernel has already rounded, and on TPUs passes through memory for it."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jax.lax.bitcast_convert_type(checkpoint_name(bits, SAVED), x.dtype)


def _attend_backward(plan: Plan, residuals, gradient):
    q, k, v, segments, out, log_sum = residuals
    given = (plan.q, plan.k, plan.k, plan.segments, plan.q, plan.log_sum, plan.q)
    backward = _on_mesh(_backward, plan, given, (plan.q, plan.k, plan.k))
    return *backward(q, k, v, tuple(segments), out, log_sum, gradient), None


_attend.defvjp(_attend_forward, _attend_backward)


def _on_mesh(function, plan: Plan, in_specs, out_specs):
    function = functools.partial(function, plan)
    if plan.q is None:
        return function
    # check_vma: the kernels do not say over which axes their results vary.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


# ---------------------------------------------------------------- what a device does


def _forward(plan: Plan, q, k, v, segments):
    of_queries, of_keys = segments

    def over(k, v, of_keys) -> Attended:
        return flash.forward(plan.kernel, plan.causal, q, k, v, Segments(of_queries, of_keys))

    if plan.keys == "ring":
        whole = _ring_forward(over, k, v, of_keys)
    elif plan.keys == "joined":
        here = over(k, v, of_keys)
        largest = jax.lax.pmax(here.log_sum, AXIS)
        weight = jnp.exp(here.log_sum - largest)
        total = jax.lax.psum(weight, AXIS)
        out = here.out.astype(jnp.float32) * (weight / total).swapaxes(1, 2)[..., None]
        whole = Attended(jax.lax.psum(out, AXIS), largest + jnp.log(total))
    else:
        whole = over(k, v, of_keys)
    out = whole.out if of_keys is None else jnp.where(_met(whole.log_sum), whole.out, 0)
    return out.astype(q.dtype), whole.log_sum


def _backward(plan: Plan, q, k, v, segments, out, log_sum, gradient):
    of_queries, of_keys = segments
    if of_keys is not None:
        gradient = jnp.where(_met(log_sum), gradient, 0)
    whole = Attended(out, log_sum)

    def of(k, v, of_keys):
        return flash.backward(plan.kernel, plan.causal, q, k, v, Segments(of_queries, of_keys), whole, gradient)

    if plan.keys == "ring":
        dq, dk, dv = _ring_backward(of, k, v, of_keys)
    else:
        dq, dk, dv = of(k, v, of_keys)
        if plan.keys == "joined":
            dq = jax.lax.psum(dq.astype(jnp.float32), AXIS)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _met(log_sum):
    """Queries that met any key; of the others each kernel gives something else."""
    return (log_sum > flash.NOTHING / 2).swapaxes(1, 2)[..., None]


def _ring_forward(over, k, v, of_keys) -> Attended:
    def turn(carried, _):
        whole, held = carried
        following = _send(held)  # under way while this block is attended to
        return (flash.merge(whole, over(*held)), following), None

    first = over(k, v, of_keys)
    whole = Attended(first.out.astype(jnp.float32), first.log_sum)
    (whole, held), _ = scan(turn, (whole, _send((k, v, of_keys))), length=jax.lax.axis_size(AXIS) - 2)
    return flash.merge(whole, over(*held))


def _ring_backward(of, k, v, of_keys):
    def turn(carried, _):
        dq, held, gathered = carried
        following = _send(held)
        dq, gathered = add(dq, held, gathered)
        return (dq, following, gathered), None

    def add(dq, held, gathered):
        """With the gradients of the block held; those of its keys came here one turn after the keys."""
        of_q, *of_held = of(*held)
        return dq + of_q, jax.tree.map(jnp.add, _send(gathered), tuple(of_held))

    dq, *own = (x.astype(jnp.float32) for x in of(k, v, of_keys))
    carried = (dq, _send((k, v, of_keys)), tuple(own))
    carried, _ = scan(turn, carried, length=jax.lax.axis_size(AXIS) - 2)
    dq, gathered = add(*carried)
    return dq, *_send(gathered)


def _send(tree):
    """To the next device round the ring."""
    devices = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(tree, AXIS, [(i, (i + 1) % devices) for i in range(devices)])
